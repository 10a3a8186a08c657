"""`dynamoe-lab check`: run notebooks again from nothing and compare all that came out with the records, to the last digit.

The rerun has the recorded experiment, parameters and number of threads, and a temporary cache that shares assets and models only: every
step is computed. Tables, numbers, texts and weights have to be equal; what is a measured time is excepted by name (`repeatable`), not by
tolerance. Where versions, processor, threads or code are others than the record's, that is said first, for then nothing was promised.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dynamoe_lab.disk import TEMPORARY_VARIABLE, told_when_full
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.files import with_paths
from dynamoe_lab.workbench.inventory import find_run
from dynamoe_lab.workbench.records import RECORD_NAME, Record, StepUse, load_record, missing_files, place_text
from dynamoe_lab.workbench.repeatable import EXCEPTED_RESULTS, compare_tables, excepted_columns
from dynamoe_lab.workbench.stale import other_since, stale_because
from dynamoe_lab.workbench.terminal import table_text

__all__ = ["Comparison", "check_runs", "compare_runs", "find_runs", "not_promised"]

_SIX = ", to six digits: the record has no more"
SHARED = ("assets", "models", "wheels")  # of the cache: downloaded, or made from downloads


@dataclass
class Comparison:
    """One table, number, text or step of a run, then and now."""

    kind: str  # table, number, text, step, run
    name: str
    equal: bool
    text: str = ""  # what was compared, or the first difference
    excepted: dict[str, str] = field(default_factory=dict)  # columns left out -> reason


def find_runs(names: Sequence[str], reports: Path) -> list[Path]:
    """Folders of runs: of `quick/04` or a path one, of a report (`quick`, `reports/quick`) all. Raises `InputError` for what is neither."""
    found: list[Path] = []
    for name in names:
        places = [Path(name), reports / name]
        report = next((place for place in places if any(place.glob(f"*/{RECORD_NAME}")) and not (place / RECORD_NAME).exists()), None)
        folders = sorted(place.parent for place in report.glob(f"*/{RECORD_NAME}")) if report else [find_run(name, reports)]
        found += [folder for folder in folders if folder not in found]
    return found


def check_runs(
    folders: Sequence[Path],
    *,
    home: Path,
    root: Path,
    say: Callable[[str], None] = print,
    keep: Path | None = None,
    trust_remote_code: bool = False,
) -> bool:
    """Run the notebooks of these runs again and say a line for everything compared; True if all of it is equal.

    Of several runs those that did not end well are named and left out; one that cannot be read or repeated is a difference.

    Args:
        home: the cache whose assets and models are shared.
        root: of the project.
        keep: a new or empty folder for the rerun's report; None: it is removed.
        trust_remote_code: also repeat runs that trusted the code of a model or a task. A record does not decide that: it may come from
            anywhere, and names the code itself.

    Raises:
        InputError: the one record cannot be read, or its run not be repeated; the run, or all of them, did not end well or lack files;
            `keep` is not empty; no space left.
    """
    runs, wrong = [], 0
    for folder in folders:
        try:
            record = load_record(folder)
        except InputError as error:
            if len(folders) == 1:
                raise
            say(str(error))
            wrong += 1
            continue
        reason = _ENDED.get(record.run.status, "did not end well") if record.run.status != "ok" else ""
        if damaged := missing_files(record, folder):
            reason = reason or f"ran, and {', '.join(damaged)} is gone or changed since"
        if not reason:
            runs.append((folder, record))
            continue
        told = f"{folder.parent.name}/{folder.name}: nothing to compare with, it {reason}; run it again first"
        if len(folders) == 1:
            raise InputError(told)
        say(told)
    if not runs:
        raise InputError("none of these runs ended well; run them again first")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise InputError(f"--keep {keep}: not empty; give a new folder")
    with tempfile.TemporaryDirectory(prefix="dynamoe-lab-check-") as name, _variables(**{TEMPORARY_VARIABLE: name}):
        scratch = Path(name)
        with told_when_full(scratch, ""):
            fresh, report = _fresh_home(home, scratch / "home"), keep or scratch / "report"
            for number, (folder, record) in enumerate(runs):
                for note in not_promised(record, folder, root):
                    say(f"{record.run.name}  {note}: equality is not promised")
                try:
                    compared = _again(record, folder, fresh, report, scratch / str(number), home, trust_remote_code)
                except InputError as error:
                    if len(folders) == 1:
                        raise
                    compared = [Comparison("run", record.run.name, False, f"it cannot be repeated: {error}")]
                wrong += sum(not entry.equal for entry in compared)
                say(_told(record, compared))
    return not wrong


_ENDED = {"failed": "failed", "running": "is running, or was interrupted", "interrupted": "was interrupted"}


def not_promised(record: Record, folder: Path, root: Path) -> list[str]:
    """Why the rerun of a record may give other digits: other code, notebook, inputs, versions, machine, or what it says itself."""
    notes = [*stale_because(record, folder, root), *other_since(record)]
    notes += [reason for reason in record.env.unrepeatable if not reason.endswith("by other code")]  # said above, with the rooms
    if record.env.threads and record.env.threads > environment.usable_cores():
        notes.append(f"made with {plural(record.env.threads, 'thread')}, this machine has {plural(environment.usable_cores(), 'core')}")
    if not record.run.key:
        notes.append("made in JupyterLab or by papermill, its notebook's parameters are not known: defaults are taken")
    return list(dict.fromkeys(notes))


# --- the rerun ---------------------------------------------------------------------------------------------------------------------


def _fresh_home(home: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in SHARED:
        (home / name).mkdir(parents=True, exist_ok=True)  # what is fetched now is kept
        (folder / name).symlink_to((home / name).resolve(), target_is_directory=True)
    return folder


def _again(record: Record, folder: Path, fresh: Path, report: Path, scratch: Path, home: Path, trust_remote_code: bool) -> list[Comparison]:
    from dynamoe_lab.workbench.notebooks import OK, prepare, run_notebooks, select

    run, threads = record.run, record.env.threads
    (notebook,) = select([run.name])
    if notebook.stem != run.name:
        raise InputError(f"no notebook {run.name!r} in this project; it may have been renamed to {notebook.stem}")
    scratch.mkdir()
    profile = scratch / f"{_file_name(run.profile)}.yaml"  # the experiment as it was, whatever the profile holds today
    config = with_paths({**run.config, "threads": threads}, home)
    profile.write_text(json.dumps({name: value for name, value in config.items() if name not in ("profile", "notebooks")}), "utf-8")
    given = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in with_paths(run.parameters, home).items()]
    given.append(f"overrides={json.dumps(with_paths(run.overrides, home))}")
    asked = {"profile": str(profile), "given": given, "output": report}
    with _variables(DYNAMOE_LAB_HOME=str(fresh), OMP_NUM_THREADS=str(threads) if threads else None):
        if not trust_remote_code and any(job.trusts for job in prepare([notebook], **asked)):
            raise InputError(
                f"{run.name}: its record trusts Python code that comes with a model or a task (trust_remote_code); read that code, then "
                "give --trust-remote-code to run it"
            )
        statuses = run_notebooks([run.name], **asked)
    if statuses[run.name] != OK:
        error = load_record(report / run.name).run.error
        reason = f": {error.type}{place_text(error)}: {error.message}" if error is not None else ""
        return [Comparison("run", run.name, False, f"the rerun ended as {statuses[run.name]}{reason}")]
    return compare_runs(folder, report / run.name)


def _file_name(profile: str) -> str:
    """A profile's name as that of a file beside us: in a record from elsewhere it may be a path to anywhere."""
    return re.sub(r"[^\w.-]+", "-", profile).strip(".-")[:60] or "profile"


