"""What lies under `$DYNAMOE_LAB_HOME`, what of it is needed, and how to free the rest.

    entries = survey(home, reports)
    freed = free(home, choose(entries, stale=True), reports)

Nothing that a living process computes or reads is removed (locks and `holds`), nothing outside the home, nothing through a link. Between
the list and the freeing a person thinks: what has changed meanwhile is not what was agreed to, and stays. Assets and models go only if they
are asked for: they have to be fetched or made again, while a step is only computed again.
"""

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamoe_lab.disk import unreadable
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.files import locked, read_json
from dynamoe_lab.workbench.holds import held_steps
from dynamoe_lab.workbench.provenance import changed_rooms
from dynamoe_lab.workbench.records import RECORD_NAME

__all__ = ["KINDS", "Entry", "choose", "free", "period", "size_on_disk", "survey", "used_steps"]

KINDS = {  # what an entry is -> how to say it
    "step": "finished steps",
    "damaged": "damaged steps, set aside",
    "unfinished": "steps that were not finished",
    "data": "benchmark documents, prepared",
    "asset": "assets",
    "model": "models",
    "wheel": "wheels",
    "housekeeping": "locks and notes",
    "link": "links to elsewhere, not followed",
    "other": "not of this program",
}
PERMANENT = ("asset", "model", "wheel")  # to be fetched or made again: freed only when asked for
NEVER = ("link", "other")
_STEPS = ("step", "damaged", "unfinished")
_PLACES = {"steps": "step", "scratch": "unfinished", "datasets": "data", "assets": "asset", "models": "model", "wheels": "wheel"}
_UNITS = {"min": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}


@dataclass
class Entry:
    """Something that can be freed, or kept, as a whole."""

    kind: str  # one of KINDS
    name: str  # of its file or folder
    path: Path
    bytes: int  # on disk
    made: float  # seconds since 1970
    used: float  # last use
    function: str = ""  # of a step
    seconds: float | None = None  # that computing it took
    users: list[str] = field(default_factory=list)  # runs and sweeps whose record names it: quick/04_router_confusion
    stale: bool = False  # computed by other code
    rooms: list[str] = field(default_factory=list)  # whose code is other, where the step says so
    held: str = ""  # by whom, if a living process uses or makes it; or why it cannot be judged


def size_on_disk(place: Path, seen: set[tuple[int, int]] | None = None) -> int:
    """Bytes that a file or folder takes on the disk, as `du` counts: blocks, a file with several names once, links not followed."""
    seen, total = set() if seen is None else seen, 0
    stack = [place]
    while stack:
        path = stack.pop()
        try:
            stat = path.lstat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            total += stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size
            if path.is_dir() and not path.is_symlink():
                stack += path.iterdir()
        except OSError:  # gone meanwhile, or not ours to read
            continue
    return total


def survey(home: Path, reports: Path) -> list[Entry]:
    """Everything below `home`, steps first, the largest first.

    Args:
        reports: the folder whose runs and sweeps say which steps they use; reports elsewhere are not known here.
    """
    seen: set[tuple[int, int]] = set()
    users, held = used_steps(reports), held_steps(home)
    entries = [_entry(path, kind, seen) for path, kind in _things(home)]
    for entry in entries:
        if entry.kind in _STEPS:
            entry.users = users.get(entry.name.rpartition("-")[2], [])
        entry.held = _in_use(entry, held) or entry.held
    order = list(KINDS)
    return sorted(entries, key=lambda entry: (order.index(entry.kind), -entry.bytes, entry.name))


def _in_use(entry: Entry, held: dict[str, int]) -> str:
    """Which living process uses an entry; of what all steps may need it is not known more closely."""
    if entry.kind in _STEPS and entry.name in held:
        return f"in use by pid {held[entry.name]}"
    return f"in use by pid {min(held.values())}, perhaps" if entry.kind in ("data", *PERMANENT) and held else ""


