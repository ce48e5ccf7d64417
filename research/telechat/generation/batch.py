"""Growing sequences: incoming prompts, tokens and length of each, the cache blocks they use. NumPy only."""
from typing import Any, FrozenSet, Hashable, List, NamedTuple, Optional, Protocol, Sequence

import numpy as np

from research.telechat.common.errors import ConfigError
from research.telechat.generation.blocks import BlockPool
from research.telechat.generation.requests import NO_LOGPROBS, OnEvent, Request
from research.telechat.generation.sampling import Random

PREFILL_TOKENS = 256                   # limit for prompts that are prefilled together: attention is over all pairs
_MOST_AT_ONCE = 2048                   # tokens of a prompt, if no other request waits
_SCORES = 1 << 25                      # attention scores of a layer in memory, 128 MiB in float32; the mask is as large


def tokens_at_once(heads: int, length: int) -> int:
    """Tokens of a prompt that are prefilled at once if no other request waits, in a model with `heads` query heads.

    Large pieces are faster and need more memory: heads x tokens x `length` scores, `length` being the maximum length
    of the sequence. At least PREFILL_TOKENS.
    """
    return max(min(_SCORES // (heads * length), _MOST_AT_ONCE), PREFILL_TOKENS)


def read_prompts(input_ids: object, pad_token_id: Optional[int], vocab_size: int,
                 bos_token_id: Optional[int] = None) -> List[np.ndarray]:
    """Prompts as int32 arrays without padding on either side.

    input_ids: token ids of one prompt, or a list of prompts, of equal length (padded on either side) or not.
    bos_token_id: if equal to pad_token_id, leading ones are not padding.

    Raises:
        ConfigError: no ids, an empty prompt, or an id outside the model's vocabulary.
    """
    prompts = []
    for number, row in enumerate(_rows(input_ids)):
        ids = np.asarray(row)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ConfigError(f"prompt {number}: expected a list of token ids, found {str(row)[:80]}")
        if pad_token_id is not None:
            kept = np.flatnonzero(ids != pad_token_id)
            first = 0 if pad_token_id == bos_token_id or not kept.size else kept[0]
            ids = ids[first:kept[-1] + 1 if kept.size else 0]
        if not ids.size:
            raise ConfigError(f"prompt {number} is empty (or only padding); pass at least one token")
        check_tokens(ids, vocab_size, f"prompt {number}")
        prompts.append(ids.astype(np.int32))
    return prompts


def padding_before(input_ids: object, pad_token_id: Optional[int], bos_token_id: Optional[int] = None) -> List[int]:
    """Number of padding tokens before each prompt of `read_prompts`; the result of a generation keeps them."""
    if pad_token_id is None or pad_token_id == bos_token_id:
        return [0 for _ in _rows(input_ids)]
    return [int(np.argmax(np.asarray(row) != pad_token_id)) for row in _rows(input_ids)]


def _rows(input_ids: object) -> List[object]:
    """One list or array of ids per prompt."""
    ids = input_ids if isinstance(input_ids, (list, tuple)) else np.asarray(input_ids).tolist()
    return list(ids) if ids and isinstance(ids[0], (list, tuple, np.ndarray)) else [ids]


def check_tokens(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Raises ConfigError if one of the integers `ids` is not in the model's vocabulary."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ConfigError(f"{what} holds token {wrong}, but the model's vocabulary has {vocab_size} "
                          "tokens: the tokenizer belongs to another model; use the checkpoint's own")


def check_room(prompts: Sequence[np.ndarray], limits: Sequence[int], context: int) -> None:
    """Raises ConfigError if a prompt leaves no room for an answer.

    limits: tokens of prompt and answer together, per prompt; context: the model's seq_length.
    """
    for number, (prompt, limit) in enumerate(zip(prompts, limits)):
        if len(prompt) >= context:
            raise ConfigError(f"prompt {number} has {len(prompt)} tokens, but the model's seq_length is {context}: "
                              "shorten it, or raise seq_length")
        if len(prompt) >= limit:
            raise ConfigError(f"prompt {number} has {len(prompt)} tokens, but max_length is {limit}: "
                              "raise max_length, or set max_new_tokens instead")


class Row:
    """One prompt with its answer so far, a row of the batches that the engine computes.

    Attributes: `tokens` [limit] int32, `length` of them known; `blocks` of the cache, in order; `cached`, number of
    tokens whose keys and values are in the cache, rotated with `scaling`.
    """

    def __init__(self, number: int, request: Request, on_event: Optional[OnEvent] = None, rng: Optional[Random] = None,
                 tokens: Optional[np.ndarray] = None):
        """
        Args:
            number: in order of arrival.
            request: the request.
            on_event: callback for the events; None: none.
            rng: samples the tokens; None: created from the request's seed.
            tokens: array to write the tokens to, [limit or longer] int32.
        """
        self.number, self.request, self.on_event = number, request, on_event
        self.prompt_length = self.length = len(request.prompt)
        self.limit = self.length + request.max_new_tokens
        self.tokens = np.zeros(self.limit, np.int32) if tokens is None else tokens
        self.tokens[:self.length] = request.prompt
        self.ends: FrozenSet[int] = request.end_tokens
        if rng is None and request.sampling.do_sample:
            rng = np.random.RandomState(request.seed)
        self.rng: Random = rng or np.random  # type: ignore[assignment]    # a module with its method; never drawn from
        self.plain = (request.sampling.greedy and request.top_logprobs == NO_LOGPROBS
                      and request.constraint is None)        # only the most likely token is needed
        self.finished = False
        self.blocks: List[int] = []
        self.table = np.zeros(0, np.int32)
        self.cached = 0
        self.long = False                                    # its prompt is prefilled in many steps
        self.scaling: Hashable = None
        self.root: Hashable = None                           # key under which its blocks are shared; None: not shared
        self.scores: Any = None                              # of the part of its prompt read so far
        self.started = 0.0                                   # seconds, on the scheduler's clock

    def use(self, blocks: List[int]) -> None:
        """Assign these cache blocks to the sequence."""
        self.blocks, self.table = blocks, np.array(blocks, np.int32)

    @property
    def sequence(self) -> np.ndarray:
        """Tokens of prompt and answer so far."""
        return self.tokens[:self.length]

    def slots(self, first: int, end: int, block_size: int) -> np.ndarray:
        """Cache slots of the tokens `first` to `end` - 1, [end - first] int32."""
        positions = np.arange(first, end, dtype=np.int32)
        return self.table[positions // block_size] * block_size + positions % block_size

    def append(self, token: int) -> None:
        """Append a token; an end token or the limit finishes the sequence."""
        self.tokens[self.length] = token
        self.length += 1
        self.finished = token in self.ends or self.length >= self.limit


class StepLike(Protocol):
    """The result of an engine's step."""

    def tokens(self) -> List[int]:
        """The most likely next token of each sequence."""

    def logits(self) -> np.ndarray:
        """[B, V] float32."""


class Reading(NamedTuple):
    """Sequences that were computed together, and the result."""

    rows: List[Row]
    step: StepLike


class Engine(Protocol):
    """The interface of generation/engine.py to the scheduler.

    Attributes: `vocab_size`, tokens; `context`, tokens of the longest sequence; `pool`, the blocks of the cache, None
    without a cache; `pieces`, whether it supports `read_piece`; `together`, whether all sequences of a batch must start
    and finish together.
    """

    vocab_size: int
    context: int
    pool: Optional[BlockPool]
    pieces: bool
    together: bool

    def scaling(self, length: int) -> Hashable:
        """The rotary scaling of the keys of a sequence of `length` tokens."""

    def stale(self, length: int) -> None:
        """Report that a sequence of `length` tokens is recomputed because its rotary scaling has changed."""

    def read(self, rows: Sequence[Row]) -> List[Reading]:
        """Prefill sequences from the beginning."""

    def read_piece(self, row: Row, end: int, every: bool) -> StepLike:
        """Prefill the tokens from row.cached to `end` - 1 -> logits after the last or `every` one of them."""

    def advance(self, rows: Sequence[Row], batch: int) -> StepLike:
        """Decode one step from the newest token of each sequence; `batch`: size of the graph."""
