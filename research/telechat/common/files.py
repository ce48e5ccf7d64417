"""Writing a file so that it is the old or the new one, never half. For large ones see checkpoint/writer.py."""
import contextlib
import os
from pathlib import Path
from typing import Iterator, Union


@contextlib.contextmanager
def whole(path: Union[str, Path]) -> Iterator[Path]:
    """A name beside `path` to write to. What was written is called `path` when the block ends, and gone if it fails."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Union[str, Path], text: str) -> None:
    """A text file in UTF-8, whole or not at all."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
