"""The training step and what it returns. The log of a run is training/log.py, saving training/saving.py.
"""
from typing import Literal, Sequence, Tuple, Union

import numpy as np
from mindformers.tools.register import MindFormerModuleType
from mindformers.tools.utils import get_real_rank
from mindformers.wrapper.wrapper import MFTrainOneStepCell
from mindspore import Tensor, nn

from research.telechat.bridge.compat import plugin_class
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.model import kernels
from research.telechat.model.dropout import count_dropout
from research.telechat.training.layerwise import LayerByLayer, goes_by_layer
from research.telechat.training.optimizer import ClipGradNorm, is_overflow

# Beginnings of the names of MindSpore's and MindFormers' cells that cut a batch.
_MICRO_BATCHES = ("MicroBatchInterleaved", "GradAccumulationCell", "PipelineCell")


def has_micro_batches(network: nn.Cell) -> bool:
    """Whether one step of `network` computes several batches, which must not share their dropout masks."""
    return any(type(cell).__name__.startswith(_MICRO_BATCHES) for _, cell in network.cells_and_names())


@plugin_class(MindFormerModuleType.WRAPPER)
class TelechatTrainOneStepCell(MFTrainOneStepCell):
    """MindFormers' training step; on the CPU, gradients are clipped and overflow is found with kernels of the CPU, and
    dropout follows from the step.

    There, overflow is a norm of all gradients that is not finite. Data-parallel ranks agree on it without a word, as
    they have the same gradients by then.
    """

    clip_grad_norm: nn.Cell

    def __init__(self, network: nn.Cell, optimizer: nn.Cell, *args: object, **kwargs: object):
        if kernels.dropout_by_step() and not has_micro_batches(network):
            count_dropout(network, optimizer.global_step, get_real_rank())
        super().__init__(network, optimizer, *args, **kwargs)
        if self.use_skip_data_by_global_norm and not self.use_clip_grad:
            raise ConfigError("use_skip_data_by_global_norm is True, but runner_wrapper.use_clip_grad is not, without "
                              "which there is no norm; set both or neither")
        self.cpu = kernels.gradient_kernels_of_cpu()
        if self.cpu:
            self.clip_grad_norm = ClipGradNorm(float(self.clip_grad_norm.clip_norm.asnumpy()[0]))
        # Decided in the first step, when everything is known; False: as a whole.
        self.layer_by_layer: Union[LayerByLayer, Literal[False], None] = None

    def __call__(self, *inputs: object) -> Tuple[Tensor, ...]:
        """One step, as a whole or layer by layer."""
        if self.layer_by_layer is None:
            self.layer_by_layer = LayerByLayer(self) if goes_by_layer(self, inputs) else False
        return self.layer_by_layer(*inputs) if self.layer_by_layer else super().__call__(*inputs)

    def start_overflow_check(self, pre_cond: Tensor, compute_input: Tensor) -> Tuple[Tensor, Tensor]:
        """Clears the overflow flags of devices that have any."""
        if self.cpu:
            return compute_input, compute_input
        return super().start_overflow_check(pre_cond, compute_input)

    def get_overflow_status(self, status: Tensor, compute_output: Tensor) -> Tensor:
        """Whether one of the gradients `compute_output` is infinite or NaN, [] bool."""
        if self.cpu:
            return is_overflow(self.clip_grad_norm.norm(compute_output))
        return super().get_overflow_status(status, compute_output)


def to_float(value: Union[Tensor, float, None]) -> float:
    """A scalar from a Tensor, an array or a number; NaN where there is none."""
    if value is None:
        return float("nan")
    array = np.asarray(value.asnumpy() if hasattr(value, "asnumpy") else value, dtype=np.float64).reshape(-1)
    return float(array.mean()) if array.size else float("nan")


def step_values(outputs: Sequence[Tensor]) -> JsonObject:
    """What a training step returns: loss, overflow (bool), and where there are any loss_scale, lr, global_norm."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    values: JsonObject = {"loss": to_float(outputs[0]), "overflow": False}
    if len(outputs) > 1 and outputs[1] is not None:
        values["overflow"] = bool(to_float(outputs[1]))
    for index, key in ((2, "loss_scale"), (3, "lr"), (4, "global_norm")):
        if len(outputs) > index and outputs[index] is not None:
            values[key] = to_float(outputs[index])
    return values
