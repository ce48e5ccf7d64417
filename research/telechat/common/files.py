"""Atomic file writes: a reader sees the old file or the complete new one. For large files see checkpoint/writer.py."""
import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple, Union

from research.telechat.common.errors import ConfigError, OverwriteError

JsonObject = Dict[str, Any]              # or a section of a recipe: what its values are is checked where they are used


@contextlib.contextmanager
def whole(path: Union[str, Path]) -> Iterator[Path]:
    """A temporary name next to `path` to write to. Renamed to `path` when the block ends, deleted if it fails."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def refuse_foreign(paths: Iterable[Path], ours: Callable[[Path], bool], overwrite: bool) -> None:
    """OverwriteError where one of `paths` exists and is not `ours`, unless --overwrite is given."""
    foreign = [path for path in paths if not overwrite and os.path.lexists(path) and not ours(path)]
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise OverwriteError(f"{foreign[0]}{more} would be replaced, but this command did not write it, or it was "
                             "changed since; choose another place, or pass --overwrite to replace it. Nothing was "
                             "written")


def umask() -> int:
    """Permissions that new files do not get. Read without setting it, which other threads would notice."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    value = os.umask(0o022)
    os.umask(value)
    return value


def set_usual_permissions(path: Union[str, Path]) -> None:
    """Give a file the permissions of any new file; libraries make theirs readable for the owner alone."""
    os.chmod(path, 0o666 & ~umask())


def check_output_folder(path: Union[str, Path], named: str) -> None:
    """Make the folder `path` and try to write there. Raises ConfigError; `named` is what the user calls it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as err:
        fault = "it is a file" if Path(path).is_file() else err.strerror or err
        raise ConfigError(f"{named} {path} cannot be written: {fault}; name another folder, or change its permissions"
                          ) from err


def prepare_log(output_dir: object) -> None:
    """Let MindFormers, which is to be imported next, write its log into `output_dir` (default: ./output).

    Raises ConfigError: the folder cannot be written.
    """
    folder = os.path.abspath(str(output_dir or "./output"))
    check_output_folder(folder, "--output_dir:")
    os.environ.setdefault("LOG_MF_PATH", os.path.join(folder, "log"))


def read_json_object(path: Union[str, Path], what: str) -> JsonObject:
    """Read a JSON file that must contain an object. Raises ConfigError with the file's name and the error."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{what} not found: {path}; copy it there, or name the place where it is") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{what} {path} cannot be read: {err}") from err
    except (json.JSONDecodeError, RecursionError) as err:
        raise ConfigError(f"{what} {path} is not valid JSON: {err}; correct it, or copy it again") from err
    if not isinstance(data, dict):
        raise ConfigError(f"{what} {path} must hold a JSON object, found {type(data).__name__}; is it the right file?")
    return data


def write_json(path: Union[str, Path], value: object) -> None:
    """Write `value` as indented JSON, atomically; types that JSON lacks are written as their str()."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n"


class DuplicateKeyError(ValueError):
    """A JSON object has `key` twice."""

    def __init__(self, key: str):
        super().__init__(f"{key!r} appears twice")
        self.key = key


def unique_keys(pairs: List[Tuple[str, object]]) -> JsonObject:
    """`object_pairs_hook` for json: the object as a dict. Raises DuplicateKeyError, where a plain dict would silently
    keep only the last value."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return result
