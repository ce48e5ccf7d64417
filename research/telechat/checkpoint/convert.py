"""Conversion of checkpoints: checks, plan, run, resume, verification, report. Between all layouts, one code.

The commands convert_weight_torch_to_ms.py and convert_weight_ms_to_torch.py are thin fronts of `convert`. Names and row
orders come from spec/parameters.py, files from checkpoint/reader.py, the moving of bytes from checkpoint/stream.py.
"""
import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
from tqdm import tqdm

from research.telechat.checkpoint.conversion import Options, Report, Source, Target, nonfinite
from research.telechat.checkpoint.convert_check import check_model, check_source_mp, check_tied_head, check_zeros
from research.telechat.checkpoint.dtypes import CODES, ITEM_SIZE, cast
from research.telechat.checkpoint.folder import open_files
from research.telechat.checkpoint.integrity import file_entry, is_ours
from research.telechat.checkpoint.manifest import FileEntry, is_manifest, with_files, write_manifest
from research.telechat.checkpoint.masters import with_masters
from research.telechat.checkpoint.reader import Checkpoint
from research.telechat.checkpoint.stream import Stream, Transfer
from research.telechat.checkpoint.writer import (
    Journal,
    OutputFile,
    OutTensor,
    check_free_space,
    partial_path,
    publish,
    remove,
)
from research.telechat.common.errors import CheckpointError
from research.telechat.common.files import refuse_foreign, write_text
from research.telechat.spec.parameters import (
    LLAMA,
    MINDSPORE,
    OFFICIAL,
    hf_buffers,
    llama_zero_biases,
    parameters,
    row_order,
    source_groups,
)
from research.telechat.spec.variants import Variant

_HASHES = 2                      # files whose hashes are still being computed while another is written
JOURNAL_BYTES = 1 << 30          # bytes written between two entries of the journal: what an interruption can cost


def open_source(checkpoint: Checkpoint, variant: Variant, layout: str, source_mp: Optional[int] = None) -> Source:
    """Check that a checkpoint holds exactly the parameters of `variant`, in their shapes. Those with a remainder count
    as float32."""
    for param in parameters(variant):
        source_groups(param, variant, source_mp)
    if layout == MINDSPORE:
        checkpoint = with_masters(checkpoint)
    return Source(checkpoint, variant, check_model(checkpoint, variant, layout), layout, source_mp)


def plan_tensors(source: Source, dtype: Optional[str], layout: str) -> Dict[str, Transfer]:
    """The transfers that make the result, a checkpoint of `layout`, by the name of the tensor in the result."""
    transfers: Dict[str, Transfer] = {}
    for param in parameters(source.variant):
        sources, names = source.tensors(param), param.names(layout)
        code = source.checkpoint.tensors[sources[0]].dtype
        order = row_order(param, source.groups(param), param.groups_in(layout))
        if order is None and len(names) > 1:
            order = np.arange(param.shape[0])
        for name, part in zip(names, [None] if order is None else np.split(order, len(names))):
            out = OutTensor(name, CODES[dtype] if dtype else code, param.tensor_shape(layout))
            transfers[name] = Transfer(
                out, sources, code, part, source.layout == OFFICIAL and param.transposed,
                layout == OFFICIAL and param.transposed,
                scale=param.llama_scale ** ((layout == LLAMA) - (source.layout == LLAMA)), whole=len(names) == 1)
    code = next(iter(transfers.values())).out.dtype
    if layout == OFFICIAL:
        raw = {"F32": np.float32}.get(code, np.float16)
        for name, value in hf_buffers(source.variant).items():
            data = np.array(value, np.float32).reshape(1).view(np.uint32)
            data = data if raw is np.float32 else cast(data, "F32", code)
            transfers[name] = Transfer(OutTensor(name, code, ()), constant=data.tobytes())
    elif layout == LLAMA:
        for name, length in llama_zero_biases(source.variant).items():
            transfers[name] = Transfer(OutTensor(name, code, (length,)), constant=bytes(length * ITEM_SIZE[code]))
    return transfers


