"""The local files and folders that an experiment names, with a digest each: a text that was edited makes a run stale as a field does."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynamoe_lab.digests import file_digest
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.fingerprint import fingerprint

__all__ = ["named_files", "sweep_mark"]

_READ = 1 << 28  # bytes: of larger files (weights) size and time stand for the content


def named_files(config: Mapping[str, Any], parameters: Mapping[str, Any], root: Path) -> dict[str, str]:
    """What lies at the names in an experiment's `data` and `model` and in a notebook's parameters (task files with what they read).

    Args:
        config: the resolved experiment as a dict.
        parameters: of the notebook; texts, and lists of texts, that are a file's name count.
        root: where relative names start, as they do for the kernel.

    Returns:
        name as it was given -> 32 hexadecimal digits; names of domains, of offline models and of the Hub are left out.
    """
    from dynamoe_lab.loading import MODELS
    from dynamoe_lab.texts import DOMAINS

    found = {}
    names = [name for text in _texts(config.get("data", {})) for name in ([text] if _there(text, root) else text.split("+"))]
    for name in (name.strip() for name in names):
        if name not in DOMAINS and (path := _there(name, root)):
            found[name] = _digest(path)
    model = str(config.get("model", ""))
    if model not in MODELS and (path := _there(model, root)):
        found[model] = _digest(path)
    for name in _texts({key: value for key, value in parameters.items() if key not in ("profile", "overrides", "output", "sweep")}):
        path = _there(name, root)
        if path and path.is_file():
            found[name] = fingerprint([_digest(source) for source in _sources(path)])
    return found


def sweep_mark(name: str) -> tuple[str, bool]:
    """A hash of what a sweep asks for or, of a table, holds, and whether a cell of it trusts the code that comes with a model or a task.

    Args:
        name: of `configs/sweeps`, or a path to a sweep file or to the sweep.csv of one that ran.

    Raises:
        InputError: there is no such sweep, or its cells are no experiments.
    """
    from dynamoe_lab.workbench.sweep_file import load_sweep
    from dynamoe_lab.workbench.sweep_table import read_sweep

    if name.endswith(".csv"):
        return fingerprint(read_sweep(name)), False
    sweep = load_sweep(name)
    plans = sweep.resolve()
    return fingerprint(asdict(sweep)), any(plan.experiment.trust_remote_code for plan in plans)


def _texts(values: Mapping[str, Any]) -> Iterator[str]:
    for value in values.values():
        yield from (item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, str))


def _there(name: str, root: Path) -> Path | None:
    try:
        path = root / Path(name).expanduser()
        return path if name.strip() and _ends(path) else None
    except (OSError, ValueError, RuntimeError):  # a sentence: too long for a name, or with a NUL
        return None


def _ends(path: Path) -> bool:
    """Whether it is a file or a folder: a pipe or a device would never be read to its end."""
    return path.is_file() or path.is_dir()


def _sources(path: Path) -> list[Path]:
    """A file, and if it defines a task what that reads."""
    if path.suffix not in (".yaml", ".yml"):
        return [path]
    from dynamoe_lab.evaluation.task_sources import task_sources

    try:
        return [source for source in task_sources(path) if _ends(source)] or [path]
    except InputError:  # the notebook will say so
        return [path]


def _digest(path: Path) -> str:
    if path.is_dir():
        members = sorted(item for item in path.rglob("*") if item.is_file())
        return fingerprint([[member.relative_to(path).as_posix(), _digest(member)] for member in members])
    stat = path.stat()
    return file_digest(path) if stat.st_size <= _READ else fingerprint([stat.st_size, stat.st_mtime_ns])
