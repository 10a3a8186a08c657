"""Which setting of a sweep is better, if any can be told apart."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.pareto import SAME_COMPUTE
from dynamoe_lab.analysis.frames import list_names, percent
from dynamoe_lab.analysis.metrics.ablation import ablation_table, case_name, failed_cells, rank_settings, value_text
from dynamoe_lab.analysis.metrics.pareto import lower_is_better
from dynamoe_lab.plural import plural

__all__ = ["ablation_finding"]

_TOLD = 4  # modes and facets that one sentence holds


def ablation_finding(sweep: pd.DataFrame, *, axis: str, metric: str = "perplexity_ratio") -> str:
    """Best and worst setting of an axis at the compute they ran, per mode; "best" only if its interval overlaps no other's.

    Args:
        sweep: the table `sweep`; at most one more axis may vary.
        axis, metric: what to compare.

    Raises:
        InputError: as `ablation_table`.

    Example:
        >>> sweep = pd.DataFrame({"train.lr": [1e-4, 1e-3], "mode": "router", "metric": "perplexity_ratio", "value": [1.8, 1.5]})
        >>> sweep = sweep.assign(low=sweep["value"] - 0.1, high=sweep["value"] + 0.1, n=25, active_mlp_fraction=0.67, status="ok")
        >>> print(lab.ablation_finding(sweep, axis="train.lr"))
        perplexity_ratio by train.lr (n = 25 documents): router: best is 0.001: 1.5 (1.4 to 1.6) at 67 % of the MLP, its interval
        apart from every other; next 0.0001: 1.8 (1.7 to 1.9) at 67 % of the MLP.
    """
    table = ablation_table(sweep, axis=axis, metric=metric)
    cases = [rows for _, rows in table.groupby(["facet", "mode"], sort=False)]
    cases.sort(key=lambda rows: rows["mode"].iloc[0] != "router")  # stable: the router first
    texts, spans = [], []
    for rows in cases[:_TOLD]:
        where = case_name(rows)
        if len(rows) < 2:
            texts.append(f"{where}: only {_setting(rows.iloc[0])}, nothing to compare")
            continue
        ranking = rank_settings(rows)
        first, last = ("lowest", "highest") if lower_is_better(metric) else ("highest", "lowest")
        if ranking.near.empty:
            said = f"best is {_setting(ranking.best)}, its interval apart from every other; next {_setting(_next(rows))}"
        else:
            near = list_names([row["setting"] for row in ranking.near.to_dict("records")])
            said = f"{first} is {_setting(ranking.best)}, not distinguishable from {near}, whose intervals overlap it"
        if len(rows) > 2 and ranking.worst["setting"] not in set(ranking.near["setting"]):
            said += f"; {last} {_setting(ranking.worst)}, apart from it"
        spans.append(rows["active_mlp_fraction"].max() - rows["active_mlp_fraction"].min())
        texts.append(f"{where}: {said}")
    if len(cases) > _TOLD:
        texts.append(f"{len(cases) - _TOLD} more cases in the table")
    if max(spans, default=0) > SAME_COMPUTE:
        texts.append(f"settings differ by up to {100 * max(spans):.0f} points in the MLP they run, so {metric} alone does not rank them")
    seeds = f", {int(table['seeds'].max())} seeds" if table["seeds"].max() > 1 else ""
    documents = f"n = {plural(table['n'].min(), 'document')}" if np.isfinite(table["n"]).all() else "no n"
    failed = failed_cells(sweep)
    missing = f"; cells that failed and are not told: {failed}" if failed else ""
    return f"{metric} by {axis} ({documents}{seeds}): {'; '.join(texts)}{missing}."


def _setting(row: pd.Series) -> str:
    """A setting with its value, interval and compute."""
    low, high = (value_text(row[end], row["metric"]) for end in ("low", "high"))
    spread = f"{low} to {high}" if np.isfinite(row["low"]) else "no interval"
    share = f" at {percent(row['active_mlp_fraction'])} of the MLP" if np.isfinite(row["active_mlp_fraction"]) else ""
    return f"{row['setting']}: {value_text(row['value'], row['metric'])} ({spread}){share}"


def _next(rows: pd.DataFrame) -> pd.Series:
    """The second best."""
    return rows.sort_values("value", ascending=lower_is_better(rows["metric"].iloc[0]), kind="stable").iloc[1]
