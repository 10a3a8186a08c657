"""Two models on the same benchmark documents: every run beside a reference, task by task and on average.

Accuracies are compared document by document; two error bars that overlap say nothing about a difference.
"""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import one_run, require
from dynamoe_lab.analysis.metrics.benchmarks import AVERAGE, AVERAGE4, FOUR, SHARES, in_order
from dynamoe_lab.analysis.pairing import detectable_change, detectable_mean, holm, mcnemar, stratified_means
from dynamoe_lab.errors import InputError

__all__ = ["benchmark_deltas", "other_texts", "told_apart"]


def benchmark_deltas(
    documents: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    metric: str = "acc",
    bootstrap: int = 2_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Every run minus a reference (its dense parent) on the same documents, task by task and on average.

    Args:
        documents: table `documents`: run, task, doc_id, metric, value; several runs are several sets of rows. With a column `seed`, the
            seeds of a run are averaged document by document. With a column `digest`, documents of one doc_id must have the same.
        reference: the same of one other model.
        metric: "acc", "acc_norm", or a number a document has, such as "bits_per_byte".
        bootstrap, confidence, seed: resamples of documents (within tasks) and level of the intervals.

    Returns:
        One row per run and task, then "average" (unweighted mean over tasks) and, where more than the paper's four tasks were scored,
        "average4": run, task, metric, value, reference_value, difference, low, high, relative (value / reference_value - 1),
        relative_low, relative_high; mcnemar_p (exact, two-sided) and holm_p (adjusted for all tasks of the run), only_run and
        only_reference (documents that only one of the two has right), all four of documents that are right or wrong, of a single seed,
        else nan; detectable (the smallest difference this sample shows with 80 % power: of a task with a holm_p at 5 % over the number of
        tasks, the strictest that Holm's correction asks for, else at 5 %), n (documents), seeds, seed_low, seed_high (lowest and highest
        difference of a single seed), confidence; split, if `documents` has it. An interval is nan where no document tells the two apart;
        with fewer than about ten discordant documents a bootstrap interval is too short, and the exact p decides (`told_apart`).

    Raises:
        InputError: a task's documents differ between the two, in number or text (it says how many), or no rows of the metric.

    Example:
        >>> dense = pd.DataFrame({"run": "dense", "task": "sciq", "doc_id": range(10), "metric": "acc", "value": 1.0})
        >>> router = dense.assign(run="router", value=[0.0] * 6 + [1.0] * 4)  # six documents are lost, none is gained
        >>> deltas = lab.benchmark_deltas(router, dense)
        >>> deltas[["run", "task", "difference", "only_reference", "mcnemar_p", "n"]]  # 2 * (1/2)**6
              run  task  difference  only_reference  mcnemar_p   n
        0  router  sciq        -0.6               6    0.03125  10
    """
    needed = ("run", "task", "doc_id", "metric", "value")
    require(documents, needed, "benchmark_deltas")
    require(reference, needed, "benchmark_deltas: the reference")
    one_run(reference, "benchmark_deltas: the reference")
    ours, theirs = (_documents_of(frame, metric) for frame in (documents, reference))
    settings, found = {"resamples": bootstrap, "confidence": confidence, "seed": seed}, []
    for run, part in ours.groupby("run", sort=False):
        pairs = _paired(str(run), part, theirs)
        tested = sum(_is_tested(pair, metric) for pair in pairs.values())
        rows = [{"run": run, "task": task, **_task_row(pair, metric, settings, tested)} for task, pair in pairs.items()]
        for row, adjusted in zip(rows, holm([row["mcnemar_p"] for row in rows]), strict=True):
            row["holm_p"] = float(adjusted)
        averages = {AVERAGE: tuple(pairs)} if len(pairs) > 1 else {}
        averages |= {AVERAGE4: FOUR} if set(FOUR) < set(pairs) else {}
        rows += [{"run": run, "task": name, **_average_row([pairs[t] for t in tasks], settings)} for name, tasks in averages.items()]
        found += rows
    numbers = ["value", "reference_value", "difference", "low", "high", "relative", "relative_low", "relative_high", "mcnemar_p", "holm_p"]
    numbers += ["only_run", "only_reference", "detectable", "n", "seeds", "seed_low", "seed_high"]
    deltas = pd.DataFrame(found).assign(metric=metric)[["run", "task", "metric", *numbers]].assign(confidence=confidence)
    if "split" in documents.columns:
        splits = documents.drop_duplicates("task").set_index("task")["split"]
        deltas["split"] = deltas["task"].map(splits).fillna("")
    return deltas


def told_apart(deltas: pd.DataFrame) -> pd.Series:
    """Whether each row of `benchmark_deltas` is a difference: holm_p < 0.05 where McNemar's test applies, else an interval without 0."""
    return (deltas["holm_p"] < 0.05).where(deltas["holm_p"].notna(), (deltas["low"] > 0) | (deltas["high"] < 0))


def other_texts(documents: pd.DataFrame, reference: pd.DataFrame) -> tuple[int, int]:
    """(how many documents ask or answer something else in the two, how many both have), by doc_id and digest, of one task.

    Documents of earlier tables, which have no digest, count as the same.
    """
    both = set(documents["doc_id"]) & set(reference["doc_id"])
    if "digest" not in documents or "digest" not in reference:
        return 0, len(both)
    rows = pd.concat([frame[["doc_id", "digest"]] for frame in (documents, reference)])
    return int((rows[rows["doc_id"].isin(both)].groupby("doc_id")["digest"].nunique() > 1).sum()), len(both)


def _documents_of(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = frame[frame["metric"] == metric]
    if rows.empty:
        raise InputError(f"benchmark_deltas: no rows of metric {metric!r}; the frame has {', '.join(sorted(set(frame['metric'])))}")
    rows = rows if "seed" in rows else rows.assign(seed=0)
    keys = ["run", "task", "seed", "doc_id"]
    if rows.duplicated(keys).any():
        row = rows[rows.duplicated(keys)].iloc[0]
        raise InputError(f"benchmark_deltas: task {row['task']} has document {row['doc_id']} twice in run {row['run']!r}")
    if not np.isfinite(rows["value"].astype(float)).all():
        row = rows[~np.isfinite(rows["value"].astype(float))].iloc[0]
        raise InputError(f"benchmark_deltas: task {row['task']}, document {row['doc_id']}: {metric} is not finite; score it again")
    return in_order(rows)


def _paired(run: str, part: pd.DataFrame, reference: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """task -> values of the run [seeds, documents] and of the reference [documents], the same documents in the same order."""
    pairs = {}
    for task in dict.fromkeys([*part["task"], *reference["task"]]):
        own, base = part[part["task"] == task], reference[reference["task"] == task]
        table = own.pivot(index="seed", columns="doc_id", values="value").astype(float)
        other = base.groupby("doc_id")["value"].mean().astype(float)
        extra, absent = set(table.columns) - set(other.index), set(other.index) - set(table.columns)
        if extra or absent or table.isna().any(axis=None):
            counts = f"{table.shape[1]} in run {run!r}, {len(other)} in the reference, {len(other) - len(absent)} in both"
            raise InputError(f"benchmark_deltas: task {task}: the documents differ ({counts}); score both on the same documents and limit")
        other_text, both = other_texts(own, base)
        if other_text:
            told = f"{other_text} of {both} documents differ in text"
            raise InputError(
                f"benchmark_deltas: task {task}: {told} between run {run!r} and the reference; score both on the same documents"
            )
        pairs[task] = (table[other.index].to_numpy(), other.to_numpy())
    return pairs


def _is_tested(pair: tuple[np.ndarray, np.ndarray], metric: str) -> bool:
    """Whether McNemar's test applies: both have each document right or wrong, once."""
    seeds, base = pair
    return metric in SHARES and len(seeds) == 1 and bool(np.isin(seeds, (0, 1)).all() and np.isin(base, (0, 1)).all())


def _task_row(pair: tuple[np.ndarray, np.ndarray], metric: str, settings: dict, tested: int) -> dict[str, float]:
    """`tested`: tasks that McNemar's test is made for."""
    (seeds, base), row = pair, _average_row([pair], settings)
    if not _is_tested(pair, metric):
        return row
    only_run, only_reference = int((seeds[0] > base).sum()), int((seeds[0] < base).sum())
    row |= {"only_run": only_run, "only_reference": only_reference, "mcnemar_p": mcnemar(only_run, only_reference)}
    return row | {"detectable": detectable_change(len(base), (only_run + only_reference) / len(base), level=0.05 / tested)}


def _average_row(pairs: list[tuple[np.ndarray, np.ndarray]], settings: dict) -> dict[str, float]:
    means = stratified_means([(seeds.mean(axis=0), base) for seeds, base in pairs], **settings)
    value, reference = (float(np.mean([pair[side].mean() for pair in pairs])) for side in (0, 1))
    row = {"value": value, "reference_value": reference}
    row |= dict(zip(("difference", "low", "high"), means.difference, strict=True))
    row |= dict(zip(("relative", "relative_low", "relative_high"), means.relative, strict=True))
    variances = [np.var(seeds.mean(axis=0) - base, ddof=1) / len(base) if len(base) > 1 else np.nan for seeds, base in pairs]
    error, least = np.sqrt(np.sum(variances)) / len(pairs), min(len(base) for _, base in pairs)
    seeds = {len(seeds) for seeds, _ in pairs}
    each = np.mean([seeds.mean(axis=1) - base.mean() for seeds, base in pairs], axis=0) if len(seeds) == 1 else np.array([np.nan])
    row |= {"mcnemar_p": np.nan, "holm_p": np.nan, "only_run": np.nan, "only_reference": np.nan}
    row |= {"detectable": detectable_mean(error, least), "n": means.n, "seeds": max(seeds)}
    return row | {"seed_low": float(each.min()), "seed_high": float(each.max())}
