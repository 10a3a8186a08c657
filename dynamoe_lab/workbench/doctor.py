"""`dynamoe-lab doctor`: is everything here that a run needs, and if not, what to do about it.

Each check gives lines of three kinds: `ok`, `note` (works, but not as tested), `bad` (a run would fail) with the remedy.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural
from dynamoe_lab.workbench.files import without_paths

__all__ = ["Line", "examine", "tell"]

NEEDED_GB = 3.0  # a quick report from nothing: assets 0.9 GB unpacked, the model, a few trained checkpoints
NEEDED_MEMORY_GB = 4.0


class Line(NamedTuple):
    """One line of the doctor's answer."""

    kind: str  # ok, note, bad
    text: str
    remedy: str = ""


def examine() -> Iterator[Line]:
    """All checks, in order; a check that breaks is itself a bad line."""
    for check in (_python, _project, _packages, _torch, _machine, _cache, _kept, _runs, _kernel, _git):
        try:
            yield from check()
        except Exception as error:
            yield Line("bad", f"the check {check.__name__.strip('_')} broke: {type(error).__name__}: {error}", "please report this line")


def _python() -> Iterator[Line]:
    kind = "ok" if sys.version_info >= (3, 11) else "bad"
    yield Line(kind, f"Python {platform.python_version()}", "" if kind == "ok" else "make env PYTHON=python3.11")


def _project() -> Iterator[Line]:
    from dynamoe_lab.config import profiles

    try:
        yield Line("ok", f"project with profiles {', '.join(profiles())}")
    except InputError as error:
        yield Line("bad", str(error), "cd into the checkout")


def _packages() -> Iterator[Line]:
    """What pyproject.toml asks for, against what is installed; constraints.txt says what was tested."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    tested = _tested_versions()
    try:
        asked = [Requirement(text) for text in metadata.requires("dynamoe-lab") or []]
        requirements = [requirement for requirement in asked if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        yield Line("note", "dynamoe-lab is not installed in this environment", "make env, or pip install -e .")
        requirements = [
            Requirement(name) for name in ("torch", "transformers", "pandas", "matplotlib", "papermill", "nbconvert", "lm-eval")
        ]
    good, other = 0, []
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Line("bad", f"{requirement.name} is not installed", f"pip install -c constraints.txt '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Line(
                "bad", f"{requirement.name} {version}, but {requirement} is needed", f"pip install -c constraints.txt '{requirement}'"
            )
            continue
        good += 1
        pin = tested.get(canonicalize_name(requirement.name))
        if pin and pin != version.partition("+")[0]:
            other.append(f"{requirement.name} {version} (tested {pin})")
    yield Line("ok", f"{good} of {len(requirements)} packages satisfy what is needed")
    if other:
        yield Line("note", f"not the tested versions: {', '.join(other)}", "make env installs the tested ones")


def _tested_versions() -> dict[str, str]:
    from packaging.utils import canonicalize_name

    from dynamoe_lab.config import project_root

    try:
        text = (project_root() / "constraints.txt").read_text(encoding="utf-8")
    except (OSError, InputError):
        return {}
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, flags=re.MULTILINE)}


def _torch() -> Iterator[Line]:
    try:
        import torch
    except Exception as error:
        yield Line("bad", f"torch cannot be imported ({type(error).__name__}: {error})", "make env in a fresh checkout")
        return
    where = f"CUDA: {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "no GPU: the quick profile needs none"
    yield Line("ok", f"torch {torch.__version__}, {plural(torch.get_num_threads(), 'thread')}, {where}")


def _machine() -> Iterator[Line]:
    import psutil

    memory = psutil.virtual_memory()
    free = memory.available / 2**30
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    text = f"{plural(cores, 'core')}, {free:.1f} of {memory.total / 2**30:.1f} GB memory free"
    enough = free >= NEEDED_MEMORY_GB
    yield Line(
        "ok" if enough else "note", text, "" if enough else f"the quick profile takes about {NEEDED_MEMORY_GB:.0f} GB: close something"
    )


def _cache() -> Iterator[Line]:
    from dynamoe_lab.assets import ASSETS, home

    folder = home()
    shown = without_paths(str(folder))
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free / 2**30
    if not _writable(place):
        yield Line("bad", f"{shown} cannot be written", "set DYNAMOE_LAB_HOME to a folder of yours")
    elif free < NEEDED_GB:
        text = f"{shown}: {free:.1f} GB free, a quick report takes up to {NEEDED_GB:.0f}"
        yield Line("bad", text, "free some, or set DYNAMOE_LAB_HOME to another disk")
    else:
        yield Line("ok", f"{shown}: {free:.0f} GB free")
    present = [name for name in ASSETS if (folder / "assets" / name).is_dir()]
    absent = [name for name in ASSETS if name not in present]
    if present:
        yield Line("ok", f"assets present: {', '.join(present)}")
    if absent:
        yield Line("note", f"assets not here yet: {', '.join(absent)}", "fetched with pip when first used; needs a package index once")


def _kept() -> Iterator[Line]:
    """What lies in the cache, and what of it is of no use any more."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench.cache import survey
    from dynamoe_lab.workbench.terminal import size_text

    entries = survey(home(), project_root() / "reports")
    steps = [entry for entry in entries if entry.kind == "step"]
    if not steps:
        return
    stale, rest = [step for step in steps if step.stale], [entry for entry in entries if entry.kind in ("damaged", "unfinished")]
    text = f"{plural(len(steps), 'step')} {'takes' if len(steps) == 1 else 'take'} {size_text(sum(step.bytes for step in steps))}"
    if stale:
        text += f", {len(stale)} of them ({size_text(sum(step.bytes for step in stale))}) computed by other code"
    yield Line("ok", text, "dynamoe-lab cache free --stale" if stale else "")
    if idle := [entry for entry in rest if not entry.held]:
        text = f"in the cache, damaged or not finished: {plural(len(idle), 'step')} ({size_text(sum(entry.bytes for entry in idle))})"
        yield Line("note", text, "the command that began them goes on from there; or dynamoe-lab cache free --scratch")


