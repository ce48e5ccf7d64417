"""Prediction on a CPU with one operator per decoder layer (native/layer.cc), in place of some fifty of MindSpore's.

The cells of the model stay what they are: `NativeDecoder` takes their parameters and the cache. One graph serves whole
prompts, pieces of prompts and single tokens: each token says to which sequence and position it belongs.
"""
from typing import Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn

from research.telechat.model import kernels
from research.telechat.native.operators import operator
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_layer import TelechatLinear
from research.telechat.telechat_transformer import TelechatDecodeLayer

# The inputs of the operator, in its order; a bias of one element means none.
_LAYER = ("x", "attention_norm", "wq", "wq_bias", "wk_v", "wk_v_bias", "wo", "wo_bias", "ffn_norm", "w1", "w3", "w2",
          "w2_bias", "key_cache", "value_cache", "cos", "sin", "rows", "block_tables", "sizes", "eps")


def serves(model: nn.Cell) -> bool:
    """Whether `NativeDecoder` can compute `model`, a TelechatForCausalLM with the composed cache: on a CPU, all in
    float32, no adapter in its layers."""
    config = model.config
    dtypes = (config.compute_dtype, config.res_dtype, config.layernorm_compute_type, config.softmax_compute_type)
    return (all(dtype == mstype.float32 for dtype in dtypes) and config.head_dim % 2 == 0
            and all(parameter.dtype == mstype.float32 for parameter in model.get_parameters())
            and all(_is_plain(layer) for layer in model.model.layers) and kernels.native_operators())


def _is_plain(layer: nn.Cell) -> bool:
    """Whether a layer is what telechat_transformer makes: adapters replace the linear layers."""
    attention, ffn = layer.attention, layer.feed_forward
    linear = [attention.w_qkv] if attention.fused else [attention.wq, attention.wk_v]
    linear += [ffn.w_gate_hidden] if ffn.fused else [ffn.w1, ffn.w3]
    return type(layer) is TelechatDecodeLayer and all(type(each) is TelechatLinear
                                                      for each in (*linear, attention.wo, ffn.w2))


class _Layer(nn.Cell):
    """One decoder layer in one operator, as telechat_transformer.TelechatDecodeLayer.

    With `last`, only of the rows that are wanted. The operator writes the cache, which MindSpore does not know: nothing
    else in the graph reads the cache, and with ordering by side effects a step takes nearly twice as long.
    """

    def __init__(self, config: TelechatConfig, layer: nn.Cell, last: bool):
        super().__init__(auto_prefix=False)
        attention, ffn = layer.attention, layer.feed_forward
        self.layer, self.fused, self.last = layer, config.fused_projections, last
        self.qkv_has_bias, self.out_proj_has_bias = config.qkv_has_bias, config.out_proj_has_bias
        self.none = Tensor(np.zeros(1, np.float32))
        self.sizes = Tensor(np.array([attention.heads, attention.kv_heads, attention.head_dim, config.block_size,
                                      ffn.ffn, ffn.groups, self.fused], np.int32))
        self.eps = Tensor(np.array([config.rms_norm_eps], np.float32))
        if last:
            self.compute = operator("LastDecoderLayer", (*_LAYER, "wanted"), [mstype.float32])
        else:
            self.compute = operator("DecoderLayer", _LAYER, [mstype.float32])

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, block_tables: Tensor, wanted: Tensor
                  ) -> Tensor:
        """x: [T, H]; cos, sin: [1, T, D]; the others as in NativeDecoder -> [T, H], with `last` [R, H]."""
        attention, ffn = self.layer.attention, self.layer.feed_forward
        none = self.none
        if self.fused:
            wq, wk_v, w1, w3 = attention.w_qkv, attention.w_qkv, ffn.w_gate_hidden, ffn.w_gate_hidden
        else:
            wq, wk_v, w1, w3 = attention.wq, attention.wk_v, ffn.w1, ffn.w3
        weights = (self.layer.attention_norm.weight,
                   wq.weight, wq.bias if self.qkv_has_bias else none,
                   wk_v.weight, wk_v.bias if self.qkv_has_bias else none,
                   attention.wo.weight, attention.wo.bias if self.out_proj_has_bias else none,
                   self.layer.ffn_norm.weight, w1.weight, w3.weight,
                   ffn.w2.weight, ffn.w2.bias if self.out_proj_has_bias else none)
        inputs = (x, *weights, attention.cache.key_cache, attention.cache.value_cache, cos, sin, rows, block_tables,
                  self.sizes, self.eps)
        if self.last:
            return self.compute(*inputs, wanted)
        return self.compute(*inputs)


class NativeDecoder(nn.Cell):
    """The whole model for prediction. model: a TelechatForCausalLM that `serves` accepts."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        config = model.config
        self.model = model
        layers = list(model.model.layers)
        self.layers = nn.CellList([_Layer(config, layer, layer is layers[-1]) for layer in layers], auto_prefix=False)
        self.eps = Tensor(np.array([config.rms_norm_eps], np.float32))
        self.scale = Tensor(np.array([config.logits_scale], np.float32))
        self.head = operator("Head", ("x", "norm", "weight", "eps", "scale"), [mstype.float32, mstype.int32])

    def construct(self, tokens: Tensor, positions: Tensor, totals: Tensor, rows: Tensor, block_tables: Tensor,
                  wanted: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens: [T]; positions, totals: [1, T], of each token in its sequence, and tokens of that;
        rows: [3, T], positions, which row of `block_tables` [B, K], slot of the cache (-1: padding);
        wanted: [R], which tokens' logits are wanted, ascending; all int32 -> logits [R, V] float32, most likely tokens
        [R] int32."""
        decoder = self.model.model
        cos, sin = decoder.rotary_by_length.at(positions, totals)
        h = decoder.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, cos, sin, rows, block_tables, wanted)
        return self.head(h, decoder.norm_out.weight, self.model.head_weight(), self.eps, self.scale)
