"""The picture of a training run: four curves on one axis of tokens."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, PercentFormatter

from dynamoe_lab.analysis.frames import compact, label_note, percent, require
from dynamoe_lab.analysis.metrics import smooth_steps
from dynamoe_lab.analysis.style import DENSE, REFERENCE, canvas, headline, styled

__all__ = ["plot_training_curves"]

_PANELS = (
    ("lm_loss", "LM loss (nats per token)"),
    ("router_loss", "router loss (nats per choice)"),
    ("router_accuracy", "router accuracy (%)"),
    ("active_mlp_fraction", "active MLP neurons (%)"),
)
_RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@styled
def plot_training_curves(
    steps: pd.DataFrame,
    *,
    window: int = 10,
    dense_loss: float | None = None,
    majority: float | None = None,
    label: str = "cosine",
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """LM loss, router loss, router accuracy and active MLP fraction over the tokens seen.

    Args:
        steps: run, step, tokens, lm_loss, router_loss, router_accuracy, active_mlp_fraction (the frame
            `steps`).
        window: steps of the moving mean drawn over the faint raw values; the title tells where that line ends, the mean of the last
            `window` steps.
        dense_loss: LM loss of the dense model on the same kind of text, a reference line.
        majority: accuracy of always answering the layer's commonest label, a reference line.
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, or window < 1.

    Example:
        >>> steps = pd.DataFrame({"run": "a", "step": [1, 2, 3, 4], "tokens": [512, 1024, 1536, 2048], "lm_loss": [5.0, 5.0, 4.0, 4.0]})
        >>> steps = steps.assign(router_loss=[1.4, 1.4, 0.7, 0.7], router_accuracy=[0.3, 0.3, 0.7, 0.7], active_mlp_fraction=0.6)
        >>> print(lab.plot_training_curves(steps, window=2, dense_loss=3.7).get_suptitle())
        After 2.05 K tokens the LM loss of training batches is 4.00 (dense,
        held-out: 3.70) and the routers are right for 70 % of tokens
    """
    require(steps, ("run", "step", "tokens", *(name for name, _ in _PANELS)), "plot_training_curves")
    figure = canvas(10.5, figure)
    axes = figure.subplots(2, 2, sharex=True)
    smooth = smooth_steps(steps, window)
    runs = list(dict.fromkeys(steps["run"]))
    for number, run in enumerate(runs):
        color = _RUNS[number % len(_RUNS)]
        raw, mean = (frame[frame["run"] == run].sort_values("step") for frame in (steps, smooth))
        for ax, (name, _) in zip(axes.flat, _PANELS, strict=True):
            ax.plot(raw["tokens"], raw[name], color=color, alpha=0.25, linewidth=0.7, rasterized=len(raw) > 2000)
            ax.plot(mean["tokens"], mean[name], color=color, label=str(run))
    for ax, (name, measure) in zip(axes.flat, _PANELS, strict=True):
        named = label != "cosine" and name.startswith("router")
        ax.set_ylabel(f"{measure}\nlabels by {label}" if named else measure)
        ax.grid(axis="y")
        if name in ("router_accuracy", "active_mlp_fraction"):
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    _references(axes, dense_loss, majority)
    if window > 1:
        key = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 6.5, "color": "#666666"}
        axes[0, 1].annotate(f"faint: each step; line: mean of the last {window}", (0.99, 0.98), **key)
    for ax in axes[1]:
        ax.set_xlabel("training tokens")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    later = steps[steps["step"] > 0]
    rate = later["tokens"] / later["step"]  # tokens per step; steps are shown if all runs agree on it
    if len(rate) and rate.min() > 0.99 * rate.max() > 0:
        per_step = rate.median()
        for ax in axes[0]:
            above = ax.secondary_xaxis("top", functions=(lambda x: x / per_step, lambda x: x * per_step))
            above.set_xlabel("optimizer steps", fontsize=7, color="#666666")
            above.tick_params(labelsize=6.5, colors="#666666")
    if len(runs) > 1:
        axes[0, 1].legend(title="run", title_fontsize=7)
    headline(figure, _message(smooth, dense_loss, majority, label))
    return figure


def _references(axes: np.ndarray, dense_loss: float | None, majority: float | None) -> None:
    """The dense model and the majority class as lines, each named on the line."""

    def line(ax: Axes, value: float, name: str, look: dict, *, below: bool = False) -> None:
        ax.axhline(value, **look)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, value - 0.06 * (high - low)), max(high, value + 0.06 * (high - low)))
        place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, -2 if below else 2), "textcoords": "offset points"}
        note = ax.annotate(name, (1, value), ha="right", va="top" if below else "bottom", fontsize=6.5, color=look["color"], **place)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])  # curves may cross it

    if dense_loss is not None:
        line(axes[0, 0], dense_loss, f"dense model, held-out {dense_loss:.2f}", DENSE)
    if majority is not None:
        line(axes[1, 0], majority, f"commonest label {percent(majority)}", REFERENCE, below=True)
    line(axes[1, 1], 1.0, "dense model 100 %", DENSE)


def _message(smooth: pd.DataFrame, dense_loss: float | None, majority: float | None, label: str) -> str:
    ends = smooth.groupby("run", sort=False, observed=True).tail(1)  # the last point of each drawn line

    def span(values: pd.Series, text: Callable[[float], str]) -> str:
        return " to ".join(dict.fromkeys((text(values.min()), text(values.max()))))  # one number if the runs agree

    several = f" in {len(ends)} runs" if len(ends) > 1 else ""
    dense = f" (dense, held-out: {dense_loss:.2f})" if dense_loss is not None else ""
    chance = f" (commonest label: {percent(majority)})" if majority is not None else ""
    loss = span(ends["lm_loss"], "{:.2f}".format)
    return (
        f"After {span(ends['tokens'], compact)} tokens{several} the LM loss of training batches is {loss}{dense} "
        f"and the routers are right for {span(ends['router_accuracy'], percent)} of tokens{chance}{label_note(label)}"
    )
