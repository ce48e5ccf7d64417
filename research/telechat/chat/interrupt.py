"""Ctrl-C while a model computes. MindSpore answers SIGINT during a graph's run by killing the process; held back until
a token is out, it stops the answer instead. No MindSpore here: `held` must come before its threads exist.
"""
import contextlib
import signal
from typing import Callable, Generator, List

from research.telechat.common.files import JsonObject


@contextlib.contextmanager
def held() -> Generator[None, None, None]:
    """SIGINT waits, in this thread and in all that it starts."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def check() -> None:
    """Raise KeyboardInterrupt if SIGINT has come since the last call."""
    if signal.SIGINT in signal.sigpending():
        signal.sigwait({signal.SIGINT})
        raise KeyboardInterrupt


@contextlib.contextmanager
def released() -> Generator[None, None, None]:
    """SIGINT raises KeyboardInterrupt at once in this thread, as usual in Python; one that waits does so now."""
    check()
    signal.signal(signal.SIGINT, signal.default_int_handler)           # MindSpore 2.7 leaves its own behind
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})     # may raise, so within the try
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


Tokens = Generator[int, None, None]


def checked(next_tokens: Callable[..., Tokens]) -> Callable[..., Tokens]:
    """`next_tokens` with a `check` behind every token."""
    def tokens(ids: List[int], settings: JsonObject) -> Tokens:
        with contextlib.closing(next_tokens(ids, settings)) as inner:
            for token in inner:
                yield token
                check()
    return tokens
