"""`dynamoe-lab eval`: score one model on lm-eval's tasks into a folder.

A task is a step: the folder is written again as each one finishes, and the same command after a kill goes on with the next.
"""

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.disk import unreadable
from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.cells import Inputs, check_modes
from dynamoe_lab.workbench.files import (
    folder_lock,
    locked,
    occupied,
    read_json,
    remove_leftovers,
    require_writable,
    told_when_full,
    write_atomic,
    write_json,
)
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.holds import hold_cache
from dynamoe_lab.workbench.parameters import whole_number
from dynamoe_lab.workbench.steps import run_step
from dynamoe_lab.workbench.terminal import millions_text, table_text

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from dynamoe_lab.config import Experiment

__all__ = ["SETTINGS", "default_folder", "score_notes", "score_to_folder"]

SETTINGS = "eval.json"  # beside the tables: what was scored, and how
_FIELDS = ("device", "dtype", "threads", "seed", "trust_remote_code", "evaluate.")  # of an experiment, that scores depend on
_COUNTED = ("active_params", "active_mlp_fraction", "seconds_total", "share_outside_model")
_SHOWN = {"acc": "acc", "acc_norm": "acc_norm", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}


def default_folder(model: str, routing: str | None) -> Path:
    """Where scores go without --output: `reports/eval/<last part of the model's name>[-<routing>]` below the project root."""
    from dynamoe_lab.config import project_root

    name = Path(os.path.abspath(model)).name if Path(model).exists() else model.rpartition("/")[2]
    return project_root() / "reports" / "eval" / (name if routing is None else f"{name}-{routing}")


def score_to_folder(
    model: str,
    output: Path,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int | None = None,
    routing: str | None = None,
    given: Sequence[str] = (),
    home: Path,
    say: Callable[[str], None] = print,
) -> None:
    """Score a dense or converted model and write `scores.parquet`, `scores.csv`, `documents.parquet` and the settings, task by task.

    Args:
        model: an offline asset, a folder or a Hub id; of a masked ToMoE checkpoint the deployed form is scored.
        output: a new or empty folder, or one that the same settings wrote: its other tasks stay.
        tasks: names or task files; none: the seven of the paper.
        limit: the first so many documents of a task; None: all.
        batch_size: sequences of a forward; None: the experiment's.
        routing: "router" (a converted model's default), "full", an expert's index, or of DynaMoE "label".
        given: `key=value` experiment fields.

    Raises:
        InputError: `output` holds something else, or a task of the same name from elsewhere; an unknown task or routing, a limit or batch
            size below 1.
    """
    from dynamoe_lab.evaluation import evaluate_task
    from dynamoe_lab.evaluation.task_sources import is_task_file
    from dynamoe_lab.evaluation.tasks import TASKS, load_tasks

    for name, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(
                f"{name} {value}: give a whole number of at least 1{', or leave it out for all documents' * (name == '--limit')}"
            )
    hold_cache(home)
    experiment, tasks = _experiment(model, given), list(tasks or TASKS)
    require_writable(output)
    if occupied(output) and not (output / SETTINGS).is_file():
        raise InputError(f"{output}: not an empty folder, and no scores to go on with; choose another --output, or remove it")
    trust = {"trust_remote_code": experiment.trust_remote_code}
    names = list(load_tasks(tasks, **trust))  # a wrong name or missing data is told before a model is loaded
    sources = {name: Path(task).name if is_task_file(task) else str(task) for name, task in zip(names, tasks, strict=True)}
    _check_sources(output, sources)
    environment.seed_generators(experiment.seed, experiment.threads)
    network, tokenizer = Inputs().model(experiment)
    network = _deployed(network, model, say)
    routing = _set_routing(network, routing, model)
    batch_size = batch_size or experiment.evaluate.batch_size
    settings = {"model": Path(model).name or model, "routing": routing, "limit": limit, "batch_size": batch_size, "dtype": experiment.dtype}
    settings["fingerprint"] = fingerprint(network)
    run = settings["model"] if routing is None else f"{settings['model']}, {routing}"
    _found(output, settings)  # other settings are told before anything is scored
    with told_when_full(output, "free some, or choose another --output"):
        for number, (name, task) in enumerate(zip(names, tasks, strict=True), 1):
            done = run_step(evaluate_task, (network, tokenizer, task), {"limit": limit, "batch_size": batch_size, **trust}, home=home)
            fresh = [frame.assign(run=run) for frame in done.value]
            scores = _add(output, settings, {name: sources[name]}, fresh, home)
            say(f"[{number}/{len(tasks)}] {name}: {'read from the cache' if done.cached else f'{done.seconds:.0f} s'}")
    say(f"\n{_score_text(scores)}\nscores: {os.path.relpath(output)}")


