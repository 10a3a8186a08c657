"""Which steps a living process uses: a note a process in `$DYNAMOE_LAB_HOME/holds`, so that freeing space takes nothing away from a run.

A step that is being computed is held by its lock. One that was handed out is read again later (a checkpoint by its path), by a process that
holds no lock then: it stands in that process's note. Notes of processes that are gone count for nothing and are removed.
"""

import os
from contextlib import suppress
from pathlib import Path

from dynamoe_lab.workbench.records import process_alive, process_identity

__all__ = ["held_steps", "hold_step"]

_MANY = 32  # notes; a process that finds as many removes those of the dead
_noted: dict[tuple[Path, int], set[str]] = {}  # home, process -> labels; a fork has a note of its own


def hold_step(home: Path, label: str) -> None:
    """Note that this process uses the step `label` until it ends, and that it was used now; a read-only cache is left as it is."""
    pid, created = process_identity() if (home, os.getpid()) not in _noted else (os.getpid(), 0.0)
    labels = _noted.setdefault((home, pid), set())
    with suppress(OSError):
        os.utime(home / "steps" / label)  # last use
    if label in labels:
        return
    with suppress(OSError):
        folder = home / "holds"
        folder.mkdir(parents=True, exist_ok=True)
        if not labels and len(list(folder.iterdir())) >= _MANY:
            held_steps(home)
        with (folder / f"{pid}.txt").open("a" if labels else "w", encoding="utf-8") as note:
            note.write(f"{label}\n" if labels else f"{created}\n{label}\n")
        labels.add(label)


def held_steps(home: Path) -> dict[str, int]:
    """Label -> id of a living process that uses the step; notes of the dead are removed."""
    found: dict[str, int] = {}
    for note in sorted((home / "holds").glob("*.txt")):
        with suppress(OSError, ValueError):  # gone, or not written yet
            created, *labels = note.read_text(encoding="utf-8").splitlines()
            if process_alive(int(note.stem), float(created)):
                found |= dict.fromkeys(labels, int(note.stem))
            else:
                note.unlink()
    return found
