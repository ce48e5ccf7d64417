"""What differs between MindFormers 1.6 and 1.9, and what MindFormers needs to run on a CPU. Nothing else.

Every other module imports moved names from here, so that a new MindFormers version is met in one place. Which versions
fit, and the check before anything is imported, is in common/versions.py.
"""
import importlib
import logging
import resource
import sys
from typing import Any, Callable, Tuple

import mindspore as ms
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister

from research.telechat.common.errors import ConfigError
from research.telechat.common.printable import PrintableFilter
from research.telechat.common.versions import TESTED, install_line

PACKAGE = "research.telechat"
# Modules that register what recipes name by `type` alone: optimizer, training step, callbacks.
NAMED_BY_RECIPES = ("training.log", "training.optimizer", "training.perplexity", "training.saving", "training.step")


def first_import(*candidates: str) -> Any:
    """The first of `candidates` ("module:name") that this MindFormers version has; ImportError names all of them."""
    for candidate in candidates:
        module, name = candidate.split(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {', '.join(candidates)} exists in the installed mindformers {mindformers_version()}; "
                      f"supported are mindformers {', '.join(TESTED)}: {install_line(mindformers_version())}")


def mindformers_version() -> str:
    """Version of the installed MindFormers."""
    return importlib.import_module("mindformers").__version__


LayerSetting = first_import("mindformers.models.utils:LayerSetting",
                            "mindformers.parallel_core.training_graph.transformer.utils:LayerSetting")
lazy_inline = first_import("mindformers.models.utils:lazy_inline", "mindformers.version_control:get_lazy_inline")
get_tensorboard_writer = first_import("mindformers.core.callback.callback:get_tensorboard_writer",
                                      "mindformers.utils.tensorboard:get_tensorboard_writer")
set_output_path = first_import("mindformers.tools:set_output_path", "mindformers.utils.file_utils:set_output_path",
                               "mindformers.tools.utils:set_output_path")


def apply_template(recipe: MindFormerConfig) -> MindFormerConfig:
    """The recipe as a config object, with MindFormers' defaults; ConfigError for keys that it does not know."""
    template = first_import("mindformers.tools.register.template:ConfigTemplate",
                            "mindformers.utils.config:ConfigTemplate")
    plain = recipe.to_dict()
    try:
        changed = template.apply_template(plain)
    except (KeyError, TypeError, ValueError) as err:
        raise ConfigError(f"recipe: {err.args[0] if err.args else err}") from err
    return MindFormerConfig(**(changed or plain))


def log_printable(log: logging.Logger) -> None:
    """Let nothing from data, a model or a file name reach this log, or the terminal through it, raw."""
    if not any(isinstance(each, PrintableFilter) for each in log.filters):
        log.addFilter(PrintableFilter())


if isinstance(logger, logging.Logger):
    log_printable(logger)


def plugin_class(module_type: str) -> Callable[[type], type]:
    """Register a class with MindFormers so that it exists once, whichever way its file was loaded.

    MindFormers' `auto_register` copies the file named in a YAML to a folder of its own and executes the copy, while
    other modules import ``research.telechat.x``: without care there are two classes of one name, and `isinstance`
    fails between them. A class defined in such a copy is therefore replaced by the one of the real module.

    MindFormers' own run_mindformer.py loads nothing of a recipe but what `auto_register` names: with the model come the
    classes of `NAMED_BY_RECIPES`. (run/job.py imports them itself.)
    """
    def register(cls: type) -> type:
        if not cls.__module__.startswith(f"{PACKAGE}.") and cls.__module__ != "__main__":
            if module_type == MindFormerModuleType.MODELS:
                for name in NAMED_BY_RECIPES:
                    importlib.import_module(f"{PACKAGE}.{name}")
            real_name = f"{PACKAGE}.{cls.__module__.rsplit('.', 1)[-1]}"
            return getattr(importlib.import_module(real_name), cls.__name__)
        MindFormerRegister.register_cls(cls, module_type)
        return cls
    return register


def on_cpu() -> bool:
    """Whether the current context computes on the CPU. Asked for kernels only in model/kernels.py."""
    return ms.get_context("device_target") == "CPU"


def nothing_to_release() -> bool:
    """Whether a process may end without freeing what it has of the device: on a CPU."""
    return on_cpu()


def chip_name() -> str:
    """Name of the accelerator, "CPU" without one; "" where MindSpore does not tell."""
    if on_cpu():
        return "CPU"
    try:
        return str(ms.hal.get_device_name(0))
    except Exception:                                    # never fail a run over a device name
        return ""


def peak_memory() -> float:
    """Most bytes in use so far: of the device, on a CPU of the process."""
    if not on_cpu():
        for place in ("runtime", "hal"):
            measure = getattr(getattr(ms, place, None), "max_memory_allocated", None)
            if measure is not None:
                return float(measure())
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(usage * (1 if sys.platform == "darwin" else 1024))


def _leave(*_args: object) -> None:
    """Does nothing."""


def forget_context() -> None:
    """Let the next build_context set what its recipe says: MindFormers does so once in a process. Threads stay on the
    cores they have, which MindSpore binds once."""
    context = importlib.import_module("mindformers.core.context.build_context")
    reset = getattr(getattr(context, "Context", None), "reset_instance", None)
    if reset is not None:
        reset()
    if hasattr(context, "_setup_affinity"):
        vars(context)["_setup_affinity"] = _leave
    ms.reset_auto_parallel_context()


# MindFormers binds the barrier of `mindspore.communication.comm_func`, which has no CPU kernel, at import in these.
_BARRIER_USERS: Tuple[str, ...] = ("mindformers.trainer.utils", "mindformers.utils.load_checkpoint_utils",
                                   "mindformers.utils.parallel_utils", "mindformers.trainer.base_trainer",
                                   "mindformers.checkpoint.checkpoint", "mindformers.core.callback.callback")


def prepare_cpu() -> None:
    """Make MindFormers' own code run on the CPU: several processes wait for each other with a barrier that exists."""
    if not on_cpu():
        return
    for name in _BARRIER_USERS:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "barrier"):
            vars(module)["barrier"] = _cpu_barrier


def _cpu_barrier(*_args: object, **_kwargs: object) -> None:
    """A barrier that is a no-op in a single process, where no communication group exists."""
    if "mindspore.communication" in sys.modules and ms.communication.GlobalComm.INITED:
        ms.mint.distributed.barrier()


__all__ = ["LayerSetting", "MindFormerModuleType", "apply_template", "chip_name", "first_import", "forget_context",
           "lazy_inline",
           "mindformers_version", "on_cpu", "peak_memory", "plugin_class", "prepare_cpu", "set_output_path"]
