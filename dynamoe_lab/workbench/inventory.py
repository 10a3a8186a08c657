"""`dynamoe-lab ls` and `show`: what was run, what is kept, and what one run found, as plain text. Reads records; computes nothing."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.files import read_json, without_paths
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.notebooks import notebook_number
from dynamoe_lab.workbench.records import RECORD_NAME, Record, effective_status, load_record, place_text
from dynamoe_lab.workbench.report import duration, memory, number_text

__all__ = ["find_run", "list_runs", "list_steps", "show_run", "table_text"]


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Columns of text under their names, those named in `right` aligned to the right; no line ends in spaces."""
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    sides = [str.rjust if name in right else str.ljust for name in header]
    lines = ["  ".join(side(text, width) for side, text, width in zip(sides, row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _age(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return f"{int(max(seconds, 0))} s"


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


# --- ls ----------------------------------------------------------------------------------------------------------------------------


def list_runs(reports: Path, notebooks: Path) -> str:
    """A table of the runs and sweeps below `reports`; stale: made by other code than today's package or notebook.

    Raises `InputError` if there is none.
    """
    rows = [*_run_rows(reports, notebooks), *_sweep_rows(reports)]
    if not rows:
        shown = without_paths(str(reports), reports.parent).removeprefix("./")
        raise InputError(f"no runs below {shown}; make some with: dynamoe-lab run --profile quick")
    return table_text(("report", "notebook", "status", "finished (UTC)", "time", "size", "stale"), rows, right=("time", "size"))


def _run_rows(reports: Path, notebooks: Path) -> Iterator[tuple[str, ...]]:
    code = environment.code_digest()
    for place in sorted(reports.glob(f"*/*/{RECORD_NAME}")):
        folder = place.parent
        report, size = folder.parent.name, memory(_size(folder))
        try:
            record = load_record(folder)
        except InputError:
            yield (report, folder.name, "unreadable", "", "", size, "")
            continue
        run = record.run
        stale = effective_status(record, code=code, source=_source(notebooks / f"{run.name}.ipynb")) == "stale"
        when = run.finished[:16].replace("T", " ")
        yield (report, run.name, effective_status(record), when, duration(run.seconds), size, "stale" if stale else "")


def _source(notebook: Path) -> str | None:
    """The hash that a record keeps of its notebook's code cells; None if the notebook is not here."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return fingerprint(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sweep_rows(reports: Path) -> Iterator[tuple[str, ...]]:
    code = environment.code_digest()
    for place in sorted(reports.glob("*/*/sweep.json")):
        size = memory(_size(place.parent))
        try:
            content = read_json(place)
            bad = sum(cell["status"] != "ok" for cell in content["cells"])
            status = f"{bad} of {len(content['cells'])} failed" if bad else "ok"
            seconds = duration(sum(cell["seconds"] for cell in content["cells"]))
            when, stale = content["finished"][:16].replace("T", " "), content["env"]["code"] != code
        except (InputError, KeyError, TypeError):
            status, seconds, when, stale = "unreadable", "", "", False
        yield (place.parent.parent.name, place.parent.name, status, when, seconds, size, "stale" if stale else "")


def list_steps(home: Path) -> str:
    """A table of the cached steps, newest first, and what they take; stale: computed by other code. `InputError` if there is none."""
    code, rows, total = environment.code_digest(environment.ROOMS_WITHOUT_RESULTS), [], 0
    places = sorted((home / "steps").glob("*/step.json"), key=lambda place: -place.stat().st_mtime)
    for place in places:
        size = _size(place.parent)
        total += size
        age = _age(time.time() - place.stat().st_mtime)
        try:
            step = read_json(place)
            name, seconds, stale = step["function"].rpartition(".")[2], duration(step["seconds"]), step["code"] != code
        except (InputError, KeyError, TypeError, AttributeError):
            name, seconds, stale = "unreadable", "", False
        rows.append((place.parent.name.rpartition("-")[2], name, memory(size), age, seconds, "stale" if stale else ""))
    if not rows:
        raise InputError(f"no steps in {without_paths(str(home))}; a run makes some")
    table = table_text(("key", "function", "size", "age", "computed in", "stale"), rows, right=("size", "age", "computed in"))
    folder = without_paths(str(home / "steps"))
    return f"{table}\n{len(rows)} steps, {memory(total)} in {folder}; a step that is removed is computed again when it is needed"


# --- show --------------------------------------------------------------------------------------------------------------------------


def find_run(name: str, reports: Path) -> Path:
    """The folder of a run: `quick/04`, `quick/04_router_confusion`, or a path to the folder or its record.json.

    Raises `InputError` if there is no such run, or several.
    """
    path = Path(name)
    for place in (path, path.parent if path.name == RECORD_NAME else path):
        if (place / RECORD_NAME).is_file():
            return place
    report, _, notebook = name.strip("/").rpartition("/")
    known = [place.parent for place in sorted(reports.glob(f"{report or '*'}/*/{RECORD_NAME}"))]
    number = int(notebook) if notebook.isdigit() else None
    found = [folder for folder in known if folder.name == notebook or (number is not None and notebook_number(folder.name) == number)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{folder.parent.name}/{folder.name}" for folder in found or known)
    if found:
        raise InputError(f"{name!r} is several runs: {names}; give one of them")
    raise InputError(f"no run {name!r}; " + (f"there is {names}" if names else "make some with: dynamoe-lab run --profile quick"))


def show_run(folder: Path) -> str:
    """A record for reading: status, command, error, findings, numbers with intervals, files and steps. `InputError` if it is unreadable."""
    record = load_record(folder)
    run, results = record.run, record.results
    parts = [f"{run.name}  {effective_status(record)}" + (f"  {run.title}" if run.title else "")]
    facts = [("question", run.question), ("profile", run.profile), ("command", run.command)]
    facts += [("finished", run.finished), ("time", duration(run.seconds)), ("peak memory", memory(run.peak_memory_bytes))]
    facts += [("model", record.env.model), ("commit", record.env.commit[:12] + (" with uncommitted changes" if record.env.dirty else ""))]
    parts.append("\n".join(f"{label:<12} {text}" for label, text in facts if text))
    if run.error is not None:
        parts.append("\n".join([f"{run.error.type}{place_text(run.error)}: {run.error.message}", *run.error.traceback]))
    elif effective_status(record) == "interrupted":
        parts.append(f"its process ended{place_text(run.at)}; the same command goes on")
    if results.findings:
        lines = [f"{'*' if finding.headline else '-'} {finding.sentence} [{finding.source}]" for finding in results.findings]
        parts.append("\n".join(["findings", *lines]))
    parts += [text for text in (_numbers(record), _files(record), _steps(record)) if text]
    return "\n\n".join(parts)


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
    return table_text(("kind", "stem", "caption"), rows) if rows else ""


def _steps(record: Record) -> str:
    how = {True: "read from the cache", False: "computed"}
    rows = [
        (use.function, use.key[:16], duration(use.seconds), how[use.cached], "stale" if use.stale else "") for use in record.results.steps
    ]
    return table_text(("step", "key", "computed in", "this run", "stale"), rows, right=("computed in",)) if rows else ""
