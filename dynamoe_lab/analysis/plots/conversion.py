"""Pictures of a conversion: how importance is spread over neurons, and how near each prefix comes to the MLP."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dynamoe_lab.analysis.frames import expert_names, one_run, percent, require, split_layers
from dynamoe_lab.analysis.style import DENSE, REFERENCE, canvas, expert_colors, headline, styled

__all__ = ["plot_expert_similarity", "plot_importance_curves"]

DEPTH = "cividis_r"  # layers by depth: light is early, dark is late
_GLOSS = {  # h: a neuron's activations over the calibration tokens; out: the MLP's output for the token
    "l2_down": "√Σh² · ‖W_down‖",
    "l2_down_tokennorm": "√Σ(h/‖out‖)² · ‖W_down‖",
    "l2": "√Σh²",
    "abs": "Σ|h|",
    "random": "random order",
}


@styled
def plot_importance_curves(
    curves: pd.DataFrame,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Share of a layer's importance held by its first neurons: a panel per formula, a line per layer.

    Args:
        curves: formula, layer, rank_share, cumulative_share (from `importance_curves`).
        fractions: sizes of the experts, drawn as dotted verticals; the title tells of the smallest.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing.

    Example:
        >>> importance = pd.DataFrame({"formula": "l2", "layer": 0, "rank": range(4), "value": [4.0, 3.0, 2.0, 1.0]})
        >>> figure = lab.plot_importance_curves(lab.importance_curves(importance))
        >>> print(figure.get_suptitle())
        The first 25 % of the neurons by l2 hold 40 % of the importance
    """
    require(curves, ("formula", "layer", "rank_share", "cumulative_share"), "plot_importance_curves")
    formulas = list(dict.fromkeys(curves["formula"]))
    columns = 2 if len(formulas) == 4 else min(len(formulas), 3)
    rows = -(-len(formulas) // columns)
    figure = canvas(2.2 + 4.3 * rows, figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    layers = curves["layer"].astype(int)
    depth = ScalarMappable(Normalize(layers.min(), max(layers.max(), layers.min() + 1)), DEPTH)
    first, held = min(fractions), {}
    for ax, formula in zip(axes.flat, formulas, strict=False):
        part = curves[curves["formula"] == formula]
        ax.plot([0, 1], [0, 1], **REFERENCE)
        for layer, line in part.groupby("layer", observed=True):
            line = line.sort_values("rank_share")
            ax.plot(line["rank_share"], line["cumulative_share"], color=depth.to_rgba(int(layer)), linewidth=0.8)
            held.setdefault(formula, []).append(np.interp(first, line["rank_share"], line["cumulative_share"]))
        for fraction in fractions[:-1]:
            ax.axvline(fraction, color="#999999", linewidth=0.7, linestyle=":", zorder=0)
        ax.set_title(f"{formula}: {_GLOSS[formula]}" if formula in _GLOSS else str(formula), fontsize=7.5)
        median = percent(np.nanmedian(held[formula]))
        ax.text(0.98, 0.04, f"first {percent(first)} hold {median}", ha="right", fontsize=7)
        ax.set(xlim=(0, 1), ylim=(0, 1.01), xticks=[0, *fractions])
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    for number, ax in enumerate(axes.flat):
        ax.set_visible(number < len(formulas))
        ax.tick_params(labelbottom=number + columns >= len(formulas))  # the lowest panel of each column
    for ax in axes[:, 0]:
        ax.set_ylabel("importance held (% of layer)")
    figure.supxlabel("neurons kept, most important first (% of the MLP)", fontsize=8)
    if layers.nunique() > 1:
        bar = figure.colorbar(depth, ax=list(axes.flat), label="layer", aspect=30, pad=0.015)
        bar.locator = MaxNLocator(6, integer=True)
        bar.outline.set_visible(False)
    slant = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    axes[0, 0].text(0.5, 0.46, "all neurons alike", ha="center", va="top", fontsize=6, color="#666666", **slant)
    formula = formulas[0]
    low, middle, high = np.nanquantile(held[formula], [0, 0.5, 1])
    message = f"The first {percent(first)} of the neurons by {formula} hold {percent(middle)} of the importance"
    spread = f" (median of {len(held[formula])} layers; {percent(low)} to {percent(high)})" if len(held[formula]) > 1 else ""
    headline(figure, message + spread)
    return figure


@styled
def plot_expert_similarity(
    similarity: pd.DataFrame, *, theta: float | None = None, label: str = "cosine", figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """How close each expert's output comes to the full MLP's, layer by layer: a panel per expert but the last.

    The line is the median token, the band holds the middle 80 %, hollow marks are position 0 alone, which in
    many models is an attention sink unlike any other token.

    Args:
        similarity: layer, expert, fraction, mean, q10, q50, q90, n, sink_mean (and run): similarities.
        theta: threshold of the labels, drawn as a line; the title counts the layers whose median token
            passes.
        label: the definition of similarity, the experiment's `dynamoe.label`.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, or the frame holds several runs.

    Example:
        >>> similarity = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "fraction": [0.5, 1, 0.5, 1]})
        >>> similarity = similarity.assign(mean=0.9, q50=[0.8, 1, 0.9, 1], n=512)
        >>> figure = lab.plot_expert_similarity(similarity.assign(q10=0.7, q90=1.0, sink_mean=0.9), theta=0.9)
        >>> print(figure.get_suptitle())
        With 50 % of the neurons the median token reaches cosine 0.85 to the full
        MLP output (layers: 0.80 to 0.90); it passes θ = 0.9 in 1 of 2 layers
    """
    needed = ("layer", "expert", "fraction", "mean", "q10", "q50", "q90", "n", "sink_mean")
    require(similarity, needed, "plot_expert_similarity")
    one_run(similarity, "plot_expert_similarity")
    frame, _ = split_layers(similarity)
    experts = sorted(frame["expert"].astype(int).unique())
    colors = expert_colors(len(experts))
    shown = experts[:-1] or experts  # the last is the full MLP, similarity 1 by definition
    sizes = frame.groupby("expert", observed=True)["fraction"].first().sort_index()
    names = expert_names(sizes.tolist(), len(sizes) - 1, "plot_expert_similarity")
    measure = "cosine" if label == "cosine" else f"similarity ({label})"
    figure = canvas(7.2, figure)
    axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for ax, expert in zip(axes, shown, strict=True):
        part = frame[frame["expert"].astype(int) == expert]
        color = colors[experts.index(expert)]
        ax.plot(part["layer"], part["q50"], color=color, marker="o", markersize=2.2, label="median token")
        ax.fill_between(part["layer"], part["q10"], part["q90"], color=color, alpha=0.25, linewidth=0, label="middle 80 % of tokens")
        sink = {"mfc": "none", "mec": "#444444", "mew": 0.7, "markersize": 3.2}
        ax.plot(part["layer"], part["sink_mean"], "o", label="position 0 alone", **sink)
        ax.axhline(1, label="full MLP (dense)", **DENSE)
        if theta is not None:
            ax.axhline(theta, label=f"θ = {theta:g}", **REFERENCE)
        ax.set_title(f"first {names[experts.index(expert)]} of the neurons")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid(axis="y")
    axes[0].set_ylabel(f"{measure} to the full MLP output" if label == "cosine" else f"{measure}\nto the full MLP output")
    axes[len(axes) // 2].set_xlabel("layer")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, handlelength=2.2, columnspacing=1.2)
    expert = shown[len(shown) // 2]
    part = frame[frame["expert"].astype(int) == expert]
    message = (
        f"With {names[experts.index(expert)]} of the neurons the median token reaches {measure} "
        f"{part['q50'].median():.2f} to the full MLP output (layers: {part['q50'].min():.2f} to {part['q50'].max():.2f})"
    )
    if theta is not None:
        passed = int((part["q50"] >= theta).sum())
        message += f"; it passes θ = {theta:g} in {passed} of {len(part)} layers"
    headline(figure, message)
    return figure
