"""The training step and what it returns. The log of a run is training/log.py, saving training/saving.py.

Networks return the sum of their tokens' losses and the number of these tokens (model/loss.py). Every cell that joins
parts of a batch adds both: MindFormers' for the micro-batches of a pipeline and for accumulation in semi-automatic
parallelism, those here for interleaved micro-batches and data-parallel ranks, training/accumulation.py on a CPU. The
step takes the gradients of the sum and divides them by the number, once.
"""
from typing import Literal, Optional, Sequence, Tuple, Union

import mindspore as ms
import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_real_rank
from mindformers.wrapper.wrapper import MFPipelineWithLossScaleCell, MFTrainOneStepCell
from mindspore import Tensor, nn
from mindspore.communication import get_group_size
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from research.telechat.bridge.compat import plugin_class
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.model import kernels
from research.telechat.model.dropout import count_dropout
from research.telechat.training.accumulation import Accumulation
from research.telechat.training.layerwise import LayerByLayer, goes_by_layer
from research.telechat.training.optimizer import ClipGradNorm, is_overflow

# Beginnings of the names of MindSpore's and MindFormers' cells that split a batch.
_MICRO_BATCHES = ("MicroBatchInterleaved", "GradAccumulationCell", "PipelineCell")


def has_micro_batches(network: nn.Cell) -> bool:
    """Whether one step of `network` computes several batches, which must not share their dropout masks."""
    return any(type(cell).__name__.startswith(_MICRO_BATCHES) for _, cell in network.cells_and_names())


class MicroBatchInterleavedWithTwoOutput(nn.MicroBatchInterleaved):
    """MindSpore's cell, which adds one output, for networks that return sum and number."""

    def construct(self, *args: Tensor) -> Tuple[Tensor, Tensor]:
        """The inputs of the network -> sum and number over all micro-batches."""
        total, count = 0.0, 0.0
        for number in range(self.interleave_num):
            more = self.network(*self.interleave_inputs[number](number, *args))
            total, count = self.add(total, more[0]), count + more[1]
        return total, count


def with_two_outputs(network: nn.Cell) -> nn.Cell:
    """`network`, in whose wrappers MindSpore's interleaving, which MindFormers inserts, adds sum and number."""
    if isinstance(network, MicroBatchInterleavedWithTwoOutput) or hasattr(network, "shifted"):
        return network
    if type(network).__name__ == nn.MicroBatchInterleaved.__name__:
        return MicroBatchInterleavedWithTwoOutput(network.network, network.interleave_num)
    for name, child in list(network.name_cells().items()):
        replaced = with_two_outputs(child)
        if replaced is not child:
            setattr(network, name, replaced)
    return network


class AcrossRanks(nn.Cell):
    """Sum and number of all data-parallel ranks. The gradient is of the rank's own sum: gradients are added later."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.all_reduce, self.concat, self.reshape = P.AllReduce(), P.Concat(), P.Reshape()

    def construct(self, total: Tensor, count: Tensor) -> Tuple[Tensor, Tensor]:
        """total: [], count: [1], of this rank -> the same of all."""
        own = F.stop_gradient(self.concat((self.reshape(total, (1,)), count)))
        every = F.stop_gradient(self.all_reduce(own))
        return total + self.reshape(every[0:1] - own[0:1], ()), every[1:2]


class NetworkAcrossRanks(nn.Cell):
    """A network whose sum and number are those of all data-parallel ranks."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network
        self.across = AcrossRanks()

    def construct(self, *inputs: Tensor) -> Tuple[Tensor, Tensor]:
        """The network's inputs, of this rank."""
        total, count = self.network(*inputs)
        return self.across(total, count)


