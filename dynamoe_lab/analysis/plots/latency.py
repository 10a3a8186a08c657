"""Pictures of measured time: what a share of the MLP costs beside the dense model, and how much of the ideal saving is there."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from dynamoe_lab.analysis.frames import percent, require
from dynamoe_lab.analysis.metrics.timing import PHASES, SETTING, routed_rows, row_near, setting_name, told_setting
from dynamoe_lab.analysis.style import DENSE, REFERENCE, canvas, headline, method_marker, percent_axis, styled
from dynamoe_lab.errors import InputError

__all__ = ["plot_latency", "plot_realised_vs_ideal"]

_RATIOS = (*SETTING, "routing", "active_mlp_fraction", "n")
_SETTINGS = ("#332288", "#CC6677", "#117733", "#AA8800", "#882255", "#44AA99")  # apart from the colours of methods
_BOUND = {"linestyle": (0, (3, 1.5)), "linewidth": 0.9, "alpha": 0.75}
_ROUTED = ("mixed", "one expert", "router")  # whose routers run
_WHO = {"one expert": "one expert for all", "mixed": "experts mixed", "router": "trained router", "ToMoE": "ToMoE, its router"}
_ALIKE = 0.025  # active shares that a title tells as one: draws and texts differ a little
_DODGE = 0.007  # of the MLP, between settings of one active share


@styled
def plot_latency(ratios: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Time relative to the dense model's over the active share of the MLP, a panel per phase and a colour per setting.

    Marks are medians over rounds, whiskers reach from the 10 % to the 90 % quantile; the line joins the mixed tokens (one expert, where
    nothing is mixed). Dashed: Amdahl's bound, the time if the active work, the routers' included, were all that the MLPs take.

    Args:
        ratios: phase, batch, tokens, routing, active_mlp_fraction, n, amdahl, time_ratio, time_ratio_low, time_ratio_high (from
            `latency_ratios`); one run.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, only rows of the dense model or of unknown phases, or several of one setting and routing.

    Example:
        >>> ratios = pd.DataFrame({"phase": "prefill", "batch": 1, "tokens": 1024, "routing": ["one expert"], "n": 5, "amdahl": 1 / 0.7})
        >>> ratios = ratios.assign(active_mlp_fraction=0.5, time_ratio=0.8, time_ratio_low=0.78, time_ratio_high=0.83)
        >>> print(lab.plot_latency(ratios).get_suptitle())
        At 50 % of the MLP a prefill takes 80 % of the dense model's time (bound 70 %)
    """
    require(ratios, (*_RATIOS, "amdahl", "time_ratio", "time_ratio_low", "time_ratio_high"), "plot_latency")
    phases, figure = _phases(ratios, "plot_latency"), canvas(8.8, figure)
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases, strict=True):
        for rows, look, at in _settings(ratios, phase):
            asked = rows["routing"].isin(_ROUTED)  # a fixed width asks no router, and ToMoE is bound by its attention, too
            bound = rows[asked | ~asked.any()].sort_values("active_mlp_fraction")
            ax.plot(bound["active_mlp_fraction"], 1 / bound["amdahl"], color=look["color"], zorder=1, **_BOUND)
            _marks(ax, rows, "time_ratio", look, at)
        ax.axhline(1.0, **DENSE, zorder=0.9)
        _finish(ax, ratios, phase)
    axes[0].set_ylabel("time / dense model's time (%)")
    handles = [Line2D([], [], label="dense model", **DENSE), Line2D([], [], color="#444444", label="Amdahl's bound", **_BOUND)]
    _legend(figure, ratios, handles)
    headline(figure, _time_message(ratios, phases))
    return figure


