"""The training step and what it returns. The log of a run is telechat_training_log, saving telechat_checkpoint_monitor.
"""
from typing import Any, Dict

import numpy as np
from mindformers.tools.register import MindFormerModuleType
from mindformers.wrapper.wrapper import MFTrainOneStepCell

from research.telechat.telechat_compat import on_cpu, plugin_class
from research.telechat.telechat_variants import ConfigError


class TrainingStopped(ConfigError):
    """Training ended early for a reason that the user can mend; the message says at which step and what to do."""


@plugin_class(MindFormerModuleType.WRAPPER)
class TelechatTrainOneStepCell(MFTrainOneStepCell):
    """MindFormers' training step; on the CPU, overflow is found from the gradients by operators that exist there."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if on_cpu():
            self.ascend_910b_target = True
            self.enable_allfinite = False


def to_float(value: Any) -> float:
    """A scalar from a Tensor, an array or a number; NaN where there is none."""
    if value is None:
        return float("nan")
    array = np.asarray(value.asnumpy() if hasattr(value, "asnumpy") else value, dtype=np.float64).reshape(-1)
    return float(array.mean()) if array.size else float("nan")


def step_values(outputs: Any) -> Dict[str, Any]:
    """What a training step returns: loss, overflow (bool), and where there are any loss_scale, lr, global_norm."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    values: Dict[str, Any] = {"loss": to_float(outputs[0]), "overflow": False}
    if len(outputs) > 1 and outputs[1] is not None:
        values["overflow"] = bool(to_float(outputs[1]))
    for index, key in ((2, "loss_scale"), (3, "lr"), (4, "global_norm")):
        if len(outputs) > index and outputs[index] is not None:
            values[key] = to_float(outputs[index])
    return values
