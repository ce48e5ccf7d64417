"""What a conversion is given and what it reports: input, result, options; the last lines for the user.

The conversion itself is checkpoint/convert.py.
"""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.checkpoint.dtypes import NAMES
from research.telechat.checkpoint.manifest import Manifest
from research.telechat.checkpoint.reader import Checkpoint
from research.telechat.checkpoint.stream import Transfer
from research.telechat.checkpoint.writer import Layout
from research.telechat.spec.parameters import LLAMA, MINDSPORE, Match, Param, source_groups
from research.telechat.spec.variants import Variant


class Source(NamedTuple):
    """The input: an open checkpoint, what is in it, and its layout (spec/parameters.py)."""

    checkpoint: Checkpoint
    variant: Variant
    match: Match
    layout: str
    source_mp: Optional[int] = None      # tensor-parallel degree of an earlier converter, MindSpore checkpoints only

    def tensors(self, param: Param) -> Tuple[str, ...]:
        """The tensors that hold a parameter, as the checkpoint names them."""
        return param.names(LLAMA) if self.layout == LLAMA else (self.match.found[param.ms_name],)

    def groups(self, param: Param) -> int:
        """Groups of rows of a parameter."""
        if self.layout == MINDSPORE:
            return source_groups(param, self.variant, self.source_mp)
        return param.groups_in(self.layout)


class Target(NamedTuple):
    """The result: its files, texts and copies that are written with them at the end, and the manifest, but for its
    files."""

    layouts: List[Layout]
    texts: Dict[Path, str]
    journal: Path
    layout: str
    folder_is_model: bool = False        # the folder is loaded as a whole, so that no other weights may lie in it
    manifest: Manifest = Manifest("mindspore")
    manifest_path: Optional[Path] = None # None: no manifest is written
    copies: Optional[Dict[Path, Path]] = None            # where to -> where from

    @property
    def beside(self) -> List[Path]:
        """The files that come with the weights."""
        return [*self.texts, *(self.copies or {})]


@dataclass
class Report:
    """What a conversion did; numbers of tensors, bytes and seconds."""

    tensors: int = 0
    parameters: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    resumed_tensors: int = 0
    verified_tensors: Optional[int] = None
    found: Dict[str, Dict[str, int]] = field(default_factory=dict)   # tensor of the input -> nan, inf, overflow, ...
    notes: List[str] = field(default_factory=list)


class Options(NamedTuple):
    """How to convert."""

    dtype: Optional[str] = None          # "float16", "bfloat16", "float32"; None: as it is
    verify: bool = False
    strict: bool = False                 # read the input once beforehand; NaN or infinity stops the conversion
    workers: Optional[int] = None        # threads
    overwrite: bool = False              # replace files that are not known to be ours


def nonfinite(found: Dict[str, Dict[str, int]]) -> str:
    """How many NaN and infinite values there are, and where, by name (threads find them in any order); or ""."""
    total = {kind: sum(counts[kind] for counts in found.values()) for kind in ("nan", "inf")}
    where = [f"{name} ({counts['nan']} NaN, {counts['inf']} infinite)"
             for name, counts in sorted(found.items()) if counts["nan"] or counts["inf"]]
    return (f"{total['nan']} NaN and {total['inf']} infinite values in {len(where)} tensors of the input: "
            f"{', '.join(where)}") if where else ""


def summary(report: Report, target: Target, dtypes: Sequence[str]) -> List[str]:
    """The last lines for the user."""
    lines = [*report.notes]
    if nonfinite(report.found):
        lines.append(f"WARNING: {nonfinite(report.found)}")
    overflowed = {name: counts["overflow"] for name, counts in sorted(report.found.items()) if counts["overflow"]}
    if overflowed:
        lines.append(f"WARNING: {sum(overflowed.values())} values were too large for {dtypes[0]} and became infinite, "
                     f"in {', '.join(overflowed)}")
    for name, counts in sorted(report.found.items()):
        if counts["rounded"]:
            lines.append(f"{name}: {counts['rounded']} values were rounded when folding in the factor that Llama lacks")
    if report.verified_tensors is not None:
        lines.append(f"verified: {report.verified_tensors} of {report.tensors} tensors read back and compared, all "
                     "equal")
    size, rate = report.bytes_written / 1e9, report.bytes_written / 1e9 / max(report.seconds, 1e-9)
    place = target.layouts[0].path if len(target.layouts) == 1 else target.journal.parent
    lines.append(f"done: {report.parameters:,} parameters in {report.tensors} tensors ({', '.join(dtypes)}), "
                 f"{len(target.layouts)} file(s), {size:.2f} GB in {report.seconds:.1f} s ({rate:.2f} GB/s): {place}")
    return lines


def dtype_names(transfers: Dict[str, Transfer]) -> List[str]:
    """The dtypes of the result, as users write them."""
    return sorted({NAMES[transfer.out.dtype] for transfer in transfers.values()})
