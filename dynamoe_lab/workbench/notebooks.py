"""Notebooks, headless: find them, check what was asked, run what is not up to date, keep the executed notebook and the true status.

    statuses = run_notebooks(["04", "05"], profile="quick", given=["dynamoe.theta=0.8"])

Everything a person may have typed wrong is found before the first kernel starts. A notebook whose code, parameters, experiment, package
code and result files are those of its last good run is skipped. One that fails is recorded as failed, with its cell; the next one runs.
"""

import difflib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.files import (
    disk_full,
    locked,
    no_space,
    remove_leftovers,
    require_writable,
    told_when_full,
    without_paths,
    write_atomic,
)
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.handover import notebook_lock
from dynamoe_lab.workbench.named_files import named_files, sweep_mark
from dynamoe_lab.workbench.parameters import (
    Parameter,
    profile_values,
    read_parameters,
    split_given,
    unknown_parameter,
    whole_number,
)
from dynamoe_lab.workbench.records import (
    Record,
    RunError,
    RunInfo,
    StoredFile,
    load_record,
    missing_files,
    now,
    place_text,
    process_identity,
)
from dynamoe_lab.workbench.runlog import RunLog
from dynamoe_lab.workbench.session import run_command
from dynamoe_lab.workbench.stale import stale_steps
from dynamoe_lab.workbench.terminal import seconds_text

__all__ = ["Job", "discover", "notebook_number", "prepare", "report_folder", "run_notebook", "run_notebooks", "select"]

OK, FAILED, BAD_INPUT, UP_TO_DATE = "ok", "failed", "bad input", "up to date"


@dataclass
class Job:
    """One notebook with everything that was asked of it, checked."""

    name: str
    nb: Any  # nbformat.NotebookNode
    folder: Path  # <report folder>/<name>
    root: Path
    values: dict[str, Any]  # what papermill injects
    own: dict[str, Any]  # those of them that only this notebook has
    config: dict[str, Any]  # the resolved experiment
    inputs: dict[str, str]  # local files and folders that it names -> their digest
    swept: dict[str, str]  # the sweep that it names -> hash of what that asks for
    trusts: bool  # the experiment, or a cell of its sweep, may run the code that comes with a model or a task
    profile: str
    command: str
    source: str  # hash of the code cells
    key: str  # hash of everything the results depend on


def discover() -> list[Path]:
    """The notebooks of the project, in order of their names."""
    from dynamoe_lab.config import project_root

    return sorted(path for path in (project_root() / "notebooks").glob("*.ipynb") if not path.name.startswith("."))


def select(names: Iterable[str]) -> list[Path]:
    """Notebooks by name (`04_router_confusion`), number (`04`, `4`) or file name; no names: all. `InputError` with the nearest name."""
    known, chosen = discover(), []
    if not known:
        raise InputError("no notebooks/*.ipynb in this project: run inside a checkout of dynamoe-lab")
    for name in names:
        wanted = Path(name).name.removesuffix(".ipynb")
        number = whole_number(wanted)
        matches = [path for path in known if path.stem == wanted or (number is not None and notebook_number(path.stem) == number)]
        if not matches:
            near = difflib.get_close_matches(wanted[:100], [path.stem for path in known], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(path.stem for path in known)}"
            raise InputError(f"no notebook {name!r}; {hint}")
        chosen += [path for path in matches if path not in chosen]
    return chosen or known


def notebook_number(stem: str) -> int | None:
    """4 for `04_router_confusion`; None for a name without a number."""
    return whole_number(stem.split("_")[0])


def report_folder(profile: str, output: str | Path | None) -> Path:
    """Where a run's report goes: `output` (relative to the working directory), else `reports/<profile>` of the project."""
    from dynamoe_lab.config import project_root

    return Path(os.path.abspath(output)) if output else project_root() / "reports" / Path(profile).stem


