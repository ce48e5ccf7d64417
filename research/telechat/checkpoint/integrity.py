"""Whether a checkpoint's files are the ones that were written: by its manifests, and by MindSpore's own CRC.

`--verify` reads everything; training and prediction do so once per machine (common/verified.py). A checkpoint without
manifest and CRC cannot be verified.
"""
from pathlib import Path
from typing import Iterable, List, Optional

from research.telechat.checkpoint.manifest import (
    FOLDER_NAME,
    SUFFIX,
    FileEntry,
    Manifest,
    announced,
    find_manifest,
    load_manifest,
)
from research.telechat.checkpoint.reader import crc_trailer
from research.telechat.common.errors import CheckpointError
from research.telechat.common.hashing import file_sha256
from research.telechat.common.verified import Check, faults

VERIFY_HELP = "first verify the input's files against the hashes in their manifests, if they have any"
OVERWRITE_HELP = "replace existing files that this command did not write"
_DAMAGED = "damaged or changed since: copy or create it again"


def checks_of(files: Iterable[Path]) -> List[Check]:
    """What is known of `files`, one check each: its SHA-256, else its own CRC; none for files without either.

    Raises CheckpointError: a manifest cannot be used.
    """
    result = []
    manifest: Optional[Manifest] = None
    for file in files:
        if manifest is None or manifest.entry(file) is None:
            manifest = find_manifest(file)
        entry = manifest.entry(file) if manifest else None
        crc = crc_trailer(file) if entry is None and file.suffix == ".ckpt" else None
        if entry is not None:
            result.append(Check(file, *entry))
        elif crc is not None:
            result.append(Check(file, file.stat().st_size, str(crc), "crc32"))
    return result


def check_files(files: Iterable[Path], remember: bool, all_of_it: bool = True) -> int:
    """Verify `files` against what is known of them; returns how many were verified.

    remember: a result of this machine counts. all_of_it: False: only files whose sole hash is MindSpore's CRC, which
    was asked for when they were saved. Raises CheckpointError: names the files that are not as written.
    """
    checks = [check for check in checks_of(files) if all_of_it or check.kind == "crc32"]
    wrong = faults(checks, remember)
    if wrong:
        more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
        raise CheckpointError(f"{wrong[0]}{more}; {_DAMAGED}")
    return len(checks)


def file_entry(path: Path) -> FileEntry:
    """The entry of a file that is complete, read as a whole."""
    return FileEntry(path.stat().st_size, file_sha256(path))


def is_ours(path: Path) -> bool:
    """Whether a file is one that these commands wrote, unchanged, by the manifests in its folder; those of runs that
    were interrupted while they put their files into place count too."""
    folder = path.parent
    for one in (folder / FOLDER_NAME, announced(folder / FOLDER_NAME), *folder.glob(f"*{SUFFIX}"),
                *folder.glob(announced(Path(f"*{SUFFIX}")).name)):
        try:
            entry = load_manifest(one).entry(path) if one.is_file() else None
        except CheckpointError:
            continue
        if entry is not None and not faults([Check(path, *entry)], remember=True, shown=False):
            return True
    return False
