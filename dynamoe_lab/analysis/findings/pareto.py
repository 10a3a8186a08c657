"""What compute buys: what each θ saves and costs, and whether choosing by token beats a static cut."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.wording import tokens_text, verdict
from dynamoe_lab.analysis.frames import compact, list_names, percent, require, signed
from dynamoe_lab.analysis.metrics.pareto import ACCURACY, pareto_points
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural

__all__ = ["pareto_finding", "static_finding"]

SAME_COMPUTE = 0.015  # shares of the MLP, and relative counts of parameters, that differ by less are called equal


def pareto_finding(pareto: pd.DataFrame) -> str:
    """What does each θ save, and what does it cost in perplexity?

    Trained routers are told, with the measured time where there is one; where there are none, the labels themselves, as converted. The
    average accuracy is told where it is above or below the dense model's beyond its interval, that of a single task where the exact test
    tells the two apart, as `benchmark_finding` does.

    Args:
        pareto: the table `pareto`; rows of metric "perplexity_ratio". With a row of method "dense" savings are shares of its parameters.
            Rows of metric "average_accuracy" are those of `accuracy_rows`.

    Raises:
        InputError: a column is missing, or neither a trained router nor labels are in the frame.

    Example:
        >>> row = {"method": "router", "theta": 0.9, "seed": 0, "train_tokens": 40_960, "active_params": 113e6, "active_mlp_fraction": 0.67}
        >>> row |= {"metric": "perplexity_ratio", "value": 1.5, "low": 1.34, "high": 1.64, "n": 25}
        >>> print(lab.pareto_finding(pd.DataFrame([row])))
        Routers trained on 40,960 tokens, on n = 25 documents: θ = 0.9: 67 % of the MLP neurons, 113 M active parameters, 1.50 times
        the dense perplexity (1.34 to 1.64).
    """
    needed = ("method", "theta", "seed", "train_tokens", "active_params", "active_mlp_fraction", "metric", "value", "low", "high", "n")
    require(pareto, needed, "pareto_finding")
    rows = pareto[pareto["metric"] == "perplexity_ratio"]
    require(rows, needed, "pareto_finding: rows of metric 'perplexity_ratio'")
    points = pareto_points(rows)
    dense = points.loc[points["method"] == "dense", "active_params"]
    routed = points[(points["method"] == "router") & (points["train_tokens"] > 0)]
    kind = "Routers"
    if routed.empty:
        routed = points[points["method"] == "label"]
        kind = "Routing by the labels, which cost a full MLP to compute,"
    if routed.empty:
        raise InputError("pareto_finding: neither a trained router nor labels in the frame; it needs method 'router' or 'label'")
    cuts = points.loc[(points["method"] == "static") & (points["train_tokens"] > 0), "theta"]
    texts = []
    for row in routed.sort_values(["train_tokens", "theta"]).to_dict("records"):
        size = compact(row["active_params"])
        size += (
            " active parameters"
            if dense.empty
            else f" of {compact(dense.iloc[0])} parameters active ({percent(row['active_params'] / dense.iloc[0])})"
        )
        if np.isfinite(row["time_ratio"]):
            size += f", {percent(row['time_ratio'])} ({percent(row['time_low'])} to {percent(row['time_high'])}) of the dense model's time"
        spread = f"{row['low']:.2f} to {row['high']:.2f}" if np.isfinite(row["low"]) else "no interval"
        seeds = f", mean and span of {row['seeds']} seeds" if row["seeds"] > 1 else ""
        texts.append(
            f"θ = {row['theta']:g}: {percent(row['active_mlp_fraction'])} of the MLP neurons, {size}, {row['value']:.2f} times the dense "
            f"perplexity ({spread}{seeds}{'; dominated, by point estimates' if row['dominated'] else ''}"
            f"{'' if row['theta'] in set(cuts) or cuts.empty else '; no static cut was trained beside it'})"
            f"{_accuracy_text(pareto, row)}"
        )
    budgets = [f"{int(tokens):,}" for tokens in sorted(routed["train_tokens"].unique())]
    timed = " (time: of a prefill, median and 10 to 90 % quantiles over rounds)" if routed["time_ratio"].notna().any() else ""
    trained = f"trained on {list_names(budgets)} tokens" if routed["train_tokens"].max() > 0 else "without training"
    return f"{kind} {trained}, on n = {plural(routed['n'].min(), 'document')}: {'; '.join(texts)}{timed}."


def _accuracy_text(pareto: pd.DataFrame, setting: dict) -> str:
    """', average accuracy ...' of a routed setting where it can be told from the dense model's, else ''."""
    rows = pareto[pareto["metric"] == ACCURACY]
    dense, rows = (rows[rows["method"] == method] for method in ("dense", setting["method"]))
    own = rows[(rows["theta"] == setting["theta"]) & (rows["train_tokens"] == setting["train_tokens"])]
    if own.empty or dense.empty:
        return ""
    row, base = pareto_points(own).iloc[0], dense["value"].iloc[0]
    if (
        {"tasks", "told_apart"} <= set(own) and (own["tasks"] == 1).all() and own["told_apart"].notna().all()
    ):  # the exact test decides, not the interval
        sides = set(np.sign(own["value"] - base)) if own["told_apart"].all() else set()
        told = {1.0: "above", -1.0: "below"}.get(*sides) if len(sides) == 1 else None
    else:
        told = verdict(row["low"] - base, row["high"] - base)
    if told not in ("above", "below"):
        return ""
    low, high = (signed(100 * (row[end] - base), 1) for end in ("low", "high"))
    spread = f"{low} to {high} points" if np.isfinite([row["low"], row["high"]]).all() else "no interval,"
    return (
        f", average accuracy {percent(row['value'], 1)}, {told} the dense model's {percent(base, 1)} ({spread} on the same "
        f"{int(row['n']):,} benchmark documents)"
    )