def prepare(paths: Sequence[Path], *, profile: str = "quick", given: Sequence[str] = (), output: str | Path | None = None) -> list[Job]:
    """Check names, types and values for all notebooks; nothing is run. Raises `InputError` for the first thing that does not fit."""
    import nbformat

    from dynamoe_lab.config import field_names, load_experiment, project_root, read_profile

    root, report, fields = project_root(), report_folder(profile, output), field_names()
    chosen = read_profile(profile)[1]
    for name in chosen:
        if name not in (stems := [path.stem for path in discover()]):
            near = difflib.get_close_matches(str(name), stems, n=1, cutoff=0.4)
            raise InputError(
                f"profile {profile}: notebooks.{name}: no such notebook; " + (f"did you mean {near[0]}?" if near else "see notebooks/")
            )
    notebooks: list[tuple[str, Any, dict[str, Parameter]]] = []
    for path in paths:
        try:
            nb = nbformat.read(path, as_version=4)
        except Exception as error:  # nbformat raises what its parser and its validator raise
            raise InputError(f"notebooks/{path.name}: not a readable notebook ({first_line(error)}); restore it or save it anew") from error
        notebooks.append((path.stem, nb, read_parameters(nb, f"notebooks/{path.name}")))
    jobs, unread = [], set(given)
    for name, nb, parameters in notebooks:
        typed, overrides, unknown = split_given(given, parameters, fields)
        unread &= set(unknown)
        values = profile_values(chosen.get(name), parameters, f"profile {profile}: notebooks.{name}") | typed
        experiment = load_experiment(profile, [*values.get("overrides", parameters["overrides"].default), *overrides])
        own = {key: value for key, value in values.items() if key != "overrides"}
        values = {
            **values,
            "profile": _seen_from(root, Path(os.path.abspath(profile))) if Path(profile).suffix in (".yaml", ".yml") else profile,
            "overrides": [*values.get("overrides", parameters["overrides"].default), *overrides],
            "output": _seen_from(root, report),
        }
        swept, trusts = {}, experiment.trust_remote_code
        if "sweep" in parameters:
            sweep = str(values.get("sweep", parameters["sweep"].default))
            mark, foreign = sweep_mark(sweep)
            values["sweep"] = _seen_from(root, Path(os.path.abspath(sweep))) if Path(sweep).suffix in (".yaml", ".yml") else sweep
            swept, trusts = {values["sweep"]: mark}, trusts or foreign
        config = asdict(experiment)
        source = fingerprint([cell.source for cell in nb.cells if cell.cell_type == "code"])
        inputs = named_files(config, {parameter: values.get(parameter, item.default) for parameter, item in parameters.items()}, root)
        asked = {k: v for k, v in values.items() if k != "output"}
        key = fingerprint([source, asked, config, "".join(swept.values()), environment.code_digest(), *([inputs] if inputs else [])])
        pairs = [pair for pair in given if pair not in unknown]
        command = run_command(name, profile, pairs, report, root)
        jobs.append(Job(name, nb, report / name, root, values, own, config, inputs, swept, trusts, profile, command, source, key))
    for pair in given:
        if pair in unread:
            everyone = {parameter for _, _, parameters in notebooks for parameter in parameters}
            raise unknown_parameter(pair, sorted(everyone), fields, notebooks[0][0] if len(notebooks) == 1 else "these notebooks")
    return jobs


