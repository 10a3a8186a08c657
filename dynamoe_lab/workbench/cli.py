"""The command line: `dynamoe-lab run`, `sweep`, `convert`, `train`, `export`, `eval`, `compare`, `ls`, `show`, `check`, `report`, `doctor`;
`cache` is in `cli_cache`.

Thin: every command is a call of a function of the workbench.

Exit codes: 0 done, 1 a run failed, 2 bad input (one line on stderr, no traceback), 130 interrupted (143: by SIGTERM or SIGHUP).
Nothing heavy is imported before a command needs it, so `--help` answers at once.
"""

import errno
import functools
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.allocator import keep_freed_memory
from dynamoe_lab.workbench.cli_cache import free_cache, list_cache
from dynamoe_lab.workbench.files import disk_full, folder_lock, locked, require_writable

__all__ = ["app", "main"]

app = typer.Typer(
    name="dynamoe-lab",
    help="Find out how much compute a language model can save on easy tokens: run the notebooks, read the report.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text: rich costs a third of a second and draws boxes into logs
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False
# What a file system says of a place that a person chose: no rights, a file where a folder should be, a name that is too long.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


_KEPT = (  # what an interrupt leaves, and what it does not
    "finished steps and notebooks are kept, training goes on from its last checkpoint (one every train.save_steps steps): give the same "
    "command again"
)
_INTERRUPTED = {"check": "a check keeps nothing that it computed: the same command starts over (--keep: with a new folder)"}


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, also of bad input.")] = False) -> None:
    """Options of all commands."""
    global _debug
    _debug = debug


class _Terminated(KeyboardInterrupt):
    """A polite signal to end: what a batch system, a shutdown or a closed terminal sends."""


def _terminated(signum: int, frame: object) -> None:
    raise _Terminated


def _answering(command: Callable) -> Callable:
    """Turn what a command raises into an exit code: bad input and a full disk 2, an interrupt 130; defects keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            code = command(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            typer.echo(f"dynamoe-lab: interrupted; {_INTERRUPTED.get(command.__name__, _KEPT)}", err=True)
            code = 143 if isinstance(interrupt, _Terminated) else 130
        except (InputError, OSError) as error:
            refused = not isinstance(error, InputError) and error.errno in _REFUSED
            if not isinstance(error, InputError) and not disk_full(error) and not refused:
                raise
            if _debug:
                traceback.print_exc()
            place = f"{error.filename}: {error.strerror}; choose another place, or make this one writable" if refused else error
            typer.echo(f"dynamoe-lab: {InputError(str(place))}", err=True)
            code = 2
        if code is not None:  # typer ends with 0 by itself; a command that goes before a subcommand must not
            raise typer.Exit(code)

    return wrapped


@app.command()
@_answering
def run(
    notebooks: Annotated[
        list[str] | None, typer.Argument(help="Names or numbers, e.g. 04_router_confusion or 04; none: all, in order.")
    ] = None,
    profile: Annotated[str, typer.Option(help="A file of configs/ (quick, smoke), or a path to a YAML file.")] = "quick",
    output: Annotated[Path | None, typer.Option(help="Report folder.", show_default="reports/<profile>")] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter", "-p", metavar="KEY=VALUE", help="A notebook's parameter or an experiment field, e.g. dynamoe.theta=0.8."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run also what is up to date. Steps still come from the cache.")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="The same, and compute again the steps that other code made.")] = False,
) -> int:
    """Run notebooks and build the report. What is up to date is skipped; one that fails does not stop the others."""
    from dynamoe_lab.workbench.notebooks import BAD_INPUT, FAILED, discover, report_folder, run_notebooks
    from dynamoe_lab.workbench.report import build_report

    statuses = run_notebooks(
        notebooks or (), profile=profile, given=parameter or (), output=output, force=force, recompute=recompute, debug=_debug
    )
    page = build_report(report_folder(profile, output), expected=[path.stem for path in discover()])
    typer.echo(f"report: {os.path.relpath(page)}")
    failed = [name for name, status in statuses.items() if status in (FAILED, BAD_INPUT)]
    if failed:
        typer.echo(f"{len(failed)} of {len(statuses)} failed: {', '.join(failed)}", err=True)
    return 1 if FAILED in statuses.values() else 2 if failed else 0


@app.command()
@_answering
def report(folder: Annotated[Path, typer.Argument(help="A report folder, e.g. reports/quick.")]) -> None:
    """Build index.html again from the records of a report folder; nothing is computed."""
    from dynamoe_lab.workbench.report import build_report

    typer.echo(f"report: {os.path.relpath(build_report(folder))}")


@app.command()
@_answering
def sweep(
    file: Annotated[str, typer.Argument(help="A sweep file, or the name of one in configs/sweeps, e.g. importance.")],
    profile: Annotated[str | None, typer.Option(help="Instead of the profile that the file names.", show_default=False)] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="An experiment field, for every cell.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells at a time.", show_default="what pairs of cores and memory allow")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="reports/sweeps/<name>")] = None,
) -> int:
    """Run every cell of a sweep that is not finished, and write one table. A cell that fails does not stop the others."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench.sweep import load_sweep, run_sweep
    from dynamoe_lab.workbench.sweep_table import sweep_command, write_sweep

    chosen, root = load_sweep(file), project_root()
    folder = Path(os.path.abspath(output)) if output else root / "reports" / "sweeps" / chosen.name
    require_writable(folder)
    command = sweep_command(file, profile, parameter or (), output)
    refuses = f"{os.path.relpath(folder)} is being written by pid {{pid}}; wait for it, or choose another --output"
    with locked(folder_lock(home(), folder), refuses=refuses):
        result = run_sweep(chosen, profile=profile, overrides=parameter or (), jobs=jobs, home=home(), progress=typer.echo)
        csv = write_sweep(result, folder, root=root, command=command)
    typer.echo(f"table: {os.path.relpath(csv)}")
    if result.cells:  # `read_sweep` starts at the root, wherever the command is typed
        place = csv.relative_to(root).as_posix() if csv.is_relative_to(root) else str(csv)
        typer.echo(f"draw it: dynamoe-lab run 20 -p {shlex.quote(f'sweep={place}')}")
    for outcome in result.failed:
        typer.echo(f"cell {outcome.number} failed: {outcome}", err=True)
        if _debug and outcome.traceback:
            typer.echo(outcome.traceback, err=True)
    return int(bool(result.failed))


_Profile = Annotated[str, typer.Option(help="A file of configs/ (quick, smoke), or a path to a YAML file.")]
_Fields = Annotated[
    list[str] | None, typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="An experiment field, e.g. dynamoe.theta=0.8.")
]


