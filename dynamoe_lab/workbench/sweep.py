"""`run_sweep`: the cells of a sweep in local processes, and one tidy table of what they gave.

    result = run_sweep(load_sweep("importance"), home=home())
    result.table

Steps make it resumable: a cell whose steps are all there is only read, and a sweep that was stopped goes on from the steps that were done.
Processes come from joblib, so `joblib.parallel_config(backend=...)` sends the cells elsewhere. Each process gets its share of the cores as
torch threads (two torch jobs with all cores each take far longer than one after the other), or as many as the experiment's `threads` say.
A cell that fails does not stop the others.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.allocator import keep_freed_memory
from dynamoe_lab.workbench.cells import Cell, Inputs, run_cell
from dynamoe_lab.workbench.holds import hold_cache
from dynamoe_lab.workbench.provenance import step_use
from dynamoe_lab.workbench.records import StepUse
from dynamoe_lab.workbench.steps import find_step, recorded_inputs, run_step
from dynamoe_lab.workbench.sweep_file import Plan, Sweep, load_sweep, settings_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Outcome", "Sweep", "SweepFailed", "SweepResult", "load_sweep", "run_plans", "run_sweep"]

# Memory of a cell, in float32 sizes of its model: dense, converted, its copy in training, gradients and moments of the MLPs.
MODEL_COPIES = 4
CELL_MEMORY = 1.5 * 2**30  # bytes beside that: libraries, logits, text
CELL_CORES = 2  # torch shares one cell among two cores about as well as two processes do, which load and convert everything twice


class SweepFailed(RuntimeError):
    """Cells of a sweep failed; the message names each with its reason."""


@dataclass
class Outcome:
    """How one cell ended."""

    number: int
    settings: dict[str, Any]
    status: str = "ok"  # or "failed"
    error: str = ""  # one line: type and message
    traceback: str = ""  # of a failure that is not bad input
    seconds: float = 0.0  # of this sweep's work on it
    cached: bool = False  # every step was there already
    threads: int | None = None  # of torch
    steps: list[StepUse] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the blocks and models that its steps were given, as a record has them

    def __str__(self) -> str:
        return settings_text(self.settings) + (f": {self.error}" if self.error else "")


@dataclass
class SweepResult:
    """A finished sweep, with an outcome for every cell, in order."""

    sweep: Sweep
    plans: list[Plan]
    outcomes: list[Outcome]
    by_number: dict[int, Cell]  # those that ended well

    @property
    def cells(self) -> list[Cell]:
        """The cells that ended well, in order; each says its `settings`."""
        return [self.by_number[plan.number] for plan in self.plans if plan.number in self.by_number]

    @property
    def failed(self) -> list[Outcome]:
        """The cells that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    @cached_property
    def table(self) -> "pd.DataFrame":
        """Table `sweep`, see `sweep_table.sweep_table`; made when first asked for."""
        from dynamoe_lab.workbench.sweep_table import sweep_table

        return sweep_table(self)


class _NotThere(Exception):
    """A step that would have to be computed."""


def run_sweep(
    sweep: Sweep,
    *,
    profile: str | None = None,
    overrides: Iterable[str] = (),
    jobs: int | None = None,
    home: Path,
    progress: Callable[[str], None] | None = print,
) -> SweepResult:
    """Run every cell of a sweep that is not finished, and gather them all.

    Args:
        profile: instead of the file's.
        overrides: experiment fields for every cell, after the file's own.
        jobs: cells at a time; 1: one after the other in this process; None: as many as there are cells to do, pairs of cores, and memory
            for (on another device than the CPU: 1).
        home: the cache folder of the steps.
        progress: is told a line for every cell; None: nobody.

    Raises:
        InputError: before anything runs: what `Sweep.resolve` refuses, or an override of a field that the sweep varies.

    Example:
        >>> from pathlib import Path
        >>> small = ["train.steps=0", "data.heldout=tiny", "data.heldout_tokens=256", "data.calibration_tokens=256"]
        >>> sweep = lab.Sweep(name="two", axes={"dynamoe.theta": [0.5, 0.9]}, modes=["label"])
        >>> result = lab.run_sweep(sweep, profile="smoke", overrides=small, jobs=1, home=Path("steps").absolute(), progress=None)
        >>> result.table.loc[result.table["metric"] == "active_mlp_fraction", ["dynamoe.theta", "mode", "n", "status"]]
           dynamoe.theta   mode    n status
        1            0.5  label  2.0     ok
        3            0.9  label  2.0     ok
    """
    overrides = list(overrides)
    for override in overrides:
        if (name := override.partition("=")[0]) in sweep.fields:
            raise InputError(f"override {override!r}: sweep {sweep.name} varies {name}; change its values in the file")
    return run_plans(sweep, sweep.resolve(profile, overrides), jobs=jobs, home=home, progress=progress)


