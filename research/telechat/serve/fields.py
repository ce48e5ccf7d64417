"""Values from the JSON body of a request, checked for type and bounds. null counts as missing."""
import json
import math
from typing import Any, List, Optional

from research.telechat.common.files import JsonObject
from research.telechat.serve.errors import ApiError


def read_body(data: bytes) -> JsonObject:
    """The body as a JSON object. Raises ApiError."""
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_json)
        if b"\\u" in data:
            json.dumps(body, ensure_ascii=False).encode("utf-8")          # half of a surrogate pair is no character
    except (UnicodeDecodeError, ValueError, RecursionError) as err:
        raise ApiError(400, f"the body is not valid JSON: {str(err)[:120]}; expected a JSON object") from err
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {_kind(body)}; expected a JSON object")
    return body


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number",
            type(None): "null"}.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value as quoted in an error message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """The keys of one body. Every method raises ApiError with `param` for an invalid value."""

    def __init__(self, body: JsonObject):
        self.body = body

    def get(self, key: str) -> Any:
        """The raw value; None if missing."""
        return self.body.get(key)

    def wrong(self, key: str, expected: str) -> ApiError:
        """The error for an unexpected value of `key`."""
        return ApiError(400, f"{key}: expected {expected}, found {shown(self.body.get(key))}", key)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.body.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def integer(self, key: str, low: int, high: int) -> Optional[int]:
        """A whole number; 3.0 counts as one."""
        value = self.body.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, open_low: bool = False) -> Optional[float]:
        """A number; with open_low it must be greater than `low`."""
        value = self.body.get(key)
        if value is None:
            return None
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and not (
            isinstance(value, float) and not math.isfinite(value))         # an int may be too large for a float
        if not good or not low <= value <= high or (open_low and value == low):
            raise self.wrong(key, f"a number {f'above {low:g}, at most' if open_low else f'from {low:g} to'} {high:g}")
        return float(value)

    def text(self, key: str) -> Optional[str]:
        """Text."""
        value = self.body.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def item(self, key: str) -> Optional[JsonObject]:
        """A JSON object."""
        value = self.body.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def items(self, key: str) -> Optional[List[JsonObject]]:
        """A list of JSON objects."""
        value = self.body.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise self.wrong(key, "a list of objects")
        return value
