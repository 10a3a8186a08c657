"""`start` and `Run`: a notebook's side of the workbench. It resolves the experiment, runs steps, and writes figures with their record.

    run = lab.start("04_router_confusion", profile=profile, overrides=overrides, output=output)
    routing = run.step(lab.trace_routing, model, blocks)
    run.figure(ax, "router_confusion", data=frame, caption="...")
    run.finish()

The record is written after every call, so a run that dies shows what it had; without `finish` it reads as interrupted, never as done.
"""

import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.allocator import keep_freed_memory
from dynamoe_lab.workbench.drawn import figure_files, frame_csv
from dynamoe_lab.workbench.files import hold, let_go, remove_leftovers, told_when_full, without_paths, write_atomic
from dynamoe_lab.workbench.handover import RUNNER_VARIABLE, interactive, notebook_lock, own_results, running_cell
from dynamoe_lab.workbench.holds import hold_cache
from dynamoe_lab.workbench.memory import peak_memory
from dynamoe_lab.workbench.provenance import record_environment, step_use, why_unrepeatable
from dynamoe_lab.workbench.records import (
    Artifact,
    Finding,
    Place,
    Record,
    RunInfo,
    Scalar,
    StoredFile,
    missing_files,
    now,
    process_identity,
)
from dynamoe_lab.workbench.repeatable import exact_digest
from dynamoe_lab.workbench.runlog import LOG_NAME
from dynamoe_lab.workbench.steps import recorded_inputs, run_step

if TYPE_CHECKING:
    import pandas as pd

    from dynamoe_lab.config import Experiment
    from dynamoe_lab.workbench.sweep import SweepResult

__all__ = ["Run", "run_command", "start"]


def start(name: str, profile: str = "quick", overrides: Iterable[str] = (), output: str | Path | None = None) -> "Run":
    """Open the run of one notebook: resolve its experiment, set threads and seeds, begin its record.

    Args:
        name: the notebook's name without suffix; results go to `<report folder>/<name>`.
        profile: a file of `configs/`, or a path to a YAML file of differences.
        overrides: experiment fields, e.g. `["dynamoe.theta=0.8"]`.
        output: the report folder; relative paths start at the project root; empty or None: `reports/<profile>`.

    Raises:
        InputError: a name that is no file name, an unknown profile or field, an impossible value.

    Example:
        >>> from pathlib import Path
        >>> run = lab.start("my_study", profile="smoke", output=Path("results").absolute())
        >>> run.result("answer", 42, n=1)
        >>> run
        Run('my_study', profile='smoke', status='running')
    """
    from dynamoe_lab.config import load_experiment, project_root

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"start({name!r}): the name becomes a folder; use letters, digits, '_', '-' and '.'")
    expected = os.environ.get(RUNNER_VARIABLE)
    if expected and expected != name:
        raise InputError(f"start({name!r}): this notebook is {expected}; give its own name, or it overwrites another's results")
    overrides = [str(override) for override in overrides]
    experiment = load_experiment(profile, overrides)
    root = project_root()
    report = root / (output or Path("reports") / experiment.profile)
    command = run_command(name, profile, overrides, report, root)
    return Run(name, experiment, report / name, root, command=command, overrides=overrides, profile=profile)


def run_command(name: str, profile: str, given: Iterable[str], report: Path, root: Path) -> str:
    """The shell line that makes a notebook's results again; `given` are its `-p` pairs, `report` its report folder."""
    words = ["dynamoe-lab", "run", name, "--profile", profile]
    for pair in given:
        words += ["-p", pair]
    if report != root / "reports" / Path(profile).stem:
        words += ["--output", report.relative_to(root).as_posix() if report.is_relative_to(root) else str(report)]
    return without_paths(shlex.join(words), root)


