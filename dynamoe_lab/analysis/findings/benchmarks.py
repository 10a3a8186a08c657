"""What a model lost on the benchmarks, and what the sample was too small to show."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.wording import verdict
from dynamoe_lab.analysis.frames import list_names, percent, require, signed
from dynamoe_lab.analysis.metrics.benchmark_pairs import told_apart
from dynamoe_lab.analysis.metrics.benchmarks import AVERAGE, AVERAGE4, SHARES, benchmark_task, split_note

__all__ = ["benchmark_finding"]

_NEEDED = ("run", "task", "metric", "value", "reference_value", "difference", "low", "high", "holm_p", "detectable", "n", "confidence")
_SAYS = {"acc": "accuracy", "acc_norm": "length-normalised accuracy", "bits_per_byte": "bits per byte of the right answer"}


def benchmark_finding(deltas: pd.DataFrame, *, reference: str = "the dense model's") -> str:
    """What does a model lose against its dense parent, or another reference, on average and where?

    The average is called above or below by its interval, a task's accuracy by McNemar's exact test after Holm's correction for all tasks;
    of the tasks that are not told apart the sentence says which difference their samples could have shown, at a level that holds for all
    tasks (`detectable` of `benchmark_deltas`).

    Args:
        deltas: of `benchmark_deltas`, one metric; with a column `split` the sentence says what is not lm-eval's own.
        reference: whose scores the deltas are differences to, as the sentence says it.

    Raises:
        InputError: a column is missing.

    Example:
        >>> dense = pd.DataFrame({"run": "dense", "task": "sciq", "doc_id": range(10), "metric": "acc", "value": 1.0})
        >>> router = dense.assign(run="router", value=[0.0] * 6 + [1.0] * 4)  # six documents are lost, none is gained
        >>> print(lab.benchmark_finding(lab.benchmark_deltas(router, dense)))
        Router below the dense model's in accuracy by McNemar's exact test, adjusted for all tasks: SciQ -60.0 points (..., p = 0.031)
        (n = 10 documents a task).
    """
    require(deltas, _NEEDED, "benchmark_finding")
    texts = []
    for (run, metric), rows in deltas.groupby(["run", "metric"], sort=False):
        tasks, mean = rows[~rows["task"].isin((AVERAGE, AVERAGE4))], rows[rows["task"] == AVERAGE]
        said, texts_of_run = _SAYS.get(metric, metric), []
        if len(mean):
            row = mean.iloc[0]
            values = f"{_number(row['value'], metric)} against {_number(row['reference_value'], metric)}"
            told = verdict(row["low"], row["high"])
            texts_of_run.append(
                f"averaged over {len(tasks)} tasks the {said} of {run} is {told} {reference} on the same documents: {values}, "
                f"{_change(row['difference'], metric)} ({_spread(row, metric)})"
            )
        apart = told_apart(tasks).to_numpy(dtype=bool)
        tested = " by McNemar's exact test, adjusted for all tasks" if tasks["holm_p"].notna().any() else ""
        below, above = ([_task(row, metric) for _, row in tasks[apart & side].iterrows()] for side in _sides(tasks))
        for names, word in ((below, "below"), (above, "above")):
            if names:
                place = "" if texts_of_run else f" {reference} in {said}"
                texts_of_run.append(f"{'single tasks' if texts_of_run else run} {word}{place}{tested}: {list_names(names, 12)}")
        if not apart.all():
            rest = tasks[~apart]
            limit, at = rest["detectable"], " at 5 % over the number of tasks" if tested else ""
            reach = f", where the samples could show differences of {_range(limit, metric)} or more{at}" if limit.notna().any() else ""
            names = list_names([benchmark_task(task).label for task in rest["task"]], 12)
            texts_of_run.append(f"not distinguishable{'' if below or above else tested}: {names}{reach}")
        texts.append("; ".join(texts_of_run))
    counts = deltas.loc[~deltas["task"].isin((AVERAGE, AVERAGE4)), "n"].astype(int)
    n = f"n = {counts.min():,}" + (f" to {counts.max():,}" if counts.max() > counts.min() else "")
    note = split_note(deltas)
    message = ". ".join(text[0].upper() + text[1:] for text in texts)
    return f"{message} ({n} {'document' if counts.max() == 1 else 'documents'} a task{f'; {note}' if note else ''})."


def _sides(tasks: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return (tasks["difference"] < 0).to_numpy(), (tasks["difference"] > 0).to_numpy()


def _task(row: pd.Series, metric: str) -> str:
    p = f", p = {row['holm_p']:.2g}" if np.isfinite(row["holm_p"]) else ""
    spread = _spread(row, metric).partition("interval ")[2] or "no interval"
    return f"{benchmark_task(row['task']).label} {_change(row['difference'], metric)} ({spread}{p})"


def _number(value: float, metric: str) -> str:
    return percent(value, 1) if metric in SHARES else f"{value:.3f}"


def _change(value: float, metric: str) -> str:
    return f"{signed(100 * value, 1)} points" if metric in SHARES else signed(value, 3)


def _spread(row: pd.Series, metric: str) -> str:
    if not np.isfinite([row["low"], row["high"]]).all():
        return "no interval"
    low, high = (_change(row[name], metric).removesuffix(" points") for name in ("low", "high"))
    return f"{percent(row['confidence'])} interval {low} to {high}"


def _range(limit: pd.Series, metric: str) -> str:
    scale, form = (100, "{:.1f}") if metric in SHARES else (1, "{:.3f}")
    least, most = form.format(scale * limit.min()), form.format(scale * limit.max())
    unit = " points" if metric in SHARES else ""
    return f"{least}{unit}" if least == most else f"{least} to {most}{unit}"
