"""How every command ends: its exit code, and one line on stderr where something went wrong.

    0    done
    1    an error the user can fix, a file that cannot be read or written, or too little memory
    2    a command line that is not understood (argparse)
    130  Ctrl-C, SIGTERM or SIGHUP; what the command does at its end has been done
    141  the reader of the output has exited (as in `... | head`)
"""
import atexit
import contextlib
import errno
import os
import select
import signal
import sys
import threading
from types import FrameType
from typing import Callable, Iterator, NoReturn, Optional, TextIO

from research.telechat.common.environment import workers
from research.telechat.common.errors import UserError
from research.telechat.common.printable import one_line

INTERRUPTED = 130
READER_GONE = 141


class Terminated(BaseException):
    """SIGTERM or SIGHUP, which it names, has come.

    No KeyboardInterrupt: in a chat, Ctrl-C stops an answer and these end the program.
    """


def run_command(body: Callable[[], Optional[int]], interrupted: str = "", memory: str = "close other programs") -> int:
    """Run the command `body` and return its exit code (None counts as 0). Errors of the program are raised.

    Args:
        body: the whole command, reading its options included.
        interrupted: what holds after an interruption or on a full disk, e.g. "nothing was written".
        memory: what to do where memory is short.
    """
    kept = f"; {interrupted}" if interrupted else ""
    try:
        with termination():
            try:
                return body() or 0
            finally:
                sys.stdout.flush()                         # a closed pipe is noticed here, not at the exit
    except UserError as err:
        return _say(f"error: {one_line(err)}")
    except KeyboardInterrupt:
        return _say(f"interrupted{kept}", INTERRUPTED)
    except Terminated as err:
        return _say(f"{err}: interrupted{kept}", INTERRUPTED)
    except OSError as err:
        gone = isinstance(err, BrokenPipeError) and (_reader_gone(sys.stdout) or _reader_gone(sys.stderr))
        _leave_unwritten()
        if gone:
            return READER_GONE
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            file = f" ({one_line(err.filename)})" if err.filename else ""
            return _say(f"error: the disk is full{file}; free some space{kept}")
        return _say(f"error: {_of_file(err)}")
    except MemoryError:
        return _say(f"error: not enough memory; {memory}")


def leave(code: int) -> NoReturn:
    """End the process with this exit code as Python does, but for taking the interpreter apart: threads are waited for,
    what was registered for the exit is done, and what was printed is written. Only for the end of a program.

    With MindSpore and MindFormers imported the rest would take a second, and free what the system frees at once.
    """
    try:
        getattr(threading, "_shutdown", lambda: None)()        # waits for threads and pools, before all else as ever
        getattr(atexit, "_run_exitfuncs", lambda: None)()
        with contextlib.suppress(OSError, ValueError):         # their reader has exited
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
            import ctypes

            ctypes.CDLL(None).fflush(None)                     # what libraries print
    finally:
        os._exit(code)


@contextlib.contextmanager
def termination() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated, once: what then cleans up is not disturbed by the next one.

    Left as they are: a signal that is ignored (nohup), a thread other than the main one, and a process among several
    of a job, which ends at once: it may be waiting for another rank where no Python runs.
    """
    if threading.current_thread() is not threading.main_thread() or workers() > 1:
        yield
        return
    arrived = False

    def terminate(number: int, _frame: Optional[FrameType]) -> None:
        nonlocal arrived
        if not arrived:
            arrived = True
            raise Terminated(signal.Signals(number).name)

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, terminate)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _say(line: str, code: int = 1) -> int:
    with contextlib.suppress(OSError):                     # stderr is closed
        print(line, file=sys.stderr, flush=True)
    return code


def _of_file(err: OSError) -> str:
    return one_line(f"{os.fsdecode(err.filename)}: {err.strerror or err}" if err.filename else err)


def _reader_gone(stream: TextIO) -> bool:
    poll = select.poll()
    with contextlib.suppress(AttributeError, OSError, ValueError):       # replaced by something without a file
        poll.register(stream.fileno(), 0)                  # asks for errors only
    return bool(poll.poll(0))


def _leave_unwritten() -> None:
    """Direct an output that cannot be written to nowhere, so that Python does not try and complain when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
