"""Machines in one: network namespaces that reach each other by a pair of virtual cables. Needs root and iproute2."""
import contextlib
import os
import shutil
import subprocess
from typing import Iterator, List, Optional


def ip(*arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """`ip ARGUMENTS`."""
    return subprocess.run(["ip", *arguments], text=True, capture_output=True, check=check, timeout=30)


def missing() -> Optional[str]:
    """Why namespaces cannot be made here; None if they can."""
    if shutil.which("ip") is None:
        return "the command ip is missing (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"telechat-{os.getpid()}-try"
    made = ip("netns", "add", name, check=False)
    ip("netns", "del", name, check=False)
    return None if made.returncode == 0 else f"no network namespace can be made: {made.stderr.strip()}"


@contextlib.contextmanager
def two_machines(tag: str) -> Iterator[List[str]]:
    """Names of two namespaces with the addresses 10.99.7.1 and 10.99.7.2 and nothing else to reach; gone afterwards.

    tag: a few letters that tell pairs of one process apart.
    """
    names = [f"telechat-{os.getpid()}-{tag}{number}" for number in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.99.7.{number + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            left = ip("netns", "pids", name, check=False).stdout.split()
            if left:
                subprocess.run(["kill", "-KILL", *left], check=False, capture_output=True)
            ip("netns", "del", name, check=False)