def run_plans(
    sweep: Sweep, plans: Sequence[Plan], *, jobs: int | None = None, home: Path, progress: Callable[[str], None] | None = print
) -> SweepResult:
    """`run_sweep` for cells that are resolved already."""
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs = {jobs}: give a number of at least 1, or leave it out")
    hold_cache(home)  # its models and text are loaded before the first step
    inputs, outcomes, cells = Inputs(), {}, {}

    def note(outcome: Outcome, cell: Cell | None) -> None:
        outcomes[outcome.number] = outcome
        if cell is not None:
            cells[outcome.number] = cell
        if progress is not None:
            how = "finished before" if outcome.cached and cell is not None else f"{outcome.seconds:.0f}s"
            progress(f"cell {len(outcomes)}/{len(plans)}  {outcome.status}  {outcome}  {how}")

    pending, largest = [], 0  # largest: bytes of a model in float32
    for plan in plans:
        try:
            note(*_attempt(plan, sweep.modes, inputs, home, only_cached=True))
        except _NotThere:
            pending.append(plan)
            largest = max(largest, sum(parameter.numel() * 4 for parameter in inputs.model(plan.experiment)[0].parameters()))
    on_cpu = all(plan.experiment.device == "cpu" for plan in pending)
    cores = max((plan.experiment.threads or CELL_CORES for plan in pending), default=CELL_CORES)
    jobs = min(jobs, len(pending)) if jobs else _jobs_that_fit(len(pending), largest, cores) if on_cpu else 1
    if jobs > 1:
        inputs.clear()  # the processes load their own
        with contextlib.closing(_in_processes(pending, sweep.modes, home, jobs)) as ended:
            for outcome, cell in ended:
                note(outcome, cell)
    else:
        for plan in pending:
            note(*_attempt(plan, sweep.modes, inputs, home))
    return SweepResult(sweep, list(plans), [outcomes[plan.number] for plan in plans], cells)


def _jobs_that_fit(cells: int, model_bytes: int, cores: int = CELL_CORES) -> int:
    import psutil

    fitting = int(psutil.virtual_memory().available // (MODEL_COPIES * model_bytes + CELL_MEMORY))
    return max(1, min(cells, environment.usable_cores() // cores, fitting))


# --- one cell ----------------------------------------------------------------------------------------------------------------------


def _attempt(
    plan: Plan, modes: Sequence, inputs: Inputs, home: Path, *, threads: int | None = None, only_cached: bool = False
) -> tuple[Outcome, Cell | None]:
    """Run one cell and say how it ended. With `only_cached`, raise `_NotThere` at the first step that would have to be computed."""
    outcome, clock = Outcome(plan.number, plan.settings, cached=only_cached), time.perf_counter()
    experiment = plan.experiment

    def step(function: Callable, *args: Any, **kwargs: Any) -> Any:
        environment.seed_generators(experiment.seed, threads or experiment.threads)  # as `Run.step` does
        if only_cached:
            found = find_step(function, args, kwargs, home=home)
            if found is None:
                raise _NotThere
        else:
            found = run_step(function, args, kwargs, home=home)
        outcome.steps.append(step_use(function, found))
        outcome.fingerprints |= recorded_inputs(function, found)
        return found.value

    cell = None
    try:
        cell = run_cell(experiment, modes=modes, step=step, inputs=inputs)
        cell.settings = dict(plan.settings)
    except _NotThere:
        raise
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        outcome.status = "failed"
        outcome.error = message if isinstance(error, InputError) else f"{type(error).__name__}: {message}"
        outcome.traceback = "" if isinstance(error, InputError) else traceback.format_exc()
    outcome.seconds = time.perf_counter() - clock
    outcome.threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    return outcome, cell


# --- in processes ------------------------------------------------------------------------------------------------------------------


def _in_processes(plans: Sequence[Plan], modes: Sequence, home: Path, jobs: int) -> Iterator[tuple[Outcome, Cell | None]]:
    """The cells as they end, in whatever order. Leaving it early, also by Ctrl-C, ends the processes; finished steps stay."""
    import joblib
    from joblib.parallel import get_active_backend

    backend, _ = get_active_backend()
    local = type(backend).__name__ == "LokyBackend"
    threads = max(1, environment.usable_cores() // jobs)
    started = {"backend": "loky", "inner_max_num_threads": threads} if local else {}  # for libraries that ask while they are imported
    unordered = "generator_unordered" if getattr(backend, "supports_return_generator", False) else "list"
    waiting, ended = {plan.number: plan for plan in plans}, False
    try:
        with joblib.parallel_config(**started) if local else contextlib.nullcontext():
            parallel = joblib.Parallel(n_jobs=jobs, return_as=unordered, batch_size=1, pre_dispatch="all")
            calls = (joblib.delayed(_work)(plan, list(modes), home, threads, os.getpid()) for plan in plans)
            for outcome, cell in parallel(calls):
                del waiting[outcome.number]
                yield outcome, cell
        ended = True
    except BrokenProcessPool:
        advice = f"a process of the sweep died (out of memory?); finished steps are kept, go on with --jobs {max(1, jobs // 2)}"
        for plan in waiting.values():
            yield Outcome(plan.number, plan.settings, "failed", advice), None
    finally:
        if local:  # joblib would keep them, with their models, for minutes
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor(reuse=True, kill_workers=True).shutdown(wait=True, kill_workers=not ended)


def _work(plan: Plan, modes: list, home: Path, threads: int, parent: int) -> tuple[Outcome, Cell | None]:
    """One cell in a process of its own, quiet, with its share of the cores; it ends when the process that wants the result is gone."""
    if os.getpid() == parent:  # a backend of threads
        return _attempt(plan, modes, Inputs(), home)
    keep_freed_memory()
    with contextlib.suppress(ValueError):  # not in the main thread of this process
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent decides
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    threads = plan.experiment.threads or threads  # as many as asked for, whatever runs beside it: digits depend on it
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return _attempt(plan, modes, Inputs(), home, threads=threads)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
