"""Benchmark: preprocessing compared with the bare tokenizer, which is its limit.

    python benchmarks/preprocess.py --input_dataset_file data.jsonl --vocab_file_path tokenizer.model \
        [--repeat 40] [--max_length 1024] [--rounds 3] [--json FILE]

Repeats the file --repeat times in a temporary folder, then takes turns: the text of all conversations through one
thread of the tokenizer, and the whole command, a process of its own whose wall time counts from start to end, writing
included. Memory is the greatest sum of the proportional set sizes of all its processes, looked at ten times a
second. Several --repeat give the growth. Target: the command needs at most 1.3 times what the bare tokenizer does.
"""
import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "research" / "telechat" / "telechat_preprocess.py"
TARGET = 1.3
_ROW = ("{conversations:>8,} conversations {tokens:>11,} tokens | {seconds:6.2f} s wall {cpu_seconds:6.2f} s CPU "
        "{tokens_per_second:>10,} tokens/s {megabytes_per_second:6.2f} MB/s | tokenizer alone {raw_seconds:6.2f} s "
        "{raw_tokens_per_second:>10,} tokens/s | ratio {ratio:4.2f}, share {share:4.0%} | peak {peak_megabytes:,} MB")
# Runs in a process of its own, so that what it allocates does not burden the measured command.
_RAW = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from research.telechat.data.encoding import source_formats
from research.telechat.data.records import Document, parse_any
from research.telechat.data.sources import Source, read_chunks
from research.telechat.text.vocab import Vocab
vocab, sources = Vocab.load(sys.argv[3]), [Source(Path(sys.argv[2]))]
data_format, = source_formats(sources)
records = [parse_any(raw, data_format) for chunk in read_chunks(sources) for raw in chunk.records]
texts = [text for record in records for text in ([record.text] if isinstance(record, Document) else [
    message.content for message in record.messages])]
seconds = time.perf_counter()
tokens = 0
for text in texts:
    tokens += len(vocab.encode(text))
print(tokens, time.perf_counter() - seconds)
"""


def raw_seconds(data: Path, vocab: str) -> Tuple[int, float]:
    """(tokens, seconds) of one thread of the tokenizer for all texts, reading and JSON not counted."""
    done = subprocess.run([sys.executable, "-c", _RAW, str(ROOT), str(data), vocab], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"the tokenizer alone failed:\n{done.stderr[-2000:]}")
    tokens, seconds = done.stdout.split()
    return int(tokens), float(seconds)


def run_command(data: Path, vocab: str, out: Path, options: List[str]) -> Tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak bytes) of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    command = [sys.executable, str(SCRIPT), "--input_dataset_file", str(data), "--output_path", str(out),
               "--vocab_file_path", vocab, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0]
    watch = threading.Thread(target=_watch, args=(process, peak))
    watch.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    watch.join()
    if process.returncode:
        raise SystemExit(f"the command failed:\n{output[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak[0]


def _watch(process: "subprocess.Popen[str]", peak: List[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(_memory, _family(process.pid))))
        time.sleep(0.1)


def _family(pid: int) -> List[int]:
    """A process and all that descend from it."""
    members = [pid]
    for member in members:
        for task in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += map(int, task.read_text().split())
            except OSError:
                continue
    return members


def _memory(pid: int) -> int:
    """Proportional set size in bytes: memory that several processes share is divided among them."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def measure(data: Path, args: argparse.Namespace, folder: Path) -> Dict[str, Any]:
    """The medians of some rounds; a round is the tokenizer alone and the command."""
    options = ["--max_length", str(args.max_length)]
    options += ["--num_workers", str(args.num_workers)] if args.num_workers is not None else []
    raw, runs = [], []
    for number in range(args.rounds):
        tokens, seconds = raw_seconds(data, args.vocab_file_path)
        raw.append(seconds)
        out = folder / f"out{number}"
        runs.append(run_command(data, args.vocab_file_path, out, options))
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        size = sum(path.stat().st_size for path in out.iterdir())
        shutil.rmtree(out)
    seconds, cpu, _ = (statistics.median(column) for column in zip(*runs))
    raw_median = statistics.median(raw)
    return {
        "conversations": report["conversations"]["read"], "tokens": report["tokens"]["read"],
        "input_megabytes": round(data.stat().st_size / 1e6, 1), "output_megabytes": round(size / 1e6, 1),
        "padding_share": report["padding_share"], "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
        "tokens_per_second": round(report["tokens"]["read"] / seconds),
        "megabytes_per_second": round(data.stat().st_size / 1e6 / seconds, 2),
        "raw_seconds": round(raw_median, 2), "raw_tokens_per_second": round(tokens / raw_median),
        "ratio": round(seconds / raw_median, 2), "share": round(raw_median / seconds, 3),
        "peak_megabytes": round(max(peak for _, _, peak in runs) / 1e6),
        "all_seconds": [round(run[0], 2) for run in runs], "all_raw_seconds": [round(value, 2) for value in raw],
    }


def main(argv: Optional[List[str]] = None) -> int:
    """Run the benchmark; exit code 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_dataset_file", required=True)
    parser.add_argument("--vocab_file_path", required=True)
    parser.add_argument("--repeat", type=int, nargs="+", default=[40], help="copies of the file, one size each")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--num_workers", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work_dir", help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start, Python "
          f"{platform.python_version()}; medians of {args.rounds} rounds")
    content = Path(args.input_dataset_file).read_bytes()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.work_dir) as temporary:
        for repeat in args.repeat:
            data = Path(temporary) / "data.jsonl"
            with open(data, "wb") as file:
                for _ in range(repeat):
                    file.write(content)
            rows.append(measure(data, args, Path(temporary)))
            print(_ROW.format(**rows[-1]), flush=True)
    missed = [row for row in rows if row["ratio"] > TARGET]
    print(f"target: at most {TARGET} times the tokenizer alone: {'missed' if missed else 'met'}")
    if args.json:
        args.json.write_text(json.dumps({"load": load, "cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
