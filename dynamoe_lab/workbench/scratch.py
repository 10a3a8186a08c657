"""A step's scratch folder: what a killed process left in `output/`, and under which code, versions and threads it was made.

Work that was begun by other code is not thrown away (it may be hours), but what comes out is a mixture, and must not pass for the work of
who ended it. So who goes to work notes first what it works with, in `begun.json`; a step made in parts names them all.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynamoe_lab.disk import disk_full, full_place, no_space, unreadable
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.files import read_json, write_json

__all__ = ["BEGUN", "STEP_VERSIONS", "begin", "kept_when_full", "made_with", "tidied"]

BEGUN = "begun.json"  # beside output/: who worked on it, in order, as `made_with` says it
STEP_VERSIONS = ("torch", "transformers", "numpy", "pandas")  # packages that compute, recorded with a step
_UNKNOWN = {"code": "unknown", "rooms": {}, "versions": {}, "threads": None, "cpu": ""}  # work that nobody signed
_ROOM = 64 * 2**20  # bytes: where so many are free, it may be another disk that is full


def begin(scratch: Path, *, resumes: bool, anew: bool) -> list[dict[str, Any]]:
    """Make a scratch folder ready for work, and sign for it.

    Args:
        resumes: keep `output/` as a killed process left it; False: the folder is emptied.
        anew: but not if other code, versions or threads made something of it: `run --recompute`.

    Returns:
        Who made what lies there, in order, this process last.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    output, me = scratch / "output", _me()
    makers = _signed(scratch) if resumes and output.is_dir() and any(output.iterdir()) else []
    if anew and any(_differ(maker, me) for maker in makers):
        os.replace(output, scratch / "output.old")  # at once: half of it might pass for less work of the same kind
        makers = []
    for item in scratch.iterdir():
        if not (resumes and item.name in ("output", BEGUN)):
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    if resumes:
        makers = makers if makers and makers[-1] == me else [*makers, me]
        write_json(scratch / BEGUN, makers)  # before anything of ours lies in output/
        output.mkdir(exist_ok=True)
    return makers or [me]


def made_with(makers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What step.json says of those who made a step: code and rooms, what the last one had, and `parts` where it was made by several.

    The code of several reads as none of them: whoever looks, the step is stale.
    """
    last = makers[-1]
    rooms = sorted({room for maker in makers for room in maker["rooms"]}) if all(maker["rooms"] for maker in makers) else []
    return {
        "code": _joined(maker["code"] for maker in makers),
        "rooms": {room: _joined(maker["rooms"].get(room, "none") for maker in makers) for room in rooms},
        "threads": environment.torch_threads(),
        "cpu": last["cpu"],
        "versions": last["versions"],
        "parts": _parts(makers, rooms),
    }


def _parts(makers: Sequence[dict[str, Any]], rooms: Sequence[str]) -> list[str]:
    """How the parts of a step were made where they were made differently, each to be put behind "in parts, "; empty: all alike."""
    found = []
    if len({maker["code"] for maker in makers}) > 1:
        changed = [room for room in rooms if len({maker["rooms"].get(room) for maker in makers}) > 1]
        found.append("by different code" + (f" ({', '.join(changed)})" if changed else ""))
    for name in STEP_VERSIONS:
        if len(given := _different(maker["versions"].get(name) for maker in makers)) > 1:
            found.append(f"with {name} {', then '.join(given)}")
    if len(given := _different(maker["threads"] for maker in makers)) > 1:
        found.append(f"with {', then '.join(given)} threads")
    if len(given := _different(maker["cpu"] for maker in makers)) > 1:
        found.append(f"on {', then '.join(given)}")
    return found


def _me() -> dict[str, Any]:
    return {
        "code": environment.code_digest(environment.ROOMS_WITHOUT_RESULTS),
        "rooms": environment.room_digests(environment.ROOMS_WITHOUT_RESULTS),
        "versions": {name: version for name, version in environment.versions().items() if name in STEP_VERSIONS},
        "threads": environment.torch_threads(),
        "cpu": environment.cpu_name(),
    }


def _signed(scratch: Path) -> list[dict[str, Any]]:
    try:
        makers = [_UNKNOWN | maker for maker in read_json(scratch / BEGUN)]
    except (InputError, TypeError) as error:  # none: an earlier version of this program
        if unreadable(error):
            raise
        makers = []
    return makers or [_UNKNOWN]


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether they may have computed differently; threads count where both are known, which they are not before torch is imported."""
    threads = {one["threads"], other["threads"]} - {None}
    return one["code"] != other["code"] or one["versions"] != other["versions"] or len(threads) > 1


def _different(values: Iterator[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))


def _joined(values: Iterator[str]) -> str:
    return "+".join(dict.fromkeys(values))


# --- what is left of work that ended badly -------------------------------------------------------------------------------------------


@contextmanager
def tidied(scratch: Path) -> Iterator[None]:
    """If the work inside fails, leave of it what the next call can go on from, or nothing; one that is killed tidies nothing."""
    try:
        yield
    except Exception:
        if not _resumable(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def kept_when_full(home: Path, scratch: Path) -> Iterator[None]:
    """Tell of a full disk in one line: where, what to do, and whether anything of the step in `scratch` is kept."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not disk_full(error):
            raise
        place, advice = full_place(error, home), "free some, or set DYNAMOE_LAB_HOME to another disk"
        if place != home:
            advice = "free some there"
        elif not _named(error) and home.is_dir() and shutil.disk_usage(home).free > _ROOM:
            advice = f"if that is enough, another disk that {scratch.name} writes to is full; {advice}"
        if _resumable(scratch):
            advice += f"; what {scratch.name} wrote so far is kept in scratch"
        raise InputError(no_space(place, advice)) from error


def _named(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.filename is not None


def _resumable(scratch: Path) -> bool:
    """Whether a next call can go on: `begin` signs only for functions that find their files again, and they have written something."""
    output = scratch / "output"
    return (scratch / BEGUN).is_file() and output.is_dir() and any(output.iterdir())
