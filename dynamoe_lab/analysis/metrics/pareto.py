"""What compute buys: points of active parameters against quality, which of them are dominated, and routing beside a static cut."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import ALL, require, split_layers
from dynamoe_lab.analysis.metrics.benchmark_pairs import benchmark_deltas, told_apart
from dynamoe_lab.analysis.metrics.benchmarks import AVERAGE, benchmark_task, split_note
from dynamoe_lab.analysis.metrics.perplexity import perplexity_ratio
from dynamoe_lab.errors import InputError

__all__ = ["ACCURACY", "accuracy_rows", "lower_is_better", "pareto_front", "pareto_points", "pareto_row", "static_comparison"]

ACCURACY = "average_accuracy"
TIMES = ("time_ratio", "time_low", "time_high")  # measured beside the dense model; nan where they were not
_COLUMNS = ("method", "theta", "seed", "train_tokens", "active_params", "active_mlp_fraction", "metric", "value", "low", "high", "n")
_LOWER = ("perplexity", "loss", "surprisal", "_kl", "seconds", "active_")
ORACLE = "label"  # its labels cost a full MLP to compute: a bound on what a router could do, not a way to save


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better: perplexities, losses, divergences, times, what is active; all else is taken for an accuracy."""
    return any(word in metric for word in _LOWER)


def pareto_row(
    perplexity_row: pd.DataFrame | pd.Series | Mapping,
    active_row: pd.DataFrame | pd.Series | Mapping,
    *,
    method: str,
    theta: float = np.nan,
    seed: int = 0,
    train_tokens: int = 0,
    time_row: pd.DataFrame | pd.Series | Mapping | None = None,
) -> pd.DataFrame:
    """One row of the table `pareto`, metric "perplexity_ratio".

    Args:
        perplexity_row: ratio, low, high, n (of `perplexity_ratio` with the dense model's losses as reference).
        active_row: active_params, active_mlp_fraction of the whole model: the row "all" of `count_active_params`, or its whole frame.
        method: "dense", "router", "label", "random" or "static".
        theta: threshold; of a static cut that of the router whose compute it matches; nan where there is none.
        train_tokens: tokens trained on; 0: as converted.
        time_row: time_ratio, time_ratio_low, time_ratio_high of a row of `latency_ratios`; None: not measured.

    Returns:
        method, theta, seed, train_tokens, active_params, active_mlp_fraction, metric, value, low, high, n, time_ratio, time_low, time_high
        (time over the dense model's, nan where it was not measured).

    Raises:
        InputError: a value is missing, or more than one row is given.

    Example:
        >>> ratio = {"ratio": 1.2, "low": 1.1, "high": 1.3, "n": 25}
        >>> active = {"active_params": 113e6, "active_mlp_fraction": 0.67}
        >>> lab.pareto_row(ratio, active, method="router", theta=0.9)[["method", "theta", "active_mlp_fraction", "metric", "value", "n"]]
           method  theta  active_mlp_fraction            metric  value   n
        0  router    0.9                 0.67  perplexity_ratio    1.2  25
    """
    quality = _single(perplexity_row, ("ratio", "low", "high", "n"), "pareto_row: perplexity_row")
    if isinstance(active_row, pd.DataFrame) and "layer" in active_row.columns:
        active_row = split_layers(active_row)[1]
    cost = _single(active_row, ("active_params", "active_mlp_fraction"), f"pareto_row: active_row (the row of layer '{ALL}')")
    row = {"method": method, "theta": float(theta), "seed": int(seed), "train_tokens": int(train_tokens)}
    row |= {name: float(cost[name]) for name in ("active_params", "active_mlp_fraction")}
    row |= {"metric": "perplexity_ratio", "value": float(quality["ratio"]), "low": float(quality["low"]), "high": float(quality["high"])}
    measured = ("time_ratio", "time_ratio_low", "time_ratio_high")
    time = dict.fromkeys(measured, np.nan) if time_row is None else _single(time_row, measured, "pareto_row: time_row")
    times = {name: float(time[given]) for name, given in zip(TIMES, measured, strict=True)}
    return pd.DataFrame([row | {"n": int(quality["n"])} | times])


