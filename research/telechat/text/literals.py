"""Values that were exported as the text of a Python object ({'city': 'Rome', 'metric': True}) instead of JSON."""
import ast
import io
import json
import math
import tokenize
import warnings
from typing import Any, List, Optional, Tuple

from research.telechat.common.files import unique_keys

_LONGEST = 1 << 20                       # characters of a text that is looked at
SURROGATES = "lone surrogates replaced by U+FFFD"
_DEEPEST = 60                            # brackets within brackets
_LONGEST_INTEGER = 10_000               # bits; Python refuses to print those of about 14,000
_PLAIN = (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT)


def read_json(text: str, notes: Optional[List[str]] = None) -> Any:
    """The value of a JSON text, lone surrogates replaced, which is appended to `notes`.

    ValueError: it is not JSON, has NaN or Infinity, or a key twice.
    """
    try:
        return clean(json.loads(text, parse_constant=_no_json, object_pairs_hook=unique_keys), notes)
    except RecursionError:
        raise ValueError("nested too deep") from None


def clean(value: object, notes: Optional[List[str]] = None) -> Any:
    """A JSON value with U+FFFD for every surrogate without its other half, which no vocabulary can encode.

    Raises DuplicateKeyError: two keys of an object become the same. `SURROGATES` is appended to `notes` if there are
    any.
    """
    cleaned = _clean(value)
    if notes is not None and cleaned != value:
        notes.append(SURROGATES)
    return cleaned


def _clean(value: object) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return unique_keys([(_clean(key), _clean(item)) for key, item in value.items()])
    return value


def read_literal(text: str) -> Any:
    """The value of a Python literal of dicts, lists, texts, finite numbers, True, False and None.

    ValueError: it is something else, has a key twice or one that is not text, or two texts in a row, which Python would
    join (that is how NumPy prints a list of them).
    """
    if len(text) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    try:
        _look_at_tokens(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # a SyntaxWarning would print the data
            tree = ast.parse(text.strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as err:
        raise ValueError(f"not a Python literal: {err}") from None


def _look_at_tokens(text: str) -> None:
    """Refuse deep nesting, on which Python's own parser may fail, and texts that follow each other."""
    depth, before = 0, None
    for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if depth > _DEEPEST:
                raise ValueError("nested too deep")
        if token.type == tokenize.STRING and before == tokenize.STRING:
            raise ValueError("two texts in a row")
        before = before if token.type in _PLAIN else token.type


def _value(node: ast.AST) -> object:
    if isinstance(node, ast.Dict):
        pairs: List[Tuple[str, object]] = []
        for key, value in zip(node.keys, node.values):
            name = _value(key) if key is not None else None
            if not isinstance(name, str):
                raise ValueError("a key that is not text")
            pairs.append((name, _value(value)))
        return unique_keys(pairs)
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return -number
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, int, float, str))):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise ValueError("a number that is not finite")
        if isinstance(node.value, int) and node.value.bit_length() > _LONGEST_INTEGER:
            raise ValueError("a number that is too long")
        if isinstance(node.value, str):
            node.value.encode("utf-8")           # UnicodeEncodeError, a ValueError, where half a character stands alone
        return node.value
    raise ValueError(f"{type(node).__name__} is no value of JSON")


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