# --- one model -----------------------------------------------------------------------------------------------------------------------


def _experiment(model: str, given: Sequence[str]) -> "Experiment":
    from dynamoe_lab.config import load_experiment

    experiment = load_experiment("quick", [*given, f"model={json.dumps(model)}"])  # first, for it knows names that are misspelt
    for pair in given:
        if pair.startswith("model="):
            raise InputError(f"-p {pair}: the model is the command's first argument")
        if not pair.startswith(_FIELDS):
            raise InputError(f"-p {pair}: scores do not depend on it; give {', '.join(name.rstrip('.') for name in _FIELDS[:-1])}")
    return experiment


def _deployed(network: "PreTrainedModel", name: str, say: Callable[[str], None]) -> "PreTrainedModel":
    """What is scored of a masked ToMoE checkpoint: the form that it is used in, the same function."""
    if not hasattr(network, "layer_masks"):
        return network
    from dynamoe_lab.conversion import export

    say(f"{name}: a masked ToMoE model; scored is its deployed form, which lab.export makes")
    return export(network)


def _set_routing(model: "PreTrainedModel", routing: str | None, name: str) -> str | None:
    """Route a converted model as asked; None of a dense model, which has none."""
    from dynamoe_lab.models import RoutedMixin

    if not isinstance(model, RoutedMixin):
        if routing is not None:
            raise InputError(
                f"--routing {routing}: {name} is dense, it has no experts; leave --routing out, or give a converted checkpoint"
            )
        return None
    routing = routing or "router"
    number, experts = whole_number(routing), model.moe.num_experts
    mode = routing if number is None else number
    names = [name for name, reason in model.routing_modes.items() if reason is None and name != "random"]
    if mode == "random":
        raise InputError(f"--routing random: it needs the shares of a router; give {', '.join(names)}, or an expert's index")
    if isinstance(mode, int) and mode >= experts:
        raise InputError(f"--routing {mode}: give {', '.join(names)}, or an expert's index from 0 to {experts - 1}")
    check_modes([mode], experts, "--routing", model.method)
    model.set_routing(mode)
    return routing


def _found(output: Path, settings: dict[str, Any]) -> "tuple[pd.DataFrame | None, pd.DataFrame | None]":
    """The tables of an earlier call with the same settings; nothing if it wrote none yet."""
    import pandas as pd

    if not (output / SETTINGS).is_file():
        return None, None
    before = read_json(output / SETTINGS)
    differs = [name for name, value in settings.items() if not isinstance(before, dict) or before.get(name) != value]
    if differs:
        name = differs[0]
        told = "another model" if name in ("fingerprint", "model") else f"{name} {before.get(name)}, not {settings[name]}"
        raise InputError(f"{output}: holds scores of {told}; choose another --output, or remove it")
    try:
        return tuple(pd.read_parquet(output / f"{name}.parquet") for name in ("scores", "documents"))
    except (OSError, ValueError) as error:
        if unreadable(error):  # the next write would drop the other tasks' rows
            raise InputError(f"{output}: its tables cannot be read ({first_line(error)}); nothing was changed, run again") from error
        return None, None  # killed before its first task, or damaged: steps have what was finished


def _check_sources(output: Path, sources: dict[str, str]) -> None:
    """Refuse a task whose name stands in the folder for another one: its scores would replace those."""
    if not (output / SETTINGS).is_file():
        return
    before = read_json(output / SETTINGS)
    known = before.get("tasks", {}) if isinstance(before, dict) else {}
    for name, source in sources.items():
        if known.get(name, source) != source:
            raise InputError(f"{output}: holds task {name} from {known[name]}, not from {source}; choose another --output, or another name")


