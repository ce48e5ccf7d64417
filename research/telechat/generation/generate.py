"""Generation for TelechatForCausalLM: `generate` with MindFormers' signature, and what its generator asks of a model.

The loop here chooses tokens as the official code does (generation/sampling.py) and runs the steps that
generation/engine.py gives it. Requests it does not know (adapters per request, parallel decoding) go to MindFormers'
own loop.
"""
import copy
import time
from typing import TYPE_CHECKING, Any, Generator, Iterable, Iterator, List, Optional, Sequence, Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.generation.generation_config import GenerationConfig
from mindformers.generation.utils import GenerateOutput
from mindformers.tools.logger import logger
from mindspore import Tensor

from research.telechat.common.errors import ConfigError
from research.telechat.common.tokens import end_tokens
from research.telechat.generation.batch import Batch, Blocks, read_prompts
from research.telechat.generation.engine import DirectEngine, FrameworkEngine, Step, scaling_changes
from research.telechat.generation.sampling import Random, Sampling, adjust, choose

if TYPE_CHECKING:
    from mindformers.generation import LogitsProcessorList
    from mindformers.generation.streamers import BaseStreamer
    from mindformers.models.modeling_utils import PreTrainedModel as Model  # what it is mixed into

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
            input_ids: token ids of one prompt or of several, of equal length (padded on the right) or not.
            generation_config: settings; None: those of the model's config.
            logits_processor: MindFormers' LogitsProcessorList, applied after the repetition penalty.
            streamer: its `put` gets the prompts, then every new token; then `end` is called.
            seed: of sampling, 0 to 2^32 - 1; the same seed gives the same text.
            **kwargs: fields of the generation config that win over it (max_new_tokens, do_sample, ...).

        Returns:
            list of int32 arrays, prompt and answer; a GenerateOutput with `return_dict_in_generate`.

        Raises:
            ConfigError: prompt too long or of another vocabulary, a cache that is too small, a senseless setting.
        """
        config = self._generation_config(generation_config, kwargs)
        if self._needs_framework(config, kwargs):
            return super().generate(input_ids, generation_config, logits_processor, streamer, seed, **kwargs)
        prompts = read_prompts(input_ids, config.pad_token_id, self.config.vocab_size)
        batch = Batch(prompts, self._limits(prompts, config), config.pad_token_id or 0, self.config.seq_length)
        if streamer is not None:
            streamer.put(batch.tokens[:, :batch.lengths.max()])
        started = time.time()
        record = _Record(config)
        for tokens in self._steps(batch, config, logits_processor, seed, record):
            if streamer is not None:
                streamer.put(tokens if len(batch) > 1 else tokens[0])
        if streamer is not None:
            streamer.end()
        seconds, new = time.time() - started, int((batch.lengths - batch.prompt_lengths).sum())
        logger.info("total time: %s s; generated tokens: %s tokens; generate speed: %s tokens/s", seconds, new,
                    new / seconds)
        sequences = [batch.sequence(row).copy() for row in range(len(batch))]
        return record.output(sequences) if config.return_dict_in_generate else sequences

    def stream(self, input_ids: Sequence[int], generation_config: Optional[GenerationConfig] = None,
               seed: Optional[int] = None, **kwargs: object) -> Generator[int, None, None]:
        """The tokens of the answer to one prompt, one by one; stop iterating to stop the answer. As `generate`."""
        config = self._generation_config(generation_config, kwargs)
        prompts = read_prompts(list(input_ids), None, self.config.vocab_size)
        batch = Batch(prompts, self._limits(prompts, config), config.pad_token_id or 0, self.config.seq_length)
        for tokens in self._steps(batch, config, None, seed, _Record(config)):
            yield tokens[0]

    def chat(self, tokenizer: object, question: Optional[str] = None, history: Optional[Sequence[dict]] = None,
             generation_config: "GenerationSource" = None, stream: bool = False, query: Optional[str] = None,
             instruction: str = "", **kwargs: Any) -> Any:
        """`telechat_predict_utils.chat` as a method, as in the official README. `query` and `instruction` are the
        question and the system prompt in MindFormers' words."""
        from research.telechat.chat.api import chat
        if instruction:
            kwargs.setdefault("system", instruction)
        return chat(self, tokenizer, question or query, history, generation_config, stream, **kwargs)

    def _steps(self, batch: Batch, config: GenerationConfig, processors: Optional["LogitsProcessorList"],
               seed: Optional[int], record: "_Record") -> Iterator[List[int]]:
        """Extend the batch until all sequences are finished; yields the tokens of each step, one for each sequence."""
        sampling = _sampling(config)
        eos = frozenset(config.eos_token_id)
        rng: Random = np.random if seed is None else _seeded(seed)  # type: ignore[assignment]    # a module with its method
        blocks = self._blocks(batch)
        engine = self._engine()
        phase = self.phase
        self.set_train(False)
        self._name_phases(len(batch))
        try:
            step = engine.read(batch, blocks)
            while True:
                if sampling.greedy and not processors and not record.active:
                    tokens: List[int] = step.tokens()
                else:
                    tokens = _choose(step, batch, sampling, eos, processors, rng, record)
                batch.append(tokens, eos)
                yield tokens
                if batch.finished.all():
                    return
                stale = self._cache_is_stale(batch.lengths[~batch.finished])
                step = engine.read(batch, blocks) if stale else engine.advance(batch, blocks)
        finally:
            self.set_train(phase == "train")

    def _generation_config(self, given: Optional[GenerationConfig], changes: dict) -> GenerationConfig:
        """A copy of the settings with `changes`; the end tokens as a list."""
        config = copy.deepcopy(given) if given is not None else GenerationConfig.from_model_config(self.config)
        config.update(**{key: value for key, value in changes.items() if key != "use_past"})
        config.eos_token_id = end_tokens(config.eos_token_id)
        return config

    def _needs_framework(self, config: GenerationConfig, kwargs: dict) -> bool:
        """Whether only MindFormers' own loop can serve the request."""
        return bool(getattr(self.config, "parallel_decoding_params", None) or kwargs.get("adapter_id")
                    or getattr(self.config, "is_sample_acceleration", False))

    def _limits(self, prompts: List[np.ndarray], config: GenerationConfig) -> List[int]:
        """Tokens of prompt and answer together, for each prompt. max_new_tokens wins over max_length."""
        new = config.max_new_tokens
        if new is not None and new <= 0:
            raise ConfigError(f"max_new_tokens: expected a positive number, found {new}")
        wanted = [config.max_length if new is None else len(prompt) + new for prompt in prompts]
        if max(wanted) > self.config.seq_length:
            logger.warning("%s tokens of prompt and answer exceed the model's seq_length; it ends at %s.",
                           max(wanted), self.config.seq_length)
        return wanted

    def _blocks(self, batch: Batch) -> Optional[Blocks]:
        if not self.use_past:
            return None
        size = self.config.block_size
        return Blocks(batch.limits, self.config.num_blocks, size, -(-self.config.seq_length // size))

    def _engine(self) -> Any:
        if not hasattr(self, "_step_engine"):
            direct = self.use_past and not self.model.step.paged
            self._step_engine = DirectEngine(self) if direct else FrameworkEngine(self)
        return self._step_engine

    def _cache_is_stale(self, lengths: np.ndarray) -> bool:
        """Whether the newest tokens of sequences of `lengths` tokens change the rotation of all earlier ones."""
        if not (self.use_past and self.model.by_length) or not scaling_changes(self.config.rope_rule, lengths):
            return False
        if not getattr(self, "_told_stale", False):
            self._told_stale = True
            logger.warning("At %s tokens the rotary scaling changes with the length of the text: the KV cache is "
                           "filled anew whenever it does, past training_seqlen (%s) at every token. "
                           "model_config.rope_length fixes the scaling.", lengths.max(), self.config.training_seqlen)
        return True

    def _name_phases(self, batch: int) -> None:
        """MindFormers runs its compiled graph whatever the batch is; with static shapes other sizes get their own."""
        if not hasattr(self, "_phase_batch"):
            self._phase_batch = batch
        own = self.use_past and not self.config.is_dynamic and batch != self._phase_batch
        self._set_network_phase(f"batch{batch}" if own else None)

    # What MindFormers' generator and trainer call

    def forward(self, input_ids: np.ndarray, valid_length_each_example: np.ndarray, block_tables: Any = None,
                slot_mapping: Optional[np.ndarray] = None, prefill: Optional[bool] = None, use_past: bool = False,
                **kwargs: object) -> Any:
        """One step of MindFormers' generator; reads everything again where the rotary rule makes the cache stale."""
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
        """Whether the next graph reads prompts (True) or brings one token per sequence."""
        self.add_flags(is_first_iteration=is_first_iteration)
        self.model.step.add_flags(is_first_iteration=is_first_iteration)
        for layer in self.model.layers:
            layer.attention.add_flags(is_first_iteration=is_first_iteration)

    def set_dynamic_inputs(self, **_kwargs: object) -> None:
        """Compile for prompts and batches of any size; called where is_dynamic is set."""
        any_2d, any_1d = Tensor(shape=[None, None], dtype=mstype.int32), Tensor(shape=[None], dtype=mstype.int32)
        self.set_inputs(any_2d, None, None, None, None, None, None, any_2d, None, None, any_2d, any_1d, None)

    def prepare_inputs_for_predict_layout(self, input_ids: np.ndarray, **_kwargs: object
                                          ) -> Tuple[Optional[Tensor], ...]:
        """Arguments of `construct` with which MindFormers compiles once to learn how the parameters are cut.

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
        if not self.use_past:            # the length decides the rotary tables, and only the last logits are needed
            inputs["batch_valid_length"] = Tensor(np.asarray(kwargs["valid_length_each_example"])[None], mstype.int32)
        return inputs


class _Record:
    """Logits and scores of every step, where the caller asked for them."""

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
    """The settings of `config` that choose tokens; ConfigError where one makes no sense."""
    least = config.min_new_tokens or 0
    return Sampling(bool(config.do_sample), config.temperature or 1.0 if not config.do_sample else config.temperature,
                    config.top_k, config.top_p, config.repetition_penalty or 1.0, least)


def _seeded(seed: int) -> np.random.RandomState:
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2 ** 32:
        raise ConfigError(f"seed: expected a whole number from 0 to 2^32 - 1, found {seed!r}")
    return np.random.RandomState(seed)


def _choose(step: Step, batch: Batch, sampling: Sampling, eos: Iterable[int],
            processors: Optional["LogitsProcessorList"], rng: Random, record: _Record) -> List[int]:
    """The next tokens from the logits of a step; rows that are finished keep token 0."""
    logits = step.logits()
    if record.logits is not None:
        record.logits.append(logits.copy())
    tokens = [0] * len(batch)
    scores = logits.copy()
    for row in np.flatnonzero(~batch.finished):
        new = int(batch.lengths[row] - batch.prompt_lengths[row])
        scores[row] = adjust(logits[row], batch.sequence(row), new, eos, sampling)
    if processors:
        scores = np.asarray(processors(batch.tokens, scores, batch.finished.tolist()))
    for row in np.flatnonzero(~batch.finished):
        tokens[row] = choose(scores[row], sampling, rng)
    if record.scores is not None:
        record.scores.append(scores)
    return tokens
