"""Reading single values of an official config.json."""
import math
from typing import Any, Optional, Type, TypeVar

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject

Number = TypeVar("Number", int, float)


def get_number(cfg: JsonObject, key: str, kind: Type[Number], default: Optional[Number] = None, where: str = ""
               ) -> Number:
    """cfg[key] as `kind`; ConfigError if it is missing (and has no default), of another type or not positive.

    where: prefix of the key in the error, such as "rope_scaling.".
    """
    value: Any = default if cfg.get(key) is None else cfg[key]
    if value is None:
        raise ConfigError(f"model config: key {where + key!r} is missing; is this a TeleChat config.json?")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():      # 30.0, 3e1
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"model config: key {where + key!r} must be {kind.__name__}, found {value!r}")
    if not 0 < value < math.inf:
        raise ConfigError(f"model config: key {where + key!r} must be positive, found {value!r}")
    return value
