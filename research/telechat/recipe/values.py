"""Values as users write them in YAML and on command lines: numbers, switches, and documents of a bounded size.

YAML 1.1 reads `2e-5` as text, because it wants a dot and a signed exponent (https://yaml.org/type/float.html), `010` as
8 and `1:30` as 90 (https://yaml.org/type/int.html); YAML 1.2 and everybody else reads 0.00002, 10 and text. `load`
follows YAML 1.2 here. A duplicate key is an error: PyYAML keeps the last one. What a key of a base recipe
holds says what a recipe over it may hold: see `conform`.
"""
import math
import re
from typing import Any, Dict, Tuple

import yaml

from research.telechat.common.errors import ConfigError

MAX_CHARACTERS = 1 << 20           # of one YAML document; the longest recipe here has some 5,000
MAX_DEPTH = 64                     # of nested brackets in flow style; deeper text costs PyYAML quadratic time
MAX_VALUES = 100_000               # once all aliases are expanded

_SWITCHES = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


_TEXT_TOO = {"resume_training", "async_save", "shuffle"}           # switches that also take a name
_WHOLE = {"epochs", "batch_size", "gradient_accumulation_steps", "micro_batch_num", "micro_batch_interleave_num",
          "data_parallel", "model_parallel", "pipeline_stage", "context_parallel", "seq_length", "num_layers",
          "hidden_size", "num_heads", "warmup_steps", "save_checkpoint_steps", "keep_checkpoint_max", "seed",
          "eval_step_interval", "sink_size", "num_parallel_workers", "profile_start_step", "profile_stop_step"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as YAML 1.2 does and refuses a mapping with a key twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As PyYAML, which keeps the last of equal keys. Raises ConstructorError."""
        node = super().compose_mapping_node(anchor)
        lines: Dict[Tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line, name = key.start_mark.line + 1, (key.tag, key.value)
                if name in lines:
                    raise yaml.constructor.ConstructorError(None, None, (
                        f"duplicate key {key.value!r} in lines {lines[name]} and {line}, of which only one would be "
                        "used; merge them"), None)
                lines[name] = line
        return node

    def construct_yaml_int(self, node: Any) -> Any:
        """Digits are a decimal number, with a zero in front, too; `1:30` is text."""
        text = str(self.construct_scalar(node))
        if re.fullmatch(r"[-+]?[0-9_]+", text):
            return int(text.replace("_", ""))
        return text if ":" in text else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        """`1:30.5` is text."""
        text = str(self.construct_scalar(node))
        return text if ":" in text else super().construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}",
                            getattr(_Loader, f"construct_yaml_{_kind}"))


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
        ConfigError: text where a number or a switch was, that is none; a switch or no finite number where a number was;
            a fraction of what is counted.
    """
    name = key.rpartition(".")[2].lstrip("-")
    if isinstance(over, bool):
        if not isinstance(value, str) or (name in _TEXT_TOO and value.lower() not in _SWITCHES):
            return value
        if value.lower() not in _SWITCHES:
            raise ConfigError(f"{key}: expected True or False, found the text {value!r}")
        return _SWITCHES[value.lower()]
    if not isinstance(over, (int, float)):
        return value
    if isinstance(value, str):
        value = _number(value, key, over)
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{key}: expected a number, such as {over}, found {value}")
    if isinstance(over, int) and isinstance(value, float) and value.is_integer() and abs(value) < 2 ** 53 and (
            over or name in _WHOLE):
        return int(value)
    if name in _WHOLE and isinstance(value, float):
        raise ConfigError(f"{key}: expected a whole number, such as {over}, found {value}")
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
