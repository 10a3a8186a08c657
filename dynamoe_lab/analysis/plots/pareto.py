"""The picture of what compute buys: quality over active parameters and over measured time, every method and θ in one place."""

import textwrap
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from dynamoe_lab.analysis.frames import compact, percent, require
from dynamoe_lab.analysis.metrics.pareto import ACCURACY, ORACLE, lower_is_better, pareto_points
from dynamoe_lab.analysis.plots.placing import place_labels
from dynamoe_lab.analysis.style import DENSE, REFERENCE, canvas, headline, method_color, method_marker, percent_axis, ratio_axis, styled
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural

__all__ = ["plot_pareto"]

_PARETO = ("method", "theta", "seed", "train_tokens", "active_params", "active_mlp_fraction", "metric", "value", "low", "high", "n")
_FRONT = {"color": "#c4c4c4", "linewidth": 2.6, "drawstyle": "steps-post", "zorder": 0.9}
_DISTANCE = {"linewidth": 0.7, "linestyle": "-", "alpha": 0.8}  # from the share of parameters to that of time
_QUALITY = {"perplexity_ratio": "perplexity / dense model's perplexity", ACCURACY: "average accuracy (%)"}
_NAMES = {
    "router": "router",
    "label": "labels (oracle: costs a full MLP)",
    "random": "random, the router's shares",
    "static": "static: every token the same width",
}