def convert(source: Source, target: Target, transfers: Dict[str, Transfer], options: Options,
            say: Callable[[str], None] = print) -> Report:
    """Run the conversion. Raises CheckpointError (nothing that looks finished is left then) or OSError."""
    report = Report(tensors=len(transfers), parameters=sum(map(_elements, transfers.values())))
    started = time.monotonic()
    _check_paths(source, target)
    journal = Journal(target.journal, _digest(source, target, options), target.layouts)
    _check_overwrite(target, journal, options.overwrite)
    report.resumed_tensors = sum(journal.done.values())
    kept = sum(tensor.nbytes for layout in target.layouts for tensor in layout.tensors[:journal.done[layout.path.name]])
    check_free_space(target.journal.parent, sum(layout.size for layout in target.layouts), kept)
    with Stream(options.workers) as stream:
        if source.match.tied_head:
            check_tied_head(source.checkpoint, source.match)
        check_zeros(source.checkpoint, source.match)
        if source.layout == MINDSPORE:
            check_source_mp(source.checkpoint, source.variant, source.match, source.source_mp)
        if options.strict:
            _scan(stream, source)
        if report.resumed_tensors:
            say(f"continuing an interrupted conversion: {report.resumed_tensors} of {report.tensors} tensors, "
                f"{kept / 1e9:.2f} GB, are already written")
        target.journal.parent.mkdir(parents=True, exist_ok=True)
        try:
            entries = _write(stream, source, target, transfers, journal, report)
            if options.verify:
                report.verified_tensors = _verify(stream, source, target, transfers)
        except CheckpointError:                       # faulty input or disk: continuing later would not fix it
            for layout in target.layouts:
                remove(partial_path(layout.path))
            journal.remove()
            raise
    journal.publish()
    publish(target.layouts)
    for path, text in target.texts.items():
        write_text(path, text)
        entries[path.name] = file_entry(path)
    for path, origin in (target.copies or {}).items():
        shutil.copyfile(origin, partial_path(path))
        os.replace(partial_path(path), path)
        entries[path.name] = file_entry(path)
    if target.manifest_path is not None:
        write_manifest(target.manifest_path, with_files(target.manifest, entries))
    journal.remove()
    report.bytes_written = sum(layout.size for layout in target.layouts)
    report.seconds = time.monotonic() - started
    return report


def _elements(transfer: Transfer) -> int:
    return transfer.out.nbytes // ITEM_SIZE[transfer.out.dtype] if transfer.sources else 0


