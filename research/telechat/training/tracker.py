"""Where the rows of a training log go besides its file: TensorBoard, and a tracker such as wandb or swanlab.

Neither is a dependency. TensorBoard's writer is MindFormers' (`tensorboard:` in the recipe); a tracker is any module
with `log(values, step=...)` and, where it has them, `init(...)` and `finish()`, which is the interface that wandb and
swanlab share.
"""
import importlib
import math
from typing import Callable, Mapping, Optional, Protocol

from mindformers.tools.logger import logger

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject

_TENSORBOARD = {"tokens_per_second_per_card": "tokens per second per card", "mfu": "mfu", "memory_gb": "memory (GB)",
                "perplexity": "perplexity on the evaluation data"}       # MFLossMonitor writes loss, lr and norm


class Tracker:
    """Sends rows to a tracker. Its errors are logged once and never end the training."""

    def __init__(self, module: str, arguments: Optional[Mapping[str, object]] = None):
        """
        Args:
            module: name of an installed Python module, such as `wandb` or `swanlab`.
            arguments: of its `init`, such as {"project": "telechat"}.

        Raises:
            ConfigError: the module cannot be imported or has no `log`.
        """
        self.name, self.arguments = module, dict(arguments or {})
        try:
            self.module = importlib.import_module(module)
        except ImportError as err:
            raise ConfigError(f"callbacks: TelechatTrainingLog.tracker: the module {module!r} cannot be imported "
                              f"({err}); install it, or leave tracker out") from err
        if not callable(getattr(self.module, "log", None)):
            raise ConfigError(f"callbacks: TelechatTrainingLog.tracker: {module!r} has no function "
                              "log(values, step=...); expected a module such as wandb or swanlab")
        self._failed = False

    def start(self, info: JsonObject) -> None:
        """Begin a run. info: what the run is (recipe, sizes, data), given to `init` as `config`."""
        if callable(getattr(self.module, "init", None)):
            self._call(self.module.init, **{"config": info, **self.arguments})

    def log(self, row: JsonObject) -> None:
        """One row of the training log, without the entries that are no finite number."""
        values = {key: value for key, value in row.items()
                  if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)}
        self._call(self.module.log, values, step=row["step"])

    def finish(self) -> None:
        """End the run."""
        if callable(getattr(self.module, "finish", None)):
            self._call(self.module.finish)

    def _call(self, function: Callable[..., object], *values: object, **named: object) -> None:
        try:
            function(*values, **named)
        except Exception as err:                                 # a failing tracker must not end a training
            if not self._failed:
                logger.error("%s: %s; training continues, further errors of it are not reported.", self.name, err)
            self._failed = True


class ScalarWriter(Protocol):
    """What is needed of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, *, global_step: int) -> object: ...


def to_tensorboard(writer: Optional["ScalarWriter"], row: JsonObject) -> None:
    """The figures of a row that MindFormers does not write itself, with MindFormers' `writer`; None writes nothing."""
    if writer is None:
        return
    for key, title in _TENSORBOARD.items():
        value = row.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            writer.add_scalar(title, value, global_step=row["step"])
