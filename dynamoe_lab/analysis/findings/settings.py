"""What every setting costs and saves: one row a trained model beside the dense one, from the table `pareto`."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.claims.claim import points, ratio, share
from dynamoe_lab.analysis.frames import compact, percent, require
from dynamoe_lab.analysis.metrics.pareto import ACCURACY, pareto_points
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural

__all__ = ["SETTINGS_HEADER", "settings_note", "settings_rows", "settings_table"]

SETTINGS_HEADER = [
    "model",
    "perplexity, times dense",
    "accuracy, minus dense",
    "prefill time, of dense",
    "MLP neurons that run",
    "active parameters",
    "training tokens",
]

_KEYS = ("method", "theta", "train_tokens")


def settings_table(pareto: pd.DataFrame) -> pd.DataFrame:
    """The trained models of the frontier, dearest first: the dense one, the routers by θ, static cuts, ToMoE.

    Args:
        pareto: the table `pareto`, with a row of method "dense".

    Returns:
        method, theta (of a static cut that of the router whose compute it matches), train_tokens, seeds, active_mlp_fraction,
        active_params, params_share (of the dense model's), value, low, high (perplexity over the dense model's), n (documents), accuracy,
        accuracy_change (minus the dense model's), accuracy_low, accuracy_high, accuracy_n (documents of all tasks), time_ratio, time_low,
        time_high (prefill, over the dense model's). NaN is what was not measured. Seeds of one setting are one row, see `pareto_points`.

    Raises:
        InputError: a column or the dense row is missing.

    Example:
        >>> from dynamoe_lab.analysis.findings.settings import settings_table
        >>> rows = pd.DataFrame({"method": ["dense", "router"], "theta": [np.nan, 0.9], "seed": 0, "train_tokens": [0, 40_960]})
        >>> rows = rows.assign(active_params=[134e6, 113e6], active_mlp_fraction=[1.0, 0.67], metric="perplexity_ratio", n=25)
        >>> table = settings_table(rows.assign(value=[1.0, 1.5], low=[1.0, 1.34], high=[1.0, 1.64]))
        >>> table[["method", "theta", "params_share", "value"]].round(2)
           method  theta  params_share  value
        0   dense    NaN          1.00    1.0
        1  router    0.9          0.84    1.5
    """
    require(pareto, (*_KEYS, "active_params", "active_mlp_fraction", "metric", "value", "low", "high", "n"), "settings_table")
    rows = pareto_points(pareto[pareto["metric"] == "perplexity_ratio"])
    dense = rows[rows["method"] == "dense"]
    if dense.empty:
        raise InputError("settings_table: no row of method 'dense' in the frame")
    rows = rows[(rows["train_tokens"] > 0) & ~rows["method"].isin(("random", "label")) | (rows["method"] == "dense")]
    rows = rows.assign(params_share=rows["active_params"] / dense["active_params"].iloc[0])
    columns = ["accuracy", "accuracy_change", "accuracy_low", "accuracy_high", "accuracy_n"]
    scored = pareto[pareto["metric"] == ACCURACY]
    if scored.empty:
        rows = rows.assign(**dict.fromkeys(columns, np.nan))
    else:
        scored = pareto_points(scored).drop_duplicates(list(_KEYS), keep=False)  # cuts without θ that only their widths tell apart
        base = scored.loc[scored["method"] == "dense", "value"].iloc[0]
        scored = scored.rename(columns={"value": "accuracy", "n": "accuracy_n"})
        scored = scored.assign(
            accuracy_change=scored["accuracy"] - base, accuracy_low=scored["low"] - base, accuracy_high=scored["high"] - base
        )
        rows = rows.merge(scored[[*_KEYS, *columns]], on=list(_KEYS), how="left")  # NaN of θ meets NaN
    order = {"dense": 0, "router": 1, "static": 2}
    rows = rows.assign(place=rows["method"].map(order).fillna(3)).sort_values(
        ["place", "active_params"], ascending=[True, False], kind="stable"
    )
    wanted = [*_KEYS, "seeds", "active_mlp_fraction", "active_params", "params_share", "value", "low", "high", "n", *columns]
    return rows[[*wanted, "time_ratio", "time_low", "time_high"]].reset_index(drop=True)


def settings_rows(table: pd.DataFrame) -> list[list[str]]:
    """`settings_table` as people read it: under `SETTINGS_HEADER` a row of texts a model.

    Example:
        >>> from dynamoe_lab.analysis.findings.settings import settings_rows
        >>> row = {"method": "router", "theta": 0.9, "train_tokens": 102_400, "active_mlp_fraction": 0.67, "active_params": 113e6}
        >>> row |= {"params_share": 0.84, "value": 1.5, "low": 1.34, "high": 1.64, "n": 25, "accuracy_change": np.nan}
        >>> settings_rows(pd.DataFrame([row | {"time_ratio": 0.9, "time_low": 0.88, "time_high": 0.93}]))
        [['router, θ = 0.9', '1.50 (1.34 to 1.64)', '', '90.0 % (88.0 to 93.0)', '67 %', '113 M (84 %)', '102,400']]
    """
    rows = []
    for row in table.to_dict("records"):
        dense = row["method"] == "dense"
        scored, timed = (np.isfinite(row[name]) and not dense for name in ("accuracy_change", "time_ratio"))
        rows.append(
            [
                _name(row),
                "1" if dense else ratio(row["value"], row["low"], row["high"]),
                points(row["accuracy_change"], row["accuracy_low"], row["accuracy_high"]) if scored else "",
                share(row["time_ratio"], row["time_low"], row["time_high"]) if timed else "100 %" if dense else "",
                percent(row["active_mlp_fraction"]),
                f"{compact(row['active_params'])} ({percent(row['params_share'])})",
                "" if dense else f"{int(row['train_tokens']):,}",
            ]
        )
    return rows


def settings_note(table: pd.DataFrame) -> str:
    """What the columns are, and n: the caption of `settings_rows`."""
    documents, answers = table["n"].min(), table["accuracy_n"].dropna()
    dense = table.loc[table["method"] == "dense", "accuracy"].dropna()
    scored = (
        f" Accuracy: average over tasks minus the dense model's {percent(dense.iloc[0], 1)}, the same {int(answers.min()):,} documents."
        if len(answers) and len(dense)
        else ""
    )
    timed = (
        " Time: of a prefill of a few held-out blocks, measured in turn with the dense model, median and 10 to 90 % of a few rounds."
        if table["time_ratio"].notna().any()
        else ""
    )
    seeds = int(table["seeds"].max())
    spread = f"; of {seeds} seeds the mean, the lowest and the highest end" if seeds > 1 else ", one seed of training"
    return (
        f"Perplexity over the dense model's on the same {plural(documents, 'held-out document')}, intervals over documents{spread}."
        f"{scored}{timed} Active parameters: a token's mean, routers and embeddings included. An empty cell was not measured."
    )


def _name(row: dict) -> str:
    method = str(row["method"])
    if method == "router":
        return f"router, θ = {row['theta']:g}"
    if method == "static":
        beside = f", beside θ = {row['theta']:g}" if np.isfinite(row["theta"]) else ", beside ToMoE"
        return f"static cut (one width for all){beside}"
    return {"dense": "the dense model"}.get(method, f"ToMoE, {method.removeprefix('tomoe ')}")
