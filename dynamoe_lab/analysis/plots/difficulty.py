"""Pictures of difficulty: which labels the tokens of each layer get at every θ, and which tokens are hard."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dynamoe_lab.analysis.frames import ALL, compact, expert_names, label_mark, one_run, percent, require, signed, split_layers
from dynamoe_lab.analysis.metrics.difficulty import COVARIATE_NAMES, COVARIATES
from dynamoe_lab.analysis.metrics.labels import FIRST, LATER
from dynamoe_lab.analysis.style import (
    DENSE,
    REFERENCE,
    canvas,
    domain_colors,
    expert_colors,
    headline,
    heatmap,
    method_color,
    percent_axis,
    share_bar,
    styled,
)
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural

__all__ = ["plot_difficulty_by_domain", "plot_difficulty_vs_surprisal", "plot_label_share"]

_SHARES = ("run", "theta", "domain", "place", "layer", "label", "fraction", "tokens", "share")
_BINS = ("theta", "covariate", "bin", "center", "difficulty", "low", "high", "tokens", "documents", "confidence")
_MEANS = ("run", "theta", "domain", "layer", "mean", "low", "high", "tokens", "documents", "confidence")
_AXES = {
    "surprisal": "surprisal of the token (nats)",
    "next_surprisal": "surprisal of the next token (nats)",
    "log_frequency": "frequency of its id in training text",
    "position": "position in the block (tokens)",
}


@styled
def plot_label_share(
    shares: pd.DataFrame, *, theta: float, label: str = "cosine", figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Labels by layer at one θ (above) and the MLP share they ask for by layer and θ (below); on the right all layers together, over θ.

    Args:
        shares: run, theta, domain, place, layer, label, fraction, tokens, share of one domain (from `label_shares`).
        theta: the threshold drawn above; the nearest one in `shares` is taken.
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column or the rows of later tokens are missing, or the frame holds several runs or domains.

    Example:
        >>> similarity = pd.DataFrame({"run": "a", "domain": "web", "position": [1, 2, 3, 4], "layer": 0})
        >>> shares = lab.label_shares(similarity.assign(similarity_0=[0.95, 0.8, 0.6, 0.2]), [0.5, 0.9], fractions=(0.5, 1.0))
        >>> print(lab.plot_label_share(shares, theta=0.9).get_suptitle())
        At θ = 0.9 labels ask for 88 % of the MLP; over θ = 0.5 to 0.9 it goes from 62 % to 88 %
    """
    require(shares, _SHARES, "plot_label_share")
    one_run(shares, "plot_label_share")
    if shares["domain"].nunique() > 1:
        raise InputError("plot_label_share: several domains in the frame; pass the rows of one")
    thetas = np.sort(shares["theta"].unique())
    theta = thetas[np.abs(thetas - theta).argmin()]
    single, pooled = split_layers(shares)
    later, pooled_later = single[single["place"] == LATER], pooled[pooled["place"] == LATER]
    require(later, _SHARES, f"plot_label_share: rows of single layers, place '{LATER}'")
    require(pooled_later, _SHARES, f"plot_label_share: rows of layer '{ALL}', place '{LATER}'")
    sizes = shares.groupby("label")["fraction"].first().sort_index()
    names, colors = expert_names(sizes.tolist(), len(sizes) - 1, "plot_label_share"), expert_colors(len(sizes))
    figure = canvas(13.6, figure)
    (bars, areas), (grid, lines) = figure.subplots(2, 2, width_ratios=[2.6, 1], height_ratios=[1, 1.15])
    layers = later["layer"].unique()
    at = later[later["theta"] == theta].pivot(index="label", columns="layer", values="share").to_numpy()  # (E, L)
    over = pooled_later.pivot(index="label", columns="theta", values="share").to_numpy()  # (E, thetas)
    centres = np.arange(len(layers)) + 0.5
    for size, color in enumerate(colors):
        bars.bar(centres, at[size], 0.86, bottom=at[:size].sum(axis=0), color=color, label=f"label {names[size]}")
    areas.stackplot(thetas, over, colors=colors, linewidth=0)
    if len(thetas) == 1:
        areas.bar(thetas, over[:, 0], 0.02, bottom=np.append(0, over[:-1, 0].cumsum()), color=colors)
    table = _mean_fraction(later).unstack("layer")  # (thetas, layers)
    heatmap(grid, table, vmax=1.0)
    grid.invert_yaxis()  # θ upwards
    step = max(1, -(-len(thetas) // 8))
    grid.set_yticks(np.arange(0, len(thetas), step) + 0.5, [f"{value:.2f}" for value in thetas[::step]], rotation=0)
    every = max(1, -(-len(layers) // 16))
    for ax in (bars, grid):
        ax.set(xlim=(0, len(layers)))
        ax.set_xticks(centres[::every], layers[::every])
    row = int(np.flatnonzero(thetas == theta)[0])
    grid.axhspan(row, row + 1, fill=False, edgecolor="#D55E00", linewidth=1.2, clip_on=False)
    _mean_lines(lines, thetas, pooled)
    for ax in (areas, lines):
        ax.axvline(theta, **(REFERENCE | {"color": "#D55E00"}))
        ax.set(xlim=(thetas[0] - 1e-3, thetas[-1] + 1e-3))
    for ax in (bars, areas, lines):
        ax.set_ylim(0, 1)
        percent_axis(ax.yaxis)
    mark = label_mark(label)
    bars.set_title(f"labels at θ = {theta:.3g}{mark}")
    areas.set_title("labels, all layers")
    grid.set_title("mean share of the MLP that labels ask for")
    lines.set_title("the same, all layers")
    bars.set(ylabel="tokens (%)")
    grid.set(ylabel=f"θ{mark}", xlabel="layer")
    lines.set(xlabel=f"θ{mark}", ylabel="mean MLP share (%)")
    share_bar(figure, grid, "mean share of the MLP (%)", aspect=40, below=True)
    keys = [handles + more for handles, more in zip(bars.get_legend_handles_labels(), lines.get_legend_handles_labels(), strict=True)]
    figure.legend(*keys, loc="outside lower center", ncols=4, handlelength=1.8)
    mean = _mean_fraction(pooled_later).droplevel("layer")
    by_layer = table.loc[theta]
    ends = [f"{percent(by_layer[layer])} in layer {layer}" for layer in (by_layer.idxmin(), by_layer.idxmax())]
    across = f", from {ends[0]} to {ends[1]}" if len(by_layer) > 1 else ""
    headline(
        figure,
        f"At θ = {theta:.3g}{mark} labels ask for {percent(mean[theta])} of the MLP{across}; over θ = {thetas[0]:.3g} to "
        f"{thetas[-1]:.3g} it goes from {percent(mean.iloc[0])} to {percent(mean.iloc[-1])}",
    )
    return figure


def _mean_fraction(shares: pd.DataFrame) -> pd.Series:
    """Mean share of the MLP that labels ask for, by theta and layer."""
    return (shares["share"] * shares["fraction"]).groupby([shares["theta"], shares["layer"]]).sum()


def _mean_lines(ax: Axes, thetas: np.ndarray, pooled: pd.DataFrame) -> None:
    """The mean over θ, for the first token of a block and for the others; the dense model at 100 %."""
    looks = {
        LATER: {"color": method_color("label"), "marker": "s"},
        FIRST: {"color": "#444444", "marker": "o", "mfc": "white", "linestyle": ":"},
    }
    for place, look in looks.items():
        mean = _mean_fraction(pooled[pooled["place"] == place])
        if len(mean):
            ax.plot(thetas, mean.to_numpy(), markersize=2.8, label="first token (position 0)" if place == FIRST else place, **look)
    ax.axhline(1, clip_on=False, label="dense model", **DENSE)
    ax.grid(axis="y")


@styled
def plot_difficulty_vs_surprisal(
    bins: pd.DataFrame,
    *,
    correlations: pd.DataFrame | None = None,
    label: str = "cosine",
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Mean difficulty over surprisal, the next token's surprisal, frequency and position, in bins of equal numbers of tokens.

    Args:
        bins: run, theta, covariate, bin, start, end, center, difficulty, low, high, tokens, documents, confidence (from `difficulty_bins`).
            Position 0 (bin 0) is drawn hollow, at the edge if it lies outside.
        correlations: the frame of `difficulty_correlations`, for the panels' titles and the message.
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing.

    Example:
        >>> tokens = pd.DataFrame({"run": "a", "theta": 0.9, "layer": "all", "domain": "web", "document": range(4), "position": 1})
        >>> tokens = tokens.assign(surprisal=[1.0, 2.0, 8.0, 9.0], next_surprisal=1.0, frequency=0.1, difficulty=[0.3, 0.5, 0.8, 1.0])
        >>> bins, correlations = lab.difficulty_bins(tokens, bins=2), lab.difficulty_correlations(tokens)
        >>> figure = lab.plot_difficulty_vs_surprisal(bins, correlations=correlations)
        >>> print(figure.get_suptitle())
        At θ = 0.9 a token's difficulty goes most with its surprisal (Spearman +1.00); 4 tokens, 4 documents, 95 % intervals over documents
    """
    require(bins, _BINS, "plot_difficulty_vs_surprisal")
    one_run(bins, "plot_difficulty_vs_surprisal")
    shown = [name for name in COVARIATES if (bins["covariate"] == name).any()]
    rho = _pooled_correlations(correlations)
    figure = canvas(10.6 if len(shown) > 2 else 6.4, figure)
    axes = figure.subplots(-(-len(shown) // 2), min(2, len(shown)), sharey=True, squeeze=False)
    usual = bins[bins["bin"] > 0]
    low, high = np.nanmin(usual[["difficulty", "low"]]), np.nanmax(usual[["difficulty", "high"]])
    pad = max(0.08 * (high - low), 0.01)
    for ax, name in zip(axes.flat, shown, strict=False):
        part = usual[usual["covariate"] == name].sort_values("bin")
        spread = np.clip([part["difficulty"] - part["low"], part["high"] - part["difficulty"]], 0, None)
        ax.errorbar(
            part["center"], part["difficulty"], spread, color=method_color("label"), marker="s", markersize=3.4, capsize=2, elinewidth=0.9
        )
        ax.set(ylim=(low - pad, high + pad), xlabel=_AXES[name])
        percent_axis(ax.yaxis)
        ax.grid(axis="y")
        if name == "log_frequency":
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1 in {compact(round(10**-value))}"))
        if name in rho.index:
            row = rho.loc[name]
            spread = f" ({signed(row['low'])} to {signed(row['high'])})" if np.isfinite(row["low"]) else ""
            ax.set_title(f"Spearman {signed(row['spearman'])}{spread}")
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    mark = label_mark(label)
    for ax in axes[:, 0]:
        named = f"difficulty{mark}:\nmean MLP share that\nlabels ask for (%)"
        ax.set_ylabel(named if mark else "difficulty: mean MLP share\nthat labels ask for (%)")
    first = bins[(bins["bin"] == 0) & (bins["covariate"] == "position")]
    if len(first):
        _position_zero(axes.flat[shown.index("position")], first.iloc[0]["difficulty"])
    at, n = f"At θ = {bins['theta'].iloc[0]:.3g}{mark}", usual.groupby("covariate")["tokens"].sum().max()
    documents = int(usual["documents"].max())
    ends = f"{percent(usual['difficulty'].min())} to {percent(usual['difficulty'].max())}"
    message = f"{at} mean difficulty goes from {ends} over the bins"
    if len(rho):
        clear = rho[(rho["low"] > 0) | (rho["high"] < 0)]
        message = f"{at} a token's difficulty goes with none of these beyond its interval"
        if len(clear):
            strongest = clear["spearman"].abs().idxmax()
            value = signed(clear.loc[strongest, "spearman"])
            message = f"{at} a token's difficulty goes most with {COVARIATE_NAMES[strongest]} (Spearman {value})"
    known = percent(bins["confidence"].iloc[0])
    headline(figure, f"{message}; {compact(n)} tokens, {plural(documents, 'document')}, {known} intervals over documents")
    return figure


def _pooled_correlations(correlations: pd.DataFrame | None) -> pd.DataFrame:
    """spearman, low, high of all layers together, by covariate."""
    if correlations is None:
        return pd.DataFrame(columns=["spearman", "low", "high"])
    require(correlations, ("layer", "covariate", "spearman", "low", "high"), "plot_difficulty_vs_surprisal: correlations")
    rows = split_layers(correlations)[1].set_index("covariate")
    return rows[rows["spearman"].notna()]


def _position_zero(ax: Axes, value: float) -> None:
    """Position 0 as a hollow mark; outside the limits as an arrow at the edge."""
    low, high = ax.get_ylim()
    marker = "^" if value > high else "v" if value < low else "o"
    at = np.clip(value, low + 0.03 * (high - low), high - 0.03 * (high - low))
    ax.plot([0], [at], marker, mfc="white", mec="#444444", markersize=5, clip_on=False)
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5, "color": "#444444"}
    ax.annotate(f"position 0: {percent(value)}", (0, at), **place)


@styled
def plot_difficulty_by_domain(
    means: pd.DataFrame, *, label: str = "cosine", figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Mean share of the MLP that labels ask for: a heatmap of domains by layer, and beside it each domain with its interval.

    Args:
        means: run, theta, domain, layer, mean, low, high, tokens, documents, confidence (from `difficulty_by_domain`).
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column or the rows of layer "all" are missing, or the frame holds several runs.

    Example:
        >>> similarity = pd.DataFrame({"run": "a", "domain": ["web", "web", "code", "code"], "document": range(4), "layer": 0})
        >>> similarity = similarity.assign(position=1, similarity_0=[0.95, 0.95, 0.95, 0.2])
        >>> means = lab.difficulty_by_domain(similarity, 0.9, fractions=(0.5, 1.0))
        >>> print(lab.plot_difficulty_by_domain(means).get_suptitle())
        At θ = 0.9 labels ask for 50.0 % of the MLP on web and 75.0 % of the MLP on code
    """
    require(means, _MEANS, "plot_difficulty_by_domain")
    one_run(means, "plot_difficulty_by_domain")
    single, pooled = split_layers(means)
    require(pooled, _MEANS, f"plot_difficulty_by_domain: rows of layer '{ALL}'")
    pooled = pooled.sort_values("mean").set_index("domain")
    table = single.pivot(index="domain", columns="layer", values="mean").loc[pooled.index]
    figure = canvas(4.4 + 0.62 * len(table), figure)
    ax, dots = figure.subplots(1, 2, width_ratios=[4.6, 1])
    heatmap(ax, table, annotate=table.shape[1] <= 36, text_size=6)
    every = max(1, -(-table.shape[1] // 36))
    ax.set_xticks(np.arange(0, table.shape[1], every) + 0.5, table.columns[::every], fontsize=6.5)
    ax.set_xlabel("layer")
    colors = domain_colors(pooled.index)
    for number, (domain, row) in enumerate(pooled.iterrows()):
        spread = np.clip([[row["mean"] - row["low"]], [row["high"] - row["mean"]]], 0, None)
        dots.errorbar([row["mean"]], [number + 0.5], xerr=spread, fmt="o", color=colors[str(domain)], markersize=4.5, capsize=2.5)
    dots.set(ylim=(len(pooled), 0), yticks=[])
    dots.spines["left"].set_visible(False)
    dots.margins(x=0.12)
    dots.grid(axis="x")
    dots.xaxis.set_major_locator(MaxNLocator(3))
    percent_axis(dots.xaxis)
    dots.set_xlabel(f"all layers (%),\n{percent(pooled['confidence'].iloc[0])} interval")
    mark = label_mark(label)
    share_bar(figure, ax, f"mean share of the MLP that labels{mark} ask for (%)", aspect=45, below=True)
    ends = [f"{percent(row['mean'], 1)} of the MLP on {name}" for name, row in pooled.iloc[[0, -1]].iterrows()]
    layers = table.mean()
    wider = layers.max() - layers.min() > pooled["mean"].iloc[-1] - pooled["mean"].iloc[0]
    across = f"; layers differ more, from {percent(layers.min())} to {percent(layers.max())}" if wider else ""
    headline(figure, f"At θ = {pooled['theta'].iloc[0]:.3g}{mark} labels ask for {' and '.join(dict.fromkeys(ends))}{across}")
    return figure
