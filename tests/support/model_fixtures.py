"""Models for tests: random official checkpoints of every family, and their loading into the MindSpore model."""
from typing import Any, Dict

import numpy as np

from research.telechat.doctor.small_models import official_configs, random_official, to_mindspore

__all__ = ["HF_CONFIGS", "build_model", "logits_of", "loss_and_gradients", "loss_of", "random_official",
           "to_mindspore"]

_SHORT = {"7b": "tied table", "12b": "own head", "52b": "fused projections", "telechat2_mha": "TeleChat2",
          "telechat2_gqa": "grouped heads"}
# Official config.json keys of each family at tiny sizes; random weights are large enough that attention is peaked.
HF_CONFIGS: Dict[str, Dict[str, Any]] = {name: official_configs(32, 48, 97)[key] for name, key in _SHORT.items()}


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
