"""`TelechatLM`: the adapter of TeleChat models for lm-evaluation-harness. scripts/evaluate.py is the command.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) defines the tasks and judges the answers;
evaluation/score.py scores tokens, generation/scheduler.py generates answers. Importing this file needs the package
lm-eval, the extra `evaluation` of setup.cfg.
"""
import contextlib
import json
from collections import Counter
from functools import lru_cache
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from mindformers.tools.logger import logger
from tqdm import tqdm

from research.telechat.chat.session import divide_context
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.common.tokens import end_tokens
from research.telechat.evaluation.answers import DEFAULT_THINKING, Answer, read_settings
from research.telechat.evaluation.batches import fit
from research.telechat.evaluation.score import Scorer
from research.telechat.generation.passes import Settings
from research.telechat.generation.requests import Event, Finished, Request, Ticket, Token
from research.telechat.generation.sampling import Sampling
from research.telechat.generation.scheduler import Scheduler
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.telechat_tokenizer import TelechatTokenizer
from research.telechat.text.renderer import BOT, Renderer, choose_template, to_message


class TelechatLM(TemplateLM):
    """Log-likelihoods and generation for lm-evaluation-harness.

    Every rank of a parallel run makes its own and gets all requests, since a model sharded over cards needs every rank
    for each request; the harness sees one process.

    Attributes: `counts`, what had to be truncated, for the report: requests by kind.

    Args:
        model: TelechatForCausalLM with its weights.
        tokenizer: its TelechatTokenizer.
        batch_size: requests computed together.
        seed: of sampling, for tasks that sample.
        progress: show progress bars.
        thinking_tokens: limit of the reasoning before an answer, if prompts open it; the task's limit is the answer's.

    Raises:
        ConfigError: see `Scorer`; markers of the chat template that the vocabulary lacks.
    """

    def __init__(self, model: TelechatForCausalLM, tokenizer: TelechatTokenizer, batch_size: int = 8, seed: int = 0,
                 progress: bool = True, thinking_tokens: int = DEFAULT_THINKING):
        super().__init__()
        self.scorer = Scorer(model, batch_size, progress)
        self.model, self.tokenizer, self.vocab = model, tokenizer, tokenizer.vocab
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        self.thinking_tokens = thinking_tokens
        # A task's instruction comes as a system prompt, which some families do not have: it must not get lost.
        self.renderer = Renderer(choose_template(self.vocab, model.config.chat_template), self.vocab,
                                 system_policy="prepend")
        self.counts: Counter = Counter()
        self._encode = lru_cache(maxsize=4)(self.vocab.encode_with_specials)    # the choices of a question share it
        self._rendered: Dict[str, List[int]] = {}          # prompts of the chat template, with their ids

    @property
    def max_length(self) -> int:
        """Tokens of the longest input."""
        return self.scorer.limit

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self.renderer.end_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without context: the start token, or the end token if there is no start token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Identifies the vocabulary in the harness's caches."""
        return f"telechat-{self.vocab.fingerprint[:16]}"

    # Text to tokens

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **_kwargs: object) -> List[int]:
        """Ids of a text; markers written in it are single tokens, as the tokenizer reads them."""
        known = self._known_prompt(string)
        if known is not None:
            ids, rest = known
            return ids + (self.vocab.encode(rest) if rest else [])
        ids = list(self._encode(string))
        add = self.tokenizer.add_bos_token if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if add and bos is not None and ids[:1] != [bos] else ids

    def chat_template(self, chat_template: object = False) -> Optional[str]:
        """Name of the renderer's template, for the report."""
        return self.renderer.template.name if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation as text. Its ids are cached: re-encoding would parse markers in texts.

        Without `add_generation_prompt` the last message is the beginning of the answer.
        """
        messages = list(chat_history)
        begun = ""
        if not add_generation_prompt and messages and to_message(messages[-1], len(messages)).role == BOT:
            begun = messages.pop()["content"]
        ids = self.renderer.prompt(messages)
        text = self.vocab.decode(ids)
        self._rendered[text] = ids
        return text + begun

    def _known_prompt(self, text: str) -> Optional[Tuple[List[int], str]]:
        """(ids of the rendered prompt that `text` begins with, the rest of the text), or None."""
        if not self._rendered:
            return None
        marker = (self.renderer.template.bot if self.renderer.as_text else
                  self.vocab.decode(self.renderer.opening_ids))
        end = len(text)
        while end >= 0:
            end = text.rfind(marker, 0, end)
            if end >= 0 and text[:end + len(marker)] in self._rendered:
                return self._rendered[text[:end + len(marker)]], text[end + len(marker):]
        return None

    # What the harness calls

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> List[Tuple[float, bool]]:
        """(log-likelihood, greedy) of the continuation of each request, given its context."""
        bar = tqdm(requests, desc="tokens", unit="text", disable=not self.progress)
        return self._loglikelihood_tokens((request.args, *self._encode_pair(*request.args)) for request in bar)

    def _encode_pair(self, context: str, continuation: str) -> Tuple[List[int], List[int]]:
        """Both as ids, encoded together as the harness does; without a context, after the start token."""
        if context:
            if self.renderer.thinks and self._reasons(self.tok_encode(context)):
                raise ConfigError("this model starts its answers with reasoning, after which no log-likelihood can be "
                                  "scored; omit --apply_chat_template, or use tasks that generate")
            return super()._encode_pair(context, continuation)
        return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests: Iterable[Tuple[Tuple[str, str], List[int], List[int]]],
                              disable_tqdm: bool = False, **_kwargs: object) -> List[Tuple[float, bool]]:
        """(log-likelihood, greedy) of each continuation, given its context, both as ids.

        Only an array is kept per request: lists of ids take nine times the memory.
        """
        texts, scored = [], []
        lost: Counter[str] = Counter()
        for pair, context, continuation in requests:
            fitted = fit(context or [self.prefix_token_id], continuation, self.max_length)
            texts.append(pair)
            scored.append(fitted.scored._replace(ids=np.array(fitted.scored.ids, np.int32)))
            lost["requests had their context truncated"] += fitted.lost_context > 0
            lost["requests had their scored text truncated"] += fitted.lost_target > 0
            lost["requests have no tokens to score (log-likelihood 0)"] += not fitted.scored.count
        for what, count in lost.items():
            self._report(what, count, len(scored))
        results = self.scorer.score(scored, "log-likelihoods")
        for pair, result in zip(texts, results):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> List[float]:
        """Log-likelihood of each whole text, even if it is longer than the context."""
        texts = [request.args[0] for request in requests]
        encoded = [self.tok_encode(text, add_special_tokens=False) for text in texts]
        results = self.scorer.rolling(encoded, self.prefix_token_id, "log-likelihoods of texts")
        for text, result in zip(texts, results):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> List[str]:
        """The answer to each prompt, up to the first of its stop strings, an end token, or the token limit."""
        prompts = [_Prompt(number, self.tok_encode(request.args[0]) or [self.prefix_token_id],
                           read_settings(request.args[1])) for number, request in enumerate(requests)]
        prompts = self._thought(prompts, [request.args[0] for request in requests])
        answers = [listener.answer.text for listener in self._answers(prompts)]
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _reasons(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends within the reasoning that comes before the answer."""
        opening = self.renderer.opening_ids
        return self.renderer.thinks and list(ids[-len(opening):]) == opening

    def _thought(self, prompts: List["_Prompt"], texts: Sequence[str]) -> List["_Prompt"]:
        """`prompts`, with the model's reasoning inserted where a task begins the answer and the model reasons first."""
        begun: Dict[int, Tuple[List[int], str]] = {}
        for prompt, text in zip(prompts, texts):
            known = self._known_prompt(text)
            if known is not None and known[1] and self._reasons(known[0]):
                begun[prompt.number] = known
        if not begun:
            return prompts
        places = list(begun)
        first = [_Prompt(place, begun[number][0], {**prompts[number].settings, "until": []}, True)
                 for place, number in enumerate(places)]
        thoughts = self._answers(first)
        found, line = list(prompts), len(self.vocab.encode("\n"))
        for number, listener in zip(places, thoughts):
            ids, rest = begun[number]
            reasoning = self.vocab.decode(listener.thoughts).partition("</think>")[0].rstrip("\n")
            thought = f"\n{reasoning}{self.renderer.template.think_end}"          # the prompt ends with this newline
            found[number] = prompts[number]._replace(
                ids=[*ids, *self.vocab.encode_with_specials(thought)[line:], *self.vocab.encode(rest)])
        return found

    def _asked(self, group: List["_Prompt"]) -> List["_Asked"]:
        """Requests for prompts that have the same settings and either all reason or all do not."""
        settings, reasons = dict(group[0].settings), self._reasons(group[0].ids)
        wanted, until, unknown = settings.pop("max_new_tokens"), settings.pop("until"), settings.pop("unknown")
        thinking = self.thinking_tokens if reasons else 0
        budget = divide_context(self.max_length, wanted + thinking, None)
        longest = budget.answer or wanted + thinking
        thinking = max(longest - wanted, longest // 2) if reasons and longest < wanted + thinking else thinking
        limits = (longest - thinking, thinking)
        self._report(f"answers are limited to {limits[0]} tokens instead of {wanted}",
                     len(group) * (limits[0] < wanted), len(group))
        self._report(f"answers may use {thinking} tokens for reasoning instead of {self.thinking_tokens}",
                     len(group) * (reasons and thinking < self.thinking_tokens), len(group))
        self._report("prompts were truncated at the start", sum(len(each.ids) > budget.prompt for each in group),
                     len(group))
        if unknown:
            self._report(f"prompts have unknown settings: {', '.join(unknown)}", len(group), len(group))
        renderer, sampling = self.renderer, Sampling(**settings)
        ends = frozenset({renderer.end_id, *end_tokens(self.model.config.eos_token_id),
                          *([renderer.user_id] if renderer.user_id is not None else [])})
        stops = until + (renderer.text_markers if renderer.as_text else [])
        return [_Asked(each.number, Request(tuple(map(int, each.ids[-budget.prompt:])), sampling, longest, ends,
                                            (self.seed + each.number) % 2 ** 32), stops, reasons, limits,
                       each.thoughts_only) for each in group]

    def _answers(self, prompts: List["_Prompt"]) -> List["_Listener"]:
        """The answer to each prompt, in order. As soon as one ends, the next request takes its slot; those that may be
        longest come first, so that no slot waits for them at the end."""
        groups: Dict[str, List[_Prompt]] = {}
        for prompt in prompts:
            key = json.dumps([prompt.settings, self._reasons(prompt.ids)], sort_keys=True)
            groups.setdefault(key, []).append(prompt)
        asked = sorted((each for group in groups.values() for each in self._asked(group)),
                       key=lambda each: (-each.request.max_new_tokens, -len(each.request.prompt)))
        if not asked:
            return []
        scheduler = self.model.scheduler(self._settings(asked))
        listeners: Dict[int, _Listener] = {}
        with contextlib.closing(scheduler), tqdm(total=len(asked), desc="answers", unit="text",
                                                 disable=not self.progress) as bar:
            for each in asked:
                answer = Answer(self.vocab, each.request.prompt, each.request.end_tokens, each.stops,
                                self.renderer.kept_ids, each.thinking)
                listener = _Listener(scheduler, answer, bar, each)
                listener.ticket = scheduler.submit(each.request, listener)
                listeners[each.number] = listener
            if scheduler.settings.together:                    # another number of sequences would recompile
                for _ in range(-len(asked) % scheduler.settings.slots):
                    scheduler.submit(asked[-1].request)
            while not all(listener.finished for listener in listeners.values()):
                if not scheduler.step() and not all(listener.finished for listener in listeners.values()):
                    raise RuntimeError("the scheduler ended before all answers were complete; a listener failed")
        self._report("answers did not finish their reasoning within the limit",
                     sum(listener.answer.reasoning for listener in listeners.values()), len(asked))
        return [listeners[prompt.number] for prompt in prompts]

    def _settings(self, asked: List["_Asked"]) -> Settings:
        """As many answers at once as the user asks for and the cache holds; one graph serves them all."""
        engine, slots = self.model.scheduler().engine, self.batch_size
        if engine.together and engine.pool is not None:
            longest = max(len(each.request.prompt) + each.request.max_new_tokens for each in asked)
            slots = max(min(slots, engine.pool.total // engine.pool.blocks_for(longest)), 1)
        return Settings(slots=min(slots, len(asked)), buckets=(min(slots, len(asked)),), max_queue=2 * len(asked),
                        together=engine.together)

    def _report(self, what: str, count: int, of: int) -> None:
        """Log once per call what had to be left out, and keep the count."""
        if count:
            self.counts[what] += count
            logger.warning("evaluation: %d of %d %s; model_config.seq_length is %d.", count, of, what, self.max_length)


class _Prompt(NamedTuple):
    number: int
    ids: List[int]
    settings: JsonObject
    thoughts_only: bool = False      # what follows the reasoning is discarded


class _Asked(NamedTuple):
    number: int
    request: Request
    stops: List[str]
    thinking: bool
    limits: Tuple[int, int]          # tokens of the answer, and of the reasoning before it
    thoughts_only: bool


class _Listener:
    """Turns the tokens of a request into its answer, and cancels it at a stop string or a limit."""

    def __init__(self, scheduler: Scheduler, answer: Answer, bar: tqdm, asked: _Asked):
        self.answer, self.finished = answer, False
        self.ticket: Optional[Ticket] = None
        self.thoughts: List[int] = []                      # tokens of the reasoning, where the model reasons
        self._scheduler, self._bar, self._asked = scheduler, bar, asked
        self._reasoned = self._answered = 0                # tokens, end tokens included

    def __call__(self, event: Event) -> None:
        """Called by the scheduler."""
        if isinstance(event, Token):
            if self.answer.reasoning:
                self._reasoned += 1
                if event.id not in self._asked.request.end_tokens:       # a turn may end within its reasoning
                    self.thoughts.append(event.id)
            else:
                self._answered += 1
            self.answer.add(event.id)
            if self._is_enough() and self.ticket is not None:
                self._scheduler.cancel(self.ticket)
        elif isinstance(event, Finished):
            self.answer.close()
            self.finished = True
            self._bar.update()

    def _is_enough(self) -> bool:
        if self.answer.reasoning:
            return self._reasoned >= self._asked.limits[1]
        return self.answer.stopped or self._answered >= self._asked.limits[0] or self._asked.thoughts_only
