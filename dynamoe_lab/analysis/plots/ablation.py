"""The picture of a sweep: one axis, one metric, every mode, and the compute it took."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dynamoe_lab.analysis.frames import percent, require
from dynamoe_lab.analysis.metrics.ablation import (
    NEEDED,
    ablation_table,
    case_name,
    failed_cells,
    is_share,
    mode_name,
    rank_settings,
    value_text,
)
from dynamoe_lab.analysis.metrics.pareto import lower_is_better
from dynamoe_lab.analysis.style import DENSE, canvas, headline, method_color, method_marker, percent_axis, ratio_axis, styled

__all__ = ["plot_ablation"]

_WIDE = 20  # a numeric axis that spans more than this factor is drawn on a log scale
_LETTERS = 90  # that fit side by side under a page-wide row of panels


@styled
def plot_ablation(
    sweep: pd.DataFrame,
    *,
    axis: str,
    metric: str = "perplexity_ratio",
    reference: float | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """A metric by the settings of one axis (above) and the share of the MLP that ran (below), a colour per mode.

    A second axis that varies becomes columns of panels; seeds are averaged (see `ablation_table`). Router accuracies stand beside the
    commonest label's, if the sweep has metric "majority_accuracy".

    Args:
        sweep: the table `sweep`: a column per axis, mode, metric, value, low, high, n, active_mlp_fraction, status.
        axis: column of the axis, e.g. "dynamoe.importance".
        metric: rows to draw.
        reference: level of the dense model; None: 1 for perplexity ratios, else no line.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: no such axis or metric, or more than two axes vary.

    Example:
        >>> sweep = pd.DataFrame({"train.lr": [1e-4, 1e-3], "mode": "router", "metric": "perplexity_ratio", "value": [1.8, 1.5]})
        >>> sweep = sweep.assign(low=sweep["value"] - 0.1, high=sweep["value"] + 0.1, n=25, active_mlp_fraction=0.67)
        >>> figure = lab.plot_ablation(sweep, axis="train.lr")
        >>> print(figure.get_suptitle())
        Router: perplexity ratio is lowest for 0.001 (1.5 at 67 %
        of the MLP) and worst for 0.0001 (1.8 at 67 % of the MLP)
    """
    require(sweep, (axis, *NEEDED), "plot_ablation")
    table = ablation_table(sweep, axis=axis, metric=metric)
    chance = metric == "router_accuracy" and (sweep["metric"] == "majority_accuracy").any()
    majority = ablation_table(sweep, axis=axis, metric="majority_accuracy") if chance else None
    reference = 1.0 if reference is None and metric == "perplexity_ratio" else reference
    facets, modes = list(dict.fromkeys(table["facet"])), list(dict.fromkeys(table["mode"]))
    settings = list(dict.fromkeys(table["setting"]))
    numeric = bool(table["number"].notna().all()) and len(settings) > 1
    figure = canvas(10.8, figure)
    axes = figure.subplots(2, len(facets), sharex=True, sharey="row", height_ratios=[1.7, 1], squeeze=False)
    for column, facet in enumerate(facets):
        above, below = axes[:, column]
        for number, mode in enumerate(modes):
            part = table[(table["facet"] == facet) & (table["mode"] == mode)]
            at = _places(part, settings, numeric, number, len(modes))
            look = {
                "color": method_color(_method(mode)),
                "marker": _marker(mode),
                "linestyle": "-" if numeric else "none",
                "linewidth": 0.9,
                "zorder": 3 - 0.1 * number,  # the first mode on top
            }
            spread = np.clip([part["value"] - part["low"], part["high"] - part["value"]], 0, None)
            above.errorbar(
                at, part["value"], np.nan_to_num(spread), label=mode_name(mode), markersize=4.5, capsize=2.5, elinewidth=0.9, **look
            )
            below.plot(at, part["active_mlp_fraction"], markersize=4.5, **look)
        if majority is not None:
            part = majority[majority["facet"] == facet].drop_duplicates("setting")
            at = _places(part, settings, numeric, 0, 1)
            above.plot(at, part["value"], "_", color=method_color("majority"), markersize=16, mew=1.4, label="commonest label")
        if facet:
            above.set_title(f"{table['facet_axis'].iloc[0]} = {facet}", fontsize=7.5)
        if reference is not None:
            above.axhline(reference, **DENSE, label="dense model")
        below.axhline(1.0, **DENSE)
        _setting_axis(below, table, settings, numeric, panels=len(facets))
        for ax in (above, below):
            ax.grid(axis="y")
    _value_axis(axes[0, 0], table, metric, reference)
    axes[1, 0].set_ylabel("active MLP\nneurons (%)")
    percent_axis(axes[1, 0].yaxis)
    axes[1, len(facets) // 2].set_xlabel(axis)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    for ax in axes[0, 1:]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), handlelength=2.0)
    headline(figure, _message(table, axis, metric, sweep))
    return figure


def _places(part: pd.DataFrame, settings: list[str], numeric: bool, number: int, modes: int) -> np.ndarray:
    """Where on the x axis: at the number, or side by side around the setting's place."""
    if numeric:
        return part["number"].to_numpy()
    return np.array([settings.index(name) for name in part["setting"]]) + (number - (modes - 1) / 2) * min(0.16, 0.6 / modes)


