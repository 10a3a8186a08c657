"""Curves made readable: cumulative importance of the neurons, and training steps smoothed."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import require
from dynamoe_lab.errors import InputError

__all__ = ["importance_curves", "smooth_steps"]

_SMOOTHED = ("loss", "lm_loss", "router_loss", "router_accuracy", "active_mlp_fraction")  # of DynaMoE
_SMOOTHED += ("kl_loss", "ratio_loss", "union_loss", "balance_loss", "active_ratio_max", "active_ratio_mean", "union_coverage")  # of ToMoE


def importance_curves(importance: pd.DataFrame, *, points: int = 100) -> pd.DataFrame:
    """How much of a layer's importance its first neurons hold, per formula.

    Args:
        importance: the frame of `importance_table`: formula, layer, rank (0 is the most important neuron), value (not negative, in the
            formula's own unit).
        points: intervals of each curve; layers with more neurons are interpolated linearly, so that a csv
            stays small.

    Returns:
        formula, layer, rank_share (share of the layer's neurons, 0 to 1), cumulative_share (of the layer's
        total, 0 to 1): points + 1 rows per formula and layer, or one more than neurons if there are fewer. A
        layer of zeros gives nan.

    Raises:
        InputError: a column is missing, an importance is negative or missing, or points < 1.

    Example:
        >>> importance = pd.DataFrame({"formula": "l2", "layer": 0, "rank": range(4), "value": [4.0, 3.0, 2.0, 1.0]})
        >>> lab.importance_curves(importance)[["rank_share", "cumulative_share"]]
           rank_share  cumulative_share
        0        0.00               0.0
        1        0.25               0.4
        2        0.50               0.7
        3        0.75               0.9
        4        1.00               1.0
    """
    require(importance, ("formula", "layer", "rank", "value"), "importance_curves")
    if (importance["value"] < 0).any() or importance["value"].isna().any():
        raise InputError("importance_curves: column value holds negative or missing importances; they must be 0 or more")
    if points < 1:
        raise InputError(f"importance_curves: points = {points}, give a whole number of at least 1")
    parts = []
    for (formula, layer), part in importance.groupby(["formula", "layer"], sort=False, observed=True):
        total = np.concatenate([[0.0], np.cumsum(part.sort_values("rank")["value"].to_numpy(dtype=np.float64))])
        at = np.linspace(0, 1, min(points, len(part)) + 1)
        share = np.interp(at, np.linspace(0, 1, len(total)), total / total[-1] if total[-1] > 0 else np.nan * total)
        parts.append(pd.DataFrame({"formula": formula, "layer": layer, "rank_share": at, "cumulative_share": share}))
    return pd.concat(parts, ignore_index=True)


def smooth_steps(steps: pd.DataFrame, window: int) -> pd.DataFrame:
    """The frame `steps` with its losses, shares and ratios replaced by moving means, run by run; what is measured on held-out text stays.

    Args:
        steps: run, step and any other columns of `steps`, of any method.
        window: steps that are averaged, a step and those before it; fewer at the start of a run. The last row is thus the mean of the
            last `window` steps. 1 changes nothing.

    Returns:
        The same columns, sorted by run and step.
    """
    require(steps, ("run", "step"), "smooth_steps")
    if window < 1:
        raise InputError(f"smooth_steps: window = {window}, give a number of steps of at least 1")
    smoothed = steps.sort_values(["run", "step"], kind="stable", ignore_index=True)
    columns = [column for column in _SMOOTHED if column in smoothed.columns]
    means = smoothed.groupby("run", sort=False, observed=True)[columns].rolling(int(window), min_periods=1).mean()
    smoothed[columns] = means.reset_index(level=0, drop=True)
    return smoothed
