"""`dynamoe-lab ls` and `ls --steps`: what was run and what is kept, how it stands and why. Reads records; computes nothing.

Every list is rows first (`run_rows`: plain values, for `--json`; `step_rows`: entries of the cache, which `housekeeping` makes plain), then
text in columns that fit 100 characters.
"""

import contextlib
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.cache import Entry, size_on_disk, survey
from dynamoe_lab.workbench.files import read_json, without_paths
from dynamoe_lab.workbench.notebooks import notebook_number
from dynamoe_lab.workbench.parameters import whole_number
from dynamoe_lab.workbench.provenance import changed_rooms
from dynamoe_lab.workbench.records import RECORD_NAME, load_record
from dynamoe_lab.workbench.stale import other_since, standing
from dynamoe_lab.workbench.terminal import WIDTH, age_text, duration_text, size_text, table_text

__all__ = ["find_run", "list_runs", "list_steps", "run_rows", "seconds_since", "step_rows"]


# --- runs --------------------------------------------------------------------------------------------------------------------------


def run_rows(reports: Path, root: Path) -> list[dict[str, Any]]:
    """The runs and sweeps below `reports`, in order: run (`quick/04_router_confusion`), state (ok, stale, failed, interrupted, running,
    unreadable), why (list), finished (ISO 8601, UTC), age, seconds, peak_memory_bytes, bytes on disk.

    Args:
        root: of the project, whose code, notebooks and profiles are today's.
    """
    rows = [_run_row(place.parent, root) for place in sorted(reports.glob(f"*/*/{RECORD_NAME}"))]
    return rows + [_sweep_row(place) for place in sorted(reports.glob("*/*/sweep.json"))]


def _row(folder: Path, **values: Any) -> dict[str, Any]:
    empty = {"state": "unreadable", "why": [], "finished": "", "age": None, "seconds": None, "peak_memory_bytes": None}
    return {"run": f"{folder.parent.name}/{folder.name}", **empty, "bytes": size_on_disk(folder), **values}


def _run_row(folder: Path, root: Path) -> dict[str, Any]:
    try:
        record = load_record(folder)
    except InputError:
        return _row(folder, why=["record.json is no record; run the notebook again"])
    run = record.run
    state, reasons = standing(record, folder, root)
    when = run.finished or run.started
    return _row(
        folder,
        state=state,
        why=reasons + other_since(record),
        finished=run.finished,
        age=seconds_since(when),
        seconds=run.seconds,
        peak_memory_bytes=run.peak_memory_bytes,
    )


def _sweep_row(place: Path) -> dict[str, Any]:
    try:
        content = read_json(place)
        cells, env = content["cells"], content["env"]
        bad = sum(cell["status"] != "ok" for cell in cells)
        seconds, when = sum(cell["seconds"] for cell in cells), content["finished"]
        state, why = ("failed", [f"{bad} of {len(cells)} cells failed"]) if bad else ("ok", [])
        if env["code"] != environment.code_digest():
            rooms = changed_rooms(env.get("rooms", {}), environment.room_digests())
            state = "failed" if bad else "stale"
            why.append(f"code of {', '.join(rooms)} changed" if rooms else "code changed")
    except (InputError, KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return _row(place.parent, why=["sweep.json is no record; run the sweep again"])
    return _row(place.parent, state=state, why=why, finished=when, age=seconds_since(when), seconds=seconds)


def seconds_since(when: str) -> float | None:
    """Seconds since a time as records have it (ISO 8601, UTC), never less than none; None if it is no such time."""
    try:
        return max((datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def list_runs(reports: Path, root: Path) -> str:
    """A table of `run_rows`. Raises `InputError` if there is none."""
    rows = run_rows(reports, root)
    if not rows:
        shown = without_paths(str(reports), reports.parent).removeprefix("./")
        raise InputError(f"no runs below {shown}; make some with: dynamoe-lab run --profile quick")
    lines = [
        (
            row["run"],
            row["state"],
            age_text(row["age"]),
            duration_text(row["seconds"]),
            size_text(row["peak_memory_bytes"]),
            size_text(row["bytes"]),
            "; ".join(row["why"]),
        )
        for row in rows
    ]
    right = ("age", "time", "memory", "disk")
    return table_text(("run", "state", "age", "time", "memory", "disk", "why"), lines, right=right, width=WIDTH)


def find_run(name: str, reports: Path) -> Path:
    """The folder of a run: `quick/04`, `quick/04_router_confusion`, or a path to the folder or its record.json.

    Raises `InputError` if there is no such run, or several.
    """
    path = Path(name)
    for place in (path, path.parent if path.name == RECORD_NAME else path):
        with contextlib.suppress(OSError, ValueError):  # a name too long for a file
            if (place / RECORD_NAME).is_file():
                return place
    report, _, notebook = name.strip("/").rpartition("/")
    known = [place.parent for place in sorted(reports.glob(f"*/*/{RECORD_NAME}")) if not report or place.parent.parent.name == report]
    number = whole_number(notebook)
    found = [folder for folder in known if folder.name == notebook or (number is not None and notebook_number(folder.name) == number)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{folder.parent.name}/{folder.name}" for folder in found or known)
    if found:
        raise InputError(f"{name!r} is several runs: {names}; give one of them")
    raise InputError(f"no run {name!r}; " + (f"there is {names}" if names else "make some with: dynamoe-lab run --profile quick"))


# --- steps -------------------------------------------------------------------------------------------------------------------------


def step_rows(home: Path, reports: Path) -> list[Entry]:
    """The cached steps, the last used first; damaged ones among them."""
    return sorted((entry for entry in survey(home, reports) if entry.kind in ("step", "damaged")), key=lambda entry: -entry.used)


def list_steps(home: Path, reports: Path) -> str:
    """A table of the cached steps and what they take; stale: computed by other code. `InputError` if there is none."""
    entries, now = step_rows(home, reports), time.time()
    if not entries:
        raise InputError(f"no steps in {without_paths(str(home))}; a run makes some")
    rows = [
        (
            entry.name.partition(".corrupt-")[0].rpartition("-")[2],
            entry.function,
            size_text(entry.bytes),
            age_text(now - entry.made),
            age_text(now - entry.used),
            duration_text(entry.seconds),
            "damaged" if entry.kind == "damaged" else "stale" if entry.stale else "ok",
            "; ".join([*([", ".join(entry.rooms)] if entry.rooms else []), _users(entry), *([entry.held] if entry.held else [])]),
        )
        for entry in entries
    ]
    header = ("key", "function", "disk", "age", "used", "took", "state", "other code; used by")
    table = table_text(header, rows, right=("disk", "age", "used", "took"), width=WIDTH)
    total, folder = size_text(sum(entry.bytes for entry in entries)), without_paths(str(home / "steps"))
    return f"{table}\n{plural(len(rows), 'step')}, {total} in {folder}; dynamoe-lab cache free removes some"


def _users(entry: Entry) -> str:
    if not entry.users:
        return "no report here"
    first, *others = entry.users
    return f"{first}{f' and {len(others)} more' if others else ''}"