def static_finding(comparison: pd.DataFrame) -> str:
    """Does choosing by token beat a static cut at about the same compute, trained on the same tokens?

    Args:
        comparison: rows of `static_comparison`. Rows of one method, θ and budget are seeds: each has its verdict, the ratio is their
            geometric mean.

    Raises:
        InputError: a column is missing.

    Example:
        >>> row = {"method": "router", "theta": 0.9, "seed": 0, "train_tokens": 40_960, "active_params": 113e6, "static_params": 113e6}
        >>> row |= {"active_mlp_fraction": 0.67, "static_fraction": 0.72, "ratio": 1.042, "low": 1.01, "high": 1.073}
        >>> print(lab.static_finding(pd.DataFrame([row | {"n": 25, "tokens": 8160, "confidence": 0.95}])))
        Routing beside a static cut trained alike, paired by document (n = 25 documents, 8,160 tokens): θ = 0.9 after 40,960 tokens of
        training, 67 % of the MLP neurons against a static 72 % (the same number of active parameters, the router's included):
        perplexity above the static cut's, ratio 1.042 (95 % interval 1.010 to 1.073 over documents, of 1 training seed), the static
        cut is better.
    """
    needed = (
        "method",
        "theta",
        "seed",
        "train_tokens",
        "active_params",
        "static_params",
        "active_mlp_fraction",
        "static_fraction",
        "ratio",
        "low",
        "high",
        "n",
        "tokens",
        "confidence",
    )
    require(comparison, needed, "static_finding")
    texts = []
    for (method, theta, budget), part in comparison.groupby(["method", "theta", "train_tokens"], dropna=False):
        who = f"ToMoE at {method.removeprefix('tomoe ')}" if method.startswith("tomoe") else f"θ = {theta:g}"
        own, static = part["active_params"].mean(), part["static_params"].mean()
        same = abs(own / static - 1) <= SAME_COMPUTE
        more = "the same number of" if same else f"{percent(abs(own / static - 1))} {'more' if own > static else 'fewer'}"
        compute = f"{more} active parameters, the router's included"
        found = [verdict(low - 1, high - 1) for low, high in zip(part["low"], part["high"], strict=True)]
        ratio = float(np.exp(np.log(part["ratio"]).mean()))
        if len(part) == 1:
            row = part.iloc[0]
            spread = (
                f"{percent(row['confidence'])} interval {row['low']:.3f} to {row['high']:.3f}" if np.isfinite(row["low"]) else "no interval"
            )
            spread += " over documents, of 1 training seed"
            said = found[0]
        else:
            spread = f"mean of {len(part)} seeds, {part['ratio'].min():.3f} to {part['ratio'].max():.3f}"
            said = found[0] if len(set(found)) == 1 else "in some seeds only distinguishable from"
            if len(set(found)) > 1:
                spread += f"; below in {found.count('below')} and above in {found.count('above')} of the intervals"
        meaning = {"below": "choosing by token pays", "above": "the static cut is better"}.get(
            said, "choosing by token is not shown to pay"
        )
        if not same and ((said == "below" and own > static) or (said == "above" and own < static)):
            meaning = f"but with {'more' if own > static else 'fewer'} active parameters"
        texts.append(
            f"{who} after {tokens_text(budget)} of training, {percent(part['active_mlp_fraction'].mean())} of the MLP neurons "
            f"against a static {percent(part['static_fraction'].mean())} ({compute}): perplexity {said} the static cut's, ratio "
            f"{ratio:.3f} ({spread}), {meaning}"
        )
    sample = f"n = {plural(comparison['n'].min(), 'document')}, {tokens_text(comparison['tokens'].min())}"
    return f"Routing beside a static cut trained alike, paired by document ({sample}): {'; '.join(texts)}."
