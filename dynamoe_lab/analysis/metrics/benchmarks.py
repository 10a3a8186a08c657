"""Scores of the seven benchmarks: with intervals and chance levels, in the columns of the paper's table, beside the paper's.

Accuracies of models of other sizes are compared as a change relative to each one's own base model
(`relative_table`), so that scale is not mistaken for method.
"""

from importlib.resources import files
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from dynamoe_lab.analysis.frames import list_names, require
from dynamoe_lab.errors import InputError

__all__ = [
    "benchmark_points",
    "benchmark_table",
    "benchmark_task",
    "in_order",
    "paper_table",
    "relative_table",
    "split_note",
]

AVERAGE, AVERAGE4, AVERAGE7 = "average", "average4", "average7"
SHARES = ("acc", "acc_norm")  # metrics that are a share of documents answered right


class BenchmarkTask(NamedTuple):
    """What a reader has to know about a task."""

    label: str
    chance: float  # accuracy of guessing; nan: unknown


_TASKS = {  # in the order of the paper's Table 1
    "arc_easy": BenchmarkTask("ARC-easy", 0.25),
    "lambada_openai": BenchmarkTask("LAMBADA", 0.0),
    "piqa": BenchmarkTask("PIQA", 0.5),
    "winogrande": BenchmarkTask("WinoGrande", 0.5),
    "sciq": BenchmarkTask("SciQ", 0.25),
    "hellaswag": BenchmarkTask("HellaSwag", 0.25),
    "arc_challenge": BenchmarkTask("ARC-challenge", 0.25),
}
FOUR = tuple(_TASKS)[:4]  # the paper's Avg4
_COLUMNS = (*FOUR, AVERAGE4, *tuple(_TASKS)[4:], AVERAGE7)  # of the paper's table
_AVERAGES = {
    AVERAGE: BenchmarkTask("average", float("nan")),
    AVERAGE4: BenchmarkTask("average of four", float(np.mean([_TASKS[name].chance for name in FOUR]))),
    AVERAGE7: BenchmarkTask("average of seven", float(np.mean([task.chance for task in _TASKS.values()]))),
}


def benchmark_task(name: str) -> BenchmarkTask:
    """A task's (or average's) name for people and its chance level; of other tasks the name alone."""
    return {**_TASKS, **_AVERAGES}.get(name, BenchmarkTask(name, float("nan")))


def split_note(frame: pd.DataFrame) -> str:
    """'SciQ: validation (stock: test)' and the like, of the tasks of a frame (task, split) whose documents are not those that lm-eval's own
    definition scores: their split has a remark in parentheses. '' if there are none, or the splits are unknown.

    Example:
        >>> lab.split_note(pd.DataFrame({"task": ["sciq", "piqa"], "split": ["validation (stock: test)", "validation"]}))
        'SciQ: validation (stock: test)'
    """
    if not {"task", "split"} <= set(frame.columns):
        return ""
    other: dict[str, list[str]] = {}
    for task, split in frame[["task", "split"]].dropna().drop_duplicates().itertuples(index=False):
        if "(" in split:
            other.setdefault(split, []).append(benchmark_task(task).label)
    return "; ".join(f"{list_names(labels, 7)}: {split}" for split, labels in other.items())


def benchmark_points(scores: pd.DataFrame, *, metric: str = "acc", confidence: float = 0.95) -> pd.DataFrame:
    """Scores with intervals and chance levels, in the paper's order of tasks; of every run also the mean over tasks.

    Args:
        scores: table `scores`: run, task, split, metric, value, stderr, n.
        metric: rows to take.
        confidence: of the intervals: Wilson's of accuracies, else value plus and minus stderr; of the average from its tasks' errors.

    Returns:
        run, task, split, metric, value, low, high, n, chance (nan where unknown), active_params (on this task's tokens; nan where it was
        not counted). Rows "average": over all tasks of the frame, for runs that have them all; n is the sum.

    Raises:
        InputError: no rows of the metric, or two of one run and task.

    Example:
        >>> scores = pd.DataFrame({"run": "dense", "task": ["sciq", "piqa"], "split": "validation", "metric": "acc", "value": [0.8, 0.7]})
        >>> lab.benchmark_points(scores.assign(stderr=0.04, n=100))[["task", "value", "low", "high", "n", "chance"]].round(2)
              task  value   low  high    n  chance
        0     piqa   0.70  0.60  0.78  100    0.50
        1     sciq   0.80  0.71  0.87  100    0.25
        2  average   0.75  0.69  0.81  200    0.38
    """
    rows = _rows_of(scores, metric, "benchmark_points")
    active = _active_params(scores)
    quantile = stats.norm.ppf(0.5 + confidence / 2)
    points, tasks = [], list(dict.fromkeys(rows["task"]))
    for run, part in rows.groupby("run", sort=False):
        own = []
        for row in part.itertuples():
            n = int(row.n)
            if metric in SHARES:
                low, high = stats.binomtest(round(row.value * n), n).proportion_ci(confidence, method="wilson")
                error = np.sqrt(row.value * (1 - row.value) / n)
            else:
                error = float(row.stderr) if pd.notna(row.stderr) else np.nan
                low, high = row.value - quantile * error, row.value + quantile * error
            place = {
                "run": run,
                "task": row.task,
                "split": row.split,
                "metric": metric,
                "value": float(row.value),
                "low": low,
                "high": high,
            }
            place |= {"n": n, "chance": benchmark_task(row.task).chance if metric in SHARES else np.nan}
            own.append((place | {"active_params": active.get((run, row.task), np.nan)}, error))
        points += [place for place, _ in own]
        if len(own) == len(tasks) > 1 and metric in SHARES:
            mean = {name: float(np.mean([place[name] for place, _ in own])) for name in ("value", "chance", "active_params")}
            error = quantile * np.sqrt(np.square([error for _, error in own]).sum()) / len(own)
            place = {"run": run, "task": AVERAGE, "split": "", "metric": metric, "value": mean["value"]}
            place |= {"low": mean["value"] - error, "high": mean["value"] + error, "n": sum(place["n"] for place, _ in own)}
            points.append(place | {"chance": mean["chance"], "active_params": mean["active_params"]})
    return pd.DataFrame(points)


