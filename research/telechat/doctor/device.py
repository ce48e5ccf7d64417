"""The interface of a device under test. Arrays are NumPy's in and out; types are names such as "bfloat16".

hardware.py implements it with MindSpore, the tests with NumPy and injected errors.
"""
from typing import Dict, List, NamedTuple, Protocol, Sequence, Tuple

import numpy as np

from research.telechat.common.files import JsonObject

Array = np.ndarray


class AttentionForm(NamedTuple):
    """One way in which recipes call attention. keys: model_config keys."""

    name: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    seq: int
    dim: int
    keys: JsonObject


class Cache(NamedTuple):
    """A paged cache of keys and values: [blocks, tokens per block, N_kv, D] each."""

    keys: Array
    values: Array


class ModelRun(NamedTuple):
    """The results of a small model. logits: [B, S, V]; gradients: under MindSpore's names; tokens: the answer."""

    logits: Array
    loss: float
    gradients: Dict[str, Array]
    tokens: List[int]


class ModelJob(NamedTuple):
    """What a small model is to compute. config: official config.json; weights: official; keys: model_config keys;
    ids, labels: [B, S + 1]; prompt: for the greedy answer of `new` tokens."""

    config: JsonObject
    weights: Dict[str, Array]
    keys: JsonObject
    ids: Array
    labels: Array
    prompt: List[int]
    new: int


class TrainRun(NamedTuple):
    """Training steps. held: this rank's shard of each parameter; places: where the shard lies in the whole parameter;
    overflows: per step."""

    losses: List[float]
    norms: List[float]
    held: Dict[str, Array]
    places: Dict[str, Tuple[slice, ...]]
    overflows: List[bool]


class Device(Protocol):
    """fused: has Ascend's fused kernels; dtypes: those that models compute in here, by recipe; ranks: cards."""

    name: str
    fused: bool
    dtypes: Sequence[str]
    rank: int
    ranks: int

    def attention(self, form: AttentionForm, qkv: Sequence[Array], dy: Array, tokens: Array, ends: Array
                  ) -> Tuple[Array, ...]:
        """Result [B, N, S, D] and the gradients of query, key and value. tokens: [B, S], 3 is padding; ends: [B, K] of
        documents."""

    def flat_attention(self, dtype: str, qkv: Sequence[Array], lengths: Array, kv_heads: int) -> Array:
        """Prompts back to back: query [T, N, D], key and value [T, N_kv, D] -> shape of query."""

    def band_sees_keys(self) -> bool:
        """Whether flash attention sees a key in a zero-width band (sparse mode 4, both windows 0)."""

    def rms_norm(self, dtype: str, eps: float, x: Array, weight: Array, dy: Array) -> Tuple[Array, ...]:
        """Result and the gradients of x and weight."""

    def rotate(self, dtype: str, x: Array, cos: Array, sin: Array) -> Array:
        """Rotary embedding of x [B, N, S, D]; cos, sin: [1, 1, S, D]."""

    def matmul(self, dtype: str, a: Array, b: Array) -> Array:
        """a [M, K] times the transpose of b [N, K], in the type that models use for `dtype` here."""

    def dropout(self, p: float, x: Array) -> Array:
        """x after dropout with probability p, in training."""

    def finite(self, gradients: Sequence[Array]) -> bool:
        """Whether a training step would find these gradients finite."""

    def store(self, dtype: str, cache: Cache, key: Array, value: Array, slots: Array) -> Cache:
        """The cache with key and value [T, N_kv, D] written to `slots` [T]; slot -1 is dropped."""

    def paged_attention(self, dtype: str, query: Array, cache: Cache, tables: Array, lengths: Array) -> Array:
        """query [B, N, D] to the first `lengths` tokens in the blocks of `tables` [B, K] -> shape of query."""

    def model(self, job: ModelJob) -> ModelRun:
        """Run the job. model_config keys that generation needs are added."""

    def collective(self, name: str, dtype: str, x: Array) -> Array:
        """A collective of all ranks on this rank's x. Raises Skip if the device does not have it."""

    def train(self, recipe: JsonObject, batches: Sequence[Sequence[Array]], seed: int, broken: bool = False
              ) -> TrainRun:
        """One step per batch, with weights from `seed`; broken: one weight is infinite."""

    def resume(self, recipe: JsonObject, records: Array) -> Tuple[Dict[str, Array], Dict[str, Array]]:
        """Weights and moments after one step for each of `records` [steps, S + 1]: in one run, and resumed from the
        checkpoint in the middle."""
