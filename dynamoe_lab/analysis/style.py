"""How every figure looks: one palette, one set of sizes, one place that knows them.

The same expert, method or domain has the same colour in every figure. Experts are an ordered scale (a bigger
expert is darker), methods and domains are two separate sets of hues that stay apart for colour-blind readers
(Okabe and Ito; Paul Tol's "muted"). The dense model is always the near-black dashed reference line. Sizes are
for a page: figures are drawn as wide as they are printed, so that 7 points stay 7 points.

Plots draw inside `style_context()`; save inside it too, for embedded fonts, reproducible SVG ids and the
resolution of print.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from dynamoe_lab.errors import InputError

__all__ = [
    "DENSE",
    "HEATMAP",
    "PAGE_WIDTH",
    "RC",
    "REFERENCE",
    "canvas",
    "domain_colors",
    "expert_colors",
    "gradient_line",
    "headline",
    "heatmap",
    "lambda_colors",
    "method_color",
    "method_marker",
    "one_axes",
    "percent_axis",
    "ratio_axis",
    "share_bar",
    "style_context",
    "styled",
]

PAGE_WIDTH = 16 / 2.54  # inches: the text width of an A4 page, 16 cm
DENSE = {"color": "#222222", "linestyle": (0, (5, 2)), "linewidth": 1.1}  # the dense model's line
REFERENCE = {"color": "#7a7a7a", "linestyle": (0, (2, 1.5)), "linewidth": 1.0}  # chance levels and thresholds
HEATMAP = sns.cubehelix_palette(start=0.35, rot=-0.45, light=1.0, dark=0.12, as_cmap=True)  # white 0, dark 1; even

RC = {
    "axes.edgecolor": "#444444",
    "axes.grid": False,
    "axes.labelcolor": "#222222",
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "figure.dpi": 150,
    "figure.titlesize": 9.5,
    "font.family": "DejaVu Sans",  # ships with matplotlib, so a figure is the same on every machine
    "font.size": 8,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "pdf.fonttype": 42,  # fonts embedded as outlines that editors can open
    "ps.fonttype": 42,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "text.parse_math": False,  # labels are names of files and models: a $ in them is a $
    "svg.hashsalt": "dynamoe-lab",  # the same figure gives the same file
    "xtick.color": "#444444",
    "xtick.labelsize": 7,
    "xtick.major.width": 0.7,
    "ytick.color": "#444444",
    "ytick.labelsize": 7,
    "ytick.major.width": 0.7,
}

_METHODS = {
    "dynamoe": "#0072B2",
    "router": "#0072B2",
    "label": "#009E73",
    "token_id": "#D55E00",
    "majority": "#7a7a7a",
    "marginals": "#b0b0b0",
    "static": "#E69F00",
    "random": "#999999",
    "tomoe": "#CC79A7",
    "cmoe": "#56B4E9",
    "dense": "#222222",
}
_MARKERS = {"router": "o", "label": "s", "random": "X", "static": "D", "tomoe": "^", "dense": "*"}  # told apart in grey print, too
_LAMBDAS = {0.0: "#D55E00", 1.0: "#0072B2"}  # λ_router: unsupervised, the paper's
_GRADIENTS = {"straight_through": "-", "probability": (0, (4, 1.5)), "none": (0, (1, 1.2))}
_DOMAINS = {
    "c4": "#332288",
    "wiki": "#88CCEE",
    "code": "#117733",
    "technical": "#999933",
    "tiny": "#CC6677",
    "math": "#AA4499",
    "science": "#44AA99",
    "text": "#332288",
}
_MUTED = ("#332288", "#88CCEE", "#117733", "#999933", "#CC6677", "#AA4499", "#44AA99", "#DDCC77", "#882255")


@contextmanager
def style_context() -> Iterator[None]:
    """A context manager in which figures are drawn and saved the same way everywhere.

    It gives back what it set and nothing else: a notebook's backend becomes interactive with the first figure, and one that is reset to
    what it was before (as `mpl.rc_context` does) shows that figure and never another.
    """
    before = {name: mpl.rcParams[name] for name in RC}
    mpl.rcParams.update(RC)
    try:
        yield
    finally:
        mpl.rcParams.update(before)


def styled(function: Callable) -> Callable:
    """Decorator of a plot: it runs inside `style_context()`; the caller's own settings stay as they were."""

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with style_context():
            return function(*args, **kwargs)

    return inside


def expert_colors(count: int) -> list[tuple[float, float, float]]:
    """One colour per expert, from the smallest (light) to the whole MLP (dark)."""
    return [tuple(color[:3]) for color in mpl.colormaps["viridis"](np.linspace(0.82, 0.05, count) if count > 1 else [0.05])]


def method_color(name: str) -> str:
    """The colour of a method or baseline; `static_2` has that of `static`."""
    known = [method for method in _METHODS if name.lower().startswith(method)]
    return _METHODS[max(known, key=len)] if known else "#56B4E9"


def method_marker(name: str) -> str:
    """The marker of a method in a scatter; `static_2` has that of `static`."""
    return next((marker for method, marker in _MARKERS.items() if name.lower().startswith(method)), "P")


def lambda_colors(values: Iterable[float]) -> dict[float, str]:
    """The colour of each λ_router: fixed for 0 and 1, free hues for others."""
    others = sorted({float(value) for value in values} - set(_LAMBDAS))
    free = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    return _LAMBDAS | {value: free[number % len(free)] for number, value in enumerate(others)}


