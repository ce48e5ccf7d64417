"""Generation for TelechatForCausalLM: `generate` with MindFormers' signature, and the methods its generator needs.

Both `generate` and `stream` submit their requests to their own scheduler (generation/scheduler.py), which runs the
model's engine (generation/engine.py) and shares its cache with all others. Tokens are chosen as in the official code
(generation/sampling.py). Unsupported requests (adapters per request, parallel decoding) go to MindFormers' own loop.
"""
import contextlib
import copy
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable, Generator, Iterator, List, Optional, Sequence, Tuple, Union

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.generation.generation_config import GenerationConfig
from mindformers.generation.utils import GenerateOutput
from mindformers.tools.logger import logger
from mindspore import Tensor

from research.telechat.common.errors import ConfigError
from research.telechat.common.tokens import end_tokens
from research.telechat.generation.batch import check_room, padding_before, read_prompts, tokens_at_once
from research.telechat.generation.engine import DirectEngine, FrameworkEngine
from research.telechat.generation.native_engine import NativeEngine
from research.telechat.generation.passes import Settings
from research.telechat.generation.requests import Event, Request, Token
from research.telechat.generation.sampling import Random, Sampling, adjust, choose
from research.telechat.generation.scheduler import Place, Ranks, Scheduler, choose_each

if TYPE_CHECKING:
    from mindformers.generation import LogitsProcessorList
    from mindformers.generation.streamers import BaseStreamer
    from mindformers.models.modeling_utils import PreTrainedModel as Model  # the class it is mixed into

    from research.telechat.chat.api import GenerationSource
else:
    Model = object