@contextmanager
def _variables(**values: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    try:
        os.environ.update({name: value for name, value in values.items() if value is not None})
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- the comparison ----------------------------------------------------------------------------------------------------------------


def compare_runs(then: Path, now: Path) -> list[Comparison]:
    """Everything of two runs of one notebook that has to be equal, in the order of the first record. Raises as `load_record`."""
    old, new = load_record(then), load_record(now)
    found = _compare_inputs(old, new) + _compare_steps(old.results.steps, new.results.steps)
    later = {artifact.stem: artifact for artifact in new.artifacts}
    for artifact in old.artifacts:
        name, other = artifact.stem, later.pop(artifact.stem, None)
        if other is None:
            found.append(Comparison("table", name, False, "it is not there now"))
        elif any(entry.name == f"{name}.csv" for entry in artifact.files):
            table = compare_tables(then / f"{name}.csv", now / f"{name}.csv")
            equal, text = table.equal, table.text
            if equal and artifact.exact and other.exact and artifact.exact != other.exact:
                equal, text = False, "differs beyond the six digits of its csv"
            elif equal:
                text += "" if artifact.exact and other.exact else _SIX
            found.append(Comparison("table", name, equal, text, table.excepted))
        else:
            same = (then / f"{name}.html").read_bytes() == (now / f"{name}.html").read_bytes()
            found.append(Comparison("text", name, same, "" if same else "other text"))
    found += [Comparison("table", name, False, "it was not there then") for name in later]
    return found + _compare_numbers(old, new)


def _compare_inputs(old: Record, new: Record) -> list[Comparison]:
    """Texts and models that the steps were given; only differences, for equal ones show in the steps' keys."""
    marks = new.env.fingerprints
    return [
        Comparison("input", name, False, "another text or model went in")
        for name, mark in old.env.fingerprints.items()
        if name in marks and marks[name] != mark
    ]


def _compare_steps(old: Sequence[StepUse], new: Sequence[StepUse]) -> list[Comparison]:
    """Steps in order: the same key says that the same went in, weights among it; digests say that the same came out."""
    found = []
    for number in range(max(len(old), len(new))):
        if number >= len(new) or number >= len(old):
            use = (old if number < len(old) else new)[number]
            found.append(Comparison("step", use.function, False, f"it was called only {'then' if number < len(old) else 'now'}"))
            continue
        first, second = old[number], new[number]
        if first.times or second.times:
            continue  # the key has the machine's name, the result is times
        if (first.function, first.key) != (second.function, second.key):
            text = f"other inputs (key {first.key[:16]} then, {second.key[:16]} now)"
            found.append(Comparison("step", first.function, False, text if first.function == second.function else "other steps"))
            continue
        common = [name for name in first.digests if name in second.digests]
        odd = [name for name in common if first.digests[name] != second.digests[name]]
        what = "weights" if any(name.endswith(".safetensors") for name in odd) else "result"
        same = f"{_counted(common)} equal" if common else "the same inputs; the record has no digest of what came out"
        found.append(Comparison("step", first.function, not odd, f"other {what}: {', '.join(odd)}" if odd else same))
    return found


def _counted(names: Sequence[str]) -> str:
    weights = sum(name.endswith(".safetensors") for name in names)
    parts = ["result"] * ("result" in names) + [f"{plural(weights, 'file')} of weights"] * bool(weights)
    return " and ".join(parts)


def _compare_numbers(old: Record, new: Record) -> list[Comparison]:
    found, later = [], {scalar.name: scalar for scalar in new.results.scalars}
    for scalar in old.results.scalars:
        other = later.pop(scalar.name, None)
        if excepted_columns("", [scalar.name], EXCEPTED_RESULTS):
            continue
        values = [(place, getattr(scalar, place), getattr(other, place, None)) for place in ("value", "low", "high", "n")]
        odd = [f"{place} {then!r} then, {now!r} now" for place, then, now in values if repr(then) != repr(now)]
        found.append(Comparison("number", scalar.name, not odd, odd[0] if odd else repr(scalar.value)))
    return found + [Comparison("number", name, False, "it was not there then") for name in later]


def _told(record: Record, compared: Sequence[Comparison]) -> str:
    """A line for everything compared, equal steps together, and the verdict."""
    shown = [entry for entry in compared if entry.kind != "step" or not entry.equal]
    rows = [("equal" if entry.equal else "differs", entry.kind, entry.name, entry.text) for entry in shown]
    alike: dict[str, list[str]] = {}
    for entry in compared:
        if entry.kind == "step" and entry.equal:
            alike.setdefault(entry.text, []).append(entry.name)
    for text, names in reversed(alike.items()):
        rows.insert(0, ("equal", "steps", f"{len(names)}", f"{text}: {', '.join(dict.fromkeys(names))}"))
    left_out: dict[str, tuple[dict, dict]] = {}  # reason -> columns, tables
    for entry in compared:
        for column, reason in entry.excepted.items():
            columns, stems = left_out.setdefault(reason, ({}, {}))
            columns[column] = stems[entry.name] = None
    wrong = sum(not entry.equal for entry in compared)
    lines = [f"  {line}" for line in table_text(("", "what", "name", ""), rows).splitlines()[1:]]
    lines += [f"  not compared, {why}: {', '.join(columns)} of {', '.join(stems)}" for why, (columns, stems) in left_out.items()]
    whole = not any(entry.text.endswith(_SIX) for entry in compared)
    verdict = (
        f"{wrong} of {len(compared)} differ" if wrong else f"all equal, {'to the last digit' if whole else 'as far as the record goes'}"
    )
    threads = f", {plural(record.env.threads, 'thread')}" if record.env.threads else ""
    return "\n".join([f"{record.run.name}  {verdict}  (seed {record.run.config.get('seed')}{threads})", *lines])
