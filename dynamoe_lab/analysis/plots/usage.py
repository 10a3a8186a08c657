"""Pictures of who does the work: the share of tokens each expert takes, by layer and by domain."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter

from dynamoe_lab.analysis.frames import ALL, expert_names, one_run, percent, require, split_layers
from dynamoe_lab.analysis.metrics import usage_summary
from dynamoe_lab.analysis.style import DENSE, canvas, domain_colors, headline, heatmap, share_bar, styled
from dynamoe_lab.errors import InputError

__all__ = ["plot_expert_usage", "plot_expert_usage_by_domain"]

_USAGE = ("run", "theta", "domain", "layer", "expert", "share", "tokens")
_MARKERS = "osDv^PX"  # so that domains differ in grey print too
_ANNOTATED = 36  # layers up to which two digits fit into a cell at page width


@styled
def plot_expert_usage(
    usage: pd.DataFrame,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Share of each layer's tokens per expert as a heatmap; over it the mean share of the MLP's neurons that runs.

    Args:
        usage: run, theta, domain, layer, expert, share, tokens of one domain (from `expert_usage`).
        fractions: [E] share of the MLP of each expert.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, the frame holds several runs or domains, or an expert has no fraction.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": [0, 0, 1, 1], "expert": [0, 0, 0, 1]})
        >>> figure = lab.plot_expert_usage(lab.expert_usage(routing), fractions=(0.5, 1.0))
        >>> print(figure.get_suptitle())
        A token runs 62 % of the MLP neurons on average: from 50 % in layer 0 to 75 % in layer 1
    """
    tables, active = _tables(usage, fractions, "plot_expert_usage")
    if len(tables) > 1:
        raise InputError(f"plot_expert_usage: {len(tables)} domains in the frame; use plot_expert_usage_by_domain")
    ((domain, table),) = tables.items()
    figure = canvas(7.4, figure)
    strip, ax = figure.subplots(2, 1, height_ratios=[1, 1.35])
    layers = list(table.columns)
    mean = active[domain].loc[layers]
    strip.bar(np.arange(len(layers)) + 0.5, mean, width=0.72, color="#5a7fa6")
    strip.set(xlim=(0, len(layers)), xticks=[], ylabel="mean active\nneurons (%)")
    _percent_axis(strip)
    place = {"xycoords": "axes fraction", "xytext": (0, 2), "textcoords": "offset points"}
    strip.annotate("dense model", (1, 1), ha="right", va="bottom", fontsize=6.5, color=DENSE["color"], **place)
    _layer_heatmap(ax, table, fractions, annotate=len(layers) <= _ANNOTATED)
    ax.set_xlabel("layer")
    share_bar(figure, ax, "tokens of\nthe layer (%)", aspect=12)
    ends = f": from {percent(mean.min())} in layer {mean.idxmin()} to {percent(mean.max())} in layer {mean.idxmax()}"
    headline(
        figure,
        f"A token runs {percent(active[domain][ALL])} of the MLP neurons on average{ends if len(mean) > 1 else ''}",
    )
    return figure