@app.command()
@_answering
def convert(
    model: Annotated[str, typer.Argument(help="A dense model: smollm2-135m, a folder, or a Hub id.")],
    output: Annotated[Path, typer.Option(help="A folder that is new or empty.")],
    profile: _Profile = "quick",
    parameter: _Fields = None,
) -> None:
    """Convert a dense model to nested experts with fresh routers, or with -p method=tomoe to a masked ToMoE model, ready to train."""
    from dynamoe_lab.workbench.checkpoints import convert_to_folder

    convert_to_folder(model, output, profile=profile, given=parameter or (), say=typer.echo)


@app.command()
@_answering
def train(
    model: Annotated[str, typer.Argument(help="A converted checkpoint, or a dense model, which is converted first.")],
    output: Annotated[Path, typer.Option(help="Gets checkpoint/ and steps.csv; the same command goes on with a stopped run.")],
    profile: _Profile = "quick",
    parameter: _Fields = None,
) -> int:
    """Train a converted model (-p method=tomoe: ToMoE). Stopped or killed, the same command goes on from the last complete checkpoint."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.training import TrainingDiverged
    from dynamoe_lab.workbench.checkpoints import train_to_folder

    try:
        train_to_folder(model, output, profile=profile, given=parameter or (), home=home(), say=typer.echo)
    except TrainingDiverged as error:
        typer.echo(f"dynamoe-lab: training diverged: {error}", err=True)
        return 1
    return 0


@app.command()
@_answering
def export(
    checkpoint: Annotated[str, typer.Argument(help="A masked ToMoE checkpoint: a folder of convert or train.")],
    output: Annotated[Path, typer.Option(help="A folder that is new or empty.")],
    form: Annotated[
        str,
        typer.Option(help="tomoe, or mixtral: stock transformers classes, for whole attention; narrower experts are padded with zeros."),
    ] = "tomoe",
) -> None:
    """Export a ToMoE model to its deployed form: experts on their own neurons, queries and keys sliced."""
    from dynamoe_lab.workbench.checkpoints import export_to_folder

    export_to_folder(checkpoint, output, form=form, say=typer.echo)


@app.command("eval")
@_answering
def evaluate(
    model: Annotated[str, typer.Argument(help="A dense or converted model: smollm2-135m, a folder, or a Hub id.")],
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="lm-eval tasks or task files.", show_default="the paper's seven")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many documents of a task.", show_default="all")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a forward.", show_default="evaluate.batch_size")] = None,
    routing: Annotated[
        str | None,
        typer.Option(help="Who chooses the experts: router, full, label, or an expert's index.", show_default="router, if converted"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the scores.", show_default="reports/eval/<model>[-<routing>]")] = None,
    parameter: _Fields = None,
) -> None:
    """Score a model on benchmarks. Stopped or killed, the same command goes on with the next task."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.workbench.benchmarks import default_folder, score_to_folder

    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else []
    if tasks is not None and not names:
        raise InputError(f"--tasks {tasks!r}: names no task; give e.g. sciq,piqa, or leave it out")
    folder = output or default_folder(model, routing)
    settings = {"tasks": names, "limit": limit, "batch_size": batch_size, "routing": routing, "given": parameter or ()}
    score_to_folder(model, folder, **settings, home=home(), say=typer.echo)


