"""A check, its outcome, and the loop over all of them. No MindSpore."""
import time
from typing import Callable, Iterable, List, NamedTuple, Optional, Sequence

import numpy as np

from research.telechat.common.printable import one_line
from research.telechat.doctor.device import Device

OK, WRONG, SKIPPED = "ok", "wrong", "skipped"
VERDICTS = (OK, WRONG, SKIPPED)
# Largest difference from NumPy, relative to the largest number: a few roundings of the type.
LIMITS = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2e-2}


class Skip(Exception):
    """A check cannot run here; the message says why."""


class Outcome(NamedTuple):
    """The result of one check, in words for the table."""

    expected: str
    found: str
    ok: bool


class Check(NamedTuple):
    """One row of the table. run raises Skip if there is nothing to check; avoid: what not to use of a recipe if the
    check fails; cards: the minimum it needs."""

    name: str
    run: Callable[[Device], Outcome]
    avoid: str
    fused: bool = False                      # needs a kernel that only accelerators have
    cards: int = 1


class Finding(NamedTuple):
    """A check with its verdict. found: for a skipped one the reason; avoid: what not to use if it is wrong."""

    name: str
    expected: str
    found: str
    verdict: str
    avoid: str
    seconds: float


Progress = Callable[[int, int, Check], object]


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected number; infinite for other shapes or non-finite values."""
    if np.shape(found) != np.shape(expected):
        return float("inf")
    difference = np.abs(np.asarray(found, np.float64) - expected)
    largest = np.abs(expected).max(initial=0.0)
    worst = difference.max(initial=0.0) / (largest or 1.0)
    return float(worst) if np.isfinite(worst) else float("inf")


def within(pairs: Sequence[Sequence[np.ndarray]], limit: float, what: str = "NumPy") -> Outcome:
    """Outcome of comparing pairs (found, expected); the worst one counts."""
    worst = max(gap(found, expected) for found, expected in pairs)
    return Outcome(f"{what} within {limit:.0e}", f"differs by {worst:.1e}", worst <= limit)


def relative(pairs: Sequence[Sequence[float]], limit: float, what: str) -> Outcome:
    """Outcome of comparing pairs of numbers (found, expected)."""
    return within([(np.array(found), np.array(expected)) for found, expected in pairs], limit, what)


def why_not(check: Check, fused: bool, cards: int) -> str:
    """Why a check is skipped on a device, '' if it runs."""
    if check.fused and not fused:
        return "Ascend-only kernel; here models use the composed one, which is checked"
    if cards < check.cards:
        return f"needs {check.cards} cards, found {cards}"
    return ""


def examine(check: Check, device: Device) -> Finding:
    """Run one check. An exception is its finding."""
    started = time.monotonic()

    def finding(expected: str, found: str, verdict: str) -> Finding:
        return Finding(check.name, expected, found, verdict, check.avoid,
                       round(time.monotonic() - started, 2))
    reason = why_not(check, device.fused, device.ranks)
    if reason:
        return finding("-", reason, SKIPPED)
    try:
        outcome = check.run(device)
    except Skip as skip:
        return finding("-", str(skip), SKIPPED)
    except Exception as error:                       # kernels, compilers and collectives raise anything
        said = one_line(f"{type(error).__name__}: {error}")[:300]
        return finding("no error", said, WRONG)
    return finding(outcome.expected, outcome.found, OK if outcome.ok else WRONG)


def shared(findings: Sequence[Finding], device: Device) -> List[Finding]:
    """The findings of this card; a check that is wrong on another card counts as wrong here, too.

    Each card sends one number per check; if that fails, the findings stay as they are.
    """
    mine = np.array([VERDICTS.index(one.verdict) for one in findings], np.float32)
    try:
        every = device.collective("all-gather", "float32", mine).reshape(device.ranks, len(mine))
    except Exception:                                # that collective's own check reports it
        return list(findings)
    if not np.array_equal(every[device.rank], mine):
        return list(findings)
    result = []
    for number, one in enumerate(findings):
        others = [str(rank) for rank in range(device.ranks) if every[rank, number] == VERDICTS.index(WRONG)]
        if others and one.verdict != WRONG:
            one = one._replace(found=f"{one.found}; wrong on rank {', '.join(others)}", verdict=WRONG)
        result.append(one)
    return result


def examine_all(checks: Iterable[Check], device: Device, progress: Optional[Progress] = None,
                kept: Optional[List[Finding]] = None) -> List[Finding]:
    """Run the checks one after the other. kept: a list to append the findings to, for readers in other threads."""
    findings: List[Finding] = [] if kept is None else kept
    every = list(checks)
    for number, check in enumerate(every):
        if progress is not None:
            progress(number, len(every), check)
        findings.append(examine(check, device))
    return findings
