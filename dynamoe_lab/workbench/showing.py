"""`dynamoe-lab show RUN`: one run for reading: how it stands and why, what it found, its numbers, files, steps and log."""

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynamoe_lab.errors import printable
from dynamoe_lab.plural import plural
from dynamoe_lab.workbench.cache import size_on_disk
from dynamoe_lab.workbench.files import without_paths
from dynamoe_lab.workbench.inventory import seconds_since
from dynamoe_lab.workbench.records import Record, StepUse, load_record, place_text
from dynamoe_lab.workbench.runlog import LOG_NAME, log_tail
from dynamoe_lab.workbench.stale import other_since, standing
from dynamoe_lab.workbench.terminal import WIDTH, age_text, duration_text, number_text, size_text, table_text

__all__ = ["run_facts", "show_run"]


def run_facts(folder: Path, root: Path) -> dict[str, Any]:
    """A record as it is written, with how it stands today: `standing` {state, why, since, bytes, log}. `InputError` if it is unreadable."""
    record = load_record(folder)
    state, why = standing(record, folder, root)
    log = f"{folder / LOG_NAME}" if (folder / LOG_NAME).is_file() else ""
    return asdict(record) | {
        "standing": {"state": state, "why": why, "since": other_since(record), "bytes": size_on_disk(folder), "log": log}
    }


def show_run(folder: Path, root: Path) -> str:
    """A record for reading; of a run that failed, was interrupted or is running also the end of its log. `InputError` if it is unreadable.

    What a terminal would obey in it stands as codes, for a record holds what a cell raised, and may come from anywhere.

    Args:
        root: of the project, whose code, notebooks and profiles are today's.
    """
    record = load_record(folder)
    run, results = record.run, record.results
    state, why = standing(record, folder, root)
    parts = [f"{run.name}  {state}" + (f"  {run.title}" if run.title else "")]
    parts.append("\n".join(_fact(label, text) for label, text in _facts(record, folder, state, why) if text))
    if run.error is not None:
        parts.append("\n".join([f"{run.error.type}{place_text(run.error)}: {run.error.message}", *run.error.traceback]))
    elif state == "interrupted":
        parts.append(f"its process ended{place_text(run.at)}; the same command goes on")
    if state in ("failed", "interrupted", "running") and (tail := log_tail(folder)):
        parts.append("\n".join([f"the last lines of {LOG_NAME}", *(f"  {line}" for line in tail)]))
    if results.findings:
        lines = [f"{'*' if finding.headline else '-'} {finding.sentence} [{finding.source}]" for finding in results.findings]
        parts.append("\n".join(["findings", *(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)]))
    parts += [text for text in (_numbers(record), _files(record), _steps(record)) if text]
    return printable("\n\n".join(parts).expandtabs(4), keep="\n\u00a0")


def _facts(record: Record, folder: Path, state: str, why: list[str]) -> list[tuple[str, str]]:
    run, env = record.run, record.env
    when = run.finished or run.started
    age = age_text(seconds_since(when))
    log = folder / LOG_NAME
    threads = plural(env.threads, "thread") if env.threads else ""
    again = (
        f"no: {'; '.join(env.unrepeatable)}"
        if env.unrepeatable
        else f"yes, with these versions and {threads}"
        if env.rooms and threads
        else ""
    )
    return [
        ("why" if why else "", f"{state}: {'; '.join(why)}" if why else ""),
        ("since then", "; ".join(other_since(record))),
        ("question", run.question),
        ("profile", run.profile),
        ("command", run.command),
        ("finished" if run.finished else "started", f"{when}, {age} ago" if age else when),
        ("time", duration_text(run.seconds)),
        ("peak memory", size_text(run.peak_memory_bytes)),
        ("on disk", size_text(size_on_disk(folder))),
        ("model", env.model),
        ("machine", ", ".join(part for part in (env.cpu or env.platform, threads) if part)),
        ("commit", env.commit[:12] + (" with uncommitted changes" if env.dirty else "")),
        ("repeatable", again if run.status == "ok" else ""),
        ("log", without_paths(str(log), Path.cwd()).removeprefix("./") if log.is_file() else ""),
    ]


def _fact(label: str, text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=f"{label:<12} ", subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False
    )


def _numbers(record: Record) -> str:
    rows: list[tuple[str, ...]] = []
    for scalar in record.results.scalars:
        interval = "" if scalar.low is None or scalar.high is None else f"[{number_text(scalar.low)}, {number_text(scalar.high)}]"
        rows.append((scalar.name, f"{number_text(scalar.value)} {scalar.unit}".rstrip(), interval, number_text(scalar.n)))
    return table_text(("number", "value", "interval", "n"), rows, right=("value", "interval", "n")) if rows else ""


def _files(record: Record) -> str:
    kinds: list[tuple[str, list[Any]]] = [("figure", record.results.figures), ("table", record.results.tables)]
    kinds.append(("text", record.results.fragments))
    rows = [(kind, artifact.stem, artifact.caption) for kind, artifacts in kinds for artifact in artifacts]
    return table_text(("kind", "stem", "caption"), rows, width=WIDTH) if rows else ""


def _steps(record: Record) -> str:
    rows = [
        (
            use.function,
            use.key[:16],
            duration_text(use.seconds),
            size_text(use.peak_memory_bytes),
            _own(use),
            *_how(use, record.env.threads),
        )
        for use in record.results.steps
    ]
    header = ("step", "key", "computed in", "peak", "its own", "this run", "notes")
    return table_text(header, rows, right=("computed in", "peak", "its own"), width=WIDTH) if rows else ""


def _own(use: StepUse) -> str:
    """What a step added to the memory that was taken when it began."""
    if use.peak_memory_bytes is None or use.memory_before_bytes is None:
        return ""
    return f"+{size_text(use.peak_memory_bytes - use.memory_before_bytes)}"


def _how(use: StepUse, threads: int | None) -> tuple[str, str]:
    notes = [f"stale: {', '.join(use.stale_rooms)} changed" if use.stale_rooms else "stale"] if use.stale else []
    notes += [f"{name} {value}" for name, value in use.unlike.items()]
    notes += [f"threads {use.threads}"] if use.threads and use.threads != threads else []
    return "read from the cache" if use.cached else "computed", "; ".join(notes)
