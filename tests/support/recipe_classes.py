"""Which keys of a recipe's sections are arguments of the classes that the sections name."""
import inspect
from typing import Any, List, Set

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from research.telechat.run import job  # noqa: F401 (registers what recipes name)

KINDS = {"optimizer": MindFormerModuleType.OPTIMIZER, "lr_schedule": MindFormerModuleType.LR,
          "runner_wrapper": MindFormerModuleType.WRAPPER, "callbacks": MindFormerModuleType.CALLBACK,
          "eval_callbacks": MindFormerModuleType.CALLBACK}
# read by MindFormers before the class is made
_READ_BEFORE = {"lr_schedule": {"warmup_ratio", "warmup_epochs", "warmup_steps", "total_steps"}}


def arguments(cls: type) -> Set[str]:
    """Names that the constructors of a class and of its parents take."""
    names: Set[str] = set()
    for each in cls.__mro__[:-1]:
        made_by = each.__new__ if "__new__" in vars(each) else each.__init__
        parameters = inspect.signature(inspect.unwrap(made_by)).parameters
        names |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def unknown_arguments(recipe: Any) -> List[str]:
    """Keys like 'optimizer.beta' that the class of their section does not take."""
    unknown = []
    for section, kind in KINDS.items():
        entries = recipe.get(section) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            known = arguments(MindFormerRegister.get_cls(kind, entry["type"])) | _READ_BEFORE.get(section, set())
            unknown += [f"{section}.{key}" for key in entry if key not in known | {"type"}]
    return unknown
