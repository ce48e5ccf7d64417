"""A device in NumPy that has Ascend's kernels in all forms, whose answers a test can spoil."""
from typing import Any, Callable, Dict, Optional

import numpy as np

from research.telechat.doctor import attention_checks, collective_checks
from research.telechat.doctor.attention_checks import rounded
from research.telechat.doctor.device import Cache, TrainRun
from research.telechat.doctor.plan_checks import BROKEN, SEED, initial_value
from research.telechat.interpret import attention, cache, norm

Spoil = Callable[..., Any]


class NumpyDevice:
    """See device.Device. spoil: {method: function of its result and its arguments -> what it answers}."""

    name, fused, dtypes = "NumPy", True, ("bfloat16", "float16")

    def __init__(self, rank: int = 0, ranks: int = 1, spoil: Optional[Dict[str, Spoil]] = None):
        self.rank, self.ranks = rank, ranks
        for method, change in (spoil or {}).items():
            self._change(method, change)

    def _change(self, method, change):
        honest = getattr(self, method)
        setattr(self, method, lambda *args, **keys: change(honest(*args, **keys), *args))

    def attention(self, form, qkv, dy, tokens, ends, unseen=None):
        unseen = attention_checks.hidden(form, tokens, ends) if unseen is None else unseen
        share, scale = form.keys.get("attention_dropout_prob", 0.0), form.dim ** -0.5
        q, k, v = (x.astype(np.float64) for x in qkv)
        shape = (*q.shape[:3], k.shape[2])
        kept = (np.random.default_rng(0).random(shape) >= share) / (1 - share) if share else None
        top, total, result = attention.forward(q, k, v, unseen, scale, kept)
        gradients = attention.backward(q, k, v, dy, unseen, scale, top, total, result, kept)
        return tuple(rounded(x, form.dtype) for x in (result, *gradients))

    def flat_attention(self, dtype, qkv, lengths, kv_heads):
        flat = [x.reshape(len(x), -1) for x in qkv]
        heads, dim = qkv[0].shape[1:]
        result = attention.flash_attention(None, *flat, None, None, None, None, None, lengths, lengths, heads, 1.0,
                                           dim ** -0.5, 0, 0, 0, attention.LAYOUTS.index("TH"), 0)[3]
        return rounded(result.reshape(qkv[0].shape), dtype)

    def band_sees_keys(self):
        return False

    def rms_norm(self, dtype, eps, x, weight, dy):
        x, weight = x.astype(np.float64), weight.astype(np.float64)
        y, inverse = norm.rms_norm(None, x, weight, eps)
        return tuple(rounded(value, dtype) for value in (y, *norm.rms_norm_grad(None, dy, x, inverse, weight)))

    def rotate(self, dtype, x, cos, sin):
        half = x.shape[-1] // 2
        return rounded(x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin, dtype)

    def matmul(self, dtype, a, b):
        return rounded(a @ b.T, dtype)

    def dropout(self, p, x):
        return x * (np.random.default_rng(1).random(x.shape) >= p) / (1 - p)

    def finite(self, gradients):
        return all(np.isfinite(one).all() for one in gradients)

    def store(self, dtype, held, key, value, slots):
        return Cache(*(rounded(cache.store(new, old, slots), dtype) for new, old in zip((key, value), held)))

    def paged_attention(self, dtype, query, held, tables, lengths):
        batch, heads, dim = query.shape
        result = cache.paged_attention(None, query.reshape(batch, 1, -1).astype(np.float64), *held, tables, lengths,
                                       None, None, None, None, None, heads, dim ** -0.5, held.keys.shape[2])
        return rounded(result.reshape(query.shape), dtype)

    def collective(self, name, dtype, x):
        every = [collective_checks.content(rank, self.ranks) for rank in range(self.ranks)]
        return collective_checks.EXPECTED[name][0](self.rank, every)

    def train(self, recipe, batches, seed, broken=False):
        """No training: weights that fall by a tenth, split into halves of rows if there are two cards."""
        assert seed == SEED
        cut = recipe.get("use_parallel") and self.ranks == 2
        whole = {name: (1 if broken else 0.9) * initial_value(name, shape, seed)
                 for name, shape in ((BROKEN, (8,)), ("model.layers.0.attention.wq.weight", (8, 4)))}
        if broken:
            whole[BROKEN][0] = np.inf
        half = slice(4 * self.rank, 4 * self.rank + 4)
        places = {name: ((half if cut and "wq" in name else slice(0, 8)), *[slice(None)] * (value.ndim - 1))
                  for name, value in whole.items()}
        losses = [5.0 - 0.5 * step for step in range(len(batches))]
        return TrainRun(losses, [1.0] * len(batches), {name: value[places[name]] for name, value in whole.items()},
                        places, [broken] * len(batches))

    def resume(self, recipe, records):
        weights = {"model.norm_out.weight": np.ones(8), "adam_m.model.norm_out.weight": np.full(8, 0.5)}
        return weights, {name: value.copy() for name, value in weights.items()}
