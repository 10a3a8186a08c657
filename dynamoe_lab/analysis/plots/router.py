"""Pictures of the router's errors, always beside what chance would have done."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dynamoe_lab.analysis.frames import compact, expert_names, one_run, percent, require, split_layers
from dynamoe_lab.analysis.metrics import pool_layers
from dynamoe_lab.analysis.style import (
    REFERENCE,
    canvas,
    headline,
    heatmap,
    method_color,
    one_axes,
    share_bar,
    styled,
)

__all__ = ["plot_error_distance", "plot_router_confusion", "plot_router_confusion_by_layer"]

_CONFUSION = ("run", "theta", "layer", "label", "expert", "tokens", "share")


@styled
def plot_router_confusion(
    confusion: pd.DataFrame,
    *,
    chance: pd.DataFrame | None = None,
    fractions: Sequence[float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Which expert the router chose for the tokens of each label, all layers together; rows sum to 100 %.

    Args:
        confusion: run, theta, layer, label, expert, tokens, share (from `router_confusion`, or pooled by
            `pool_layers`).
        chance: the frame of `router_chance`, for the title; without it the commonest label is counted in
            `confusion`, if that has layers.
        fractions: [E] share of the MLP of each expert, to call the experts by.
        ax: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, the frame holds several runs, or an expert has no fraction.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": 0, "label": [0, 0, 0, 1], "expert": [0, 0, 1, 1]})
        >>> ax = lab.plot_router_confusion(lab.router_confusion(routing, theta=0.9))
        >>> print(ax.get_title(loc="left"))
        The router is right for 75 % of tokens; always
        answering the layer's commonest label: 75 %
        >>> [text.get_text() for text in ax.texts]  # percent of the label's tokens, row by row
        ['67', '33', '0', '100']
    """
    require(confusion, _CONFUSION, "plot_router_confusion")
    one_run(confusion, "plot_router_confusion")
    single, pooled = split_layers(confusion)
    pooled = pool_layers(single) if pooled.empty else pooled
    names = expert_names(fractions, _highest(pooled), "plot_router_confusion")
    counts = pd.DataFrame(_joint(pooled.assign(layer=0), [0], len(names))[0])  # (label, expert)
    table = counts.div(counts.sum(axis=1).where(lambda total: total > 0), axis=0)
    total = counts.to_numpy().sum()
    ax = one_axes(8.6, ax, width=0.72)
    heatmap(ax, table, annotate=True, text_size=9)
    share_bar(ax.figure, ax, "tokens of that label (%)")
    rows, columns = counts.sum(axis=1) / total, counts.sum(axis=0) / total
    ax.set_yticklabels([f"{name}\n({percent(n)} of all)" for name, n in zip(names, rows, strict=True)], rotation=0)
    ax.set_xticklabels([f"{name}\n({percent(n)} of all)" for name, n in zip(names, columns, strict=True)])
    ax.set_ylabel("label (smallest sufficient expert)")
    ax.set_xlabel(f"expert chosen by the router\nn = {compact(total)} choices, one per token and layer")
    right = np.trace(counts.to_numpy()) / total
    message = f"The router is right for {percent(right)} of tokens"
    if chance is not None:
        require(chance, ("layer", "majority", "token_id"), "plot_router_confusion")
        row = split_layers(chance)[1].iloc[0]
        message += f"; always answering the layer's commonest label: {percent(row['majority'])}"
        if np.isfinite(row["token_id"]):
            message += f", answering by the token's id alone: {percent(row['token_id'])}"
    elif not single.empty:
        commonest = single.groupby(["layer", "label"])["tokens"].sum().groupby("layer").max().sum()
        message += f"; always answering the layer's commonest label: {percent(commonest / total)}"
    headline(ax, message)
    return ax