def gradient_line(name: str) -> Any:
    """The line style of a router gradient."""
    return _GRADIENTS.get(name, "-.")


def domain_colors(names: Iterable[str]) -> dict[str, str]:
    """The colour of each domain: fixed for those of the lab's own text, free hues for others."""
    names = list(dict.fromkeys(map(str, names)))
    free = [color for color in _MUTED if color not in {_DOMAINS.get(name) for name in names}] or list(_MUTED)
    others = sorted(name for name in names if name not in _DOMAINS)
    return {name: _DOMAINS.get(name) or free[others.index(name) % len(free)] for name in names}


def canvas(height: float, figure: Figure | SubFigure | None, *, width: float = 1.0) -> Figure | SubFigure:
    """The figure to draw in: the caller's, or a new one, `width` pages wide and `height` cm high."""
    if figure is None:
        return plt.figure(figsize=(PAGE_WIDTH * width, height / 2.54), layout="constrained")
    if not isinstance(figure, (Figure, SubFigure)):
        raise InputError(f"figure must be a matplotlib Figure or SubFigure, not a {type(figure).__name__}")
    return figure


def one_axes(height: float, ax: Axes | None, *, width: float = 1.0) -> Axes:
    """The axes to draw in: the caller's, or a new figure's, `width` pages wide and `height` cm high."""
    return canvas(height, None, width=width).add_subplot() if ax is None else ax


def headline(where: Axes | Figure | SubFigure, message: str, *, pad: float = 8) -> None:
    """Write the one message of a picture over it, on the left, in lines that fit; `pad` points over axes."""
    figure = where if not isinstance(where, Axes) else where.figure
    width = figure.bbox.width / figure.dpi * 72  # points; of a sub-figure: its own part
    if isinstance(where, Axes):
        width *= where.get_position().width
    size = RC["axes.titlesize" if isinstance(where, Axes) else "figure.titlesize"]
    solid = message.replace(" %", "\u00a0%").replace(" = ", "\u00a0=\u00a0")  # a number stays with its name and its unit
    widest = max(24, int(width / (0.53 * size)))
    lines = textwrap.wrap(solid, widest, break_on_hyphens=False)
    while widest > 24 and len(shorter := textwrap.wrap(solid, widest - 1, break_on_hyphens=False)) == len(lines):
        lines, widest = shorter, widest - 1  # as many lines, but of even length
    text = "\n".join(lines).replace("\u00a0", " ")
    if isinstance(where, Axes):
        where.set_title(text, loc="left", pad=pad, fontsize=size)
    else:
        where.suptitle(text, x=0.01, ha="left", fontsize=size)


def percent_axis(axis: Any) -> None:
    """Shares on an axis in percent, with as many digits as its ticks need."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


def ratio_axis(ax: Axes) -> None:
    """The y axis on a log scale with a few round numbers as ticks; call it when the limits are final."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks: list[float] = []
    for value in (
        digit * 10.0**power for digit in (1, 2, 5, 3, 1.5, 1.2, 7, 4, 2.5, 1.1, 1.3, 1.7) for power in range(-3, 7)
    ):  # roundest first
        if low <= value <= high and all(abs(np.log(value / tick)) > np.log(high / low) / 11 for tick in ticks):
            ticks.append(value)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def heatmap(
    ax: Axes, table: pd.DataFrame, *, annotate: bool = False, text_size: float = 6.5, vmax: float = 1.0, least: float = 0.0
) -> None:
    """Shares (a pivoted frame, 0 to `vmax`) as a heatmap; `annotate` writes those of at least `least` in percent, what is nan stays empty.

    (seaborn's heatmap draws the whole figure to see whether tick labels overlap: 0.3 s for each of the matrices of a page.)
    """
    shares = np.asarray(table, dtype=np.float64)
    look = {"edgecolor": "white", "linewidth": 0.4} if shares.size <= 200 else {"linewidth": 0}
    mesh = ax.pcolormesh(np.ma.masked_invalid(shares), cmap=HEATMAP, vmin=0, vmax=vmax, rasterized=shares.size > 400, **look)
    rows, columns = shares.shape
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.set_xticks(np.arange(columns) + 0.5, table.columns)
    ax.set_yticks(np.arange(rows) + 0.5, table.index)
    for (row, column), share in np.ndenumerate(shares) if annotate else ():
        if np.isnan(share) or share < least:
            continue
        mark = "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"
        light = np.dot(np.power(mesh.to_rgba(share)[:3], 2.2), (0.2126, 0.7152, 0.0722)) > 0.24
        place = {"ha": "center", "va": "center", "color": "#222222" if light else "white"}
        ax.text(column + 0.5, row + 0.5, mark, fontsize=text_size, **place)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def share_bar(figure: Figure | SubFigure, axes: Any, label: str, *, aspect: float = 30, below: bool = False) -> None:
    """The colour scale, in percent, of the heatmaps in `axes` (one or a list that share it), on their right or `below` them."""
    first = axes if isinstance(axes, Axes) else axes[0]
    place = {"location": "bottom", "shrink": 0.5} if below else {"pad": 0.012}
    bar = figure.colorbar(first.collections[0], ax=axes, aspect=aspect, **place)
    bar.long_axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    bar.set_label(label, fontsize=7)
    bar.outline.set_visible(False)
