"""Pictures of where the time goes: into which parts of the model, and how that changes as the model or its input grows."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from dynamoe_lab.analysis.frames import percent, require
from dynamoe_lab.analysis.metrics.timing import PARTS, PHASES, growth_studies, setting_name
from dynamoe_lab.analysis.style import DENSE, REFERENCE, canvas, headline, method_color, method_marker, percent_axis, styled
from dynamoe_lab.errors import InputError

__all__ = ["plot_cost_growth", "plot_time_parts"]

_PARTS = dict(zip(PARTS, ("#44546a", method_color("router"), "#D55E00", "#88CCEE", "#DDCC77", "#c8c8c8"), strict=True))
_NARROW = 0.085  # of the panel: narrower segments have no number in them
_PHASES = {"prefill": "#332288", "decode": "#CC6677"}
_AXES = {"experts": "experts", "size": "hidden size, MLP size", "tokens": "tokens (decode: cached)", "batch": "sequences"}
_BOUND = {"linewidth": 0.9, "linestyle": (0, (3, 1.5)), "alpha": 0.75}


@styled
def plot_time_parts(
    parts: pd.DataFrame, *, energy: pd.DataFrame | None = None, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Where the time of a forward goes: a stacked bar per run, from the first run of the frame on top, a panel per phase.

    Numbers are the parts' times in the unit of the axis; behind the bar stands the whole.

    Args:
        parts: run, phase, batch, tokens, part (MLP, router, sorting, attention, head, other), seconds, share (from `time_parts`, one
            setting per phase); `run` names the bars.
        energy: model, joules_per_token (nan: not measured), note (the counters, or why there are none): one line below the bars.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, an unknown part, no known phase, or several rows of one run, phase and part.

    Example:
        >>> parts = pd.DataFrame({"part": ["MLP", "attention", "head"], "seconds": [0.6, 0.3, 0.1], "share": [0.6, 0.3, 0.1]})
        >>> figure = lab.plot_time_parts(parts.assign(run="dense", phase="prefill", batch=1, tokens=1024))
        >>> print(figure.get_suptitle(), "|", figure.axes[0].get_title(loc="left"))
        MLPs take 60 % of the dense model's prefill | prefill: 1 × 1024 tokens
    """
    require(parts, ("run", "phase", "batch", "tokens", "part", "seconds", "share"), "plot_time_parts")
    if parts.duplicated(["run", "phase", "part"]).any():
        raise InputError("plot_time_parts: several rows of one run, phase and part; give every measurement a run of its own")
    if unknown := sorted(set(parts["part"]) - set(PARTS)):
        raise InputError(f"plot_time_parts: unknown part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    runs = list(dict.fromkeys(parts["run"]))
    phases = [phase for phase in PHASES if (parts["phase"] == phase).any()]
    if not phases:
        raise InputError(f"plot_time_parts: no rows of a phase that is known; give {' or '.join(PHASES)}")
    figure = canvas(3.6 + 0.72 * len(runs), figure)
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases, strict=True):
        part = parts[parts["phase"] == phase]
        table = part.pivot(index="run", columns="part", values="seconds").reindex(index=runs, columns=PARTS)
        scale, unit = (1.0, "s") if np.nansum(table, axis=1).max() >= 0.5 else (1e3, "ms")
        _bars(ax, table * scale)
        name = setting_name(phase, int(part["batch"].iloc[0]), int(part["tokens"].iloc[0]))
        ax.set_title(f"{phase}: {name}")
        ax.set_xlabel(f"time of {'a forward' if phase == 'prefill' else 'a step'} ({unit})")
    axes[0].set_yticks(range(len(runs)), runs)
    axes[0].set_ylim(len(runs) - 0.5, -0.5)
    drawn = [name for name in PARTS if parts.loc[parts["part"] == name, "seconds"].gt(0).any()]
    handles = [Line2D([], [], marker="s", linestyle="none", markersize=6, color=_PARTS[name], label=name) for name in drawn]
    line = None if energy is None else _energy_line(energy)
    key = {"ncols": len(handles), "handletextpad": 0.3, "columnspacing": 1.4, "title": line, "title_fontsize": 7}
    figure.legend(handles=handles, loc="outside lower center", **key)
    headline(figure, _parts_message(parts, runs, phases))
    return figure