def accuracy_rows(scores: pd.DataFrame, documents: pd.DataFrame, *, bootstrap: int = 2_000, confidence: float = 0.95) -> pd.DataFrame:
    """Rows of the table `pareto`, metric "average_accuracy": the mean accuracy over tasks (of a single task, its accuracy).

    As with perplexity, intervals are of the difference to the dense model on the same documents, here set around its accuracy: an average's
    that leaves out the dense model's value tells the two apart, of a single task the exact test does (column `told_apart`). The dense model
    itself has none.

    Args:
        scores, documents: of `score_cells`: tables of these names with method ("dense": the reference), theta, seed, train_tokens.
        bootstrap, confidence: resamples of documents (within tasks) and level of the intervals.

    Returns:
        The columns of `pareto_row`, no time measured; active_params and active_mlp_fraction are those of the tasks' own tokens, on average
        over tasks; n: documents of all tasks. Also tasks (how many), chance (mean accuracy of guessing, nan where a task's is unknown),
        note (`split_note`), told_apart (of the dense model, as `told_apart` says).

    Raises:
        InputError: no rows of method "dense"; other documents than it has; as `benchmark_deltas`.

    Example:
        >>> case = {"run": "a", "theta": 0.9, "seed": 0, "train_tokens": 0, "task": "sciq", "metric": "acc"}
        >>> right = {"dense": [1, 1, 1, 0], "router": [1, 1, 0, 0]}
        >>> rows = [case | {"method": method, "doc_id": at, "value": value} for method in right for at, value in enumerate(right[method])]
        >>> scores = [case | {"method": method, "split": "test", "value": np.mean(right[method])} for method in right]
        >>> lab.accuracy_rows(pd.DataFrame(scores), pd.DataFrame(rows))[["method", "metric", "value", "n", "chance", "told_apart"]]
           method            metric  value  n  chance  told_apart
        0   dense  average_accuracy   0.75  4    0.25       False
        1  router  average_accuracy   0.50  4    0.25       False
    """
    keys = ["method", "theta", "seed", "train_tokens"]
    require(scores, (*keys, "task", "split", "metric", "value"), "accuracy_rows: scores")
    require(documents, (*keys, "run", "task", "doc_id", "metric", "value"), "accuracy_rows: documents")
    reference = documents[documents["method"] == "dense"].drop(columns="seed")
    require(reference, (), "accuracy_rows: documents of method 'dense'")
    cases, rows = scores[keys].drop_duplicates(), []
    for number in range(len(cases)):
        case = cases.iloc[[number]]
        own, answers = (frame.merge(case, on=keys) for frame in (scores, documents))  # where θ is nan, too
        deltas = benchmark_deltas(answers.drop(columns="seed"), reference, bootstrap=bootstrap, confidence=confidence)
        chosen = deltas[deltas["task"] == (AVERAGE if len(deltas) > 1 else deltas["task"].iloc[0])]
        row, apart = chosen.iloc[0], bool(told_apart(chosen).iloc[0])
        costs = {name: own.loc[own["metric"] == name, "value"].mean() for name in ("active_params", "active_mlp_fraction")}
        quality = {"metric": ACCURACY, "value": row["value"]} | {end: row["reference_value"] + row[end] for end in ("low", "high")}
        tasks = list(dict.fromkeys(own["task"]))
        chance = float(np.mean([benchmark_task(task).chance for task in tasks]))
        told = {"n": int(row["n"])} | dict.fromkeys(TIMES, np.nan) | {"tasks": len(tasks), "chance": chance, "note": split_note(own)}
        told["told_apart"] = apart
        rows.append(case.assign(**costs, **quality, **told))
    return pd.concat(rows, ignore_index=True)


