"""The local tasks as files for the stock `lm_eval` command: YAML and jsonl, for an environment that has lm-eval and not this package.

    lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True --include_path FOLDER --tasks sciq_local

The YAML is lm-eval's own with everything it includes, under the name `<task>_local` and on the local documents. Functions are named by
where lm-eval keeps them, so a file fits the version that it was made with.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.tasks import LOCAL, TASKS, local_overrides, task_files, task_manager

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["export_tasks"]


def export_tasks(folder: str | Path, names: Iterable[str] = TASKS) -> list[str]:
    """Write `<task>_local.yaml` and `<task>.jsonl` into `folder`, which is made if need be; files of these names are replaced.

    The YAML holds the absolute path of the jsonl: after moving the folder, export again.

    Returns:
        The names to give to `lm_eval --tasks`.

    Raises:
        InputError: a name that is not of `TASKS`; a folder that cannot be written; the asset cannot be had.

    Example:
        >>> lab.export_tasks("tasks", ["piqa"])
        ['piqa_local']
    """
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in LOCAL]:
        raise InputError(f"export_tasks: {unknown[0]!r} has no local documents; choose from {', '.join(TASKS)}")
    folder, source, manager = Path(folder).expanduser().absolute(), task_files(), task_manager(names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            file = folder / f"{name}.jsonl"
            shutil.copyfile(source / file.name, file)
            text = yaml.dump(_definition(name, file, manager), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
            (folder / f"{name}_local.yaml").write_text(f"# documents: {LOCAL[name].described}\n{text}", encoding="utf-8")
    except OSError as error:
        raise InputError(f"export_tasks: {folder} cannot be written ({error.strerror}); choose another folder") from error
    return [f"{name}_local" for name in names]


class _Function(str):
    """A function's importable name."""


class _Dumper(yaml.SafeDumper):
    """Writes functions as lm-eval reads them."""


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _definition(name: str, file: Path, manager: "TaskManager") -> dict[str, Any]:
    """lm-eval's definition of a task, on the documents in `file`."""
    entry = manager.task_index[name]
    parent = entry.yaml_path.parent
    places = (f"{parent}/", f"{parent.resolve()}/")  # what lm-eval's index puts before a function's name, links followed or not
    module = f"lm_eval.tasks.{parent.name}."
    stock = {
        key: _Function(module + value.rpartition("/")[2]) if isinstance(value, str) and value.startswith(places) else value
        for key, value in entry.cfg.items()
    }
    changed = {**local_overrides(name, file), "task": f"{name}_local"}
    if LOCAL[name].note:  # column `split` of our tables says it, too
        changed["metadata"] = {**(stock.get("metadata") or {}), "documents": LOCAL[name].described}
    # no tag: `--tasks ai2_arc` would mean both, the stock task and this one; nothing where the stock file says nothing
    return {key: value for key, value in {**stock, **changed}.items() if key != "tag" and value is not None}