def benchmark_table(scores: pd.DataFrame, *, metric: str = "acc") -> pd.DataFrame:
    """One row a run, a column a task, as in the paper's Table 1.

    Args:
        scores: table `scores`: run, task, split, metric, value, stderr, n; the parameters that a token activates are in its rows of metric
            "active_params".

    Returns:
        run, metric, active_params (mean over the run's tasks, the paper's Params), the seven tasks with average4 and average7 between them
        as in the paper (nan where a task is missing), tasks beyond the seven, n (documents of all tasks), note (`split_note`).

    Raises:
        InputError: no rows of the metric, or two of one run and task.

    Example:
        >>> scores = pd.DataFrame({"run": "dense", "task": ["sciq", "piqa"], "split": "validation", "metric": "acc", "value": [0.8, 0.7]})
        >>> lab.benchmark_table(scores.assign(stderr=0.04, n=100))[["run", "piqa", "average4", "sciq", "n"]]  # two of the four are missing
             run  piqa  average4  sciq    n
        0  dense   0.7       NaN   0.8  200
    """
    rows = _rows_of(scores, metric, "benchmark_table")
    active, table = _active_params(scores), []
    for run, part in rows.groupby("run", sort=False):
        values = dict(zip(part["task"], part["value"].astype(float), strict=True))
        row = {"run": run, "metric": metric, "active_params": np.mean([active.get((run, task), np.nan) for task in values])}
        values |= {AVERAGE4: _mean(values, FOUR), AVERAGE7: _mean(values, tuple(_TASKS))}
        row |= {name: values.get(name, np.nan) for name in dict.fromkeys((*_COLUMNS, *rows["task"]))}
        table.append(row | {"n": int(part["n"].sum()), "note": split_note(part)})
    return pd.DataFrame(table)


def paper_table() -> pd.DataFrame:
    """Table 1 of arXiv 2502.12325: zero-shot accuracies as shares, averages as printed, and their change relative to each row's base model.

    Returns:
        model, base (the dense model it was made from, itself for dense rows), tokens (trained on; nan: none), active_params, a column per
        task with average4 and average7; for each of these and for active_params `<name>_change`, value / the base model's - 1.

    Example:
        >>> table = lab.paper_table().set_index("model")
        >>> table.loc[["Mistral-7B", "DynaMoE θ=0.9"], ["active_params", "sciq", "average7", "average7_change"]].round(3)
                       active_params   sciq  average7  average7_change
        model
        Mistral-7B      7.000000e+09  0.964     0.742            0.000
        DynaMoE θ=0.9   6.000000e+09  0.952     0.701           -0.055
    """
    with files("dynamoe_lab.analysis").joinpath("data/dynamoe_table1.csv").open(encoding="utf-8") as stream:
        table = pd.read_csv(stream)
    table[list(_COLUMNS)] /= 100
    bases = table.set_index("model").loc[table["base"]]
    for name in ("active_params", *_COLUMNS):
        table[f"{name}_change"] = table[name].to_numpy() / bases[name].to_numpy() - 1
    return table


