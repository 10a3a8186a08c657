"""`dynamoe-lab eval` and `compare`: score one model on lm-eval's tasks into a folder, and set two such folders side by side.

A task is a step: the folder is written again as each one finishes, and the same command after a kill goes on with the next.
"""

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.cells import Inputs, check_modes
from dynamoe_lab.workbench.files import read_json, told_when_full, write_atomic, write_json
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.inventory import table_text
from dynamoe_lab.workbench.steps import run_step

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from dynamoe_lab.config import Experiment

__all__ = ["compare_scores", "default_folder", "score_to_folder"]

SETTINGS = "eval.json"  # beside the tables: what was scored, and how
_FIELDS = ("device", "dtype", "threads", "seed", "trust_remote_code", "evaluate.")  # of an experiment, that scores depend on
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
        InputError: `output` holds something else, an unknown task or routing, a limit or batch size below 1.
    """
    import pandas as pd

    from dynamoe_lab.evaluation import evaluate_task
    from dynamoe_lab.evaluation.tasks import TASKS, load_tasks

    for name, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(
                f"{name} {value}: give a whole number of at least 1{', or leave it out for all documents' * (name == '--limit')}"
            )
    experiment, tasks = _experiment(model, given), list(tasks or TASKS)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / SETTINGS).is_file())):
        raise InputError(f"{output}: not an empty folder, and no scores to go on with; choose another --output, or remove it")
    load_tasks(tasks)  # a wrong name or missing data is told before a model is loaded
    environment.seed_generators(experiment.seed, experiment.threads)
    network, tokenizer = Inputs().model(experiment)
    network = _deployed(network, model, say)
    routing = _set_routing(network, routing, model)
    batch_size = batch_size or experiment.evaluate.batch_size
    settings = {"model": Path(model).name or model, "routing": routing, "limit": limit, "batch_size": batch_size, "dtype": experiment.dtype}
    settings["fingerprint"] = fingerprint(network)
    run = settings["model"] if routing is None else f"{settings['model']}, {routing}"
    scores, documents = _found(output, settings)
    with told_when_full(output, "free some, or choose another --output"):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / SETTINGS, settings)
        for number, task in enumerate(tasks, 1):
            done = run_step(evaluate_task, (network, tokenizer, task), {"limit": limit, "batch_size": batch_size}, home=home)
            fresh = [frame.assign(run=run) for frame in done.value]
            name = fresh[0]["task"].iloc[0]
            scores, documents = (
                pd.concat([old[old["task"] != name], new], ignore_index=True) if old is not None else new
                for old, new in zip((scores, documents), fresh, strict=True)
            )
            _write(output, scores, documents)
            say(f"[{number}/{len(tasks)}] {name}: {'read from the cache' if done.cached else f'{done.seconds:.0f} s'}")
    say(f"\n{_score_text(scores)}\nscores: {os.path.relpath(output)}")


def compare_scores(first: Path, second: Path, *, metric: str = "acc", tasks: Sequence[str] = (), confidence: float = 0.95) -> str:
    """First minus second, task by task on the same documents, as a table of text.

    Args:
        first, second: folders that `score_to_folder` wrote; the second is what the first is compared with, usually the dense parent.
        metric: "acc", "acc_norm", "bits_per_byte" or "loglikelihood".
        tasks: those to compare; none: all, which both folders must have.

    Raises:
        InputError: no scores in a folder; other tasks, splits, versions or documents.
    """
    from dynamoe_lab.analysis.metrics import benchmark_deltas

    folders = [_read(Path(folder), metric, tasks) for folder in (first, second)]
    (settings, scores, documents), (other_settings, other_scores, reference) = folders
    versions = [frame.drop_duplicates("task").set_index("task")[["split", "task_version"]] for frame in (scores, other_scores)]
    for task in versions[0].index.intersection(versions[1].index):
        for name in ("split", "task_version"):
            one, other = (frame.loc[task, name] for frame in versions)
            if one != other:
                raise InputError(f"task {task}: {name} {one} in {first}, {other} in {second}; score both with the same definition")
    deltas = benchmark_deltas(documents, reference, metric=metric, confidence=confidence)
    lines = [
        _described(letter, folder) for letter, folder in (("A", (first, settings, scores)), ("B", (second, other_settings, other_scores)))
    ]
    lines += ["", _delta_text(deltas, metric), ""]
    lines.append(f"A - B on the same documents, {confidence:.0%} intervals from resampling documents; average: mean over tasks.")
    if metric in ("acc", "acc_norm"):
        lines.append(
            "A only, B only: documents that one of them has right; p: McNemar's exact test, two-sided; Holm: p adjusted for all tasks."
        )
    lines.append("detectable: the smallest difference that this sample shows with 80 % power at the 5 % level.")
    return "\n".join([*lines, *_notes(scores)])


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
    mode = int(routing) if routing.isdigit() else routing
    if mode == "random":
        raise InputError("--routing random: it needs the shares of a router; give router, full, label (DynaMoE), or an expert's index")
    check_modes([mode], model.moe.num_experts, "--routing", model.method)
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
    except (OSError, ValueError):  # killed before its first task, or damaged: steps have what was finished
        return None, None


def _write(output: Path, scores: "pd.DataFrame", documents: "pd.DataFrame") -> None:
    """Documents first: a reader that finds a task's scores finds its documents, too."""
    for name, frame in (("documents", documents), ("scores", scores)):
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        write_atomic(output / f"{name}.parquet", buffer.getvalue())
    write_atomic(output / "scores.csv", scores.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def _score_text(scores: "pd.DataFrame") -> str:
    """The scores for a terminal: a row a task, the averages below, and what is not lm-eval's own split."""
    from dynamoe_lab.analysis.metrics import benchmark_points

    table = scores.pivot_table(index="task", columns="metric", values=["value", "stderr", "n"], sort=False, dropna=False)
    order = list(benchmark_points(scores)["task"]) if "acc" in set(scores["metric"]) else []
    order += [task for task in table.index if task not in order]
    shown = [name for name in _SHOWN if name in set(scores["metric"])]
    rows = []
    for task in (name for name in order if name in table.index):
        value, error = table.loc[task, "value"], table.loc[task, "stderr"]
        n = scores.loc[(scores["task"] == task) & (scores["metric"] != "active_params"), "n"].min()
        cells = [_measured(name, value.get(name), error.get(name)) for name in shown]
        rows.append(
            [task, f"{int(n):,}", *cells, _millions(value.get("active_params")), f"{value.get('seconds_total', float('nan')):.0f} s"]
        )
    if len(rows) > 1:
        means = []
        for name in shown:
            values = scores.loc[scores["metric"] == name, "value"]
            means.append(_measured(name, values.mean(), None) if len(values) == len(rows) else "")
        active = scores.loc[scores["metric"] == "active_params", "value"].mean()
        total = scores.loc[scores["metric"] == "seconds_total", "value"].sum()
        rows.append(["average", "", *means, _millions(active), f"{total:.0f} s"])
    header = ["task", "n", *(_SHOWN[name] for name in shown), "active params", "time"]
    return "\n".join([table_text(header, rows, right=header[1:]), *_notes(scores)])


def _measured(name: str, value: float | None, error: float | None) -> str:
    if value is None or value != value:
        return ""
    if name == "perplexity":  # its distribution is far from symmetric
        return f"{value:.4g}"
    scale, digits, unit = (100, 1, " %") if name in ("acc", "acc_norm") else (1, 3, "")
    spread = f" ± {scale * error:.{digits}f}" if error is not None and error == error else ""
    return f"{scale * value:.{digits}f}{spread}{unit}"


def _millions(value: float | None) -> str:
    return "" if value is None or value != value else f"{value / 1e6:,.1f} M"


def _notes(scores: "pd.DataFrame") -> list[str]:
    from dynamoe_lab.analysis.metrics.benchmarks import split_note

    note = split_note(scores)
    return [f"not lm-eval's own documents: {note}"] if note else []


# --- two of them ---------------------------------------------------------------------------------------------------------------------


def _read(folder: Path, metric: str, tasks: Sequence[str]) -> "tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]":
    """Settings, scores and documents of a folder, the given tasks alone."""
    import pandas as pd

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it with: dynamoe-lab eval MODEL --output {folder}")
    if not (folder / SETTINGS).is_file() or not (folder / "scores.parquet").is_file():
        raise InputError(f"{folder}: no scores in this folder; make some with: dynamoe-lab eval MODEL --output {folder}")
    try:
        scores, documents = (pd.read_parquet(folder / f"{name}.parquet") for name in ("scores", "documents"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its tables cannot be read ({str(error).splitlines()[0]}); remove it and score again") from error
    if absent := sorted(set(tasks) - set(scores["task"])):
        raise InputError(f"{folder}: task {absent[0]} was not scored; there is {', '.join(scores['task'].unique())}")
    if tasks:
        scores, documents = (frame[frame["task"].isin(tasks)] for frame in (scores, documents))
    if metric not in set(documents["metric"]):
        raise InputError(f"--metric {metric}: not in {folder}; there is {', '.join(sorted(set(documents['metric'])))}")
    return read_json(folder / SETTINGS), scores, documents


def _described(letter: str, folder: "tuple[Path, dict[str, Any], pd.DataFrame]") -> str:
    path, settings, scores = folder
    active = scores.loc[scores["metric"] == "active_params", "value"].mean()
    routed = f", routing {settings['routing']}" if settings.get("routing") else ""
    limit = f", first {settings['limit']} documents" if settings.get("limit") else ""
    return f"{letter}: {path} ({settings.get('model')}{routed}, {settings.get('dtype')}{limit}, {_millions(active)} active parameters)"


def _delta_text(deltas: "pd.DataFrame", metric: str) -> str:
    share = metric in ("acc", "acc_norm")
    scale, form, sign = (100, "{:.1f} %", "{:+.1f}") if share else (1, "{:.3f}", "{:+.3f}")
    header = ["task", "n", "A", "B", "A - B" + " (points)" * share, "interval"]
    header += ["A only", "B only", "p", "p (Holm)", "detectable"] if share else ["detectable"]
    rows = []
    for row in deltas[deltas["task"] != "average4"].to_dict("records"):
        ends = "" if row["low"] != row["low"] else f"{sign.format(scale * row['low'])} to {sign.format(scale * row['high'])}"
        cells = [row["task"], f"{row['n']:,}", form.format(scale * row["value"]), form.format(scale * row["reference_value"])]
        cells += [sign.format(scale * row["difference"]), ends or "no interval"]
        if share:
            tested = row["mcnemar_p"] == row["mcnemar_p"]
            cells += [f"{row[name]:.0f}" if tested else "" for name in ("only_run", "only_reference")]
            cells += [f"{row[name]:.3g}" if tested else "" for name in ("mcnemar_p", "holm_p")]
        cells.append("" if row["detectable"] != row["detectable"] else f"{scale * row['detectable']:.{1 if share else 3}f}")
        rows.append(cells)
    return table_text(header, rows, right=header[1:])