@app.command()
@_answering
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder of `eval`.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="What A is compared with, usually the dense parent's.")],
    metric: Annotated[str, typer.Option(help="acc, acc_norm, bits_per_byte or loglikelihood.")] = "acc",
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks to compare.", show_default="all")] = None,
) -> None:
    """Two models on the same documents: differences with intervals, McNemar's exact test, what the sample could have shown."""
    from dynamoe_lab.workbench.comparison import compare_scores

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    typer.echo(compare_scores(first, second, metric=metric, tasks=names))


_Json = Annotated[bool, typer.Option("--json", help="As JSON, for machines.")]


@app.command("ls")
@_answering
def list_(steps: Annotated[bool, typer.Option("--steps", help="The cached steps instead.")] = False, as_json: _Json = False) -> None:
    """List the runs below reports/ with their state and what is stale and why, or the cached steps."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench import housekeeping, inventory

    root = project_root()
    reports = root / "reports"
    if as_json:
        rows = [row for row in housekeeping.cache_rows(home(), reports) if row["kind"] in ("step", "damaged")] if steps else None
        typer.echo(json.dumps(inventory.run_rows(reports, root) if rows is None else rows, indent=1))
    else:
        typer.echo(inventory.list_steps(home(), reports) if steps else inventory.list_runs(reports, root))


@app.command()
@_answering
def show(run: Annotated[str, typer.Argument(help="quick/04, or the path of a run's folder.")], as_json: _Json = False) -> None:
    """Show a run: how it stands and why, what it found, its numbers, files, steps and log."""
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench import inventory, showing

    root = project_root()
    folder = inventory.find_run(run, root / "reports")
    typer.echo(json.dumps(showing.run_facts(folder, root), indent=1) if as_json else showing.show_run(folder, root))


@app.command()
@_answering
def check(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="quick/04, the path of a run's folder, or a report: all its runs.")],
    keep: Annotated[Path | None, typer.Option(help="Keep the rerun's report in this new folder.", show_default="removed")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Also repeat runs that trusted the code of a model or a task: read it first.")
    ] = False,
) -> int:
    """Run notebooks again from nothing, with their recorded settings, and compare every table, number and weight to the last digit."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench import checking

    root = project_root()
    folders = checking.find_runs(runs, root / "reports")
    equal = checking.check_runs(folders, home=home(), root=root, say=typer.echo, keep=keep, trust_remote_code=trust_remote_code)
    return int(not equal)


_cache = typer.Typer(
    help="Say what lies in the cache ($DYNAMOE_LAB_HOME), or free some of it with `cache free`.", invoke_without_command=True
)
_cache.callback()(_answering(list_cache))
_cache.command("free")(_answering(free_cache))
app.add_typer(_cache, name="cache")


@app.command()
@_answering
def doctor(as_json: _Json = False) -> int:
    """Check the environment, the cache, the runs and the kernel, and say what to do about each problem."""
    from dynamoe_lab.workbench.doctor import examine, tell

    return tell(list(examine()), typer.echo, as_json=as_json)


def main() -> None:
    """Entry point of `dynamoe-lab` and of `python -m dynamoe_lab`."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a θ must not break a terminal that knows no Greek
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP; nohup has it ignored
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminated)
    app(prog_name="dynamoe-lab")
