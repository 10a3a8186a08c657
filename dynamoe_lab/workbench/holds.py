"""Which steps a living process uses: a note a process in `$DYNAMOE_LAB_HOME/holds`, so that freeing space takes nothing away from a run.

A step that is being computed is held by its lock. One that was handed out is read again later (a checkpoint by its path), by a process that
holds no lock then: it stands in that process's note. Whoever looks for a step notes it first, so that nothing can be freed between the look
and the note. Notes of processes that are gone count for nothing and are removed.
"""

import os
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from dynamoe_lab.disk import unreadable
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.records import process_alive, process_identity

__all__ = ["held_steps", "hold_cache", "hold_step"]

_MANY = 32  # notes; a process that finds as many removes those of the dead
_CACHE = ""  # stands in a note for the cache as a whole
_noted: dict[tuple[Path, int], dict[str, bool]] = {}  # home, process -> label -> whether the note has it; a fork has a note of its own
_writes = threading.Lock()


def hold_cache(home: Path) -> None:
    """Note that this process works with the cache: until it ends, assets, models and documents are not freed."""
    _note(home, _CACHE)


def hold_step(home: Path, label: str) -> None:
    """Note that this process uses the step `label` until it ends, and that it was used now; a read-only cache is left as it is."""
    with suppress(OSError):
        os.utime(home / "steps" / label)  # last use
    _note(home, label)


def _note(home: Path, label: str) -> None:
    pid = os.getpid()
    with _writes:
        labels = _noted.setdefault((home, pid), {})
        labels.setdefault(label, False)
        if all(labels.values()):
            return
        with suppress(OSError, InputError):  # what could not be written now is written with the next label
            folder = home / "holds"
            folder.mkdir(parents=True, exist_ok=True)
            if not any(labels.values()) and len(list(folder.iterdir())) >= _MANY:
                held_steps(home)
            whole = folder / f".{pid}.tmp"  # a reader sees the old note or the new one: half a note would hold nothing
            whole.write_text("\n".join([str(_created(pid)), *labels]) + "\n", encoding="utf-8")
            os.replace(whole, folder / f"{pid}.txt")
            labels.update(dict.fromkeys(labels, True))


@cache
def _created(pid: int) -> float:
    """When this process was started: with its id it names it, for ids are used again."""
    return process_identity()[1]


def held_steps(home: Path) -> dict[str, int]:
    """Label -> id of a living process that uses the step ("" -> one that uses the cache); notes of the dead are removed.

    Raises `InputError` if a note cannot be read: what it holds is not known then.
    """
    found: dict[str, int] = {}
    for note in sorted((home / "holds").glob("*.txt")):
        lines = _lines(note)
        with suppress(ValueError):  # no note of ours
            created, *labels = lines
            if process_alive(int(note.stem), float(created)):
                found |= dict.fromkeys(labels, int(note.stem))
            else:
                with suppress(OSError):
                    note.unlink()
    for left in (home / "holds").glob(".*.tmp"):  # of a process that was killed while it wrote
        with suppress(OSError, ValueError):
            if not process_alive(int(left.stem[1:]), None):
                left.unlink()
    return found


def _lines(note: Path) -> list[str]:
    try:
        return note.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        if unreadable(error):
            raise InputError(f"{note}: cannot be read ({error.strerror}); it says which steps are in use: make it readable") from error
        return []  # gone