def relative_table(deltas: pd.DataFrame, paper: pd.DataFrame, *, active: pd.DataFrame, base: str = "dense") -> pd.DataFrame:
    """Our models and the paper's, each as a change relative to its own base model.

    Args:
        deltas: of `benchmark_deltas`, metric "acc".
        paper: of `paper_table`.
        active: of `benchmark_table`, with the runs of `deltas` and the base: whose active_params they are.
        base: the run in `active` that is the reference of `deltas`.

    Returns:
        source ("ours" or "paper"), model, base, task (the seven, average4, average7; "average" of other sets of tasks), base_value, change,
        low, high (nan in the paper's rows, which come without intervals), floor (the change at which a model only guesses: near 0 where
        the base hardly does better itself), params_share (of the base's active parameters), n; split, if `deltas` has it ("" of the paper).

    Raises:
        InputError: a column is missing, or `active` lacks a run.

    Example:
        >>> right = pd.DataFrame({"run": "dense", "task": "sciq", "doc_id": range(4), "metric": "acc", "value": [1.0, 1.0, 1.0, 1.0]})
        >>> deltas = lab.benchmark_deltas(right.assign(run="router", value=[1.0, 1.0, 1.0, 0.0]), right)
        >>> active = pd.DataFrame({"run": ["dense", "router"], "active_params": [134e6, 113e6]})
        >>> relative = lab.relative_table(deltas, lab.paper_table(), active=active)
        >>> relative.loc[relative["source"] == "ours", ["model", "task", "base_value", "change", "params_share"]].round(2)
            model  task  base_value  change  params_share
        0  router  sciq         1.0   -0.25          0.84
    """
    require(deltas, ("run", "task", "metric", "reference_value", "relative", "relative_low", "relative_high", "n"), "relative_table")
    require(active, ("run", "active_params"), "relative_table: active")
    params = active.set_index("run")["active_params"]
    if missing := sorted({base, *deltas["run"]} - set(params.index)):
        raise InputError(f"relative_table: active has no row of {list_names(missing)}; it has {list_names(params.index)}")
    rows = []
    for run, part in deltas.groupby("run", sort=False):
        tasks = set(part["task"]) - {*_AVERAGES}
        whole = AVERAGE7 if tasks == set(_TASKS) else AVERAGE4 if tasks == set(FOUR) else AVERAGE
        for row in part.itertuples():
            name = {AVERAGE: whole}.get(row.task, row.task)
            change = {"base_value": row.reference_value, "change": row.relative, "low": row.relative_low, "high": row.relative_high}
            place = {"source": "ours", "model": run, "base": base, "task": name, **change}
            rows.append(place | {"params_share": params[run] / params[base], "n": row.n, "split": getattr(row, "split", "")})
    for _, row in paper[paper["model"] != paper["base"]].iterrows():
        for name in (name for name in _COLUMNS if np.isfinite(row[f"{name}_change"])):
            change = {"base_value": row[name] / (1 + row[f"{name}_change"]), "change": row[f"{name}_change"], "low": np.nan, "high": np.nan}
            place = {"source": "paper", "model": row["model"], "base": row["base"], "task": name, **change}
            rows.append(place | {"params_share": 1 + row["active_params_change"], "n": np.nan, "split": ""})
    frame = pd.DataFrame(rows) if "split" in deltas else pd.DataFrame(rows).drop(columns="split")
    chance = frame["task"].map(lambda task: benchmark_task(task).chance)
    frame.insert(8, "floor", (chance / frame["base_value"].where(frame["base_value"] > 0)) - 1)
    return frame


def _rows_of(scores: pd.DataFrame, metric: str, function: str) -> pd.DataFrame:
    """The rows of a metric, tasks in the paper's order."""
    require(scores, ("run", "task", "split", "metric", "value", "stderr", "n"), function)
    rows = scores[scores["metric"] == metric]
    if rows.empty:
        raise InputError(f"{function}: no rows of metric {metric!r}; the frame has {', '.join(sorted(set(scores['metric'])))}")
    if rows.duplicated(["run", "task"]).any():
        row = rows[rows.duplicated(["run", "task"])].iloc[0]
        raise InputError(f"{function}: several rows of run {row['run']!r} and task {row['task']}; give each run a name of its own")
    return in_order(rows)


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows (run, task) of each run in the paper's order of tasks, others after them; runs in the order of the frame."""
    place, runs = list(_TASKS), list(dict.fromkeys(rows["run"]))
    order = rows["task"].map(lambda task: place.index(task) if task in place else len(place))
    return (
        rows.assign(_run=rows["run"].map(runs.index), _task=order)
        .sort_values(["_run", "_task"], kind="stable")
        .drop(columns=["_run", "_task"])
    )


def _active_params(scores: pd.DataFrame) -> dict[tuple[str, str], float]:
    rows = scores[scores["metric"] == "active_params"]
    return dict(zip(zip(rows["run"], rows["task"], strict=True), rows["value"].astype(float), strict=True))


def _mean(values: dict[str, float], tasks: tuple[str, ...]) -> float:
    return float(np.mean([values.get(task, np.nan) for task in tasks]))