def _things(home: Path) -> Iterator[tuple[Path, str]]:
    for place in sorted(home.iterdir()) if home.is_dir() else ():
        if place.is_symlink():
            yield place, "link"
        elif place.name in ("locks", "holds"):
            yield place, "housekeeping"
        elif place.name in [f".{name}.partial" for name in _PLACES]:  # was being freed as a whole
            yield place, "unfinished"
        elif place.name not in _PLACES or not place.is_dir():
            yield place, "other"
        elif place.name == "datasets":
            yield place, "data"
        else:
            for path in sorted(place.iterdir()):
                kind = _PLACES[place.name]
                if path.is_symlink():
                    kind = "link"
                elif path.name.startswith("."):
                    kind = "housekeeping" if path.suffix == ".lock" else "unfinished"
                elif kind == "step" and ".corrupt-" in path.name:
                    kind = "damaged"
                yield path, kind


def _entry(path: Path, kind: str, seen: set[tuple[int, int]]) -> Entry:
    try:
        changed = path.lstat().st_mtime
    except OSError:
        changed = time.time()
    entry = Entry(kind, path.name, path, size_on_disk(path, seen), changed, changed, function=path.name.partition("-")[0])
    if kind == "unfinished":
        entry.made = entry.used = _newest(path, changed)
    elif kind == "step":
        try:
            entry.made = (path / "step.json").stat().st_mtime
            step = read_json(path / "step.json")
            entry.function, entry.seconds = step["function"].rpartition(".")[2], float(step["seconds"])
            entry.stale = step["code"] != environment.code_digest(environment.ROOMS_WITHOUT_RESULTS)
            if entry.stale:
                entry.rooms = changed_rooms(step.get("rooms", {}), environment.room_digests(environment.ROOMS_WITHOUT_RESULTS))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:  # among them InputError
            if unreadable(error):
                entry.held = "cannot be read now"
            else:
                entry.kind = "damaged"
    return entry


def _newest(path: Path, known: float) -> float:
    """When something below a folder was last written."""
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                known = max(known, os.lstat(os.path.join(folder, name)).st_mtime)
            except OSError:
                continue
    return known


def used_steps(reports: Path) -> dict[str, list[str]]:
    """First 16 digits of a step's key -> the runs and sweeps below `reports` that used it, e.g. `quick/04_router_confusion`."""
    found: dict[str, list[str]] = {}
    for place in sorted([*reports.glob(f"*/*/{RECORD_NAME}"), *reports.glob("*/*/sweep.json")]):
        name = f"{place.parent.parent.name}/{place.parent.name}"
        for key in _keys(place):
            if name not in found.setdefault(key[:16], []):
                found[key[:16]].append(name)
    return found


def _keys(place: Path) -> list[str]:
    try:
        content: Any = read_json(place)
        steps = content["results"]["steps"] if place.name == RECORD_NAME else [use for cell in content["cells"] for use in cell["steps"]]
        return [str(use["key"]) for use in steps]
    except (InputError, KeyError, TypeError, AttributeError):
        return []


# --- freeing -----------------------------------------------------------------------------------------------------------------------


