"""The picture of what experts specialise in: association with domain and token class, by layer, and who takes what in one layer of each."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from dynamoe_lab.analysis.frames import ALL, one_run, percent, require, split_layers
from dynamoe_lab.analysis.metrics.specialisation import FACTORS, above_control
from dynamoe_lab.analysis.style import REFERENCE, canvas, headline, heatmap, share_bar, styled

__all__ = ["plot_specialisation"]

_COLORS = {"domain": "#009E73", "token class": "#D55E00"}
_TITLES = {"domain": "domain of the text", "token class": "class of the token"}
_NEEDED = ("run", "factor", "layer", "association", "low", "high", "control", "control_low", "control_high", "clusters", "confidence")


@styled
def plot_specialisation(
    specialisation: pd.DataFrame,
    choices: pd.DataFrame | None = None,
    *,
    before: pd.DataFrame | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """By layer, how much the chosen expert goes with domain and with token class, beside shuffled labels.

    Args:
        specialisation: run, factor, layer (also "all"), association, low, high, control, control_low, control_high, clusters, confidence
            (from `specialisation`), one run.
        choices: factor, level, layer, expert, share (from `expert_choice`): under each factor the experts that each of its levels takes in
            the layer where the association is farthest above the control; None: not drawn.
        before: as `specialisation`, of the same text and the model before training: what routers give that have learnt nothing.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column or the rows of layer "all" are missing, or the frame holds several runs.

    Example:
        >>> rows = pd.DataFrame({"run": "a", "factor": "domain", "layer": [0, 1, "all"], "association": [0.1, 0.6, 0.35], "control": 0.1})
        >>> rows = rows.assign(low=0.0, high=0.7, control_low=0.0, control_high=0.2, clusters=25, confidence=0.95)
        >>> print(lab.plot_specialisation(rows).get_suptitle())
        Beyond the 95 % band of shuffled labels the choice of
        expert goes with the domain of the text in 1 of 2 layers
    """
    require(specialisation, _NEEDED, "plot_specialisation")
    one_run(specialisation, "plot_specialisation")
    single, pooled = split_layers(specialisation)
    require(pooled, (), f"plot_specialisation: rows of layer '{ALL}'")
    factors = [factor for factor in FACTORS if factor in set(single["factor"])]
    if before is not None:
        require(before, _NEEDED, "plot_specialisation: before")
    figure = canvas(12.4 if choices is not None else 7.4, figure)
    rows = figure.subplots(1 + (choices is not None), len(factors), squeeze=False, height_ratios=[1.35, 1][: 1 + (choices is not None)])
    texts = []
    for ax, factor in zip(rows[0], factors, strict=True):
        part = single[single["factor"] == factor]
        _curve(ax, part, factor, before)
        ax.sharey(rows[0, 0])
        fresh = "" if before is None else f" (before training: {above_control(before, factor)})"
        texts.append(f"with the {_TITLES[factor]} in {above_control(single, factor)} of {len(part)} layers{fresh}")
        ax.tick_params(labelleft=ax is rows[0, 0])
    top = max(
        (1.35 if before is None else 1.45) * single[["high", "control_high", "association"]].max().max(), 0.05
    )  # with room for the key
    rows[0, 0].set(ylim=(0, top), ylabel="association with the expert\n(Cramér's V, bias-corrected)")
    for ax, factor in zip(rows[1], factors, strict=True) if choices is not None else ():
        part = single[single["factor"] == factor].set_index("layer")
        layer = (part["association"] - part["control_high"]).idxmax()
        _choice(ax, choices, factor, layer)
    if choices is not None:
        share_bar(figure, list(rows[1]), "tokens of the row (%)", aspect=14)
    band = percent(pooled["confidence"].iloc[0])
    headline(figure, f"Beyond the {band} band of shuffled labels the choice of expert goes {' and '.join(texts)}")
    return figure


def _curve(ax: Axes, part: pd.DataFrame, factor: str, before: pd.DataFrame | None) -> None:
    """Association by layer with its interval, over the band of the control; that before training as a thin line."""
    color, layers = _COLORS[factor], part["layer"].to_numpy()
    ax.fill_between(layers, part["control_low"], part["control_high"], color=REFERENCE["color"], alpha=0.25, linewidth=0)
    name = f"labels shuffled among {int(part['clusters'].iloc[0]):,} {FACTORS[factor]}s"
    ax.plot(layers, part["control"], label=name, **REFERENCE)
    ax.vlines(layers, part["low"], part["high"], color=color, linewidth=0.8, alpha=0.6)
    ax.plot(
        layers,
        part["association"],
        color=color,
        marker="o",
        markersize=2.4,
        linewidth=1,
        label="found" if before is None else "found after training",
    )
    if before is not None:
        fresh = split_layers(before[before["factor"] == factor])[0]
        ax.plot(fresh["layer"], fresh["association"], color="#222222", linewidth=0.8, label="found before training")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set(xlabel="layer", title=_TITLES[factor])
    ax.grid(axis="y")
    ax.legend(loc="upper left", handlelength=1.6, borderaxespad=0.2)


def _choice(ax: Axes, choices: pd.DataFrame, factor: str, layer: int) -> None:
    """Experts that each level of a factor takes in one layer; all tokens in the last row."""
    require(choices, ("factor", "level", "layer", "expert", "share"), "plot_specialisation: choices")
    part = choices[(choices["factor"] == factor) & (choices["layer"] == layer)]
    table = part.pivot(index="level", columns="expert", values="share")
    table = table.loc[[*(name for name in table.index if name != ALL), ALL]].rename(index={ALL: "all tokens"})
    heatmap(ax, table, annotate=table.size <= 120, text_size=6, least=0.005)
    ax.axhline(len(table) - 1, color="white", linewidth=2)
    ax.set_xticks(np.arange(table.shape[1]) + 0.5, table.columns)
    ax.set(xlabel=f"expert of layer {layer}, where it stands out")
