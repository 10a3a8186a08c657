"""`run.log`: everything one notebook run printed, beside its record, as it was printed; a run that fails or is killed keeps it.

Heartbeat lines, what cells wrote to stdout and stderr, warnings, and how it ended, each with the time (UTC). Of a progress bar only its
last state is kept. No colour codes, no folders of this machine; at most 2 MB: beyond that the oldest lines go.
"""

import logging
import re
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

from dynamoe_lab.workbench.files import disk_full, without_paths

__all__ = ["LOG_NAME", "RunLog", "log_tail"]

LOG_NAME = "run.log"
_HALF = 1_000_000  # bytes of run.log and of run.log.1, which holds the lines before
_LINE = 4_000  # characters of a line; the rest of it is left out
_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class _Handler(RotatingFileHandler):
    """A full disk takes lines from the log; it must neither stop the run nor be told with a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not disk_full(sys.exc_info()[1]):
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # what was not written yet
            if not disk_full(error):
                raise


class RunLog:
    """The log of one run; a context manager. Every line is on disk when the call returns, so a killed run keeps what it said."""

    def __init__(self, folder: Path, root: Path | None = None):
        self.path, self._root = folder / LOG_NAME, root
        self._begun = ""  # a line without its end yet
        self._handler: RotatingFileHandler | None = None

    def __enter__(self) -> "RunLog":
        self.path.with_name(f"{LOG_NAME}.1").unlink(missing_ok=True)
        self._handler = _Handler(self.path, maxBytes=_HALF, backupCount=1, encoding="utf-8", errors="replace")
        self._handler.stream.truncate(0)
        form = logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S")
        form.converter = time.gmtime
        self._handler.setFormatter(form)
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_line()
        if self._handler is not None:
            self._handler.close()
            self._handler = None

    def line(self, text: str) -> None:
        """One line, or several, of the runner's own."""
        self._finish_line()
        for part in text.splitlines():
            self._write(part)

    def heard(self, text: str) -> None:
        """What a cell printed, in whatever pieces it comes."""
        *lines, self._begun = (self._begun + text).split("\n")
        for part in lines:
            self._write(part)
        self._begun = self._begun[-_LINE:]

    def _finish_line(self) -> None:
        if self._begun.strip():
            self._write(self._begun)
        self._begun = ""

    def _write(self, text: str) -> None:
        states = [state for state in _CODES.sub("", text).split("\r") if state.strip()]
        if self._handler is None or not states:
            return
        said = without_paths(states[-1].rstrip(), self._root)
        said = said if len(said) <= _LINE else f"{said[:_LINE]}... ({len(said):,} characters)"
        self._handler.handle(logging.makeLogRecord({"msg": said, "levelno": logging.INFO}))


def log_tail(folder: Path, lines: int = 12) -> list[str]:
    """The last lines of a run's log; none if it has no log."""
    try:
        return (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
