"""Streams of a running server, half of which their clients leave: whether answers get lost, blocks leak, memory grows.

    python scripts/serve.py --demo --max_queue 1000 &
    python benchmarks/serve_streams.py --port 8000 --seconds 300
    python benchmarks/serve_streams.py --start --tokenizer tokenizer.model         serves random weights itself

Asks this machine only, at most 1,000 streams at once for at most an hour. Prints a line for each round; exit code 1 at
the first failure.
"""
import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]

QUESTIONS = ("你好", "the quick", "今天天气" * 3)
LONGEST = 16                             # tokens of an answer


class Ended(NamedTuple):
    """How one stream ended: what was read of it, None where the client left."""

    text: Optional[str]

    @property
    def whole(self) -> bool:
        """Whether it came to its end as it should."""
        return self.text is not None and self.text.startswith("HTTP/1.1 200") and "data: [DONE]" in self.text and (
            '"finish_reason":"length"' in self.text)


async def stream(port: int, rng: random.Random) -> Ended:
    """One stream, read to its end or left somewhere on the way."""
    body = json.dumps({"messages": [{"role": "user", "content": rng.choice(QUESTIONS)}], "stream": True,
                       "max_tokens": rng.randint(1, LONGEST), "seed": rng.randrange(99), "temperature": 1,
                       "ignore_eos": True}).encode()
    leave = rng.random() < 0.5
    reader, writer = await asyncio.open_connection("localhost", port)
    try:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: "
                     + str(len(body)).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        if leave:
            await reader.read(rng.choice([1, 200, 800]))
            writer.transport.abort()
            return Ended(None)
        return Ended((await reader.read()).decode())
    finally:
        writer.close()


async def streams(port: int, count: int, seed: int) -> List[Ended]:
    """So many at once."""
    return list(await asyncio.gather(*(stream(port, random.Random(seed * 100_000 + number))
                                       for number in range(count))))


def figures(port: int) -> Dict[str, float]:
    """{name with labels: value} of /metrics."""
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in
            (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def settled(port: int, seconds: float = 30) -> Dict[str, float]:
    """The figures once nothing is under way. TimeoutError."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = figures(port)
        if not found["telechat_running"] and not found["telechat_waiting"]:
            return found
        time.sleep(0.05)
    raise TimeoutError(f"answers are under way {seconds:g} s after the last client has gone: {found}")


@contextlib.contextmanager
def started_server(tokenizer: str, queue: int, seconds: float = 300) -> Iterator[Tuple[int, int]]:
    """(port, process) of a server of the tiny recipe with random weights, as users start it. SystemExit."""
    sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]
    from beside_llama import make_checkpoints

    from research.telechat.recipe.read import read_recipe
    from research.telechat.spec.variants import get_variant
    from research.telechat.text.vocab import Vocab
    recipe = ROOT / "research" / "telechat" / "predict_telechat_tiny_cpu.yaml"
    sizes = read_recipe(recipe)["model"]["model_config"]
    rows = max(sizes["vocab_size"], Vocab.load(tokenizer).size)
    variant = replace(get_variant(sizes["net_name"]), vocab_size=rows, **{key: sizes[key] for key in (
        "num_layers", "hidden_size", "intermediate_size", "num_heads")})
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        make_checkpoints(variant, Path(folder), ("mindspore",))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        log = Path(folder) / "server.txt"
        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / "serve.py"), "--config", str(recipe), "--load_checkpoint",
                 str(Path(folder) / "mindspore"), "--tokenizer", tokenizer, "--port", str(port), "--max_queue",
                 str(queue), "--output_dir", folder, "--model.model_config.vocab_size", str(rows)], cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            until = time.monotonic() + seconds
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"error: no server: {log.read_text(encoding='utf-8')[-1000:]}")
                time.sleep(0.2)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(timeout=60)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/ready", timeout=60):
            return True
    except OSError:                          # an answer other than 200, too
        return False


def rounds(port: int, pid: Optional[int], seconds: float, at_once: int) -> Tuple[List[Dict[str, Any]], bool]:
    """A row for each round until the time is over, or a round has a fault; whether none has."""
    until = time.monotonic() + min(seconds, 3600)
    rows: List[Dict[str, Any]] = []
    while time.monotonic() < until:
        begun = time.monotonic()
        ended = asyncio.run(streams(port, min(at_once, 1000), len(rows)))
        read = [one for one in ended if one.text is not None]
        row: Dict[str, Any] = {"read": len(read), "left": len(ended) - len(read),
                               "lost": sum(not one.whole for one in read),
                               "blocks": settled(port)["telechat_kv_blocks_used"]}
        row["seconds"] = time.monotonic() - begun
        if pid:
            import psutil
            row["megabytes"] = psutil.Process(pid).memory_info().rss >> 20
        rows.append(row)
        memory = f", {row['megabytes']} MB" if pid else ""
        print(f"round {len(rows)}: {row['read']} read, {row['left']} left, {row['lost']} lost, {row['blocks']:g} "
              f"blocks in use, {row['seconds']:.1f} s{memory}", flush=True)
        if row["lost"] or row["blocks"]:
            return rows, False
    return rows, True


def main() -> int:
    """Rounds of streams until the time is over."""
    parser = argparse.ArgumentParser(description="Streams of a running server, half of which are left.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=200, help="at once")
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    parser.add_argument("--start", action="store_true", help="start a server of random weights, and end it")
    parser.add_argument("--tokenizer", help="with --start: tokenizer.model or tokenizer.json")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    if args.start and not args.tokenizer:
        parser.error("--start needs --tokenizer")
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        port, pid = stack.enter_context(started_server(args.tokenizer, max(args.streams, 1000))) if args.start else (
            args.port, args.pid)
        rows, good = rounds(port, pid, args.seconds, args.streams)
    if args.json:
        args.json.write_text(json.dumps({"load": load, "streams": args.streams, "rows": rows}, indent=1) + "\n",
                             encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
