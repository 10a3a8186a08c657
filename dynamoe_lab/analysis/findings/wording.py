"""How every finding says a number: with its interval and its n, and "above" or "below" only where the interval of the difference allows
it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from dynamoe_lab.analysis.frames import list_names, percent, require
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural

__all__ = [
    "FEW",
    "against_text",
    "domains_text",
    "interval_text",
    "mean_text",
    "one_row",
    "points_text",
    "sample_text",
    "small_text",
    "tokens_text",
    "verdict",
]

FEW = 10  # documents; fewer say nothing about how documents differ


def one_row(frame: pd.DataFrame, columns: Sequence[str], function: str) -> pd.Series:
    """The only row of `frame`; InputError names `function` and what is missing."""
    require(frame, columns, function)
    if len(frame) != 1:
        raise InputError(f"{function}: one row is needed, the frame has {len(frame)}")
    return frame.iloc[0]


def small_text(value: float) -> str:
    """A small number in two digits, written out: 7.96e-05 -> '0.00008'."""
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def tokens_text(count: float) -> str:
    """'8,160 tokens'."""
    return plural(count, "token")


def sample_text(layers: pd.DataFrame, whole: pd.Series) -> str:
    """n of the rows of single layers and of the row that pools them."""
    each = tokens_text(layers["tokens"].max())
    where = f"each of {len(layers)} layers" if len(layers) > 1 else "1 layer"
    return f"n = {each} in {where}, {plural(whole['documents'], 'document')}"


def mean_text(row: pd.Series | dict, name: str = "active_fraction") -> str:
    """A mean share of the MLP with its interval low to high."""
    spread = f"{percent(row['low'], 1)} to {percent(row['high'], 1)}" if np.isfinite(row["low"]) else "no interval"
    return f"{percent(row[name], 1)} ({spread})"


def interval_text(row: pd.Series, name: str) -> str:
    """The interval <name>_low to <name>_high of a share."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if not np.isfinite([low, high]).all():
        return "no interval from so few documents"
    return f"{percent(row['confidence'])} interval {percent(low, 1)} to {percent(high, 1)}"


def points_text(row: pd.Series, name: str) -> str:
    """A difference of shares in points, with its interval."""
    value, low, high = (100 * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    spread = f", {low:+.1f} to {high:+.1f}" if np.isfinite([low, high]).all() else ", no interval"
    return f"{value:+.1f} points{spread}"


def verdict(low: float, high: float) -> str:
    """What the interval of a difference says; without an interval nothing can be told apart."""
    return "above" if low > 0 else "below" if high < 0 else "not distinguishable from"


def against_text(row: pd.Series, name: str, baseline: str, level: float) -> str:
    """Above, below or not distinguishable from a baseline, by the interval of the difference `name`."""
    against = verdict(row[f"{name}_low"], row[f"{name}_high"])
    return f"{against} {baseline} ({percent(level, 1)}; difference {points_text(row, name)})"


def domains_text(rows: pd.DataFrame, name: str, function: str) -> str:
    """Each domain's mean `name` with its interval, and whether the extremes differ.

    As the two are picked from all pairs, the interval of their difference is widened (Bonferroni).

    Args:
        rows: domain, `name`, low, high, documents, confidence: a row per domain, all layers together.
    """
    require(rows, ("domain", name, "low", "high", "documents", "confidence"), f"{function}: rows of layer 'all'")
    rows = rows.sort_values(name)
    texts = [f"{row['domain']} {mean_text(row, name)[:-1]}, n = {row['documents']})" for row in rows.to_dict("records")]
    sample = f"with {percent(rows['confidence'].iloc[0])} intervals over n documents: {list_names(texts, 12)}"
    if len(rows) == 1:
        return f"{sample}; with one domain there is nothing to compare"
    least, most = rows.iloc[0], rows.iloc[-1]
    pairs = len(rows) * (len(rows) - 1) // 2
    tail = (1 - least["confidence"]) / 2
    # two domains are independent samples: the error of their difference is the root of the summed squares
    error = np.hypot(most[name] - most["low"], least["high"] - least[name])
    error *= stats.norm.ppf(tail / pairs) / stats.norm.ppf(tail)
    difference = most[name] - least[name]
    apart = "differ" if difference > error else "are not distinguishable"
    if min(least["documents"], most["documents"]) < FEW:
        apart = "come from too few documents to tell them apart"
    return (
        f"{sample}; the extremes, {least['domain']} and {most['domain']}, {apart} "
        f"({100 * difference:.1f} points{f', allowing for {pairs} pairs' if pairs > 1 else ''})"
    )