def pareto_points(pareto: pd.DataFrame, *, cost: str = "active_params") -> pd.DataFrame:
    """The table `pareto` with the seeds of one setting put together, and which settings are dominated.

    A setting is dominated when another of the same metric costs no more and is no worse, and is better in one of the two, by point
    estimates and over all methods together. The label oracle cannot dominate: computing its labels takes the full MLP.

    Args:
        pareto: method, theta, seed, train_tokens, active_params, active_mlp_fraction, metric, value, low, high, n; time_ratio, time_low,
            time_high where time was measured.
        cost: the column that says what a setting costs: active_params, active_mlp_fraction or time_ratio. What has no value there neither
            dominates nor is dominated.

    Returns:
        metric, method, theta, train_tokens, active_params, active_mlp_fraction (means over seeds), value (mean over seeds; of
        perplexities and their ratios the geometric one), low, high (of the only seed, or the lowest and highest end over seeds), n,
        seeds, time_ratio (mean over seeds), time_low, time_high (as low and high; nan where not measured), dominated. A setting without θ
        (static) is told by its active fraction.

    Raises:
        InputError: a column is missing, or `cost` is none of the three.

    Example:
        >>> pareto = pd.DataFrame({"method": "router", "theta": [0.7, 0.8, 0.9], "seed": 0, "train_tokens": 0})
        >>> pareto = pareto.assign(metric="perplexity_ratio", active_params=[90e6, 100e6, 113e6], value=[2.0, 2.1, 1.5])
        >>> points = lab.pareto_points(pareto.assign(active_mlp_fraction=0.5, low=np.nan, high=np.nan, n=25))
        >>> points[["theta", "active_params", "value", "dominated"]]  # 0.8 costs more than 0.7 and is worse
           theta  active_params  value  dominated
        0    0.7     90000000.0    2.0      False
        1    0.8    100000000.0    2.1       True
        2    0.9    113000000.0    1.5      False
    """
    groups, how = _settings(pareto, "pareto_points"), {"sort": False, "dropna": False}
    rows = pareto.assign(setting=groups, n=pareto["n"].astype(np.int64))
    rows = rows.assign(**{name: np.nan for name in TIMES if name not in rows})
    if cost not in (costs := ("active_params", "active_mlp_fraction", "time_ratio")):
        raise InputError(f"pareto_points: cost = {cost!r}, give {', '.join(costs[:-1])} or {costs[-1]}")
    logs = rows["metric"].map(lower_is_better) & (rows["value"] > 0)
    rows["middle"] = np.where(logs, np.log(rows["value"].where(logs, 1.0)), rows["value"])
    columns = {name: (name, "first") for name in ("metric", "method", "theta", "train_tokens")}
    columns |= {name: (name, "mean") for name in ("active_params", "active_mlp_fraction")}
    columns |= {
        "value": ("middle", "mean"),
        "low": ("low", "min"),
        "high": ("high", "max"),
        "n": ("n", "min"),
        "seeds": ("seed", "nunique"),
        "time_ratio": ("time_ratio", "mean"),
        "time_low": ("time_low", "min"),
        "time_high": ("time_high", "max"),
    }
    points = rows.groupby("setting", **how).agg(**columns)
    logs = logs.groupby(groups, **how).all()
    points["value"] = np.where(logs, np.exp(points["value"].where(logs, 0.0)), points["value"])
    points["dominated"] = False
    for metric, part in points.groupby("metric"):
        price = part[cost].to_numpy(dtype=np.float64)
        loss = part["value"].to_numpy(dtype=np.float64) * (1 if lower_is_better(metric) else -1)
        close = 1e-9 * np.abs(price[np.isfinite(price)]).max(initial=0.0)  # means of the same count are not always the same float
        no_worse = (price[:, None] <= price + close) & (loss[:, None] <= loss)  # [by, of]
        better = (price[:, None] < price - close) | (loss[:, None] < loss)
        counts = (part["method"] != ORACLE).to_numpy()[:, None]
        points.loc[part.index, "dominated"] = (no_worse & better & counts).any(axis=0)
    return points.reset_index(drop=True)


def pareto_front(pareto: pd.DataFrame) -> pd.DataFrame:
    """The table `pareto` with a column `dominated`: is another setting at least as cheap and as good (see `pareto_points`)?

    Seeds of one setting are judged together, by their mean, so that a lucky seed does not make the front.

    Args:
        pareto: as in `pareto_points`; what a setting costs is its active_params.

    Returns:
        The rows of `pareto`, in their order, and dominated (bool).

    Raises:
        InputError: a column is missing.

    Example:
        >>> pareto = pd.DataFrame({"method": ["router", "random"], "theta": 0.9, "seed": 0, "train_tokens": 0})
        >>> pareto = pareto.assign(metric="perplexity_ratio", active_params=113e6, active_mlp_fraction=0.6, value=[1.5, 2.5])
        >>> lab.pareto_front(pareto.assign(low=np.nan, high=np.nan, n=25))[["method", "value", "dominated"]]  # as wide, but worse
           method  value  dominated
        0  router    1.5      False
        1  random    2.5       True
    """
    groups = _settings(pareto, "pareto_front")
    order = dict(zip(dict.fromkeys(groups), pareto_points(pareto)["dominated"], strict=True))
    return pareto.assign(dominated=[bool(order[group]) for group in groups])


