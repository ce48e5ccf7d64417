"""SHA-256 of files: of one that others are still writing, by a thread behind them, and of finished ones.

hashlib lets other threads run while it computes. What the hashes are held against is checkpoint/manifest.py's matter
and data/meta.py's.
"""
import hashlib
import heapq
import mmap
import os
import threading
from pathlib import Path
from typing import Callable, List, Optional, Tuple, Union

_BLOCK = 4 << 20                         # bytes read and hashed at once; a multiple of what maps begin at


def file_sha256(path: Union[str, Path], progress: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a whole file, as hexadecimal digits; progress(bytes) after each block. Raises OSError."""
    digest, buffer = hashlib.sha256(), bytearray(min(_BLOCK, os.stat(path).st_size + 1))
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while True:
            count = file.readinto(buffer)
            if not count:
                return digest.hexdigest()
            digest.update(view[:count])
            progress(count)


class FollowingHash:
    """SHA-256 of a file that is being written, in any order: a thread reads each byte as soon as all before it are
    there, from memory as a rule, where the system still holds it.

    `written` may be called from any thread. `result` or `stop` must be called at the end.
    """

    def __init__(self, path: Path, size: int) -> None:
        """path: exists already; size: bytes that it will have."""
        self._path, self.size = path, size
        self._known = 0                                  # bytes from the beginning that are written
        self._ahead: List[Tuple[int, int]] = []          # (first, behind the last) of runs that are not connected yet
        self._changed = threading.Condition()
        self._stopped = False
        self._digest = hashlib.sha256()
        self._fault: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._follow, name="sha256", daemon=True)
        self._thread.start()

    def written(self, start: int, length: int) -> None:
        """The bytes from `start` on are in the file."""
        with self._changed:
            heapq.heappush(self._ahead, (start, start + length))
            before = self._known
            while self._ahead and self._ahead[0][0] <= self._known:
                self._known = max(self._known, heapq.heappop(self._ahead)[1])
            if self._known // _BLOCK != before // _BLOCK or self._known >= self.size:
                self._changed.notify_all()

    def result(self) -> str:
        """Wait until all is hashed; the hexadecimal digits. Raises OSError."""
        self._thread.join()
        if self._fault is not None:
            raise self._fault
        return self._digest.hexdigest()

    def stop(self) -> None:
        """The file will not be completed."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _follow(self) -> None:
        try:
            done = 0
            with open(self._path, "rb", buffering=0) as file:
                while done < self.size and not self._stopped:
                    with self._changed:
                        while self._known < min(done + _BLOCK, self.size) and not self._stopped:
                            self._changed.wait()
                        ready = min(self._known, done + _BLOCK)
                    if ready > done and not self._stopped:
                        if os.fstat(file.fileno()).st_size < ready:
                            raise OSError(f"{self._path} is shorter than what was written to it")
                        # a map: what was just written is in memory, and a copy of it would cost a fifth of the hash
                        with mmap.mmap(file.fileno(), ready - done, access=mmap.ACCESS_READ, offset=done) as part:
                            self._digest.update(part)
                        done = ready
        except BaseException as err:                     # raised by result(), in the thread that calls it
            self._fault = err

