"""Streams of a running server, half of which their clients leave: whether answers get lost, blocks leak, memory grows.

    python scripts/serve.py --demo --max_queue 1000 &
    python benchmarks/serve_streams.py --port 8000 --seconds 300

Asks this machine only, at most 1,000 streams at once for at most an hour. Prints a line for each round; exit code 1 at
the first fault.
"""
import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from typing import Dict, List, NamedTuple, Optional

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


def main() -> int:
    """Rounds of streams until the time is over."""
    parser = argparse.ArgumentParser(description="Streams of a running server, half of which are left.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=200, help="at once")
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    args = parser.parse_args()
    until = time.monotonic() + min(args.seconds, 3600)
    number = lost = 0
    while time.monotonic() < until:
        begun = time.monotonic()
        ended = asyncio.run(streams(args.port, min(args.streams, 1000), number))
        read = [one for one in ended if one.text is not None]
        lost += sum(not one.whole for one in read)
        used = settled(args.port)["telechat_kv_blocks_used"]
        memory = ""
        if args.pid:
            import psutil
            memory = f", {psutil.Process(args.pid).memory_info().rss >> 20} MB"
        number += 1
        print(f"round {number}: {len(read)} read, {len(ended) - len(read)} left, {lost} lost, {used:g} blocks in use, "
              f"{time.monotonic() - begun:.1f} s{memory}", flush=True)
        if lost or used:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