def static_comparison(
    router_losses: pd.DataFrame,
    static_losses: pd.DataFrame,
    *,
    active_params: float,
    static_params: float,
    theta: float = np.nan,
    method: str = "router",
    seed: int = 0,
    train_tokens: int = 0,
    confidence: float = 0.95,
    resamples: int = 2_000,
) -> pd.DataFrame:
    """Does choosing by token beat a static cut of about the same width?

    Args:
        router_losses: frame of `routed_losses` of the routed model.
        static_losses: the same of a model whose every token runs one prefix, trained on the same tokens and measured on the same documents.
        active_params, static_params: parameters that a token of each activates (`count_active_params`); the static cut needs no router, so
            at equal compute it is wider than the router's average.
        theta, method, seed, train_tokens: of the routed model as in the table `pareto`, e.g. method "tomoe p = 0.7" without θ; copied into
            the result.
        confidence, resamples: of the document bootstrap.

    Returns:
        One row: method, theta, seed, train_tokens, active_params, static_params, active_mlp_fraction (router), static_fraction, perplexity
        (router), static_perplexity, ratio (router's over the static cut's, paired by document; below 1 the router is better), low, high, n
        (documents), tokens, confidence.

    Raises:
        InputError: a column is missing, or the two were measured on other documents.

    Example:
        >>> static = pd.DataFrame({"document": [0, 1, 2], "nll": [20.0, 30.0, 50.0], "tokens": [10, 10, 20], "positions": [10, 10, 20]})
        >>> static = static.assign(active_mlp_fraction=0.75)
        >>> router = static.assign(nll=static["nll"] - 0.1 * static["tokens"], active_mlp_fraction=0.5)  # 0.1 nats better at every token
        >>> row = lab.static_comparison(router, static, active_params=113e6, static_params=113e6, theta=0.9)
        >>> row[["active_mlp_fraction", "static_fraction", "ratio", "low", "high", "n"]].round(3)
           active_mlp_fraction  static_fraction  ratio    low   high  n
        0                  0.5             0.75  0.905  0.905  0.905  3
    """
    for losses in (router_losses, static_losses):
        require(losses, ("document", "nll", "tokens", "positions", "active_mlp_fraction"), "static_comparison")
    settings = {"bootstrap": resamples, "confidence": confidence}
    row = perplexity_ratio(router_losses, static_losses, **settings).iloc[0]
    static = np.average(static_losses["active_mlp_fraction"], weights=static_losses["positions"])
    case = {"method": method, "theta": float(theta), "seed": int(seed), "train_tokens": int(train_tokens)}
    cost = {"active_params": float(active_params), "static_params": float(static_params)}
    cost |= {"active_mlp_fraction": float(row["active_mlp_fraction"]), "static_fraction": float(static)}
    quality = {"perplexity": row["perplexity"], "static_perplexity": row["reference_perplexity"]}
    sample = {"ratio": row["ratio"], "low": row["low"], "high": row["high"], "n": int(row["n"]), "tokens": int(row["tokens"])}
    return pd.DataFrame([{**case, **cost, **quality, **sample, "confidence": confidence}])


def _settings(pareto: pd.DataFrame, function: str) -> pd.Series:
    """A code per setting, the same for its seeds."""
    require(pareto, _COLUMNS, function)
    cut = pareto["theta"].isna() & ~pareto["method"].str.startswith("tomoe")  # a ToMoE model's p is in its name
    fraction = pareto["active_mlp_fraction"].where(cut).round(3)
    keys = pareto[["metric", "method", "theta", "train_tokens"]].assign(fraction=fraction)
    return keys.groupby(list(keys.columns), sort=False, dropna=False).ngroup()


def _single(row: pd.DataFrame | pd.Series | Mapping, columns: tuple[str, ...], function: str) -> pd.Series:
    frame = row if isinstance(row, pd.DataFrame) else pd.DataFrame([dict(row)])
    require(frame, columns, function)
    if len(frame) != 1:
        raise InputError(f"{function}: one row is needed, the frame has {len(frame)}")
    return frame.iloc[0]