def _seen_from(root: Path, path: Path) -> str:
    """The path as the kernel, which works in `root`, has to be given it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def run_notebooks(
    names: Iterable[str] = (),
    *,
    profile: str = "quick",
    given: Sequence[str] = (),
    output: str | Path | None = None,
    force: bool = False,
    recompute: bool = False,
    every: float = 15.0,
    debug: bool = False,
) -> dict[str, str]:
    """Run notebooks one after the other; one that fails does not stop the next.

    Args:
        names: see `select`.
        given: `key=value` pairs, see `parameters.split_given`.
        output: the report folder; default `reports/<profile>`.
        force: run also what is up to date.
        recompute: the same, and compute again the steps that other code made (stale ones).
        debug: show the traceback of bad input, too.
        every: seconds between heartbeat lines.

    Returns:
        Name -> "ok", "up to date", "failed" or "bad input" (the notebook raised an `InputError`).

    Raises:
        InputError: before any kernel starts: unknown notebook, parameter or field, wrong type; another run writes this report.
    """
    jobs = prepare(select(names), profile=profile, given=given, output=output)
    report = jobs[0].folder.parent
    require_writable(report)
    shown = without_paths(str(report), jobs[0].root).removeprefix("./")
    statuses = {}
    with locked(report / "run.lock", refuses=f"{shown} is being written by pid {{pid}}; wait for it, or choose another --output"):
        for job in jobs:
            try:
                statuses[job.name] = run_notebook(job, force=force or recompute, recompute=recompute, every=every)
            except InputError as error:
                statuses[job.name] = BAD_INPUT
                if debug:
                    print("\n".join(getattr(error, "__notes__", ())), file=sys.stderr)
                print(f"dynamoe-lab: {error}", file=sys.stderr, flush=True)
    return statuses


def run_notebook(job: Job, *, force: bool = False, recompute: bool = False, every: float = 15.0) -> str:
    """Run one prepared notebook, or skip it if it is up to date; returns its status.

    Raises `InputError` if a cell did; the KeyboardInterrupt that stopped it after the kernel is shut down and the record says interrupted.
    """
    if not force and _up_to_date(job):
        print(f"{job.name}  {UP_TO_DATE}", flush=True)
        return UP_TO_DATE
    from dynamoe_lab.workbench.kernel import Interruption, execute

    began, clock = now(), time.perf_counter()
    lock, told = notebook_lock(job.folder, job.root)
    with told_when_full(job.folder, "free some, or choose another --output"), locked(lock, refuses=told):
        job.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(job.folder)
        pid, process_started = process_identity()
        info = RunInfo(name=job.name, profile=Path(job.profile).stem, started=began, pid=pid, process_started=process_started)
        Record(run=info).write(job.folder)
        saved = job.folder / ".running.ipynb"
        saved.unlink(missing_ok=True)  # of a runner that was killed
        with RunLog(job.folder, job.root) as log:
            log.line(job.command)
            error = execute(job.nb, saved, name=job.name, parameters=job.values, cwd=job.root, every=every, recompute=recompute, log=log)
            record = _close(job, saved, error, began, time.perf_counter() - clock)
            log.line("\n".join(_ending(record)))
    if isinstance(error, Interruption):
        raise error.stop
    error = record.run.error
    if error is None:
        print("\n".join(_ending(record)), flush=True)
        return OK
    if error.type == "InputError":
        told = InputError(f"{job.name}: {error.message}")
        told.add_note("\n".join(["Traceback (most recent call last, in the notebook):", *error.traceback]))
        raise told
    told, *lines = _ending(record)
    print(told, flush=True)
    print("\n".join(lines), file=sys.stderr, flush=True)
    return FAILED


def _ending(record: Record) -> list[str]:
    """How a run ended: one line, and one more about steps of other code, or those of the traceback."""
    run, error = record.run, record.run.error
    if error is None:
        told = "; ".join(stale_steps(record))
        return [
            f"{run.name}  {run.status}  {seconds_text(run.seconds or 0)}",
            *([f"{run.name}  {told}; --recompute computes them anew"] if told else []),
        ]
    return [f"{run.name}  {run.status}{place_text(error)}: {error.type}: {error.message}", *(f"    {line}" for line in error.traceback)]


def _up_to_date(job: Job) -> bool:
    try:
        record = load_record(job.folder)
    except InputError:  # none yet, or one that cannot be read: make it
        return False
    return record.run.status == OK and record.run.key == job.key and not missing_files(record, job.folder)


def _close(job: Job, saved: Path, error: RunError | None, began: str, seconds: float) -> Record:
    """Keep the executed notebook, and complete the record that the kernel left: how it ended is for us to say."""
    from dynamoe_lab.workbench.export import introduction
    from dynamoe_lab.workbench.kernel import INTERRUPTED

    record = load_record(job.folder)
    run = record.run
    if error is None and run.status == "running" and run.pid != os.getpid():
        error = RunError("Unfinished", "the notebook ended without run.finish(); add it as the last cell")
    if error is not None and run.at is not None and run.at.cell == error.cell:
        error.step = run.at.step
    run.title, run.question = introduction(job.nb)
    run.command, run.config = job.command, without_paths(json.loads(json.dumps(job.config)), job.root)
    run.parameters, run.overrides = without_paths([job.own, job.values["overrides"]], job.root)
    run.inputs, run.swept = without_paths([job.inputs, job.swept], job.root)
    own_profile = Path(job.profile).suffix in (".yaml", ".yml")  # else its name says which it is
    run.profile_path = without_paths(os.path.abspath(job.profile), job.root) if own_profile else ""
    run.status = OK if error is None else "interrupted" if error.type == INTERRUPTED else FAILED
    run.error = RunError(**without_paths(asdict(error), job.root)) if error is not None else None
    run.at = None
    run.started, run.finished, run.seconds = began, now(), round(seconds, 3)
    run.key, run.source = job.key, job.source
    try:
        record.results.notebook = _keep_notebook(job, saved)
        record.write(job.folder)
    except OSError as full:  # the executed notebook can go, how it ended has to be told
        if not disk_full(full):
            raise
        for path in (saved, job.folder / "notebook.ipynb", job.folder / "notebook.html"):
            path.unlink(missing_ok=True)
        record.results.notebook = []
        if error is None:
            run.status, run.key = FAILED, ""
            told = no_space(job.folder, "none for the executed notebook; free some, or choose another --output")
            run.error = RunError("InputError", without_paths(told, job.root))
        record.write(job.folder)
    return record


def _keep_notebook(job: Job, saved: Path) -> list[StoredFile]:
    """notebook.ipynb and notebook.html from what papermill saved on the way."""
    import nbformat

    from dynamoe_lab.workbench.export import notebook_html, tidied

    try:
        nb = tidied(nbformat.read(saved, as_version=4), job.root)
    except (FileNotFoundError, ValueError):  # the kernel never came up, or papermill could not save all of it
        saved.unlink(missing_ok=True)
        return []
    kept = [job.folder / "notebook.ipynb", job.folder / "notebook.html"]
    write_atomic(kept[0], nbformat.writes(nb) + "\n")
    write_atomic(kept[1], notebook_html(nb, job.name))
    saved.unlink()
    return [StoredFile.of(path) for path in kept]