@styled
def plot_router_confusion_by_layer(
    confusion: pd.DataFrame,
    *,
    chance: pd.DataFrame | None = None,
    fractions: Sequence[float] | None = None,
    columns: int = 10,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Above, accuracy per layer beside its chance levels; below, one small confusion matrix per layer on a shared scale.

    The small matrices show shares of *all* the layer's tokens (a matrix sums to 100 %, its diagonal to the
    accuracy), so that a label that hardly occurs in a layer does not look as loud as a common one.

    Args:
        confusion: run, theta, layer, label, expert, tokens, share (from `router_confusion`).
        chance: the frame of `router_chance`; adds intervals, the router that sees only the token's id, and in the
            title counts only layers whose gain is clear of its interval.
        fractions: [E] share of the MLP of each expert, to call the experts by.
        columns: matrices per row.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, the frame holds several runs, or an expert has no fraction.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": [0, 0, 1, 1], "label": [0, 1, 0, 1]})
        >>> confusion = lab.router_confusion(routing.assign(expert=[0, 1, 0, 0]), theta=0.9)
        >>> figure = lab.plot_router_confusion_by_layer(confusion)
        >>> print(figure.get_suptitle())
        The router beats its layer's commonest label in 1 of 2 layers
        (+25 points on average); least in layer 1 (50 % against 50 %)
    """
    require(confusion, _CONFUSION, "plot_router_confusion_by_layer")
    one_run(confusion, "plot_router_confusion_by_layer")
    frame, _ = split_layers(confusion)
    require(frame, _CONFUSION, "plot_router_confusion_by_layer: rows of single layers")
    layers = list(frame["layer"].unique())
    names = expert_names(fractions, _highest(frame), "plot_router_confusion_by_layer")
    joint = _joint(frame, layers, len(names))
    joint /= joint.sum(axis=(1, 2), keepdims=True)
    columns = min(columns, len(layers))
    rows = -(-len(layers) // columns)
    side = min(2.6, 12.4 / columns) + 0.55  # cm of one matrix with its title
    figure = canvas(7.6 + rows * side, figure)
    outer = figure.add_gridspec(2, 1, height_ratios=[5.0, rows * side + 1.0])
    strip = figure.add_subplot(outer[0])
    right, best = _accuracy_strip(strip, layers, joint, chance)
    grid = outer[1].subgridspec(rows, columns, wspace=0.08, hspace=0.08)
    vmax = float(joint.max())
    matrices = [figure.add_subplot(grid[divmod(number, columns)]) for number in range(len(layers))]
    for ax, layer, matrix in zip(matrices, layers, joint, strict=True):
        heatmap(ax, pd.DataFrame(matrix), vmax=vmax)
        ax.set(xticks=[], yticks=[], aspect="equal")
        ax.set_title(f"layer {layer}" if layer == layers[0] else f"{layer}", fontsize=6.5, pad=2, loc="center")
        ax.patch.set(edgecolor="#999999", linewidth=0.6)
        for spine in ax.spines.values():
            spine.set(visible=True, color="#999999", linewidth=0.5)
    corner = matrices[(rows - 1) * columns]
    ticks = np.arange(len(names)) + 0.5
    corner.set_xticks(ticks, names, rotation=90, fontsize=5.5)
    corner.set_yticks(ticks, names, rotation=0, fontsize=5.5)
    corner.set_xlabel("router's choice", fontsize=6.5)
    corner.set_ylabel("label", fontsize=6.5)
    share_bar(figure, matrices, "layer's tokens (%)")
    gain = right - best
    least = int(np.argmin(gain))
    clear, beats = gain > 0, "beats"
    if chance is not None:
        require(chance, ("minus_majority_low",), "plot_router_confusion_by_layer")
        clear = split_layers(chance)[0].set_index("layer").loc[layers, "minus_majority_low"].to_numpy() > 0
        beats = "clearly beats"  # the interval of the difference lies above zero
    headline(
        figure,
        f"The router {beats} its layer's commonest label in {clear.sum()} of {len(layers)} layers ({100 * gain.mean():+.0f} points "
        f"on average); {'least' if gain[least] >= 0 else 'worst'} in layer {layers[least]} "
        f"({percent(right[least])} against {percent(best[least])})",
    )
    return figure


def _accuracy_strip(ax: Axes, layers: Sequence[int], joint: np.ndarray, chance: pd.DataFrame | None) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy by layer over its baselines; returns accuracy and majority [L]."""
    right = np.trace(joint, axis1=1, axis2=2)
    best = joint.sum(axis=2).max(axis=1)
    ax.step(layers, best, where="mid", color=method_color("majority"), linewidth=1.1)
    ax.fill_between(layers, best, step="mid", color=method_color("majority"), alpha=0.13, linewidth=0)
    handles = [("commonest label of the layer", ax.lines[0])]
    if chance is not None:
        needed = ("layer", "accuracy_low", "accuracy_high", "token_id", "confidence")
        require(chance, needed, "plot_router_confusion_by_layer")
        one_run(chance, "plot_router_confusion_by_layer")
        rows = split_layers(chance)[0].set_index("layer").loc[list(layers)]
        (line,) = ax.plot(layers, rows["token_id"], "D", mfc="none", color=method_color("token_id"), markersize=3, mew=0.9)
        handles.append(("token's id alone", line))
        errors = np.clip([right - rows["accuracy_low"], rows["accuracy_high"] - right], 0, None)
        ax.errorbar(layers, right, errors, fmt="none", ecolor=method_color("router"), elinewidth=1)
    (line,) = ax.plot(layers, right, "o", color=method_color("router"), markersize=3.6)
    known = "" if chance is None else f" ({percent(rows['confidence'].iloc[0])} interval)"
    handles.insert(0, (f"router{known}", line))
    low = min(right.min(), best.min())
    ax.set(
        xlim=(layers[0] - 0.6, layers[-1] + 0.6),
        ylim=(max(0, low - 0.1), 1.0),
        ylabel="accuracy (% of tokens)",
        xlabel="layer",
    )
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    ax.grid(axis="y")
    names, lines = zip(*handles, strict=True)
    ax.legend(lines, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return right, best


def _highest(confusion: pd.DataFrame) -> int:
    """The highest label or expert in the frame."""
    return int(max(confusion["label"].max(), confusion["expert"].max()))


def _joint(confusion: pd.DataFrame, layers: Sequence[int], count: int) -> np.ndarray:
    """Tokens as an array [layers, label, expert]; pairs that have no row are 0."""
    joint = np.zeros((len(layers), count, count))
    at = pd.Index(layers).get_indexer(confusion["layer"])
    np.add.at(joint, (at, confusion["label"].astype(int), confusion["expert"].astype(int)), confusion["tokens"])
    return joint


@styled
def plot_error_distance(errors: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """By how many experts, and to which side, the router misses when it errs, all layers together; beside it, chance.

    Args:
        errors: run, layer, distance, share, tokens, chance, error_share, error_low, error_high, error_chance,
            confidence (from `error_distance`); the rows of layer "all" are drawn.
        ax: where to draw; None: a new figure.

    Raises:
        InputError: a column or the rows of layer "all" are missing, or the frame holds several runs.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": 0, "label": [0, 0, 1, 2], "expert": [0, 1, 2, 0]})
        >>> ax = lab.plot_error_distance(lab.error_distance(routing))
        >>> print(ax.get_title(loc="left"))  # two of three errors
        67 % of the errors miss by one expert; were
        expert and label independent, 60 % would
    """
    needed = ("layer", "distance", "tokens", "error_share", "error_low", "error_high", "error_chance", "confidence")
    require(errors, needed, "plot_error_distance")
    one_run(errors, "plot_error_distance")
    rows = split_layers(errors)[1]
    require(rows, needed, "plot_error_distance: layer 'all'")
    rows = rows.assign(distance=rows["distance"].astype(int)).sort_values("distance")
    wrong = rows[rows["distance"] != 0]
    ax = one_axes(7.0, ax, width=0.72)
    at = wrong["distance"].to_numpy()
    share = wrong["error_share"].to_numpy()
    known = percent(rows["confidence"].iloc[0])
    ax.bar(at, share, width=0.62, color=method_color("router"), label=f"router ({known} interval)")
    spread = np.clip([share - wrong["error_low"], wrong["error_high"] - share], 0, None)
    ax.errorbar(at, share, spread, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=2)
    look = {"mfc": "white", "mec": method_color("token_id"), "mew": 1.2, "markersize": 5}
    ax.plot(at, wrong["error_chance"], "D", label="if expert and label were independent", **look)
    highest = np.nanmax([share, wrong["error_high"], wrong["error_chance"], np.full(len(at), 0.01)])
    for x, *tops in zip(at, share, wrong["error_high"], wrong["error_chance"], strict=True):
        top = np.nanmax([0, *tops])  # above the bar, its whisker and the mark of chance
        place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        ax.annotate(percent(tops[0]), (x, top), fontsize=7, **place)
    ax.axvline(0, **REFERENCE)
    ax.set(xticks=at, ylim=(0, 1.22 * highest), ylabel="share of the errors (%)")
    ax.set_xticklabels([f"{distance:+d}" for distance in at])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    n = compact(wrong["tokens"].sum())
    ax.set_xlabel(f"too small ←  chosen expert minus label (experts)  → too large\nn = {n} errors")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3)
    near = wrong[wrong["distance"].abs() == 1]
    message = (
        f"{percent(near['error_share'].sum())} of the errors miss by one expert; were expert and label independent, "
        f"{percent(near['error_chance'].sum())} would"
    )
    headline(ax, message if wrong["tokens"].sum() else "The router made no error", pad=22)
    return ax
