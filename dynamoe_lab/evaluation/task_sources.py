"""What a task file of lm-eval's format is made of: the file, those it includes, the modules beside it, its local data.

A score depends on all of them, so a step's key has their contents (`evaluate_task.step_reads`): new documents under an old name are scored.
Data that lies elsewhere (the Hub, a URL) is not looked at, nor is what a module beside the file imports or reads in its turn.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dynamoe_lab.disk import is_file
from dynamoe_lab.errors import InputError, first_line

__all__ = ["Definition", "foreign_code", "is_task_file", "read_definition", "sources_digest", "task_sources"]

_REMOTE = "://"  # in a name: a URL, or a member of an archive
_FUNCTION = "!function"  # tag
_OWN = "lm_eval.tasks."  # functions of the installed lm-eval, which its own definitions name
_MOST = 100_000  # values of a definition, repeated ones counted as often as they stand in it: few aliases can make any number
_LONGEST_FILE = 5_000_000  # bytes


class Definition(NamedTuple):
    """What a task file and the files that it includes say."""

    files: list[Path]  # the task file first, modules beside them last
    config: dict[str, Any]  # with everything included; functions by their names
    functions: list[tuple[str, Path]]  # every `!function` of every file with that file, of entries that others overrule, too


def is_task_file(name: str | Path) -> bool:
    """Whether a task is given as a file, not by its name."""
    return isinstance(name, Path) or name.endswith((".yaml", ".yml"))


def task_sources(name: str | Path) -> list[Path]:
    """The local files and folders that a task reads, the task file first; of a task given by its name there are none.

    Relative names are looked up as lm-eval and `datasets` do: included files and modules beside the file that names them, data in the
    `data_dir` or local `dataset_path` of the task, else in the working directory.

    Raises:
        InputError: there is no such task file, or a file that it includes or takes its data from is not there.
    """
    if not is_task_file(name):
        return []
    path = Path(name).expanduser()
    definition = read_definition(path)
    return list(dict.fromkeys([*definition.files, *_data(definition.config, path)]))


def read_definition(path: Path) -> Definition:
    """What defines a task.

    Raises InputError as `task_sources`, data aside.
    """
    if not is_file(path):
        raise InputError(f"task file {path}: no such file; give a .yaml of lm-eval's format, or the name of a task")
    return _definition(path, path, ())


def foreign_code(definition: Definition) -> str | None:
    """What a definition would run that is not lm-eval's own: a function, or a metric from the Hub; None if there is nothing.

    lm-eval imports every function of a file while it parses that file, whether anything comes of it or not, so all of them count.
    """
    for name, _ in definition.functions:
        if not name.startswith(_OWN) or any(_module(name, file).is_file() for file in definition.files):
            return f"!function {name}"
    metrics = definition.config.get("metric_list")
    for entry in metrics if isinstance(metrics, list) else ():
        if isinstance(entry, dict) and entry.get("hf_evaluate"):
            return f"the metric {entry.get('metric')!r} of the Hub (hf_evaluate)"
    return None


def sources_digest(sources: Iterable[Path]) -> str:
    """16 hexadecimal digits that stand for the names and contents of files, and of all files in folders."""
    digest = hashlib.sha256()
    for source in sources:
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if file.is_file():
                digest.update(f"{file.absolute()}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
                with file.open("rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
    return digest.hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """Reads a task file as lm-eval does, but imports nothing: functions stay names."""


_Loader.add_constructor(_FUNCTION, lambda loader, node: loader.construct_scalar(node))


def _definition(path: Path, whose: Path, parents: tuple[Path, ...]) -> Definition:
    """A definition with everything included; `whose`: the task file that a message names."""
    path = path.resolve()
    if path in parents:
        raise InputError(f"task file {whose}: {path} includes itself; take it out of `include`")
    try:
        if path.stat().st_size > _LONGEST_FILE:
            raise ValueError(f"{path.name} is longer than any task")
        text = path.read_text(encoding="utf-8")
        own = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        functions = [(str(getattr(event, "value", "")), path) for event in yaml.parse(text) if getattr(event, "tag", None) == _FUNCTION]
        if _values(own, {}) > _MOST:
            raise ValueError(f"the aliases of {path.name} stand for more than {_MOST:,} values")
    except Exception as error:  # a constructor of YAML raises whatever its value raises
        raise InputError(f"task file {whose}: cannot be loaded ({first_line(error)}); give a .yaml of lm-eval's format") from error
    if not isinstance(own, dict):
        raise InputError(f"task file {whose}: cannot be loaded ({path.name} holds no fields); give a .yaml of lm-eval's format")
    files, config = [path], {}
    for included in _names(own.pop("include", None)):
        file = path.parent / included  # an absolute name stays what it is
        if not is_file(file):
            raise InputError(f"task file {whose}: includes {file}, which is not there; write it, or take it out of `include`")
        more = _definition(file, whose, (*parents, path))
        files += more.files
        functions += more.functions
        config |= more.config
    modules = (_module(name, file) for name, file in functions if file == path)
    files += [module for module in modules if module.is_file()]  # others are importable packages, with versions of their own
    return Definition(files, config | own, functions)


def _data(config: dict[str, Any], path: Path) -> Iterator[Path]:
    """Local data of a definition: the files it names, or the folder it points to."""
    options = config.get("dataset_kwargs")
    options = options if isinstance(options, dict) else {}
    places = [place for place in (options.get("data_dir"), config.get("dataset_path")) if isinstance(place, str) and _REMOTE not in place]
    # a bare word is a format of `datasets` ("json"), whatever lies in the working directory
    places = [place for place in places if place == options.get("data_dir") or place.startswith((".", "~")) or "/" in place]
    found = [place for place in (Path(place).expanduser() for place in places) if place.exists()]
    base = next((place for place in found if place.is_dir()), Path())
    names = [name for name in _names(options.get("data_files")) if _REMOTE not in name]
    if not names:
        yield from found
    for name in names:
        files = _matching(base, name)
        if not files:
            where = "" if Path(name).is_absolute() else f" (relative to {base.absolute()})"
            raise InputError(f"task file {path}: no data file {name}{where}; write it, or correct dataset_kwargs.data_files")
        yield from files


def _matching(base: Path, name: str) -> list[Path]:
    """The files of a name, which may be a pattern, in order."""
    file = base / Path(name).expanduser()
    if file.exists():
        return [file]
    root = Path(file.anchor)
    return sorted(match for match in root.glob(str(file.relative_to(root))) if match.is_file())


def _module(function: str, file: Path) -> Path:
    """Where the module of a function lies, if it lies beside the file that names it."""
    return file.parent / f"{function.rpartition('.')[0].replace('.', '/')}.py"


def _values(value: Any, known: dict[int, int]) -> int:
    """How many values stand in a value, what aliases repeat counted each time. Raises ValueError if it holds itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if known.get(id(value)) == 0:
        raise ValueError("an alias stands for what it stands in")
    if id(value) not in known:
        known[id(value)] = 0
        known[id(value)] = 1 + sum(_values(part, known) for part in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def _names(value: Any) -> list[str]:
    """Texts of a text, a list, or a dict of either, in order."""
    if isinstance(value, dict):
        return [name for part in value.values() for name in _names(part)]
    if isinstance(value, (list, tuple)):
        return [name for part in value for name in _names(part)]
    return [] if value is None else [str(value)]
