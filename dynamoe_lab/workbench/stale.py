"""How a run stands today and why: what the runner would do again, and what has changed since that it would not."""

import itertools
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.files import with_paths, without_paths
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.named_files import named_files, sweep_mark
from dynamoe_lab.workbench.provenance import changed_rooms, other_versions
from dynamoe_lab.workbench.records import Record, effective_status, missing_files

__all__ = ["other_since", "stale_because", "stale_steps", "standing"]


def standing(record: Record, folder: Path, root: Path) -> tuple[str, list[str]]:
    """A run's state (ok, failed, interrupted, running, stale) and the reasons for it.

    Args:
        folder: of the run, whose files the record names.
        root: of the project, whose notebooks and profiles are today's.
    """
    state = effective_status(record)
    if state == "ok" and (reasons := stale_because(record, folder, root)):
        return "stale", reasons
    if state == "failed" and record.run.error is not None:
        error = record.run.error
        return state, [f"{error.type}{f' in cell {error.cell}' if error.cell else ''}: {(error.message.splitlines() or [''])[0]}"]
    return state, []


def stale_because(record: Record, folder: Path, root: Path) -> list[str]:
    """Why the runner would run a good run again; empty: it is up to date."""
    run, reasons = record.run, []
    if record.env.code and record.env.code != environment.code_digest():
        rooms = changed_rooms(record.env.rooms, environment.room_digests())
        reasons.append(f"code of {', '.join(rooms)} changed" if rooms else "code changed")
    source = _source(root / "notebooks" / f"{run.name}.ipynb")
    if source and run.source and source != run.source:
        reasons.append("notebook edited")
    if run.key:  # the runner made it: it knows all that was asked
        reasons += _other_fields(record, root) + _other_files(record, root)
    if damaged := missing_files(record, folder):
        reasons.append(f"{', '.join(damaged)} gone or changed")
    return reasons


def other_since(record: Record) -> list[str]:
    """What differs here from what a run was made with, without making it stale: versions, threads, processor, steps of other code."""
    found = [f"made with {text}" for text in other_versions(record.env.packages, environment.versions())]
    if record.env.cpu and record.env.cpu != environment.cpu_name():
        found.append(f"made on {record.env.cpu}, this is {environment.cpu_name()}")
    return found + stale_steps(record)


def stale_steps(record: Record) -> list[str]:
    """Which of a run's steps other code had computed: `train, calibrate computed by other code (models)`."""
    steps: dict[str, list[str]] = {}
    for use in record.results.steps:
        if use.stale:
            rooms = ", ".join(use.stale_rooms)
            steps.setdefault(f"by other code ({rooms})" if rooms else "by other code", []).append(use.function)
    return [f"{', '.join(dict.fromkeys(functions))} computed {how}" for how, functions in steps.items()]


def _other_fields(record: Record, root: Path) -> list[str]:
    """Fields and parameters that the profile gives another value today: `train.steps was 12, is 20`."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.config import load_experiment, profiles, read_profile

    run = record.run
    try:
        words = shlex.split(run.command)
        if run.profile_path:
            profile = str(root / with_paths(run.profile_path, home()))
            if not Path(profile).is_file():
                return [f"its profile {run.profile_path} is gone"]
        elif run.profile in profiles() and not _file_of_its_own(words):
            profile = run.profile
        else:  # a record from before paths were kept: what was in the file stands in it
            return []
        today = json.loads(json.dumps(asdict(load_experiment(profile, with_paths(run.overrides, home())))))
        asked = read_profile(profile)[1].get(run.name) or {}
    except (InputError, OSError, ValueError):
        return ["its profile or overrides do not fit today's fields"]
    typed = {word.partition("=")[0] for word in words}
    then, now = without_paths(_flat(run.config) | run.parameters, root), _flat(without_paths(today, root))
    now |= {name: value for name, value in without_paths(asked, root).items() if name != "overrides" and name not in typed}
    return [f"{name} was {then.get(name, 'not given')}, is {value}" for name, value in now.items() if then.get(name) != value]


def _file_of_its_own(words: list[str]) -> bool:
    """Whether a command names its profile by a path."""
    return any(option == "--profile" and value.endswith((".yaml", ".yml")) for option, value in itertools.pairwise(words))


def _other_files(record: Record, root: Path) -> list[str]:
    """Files, folders and sweeps that were edited or are gone, by the names that the record has for them."""
    from dynamoe_lab.assets import home

    run = record.run
    then = without_paths(run.inputs, root)  # older records have whole paths for names
    files = without_paths(named_files(with_paths(run.config, home()), with_paths(run.parameters, home()), root), root)
    rest = [name for name in with_paths(list(then), home()) if without_paths(name, root) not in files]
    files |= without_paths(named_files({}, {"defaults of parameters": rest}, root), root)
    reasons = [f"{name} {'changed' if name in files else 'is gone'}" for name, mark in then.items() if files.get(name) != mark]
    for name, mark in run.swept.items():
        path = with_paths(name, home())
        try:
            if path.endswith((".yaml", ".yml", ".csv")):
                path = str(root / path)
                if not Path(path).is_file():
                    raise InputError(f"no file {name}")
            if sweep_mark(path)[0] != mark:
                reasons.append(f"sweep {name} changed")
        except (InputError, OSError, ValueError):
            reasons.append(f"sweep {name} is gone, or no sweep any more")
    return reasons


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _source(notebook: Path) -> str | None:
    """The hash that a record keeps of its notebook's code cells; None if the notebook is not here."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return fingerprint(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
