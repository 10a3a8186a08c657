"""What a record keeps about where its numbers come from: the code by room, machine, versions, seeds, and how each step was made.

From this `show` says what is stale and why, and `check` what a rerun has to give again.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dynamoe_lab.plural import plural
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.files import without_paths
from dynamoe_lab.workbench.records import Environment, Record, StepUse
from dynamoe_lab.workbench.steps import STEP_VERSIONS, StepResult

if TYPE_CHECKING:
    from dynamoe_lab.config import Experiment

__all__ = ["changed_rooms", "other_versions", "record_environment", "step_use", "why_unrepeatable"]


def record_environment(experiment: "Experiment", root: Path, fingerprints: dict[str, str] | None = None) -> Environment:
    """What an experiment runs on now, without a name of the user, the host or a folder."""
    from dynamoe_lab.config import METHODS

    commit, dirty = environment.git_state(root)
    threads, data, seeds = environment.torch_threads(), asdict(experiment.data), {"experiment": experiment.seed}
    for section in (section for sections in METHODS.values() for section in sections):
        values = {name: value for name, value in asdict(getattr(experiment, section)).items() if name.endswith("seed")}
        seeds |= {section if name == "seed" else name: value for name, value in values.items()}
    return Environment(
        commit=commit,
        dirty=dirty,
        code=environment.code_digest(),
        rooms=environment.room_digests(),
        python=platform.python_version(),
        platform=environment.platform_name(),
        cpu=environment.cpu_name(),
        threads=experiment.threads if threads is None else threads,
        packages=environment.versions(),
        seeds=seeds,
        model=Path(experiment.model).name if Path(experiment.model).is_absolute() else experiment.model,
        data=without_paths({name: value for name, value in data.items() if isinstance(value, str)}, root),
        fingerprints=fingerprints or {},
    )


def step_use(function: Callable, done: StepResult) -> StepUse:
    """A run's entry of a step that it used: what it took, and with what it was made where this process has other."""
    made, use = done.made, StepUse(function.__name__, done.key, done.cached, done.seconds, done.stale)
    here = environment.versions() | {"cpu": environment.cpu_name()}
    then = {name: version for name, version in made.get("versions", {}).items() if name in STEP_VERSIONS} | {"cpu": made.get("cpu")}
    use.unlike = {name: str(value) for name, value in then.items() if value and value != here.get(name)}
    use.threads = made.get("threads")
    if done.stale:
        use.stale_rooms = changed_rooms(made.get("rooms", {}), environment.room_digests(environment.ROOMS_WITHOUT_RESULTS))
    use.peak_memory_bytes = made.get("peak_memory_bytes") if made.get("memory_measured") else None  # older steps: of the whole process
    use.memory_before_bytes = made.get("memory_before_bytes")
    use.times, use.digests = made.get("times", False), made.get("digests", {})
    use.parts = made.get("parts", [])
    return use


def changed_rooms(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Rooms whose code differs, in order; none if `then` is not known."""
    return sorted(room for room in {*then, *now} if then.get(room) != now.get(room)) if then else []


def other_versions(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """`torch 2.12.0, here 2.13.0` for every package whose version differs."""
    return [f"{name} {version}, here {now.get(name, 'none')}" for name, version in then.items() if now.get(name) != version]


def why_unrepeatable(record: Record, experiment: "Experiment") -> list[str]:
    """Why a rerun with the same seed, threads and versions may give other digits; empty: it has to give the same.

    Measured times are no reason: the columns that hold them are excepted (`repeatable.EXCEPTED_COLUMNS`).
    """
    reasons = []
    if not experiment.device.startswith("cpu"):
        import torch

        if not torch.are_deterministic_algorithms_enabled():
            reasons.append(f"computed on {experiment.device} without torch's deterministic algorithms")
    unlike: dict[str, list[str]] = {}
    for use in record.results.steps:
        if use.times:
            continue
        for how in use.parts:
            unlike.setdefault(f"in parts, {how}", []).append(use.function)
        for name, value in use.unlike.items():
            unlike.setdefault(f"earlier with {name} {value}", []).append(use.function)
        if use.threads and record.env.threads and use.threads != record.env.threads:
            when = "earlier " if use.cached else "in a sweep's process "  # which gets its share of the cores unless `threads` is set
            unlike.setdefault(f"{when}with {plural(use.threads, 'thread')}", []).append(use.function)
        if use.stale:
            unlike.setdefault("earlier by other code", []).append(use.function)
    return reasons + [f"{', '.join(dict.fromkeys(functions))} computed {how}" for how, functions in unlike.items()]
