"""From measured seconds to ratios: each round against its own dense row, so that a machine that slows down slows both.

Work that an ideal implementation leaves out of the MLPs does not leave the rest of the model: Amdahl's bound says how much faster a forward
can get at all, and `of_bound` how much of that is there.
"""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import require
from dynamoe_lab.errors import InputError

__all__ = ["latency_ratios", "latency_table"]

_DENSE = "dense"
_RATIOS = ("time_ratio", "realised", "speedup", "amdahl", "of_bound")
_PLACE = ("run", "phase", "batch", "tokens", "threads", "device", "dtype")  # where and on what a row was measured
_SIZES = ("hidden_size", "intermediate_size", "experts")  # of the model, in studies of growth
_ROUTED = ("routing", "active_mlp_fraction", "ideal_share")
_TIMES = ("pair", "seconds", "mlp_seconds")


def latency_ratios(latency: pd.DataFrame) -> pd.DataFrame:
    """What each routing's time is of the dense model's, paired within rounds.

    Args:
        latency: table `latency` (of `measure_latency`); with columns hidden_size, intermediate_size, experts (any of them), models of
            other sizes are kept apart.

    Returns:
        One row per setting: run, phase, batch, tokens, threads, device, dtype, (sizes,) routing, active_mlp_fraction, ideal_share; then,
        each the median over rounds, with the 10 % and 90 % quantiles as `<name>_low` and `<name>_high`: time_ratio (seconds / dense
        seconds), realised (dense MLP seconds * ideal_share / MLP seconds: 1 is an implementation that pays for active work alone), speedup
        (1 / time_ratio), amdahl (the bound: dense seconds over those less the MLP work left out), of_bound (speedup / amdahl, round by
        round); and n (rounds). The dense model's own rows are 1 throughout.

    Raises:
        InputError: missing columns, or a round that has no dense row or several.

    Example:
        >>> place = {"run": "", "phase": "prefill", "batch": 1, "tokens": 512, "threads": 2, "device": "cpu", "dtype": "float32", "pair": 0}
        >>> dense = {"routing": "dense", "seconds": 1.0, "mlp_seconds": 0.6, "active_mlp_fraction": 1.0, "ideal_share": 1.0}
        >>> half = {"routing": "one expert", "seconds": 0.8, "mlp_seconds": 0.4, "active_mlp_fraction": 0.5, "ideal_share": 0.5}
        >>> ratios = lab.latency_ratios(pd.DataFrame([place | dense, place | half]))
        >>> ratios[["routing", "time_ratio", "realised", "speedup", "amdahl"]].round(3)  # realised: 0.3 s would do; bound: 1 / (1 - 0.3)
              routing  time_ratio  realised  speedup  amdahl
        0       dense         1.0      1.00     1.00   1.000
        1  one expert         0.8      0.75     1.25   1.429
    """
    place, rows = _columns(latency, "latency_ratios")
    keys = [*place, "pair"]
    dense = rows.loc[rows["routing"] == _DENSE, [*keys, "seconds", "mlp_seconds"]]
    if dense.duplicated(keys).any():
        raise InputError("latency_ratios: a round has several dense rows; give measurements of their own a run name of their own")
    paired = rows.merge(dense, on=keys, how="left", suffixes=("", "_dense"))
    if paired["seconds_dense"].isna().any():
        lost = paired[paired["seconds_dense"].isna()].iloc[0]
        raise InputError(f"latency_ratios: round {lost['pair']} of run {lost['run']!r} has no dense row; pass whole rounds")
    whole, mlp = paired["seconds_dense"], paired["mlp_seconds_dense"]
    paired["time_ratio"] = paired["seconds"] / whole
    paired["realised"] = mlp * paired["ideal_share"] / paired["mlp_seconds"]
    paired["speedup"] = whole / paired["seconds"]
    paired["amdahl"] = whole / (whole - mlp * (1 - paired["ideal_share"]))
    paired["of_bound"] = paired["speedup"] / paired["amdahl"]
    return _over_rounds(paired, [*place, *_ROUTED], _RATIOS)


def latency_table(latency: pd.DataFrame) -> pd.DataFrame:
    """The seconds of each setting, and those that an implementation would take that pays for active work alone.

    Args:
        latency: table `latency` (of `measure_latency`), as in `latency_ratios`.

    Returns:
        run, phase, batch, tokens, threads, device, dtype, (sizes,) routing, seconds (median over rounds), active_mlp_fraction,
        ideal_seconds (the dense model's median seconds less the MLP work left out: its median MLP seconds * (1 - ideal_share)), low, high
        (10 % and 90 % quantiles of the seconds), n (rounds).

    Raises:
        InputError: missing columns, or a setting without dense rows.

    Example:
        >>> place = {"run": "", "phase": "prefill", "batch": 1, "tokens": 512, "threads": 2, "device": "cpu", "dtype": "float32", "pair": 0}
        >>> dense = {"routing": "dense", "seconds": 1.0, "mlp_seconds": 0.6, "active_mlp_fraction": 1.0, "ideal_share": 1.0}
        >>> half = {"routing": "one expert", "seconds": 0.8, "mlp_seconds": 0.4, "active_mlp_fraction": 0.5, "ideal_share": 0.5}
        >>> lab.latency_table(pd.DataFrame([place | dense, place | half]))[["routing", "seconds", "ideal_seconds", "n"]]
              routing  seconds  ideal_seconds  n
        0       dense      1.0            1.0  1
        1  one expert      0.8            0.7  1
    """
    place, rows = _columns(latency, "latency_table")
    table = _over_rounds(rows, [*place, *_ROUTED], ("seconds",))
    medians = rows[rows["routing"] == _DENSE].groupby(place, sort=False, dropna=False)[["seconds", "mlp_seconds"]].median()
    table = table.merge(medians.reset_index(), on=place, how="left", suffixes=("", "_dense"))
    if table["seconds_dense"].isna().any():
        lost = table[table["seconds_dense"].isna()].iloc[0]
        raise InputError(f"latency_table: run {lost['run']!r} has no dense rows in phase {lost['phase']}; pass whole rounds")
    table["ideal_seconds"] = table["seconds_dense"] - table["mlp_seconds"] * (1 - table["ideal_share"])
    table = table.rename(columns={"seconds_low": "low", "seconds_high": "high"})
    return table[[*place, "routing", "seconds", "active_mlp_fraction", "ideal_seconds", "low", "high", "n"]]


def _columns(latency: pd.DataFrame, function: str) -> tuple[list[str], pd.DataFrame]:
    """The columns that keep measurements apart, and the rows."""
    require(latency, (*_PLACE, *_ROUTED, *_TIMES), function)
    return [*_PLACE, *(name for name in _SIZES if name in latency.columns)], latency


def _over_rounds(rows: pd.DataFrame, setting: list[str], names: tuple[str, ...]) -> pd.DataFrame:
    """Median and 10-90 % quantiles over the rounds of each setting, and their number."""
    groups = rows.groupby(setting, sort=False, dropna=False, observed=True)
    columns = {}
    for name in names:
        columns[name] = groups[name].median()
        columns[f"{name}_low"], columns[f"{name}_high"] = groups[name].quantile(0.1), groups[name].quantile(0.9)
    return pd.DataFrame({**columns, "n": groups["pair"].nunique().astype(np.int64)}).reset_index()