class TelechatGenerationMixin(Model):
    """Mixed into TelechatForCausalLM."""

    def generate(self, input_ids: object, generation_config: Optional[GenerationConfig] = None,
                 logits_processor: Optional["LogitsProcessorList"] = None, streamer: Optional["BaseStreamer"] = None,
                 seed: Optional[int] = None, **kwargs: object) -> Any:
        """Answers to prompts.

        Args:
            input_ids: token ids of one prompt or of several, of equal length (padded on either side) or not. The result
                keeps padding before a prompt and drops padding after it.
            generation_config: settings; None: those of the model's config.
            logits_processor: MindFormers' LogitsProcessorList, applied after the repetition penalty.
            streamer: its `put` gets the prompts, then every new token; then `end` is called.
            seed: for sampling, 0 to 2^32 - 1; the same seed gives the same text.
            **kwargs: override fields of the generation config (max_new_tokens, do_sample, ...).

        Returns:
            list of int32 arrays, prompt and answer; a GenerateOutput with `return_dict_in_generate`.

        Raises:
            ConfigError: prompt too long or from another vocabulary, cache too small, invalid setting.
        """
        config = self._generation_config(generation_config, kwargs)
        if self._needs_framework(config, kwargs):
            return super().generate(input_ids, generation_config, logits_processor, streamer, seed, **kwargs)
        prompts = read_prompts(input_ids, config.pad_token_id, self.config.vocab_size, config.bos_token_id)
        batch = _Batch(prompts, self._limits(prompts, config), config.pad_token_id or 0)
        record = _Record(config)
        choose = _ChooseTogether(batch, logits_processor, record) if logits_processor or record.active else choose_each
        settings = Settings(slots=len(prompts), buckets=(len(prompts),), reuse=False, together=True,
                            prefill_tokens=tokens_at_once(self.config.num_heads, max(batch.limits)))
        scheduler = Scheduler(self._engine(), settings, choose)
        rng = _random(seed)                                # shared by all rows, in order
        for row, request in enumerate(batch.requests(_sampling(config), config.eos_token_id)):
            scheduler.submit(request, batch.listener(row), rng, batch.tokens[row])
        if streamer is not None:
            streamer.put(batch.tokens[:, :batch.lengths.max()].copy())
        started = time.time()
        with self._generating(scheduler):
            more = True
            while more:
                batch.begin_step()
                more = self._step(scheduler, batch.limits)
                if streamer is not None:
                    streamer.put(batch.newest if len(batch.newest) > 1 else batch.newest[0])
        if streamer is not None:
            streamer.end()
        seconds, new = time.time() - started, int((batch.lengths - batch.prompt_lengths).sum())
        logger.info("total time: %s s; generated tokens: %s tokens; generate speed: %s tokens/s", seconds, new,
                    new / seconds)
        before = padding_before(input_ids, config.pad_token_id, config.bos_token_id)
        sequences = [np.concatenate([np.full(count, config.pad_token_id, np.int32), sequence]) if count else sequence
                     for count, sequence in zip(before, batch.sequences())]
        return record.output(sequences) if config.return_dict_in_generate else sequences

    def stream(self, input_ids: Sequence[int], generation_config: Optional[GenerationConfig] = None,
               seed: Optional[int] = None, session: object = None, **kwargs: object) -> Generator[int, None, None]:
        """The tokens of the answer to one prompt, one by one; stop iterating to stop the answer. As `generate`.

        Streams of one model may be interleaved. session: prompts of the same session share the cache of their common
        prefix, so the next turn of a conversation prefills only what is new; None: no sharing. The weights must not
        change within a session.
        """
        config = self._generation_config(generation_config, kwargs)
        prompts = read_prompts(list(input_ids), None, self.config.vocab_size)
        batch = _Batch(prompts, self._limits(prompts, config), config.pad_token_id or 0)
        if session is not None and session is not getattr(self, "_session", None):
            self._session = session
            self._forget()
        scheduler = Scheduler(self._engine(), Settings(
            buckets=(1,), reuse=session is not None,
            prefill_tokens=tokens_at_once(self.config.num_heads, batch.limits[0])))
        request = batch.requests(_sampling(config), config.eos_token_id)[0]
        scheduler.submit(request, batch.listener(0), _random(seed), batch.tokens[0])
        with self._generating(scheduler):
            more = True
            while more:
                length = batch.lengths[0]
                more = self._step(scheduler, batch.limits)
                if batch.lengths[0] > length:                  # a long prompt takes several steps
                    yield batch.newest[0]

    def scheduler(self, settings: Optional[Settings] = None, ranks: Optional[Ranks] = None) -> Scheduler:
        """A scheduler for many concurrent requests, as in a server; the model stays in inference mode.

        ranks: from generation/ranks.py, if the model runs in several processes.
        """
        self.set_train(False)
        self._name_phases(settings.slots if settings and settings.together else 1)
        return Scheduler(self._engine(), settings, ranks=ranks)

    def chat(self, tokenizer: object, question: Optional[str] = None, history: Optional[Sequence[dict]] = None,
             generation_config: "GenerationSource" = None, stream: bool = False, query: Optional[str] = None,
             instruction: str = "", **kwargs: Any) -> Any:
        """`telechat_predict_utils.chat` as a method, as in the official README. `query` and `instruction` are
        MindFormers' names for the question and the system prompt."""
        from research.telechat.chat.api import chat
        if instruction:
            kwargs.setdefault("system", instruction)
        return chat(self, tokenizer, question or query, history, generation_config, stream, **kwargs)

    @contextlib.contextmanager
    def _generating(self, scheduler: Scheduler) -> Iterator[None]:
        """Context with the model in inference mode; unfinished requests are cancelled at the end."""
        phase = self.phase
        if phase != "predict":                                 # it visits all cells of the model
            self.set_train(False)
        self._schedulers().add(scheduler)
        try:
            yield
        finally:
            self._schedulers().discard(scheduler)
            scheduler.close()
            if phase == "train":
                self.set_train()

    def _step(self, scheduler: Scheduler, limits: Sequence[int]) -> bool:
        """One step of a scheduler whose requests need `limits` tokens -> whether there is more to do."""
        self._name_phases(len(limits))
        if not scheduler.running:
            self._make_room(scheduler, limits)
        return scheduler.step()

    def _make_room(self, scheduler: Scheduler, limits: Sequence[int]) -> None:
        """Make room in the cache for sequences of `limits` tokens, preempting other streams if necessary."""
        pool = self._engine().pool
        if pool is None:
            return
        needed = sum(map(pool.blocks_for, limits))
        if needed > pool.total:
            raise ConfigError(f"{len(limits)} sequences of up to {max(limits)} tokens need {needed} blocks of "
                              f"{pool.block_size} tokens in the KV cache, but num_blocks is {pool.total}: raise "
                              "num_blocks, or ask for fewer sequences or tokens")
        for other in self._schedulers():
            if other is not scheduler and needed > pool.available:
                other.put_aside()
        if needed > pool.available:
            raise ConfigError(f"{pool.total - pool.available} of the {pool.total} blocks of the KV cache are used by "
                              f"a scheduler of this model, and {needed} are needed: submit the request there")

    def _schedulers(self) -> "weakref.WeakSet[Scheduler]":
        """Schedulers with unfinished requests."""
        if not hasattr(self, "_open_schedulers"):
            self._open_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
        return self._open_schedulers

    def _forget(self) -> None:
        """Invalidate all cached keys and values."""
        pool = self._engine().pool
        if pool is not None:
            pool.forget()

    def _generation_config(self, given: Optional[GenerationConfig], changes: dict) -> GenerationConfig:
        """A copy of the settings with `changes` applied and the end tokens as a list."""
        config = copy.deepcopy(given) if given is not None else GenerationConfig.from_model_config(self.config)
        config.update(**{key: value for key, value in changes.items() if key != "use_past"})
        config.eos_token_id = end_tokens(config.eos_token_id)
        return config

    def _needs_framework(self, config: GenerationConfig, kwargs: dict) -> bool:
        """Whether only MindFormers' own loop can serve the request."""
        return bool(getattr(self.config, "parallel_decoding_params", None) or kwargs.get("adapter_id")
                    or getattr(self.config, "is_sample_acceleration", False))

    def _limits(self, prompts: List[np.ndarray], config: GenerationConfig) -> List[int]:
        """Tokens of prompt and answer together, per prompt. max_new_tokens takes precedence over max_length."""
        new = config.max_new_tokens
        if new is not None and new <= 0:
            raise ConfigError(f"max_new_tokens: expected a positive number, found {new}")
        context = self.config.seq_length
        wanted = [config.max_length if new is None else len(prompt) + new for prompt in prompts]
        check_room(prompts, wanted, context)
        if max(wanted) > context:
            logger.warning("%s tokens of prompt and answer exceed the model's seq_length; generation stops at %s.",
                           max(wanted), context)
        return [min(limit, context) for limit in wanted]

    def _engine(self) -> Union[DirectEngine, FrameworkEngine]:
        if not hasattr(self, "_step_engine"):
            decoder = self.native_decoder()
            direct = self.use_past and not self.model.step.paged
            self._step_engine = (NativeEngine(self, decoder) if decoder is not None else
                                 DirectEngine(self) if direct else FrameworkEngine(self))
        return self._step_engine

    def _cache_is_stale(self, lengths: np.ndarray) -> bool:
        """Whether the newest tokens of sequences of `lengths` tokens change the rotary scaling of all earlier ones."""
        engine = self._engine()
        stale = [length for length in map(int, np.reshape(lengths, -1))
                 if engine.scaling(length) != engine.scaling(max(length - 1, 1))]
        if stale:
            engine.stale(max(stale))
        return bool(stale)

    def _name_phases(self, batch: int) -> None:
        """Give each batch size its own graph with static shapes; MindFormers would run the first one for any batch."""
        if not hasattr(self, "_phase_batch"):
            self._phase_batch = batch
        own = self.use_past and not self.config.is_dynamic and batch != self._phase_batch
        self._set_network_phase(f"batch{batch}" if own else None)

    # Called by MindFormers' generator and trainer

    def forward(self, input_ids: np.ndarray, valid_length_each_example: np.ndarray, block_tables: Any = None,
                slot_mapping: Optional[np.ndarray] = None, prefill: Optional[bool] = None, use_past: bool = False,
                **kwargs: object) -> Any:
        """One step of MindFormers' generator; recomputes everything if the rotary scaling makes the cache stale."""
        if use_past:
            self._forget()                                     # it allocates blocks on its own
        if use_past and not prefill and self._cache_is_stale(valid_length_each_example):
            positions = np.arange(input_ids.shape[1])
            size = self.config.block_size
            columns = np.minimum(positions // size, block_tables.shape[1] - 1)
            slots = block_tables[:, columns] * size + positions % size             # [B, S]
            slots[positions[None] >= np.reshape(valid_length_each_example, (-1, 1))] = -1
            slot_mapping, prefill = slots.reshape(-1).astype(np.int32), True
            kwargs["origin_inputs"] = input_ids
        return super().forward(input_ids, valid_length_each_example, block_tables, slot_mapping, prefill, use_past,
                               **kwargs)

    def add_flags_custom(self, is_first_iteration: bool) -> None:
        """Whether the next graph prefills (True) or decodes one token per sequence."""
        self.add_flags(is_first_iteration=is_first_iteration)
        self.model.step.add_flags(is_first_iteration=is_first_iteration)
        for layer in self.model.layers:
            layer.attention.add_flags(is_first_iteration=is_first_iteration)

    def set_dynamic_inputs(self, **_kwargs: object) -> None:
        """Compile for prompts and batches of any size; called if is_dynamic is set."""
        any_2d, any_1d = Tensor(shape=[None, None], dtype=mstype.int32), Tensor(shape=[None], dtype=mstype.int32)
        self.set_inputs(any_2d, None, None, None, None, None, None, any_2d, None, None, any_2d, any_1d, None)

    def prepare_inputs_for_predict_layout(self, input_ids: np.ndarray, **_kwargs: object
                                          ) -> Tuple[Optional[Tensor], ...]:
        """Arguments of `construct` with which MindFormers compiles once to learn how the parameters are sharded.

        input_ids: [B, S].
        """
        batch, seq = np.shape(input_ids)
        if not self.use_past:
            return (Tensor(np.asarray(input_ids), mstype.int32),)
        rows = (1, batch * seq) if self.config.is_dynamic else (batch, seq)        # back to back, or padded
        tokens = Tensor(np.reshape(input_ids, rows), mstype.int32)
        lengths = Tensor(np.full((1, batch), seq), mstype.int32)
        block_tables = Tensor(np.zeros((batch, -(-seq // self.config.block_size))), mstype.int32)
        slot_mapping = Tensor(np.full(batch * seq, -1), mstype.int32)
        return (tokens, None, None, None, None, None, None, lengths, None, None, block_tables, slot_mapping, None)

    def prepare_inputs_for_generation(self, input_ids: np.ndarray, **kwargs: object) -> dict:
        """Arguments of `construct` for one step of MindFormers' generator."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not self.use_past:            # the length determines the rotary tables; only the last logits are needed
            inputs["batch_valid_length"] = Tensor(np.asarray(kwargs["valid_length_each_example"])[None], mstype.int32)
        return inputs


class _Record:
    """Logits and scores of every step, if requested."""

    def __init__(self, config: GenerationConfig):
        keep = config.return_dict_in_generate
        self.logits: Optional[list] = [] if keep and config.output_logits else None
        self.scores: Optional[list] = [] if keep and config.output_scores else None
        self.active = self.logits is not None or self.scores is not None

    def output(self, sequences: List[np.ndarray]) -> GenerateOutput:
        """In MindFormers' form."""
        return GenerateOutput(sequences=sequences, scores=None if self.scores is None else tuple(self.scores),
                              logits=None if self.logits is None else tuple(self.logits))


def _sampling(config: GenerationConfig) -> Sampling:
    """The sampling settings of `config`. Raises ConfigError if one is invalid."""
    least, sample = config.min_new_tokens or 0, config.do_sample
    sample = bool(sample) if sample is None or sample in (0, 1) else sample             # and not "false"
    return Sampling(sample, config.temperature or 1.0 if not config.do_sample else config.temperature,
                    config.top_k, config.top_p, config.repetition_penalty or 1.0, least)


def _random(seed: Optional[int]) -> Random:
    """The random source: NumPy's global state, which MindFormers' `set_seed` sets, or a seeded one."""
    return np.random if seed is None else _seeded(seed)  # type: ignore[return-value]    # a module with that method


def _seeded(seed: int) -> np.random.RandomState:
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2 ** 32:
        raise ConfigError(f"seed: expected a whole number from 0 to 2^32 - 1, found {seed!r}")
    return np.random.RandomState(seed)


class _Batch:
    """Prompts that are answered together.

    Attributes: `tokens` [B, longest limit] int32; `lengths`, `prompt_lengths` [B]; `limits`, tokens, per prompt;
    `newest`, the token of each in this step, padding for finished ones.
    """

    def __init__(self, prompts: List[np.ndarray], limits: List[int], pad: int):
        self.prompts, self.limits, self._pad = prompts, limits, pad
        self.tokens = np.full((len(prompts), max(limits)), pad, np.int32)
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts])
        self.lengths = self.prompt_lengths.copy()
        for row, prompt in zip(self.tokens, prompts):
            row[:len(prompt)] = prompt
        self.newest: List[int] = []
        self.begin_step()

    def requests(self, sampling: Sampling, ends: Sequence[int]) -> List[Request]:
        """One per prompt."""
        return [Request(tuple(prompt.tolist()), sampling, limit - len(prompt), frozenset(ends))
                for prompt, limit in zip(self.prompts, self.limits)]

    def listener(self, row: int) -> Callable[[Event], None]:
        """The event callback of a prompt."""
        def on_event(event: Event) -> None:
            if isinstance(event, Token):
                self.newest[row] = event.id
                self.lengths[row] += 1
        return on_event

    def begin_step(self) -> None:
        """Reset the newest tokens."""
        self.newest = [self._pad] * len(self.prompts)

    def sequences(self) -> List[np.ndarray]:
        """Prompt and answer of each, int32."""
        return [row[:length].copy() for row, length in zip(self.tokens, self.lengths)]


class _ChooseTogether:
    """Chooses the tokens of a whole batch: logits processors see all logits, which may also have to be recorded."""

    def __init__(self, batch: _Batch, processors: Optional["LogitsProcessorList"], record: "_Record"):
        self._batch, self._processors, self._record = batch, processors, record

    def __call__(self, places: List[Place]) -> List[Token]:
        """The next token of each of `places`, which are numbered by their position in the batch, from 1."""
        rows = [place.row.number - 1 for place in places]
        first = places[0].step.logits()
        logits = np.zeros((len(self._batch.lengths), first.shape[-1]), np.float32)
        scores = logits.copy()
        for row, place in zip(rows, places):
            sequence = place.row
            logits[row] = place.step.logits()[place.at]
            scores[row] = adjust(logits[row], sequence.sequence, sequence.length - sequence.prompt_length,
                                 sequence.ends, sequence.request.sampling)
        if self._record.logits is not None:
            self._record.logits.append(logits)
        if self._processors:
            finished = [row not in rows for row in range(len(logits))]
            scores = np.asarray(self._processors(self._batch.tokens, scores, finished))
        if self._record.scores is not None:
            self._record.scores.append(scores)
        return [Token(choose(scores[row], place.row.request.sampling, place.row.rng))
                for row, place in zip(rows, places)]