def _check_paths(source: Source, target: Target) -> None:
    """The result must not overwrite its input, nor mix with shards of another checkpoint."""
    inputs = {path.resolve() for path in source.checkpoint.files}
    outputs = {layout.path.resolve() for layout in target.layouts}
    if inputs & outputs:
        raise CheckpointError(f"{sorted(inputs & outputs)[0]} would be overwritten while it is read; "
                              "write the result elsewhere")
    folder = target.journal.parent
    if target.folder_is_model and folder.is_dir():
        ours = outputs | {path.resolve() for path in target.beside}
        strangers = sorted(path.name for path in folder.iterdir() if path.resolve() not in ours
                           and (path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")))
        if strangers:
            raise CheckpointError(f"{folder} already contains other weights, which would be loaded with the new ones "
                                  f"or instead: {', '.join(strangers)}; remove them or use another folder")


def _check_overwrite(target: Target, journal: Journal, overwrite: bool) -> None:
    """OverwriteError where a file is in the way that no conversion wrote."""
    paths = [*(layout.path for layout in target.layouts), *target.beside]
    if not journal.publishing:
        refuse_foreign(paths, is_ours, overwrite)
    if target.manifest_path is not None:
        refuse_foreign([target.manifest_path], is_manifest, overwrite)


def _digest(source: Source, target: Target, options: Options) -> str:
    """What makes two runs the same conversion."""
    inputs = []
    for path in source.checkpoint.files:
        stat = path.stat()
        inputs.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    outputs = [[layout.path.name, layout.size, [tensor._asdict() for tensor in layout.tensors]]
               for layout in target.layouts]
    plan = [2, inputs, outputs, source.layout, target.layout, source.source_mp, options.dtype, repr(source.variant)]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.3)


def _scan(stream: Stream, source: Source) -> None:
    """CheckpointError if anything that will be converted has NaN or infinity."""
    names = [name for param in parameters(source.variant) for name in source.tensors(param)]
    with _bar(sum(source.checkpoint.tensors[name].nbytes for name in names), "check") as bar:
        found = stream.scan(source.checkpoint, names, bar.update)
    if found:
        raise CheckpointError(f"{nonfinite(found)}; stopped because of --strict; nothing was written")


def _write(stream: Stream, source: Source, target: Target, transfers: Dict[str, Transfer], journal: Journal,
           report: Report) -> Dict[str, FileEntry]:
    """Write every file that is not complete yet, and count what is odd in the numbers that pass by; size and SHA-256 of
    every file, by its name."""
    lock = threading.Lock()
    entries: Dict[str, FileEntry] = {}
    hashing: List[OutputFile] = []                     # finished, but for their hashes

    def tally(transfer: Transfer, counts: Dict[str, int]) -> None:
        with lock:
            entry = report.found.setdefault(transfer.label, dict.fromkeys(("nan", "inf", "overflow", "rounded"), 0))
            for kind, count in counts.items():
                entry[kind] += count

    with _bar(sum(transfer.source_bytes for transfer in transfers.values()), "convert") as bar:
        for layout in target.layouts:
            done = journal.done[layout.path.name]
            ordered = [transfers[tensor.name] for tensor in layout.tensors]
            bar.update(sum(transfer.source_bytes for transfer in ordered[:done]))
            report.found.update((transfer.label, journal.found[transfer.label]) for transfer in ordered[:done]
                                if transfer.label in journal.found)
            if done == len(ordered):
                entries[layout.path.name] = file_entry(partial_path(layout.path))
                continue
            output = OutputFile(layout, done)
            tracker = _Tracker(output, journal, ordered, done, report.found)
            try:
                stream.move(source.checkpoint, ordered[done:], output.write, bar.update, tracker.finished, tally)
                output.finish()
                journal.record(layout.path.name, len(ordered), report.found)
            except BaseException:
                stream.stop()
                with contextlib.suppress(OSError):     # a full disk: what could not be saved is written again
                    tracker.save()
                for unfinished in (*hashing, output):
                    unfinished.close()
                raise
            hashing.append(output)
            while len(hashing) > _HASHES:              # no further behind the writing
                oldest = hashing.pop(0)
                entries[oldest.layout.path.name] = oldest.entry()
    for output in hashing:
        entries[output.layout.path.name] = output.entry()
    return entries


class _Tracker:
    """Records in the journal from time to time how many tensors of a file are complete and on disk."""

    def __init__(self, output: OutputFile, journal: Journal, ordered: Sequence[Transfer], done: int,
                 found: Dict[str, Dict[str, int]]) -> None:
        self._output, self._journal, self._ordered, self._found = output, journal, ordered, found
        self._offset = self._prefix = done
        self._complete: set = set()
        self._unsaved = 0
        self._lock = threading.Lock()

    def finished(self, number: int) -> None:
        """Tensor `number` of this run is written."""
        with self._lock:
            self._complete.add(number + self._offset)
            while self._prefix in self._complete:
                self._unsaved += self._ordered[self._prefix].out.nbytes
                self._prefix += 1
            due = self._unsaved >= JOURNAL_BYTES
            if due:
                self._unsaved = 0
        if due:
            self.save()                # by the thread that completed it; the others continue meanwhile

    def save(self) -> None:
        """Sync the complete tensors to disk and record that. A .bin file counts only as a whole."""
        with self._lock:
            prefix = self._prefix
        if self._output.layout.kind != "bin" and prefix:
            self._output.sync()
            self._journal.record(self._output.layout.path.name, prefix, dict(self._found))


def _verify(stream: Stream, source: Source, target: Target, transfers: Dict[str, Transfer]) -> int:
    """Read the result from disk and compare every tensor with what the input gives; the number of tensors compared."""
    wrong: Dict[str, int] = {}
    lock = threading.Lock()
    with _bar(sum(transfer.source_bytes for transfer in transfers.values()), "verify") as bar:
        for layout in target.layouts:
            partial = partial_path(layout.path)
            _drop_cache(partial)
            result = open_files([partial], layout.kind)

            def compare(name: str, start: int, view: memoryview, result: Checkpoint = result) -> None:
                found = np.empty(view.nbytes, np.uint8)
                result.read_into(name, start, memoryview(found))
                if not np.array_equal(found, np.frombuffer(view, np.uint8)):
                    with lock:
                        wrong[name] = wrong.get(name, 0) + 1

            try:
                if {name: info[:2] for name, info in result.tensors.items()} != {
                        tensor.name: (tensor.dtype, tensor.shape) for tensor in layout.tensors}:
                    raise CheckpointError(f"{partial}: names, types or shapes read back differ from those written; the "
                                          "disk is faulty: write the result elsewhere")
                stream.move(source.checkpoint, [transfers[tensor.name] for tensor in layout.tensors], compare,
                            bar.update)
            finally:
                result.close()
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors read back from {target.journal.parent} differ from what was "
                              f"written: {', '.join(wrong)}; the disk is faulty, or the input changed; the result was "
                              "deleted")
    return len(transfers)


def _drop_cache(path: Path) -> None:
    """Let the next read come from the disk, not from memory, where the system can do that."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
