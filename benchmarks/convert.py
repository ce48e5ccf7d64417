"""Benchmark: time and peak memory of checkpoint conversion, compared with a copy of the same bytes on the same disk.

    python benchmarks/convert.py --work_dir DIR [--gigabytes 4.8] [--cold] [--json FILE]

Makes a random checkpoint of the given size in DIR, converts it by the commands that users run, and deletes everything
again. DIR needs room for it twice, with --outputs back three times. Copies and conversions take turns, each in its own
process, whose peak resident memory is VmHWM. The input is in the page cache for all, unless --cold drops it each time,
and what was written before has been brought to disk.

The command waits until its result is on disk before it names it, so that it is compared with cp followed by sync of the
files; cp alone leaves that to the system. No conversion into one file can be faster than SHA-256 by one thread, which
is measured as well. Targets: at most 1.5 times cp and sync, of .bin 2; at most 1.5 GB of memory more than the largest
tensor.
"""
import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from research.telechat.checkpoint.writer import (
    OutputFile,
    OutTensor,
    bin_layout,
    cut_shards,
    index_text,
    publish,
    safetensors_layout,
)
from research.telechat.spec.hf_config import hf_config
from research.telechat.spec.parameters import hf_buffers, parameters
from research.telechat.spec.variants import Variant, get_variant

_ROW = ("{model:13} {input:>11} -> {output:11} {gigabytes:5.2f} GB {seconds:6.1f} s | copy {copy_seconds:5.1f} s, "
        "to disk {copy_to_disk_seconds:5.1f} s, SHA-256 {hash_seconds:4.1f} s | ratio {ratio:4.2f} | peak "
        "{peak_gigabytes:.2f} GB, largest tensor {largest_tensor_gigabytes:.2f} GB")
TIME_TARGETS, MEMORY_TARGET = {"safetensors": 1.5, "bin": 2.0}, 1.5e9
_COMMANDS = ROOT / "research" / "telechat"
# Runs a command in this process and prints its own high-water mark of resident memory, in bytes, as the last line.
_MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = ""
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as err:
    code = err.code or 0
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
sys.exit(code)
"""

# Before that: no SHA-256 is computed, so that the difference is what the hashes of the manifest cost.
_WITHOUT_HASHES = """
import sys
sys.path[0] = ""
from research.telechat.checkpoint import writer


class Nothing:
    def __init__(self, path, size):
        self.size = size

    def written(self, start, length):
        pass

    def result(self):
        return ""

    stop = result


writer.FollowingHash = Nothing
"""


def make_checkpoint(folder: Path, variant: Variant, kind: str, shard: int) -> Tuple[int, int]:
    """Write a random official checkpoint (bfloat16); (bytes, bytes of the largest tensor)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 22).astype(np.float32) * 0.05).view(np.uint32)
    noise = (noise >> 16).astype(np.uint16).view(np.uint8)
    tensors = [OutTensor(param.hf_name, "BF16", param.hf_shape) for param in parameters(variant)]
    tensors += [OutTensor(name, "BF16", ()) for name in hf_buffers(variant)]
    parts = cut_shards(tensors, shard)
    stem, suffix = ("pytorch_model", ".bin") if kind == "bin" else ("model", ".safetensors")
    layouts = []
    for number, part in enumerate(parts, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(parts):05d}{suffix}"
        layouts.append(bin_layout(path, part) if kind == "bin" else safetensors_layout(path, part, {"format": "pt"}))
        output = OutputFile(layouts[-1], 0)
        for tensor in part:
            for start in range(0, tensor.nbytes, noise.nbytes):
                output.write(tensor.name, start, memoryview(noise)[:min(noise.nbytes, tensor.nbytes - start)])
        output.finish()
    publish(layouts)
    (folder / f"{stem}{suffix}.index.json").write_text(index_text(layouts))
    (folder / "config.json").write_text(json.dumps(hf_config(variant)))
    return sum(layout.size for layout in layouts), max(tensor.nbytes for tensor in tensors)