@styled
def plot_expert_usage_by_domain(
    usage: pd.DataFrame,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """A line per domain of the mean share of the MLP's neurons that runs, by layer; under it a usage heatmap per domain.

    Args:
        usage: run, theta, domain, layer, expert, share, tokens (from `expert_usage(..., by_domain=True)`).
        fractions: [E] share of the MLP of each expert.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, the frame holds several runs, or an expert has no fraction.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": ["web", "web", "code", "code"], "document": 0, "layer": 0})
        >>> usage = lab.expert_usage(routing.assign(expert=[0, 0, 0, 1]), by_domain=True)
        >>> figure = lab.plot_expert_usage_by_domain(usage, fractions=(0.5, 1.0))
        >>> print(figure.get_suptitle())
        Mean active neurons range from 50 % (web) to 75 % (code) over domains
    """
    tables, active = _tables(usage, fractions, "plot_expert_usage_by_domain")
    domains = sorted(tables, key=lambda domain: active[domain][ALL])
    colors = domain_colors(tables)
    figure = canvas(7.4 + 2.0 * len(domains), figure)
    strip, *axes = figure.subplots(1 + len(domains), 1, height_ratios=[2.6, *[1] * len(domains)])
    layers = list(tables[domains[0]].columns)
    centres = np.arange(len(layers)) + 0.5
    for number, domain in enumerate(domains):
        look = {"color": colors[domain], "marker": _MARKERS[number % len(_MARKERS)], "markersize": 2.6}
        name = f"{domain} {percent(active[domain][ALL])}"
        strip.plot(centres, active[domain].loc[layers], label=name, linewidth=1.1, **look)
    strip.set(xlim=(0, len(layers)), xticks=[], ylabel="mean active neurons (%)")
    lowest = min(active[domain].loc[layers].min() for domain in domains)
    _percent_axis(strip, max(0.0, np.floor(10 * lowest - 0.5) / 10))
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.02), "borderaxespad": 0}
    strip.legend(ncols=6, handlelength=1.7, columnspacing=0.9, handletextpad=0.5, **place)
    for ax, domain in zip(axes, domains, strict=True):
        _layer_heatmap(ax, tables[domain], fractions, annotate=len(layers) <= _ANNOTATED, text_size=6.3, least=0.005)
        ax.set_ylabel(domain, rotation=90, color="#222222")
        if ax is not axes[-1]:
            ax.set_xticks([])
    axes[-1].set_xlabel("layer")
    share_bar(figure, axes, "tokens of the domain and layer (%); cells without a number: below 0.5 %", aspect=50, below=True)
    least, most = domains[0], domains[-1]
    across = pd.DataFrame({domain: active[domain].loc[layers] for domain in domains}).mean(axis=1)
    layered = f" and from {percent(across.min())} to {percent(across.max())} over layers"
    headline(
        figure,
        f"Mean active neurons range from {percent(active[least][ALL])} ({least}) to {percent(active[most][ALL])} "
        f"({most}) over domains{layered if len(across) > 1 else ''}",
    )
    return figure


def _tables(usage: pd.DataFrame, fractions: Sequence[float], function: str) -> tuple[dict, dict]:
    """Per domain: the shares as a table [expert, layer], and the active fraction by layer and "all"."""
    require(usage, _USAGE, function)
    one_run(usage, function)
    frame, _ = split_layers(usage)
    names = expert_names(fractions, int(frame["expert"].max()), function)
    summary = usage_summary(frame[list(_USAGE)], fractions=fractions)
    tables, active = {}, {}
    for domain in dict.fromkeys(frame["domain"]):
        part = frame[frame["domain"] == domain]
        table = part.pivot(index="expert", columns="layer", values="share")
        tables[domain] = table.reindex(range(len(names)), fill_value=0.0)
        active[domain] = summary[summary["domain"] == domain].set_index("layer")["active_fraction"]
    return tables, active


def _percent_axis(ax: Axes, lowest: float = 0.0) -> None:
    """`lowest` to 100 %, with the dense model as the line at the top."""
    ax.axhline(1, clip_on=False, label="dense model", **DENSE)
    ax.set_ylim(lowest, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    ax.grid(axis="y")
    ax.set_axisbelow(True)


def _layer_heatmap(
    ax: Axes, table: pd.DataFrame, fractions: Sequence[float], *, annotate: bool, text_size: float = 6, least: float = 0.0
) -> None:
    """Shares [expert, layer], the largest expert on top."""
    heatmap(ax, table.iloc[::-1], annotate=annotate, text_size=text_size, least=least)
    names = expert_names(fractions, len(table) - 1, "plot_expert_usage")
    ax.set_yticks(np.arange(len(names)) + 0.5, names[::-1], rotation=0)
    every = max(1, -(-table.shape[1] // 36))
    ax.set_xticks(np.arange(0, table.shape[1], every) + 0.5, table.columns[::every], rotation=0, fontsize=6.5)
    ax.set_ylabel("expert (of the MLP)")
    ax.set_xlabel("")
