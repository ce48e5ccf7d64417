"""Files that are not checkpoints: what they are instead; and tensor names with prefixes added by wrappers.

checkpoint/reader.py and torch_bin.py read files; they ask here when they cannot.
"""
import json
import re
from pathlib import Path
from typing import Dict, Iterable, List, Optional

# First bytes -> what the file is and what to do, as the end of a sentence that begins with "it is".
_MAGIC = (
    (b"<!doctype html", "a web page, perhaps of an error or a login, saved instead of the file; download it again"),
    (b"<html", "a web page, perhaps of an error or a login, saved instead of the file; download it again"),
    (b"<?xml", "an XML text, perhaps the error of a storage service; download the file again"),
    (b"gguf", "a GGUF file (llama.cpp), whose weights are quantised or laid out differently; use the original "
              "checkpoint"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\xfd7zxz", "compressed with xz; unpack it first"),
    (b"bzh", "compressed with bzip2; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"rar!", "a RAR archive; unpack it first"),
    (b"\x89hdf", "an HDF5 file; use the checkpoint as safetensors or .bin"),
    (b"\x93numpy", "a NumPy array; use the checkpoint as safetensors or .bin"),
    (b"par1", "a Parquet file, which holds data, not weights"),
    (b"%pdf", "a PDF document"),
)
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_ddp_module"}
_ANCHOR = re.compile(r"(?:transformer\.)?(?:h\.\d+|wte|word_embeddings|ln_f)\.|"
                     r"model\.(?:embed_tokens|layers|norm|tok_embeddings|norm_out)\.")


def what_it_is(path: Path) -> Optional[str]:
    """What a file is that should contain weights but cannot be read, as words after "it is"; None: unknown.

    Looks at its first bytes and at whether it is empty or all zeros.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
            size = path.stat().st_size
            file.seek(max(0, size - 4096))
            tail = file.read(4096)
    except OSError:
        return None
    if not head:
        return "empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        size_line = re.search(rb"^size (\d+)", head, re.MULTILINE)
        named = f" for {int(size_line[1]):,} bytes" if size_line else ""
        return f"a Git LFS pointer{named}, not the file itself; fetch it with `git lfs pull`"
    if head.startswith((b"/annex/objects/", b"../.git/annex", b".git/annex", b"# xet version")):
        return "a git-annex or Xet pointer, not the file itself; fetch it with `git annex get` or `git xet`"
    lower = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, meaning in _MAGIC:
        if lower.startswith(magic):
            return meaning
    if not any(head) and not any(tail):
        return "filled with zeros: its download was interrupted; download it again"
    return _format(path, head)


def _format(path: Path, head: bytes) -> Optional[str]:
    """Checkpoints and texts under a wrong name."""
    kind = None
    if head.startswith(b"PK\x03\x04"):
        kind = ".bin" if re.search(rb"(?:data\.pkl|\.data/|byteorder)", head) else None
        if kind is None:
            return "a zip archive; unpack it first"
    elif head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = ".bin"
    elif re.match(rb".{8}\s*\{\s*\"", head, re.DOTALL) and int.from_bytes(head[:8], "little") < 100_000_000:
        kind = ".safetensors"
    elif head[:1] == b"\x0a" and re.search(rb"\x12\x07Float|\x12\x08BFloat16|model\.", head[:400]):
        kind = ".ckpt"
    if kind and path.suffix != kind:
        return f"a {kind} file under another name; rename it to {path.with_suffix(kind).name}"
    if kind is None and re.match(rb"\s*[\[{]", head):
        try:
            json.loads(path.read_bytes() if path.stat().st_size < 1 << 20 else b"x")
        except (OSError, ValueError):
            return None
        return "a JSON text, perhaps the error of a service or an index; name the file that holds the weights"
    return None


def or_else(path: Path, otherwise: str) -> str:
    """The end of a message about a file that cannot be read: what it is, if known."""
    meaning = what_it_is(path)
    return f"it is {meaning}" if meaning else otherwise


def unwrapped(names: Iterable[str]) -> Dict[str, str]:
    """The names of a model's own tensors, by the names that wrappers have made of them: {} where there are no wrappers.

    Left out are the parts that torch.compile, FSDP and activation checkpointing put anywhere into a name, and what
    precedes all names alike (`module.`, `base_model.model.`, the attribute of a user's own class).
    """
    given = list(names)
    paths: List[List[str]] = [[part for part in name.split(".") if part not in _WRAPPERS] for name in given]
    common = _common(paths)
    first = next((count for count in range(common + 1)
                  if any(_ANCHOR.match(".".join(path[count:]) + ".") for path in paths)), 0)
    bare = [".".join(path[first:]) for path in paths]
    return dict(zip(given, bare)) if bare != given and all(bare) else {}


def _common(paths: List[List[str]]) -> int:
    """Parts that all paths begin with, the last part of each aside."""
    if not paths:
        return 0
    count = 0
    while all(len(path) > count + 1 and path[count] == paths[0][count] for path in paths):
        count += 1
    return count


def prefix_note(renamed: Dict[str, str]) -> str:
    """A line that says what was left out of the names."""
    name, bare = next((name, bare) for name, bare in renamed.items() if name != bare)
    return f"prefixes added by a wrapper are ignored: {name} is {bare}"