def with_layers(name: str, size: float, small: bool = False) -> Variant:
    """The variant, with as many layers as make `size` bytes in 16 bits; all other sizes, and so the tensors, real.

    small: with tiny tensors, which is for trying the benchmark.
    """
    variant = get_variant(name)
    if small:
        variant = replace(variant, hidden_size=256, intermediate_size=512, num_heads=8, vocab_size=4096,
                          n_kv_heads=variant.n_kv_heads and 4)
    one, two = (sum(int(np.prod(param.shape)) for param in parameters(replace(variant, num_layers=n))) for n in (1, 2))
    layers = max(1, -(-int(size / 2 - (2 * one - two)) // (two - one)))
    return replace(variant, num_layers=layers)


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(command: Sequence[str], source: Path, cold: bool) -> Tuple[float, Optional[int]]:
    """(seconds, peak resident bytes) of a command; copies print no peak."""
    if cold:
        drop_from_cache(source)
    else:
        for path in source.iterdir():
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
    os.sync()
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = done.stdout.split()
    return seconds, int(lines[-1]) if lines and command[0] == sys.executable else None


def hash_seconds(size: int) -> float:
    """Seconds of one thread for the SHA-256 of `size` bytes that are in the cache of the processor."""
    block, times = bytes(1 << 20), []
    for _ in range(5):
        started = time.perf_counter()
        digest = hashlib.sha256()
        for _ in range(64):
            digest.update(block)
        times.append(time.perf_counter() - started)
    return min(times) / (64 << 20) * size


OUTPUTS = {"safetensors": ["--format", "safetensors"], "ckpt": ["--format", "ckpt"],
           "float32": ["--format", "safetensors", "--dtype", "float32"],
           "verified": ["--format", "safetensors", "--verify"], "no hashes": ["--format", "safetensors"],
           "back": ["--format", "safetensors"], "back, .bin": ["--format", "bin"]}    # from MindSpore to official


def run_case(work: Path, name: str, kind: str, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Make one checkpoint; copy and convert it, by turns; what was measured, a row for each kind of output."""
    source, out = work / "source", work / "out"
    total, largest = make_checkpoint(source, with_layers(name, args.gigabytes * 1e9, args.small), kind,
                                     10**9 if kind == "bin" else 2 * 10**9)
    commands = {"copy": ["cp", "-r", str(source), str(out)],
                "copy to disk": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(out)]}
    converted = work / "converted"
    for output in args.outputs:
        back = output.startswith("back")
        script, given, made = (("ms_to_torch", "--mindspore_path", "--torch_path") if back else
                               ("torch_to_ms", "--torch_path", "--mindspore_path"))
        code = _WITHOUT_HASHES + _MEASURED if output == "no hashes" else _MEASURED
        commands[output] = [sys.executable, "-c", code, str(_COMMANDS / f"convert_weight_{script}.py"), given,
                            str(converted if back else source), made, str(out), "--model_name", name, *OUTPUTS[output]]
        if back and not converted.exists():
            subprocess.run([sys.executable, str(_COMMANDS / "convert_weight_torch_to_ms.py"), "--torch_path",
                            str(source), "--mindspore_path", str(converted)], check=True, capture_output=True)
    times: Dict[str, List[float]] = {step: [] for step in commands}
    peaks: Dict[str, int] = {}
    for _ in range(args.repeat):
        for step, command in commands.items():
            seconds, peak = measure(command, converted if step.startswith("back") else source, args.cold)
            shutil.rmtree(out)
            times[step].append(seconds)
            peaks[step] = max(peaks.get(step, 0), peak or 0)
    shutil.rmtree(source)
    hashing = hash_seconds(total)
    median = {step: float(np.median(values)) for step, values in times.items()}
    return [{"model": name, "input": kind, "output": output, "gigabytes": total / 1e9, "seconds": median[output],
             "copy_seconds": median["copy"], "copy_to_disk_seconds": median["copy to disk"],
             "ratio": median[output] / median["copy to disk"], "hash_seconds": hashing,
             "peak_gigabytes": peaks[output] / 1e9,
             "largest_tensor_gigabytes": largest / 1e9, "all_seconds": times,
             "ok": (median[output] <= TIME_TARGETS[kind] * median["copy to disk"]
                    and peaks[output] <= MEMORY_TARGET + largest)}
            for output in args.outputs]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the benchmark; 0 where every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="where the checkpoint is made")
    parser.add_argument("--gigabytes", type=float, default=4.8)
    parser.add_argument("--small", action="store_true", help="tiny tensors, to try the benchmark itself")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each step; the median counts (default: 3)")
    parser.add_argument("--cold", action="store_true", help="drop the input from the page cache before each step")
    parser.add_argument("--cases", nargs="+", default=["telechat_12b:safetensors", "telechat_12b:bin",
                                                       "telechat_52b:safetensors"], metavar="MODEL:INPUT")
    parser.add_argument("--outputs", nargs="+", default=["safetensors", "ckpt"], choices=list(OUTPUTS))
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    results: List[Dict[str, Any]] = []
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"{'cold' if args.cold else 'warm'} input, median of {args.repeat}")
    for case in args.cases:
        name, _, kind = case.partition(":")
        with tempfile.TemporaryDirectory(dir=args.work_dir, prefix="convert-benchmark-") as folder:
            rows = run_case(Path(folder), name, kind, args)
        for row in rows:
            print(_ROW.format(**row), "" if row["ok"] else "MISSED", flush=True)
        results.extend(rows)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(row["ok"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