def _runs() -> Iterator[Line]:
    """How the runs below reports/ stand."""
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench.inventory import run_rows

    root = project_root()
    rows = run_rows(root / "reports", root)
    states: dict[str, list[str]] = {}
    for row in rows:
        states.setdefault(row["state"], []).append(row["run"])
    if rows:
        yield Line("ok", f"{plural(len(rows), 'run')}: {', '.join(f'{len(names)} {state}' for state, names in states.items())}")
    for state in ("failed", "interrupted", "unreadable"):
        if names := states.get(state):
            yield Line("note", f"{state}: {', '.join(names)}", f"dynamoe-lab show {names[0]} says why, and the command that runs it again")


def _writable(folder: Path) -> bool:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _kernel() -> Iterator[Line]:
    done = subprocess.run([sys.executable, "-m", "ipykernel_launcher", "--version"], capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        yield Line("ok", "the notebook kernel of this interpreter starts")
    else:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Line("bad", f"the notebook kernel does not start ({last})", "pip install -c constraints.txt ipykernel")


def _git() -> Iterator[Line]:
    if shutil.which("git") is None:
        yield Line("note", "no git: records will not name the commit", "install git")
        return
    from dynamoe_lab.config import project_root
    from dynamoe_lab.workbench.environment import git_state

    commit, dirty = git_state(project_root())
    if commit:
        yield Line("ok", f"git at {commit[:12]}{' with uncommitted changes' if dirty else ''}")
    else:
        yield Line("note", "this folder is no git checkout with a commit: records will not name one")


def tell(lines: list[Line], say: Callable[[str], None] = print, *, as_json: bool = False) -> int:
    """Print the lines with their remedies, or all as JSON; 1 if one of them is bad, else 0."""
    if as_json:
        say(json.dumps([line._asdict() for line in lines], indent=1))
    for line in lines if not as_json else ():
        say(f"{line.kind:<5} {line.text}" + (f"\n      -> {line.remedy}" if line.remedy else ""))
    return int(any(line.kind == "bad" for line in lines))