@styled
def plot_realised_vs_ideal(ratios: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """The ideal time of the MLPs over the measured one, by active share: 100 % is an implementation that pays for active work only.

    Marks, lines, whiskers and colours are those of `plot_latency`.

    Args:
        ratios: phase, batch, tokens, routing, active_mlp_fraction, n, realised, realised_low, realised_high (from `latency_ratios`);
            one run.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, only rows of the dense model or of unknown phases, or several of one setting and routing.

    Example:
        >>> ratios = pd.DataFrame({"phase": "prefill", "batch": 1, "tokens": 1024, "routing": ["one expert"], "n": 5})
        >>> ratios = ratios.assign(active_mlp_fraction=0.5, realised=0.75, realised_low=0.7, realised_high=0.8)
        >>> print(lab.plot_realised_vs_ideal(ratios).get_suptitle())
        The MLPs reach, of the ideal speed, 75 % with one expert for all (prefill, 50 % active)
    """
    require(ratios, (*_RATIOS, "realised", "realised_low", "realised_high"), "plot_realised_vs_ideal")
    phases, figure = _phases(ratios, "plot_realised_vs_ideal"), canvas(8.0, figure)
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases, strict=True):
        for rows, look, at in _settings(ratios, phase):
            _marks(ax, rows, "realised", look, at)
        ax.axhline(1.0, **REFERENCE, zorder=0.9)
        _finish(ax, ratios, phase)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low - 0.1 * max(len(_settings(ratios, phase)) for phase in phases) * (high - low), high)  # room for the keys
    axes[0].set_ylabel("ideal / measured\ntime of the MLPs (%)")
    _legend(figure, ratios, [Line2D([], [], label="ideal", **REFERENCE)])
    headline(figure, _realised_message(ratios, phases))
    return figure


def _phases(ratios: pd.DataFrame, function: str) -> list[str]:
    """The phases of the frame, in order; refuses frames of several models, whose lines would be mixed."""
    rows = routed_rows(ratios)
    if rows.empty:
        raise InputError(f"{function}: the frame has only rows of the dense model; measure the converted one, too")
    if rows.duplicated([*SETTING, "routing", "active_mlp_fraction"]).any():
        raise InputError(f"{function}: several rows of one setting and routing; pass the rows of one run, thread count and device")
    found = [phase for phase in PHASES if (rows["phase"] == phase).any()]
    if not found:
        raise InputError(f"{function}: no rows of a phase that is known; give {' or '.join(PHASES)}")
    return found


def _settings(ratios: pd.DataFrame, phase: str) -> list[tuple[pd.DataFrame, dict, float]]:
    """Rows, look and shift of every (batch, tokens) of a phase; a setting has one colour in both phases."""
    rows = routed_rows(ratios)
    every = sorted({*zip(rows["batch"], rows["tokens"], strict=True)}, key=lambda pair: (pair[0], pair[1]))
    groups = list(rows[rows["phase"] == phase].groupby(["batch", "tokens"]))
    found = []
    for number, ((batch, tokens), part) in enumerate(groups):
        look = {"color": _SETTINGS[every.index((batch, tokens)) % len(_SETTINGS)], "label": setting_name(phase, batch, tokens)}
        found.append((part, look, _DODGE * (number - (len(groups) - 1) / 2)))
    return found


def _kind(routing: str) -> str:
    """The method whose marker a routing has: tokens mixed by chance, all alike, or as the router says."""
    return {"mixed": "random", "router": "router", "label": "label", "ToMoE": "tomoe"}.get(routing, "static")


def _marks(ax: Axes, rows: pd.DataFrame, name: str, look: dict, shift: float) -> None:
    """A mark with its whiskers per row; a thin line through the mixed ones, a thinner one through those of one expert."""
    for routing, part in rows.groupby("routing"):
        part = part.sort_values("active_mlp_fraction")
        at, value = part["active_mlp_fraction"] + shift, part[name]
        spread = np.clip([value - part[f"{name}_low"], part[f"{name}_high"] - value], 0, None)
        ax.errorbar(at, value, np.nan_to_num(spread), fmt="none", ecolor=look["color"], elinewidth=0.9, capsize=2, zorder=2)
        line = {"mixed": ("-", 1.1), "one expert": (":", 0.9)}.get(routing, ("none", 0))
        size = {"router": 6.0, "ToMoE": 6.0, "mixed": 5.4}.get(routing, 4.2)
        above = 4 if routing == "router" else 3
        face = look["color"] if routing != "one expert" else "white"
        marker = method_marker(_kind(routing))
        ax.plot(at, value, marker, color=look["color"], mfc=face, markersize=size, linestyle=line[0], linewidth=line[1], zorder=above)