def _setting_axis(ax: Axes, table: pd.DataFrame, settings: list[str], numeric: bool, *, panels: int) -> None:
    """Numbers at their place (far apart: on a log scale), names side by side in lines that fit."""
    room = max(4, _LETTERS // (panels * len(settings)))
    if numeric:
        numbers = np.sort(table["number"].unique())
        if numbers[0] > 0 and numbers[-1] / numbers[0] > _WIDE:
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(FixedLocator(numbers))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.margins(x=0.08)
        longest = max(map(len, settings))
    else:
        lines = [textwrap.wrap(name, max(room, 8), break_long_words=False) for name in settings]
        ax.set_xticks(range(len(settings)), ["\n".join(parts) for parts in lines])
        ax.set_xlim(-0.6, len(settings) - 0.4)
        longest = max(len(line) for parts in lines for line in parts)
    if longest > room:
        ax.tick_params(axis="x", labelrotation=30)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _value_axis(ax: Axes, table: pd.DataFrame, metric: str, reference: float | None) -> None:
    if metric != "perplexity_ratio":
        ax.set_ylabel(f"{metric.replace('_', ' ')}{' (%)' if is_share(metric) else ''}")
        if is_share(metric):
            percent_axis(ax.yaxis)
        return
    ax.set_ylabel("perplexity /\ndense model's perplexity")
    top = np.nanmax(table[["value", "high"]])
    bottom = min(np.nanmin(table[["value", "low"]]), reference)
    if top / bottom > 4:
        ax.set_ylim(bottom / 1.08, top * 1.12)
        ratio_axis(ax)


def _method(mode: str) -> str:
    return "static" if mode.isdigit() else mode


def _marker(mode: str) -> str:
    """Static prefixes differ by marker, as they share their colour."""
    return "Dv^<>"[int(mode) % 5] if mode.isdigit() else method_marker(mode)


def _message(table: pd.DataFrame, axis: str, metric: str, sweep: pd.DataFrame) -> str:
    """Best and worst of the first mode (the router where there is one), and whether they can be told apart."""
    mode = "router" if (table["mode"] == "router").any() else table["mode"].iloc[0]
    rows = table[(table["mode"] == mode) & (table["facet"] == table["facet"].iloc[0])]
    ranking = rank_settings(rows)
    where, name, best, worst = case_name(rows), metric.replace("_", " "), ranking.best, ranking.worst

    def told(row: pd.Series, more: str = "") -> str:
        share = f" at {percent(row['active_mlp_fraction'])} of the MLP" if np.isfinite(row["active_mlp_fraction"]) else ""
        return f"{row['setting']} ({value_text(row['value'], metric)}{share}{more})"

    extreme = "lowest" if lower_is_better(metric) else "highest"
    if len(rows) < 2:
        message = f"{where}: {name} of {told(best)}"
    elif ranking.apart:
        tie = "" if ranking.near.empty else f"; {len(ranking.near)} more not distinguishable"
        message = f"{where}: {name} is {extreme} for {told(best, tie)} and worst for {told(worst)}"
    else:
        message = f"{where}: no {axis.rsplit('.', 1)[-1]} is distinguishable by {name}, {told(best)} to {told(worst)}"
    failed = failed_cells(sweep)
    return message[0].upper() + message[1:] + (f"; cells that failed: {failed}" if failed else "")