class Run:
    """An open run; made by `start`. `experiment` is the resolved experiment, `folder` where results go, `record` what is known so far.

    Example:
        >>> from pathlib import Path
        >>> run = lab.start("my_study", profile="smoke", output=Path("results").absolute())
        >>> run.table(pd.DataFrame({"layer": [0], "share": [0.5]}), "shares", caption="Shares of the first layer.")
        >>> run.finding("Half of it runs.", source="shares")
        Half of it runs.
        >>> run.finish()
        my_study  ok  1 table, 1 finding  in ...
    """

    def __init__(
        self,
        name: str,
        experiment: "Experiment",
        folder: Path,
        root: Path,
        *,
        command: str,
        overrides: list[str],
        profile: str,
    ):
        from dynamoe_lab.assets import home

        self.name, self.experiment, self.folder = name, experiment, folder
        self._root, self._clock, self._lock = root, time.perf_counter(), None
        self._profile, self._overrides = profile, overrides  # as they were given: a sweep's cells start from them
        keep_freed_memory()
        self._seed()
        pid, process_started = process_identity()
        info = RunInfo(
            name=name,
            profile=experiment.profile,
            command=command,
            overrides=without_paths(overrides, root),
            config=without_paths(asdict(experiment), root),
            started=now(),
            pid=pid,
            process_started=process_started,
        )
        self.record = Record(run=info, env=record_environment(experiment, root))
        if not os.environ.get(RUNNER_VARIABLE):  # the runner holds it for us
            self._lock, told = notebook_lock(folder, root)
            hold(self._lock, refuses=told)
            remove_leftovers(folder)
            for name in (LOG_NAME, f"{LOG_NAME}.1"):  # of an earlier run, by a runner; this one writes no log
                (folder / name).unlink(missing_ok=True)
        with told_when_full(folder, "free some, or choose another output"):
            folder.mkdir(parents=True, exist_ok=True)
        self._write()
        hold_cache(home())  # what a notebook loads before its first step, too

    def __repr__(self) -> str:
        return f"Run({self.name!r}, profile={self.experiment.profile!r}, status={self.record.run.status!r})"

    # --- what a notebook calls ---------------------------------------------------------------------------------------------------

    def step(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a library function through the step cache (see `steps.run_step`).

        Returns what the function returns; `(value, folder)` if it has a parameter `output_dir`. Arguments are never changed: a function
        that trains in place works on a copy, and what it made is loaded from the folder.
        """
        from dynamoe_lab.assets import home

        self._seed()  # a step's result must not depend on which steps were computed, not read, before it
        self._write(step=getattr(function, "__name__", ""))
        done = run_step(function, args, kwargs, home=home())
        self.record.results.steps.append(step_use(function, done))
        self.record.env.fingerprints |= recorded_inputs(function, done)
        self._write()
        return done.value

    def sweep(
        self,
        axes: Mapping[str, Sequence] | None = None,
        *,
        cells: Sequence[Mapping[str, Any]] | None = None,
        file: str | Path | None = None,
        modes: Sequence[str | int] | None = None,
        overrides: Iterable[str] = (),
        jobs: int | None = None,
    ) -> "SweepResult":
        """Run variants of this run's experiment as a sweep (see `sweep.run_sweep`): what is finished is read, the rest shares the cores.

        Args:
            axes: field -> values, e.g. `{"dynamoe.theta": [0.8, 0.9]}`: a grid. A value here goes before one that the run was given.
            cells: single cells, beside the grid or instead of it; an empty list without axes is a sweep without cells, not a mistake, for a
                notebook may compute them.
            file: a sweep file or its name instead of both; its profile does not count, the run has one.
            modes: who chooses the experts on the held-out text: "router" (the default), "label", "full", "random", an expert's index.
            overrides: experiment fields for every cell.
            jobs: cells at a time; None: as many as pairs of cores and memory allow.

        Returns:
            The result: `.table` (table `sweep`) and `.cells`, each with its `settings`, traces and losses. The record keeps the steps and
            the fingerprints of what they were given (where cells differ, one after the other, joined by " | ").

        Raises:
            InputError: before anything runs, for what `Sweep.resolve` refuses.
            SweepFailed: at the end, naming every cell that failed; what the others computed is kept.
        """
        from dynamoe_lab.assets import home
        from dynamoe_lab.workbench.sweep import Sweep, SweepFailed, load_sweep, run_plans

        if file is not None:
            if axes is not None or cells is not None:
                raise InputError("run.sweep: give axes and cells, or a file, not both")
            sweep = load_sweep(file)
            sweep.modes = list(modes or sweep.modes)
        else:
            sweep = Sweep(name=self.name, axes=dict(axes or {}), cells=list(cells or []), modes=list(modes or ["router"]))
        none_wanted = cells is not None and not sweep.cells and not sweep.axes
        plans = [] if none_wanted else sweep.resolve(self._profile, [*self._overrides, *overrides])
        self._write(step="sweep")
        result = run_plans(sweep, plans, jobs=jobs, home=home())
        self._seed()
        uses = {}
        for use in (use for outcome in result.outcomes for use in outcome.steps):
            if use.key not in uses or not use.cached:  # cells share steps: one of them computed it
                uses[use.key] = use
        self.record.results.steps += uses.values()
        marks: dict[str, dict[str, None]] = {}
        for name, mark in (item for outcome in result.outcomes for item in outcome.fingerprints.items()):
            marks.setdefault(name, {})[mark] = None  # once each, in order
        self.record.env.fingerprints |= {name: " | ".join(found) for name, found in marks.items()}
        self._write()
        if result.failed:
            raise SweepFailed(f"{len(result.failed)} of {len(result.outcomes)} cells failed: {'; '.join(map(str, result.failed))}")
        return result

    def html(self, fragment: str, stem: str, *, caption: str) -> None:
        """Write a fragment of HTML, e.g. of `render_tokens`, as `<stem>.html`, sanitized; the report shows it in place.

        Raises `InputError` as `figure` does.
        """
        from dynamoe_lab.workbench.export import clean_fragment

        self._check(stem, caption)
        self._store(self.record.results.fragments, stem, caption, {f"{stem}.html": (clean_fragment(fragment) + "\n").encode("utf-8")})

    def figure(self, ax: Any, stem: str, *, data: "pd.DataFrame", caption: str) -> None:
        """Write a figure as `<stem>.png` (150 dpi), `<stem>.svg` and the frame it draws as `<stem>.csv`.

        Args:
            ax: Axes, an array of Axes, or the Figure; it is not shown and not closed here.
            stem: file name without suffix, once a run.
            data: the frame that is drawn, <= 1 MB as csv.
            caption: one or two sentences that say what the reader sees.

        Raises:
            InputError: a stem used twice or no file name; data too large (aggregate it); no caption.
        """
        self._check(stem, caption)
        contents = {f"{stem}.csv": frame_csv(data, stem), **figure_files(ax, stem)}
        self._store(self.record.results.figures, stem, caption, contents, data)

    def table(self, frame: "pd.DataFrame", stem: str, *, caption: str) -> None:
        """Write a frame as `<stem>.csv` (<= 1 MB); the report shows it as a table. Raises `InputError` as `figure` does."""
        self._check(stem, caption)
        self._store(self.record.results.tables, stem, caption, {f"{stem}.csv": frame_csv(frame, stem)}, frame)

    def result(
        self, name: str, value: float, *, n: int | None = None, low: float | None = None, high: float | None = None, unit: str = ""
    ) -> None:
        """Record one number, where there are such with its interval [low, high] and sample size n. Raises `InputError` if it is none."""
        scalars = self.record.results.scalars
        if any(scalar.name == name for scalar in scalars):
            self._refuse_twice(f"result {name!r}")
            scalars[:] = [scalar for scalar in scalars if scalar.name != name]
        numbers = {"value": value, "n": n, "low": low, "high": high}
        for place, number in numbers.items():
            numbers[place] = number.item() if hasattr(number, "item") else number
            if not isinstance(numbers[place], (int, float)) and not (place != "value" and number is None):
                raise InputError(f"result {name!r}: {place} = {number!r} is no number")
        if n is not None:
            numbers["n"] = int(numbers["n"])
        scalars.append(Scalar(name=name, unit=unit, **numbers))
        self._write()

    def finding(self, sentence: str, *, source: str, headline: bool = False) -> None:
        """Record and print a sentence that was computed from the figure or table `source` (a stem); a `headline` opens the report."""
        known = [artifact.stem for artifact in self.record.artifacts]
        if source not in known:
            raise InputError(f"finding: no figure or table {source!r} in this run yet; there is {', '.join(known) or 'none'}")
        finding, findings = Finding(" ".join(str(sentence).split()), source, headline), self.record.results.findings
        print(finding.sentence, flush=True)
        findings[:] = [known for known in findings if (known.sentence, known.source) != (finding.sentence, source)] + [finding]
        self._write()

    def finish(self) -> None:
        """Check that all files are there, remove those of earlier runs that this one did not make again, set the status, print one line.

        Files that no run made stay. Raises `InputError` if a file of this run is gone or was changed, or if another run wrote here since.
        """
        with self._writing():
            self._complete()
        if self._lock is not None:
            let_go(self._lock)
        results = self.record.results
        counts = {
            "figure": results.figures,
            "table": results.tables,
            "text": results.fragments,
            "result": results.scalars,
            "finding": results.findings,
        }
        parts = [plural(len(found), kind) for kind, found in counts.items() if found]
        print(without_paths(f"{self.name}  ok  {', '.join(parts) or 'nothing recorded'}  in {self.folder}", self._root), flush=True)

    # --- inside ------------------------------------------------------------------------------------------------------------------

    def _complete(self) -> None:
        if missing := missing_files(self.record, self.folder):
            raise InputError(f"{self.name}: {', '.join(missing)} is gone or was changed since it was written; run the notebook again")
        run = self.record.run
        for name in {*run.earlier} - {*self.record.artifact_files}:
            if (path := self.folder / name).is_file():
                path.unlink()
        run.status, run.finished, run.earlier = "ok", now(), []
        run.seconds = round(time.perf_counter() - self._clock, 3)
        self.record.env = record_environment(self.experiment, self._root, self.record.env.fingerprints)  # torch may have come meanwhile
        self.record.env.unrepeatable = why_unrepeatable(self.record, self.experiment)
        self._write()

    def _check(self, stem: str, caption: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", stem) or stem in ("record", "notebook", "index"):
            raise InputError(f"stem {stem!r}: it becomes a file name; use small letters, digits and '_', not record, notebook or index")
        if not caption.strip():
            raise InputError(f"{stem}: give a caption, one or two sentences that say what the reader sees")
        if any(artifact.stem == stem for artifact in self.record.artifacts):
            self._refuse_twice(f"stem {stem!r}")

    def _refuse_twice(self, what: str) -> None:
        """Two cells that use one name are a mistake, but in JupyterLab a person runs the same cell again."""
        if os.environ.get(RUNNER_VARIABLE) or not interactive():
            raise InputError(f"{self.name}: {what} is used twice in this run; give each its own name")

    def _store(
        self, shelf: list[Artifact], stem: str, caption: str, contents: dict[str, bytes], frame: "pd.DataFrame | None" = None
    ) -> None:
        with self._writing(), told_when_full(self.folder, "free some, or choose another output"):
            for name, content in contents.items():
                write_atomic(self.folder / name, content)
            replaced = [file.name for known in self.record.artifacts if known.stem == stem for file in known.files]
            self.record.run.earlier += [name for name in replaced if name not in contents]
            for other in (self.record.results.figures, self.record.results.tables, self.record.results.fragments):
                other[:] = [artifact for artifact in other if artifact.stem != stem]
            files = [StoredFile.of(self.folder / name) for name in contents]
            shelf.append(Artifact(stem, " ".join(caption.split()), files, "" if frame is None else exact_digest(frame, stem)))
            self._write()

    def _writing(self) -> AbstractContextManager[None]:
        return own_results(self.record, self.folder, self._root, locks=self._lock is not None)

    def _write(self, step: str = "") -> None:
        """Write the record; `step`: what starts now, for whoever reads the record of a run that was killed in it."""
        run = self.record.run
        run.peak_memory_bytes = peak_memory()
        run.at = Place(*running_cell(), step=step) if run.status == "running" else None
        with self._writing(), told_when_full(self.folder, "free some, or choose another output"):
            self.record.write(self.folder)

    def _seed(self) -> None:
        environment.seed_generators(self.experiment.seed, self.experiment.threads)