@plugin_class(MindFormerModuleType.WRAPPER)
class TelechatTrainOneStepCell(MFTrainOneStepCell):
    """MindFormers' training step, for networks that return sum and number; data-parallel ranks add their gradients.

    On the CPU, gradients are clipped and overflow is found with kernels of the CPU, dropout follows from the step, and
    gradients are accumulated. There, overflow is a norm of all gradients that is not finite. Data-parallel ranks agree
    on it without communicating, as they have the same gradients by then.

    Args:
        network, optimizer, *args, **kwargs: of MFTrainOneStepCell.
        accumulation_steps: parts of a batch whose gradients are taken one after the other; on a CPU only.
        calculate_per_token_loss: MindFormers' option, which cannot be turned off.
    """

    clip_grad_norm: nn.Cell

    def __init__(self, network: nn.Cell, optimizer: nn.Cell, *args: object, accumulation_steps: int = 1,
                 calculate_per_token_loss: bool = True, **kwargs: object):
        network = with_two_outputs(network)
        if kernels.dropout_by_step() and accumulation_steps == 1 and not has_micro_batches(network):
            count_dropout(network, optimizer.global_step, get_real_rank())
        ranks = get_group_size() if ms.get_auto_parallel_context("parallel_mode") == "data_parallel" else 1
        if ranks > 1 and accumulation_steps == 1:
            network = NetworkAcrossRanks(network)
        super().__init__(network, optimizer, *args, calculate_per_token_loss=True, **kwargs)
        if ranks > 1:                                  # not their mean: the number is that of all ranks
            self.grad_reducer = nn.DistributedGradReducer(self.weights, False, ranks)
        if self.use_skip_data_by_global_norm and not self.use_clip_grad:
            raise ConfigError("use_skip_data_by_global_norm is True, but runner_wrapper.use_clip_grad is not, without "
                              "which there is no norm; set both or neither")
        self.cpu = kernels.gradient_kernels_of_cpu()
        if self.cpu:
            self.clip_grad_norm = ClipGradNorm(float(self.clip_grad_norm.clip_norm.asnumpy()[0]))
        # Decided in the first step, when everything is known; False: as a whole.
        self.layer_by_layer: Union[LayerByLayer, Literal[False], None] = None
        self.accumulation: Optional[Accumulation] = None
        if accumulation_steps > 1:
            if not hasattr(super(), "grads_for_legacy"):
                raise ConfigError(f"runner_config.gradient_accumulation_steps is {accumulation_steps}, which needs "
                                  "mindformers 1.8 or later on a CPU; install it, or raise runner_config.batch_size")
            self.accumulation = Accumulation(self, accumulation_steps)
            self.across = AcrossRanks() if ranks > 1 else None
            self.grads_for_legacy = self.accumulated

    def __call__(self, *inputs: Tensor) -> Tuple[Tensor, ...]:
        """One step: as a whole, layer by layer, or with gradients accumulated over parts of the batch."""
        if self.layer_by_layer is None:
            self.layer_by_layer = LayerByLayer(self) if self.cpu and goes_by_layer(self, inputs) else False
        if self.layer_by_layer:
            return self.layer_by_layer(*inputs)
        return super().__call__(*(self.accumulation(*inputs) if self.accumulation else inputs))

    def accumulated(self, _scale: Tensor, total: Tensor, count: Tensor, *gradients: Tensor
                    ) -> Tuple[Tensor, Tuple[Tensor, ...], Tensor]:
        """MindFormers' grads_for_legacy where sum, number and gradients have been accumulated: they are the inputs."""
        if self.across is not None:
            total, count = self.across(total, count)
        return total / count, gradients, count

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


class TelechatPipelineCell(MFPipelineWithLossScaleCell):
    """MindFormers' step of pipelines and of accumulation on Ascend; every stage returns the loss, not the last alone.

    It is registered under the name of MindFormers' cell, which its trainer demands.
    """

    def __init__(self, network: nn.Cell, *args: object, calculate_per_token_loss: bool = True, **kwargs: object):
        super().__init__(with_two_outputs(network), *args, calculate_per_token_loss=True, **kwargs)

    @C.add_flags(has_effect=True)
    def construct(self, *inputs: Tensor) -> Tuple[Tensor, ...]:
        """MindFormers' outputs. Stages other than the last have 0 for the loss; the sum over them is the loss."""
        outputs = super().construct(*inputs)
        return (self.allreduce2(outputs[0]), *outputs[1:])


MindFormerRegister.register_cls(TelechatPipelineCell, MindFormerModuleType.WRAPPER,
                                alias=MFPipelineWithLossScaleCell.__name__)


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
