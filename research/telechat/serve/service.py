"""One served model: its state, its limits, and the requests of all APIs translated for the scheduler."""
import asyncio
import time
import weakref
from dataclasses import dataclass, replace
from typing import Any, Callable, FrozenSet, List, Optional, Sequence, Tuple, TypeVar, Union

from research.telechat.common.errors import ConfigError, ConversationError
from research.telechat.common.files import JsonObject
from research.telechat.generation.requests import NO_LOGPROBS, Request, Stats, TokenConstraint
from research.telechat.generation.sampling import Sampling
from research.telechat.serve.answering import Answers, Choice, Engine
from research.telechat.serve.constraint import Grammars, calls_grammar, json_grammar
from research.telechat.serve.errors import ApiError, too_long
from research.telechat.serve.metrics import Metrics
from research.telechat.serve.openai_requests import Asked, ChatBody, CompletionBody
from research.telechat.serve.text import AnswerText

STARTING, READY, DRAINING, BROKEN = "starting", "ready", "draining", "broken"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """The limits of one request."""

    body_bytes: int = 1 << 20
    messages: int = 1024
    choices: int = 8                         # n
    answers: int = 128                       # prompts of /v1/completions times n
    queue_timeout: float = 0.0               # seconds in the queue; 0: no limit


class Service:
    """The model behind the routes. `engine` is None until it is loaded."""

    def __init__(self, name: str, limits: Optional[Limits] = None):
        self.name, self.limits = name, limits or Limits()
        self.created = int(time.time())
        self.state = STARTING
        self.engine: Optional[Engine] = None
        self.metrics = Metrics(self.stats)
        self._grammars: Optional[Grammars] = None
        self._open: weakref.WeakSet[Answers] = weakref.WeakSet()

    def open(self, engine: Engine) -> None:
        """The model is loaded: accept requests from now on."""
        ends = engine.ends or {engine.renderer.end_id}
        self._grammars = Grammars(engine.renderer.vocab, engine.vocab_size, [engine.renderer.end_id, *ends],
                                  engine.renderer.kept_ids)
        self.engine = engine
        self.state = READY

    def fail(self, message: str) -> None:
        """The engine has failed: end all requests with an error and refuse new ones."""
        self.state = BROKEN
        for answers in list(self._open):
            answers.fail(message)

    def stats(self) -> Optional[Stats]:
        """The scheduler's stats, if there is one yet."""
        return self.engine.scheduler.stats() if self.engine else None

    def ready(self) -> Engine:
        """The engine. Raises ApiError unless requests are accepted."""
        if self.engine is None or self.state != READY:
            what = {STARTING: "is loading its model", DRAINING: "is stopping and takes no new requests",
                    BROKEN: "has failed and is shutting down"}.get(self.state, "is not ready")
            raise ApiError(503, f"the server {what}", code=f"server_{self.state}", retry_after=5)
        return self.engine

    def check_model(self, name: object) -> None:
        """Raises ApiError if `name` is not the served model."""
        if name is not None and name != self.name:
            raise ApiError(404, f"the model {str(name)[:80]!r} is not served here; available: {self.name!r}", "model",
                           "model_not_found")

    # Called by the APIs

    async def chat(self, body: ChatBody) -> Answers:
        """The answers to a body of /v1/chat/completions."""
        engine = self.ready()
        ids = await _in_thread(lambda: prompt_of(engine, body.messages, body.tools))
        asked = body.asked
        grammar = json_grammar(body.schema) if body.schema is not None else ""
        if body.called:
            grammar = calls_grammar(body.called, body.several_calls)
        param = "response_format" if body.schema is not None else "tool_choice"

        def text() -> AnswerText:
            return AnswerText(engine.renderer, self._stops(engine, asked.stop), tools=body.tools, thinking=not grammar,
                              one_call=not body.several_calls)
        constraint: Optional[Callable[[], TokenConstraint]] = None
        if grammar:
            constraint = self._constraint(grammar, param)
        choices = await _in_thread(lambda: self._choices(engine, asked, ids, text, constraint))
        return self.submit(choices)

    async def completion(self, body: CompletionBody) -> Tuple[Answers, List[Tuple[str, Sequence[int]]]]:
        """The answers to a body of /v1/completions, with the text and ids of each one's prompt."""
        engine = self.ready()
        asked, vocab = body.asked, engine.renderer.vocab

        def text() -> AnswerText:
            return AnswerText(engine.renderer, asked.stop, turn=False)

        def prepare() -> Tuple[List[Choice], List[Tuple[str, Sequence[int]]]]:
            choices: List[Choice] = []
            echoes: List[Tuple[str, Sequence[int]]] = []
            for prompt in body.prompts:
                ids = self._token_ids(engine, prompt)
                choices += self._choices(engine, asked, ids, text, None, scores=body.echo and asked.top_logprobs >= 0)
                if body.echo:
                    written = prompt if isinstance(prompt, str) else vocab.decode(ids)
                    echoes += [(written, ids)] * asked.n
            return choices, echoes
        choices, echoes = await _in_thread(prepare)
        return self.submit(choices, len(body.prompts)), echoes

    def submit(self, choices: Sequence[Choice], prompts: int = 1) -> Answers:
        """Submit to the scheduler. Raises ApiError."""
        answers = Answers(self.ready(), choices, self.metrics, self.limits.queue_timeout, prompts)
        self._open.add(answers)
        return answers

    def choice(self, engine: Engine, ids: Sequence[int], longest: int, sampling: JsonObject, text: AnswerText,
               **more: Any) -> Choice:
        """One answer. `sampling`: overrides the server's defaults; `more`: fields of the request."""
        try:
            ends = self._ends(engine)
            request = Request(tuple(ids), replace(engine.sampling, **sampling), longest,
                              **{"end_tokens": ends, **more})
        except ConfigError as err:
            raise ApiError(400, str(err)) from err
        return Choice(request, text)

    def _choices(self, engine: Engine, asked: Asked, ids: Sequence[int], text: Callable[[], AnswerText],
                 constraint: Optional[Callable[[], TokenConstraint]], scores: bool = False) -> List[Choice]:
        room = engine.context - len(ids)
        longest = asked.max_tokens
        if longest is None:
            longest = min(engine.max_new_tokens or room, room)
        if longest > room or (room < 1 and not (scores and longest == 0)):
            raise too_long(len(ids), max(longest, 1), engine.context)
        if longest == 0 and not scores:
            longest = 1                              # echo only: the token is not shown
        for token, _ in asked.sampling.get("logit_bias", ()):
            if token >= engine.vocab_size:
                raise ApiError(400, f"logit_bias: token {token} is outside the vocabulary of {engine.vocab_size}",
                               "logit_bias")
        ends: FrozenSet[int] = frozenset() if asked.ignore_eos else self._ends(engine)
        return [self.choice(engine, ids, longest, asked.sampling, text(), end_tokens=ends,
                            seed=None if asked.seed is None else (asked.seed + number) % 2 ** 32,
                            top_logprobs=asked.top_logprobs if asked.top_logprobs >= 0 else NO_LOGPROBS,
                            prompt_logprobs=scores, constraint=constraint() if constraint else None)
                for number in range(asked.n)]

    @staticmethod
    def _ends(engine: Engine) -> FrozenSet[int]:
        renderer = engine.renderer
        user = frozenset() if renderer.user_id is None else {renderer.user_id}
        return frozenset({renderer.end_id, *user, *engine.ends})

    @staticmethod
    def _stops(engine: Engine, stop: Sequence[str]) -> List[str]:
        return [*stop, *(engine.renderer.text_markers if engine.renderer.as_text else ())]

    def _constraint(self, grammar: str, param: str) -> Callable[[], TokenConstraint]:
        grammars = self._grammars
        if grammars is None:
            raise ApiError(503, "the server is loading its model", retry_after=5)
        return lambda: grammars.constraint(grammar, param)

    @staticmethod
    def _token_ids(engine: Engine, prompt: Union[str, List[int]]) -> List[int]:
        if isinstance(prompt, str):
            ids = engine.renderer.vocab.encode(prompt)
            if not ids:
                raise ApiError(400, "prompt: expected at least one token, found none", "prompt")
            return ids
        wrong = [token for token in prompt if token >= engine.vocab_size]
        if wrong:
            raise ApiError(400, f"prompt: token {wrong[0]} is outside the vocabulary of {engine.vocab_size}", "prompt")
        return prompt


def prompt_of(engine: Engine, messages: Sequence[JsonObject], tools: Sequence[JsonObject] = ()) -> List[int]:
    """Token ids of a conversation, not truncated. Raises ApiError."""
    try:
        return engine.renderer.prompt(messages, tools or None)
    except (ConversationError, ConfigError) as err:
        raise ApiError(400, str(err), "messages") from err


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """Run work of some milliseconds outside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


__all__ = ["BROKEN", "DRAINING", "READY", "STARTING", "Limits", "Sampling", "Service", "prompt_of"]
