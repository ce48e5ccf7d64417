"""All checks in order: small and general ones first, so that the first failure is the most informative."""
from typing import List, Sequence

from research.telechat.common.errors import ConfigError
from research.telechat.doctor import (
    attention_checks,
    cache_checks,
    checkpoint_checks,
    collective_checks,
    kernel_checks,
    model_checks,
    plan_checks,
)
from research.telechat.doctor.checks import Check

ATTENTION, MODEL = attention_checks.Sizes(), model_checks.Sizes()


def all_checks(fused: bool, dtypes: Sequence[str], transform: checkpoint_checks.Transform,
               attention: attention_checks.Sizes = ATTENTION, model: model_checks.Sizes = MODEL) -> List[Check]:
    """fused: the device has Ascend's kernels; dtypes: those that models compute in, the most used one first; transform:
    shards and merges checkpoints."""
    return [*kernel_checks.checks(dtypes), *attention_checks.checks(dtypes, attention),
            *cache_checks.checks(dtypes, attention.dim), *collective_checks.checks(dtypes),
            *model_checks.checks(fused, model), *plan_checks.checks(fused),
            *checkpoint_checks.checks(transform)]


def chosen(checks: Sequence[Check], words: Sequence[str]) -> List[Check]:
    """Those whose names contain one of `words`; all of them without words. Raises ConfigError."""
    for word in words:
        if not any(word in check.name for check in checks):
            raise ConfigError(f"--only {word!r}: no check has it in its name; telechat doctor --list shows all")
    return [check for check in checks if not words or any(word in check.name for word in words)]
