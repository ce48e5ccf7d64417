"""The device that MindSpore finds, with the interface of device.py: the cells of the models, one at a time.

As in a model, model/kernels.py chooses the kernels for the device.
"""
from typing import Dict, Sequence, Tuple

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from research.telechat.bridge.compat import chip_name, prepare_cpu
from research.telechat.common.environment import rank, workers
from research.telechat.common.files import JsonObject
from research.telechat.doctor.device import Array, AttentionForm, Cache, ModelJob, ModelRun, TrainRun
from research.telechat.doctor.hardware_models import run_model
from research.telechat.model import kernels
from research.telechat.model.kv_cache import ComposedCache, PagedCache
from research.telechat.model.mask import AttentionMask, Documents
from research.telechat.model.rotary import RotaryEmbedding
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_transformer import DotProductAttention
from research.telechat.training.optimizer import ClipGradNorm, is_overflow


def to_tensor(x: Array, dtype: str = "") -> Tensor:
    """x on the device, in the type that models use there for `dtype`."""
    return Tensor(np.ascontiguousarray(x), kernels.matmul_dtype(getattr(mstype, dtype)) if dtype else None)


def to_array(x: Tensor) -> Array:
    """x in NumPy, as float32, since NumPy has no bfloat16."""
    return (x.astype(mstype.float32) if x.dtype in (mstype.bfloat16, mstype.float16) else x).asnumpy()


def small_config(heads: int, kv_heads: int, dim: int, seq: int, dtype: str, **keys: object) -> TelechatConfig:
    """The config of a one-layer model."""
    return TelechatConfig(**{
        "net_name": "telechat_12b", "num_layers": 1, "hidden_size": heads * dim, "num_heads": heads,
        "n_kv_heads": kv_heads, "intermediate_size": 64, "vocab_size": 96, "seq_length": seq, "compute_dtype": dtype,
        "softmax_compute_type": "float32", "rotary_dtype": dtype, "use_flash_attention": True, "batch_size": 1,
        **keys})


class _Weighted(nn.Cell):
    """(sum of y dy, y) for y, the result of `cell`: the gradient of the sum with respect to y is dy."""

    def __init__(self, cell: nn.Cell):
        super().__init__(auto_prefix=False)
        self.cell = cell

    def construct(self, dy: Tensor, *inputs: Tensor) -> Tuple[Tensor, Tensor]:
        y = self.cell(*inputs)
        return (F.cast(y, mstype.float32) * dy).sum(), y


def with_gradients(cell: nn.Cell, dy: Array, inputs: Sequence[Tensor], count: int) -> Tuple[Array, ...]:
    """The result of a cell and the gradients of its first `count` inputs."""
    places = tuple(range(1, count + 1))
    run = ms.value_and_grad(_Weighted(cell), places, None, has_aux=True)
    (_, result), gradients = run(Tensor(dy, mstype.float32), *inputs)
    gradients = gradients if isinstance(gradients, (tuple, list)) else (gradients,)
    return (to_array(result), *map(to_array, gradients))


class _Attention(nn.Cell):
    """A model's mask and attention."""

    def __init__(self, config: TelechatConfig):
        super().__init__(auto_prefix=False)
        self.has_documents = config.document_boundaries
        self.documents, self.mask = Documents(config), AttentionMask(config)
        flash = kernels.use_flash_attention(config)
        self.attend = kernels.CausalFlashAttention(config) if flash else DotProductAttention(config)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
        if self.has_documents:
            documents, _ = self.documents(tokens.shape[1], ends)
            return self.attend(query, key, value, self.mask(tokens, None, documents, ends))
        return self.attend(query, key, value, self.mask(tokens, None, None))


class _Flat(nn.Cell):
    """Attention of prompts back to back. The kernel finds the lengths by the input's name."""

    def __init__(self, config: TelechatConfig):
        super().__init__(auto_prefix=False)
        self.attend = kernels.FlatFlashAttention(config)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, batch_valid_length: Tensor) -> Tensor:
        return self.attend(query, key, value, batch_valid_length)


class _Attending(nn.Cell):
    """Attention over the cache. The kernel finds the lengths by the input's name."""

    def __init__(self, cache: PagedCache):
        super().__init__(auto_prefix=False)
        self.cache = cache

    def construct(self, query: Tensor, batch_valid_length: Tensor, block_tables: Tensor) -> Tensor:
        return self.cache.attend(query, batch_valid_length, block_tables)


class _Product(nn.Cell):
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.matmul = P.MatMul(transpose_b=True)

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return self.matmul(a, b)


class _Overflow(nn.TrainOneStepWithLossScaleCell):
    """Overflow detection of MindSpore's training step, on devices with overflow flags."""

    def __init__(self) -> None:
        network = nn.Dense(1, 1)
        super().__init__(network, nn.SGD(network.trainable_params()), Tensor(1.0, mstype.float32))

    def construct(self, *gradients: Tensor) -> Tensor:
        status, first = self.start_overflow_check(gradients[0], gradients[0])
        return self.get_overflow_status(status, (first * 1.0, *[one * 1.0 for one in gradients[1:]]))