def _energy_line(energy: pd.DataFrame) -> str:
    """Joules per token of every model, or that they were not measured, and why."""
    require(energy, ("model", "joules_per_token", "note"), "plot_time_parts: energy")
    notes = ", ".join(dict.fromkeys(energy["note"]))
    if energy["joules_per_token"].isna().any():
        return f"energy: not measured ({notes.removeprefix('not measured: ')})"
    told = (f"{model} {joules:.3g} J" for model, joules in zip(energy["model"], energy["joules_per_token"], strict=True))
    return f"energy per token: {', '.join(told)} ({notes})"


def _bars(ax: Axes, table: pd.DataFrame) -> None:
    """Stacked bars of times [runs, parts] with the numbers that fit and the sums."""
    widest = np.nansum(table, axis=1).max()
    for place, (_, row) in enumerate(table.iterrows()):
        if row.notna().sum() == 0:
            continue
        left = 0.0
        for name, value in row.fillna(0.0).items():
            ax.barh(place, value, left=left, height=0.68, color=_PARTS[name], edgecolor="white", linewidth=0.5)
            if value > _NARROW * widest:
                dark = name in ("MLP", "router", "sorting")
                ax.text(left + value / 2, place, _time(value), ha="center", va="center", fontsize=6.5, color="white" if dark else "#222222")
            left += value
        ax.annotate(_time(left, 3), (left, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5, fontweight="bold")
    ax.set_xlim(0, 1.13 * widest)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _time(value: float, digits: int = 2) -> str:
    """A time with so many digits: 18, 7.5, 0.60."""
    return f"{value:#.{digits}g}".rstrip(".") if value < 10**digits - 0.5 else f"{value:.0f}"


def _parts_message(parts: pd.DataFrame, runs: list[str], phases: list[str]) -> str:
    """The MLPs' share of the first run's time, and what routers and sorting take of the others'."""
    texts = []
    for phase in phases:
        shares = parts[parts["phase"] == phase].pivot(index="run", columns="part", values="share")
        shares = shares.reindex(index=runs, columns=PARTS).fillna(0.0)
        extra = (shares["router"] + shares["sorting"]).loc[lambda values: values > 0]
        text = f"MLPs take {percent(shares['MLP'].iloc[0])} of the {runs[0]} model's {phase}"
        if len(extra):
            span = " to ".join(dict.fromkeys((percent(extra.min()), percent(extra.max()))))
            text += f", routers and sorting {span} of the converted one's"
        texts.append(text)
    return "; ".join(texts)


@styled
def plot_cost_growth(ratios: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Time beside the dense model's (above) and the realised share of the ideal (below) as one thing grows, a column each.

    Experts, model size, tokens and batch grow one at a time, the others stay at their most common value. Dashed, above: Amdahl's bound.

    Args:
        ratios: phase, batch, tokens, routing, active_mlp_fraction, time_ratio, realised (each with _low and _high), amdahl, hidden_size,
            intermediate_size, experts (from `latency_ratios`); one routing per phase.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, nothing grows, or several rows of one phase and size.

    Example:
        >>> rows = pd.DataFrame({"phase": "prefill", "batch": 1, "tokens": [64, 1024], "routing": "mixed", "active_mlp_fraction": 0.5})
        >>> rows = rows.assign(hidden_size=64, intermediate_size=256, experts=4, amdahl=1.4)
        >>> rows = rows.assign(**{f"{name}{end}": [0.6, 0.9] for name in ("time_ratio", "realised") for end in ("", "_low", "_high")})
        >>> print(lab.plot_cost_growth(rows).get_suptitle())
        Share of the ideal speed that the MLPs reach (prefill,
        about 50 % active): 60 % to 90 % from 64 to 1024 tokens
    """
    spreads = [f"{name}{end}" for name in ("time_ratio", "realised") for end in ("", "_low", "_high")]
    sizes = ("hidden_size", "intermediate_size", "experts")
    require(ratios, ("phase", "batch", "tokens", "routing", "active_mlp_fraction", *spreads, "amdahl", *sizes), "plot_cost_growth")
    studies = growth_studies(ratios)
    if not studies:
        raise InputError("plot_cost_growth: nothing grows; measure two or more values of experts, model size, tokens or batch")
    for axis, rows in studies.items():
        if rows.duplicated(["phase", "place"]).any():
            raise InputError(f"plot_cost_growth: several rows of one phase and {axis}; pass the rows of one routing")
    figure = canvas(10.0, figure)
    axes = figure.subplots(2, len(studies), sharex="col", sharey="row", squeeze=False)
    phases = [phase for phase in PHASES if any((rows["phase"] == phase).any() for rows in studies.values())]
    for (above, below), (axis, rows) in zip(axes.T, studies.items(), strict=True):
        for phase in phases:
            part = rows[rows["phase"] == phase].sort_values("place")
            look = {"color": _PHASES[phase], "marker": method_marker("router" if phase == "prefill" else "static"), "markersize": 4}
            for ax, name in ((above, "time_ratio"), (below, "realised")):
                spread = np.clip([part[name] - part[f"{name}_low"], part[f"{name}_high"] - part[name]], 0, None)
                ax.errorbar(part["place"], part[name], np.nan_to_num(spread), capsize=2, elinewidth=0.9, linewidth=1.1, **look)
            above.plot(part["place"], 1 / part["amdahl"], color=_PHASES[phase], zorder=1, **_BOUND)
        above.axhline(1.0, **DENSE, zorder=0.9)
        below.axhline(1.0, **REFERENCE, zorder=0.9)
        marks = rows.drop_duplicates("place").sort_values("place")["mark"]
        below.set_xticks(range(len(marks)), marks.str.replace(" × ", "\n"))
        below.set_xlim(-0.35, len(marks) - 0.65)
        below.set_xlabel(_AXES[axis], fontsize=7)
        for ax in (above, below):
            ax.grid(axis="y")
            percent_axis(ax.yaxis)
    drawn = pd.concat(studies.values())
    _limits(axes[0, 0], pd.concat([drawn["time_ratio"], 1 / drawn["amdahl"]]))
    _limits(axes[1, 0], drawn["realised"])
    axes[0, 0].set_ylabel("time / dense\nmodel's time (%)")
    axes[1, 0].set_ylabel("ideal / measured\ntime of the MLPs (%)")
    handles = [
        Line2D([], [], color=_PHASES[phase], marker=method_marker("router" if phase == "prefill" else "static"), markersize=4, label=phase)
        for phase in phases
    ]
    handles.append(Line2D([], [], label="dense model", **DENSE))
    handles.append(Line2D([], [], color="#444444", label="Amdahl's bound (above)", **_BOUND))
    handles.append(Line2D([], [], label="ideal (below)", **REFERENCE))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=2.4)
    headline(figure, _growth_message(studies, phases[0]))
    return figure


def _limits(ax: Axes, values: pd.Series) -> None:
    """A range for all values and 1; whiskers that reach far beyond, of a machine that was busy, run out of it."""
    low, high = min(1.0, values.min()), max(1.0, values.max())
    pad = 0.3 * max(high - low, 0.1)
    ax.set_ylim(low - pad, high + pad)


def _growth_message(studies: dict[str, pd.DataFrame], phase: str) -> str:
    """What the realised share does from the first to the last value of every axis."""
    texts = []
    for axis, rows in studies.items():
        part = rows[rows["phase"] == phase].sort_values("place")
        if len(part) < 2:
            continue
        first, last = part.iloc[0], part.iloc[-1]
        name = {"experts": " experts", "size": " (D × H)", "tokens": " tokens", "batch": " sequences"}[axis]
        texts.append(f"{percent(first['realised'])} to {percent(last['realised'])} from {first['mark']} to {last['mark']}{name}")
    share = percent(pd.concat(studies.values())["active_mlp_fraction"].median())  # draws differ a little
    message = f"Share of the ideal speed that the MLPs reach ({phase}, about {share} active): {'; '.join(texts)}"
    return message.replace(" × ", "\u00a0×\u00a0")  # sizes stay on one line
