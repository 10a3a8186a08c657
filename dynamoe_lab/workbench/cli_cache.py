"""`dynamoe-lab cache` and `cache free` as commands; thin, as `cli`, which gives their errors an exit code."""

import json
from typing import Annotated

import typer

__all__ = ["free_cache", "list_cache"]


def list_cache(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="As JSON, for machines.")] = False) -> None:
    """Say what lies in the cache ($DYNAMOE_LAB_HOME), or free some of it with `cache free`."""
    if context.invoked_subcommand is not None:
        return
    from dynamoe_lab.assets import home
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench import housekeeping

    reports = project_root() / "reports"
    typer.echo(json.dumps(housekeeping.cache_rows(home(), reports), indent=1) if as_json else housekeeping.list_cache(home(), reports))


def free_cache(
    stale: Annotated[bool, typer.Option("--stale", help="Steps that other code computed.")] = False,
    unused: Annotated[bool, typer.Option("--unused", help="Steps that no run below reports/ used.")] = False,
    scratch: Annotated[bool, typer.Option("--scratch", help="What was not finished, or is damaged; training goes on from it.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All of these, and all else that can be computed again.")] = False,
    assets: Annotated[bool, typer.Option("--assets", help="Assets, models and wheels, too, which are downloaded again.")] = False,
    older_than: Annotated[str | None, typer.Option(metavar="30d", help="Only what was not used for so long (min, h, d, w).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Free space in the cache: say what and how much, ask, and leave alone what a running process uses."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench import housekeeping
    from dynamoe_lab.workbench.cache import period

    wanted = {"stale": stale, "unused": unused, "scratch": scratch, "everything": everything, "assets": assets}
    wanted["older_than"] = period(older_than) if older_than else None
    agreed = (lambda _: True) if yes else typer.confirm
    return housekeeping.free_cache(home(), project_root() / "reports", dry_run=dry_run, agreed=agreed, say=typer.echo, **wanted)
