"""`dynamoe-lab cache` and `cache free`: what lies in the cache, in columns, and freeing it: first told, then asked, then done."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural
from dynamoe_lab.workbench.cache import KINDS, Entry, choose, free, survey
from dynamoe_lab.workbench.files import without_paths
from dynamoe_lab.workbench.terminal import WIDTH, age_text, size_text, table_text

__all__ = ["cache_rows", "free_cache", "list_cache"]

SHOWN = 20  # entries that are named before something is freed


def cache_rows(home: Path, reports: Path) -> list[dict[str, Any]]:
    """Everything in the cache, one dict an entry (see `cache.Entry`), paths from the cache's top."""
    return [asdict(entry) | {"path": entry.path.relative_to(home).as_posix()} for entry in survey(home, reports)]


def list_cache(home: Path, reports: Path) -> str:
    """What lies in the cache by kind, and its steps by function. Raises `InputError` if there is none."""
    entries, now = survey(home, reports), time.time()
    if not entries:
        raise InputError(f"nothing in {without_paths(str(home))}; a run makes it")
    kinds: dict[str, list[Entry]] = {}
    functions: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
        if entry.kind in ("step", "damaged", "unfinished"):
            functions.setdefault(entry.function.removeprefix("."), []).append(entry)
    rows = [(KINDS[kind], str(len(found)), *_sums(found, now), _names(kind, found, home)) for kind, found in kinds.items()]
    rows.append(("in all", str(len(entries)), size_text(sum(entry.bytes for entry in entries)), "", ""))
    parts = [
        without_paths(str(home)),
        table_text(("what", "entries", "disk", "used", ""), rows, right=("entries", "disk", "used"), width=WIDTH),
    ]
    if functions:
        ordered = sorted(functions.items(), key=lambda pair: -sum(entry.bytes for entry in pair[1]))
        lines = [(name, *_counts(found), *_sums(found, now)) for name, found in ordered]
        header = ("steps of", "finished", "stale", "unused", "held", "damaged", "unfinished", "disk", "used")
        parts.append(table_text(header, lines, right=header[1:], width=WIDTH))
        parts.append("unused: by no run below reports/; each step: dynamoe-lab ls --steps\nto free some: dynamoe-lab cache free --help")
    return "\n\n".join(parts)


def _sums(entries: Sequence[Entry], now: float) -> tuple[str, str]:
    return size_text(sum(entry.bytes for entry in entries)), age_text(now - max(entry.used for entry in entries))


def _names(kind: str, entries: Sequence[Entry], home: Path) -> str:
    if kind == "link":
        return ", ".join(entry.path.relative_to(home).as_posix() for entry in entries)
    return ", ".join(entry.name for entry in entries) if kind in ("asset", "model", "wheel", "other", "damaged") else ""


def _counts(entries: Sequence[Entry]) -> list[str]:
    steps = [entry for entry in entries if entry.kind == "step"]
    counts = [len(steps), sum(step.stale for step in steps), sum(not step.users for step in steps), sum(bool(e.held) for e in entries)]
    counts += [sum(entry.kind == kind for entry in entries) for kind in ("damaged", "unfinished")]
    return [str(count) if count else "" for count in counts]


def free_cache(
    home: Path,
    reports: Path,
    *,
    dry_run: bool = False,
    agreed: Callable[[str], bool],
    say: Callable[[str], None] = print,
    **wanted: Any,
) -> int:
    """Free what `wanted` names (see `cache.choose`): say what and how much, ask, remove, say what was kept and why.

    Args:
        dry_run: only say it.
        agreed: is asked the question; False: nothing is removed.

    Returns:
        0; 1 if the answer was no.

    Raises:
        InputError: nothing is asked for.
    """
    entries, now = choose(survey(home, reports), **wanted), time.time()
    if not entries:
        say("nothing to free")
        return 0
    rows = [
        (
            KINDS[entry.kind],
            entry.name,
            size_text(entry.bytes),
            age_text(now - entry.used),
            "; ".join(filter(None, (entry.held, *_used_by(entry)))),
        )
        for entry in entries[:SHOWN]
    ]
    say(table_text(("what", "name", "disk", "used", ""), rows, right=("disk", "used"), width=WIDTH))
    if len(entries) > SHOWN:
        say(f"... and {len(entries) - SHOWN} more")
    total = size_text(sum(entry.bytes for entry in entries if not entry.held))
    busy = sum(bool(entry.held) for entry in entries)
    what = f"{plural(len(entries) - busy, 'entry')}, {total}" + (f" (in use or not readable, kept: {busy})" if busy else "")
    if dry_run:
        say(f"would free {what}")
        return 0
    if not agreed(f"free {what}?"):
        say("nothing freed")
        return 1
    gone, kept = free(home, entries, reports)
    for entry, reason in kept:
        say(f"kept {entry.name}: {reason}")
    say(f"freed {plural(len(gone), 'entry')}, {size_text(sum(entry.bytes for entry in gone))}")
    return 0


def _used_by(entry: Entry) -> list[str]:
    notes = ["stale"] if entry.stale else []
    if entry.kind == "step":
        notes.append(f"used by {', '.join(entry.users)}" if entry.users else "used by no report here")
    return notes