def period(text: str) -> float:
    """Seconds of `30d`, `12h`, `2w`, `90min`. Raises `InputError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(min|h|d|w)", text.strip())
    if not found:
        raise InputError(f"--older-than {text}: give a number with min, h, d or w, e.g. 30d")
    return float(found[1]) * _UNITS[found[2]]


def choose(
    entries: Iterable[Entry],
    *,
    stale: bool = False,
    unused: bool = False,
    scratch: bool = False,
    everything: bool = False,
    assets: bool = False,
    older_than: float | None = None,
) -> list[Entry]:
    """The entries that a person asked to free.

    Args:
        stale: steps that other code computed.
        unused: steps that no known report uses.
        scratch: what was not finished (training goes on from it) and what is damaged.
        everything: all of these, all steps, prepared documents, locks and notes.
        assets: assets, models and wheels.
        older_than: of the above, or if none of them is asked for of all that can be computed again, what was not used for so many seconds.

    Raises:
        InputError: nothing is asked for.
    """
    if not any((stale, unused, scratch, everything, assets)):
        if older_than is None:
            raise InputError("cache free: say what: --stale, --unused, --scratch, --older-than 30d, --all, or --assets")
        everything = True
    chosen = []
    for entry in entries:
        step, junk = entry.kind == "step", entry.kind in ("damaged", "unfinished")
        wanted = (stale and step and entry.stale) or (unused and step and not entry.users) or (scratch and junk)
        wanted = wanted or (everything and entry.kind not in (*NEVER, *PERMANENT)) or (assets and entry.kind in PERMANENT)
        if wanted and (older_than is None or time.time() - entry.used > older_than):
            chosen.append(entry)
    return chosen


def free(home: Path, entries: Sequence[Entry], reports: Path | None = None) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """Remove entries; returns those that are gone, and those that were kept with the reason.

    Args:
        reports: as for `survey`, to see which runs came to use a step since then; None: nobody asks.
    """
    gone, kept = [], []
    users = used_steps(reports) if reports is not None else {}
    for entry in entries:
        reason = entry.held or _refusal(home, entry)
        try:
            reason = reason or _remove(home, entry, users)
        except InputError as error:
            reason = str(error)
        except OSError as error:
            reason = f"cannot be removed ({error.strerror})"
        if reason:
            kept.append((entry, reason))
        else:
            gone.append(entry)
    return gone, kept


def _refusal(home: Path, entry: Entry) -> str:
    """Why an entry must not be touched: it became a link, or leads out of the home."""
    if entry.kind in NEVER or entry.path.is_symlink():
        return "a link, not followed"
    if not entry.path.parent.resolve().is_relative_to(home.resolve()):
        return "lies outside of the cache"
    return ""


def _changed(entry: Entry, users: dict[str, list[str]]) -> str:
    """What has become of an entry since it was listed, so that it is not for us to remove; "" if it is as it was."""
    if not os.path.lexists(entry.path):
        return "is gone already"
    again = _entry(entry.path, "step" if entry.kind == "damaged" else entry.kind, set())
    if (again.kind, again.stale) != (entry.kind, entry.stale):
        return "made again since it was listed"
    if again.used > entry.used:
        return "used since it was listed"
    new = users.get(entry.name.rpartition("-")[2], []) if entry.kind == "step" and not entry.users else []
    return f"used by {', '.join(new)} since it was listed" if new else again.held


def _remove(home: Path, entry: Entry, users: dict[str, list[str]]) -> str:
    """Remove it under its lock; returns why it was kept, "" if it is gone. Raises `InputError` if a process holds the lock."""
    if entry.kind == "housekeeping":
        return _remove_locks(home, entry.path)
    if entry.kind == "damaged" and ".corrupt-" in entry.name:  # set aside for good: nobody makes or reads it
        shutil.rmtree(entry.path)
        return ""
    # `.name.xxxxxxxx.partial` is being made, `.name.partial` was being freed, `name.old` is a stale step that was being replaced
    label = re.sub(r"(\.[a-z0-9_]{8})?\.partial$", "", entry.name.removeprefix(".")).removesuffix(".old")
    beside = entry.path.parent in (home / "assets", home / "models")
    lock = entry.path.with_name(f".{label}.lock") if beside else home / "locks" / f"{label}.lock"
    with locked(lock, refuses="being made by pid {pid}"):
        if reason := _changed(entry, users) or _in_use(entry, held_steps(home)):
            return reason
        trash = entry.path
        if not entry.name.startswith("."):  # out of sight at once; if we are killed now, the rest reads as unfinished
            trash = entry.path.with_name(f".{entry.name}.partial")
            shutil.rmtree(trash, ignore_errors=True)
            os.replace(entry.path, trash)
            if entry.kind in _STEPS and (reason := _in_use(entry, held_steps(home))):  # noted after we looked; it may be reading
                os.replace(trash, entry.path)
                return reason
        if trash.is_dir():
            shutil.rmtree(trash)
        else:
            trash.unlink()
        if not (home / "steps" / label).exists() and not (home / "scratch" / label).exists():
            lock.unlink(missing_ok=True)  # one who waits for it sees that it is gone, and makes a new one
    return ""


def _remove_locks(home: Path, place: Path) -> str:
    """Lock files that nobody holds; notes of living processes stay."""
    held_steps(home)  # removes the notes of dead ones
    if place.name == "holds":
        return "" if not any(place.iterdir()) else "notes of living processes stay"
    busy = 0
    for lock in sorted(place.iterdir()) if place.is_dir() else [place]:
        try:
            with locked(lock, refuses="busy"):
                lock.unlink(missing_ok=True)
        except InputError:
            busy += 1
    return f"{plural(busy, 'lock')} still held" if busy else ""