def _finish(ax: Axes, ratios: pd.DataFrame, phase: str) -> None:
    """Title, grid, axes and the key of the settings, where the lines leave room."""
    ax.set_title(f"{phase}" + {"prefill": ": reading a text", "decode": ": one more token each"}[phase])
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    percent_axis(ax.xaxis)
    percent_axis(ax.yaxis)
    ax.set_xticks([0.25, 0.5, 0.75, 1.0])
    ax.set_xlabel("active MLP neurons (%)")
    handles = [Line2D([], [], color=look["color"], label=look["label"]) for _, look, _ in _settings(ratios, phase)]
    ax.legend(handles=handles, loc="lower right", handlelength=1.4, frameon=True, edgecolor="none", framealpha=0.8)


def _legend(figure: Figure | SubFigure, ratios: pd.DataFrame, handles: list[Line2D]) -> None:
    """The key of the marks, under the panels."""
    routings = set(routed_rows(ratios)["routing"])
    for name in (*_ROUTED, *sorted(routings - {*_ROUTED})):
        if name in routings:
            look = {"marker": method_marker(_kind(name)), "linestyle": {"mixed": "-", "one expert": ":"}.get(name, "none")}
            face = "white" if name == "one expert" else "#444444"
            handles.append(Line2D([], [], color="#444444", mfc=face, markersize=4.4, linewidth=1, label=_WHO.get(name, name), **look))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), handlelength=2.4, columnspacing=1.6)


def _time_message(ratios: pd.DataFrame, phases: list[str]) -> str:
    """What half of the MLP costs in every phase, and what the trained router does."""
    whole, ends = {"prefill": "a prefill", "decode": "a decode step"}, []
    for routings in (("mixed", "one expert"), ("router",)):
        found = {phase: row for phase in phases if (row := row_near(told_setting(ratios, phase), routings)) is not None}
        shares = [row["active_mlp_fraction"] for row in found.values()]
        if shares and max(shares) - min(shares) < _ALIKE:
            shares = [sum(shares) / len(shares)]
        times = [
            f"{whole[phase]} takes {percent(row['time_ratio'])}"
            + (" of the dense model's time" if not number and not ends else "")
            + f" (bound {percent(1 / row['amdahl'])})"
            for number, (phase, row) in enumerate(found.items())
        ]
        if times:
            who = "with the trained router at" if routings == ("router",) else "at"
            ends.append(f"{who} {' and '.join(map(percent, shares))} of the MLP {', '.join(times)}")
    message = "; ".join(ends) or "time beside the dense model's by active share of the MLP"
    return message[0].upper() + message[1:]


def _realised_message(ratios: pd.DataFrame, phases: list[str]) -> str:
    """What half of the MLP reaches in every phase, with one expert for all tokens and with experts mixed."""
    texts = []
    for phase in phases:
        rows = told_setting(ratios, phase)
        found = {name: row for name in ("mixed", "one expert", "router") if (row := row_near(rows, (name,))) is not None}
        if not found:
            continue
        told = {name: row for name, row in found.items() if name != "router"} or found
        share = percent(next(iter(told.values()))["active_mlp_fraction"])
        reached = [f"{percent(row['realised'])} with {_WHO[name]}" for name, row in told.items()]
        texts.append(f"{' and '.join(reached)} ({phase}, {share} active)")
    return f"The MLPs reach, of the ideal speed, {'; '.join(texts)}" if texts else "Ideal time of the MLPs over the measured one"
