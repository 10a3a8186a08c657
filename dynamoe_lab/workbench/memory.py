"""How much memory a piece of work took: its own peak, not that of everything this process did before.

Linux keeps the largest resident memory of a process (`VmHWM`) and lets it be set back (a 5 written to `/proc/self/clear_refs`), so the
peak of one step is exact. Where it cannot be set back, a thread looks every 10 ms; which of the two it was is part of the answer.
"""

import sys
import threading
from contextlib import suppress
from pathlib import Path

__all__ = ["EXACT", "SAMPLED", "PeakMemory", "peak_memory"]

EXACT = "high-water mark"
SAMPLED = "sampled every 10 ms"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_EVERY = 0.01  # seconds
_SLACK = 16 << 20  # bytes by which the kernel's counters, kept per core, may disagree

_open: list["PeakMemory"] = []  # those of this process that are running, outermost first
_highest = 0  # bytes before the mark was last set back


class PeakMemory:
    """A context manager around work of this process; they may stand within each other. Afterwards it says:

    Attributes:
        bytes: largest resident memory of the process during the work; None where the system does not say.
        before: resident memory when it began, in bytes; the work itself took up to `bytes - before`.
        how: `EXACT` or `SAMPLED`; short peaks between two looks escape the latter.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self.before: int | None = None
        self.how = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        self.before = _resident()
        self.bytes = self.before
        if _set_back():
            self.how = EXACT
        elif self.before is not None:
            self.how = SAMPLED
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        if self.how == EXACT:
            self._saw(_high_water())
        elif self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._saw(_resident())

    def _saw(self, size: int | None) -> None:
        self.bytes = max(self.bytes or 0, size or 0) or None

    def _look(self) -> None:
        while not self._ended.wait(_EVERY):
            self._saw(_resident())


def peak_memory() -> int | None:
    """Largest resident memory of this program so far, in bytes, whatever was measured in between; None where the system does not say.

    Linux tells it in /proc; its `getrusage` also counts what the parent held when it started this process.
    """
    if (mark := _high_water()) is not None:
        return max(mark, _highest)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _set_back() -> bool:
    """Set the mark back to what is resident now; False where that is not allowed or changes nothing."""
    global _highest
    mark = _high_water()
    if mark is None:
        return False
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    if (_high_water() or mark) > (_resident() or 0) + _SLACK:  # a sandbox that takes the write and does nothing
        return False
    _highest = max(_highest, mark)
    for outer in _open:
        outer._saw(mark)
    return True


def _high_water() -> int | None:
    return _field("VmHWM")


def _resident() -> int | None:
    if (size := _field("VmRSS")) is not None:
        return size
    with suppress(Exception):
        import psutil

        return psutil.Process().memory_info().rss
    return None


def _field(name: str) -> int | None:
    """A size of /proc/self/status in bytes; None on other systems."""
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None