def _add(output: Path, settings: dict[str, Any], source: dict[str, str], fresh: "Sequence[pd.DataFrame]", home: Path) -> "pd.DataFrame":
    """Put a task into the folder's tables, which another process may be writing, too; returns table `scores`."""
    import pandas as pd

    with locked(folder_lock(home, output), waits_for=f"the tables of {output}"):
        remove_leftovers(output)
        found = _found(output, settings)
        _check_sources(output, source)
        before = read_json(output / SETTINGS).get("tasks", {}) if (output / SETTINGS).is_file() else {}
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / SETTINGS, {**settings, "tasks": {**before, **source}})
        (name,) = source
        scores, documents = (
            pd.concat([old[old["task"] != name], new], ignore_index=True) if old is not None else new
            for old, new in zip(found, fresh, strict=True)
        )
        _write(output, scores, documents)
    return scores


def _write(output: Path, scores: "pd.DataFrame", documents: "pd.DataFrame") -> None:
    """Documents first: a reader that finds a task's scores finds its documents, too."""
    for name, frame in (("documents", documents), ("scores", scores)):
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        write_atomic(output / f"{name}.parquet", buffer.getvalue())
    write_atomic(output / "scores.csv", scores.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def _score_text(scores: "pd.DataFrame") -> str:
    """The scores for a terminal: a row a task, accuracies with 95 % intervals, the averages below, and what is not lm-eval's own split."""
    from dynamoe_lab.analysis.metrics import benchmark_points
    from dynamoe_lab.analysis.metrics.benchmarks import AVERAGE, SHARES

    table = scores.pivot_table(index="task", columns="metric", values=["value", "stderr", "n"], sort=False, dropna=False)
    order = list(benchmark_points(scores)["task"]) if "acc" in set(scores["metric"]) else []
    order += [task for task in table.index if task not in order]
    known = dict.fromkeys(scores["metric"])
    shown = [name for name in _SHOWN if name in known] + [name for name in known if name not in (*_SHOWN, *_COUNTED)]
    ends = {name: benchmark_points(scores, metric=name).set_index("task") for name in shown if name in SHARES}
    rows = []
    for task in (name for name in order if name in table.index):
        value, error = table.loc[task, "value"], table.loc[task, "stderr"]
        n = scores.loc[(scores["task"] == task) & (scores["metric"] != "active_params"), "n"].min()
        cells = [_measured(name, value.get(name), error.get(name), ends.get(name), task) for name in shown]
        rows.append(
            [task, f"{int(n):,}", *cells, millions_text(value.get("active_params")), f"{value.get('seconds_total', float('nan')):.0f} s"]
        )
    if len(rows) > 1:
        means = []
        for name in shown:
            values = scores.loc[scores["metric"] == name, "value"]
            means.append(_measured(name, values.mean(), None, ends.get(name), AVERAGE) if len(values) == len(rows) else "")
        active = scores.loc[scores["metric"] == "active_params", "value"].mean()
        total = scores.loc[scores["metric"] == "seconds_total", "value"].sum()
        rows.append(["average", "", *means, millions_text(active), f"{total:.0f} s"])
    header = ["task", "n", *(_SHOWN.get(name, name) for name in shown), "active params", "time"]
    return "\n".join([table_text(header, rows, right=header[1:]), *score_notes(scores)])


def _measured(name: str, value: float | None, error: float | None, points: "pd.DataFrame | None", task: str) -> str:
    """A score: of accuracies in percent with the 95 % interval of `points`, of others with the standard error."""
    if value is None or value != value:
        return ""
    if name == "perplexity":  # its distribution is far from symmetric
        return f"{value:.4g}"
    if points is None:
        return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None and error == error else "")
    spread = f" ({100 * points.loc[task, 'low']:.1f} to {100 * points.loc[task, 'high']:.1f})" if task in points.index else ""
    return f"{100 * value:.1f} %{spread}"


def score_notes(scores: "pd.DataFrame") -> list[str]:
    """A line on the tasks whose documents are not lm-eval's own; none if there are no such tasks."""
    from dynamoe_lab.analysis.metrics.benchmarks import split_note

    note = split_note(scores)
    return [f"not lm-eval's own documents: {note}"] if note else []
