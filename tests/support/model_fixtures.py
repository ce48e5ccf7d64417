"""Models for tests: random official checkpoints of every family, and their loading into the MindSpore model."""
from typing import Any, Dict

import numpy as np

from research.telechat.spec.parameters import (
    LLAMA,
    MINDSPORE,
    match_llama,
    match_official,
    official_layout,
    parameters,
    row_order,
)
from research.telechat.spec.variants import variant_from_hf

_COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": 97}
_DENSE = {**_COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4, "ffn_hidden_size": 48, "seq_length": 64,
          "layer_norm_epsilon": 1e-5, "training_seqlen": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0}
# Official config.json keys of each family at tiny sizes; base_seqlen < training_seqlen makes alpha > 1 for TeleChat2.
HF_CONFIGS: Dict[str, Dict[str, Any]] = {
    "7b": {**_DENSE},
    "12b": {**_DENSE, "tie_word_embeddings": False},
    "52b": {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "use_mup": True,
            "layer_norm_epsilon": 1e-5, "mup_scale_factor": 8.0, "output_mult": 1.0, "input_mult": 1.0},
    "telechat2_mha": {**_DENSE, "tie_word_embeddings": False, "base_seqlen": 16, "layer_norm_epsilon": 1e-8},
    "telechat2_gqa": {**_DENSE, "tie_word_embeddings": False, "base_seqlen": 16, "num_key_value_heads": 2,
                      "training_seqlen": 16, "layer_norm_epsilon": 1e-8},
}


def random_official(hf_config: Dict[str, Any], seed: int = 0) -> Dict[str, np.ndarray]:
    """Random float32 weights under the official names and shapes, large enough that attention is peaked."""
    rng = np.random.default_rng(seed)
    weights = {}
    variant = variant_from_hf(hf_config)
    layout = official_layout(variant)
    for param in parameters(variant):
        std = 1.0 if "norm" in param.ms_name else 0.3
        for name in param.names(layout):
            value = rng.normal(0, std, param.tensor_shape(layout))
            weights[name] = (1 + 0.2 * value if "norm" in param.ms_name else value).astype(np.float32)
    return weights


def to_mindspore(hf_config: Dict[str, Any], weights: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """Official weights under MindSpore names, in MindSpore's layout, float32."""
    variant = variant_from_hf(hf_config)
    params, layout = parameters(variant), official_layout(variant)
    match = match_llama(params, {}, weights) if layout == LLAMA else match_official(params, weights)
    assert not match.missing and not match.unknown and not match.duplicate
    result = {}
    for param in params:
        names = param.llama_names if layout == LLAMA else [match.found[param.ms_name]]
        value = np.concatenate([weights[name] for name in names]).astype(np.float32)
        value = value.T if param.transposed else value
        order = row_order(param, param.groups_in(layout), param.groups_in(MINDSPORE))
        result[param.ms_name] = value.copy() if order is None else value[order]
        assert result[param.ms_name].shape == param.shape
    return result


def build_model(hf_config: Dict[str, Any], weights: Dict[str, np.ndarray], **overrides: Any) -> Any:
    """TelechatForCausalLM in evaluation mode with the official weights; every parameter must be there."""
    import mindspore as ms

    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    model = TelechatForCausalLM(TelechatConfig.from_hf_config(hf_config, **overrides))
    values = to_mindspore(hf_config, weights)
    found = {param.name: param for param in model.get_parameters() if "_cache" not in param.name}
    assert sorted(found) == sorted(values)
    for name, value in values.items():
        assert tuple(found[name].shape) == value.shape, name
        found[name].set_data(ms.Tensor(value))
    model.set_train(False)
    return model


def logits_of(model: Any, input_ids: np.ndarray, **kwargs: Any) -> np.ndarray:
    """Logits [B, S, V] float32 of the model for [B, S] token ids."""
    import mindspore as ms
    result = model(ms.Tensor(np.asarray(input_ids, np.int32)), **kwargs)
    result = result[0] if isinstance(result, tuple) else result
    return result.asnumpy()


def loss_of(model: Any, ids: Any, labels: Any) -> float:
    """The loss of a model in training mode for [B, S + 1] token ids and labels, both Tensors."""
    total, count = model(ids, labels)
    return total.asnumpy().item() / count.asnumpy().item()


def loss_and_gradients(model: Any, ids: Any, labels: Any) -> Any:
    """(loss, gradient of each trainable parameter, in their order) of a model in training mode; inputs are Tensors."""
    import mindspore as ms
    from mindspore import nn

    class MeanLoss(nn.Cell):
        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.model = model

        def construct(self, ids: Any, labels: Any) -> Any:
            total, count = self.model(ids, labels)
            return (total / count).reshape(())
    loss, gradients = ms.value_and_grad(MeanLoss(), None, model.trainable_params())(ids, labels)
    return loss.asnumpy().item(), [gradient.asnumpy() for gradient in gradients]