class _OverflowByNorm(nn.Cell):
    """The same on devices without."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.norm = ClipGradNorm(1.0)

    def construct(self, *gradients: Tensor) -> Tensor:
        return is_overflow(self.norm.norm(gradients))


class Hardware:
    """The device of this process and the other ones of its job. See device.Device."""

    def __init__(self) -> None:
        ms.set_context(mode=ms.GRAPH_MODE)
        self.fused = kernels.use_paged_attention()
        self.dtypes: Sequence[str] = ("bfloat16", "float16") if self.fused else ("float32",)
        self.rank, self.ranks = rank(), workers()
        if self.fused:
            ms.set_context(jit_config={"jit_level": "O0"})
        if self.ranks > 1:
            ms.communication.init()
        prepare_cpu()
        self.name = chip_name()

    def attention(self, form: AttentionForm, qkv: Sequence[Array], dy: Array, tokens: Array, ends: Array
                  ) -> Tuple[Array, ...]:
        cell = _Attention(small_config(form.heads, form.kv_heads, form.dim, form.seq, form.dtype, **form.keys))
        cell.set_train()
        return with_gradients(cell, dy, [*(to_tensor(x, form.dtype) for x in qkv), Tensor(tokens), Tensor(ends)], 3)

    def flat_attention(self, dtype: str, qkv: Sequence[Array], lengths: Array, kv_heads: int) -> Array:
        total, heads, dim = qkv[0].shape
        config = small_config(heads, kv_heads, dim, total, dtype, use_past=True, is_dynamic=True)
        found = _Flat(config)(*(to_tensor(x.reshape(1, total, -1), dtype) for x in qkv), Tensor(lengths))
        return to_array(found).reshape(total, heads, dim)

    def band_sees_keys(self) -> bool:
        return kernels.narrow_band_sees_keys()

    def rms_norm(self, dtype: str, eps: float, x: Array, weight: Array, dy: Array) -> Tuple[Array, ...]:
        return with_gradients(kernels.RMSNormKernel(eps), dy, [to_tensor(x, dtype), to_tensor(weight, dtype)], 2)

    def rotate(self, dtype: str, x: Array, cos: Array, sin: Array) -> Array:
        cell = RotaryEmbedding(small_config(x.shape[1], x.shape[1], x.shape[-1], x.shape[2], dtype))
        return to_array(cell(*(to_tensor(value, dtype) for value in (x, cos, sin))))

    def matmul(self, dtype: str, a: Array, b: Array) -> Array:
        return to_array(_Product()(to_tensor(a, dtype), to_tensor(b, dtype)))

    def dropout(self, p: float, x: Array) -> Array:
        cell = nn.Dropout(p=p)
        cell.set_train()
        return to_array(cell(Tensor(x)))

    def finite(self, gradients: Sequence[Array]) -> bool:
        cell = _OverflowByNorm() if kernels.gradient_kernels_of_cpu() else _Overflow()
        return not bool(cell(*map(Tensor, gradients)).asnumpy())

    def _cache_config(self, dtype: str, cache: Cache, heads: int) -> TelechatConfig:
        blocks, size, kv_heads, dim = cache.keys.shape
        return small_config(heads, kv_heads, dim, 64, dtype, use_past=True, is_dynamic=True, block_size=size,
                            num_blocks=blocks)

    def store(self, dtype: str, cache: Cache, key: Array, value: Array, slots: Array) -> Cache:
        blocks, size, kv_heads, dim = cache.keys.shape
        config = self._cache_config(dtype, cache, kv_heads)
        if self.fused:
            paged = PagedCache(config)
            _fill(paged, cache.keys, cache.values)
            paged(*(to_tensor(x.reshape(1, len(slots), -1), dtype) for x in (key, value)), Tensor(slots))
            return Cache(to_array(paged.key_cache), to_array(paged.value_cache))
        # Head by head, with an extra block for dropped tokens.
        composed, rows = ComposedCache(config), (blocks + 1) * size
        _fill(composed, *(np.pad(x.reshape(-1, kv_heads, dim), ((0, size), (0, 0), (0, 0))).swapaxes(0, 1).reshape(
            -1, dim) for x in cache))
        places = np.where(slots < 0, blocks * size, slots)[None, None] + rows * np.arange(kv_heads)[None, :, None]
        composed(*(Tensor(x.swapaxes(0, 1)[None], mstype.float32) for x in (key, value)),
                 Tensor(places.astype(np.int32)))
        return Cache(*(to_array(x).reshape(kv_heads, rows, dim)[:, :blocks * size].swapaxes(0, 1).reshape(
            cache.keys.shape) for x in (composed.key_cache, composed.value_cache)))

    def paged_attention(self, dtype: str, query: Array, cache: Cache, tables: Array, lengths: Array) -> Array:
        batch, heads, dim = query.shape
        paged = PagedCache(self._cache_config(dtype, cache, heads))
        _fill(paged, cache.keys, cache.values)
        found = _Attending(paged)(to_tensor(query.reshape(batch, 1, -1), dtype), Tensor(lengths), Tensor(tables))
        return to_array(found).reshape(batch, heads, dim)

    def model(self, job: ModelJob) -> ModelRun:
        return run_model(job)

    def collective(self, name: str, dtype: str, x: Array) -> Array:
        from research.telechat.doctor.collectives import run_collective
        return run_collective(name, to_tensor(x, dtype), self.rank, self.ranks)

    def train(self, recipe: JsonObject, batches: Sequence[Sequence[Array]], seed: int, broken: bool = False
              ) -> TrainRun:
        from research.telechat.doctor.steps import train
        return train(recipe, batches, seed, broken)

    def resume(self, recipe: JsonObject, records: Array) -> Tuple[Dict[str, Array], Dict[str, Array]]:
        from research.telechat.doctor.steps import resume
        return resume(recipe, records)


def _fill(cache: nn.Cell, keys: Array, values: Array) -> None:
    """Write numbers into both parts of a cache."""
    cache.init_parameters_data()
    for part, content in ((cache.key_cache, keys), (cache.value_cache, values)):
        part.set_data(Tensor(np.ascontiguousarray(content), part.dtype))