@styled
def plot_pareto(
    pareto: pd.DataFrame,
    *,
    dense_params: float,
    x: str = "active_params",
    metric: str = "perplexity_ratio",
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Quality over compute: a mark per method, θ and training; full marks are trained, hollow ones as converted, pale ones dominated.

    Beside the marks stands θ, or the width of a static cut. With several seeds the mark is their mean and small dots are the seeds;
    whiskers are the interval of the only seed, or reach from the lowest to the highest end over seeds. The line is the front: what
    nothing else beats in both. Where time was measured a second panel has it on its x axis, with a thin line from each mark to the share of
    parameters that it stands for in the first: right of it, the saving is not all there. Where benchmarks were scored a panel below has
    their average accuracy over what was active on the benchmarks' own tokens, with the level of chance; its whiskers are of the difference
    to the dense model on the same documents: those that do not reach its line tell the two apart (of a single task the exact test does).

    Args:
        pareto: method, theta, seed, train_tokens, active_params, active_mlp_fraction, metric, value, low, high, n; time_ratio, time_low,
            time_high where time was measured; rows of metric "average_accuracy" (`accuracy_rows`) where benchmarks were scored.
        dense_params: parameters of the dense model; x is drawn as a share of them.
        x: "active_params" or "active_mlp_fraction", of the first panel.
        metric: rows to draw. Perplexity ratios are drawn on a log axis with the dense model at 1; the dense model's other metrics are
            read from its row (method "dense").
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, no rows of the metric, or an unknown `x`.

    Example:
        >>> pareto = pd.DataFrame({"method": ["router", "static"], "theta": 0.9, "seed": 0, "train_tokens": 40_960, "n": 25})
        >>> pareto = pareto.assign(active_params=113e6, active_mlp_fraction=[0.67, 0.72], metric="perplexity_ratio")
        >>> pareto = pareto.assign(value=[1.5, 1.44], low=[1.34, 1.3], high=[1.64, 1.6])
        >>> print(lab.plot_pareto(pareto, dense_params=134e6).get_suptitle())
        Times the dense perplexity, router and static cut of
        the same active parameters: θ = 0.9: 1.50 and 1.44
    """
    require(pareto, _PARETO, "plot_pareto")
    if x not in ("active_params", "active_mlp_fraction"):
        raise InputError(f"plot_pareto: x = {x!r}, give 'active_params' or 'active_mlp_fraction'")
    rows = pareto[pareto["metric"] == metric]
    if rows.empty:
        raise InputError(f"plot_pareto: no rows of metric {metric!r}; the frame has {', '.join(sorted(set(pareto['metric'])))}")
    if not dense_params > 0:
        raise InputError(f"plot_pareto: dense_params = {dense_params}, give the parameters of the dense model")
    points = {name: _points(rows, name, dense_params) for name in (x, "time_ratio")}
    require(points[x], (), "plot_pareto: rows of a method besides dense")
    level = 1.0 if metric == "perplexity_ratio" else _dense_value(rows)
    shown = [name for name, found in points.items() if len(found)]
    accuracy = pareto[(pareto["metric"] == ACCURACY) & (metric != ACCURACY)]
    scored = bool((accuracy["method"] != "dense").any())
    figure = canvas(18.4 if scored else 12.6, figure)
    grid = figure.add_gridspec(1 + scored, len(shown), width_ratios=[1.5, 1][: len(shown)], height_ratios=[1.5, 1][: 1 + scored])
    axes = [figure.add_subplot(grid[0, 0])]
    axes += [figure.add_subplot(grid[0, 1], sharey=axes[0])] if len(shown) > 1 else []
    for ax, name in zip(axes, shown, strict=True):
        _panel(ax, points[name], level, metric)
        _seeds(ax, rows, points[name], name, dense_params if name == "active_params" else 1.0)
        ax.margins(x=0.09, y=0.08)
    axes[0].set_ylabel(_QUALITY.get(metric, metric))
    share = f"active parameters (% of the dense model's {compact(dense_params)})" if x == "active_params" else "active MLP neurons (%)"
    if scored:
        below = figure.add_subplot(grid[1, 0], sharex=axes[0])
        _accuracy(below, accuracy, x, dense_params)
    (below if scored else axes[0]).set_xlabel(share)
    if len(shown) > 1:
        axes[1].tick_params(labelleft=False)
        axes[1].set_xlabel("time of a prefill (% of the dense model's)")
        axes[0].set_title("counted: parameters" if x == "active_params" else "counted: neurons", loc="left")
        axes[1].set_title("measured: time", loc="left")
    beside = figure.add_subplot(grid[1, 1]) if scored and len(shown) > 1 else None
    _legend(figure, beside, points[x], timed=len(shown) > 1, note=_note(accuracy) if scored else "")
    headline(figure, _message(points[x], metric))
    if metric == "perplexity_ratio":
        ratio_axis(axes[0])
    for ax, name in zip(axes, shown, strict=True):
        _names(ax, points[name], level)
    if scored:
        _names(below, _points(accuracy, x, dense_params), _dense_value(accuracy))
    return figure


def _accuracy(ax: Axes, rows: pd.DataFrame, x: str, dense_params: float) -> None:
    """The panel of average accuracy, without names of the marks."""
    points = _points(rows, x, dense_params)
    _panel(ax, points, _dense_value(rows), ACCURACY)
    _seeds(ax, rows, points, x, dense_params if x == "active_params" else 1.0)
    chance = rows["chance"].iloc[0] if "chance" in rows else np.nan
    if np.isfinite(chance):
        ax.axhline(chance, **REFERENCE, zorder=1)
        place = {"xycoords": ax.get_yaxis_transform(), "xytext": (3, 2), "textcoords": "offset points", "fontsize": 6.5}
        ax.annotate("chance", (0, chance), color=REFERENCE["color"], **place)
    ax.margins(x=0.09, y=0.12)
    percent_axis(ax.yaxis)
    ax.set_ylabel(_QUALITY[ACCURACY])
    count = int(rows["tasks"].iloc[0]) if "tasks" in rows else 0
    tasks = f"{plural(count, 'task')}, " if count else ""
    ax.set_title(f"scored: {tasks}n = {plural(rows['n'].min(), 'document')}{' †' if _note(rows) else ''}", loc="left")


def _note(rows: pd.DataFrame) -> str:
    """What is not lm-eval's own about the documents of the scores."""
    note = rows["note"].iloc[0] if "note" in rows else ""
    return "" if pd.isna(note) else str(note)  # an empty text comes back from a csv as nan


def _dense_value(rows: pd.DataFrame) -> float:
    dense = rows.loc[rows["method"] == "dense", "value"]
    return float(dense.iloc[0]) if len(dense) else np.nan


def _points(rows: pd.DataFrame, cost: str, dense_params: float) -> pd.DataFrame:
    """Settings by a cost, the dense model aside: x (what is drawn); of times also share (of the parameters), x_low and x_high."""
    points = pareto_points(rows, cost=cost)
    points = points[(points["method"] != "dense") & points[cost].notna()]
    share = points["active_params"] / dense_params
    if cost == "time_ratio":
        return points.assign(x=points[cost], share=share, x_low=points["time_low"], x_high=points["time_high"])
    return points.assign(x=share if cost == "active_params" else points[cost], share=np.nan, x_low=np.nan, x_high=np.nan)


def _panel(ax: Axes, points: pd.DataFrame, level: float, metric: str) -> None:
    """Marks, lines between those of one method, the dense model and the front."""
    for (method, trained), part in points.groupby(["method", points["train_tokens"] > 0], sort=False):
        part = part.sort_values("x")
        color = method_color(method)
        if method != "static" or len(part) > 1:
            ax.plot(part["x"], part["value"], color=color, linewidth=0.7, alpha=0.45, linestyle="-" if trained else ":", zorder=1)
        for point in part.itertuples():
            _point(ax, point, color)
    _dense(ax, level)
    ax.plot(*_front(points, level, metric), **_FRONT)
    ax.grid(color="#eeeeee")
    ax.set_axisbelow(True)
    percent_axis(ax.xaxis)


def _seeds(ax: Axes, rows: pd.DataFrame, points: pd.DataFrame, cost: str, unit: float) -> None:
    """Small dots at the single seeds of settings that have several."""
    for point in points[points["seeds"] > 1].itertuples():
        same = rows[(rows["method"] == point.method) & (rows["train_tokens"] == point.train_tokens)]
        same = same[
            (same["theta"] == point.theta)
            | same["method"].str.startswith("tomoe")  # whose p is in the name
            | (np.isnan(point.theta) & np.isclose(same["active_mlp_fraction"], point.active_mlp_fraction, atol=2e-3))
        ]
        ax.plot(same[cost] / unit, same["value"], ".", color=method_color(point.method), markersize=2.5, zorder=4)


def _names(ax: Axes, points: pd.DataFrame, level: float) -> None:
    """θ or the width of a cut beside every mark; call it when the limits are final."""
    by_theta = np.isfinite(points["theta"]) & (points["method"] != "static")  # a static cut is known by its width
    marks = [
        f"{row.theta:g}" if known else percent(row.active_mlp_fraction) for row, known in zip(points.itertuples(), by_theta, strict=True)
    ]
    places = list(zip(points["x"], points["value"], strict=True))
    colors = [tuple(0.7 * np.array(to_rgb(method_color(method)))) for method in points["method"]]  # thin letters need more contrast
    level_line = [(at, level) for at in np.linspace(*ax.get_xlim(), 200)] if np.isfinite(level) else []
    place_labels(ax, places, marks, colors=colors, avoid=_along_lines(ax) + level_line)


def _point(ax: Axes, point, color: str) -> None:
    """One setting: whiskers and a mark; paler if dominated, hollow if untrained."""
    alpha = 0.4 if point.dominated else 1.0
    spread = np.clip([[point.value - point.low], [point.high - point.value]], 0, None)
    if np.isfinite(spread).all():
        ax.errorbar([point.x], [point.value], spread, fmt="none", ecolor=color, elinewidth=0.9, capsize=2, alpha=alpha, zorder=2)
    wide = np.clip([[point.x - point.x_low], [point.x_high - point.x]], 0, None)
    if np.isfinite(wide).all():
        ax.errorbar([point.x], [point.value], xerr=wide, fmt="none", ecolor=color, elinewidth=0.9, capsize=2, alpha=alpha, zorder=2)
    if np.isfinite(point.share):
        ax.plot([point.share, point.x], [point.value] * 2, color=color, zorder=1.5, **_DISTANCE)
        ax.plot([point.share], [point.value], "|", color=color, markersize=5, mew=1.0, zorder=1.5)
    look = {"mec": color, "mfc": color if point.train_tokens > 0 else "white", "mew": 1.1, "markersize": 5.5, "alpha": alpha}
    above = 3.5 if point.method == "router" else 3  # where a control has the same size, the router is seen
    ax.plot([point.x], [point.value], method_marker(point.method), zorder=above, **look)


def _along_lines(ax: Axes) -> list[tuple[float, float]]:
    """Points every few pixels along everything that is drawn as a line, the seeds' dots, whiskers, shares; in data units."""
    found = []
    for whisker in (path for collection in ax.collections if isinstance(collection, LineCollection) for path in collection.get_segments()):
        found += list(zip(*np.linspace(whisker[0], whisker[-1], 24).T, strict=True))
    for line in ax.get_lines():
        x, y = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
        if line.get_transform() != ax.transData or len(x) < 1:
            continue  # the dense model's lines span the axes
        if line.get_linestyle() in ("-", ":") and len(x) > 1:
            if line.get_drawstyle() == "steps-post":
                x, y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
            pixels = ax.transData.transform(np.stack([x, y], axis=1))
            at = np.concatenate([np.linspace(a, b, 24) for a, b in pairwise(pixels)])
            found += [tuple(point) for point in ax.transData.inverted().transform(at)]
        elif line.get_marker() in (".", "_", "|"):
            found += list(zip(x, y, strict=True))
    return found


def _dense(ax: Axes, level: float) -> None:
    """The dense model: its level as a line, itself at full compute."""
    if not np.isfinite(level):
        return
    ax.axhline(level, **DENSE, zorder=1)
    ax.axvline(1.0, **(DENSE | {"linewidth": 0.6, "alpha": 0.5}), zorder=1)
    ax.plot([1.0], [level], method_marker("dense"), color=DENSE["color"], markersize=9, zorder=4)
    # at the left end, for near the star are the dearest settings and their names
    place = {"xycoords": ("axes fraction", "data"), "xytext": (3, -3), "textcoords": "offset points", "ha": "left", "va": "top"}
    ax.annotate("dense model", (0.0, level), fontsize=6.5, color=DENSE["color"], **place)


def _front(points: pd.DataFrame, level: float, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the front [n], [n], cheapest first; the dense model closes it where nothing cheaper is as good."""
    best = points[~points["dominated"] & (points["method"] != ORACLE)][["x", "value"]].sort_values("x")
    if np.isfinite(level) and (
        len(best) == 0 or ((level < best["value"].min()) if lower_is_better(metric) else (level > best["value"].max()))
    ):
        best = pd.concat([best, pd.DataFrame({"x": [1.0], "value": [level]})])
    return best["x"].to_numpy(), best["value"].to_numpy()


def _legend(figure: Figure | SubFigure, ax: Axes | None, points: pd.DataFrame, *, timed: bool, note: str) -> None:
    """The key: in axes that are free, else under the panels."""
    handles, budgets = [], _budgets(points)
    for method in dict.fromkeys(points["method"]):
        look = {"color": method_color(method), "marker": method_marker(method), "linestyle": "none", "markersize": 5.5}
        handles.append(Line2D([], [], label=_name(method) + budgets.get(method, ""), **look))
    grey = {"color": "#666666", "marker": "o", "linestyle": "none", "markersize": 5.5}
    if (points["train_tokens"] == 0).any():
        handles.append(Line2D([], [], mfc="white", label="hollow: not trained", **grey))
    if points["dominated"].any():
        handles.append(Line2D([], [], alpha=0.4, label="pale: dominated", **grey))
    handles.append(Line2D([], [], label="front", **_FRONT))
    if timed:
        handles.append(Line2D([], [], color="#666666", marker="|", markersize=6, label="its share of the parameters", **_DISTANCE))
    look, note = {"handles": handles, "handlelength": 1.8}, f"† {note}" if note else ""
    if ax is not None:
        ax.set_axis_off()
        ax.legend(loc="upper left", borderaxespad=0, labelspacing=0.7, **look)
        ax.text(0.02, 0, textwrap.fill(note, 44), transform=ax.transAxes, va="bottom", fontsize=6.5, color="#444444")
        return
    title = {"title": note, "title_fontsize": 6.5} if note else {}
    columns = max(1, int(figure.bbox.width / figure.dpi / 2))  # 2 inches each
    figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.2, **look, **title)


def _budgets(points: pd.DataFrame) -> dict[str, str]:
    """What a method was trained on, for the key; empty if all were trained on as much."""
    trained = points[points["train_tokens"] > 0]
    if trained["train_tokens"].nunique() < 2:
        return {}
    by_method = trained.groupby("method")["train_tokens"].unique()
    return {method: f" ({', '.join(compact(tokens) for tokens in sorted(budgets))} tokens)" for method, budgets in by_method.items()}


def _name(method: str) -> str:
    """A method's name in the key."""
    return method.replace("tomoe", "ToMoE,", 1) if method.startswith("tomoe ") else _NAMES.get(method, method)


def _message(points: pd.DataFrame, metric: str) -> str:
    """What trained routers cost beside static cuts of their size, or, without such cuts, what the cheapest and the dearest cost."""
    routers = points[(points["method"] == "router") & (points["train_tokens"] > 0)]
    cuts = points[(points["method"] == "static") & (points["train_tokens"] > 0)]
    pairs = routers.merge(cuts, on=["theta", "train_tokens"], suffixes=("", "_cut")).sort_values("theta")
    if len(pairs) and metric == "perplexity_ratio":
        texts = [f"θ = {row.theta:g}: {row.value:.2f} and {row.value_cut:.2f}" for row in pairs.itertuples()]
        timed = [
            f"{percent(row.time_ratio)} and {percent(row.time_ratio_cut)}"
            for row in pairs.itertuples()
            if np.isfinite([row.time_ratio, row.time_ratio_cut]).all()
        ]
        if len(timed) == len(texts):
            texts = [f"{text} at {time} of its time" for text, time in zip(texts, timed, strict=True)]
        return f"Times the dense perplexity, router and static cut of the same active parameters: {'; '.join(texts)}"
    told = routers if len(routers) else points
    cheapest, dearest = told.loc[told["x"].idxmin()], told.loc[told["x"].idxmax()]

    def name(row: pd.Series) -> str:
        return (
            f"θ = {row['theta']:g}"
            if np.isfinite(row["theta"]) and row["method"] != "static"
            else f"{row['method']} {percent(row['active_mlp_fraction'])}"
        )

    def cost(row: pd.Series) -> str:
        value = f"{row['value']:.2f} times the dense perplexity" if metric == "perplexity_ratio" else f"{metric} {row['value']:.3g}"
        return f"{name(row)} runs {percent(row['active_mlp_fraction'])} of the MLP neurons at {value}"

    kind = "Trained routers" if len(routers) else "As converted"
    ends = [cost(cheapest)] if cheapest.equals(dearest) else [cost(cheapest), cost(dearest).replace(" of the MLP neurons", "")]
    ends = [ends[0], *(end.replace(" the dense perplexity", "") for end in ends[1:])]
    beaten = f"; {int(routers['dominated'].sum())} of {len(routers)} are dominated" if len(routers) > 1 else ""
    return f"{kind}: {', '.join(ends)}{beaten}"
