"""One axis of a sweep: its settings in order, seeds put together, and which of them can be told apart."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import percent, require
from dynamoe_lab.analysis.metrics.pareto import lower_is_better
from dynamoe_lab.errors import InputError

__all__ = [
    "NEEDED",
    "Ranking",
    "ablation_table",
    "case_name",
    "failed_cells",
    "is_share",
    "mode_name",
    "rank_settings",
    "setting_text",
    "value_text",
]

_RESULTS = (
    "cell",
    "mode",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "active_mlp_fraction",
    "active_params",
    "train_tokens",
    "status",
    "error",
)
NEEDED = ("mode", "metric", "value", "low", "high", "n", "active_mlp_fraction")


class Ranking(NamedTuple):
    """Settings of one mode and facet, by value."""

    best: pd.Series
    worst: pd.Series
    near: pd.DataFrame  # other settings whose interval overlaps that of the best: not distinguishable from it
    apart: bool  # whether the intervals of best and worst do not overlap


def ablation_table(sweep: pd.DataFrame, *, axis: str, metric: str = "perplexity_ratio") -> pd.DataFrame:
    """The rows of a sweep's table that show one axis.

    A second axis that varies becomes `facet`; columns named seed (train.seed, dynamoe.router_seed, ...) are replicates: their mean is
    taken (of perplexities the geometric one), and low and high reach from the lowest to the highest end over them. Cells that failed are
    left out.

    Args:
        sweep: the table `sweep`: a column per axis, mode, metric, value, low, high, n, active_mlp_fraction, status.
        axis: column of the axis, e.g. "dynamoe.importance".
        metric: rows to take.

    Returns:
        axis, setting (text), number (float, nan unless every setting is a number), facet_axis, facet (text; empty without a second axis),
        mode, metric, value, low, high, n, active_mlp_fraction, seeds: settings in the order of their numbers, else of appearance.

    Raises:
        InputError: no such axis or metric, nothing but failed cells, or more than two axes that vary.

    Example:
        >>> sweep = pd.DataFrame({"train.lr": [1e-4, 1e-3], "mode": "router", "metric": "perplexity_ratio", "value": [1.8, 1.5]})
        >>> sweep = sweep.assign(low=sweep["value"] - 0.1, high=sweep["value"] + 0.1, n=25, active_mlp_fraction=0.67, status="ok")
        >>> lab.ablation_table(sweep, axis="train.lr")[["setting", "mode", "value", "low", "high", "seeds"]]
          setting    mode  value  low  high  seeds
        0  0.0001  router    1.8  1.7   1.9      1
        1   0.001  router    1.5  1.4   1.6      1
    """
    require(sweep, NEEDED, "ablation_table")
    if axis not in (fields := [column for column in sweep.columns if column not in _RESULTS]):
        raise InputError(f"ablation_table: axis {axis!r} is no field that the sweep varies; it has {', '.join(fields) or 'none'}")
    done = sweep[sweep["status"] == "ok"] if "status" in sweep.columns else sweep
    rows = done[(done["metric"] == metric) & done["value"].notna()]
    if rows.empty:
        known = ", ".join(sorted(done["metric"].dropna().astype(str).unique())) or "none: every cell failed"
        raise InputError(f"ablation_table: no values of metric {metric!r}; the sweep has {known}")
    texts = {column: rows[column].map(setting_text) for column in rows.columns if column not in _RESULTS}
    others = [
        column
        for column, text in texts.items()
        if column != axis
        and not _is_seed(column)
        and text.groupby(texts[axis]).nunique().max() > 1  # what goes with the axis, value by value, is no axis of its own
    ]
    if len(others) > 1:
        first = others[-1]
        hint = f"e.g. sweep[sweep[{first!r}].astype(str) == {str(rows[first].iloc[0])!r}]"
        raise InputError(
            f"ablation_table: besides {axis} the sweep varies {', '.join(others)}; filter it to one value of all but one, {hint}"
        )
    work = rows[["mode", "metric", "value", "low", "high", "n", "active_mlp_fraction"]].copy()
    work["mode"] = work["mode"].map(setting_text)  # an expert's number may have become a float beside a failed cell
    work["setting"], work["number"] = texts[axis], pd.to_numeric(texts[axis], errors="coerce")
    if work["number"].isna().any():
        work["number"] = np.nan
    work["facet"] = texts[others[0]] if others else ""
    work["middle"] = np.log(work["value"]) if lower_is_better(metric) and (work["value"] > 0).all() else work["value"]
    columns = {"value": ("middle", "mean"), "low": ("low", "min"), "high": ("high", "max"), "n": ("n", "min")}
    columns |= {"active_mlp_fraction": ("active_mlp_fraction", "mean"), "seeds": ("value", "size")}
    keys = ["setting", "number", "facet", "mode", "metric"]
    table = work.groupby(keys, sort=False, dropna=False).agg(**columns).reset_index()
    if lower_is_better(metric) and (work["value"] > 0).all():
        table["value"] = np.exp(table["value"])
    table["order"] = table["number"].fillna(table["setting"].map({name: at for at, name in enumerate(dict.fromkeys(texts[axis]))}))
    table = table.sort_values("order", kind="stable", ignore_index=True).drop(columns="order")
    table.insert(0, "axis", axis)
    table.insert(3, "facet_axis", others[0] if others else "")
    return table


def rank_settings(rows: pd.DataFrame) -> Ranking:
    """Which setting is best, and from which the others can be told apart: only those whose intervals do not overlap.

    Overlap errs on the careful side: settings are measured on the same documents, and a paired interval of their difference would be
    shorter.

    Args:
        rows: rows of one mode and facet of `ablation_table`.
    """
    metric = rows["metric"].iloc[0]
    rows = rows.sort_values("value", ascending=lower_is_better(metric), kind="stable")
    best, worst = rows.iloc[0], rows.iloc[-1]
    others = rows.iloc[1:]
    return Ranking(best, worst, others[~_apart(others, best)], bool(len(others)) and bool(_apart(rows.iloc[-1:], best).all()))


def mode_name(mode: str) -> str:
    """What a mode is called: 'always expert 1' for '1'."""
    return f"always expert {mode}" if str(mode).isdigit() else {"label": "labels"}.get(str(mode), str(mode))


def case_name(rows: pd.DataFrame) -> str:
    """What the rows of one mode and facet are called: 'router, dynamoe.lambda_router = 0'."""
    first = rows.iloc[0]
    return mode_name(first["mode"]) + (f", {first['facet_axis']} = {first['facet']}" if first["facet"] else "")


def failed_cells(sweep: pd.DataFrame) -> int:
    """Cells of a sweep that have no values."""
    return int((sweep.drop_duplicates("cell")["status"] != "ok").sum()) if {"cell", "status"} <= set(sweep.columns) else 0


def value_text(value: float, metric: str) -> str:
    """A metric's value as people read it: shares in percent."""
    return percent(value, 1) if is_share(metric) else f"{value:.3g}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share of something: accuracies, fractions, coverages."""
    return any(word in metric for word in ("accuracy", "fraction", "coverage"))


def setting_text(value: Any) -> str:
    """A setting as text: [0.25, 0.5, 1.0] -> '[0.25, 0.5, 1]'; 1e-05 -> '1e-05'; lists read back from csv look the same."""
    if isinstance(value, str):
        inner = value.strip()
        if inner[:1] in "[(" and inner[-1:] in "])" and len(inner) > 1:
            return setting_text([part.strip(" '\"") for part in inner[1:-1].split(",") if part.strip()])
        try:
            return _number_text(float(inner))
        except ValueError:
            return inner
    if isinstance(value, Iterable):
        return f"[{', '.join(setting_text(part) for part in value)}]"
    if isinstance(value, (bool, np.bool_)) or value is None:
        return str(value).lower()
    return _number_text(value) if isinstance(value, (int, float, np.number)) else str(value)


def _number_text(value: float) -> str:
    """As short as it can be without making two numbers look the same."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _apart(rows: pd.DataFrame, best: pd.Series) -> pd.Series:
    return (rows["low"] > best["high"]) | (rows["high"] < best["low"])  # nan: not apart


def _is_seed(column: str) -> bool:
    return str(column).rsplit(".", 1)[-1].endswith("seed")
