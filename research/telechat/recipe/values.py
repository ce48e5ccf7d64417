"""Values as people write them in YAML and on command lines: numbers, switches, and documents of a bounded size.

YAML 1.1 reads `2e-5` as text, because it wants a dot and a signed exponent (https://yaml.org/type/float.html); YAML 1.2
and everybody else reads a number. `load` follows YAML 1.2 here. What a key of a base recipe holds says what a recipe
over it may hold: see `conform`.
"""
import re
from typing import Any, Dict

import yaml

from research.telechat.common.errors import ConfigError

MAX_CHARACTERS = 1 << 20           # of one YAML document; the longest recipe here has some 5,000
MAX_DEPTH = 64                     # of nested brackets in flow style; deeper text costs PyYAML quadratic time
MAX_VALUES = 100_000               # once all aliases are expanded

_SWITCHES = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads a number with an exponent and no dot, or an unsigned exponent, as a number."""


_EXPONENT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver(               # type: ignore[no-untyped-call]  # PyYAML's stubs leave it untyped
    "tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is not YAML, or it is larger than the bounds of this module.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ValueError(f"its brackets are nested {deepest} deep; at most {MAX_DEPTH} are read")
    value = yaml.load(text, Loader=_Loader)
    if _count(value, {}) > MAX_VALUES:
        raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values")
    return value


def _count(value: object, known: Dict[int, int]) -> int:
    """Values in `value`, aliases expanded. A value that contains itself raises ValueError."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = -1                    # until its own count is known
        known[id(value)] = 1 + sum(_count(item, known)
                                   for item in (value.values() if isinstance(value, dict) else value))
    if known[id(value)] < 0:
        raise ValueError("an alias refers to the value that contains it")
    return known[id(value)]


def conform(value: object, over: object, key: str) -> object:
    """`value` for a key that holds `over` so far: a number or a switch written as text becomes one.

    A whole number written with an exponent becomes an integer where one was. Everything else stays as it is.

    Raises:
        ConfigError: text where a number was, that is no number.
    """
    if isinstance(over, bool):
        return _SWITCHES.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(over, (int, float)):
        return value
    if isinstance(value, str):
        value = _number(value, key, over)
    if isinstance(over, int) and isinstance(value, float) and value.is_integer() and abs(value) < 2 ** 53 and over:
        return int(value)
    return value


def _number(text: str, key: str, over: object) -> float:
    plain = text.strip().replace("_", "")
    for read in (int, float):
        try:
            return read(plain)
        except ValueError:
            continue
    raise ConfigError(f"{key}: expected a number, such as {over}, found the text {text!r}; write it without quotes, "
                      "units and thousands separators")
