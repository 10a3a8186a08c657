"""Pictures of what router supervision buys: runs with and without it, side by side."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dynamoe_lab.analysis.frames import ALL, compact, expert_names, percent, require, split_layers
from dynamoe_lab.analysis.metrics.collapse import CASE, collapsed_layers, run_name
from dynamoe_lab.analysis.metrics.curves import smooth_steps
from dynamoe_lab.analysis.metrics.usage import usage_summary
from dynamoe_lab.analysis.style import (
    DENSE,
    REFERENCE,
    canvas,
    gradient_line,
    headline,
    heatmap,
    lambda_colors,
    percent_axis,
    share_bar,
    styled,
)

__all__ = ["plot_collapse", "plot_collapse_entropy", "plot_collapse_training"]

_ANNOTATED = 40  # layers up to which numbers fit into the rows


@styled
def plot_collapse(
    collapse: pd.DataFrame, *, fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0), figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Share of each layer's tokens per expert, a heatmap per gradient and λ_router; several seeds are averaged.

    Args:
        collapse: lambda_router, router_gradient, seed, layer, expert, share, tokens (from `stack_runs` of `expert_usage` frames).
        fractions: [E] share of the MLP of each expert.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, or an expert has no fraction.

    Example:
        >>> usage = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "share": [0.5, 0.5, 0.0, 1.0], "tokens": [4, 4, 0, 8]})
        >>> figure = lab.plot_collapse(lab.stack_runs({(0.0, "probability", 0): usage}), fractions=(0.5, 1.0))
        >>> print(figure.get_suptitle())
        The most chosen expert with λ = 0: 100 % of the MLP, by 75 % of tokens
    """
    require(collapse, (*CASE, "layer", "expert", "share", "tokens"), "plot_collapse")
    names = expert_names(fractions, int(collapse["expert"].max()), "plot_collapse")
    cases = _cases(collapse)
    layers = collapse["layer"].nunique()
    figure = canvas(5.4 + 0.3 * min(layers, 60), figure)
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    taken = {}
    for ax, (gradient, weight) in zip(axes, cases, strict=True):
        part = collapse[(collapse["router_gradient"] == gradient) & (collapse["lambda_router"] == weight)]
        table = part.groupby(["layer", "expert"])["share"].mean().unstack(fill_value=0.0).reindex(columns=range(len(names)), fill_value=0.0)
        active = usage_summary(part[[*CASE, "layer", "expert", "share"]], fractions=fractions)
        active = split_layers(active)[1]["active_fraction"]
        stuck = collapsed_layers(part).groupby("seed")["collapsed"].sum()
        heatmap(ax, table, annotate=layers <= _ANNOTATED, text_size=6, least=0.005)
        ax.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=6.5)
        every = max(1, -(-layers // 30))
        ax.set_yticks(np.arange(0, layers, every) + 0.5, table.index[::every], fontsize=6.5)
        lines = [f"λ_router = {weight:g}", gradient.replace("_", "-"), f"{percent(active.mean())} active"]
        if percent(active.min()) != percent(active.max()):
            lines.append(f"(seeds {percent(active.min())} to {percent(active.max())})")
        lines.insert(3, f"{' to '.join(dict.fromkeys((str(stuck.min()), str(stuck.max()))))} of {layers} layers on one")
        shares = table.mean()
        taken[(gradient, weight)] = f"{names[shares.idxmax()]} of the MLP, by {percent(shares.max())} of tokens"
        ax.set_title("\n".join(lines), fontsize=7.5)
    axes[0].set_ylabel("layer")
    figure.supxlabel("expert (share of the MLP); a layer is on one expert if that takes 99 % of its tokens or more", fontsize=8)
    seeds = collapse["seed"].nunique()
    share_bar(figure, list(axes), f"tokens of the layer (%){f', mean of {seeds} seeds' if seeds > 1 else ''}", aspect=45)
    shown = {case: text for case, text in taken.items() if case[1] in (0, max(weight for _, weight in cases))} or taken
    ends = [f"with {run_name(weight, gradient, cases)}: {text}" for (gradient, weight), text in shown.items()]
    headline(figure, f"The most chosen expert {'; '.join(ends)}")
    return figure


@styled
def plot_collapse_entropy(information: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """By layer, how mixed the choice of expert is, and how much of it the token's id tells; a line per run, seeds thin around their mean.

    Args:
        information: lambda_router, router_gradient, seed, layer, entropy, information (bits), tokens, experts (from `stack_runs` of
            `usage_information` frames).
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column or the rows of layer "all" are missing.

    Example:
        >>> entropy = pd.DataFrame({"layer": [0, 1, "all"], "entropy": [1.0, 0.0, 0.5], "information": [0.2, 0.0, 0.1]})
        >>> entropy = lab.stack_runs({(0.0, "probability", 0): entropy.assign(tokens=8, experts=4)})
        >>> figure = lab.plot_collapse_entropy(entropy)
        >>> print(figure.get_suptitle())
        Mean entropy of the layers' choices, of 2 bits: 0.50 with λ = 0
    """
    needed = (*CASE, "layer", "entropy", "information", "tokens", "experts")
    require(information, needed, "plot_collapse_entropy")
    single, pooled = split_layers(information)
    require(pooled, needed, f"plot_collapse_entropy: rows of layer '{ALL}'")
    cases, colors = _cases(information), lambda_colors(information["lambda_router"])
    figure = canvas(7.6, figure)
    axes = figure.subplots(1, 2)
    most = np.log2(information["experts"].max())
    for ax, name in zip(axes, ("entropy", "information"), strict=True):
        for gradient, weight in cases:
            part = single[(single["router_gradient"] == gradient) & (single["lambda_router"] == weight)]
            look = {"color": colors[float(weight)], "linestyle": gradient_line(gradient)}
            if part["seed"].nunique() > 1:
                for _, seed in part.groupby("seed"):
                    ax.plot(seed["layer"], seed[name], linewidth=0.5, alpha=0.45, **look)
            mean = part.groupby("layer")[name].mean()
            ax.plot(mean.index, mean, marker="o", markersize=2, **look)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_xlabel("layer")
        ax.grid(axis="y")
    axes[0].axhline(most, **REFERENCE)
    place = {
        "xytext": (0, 2),
        "textcoords": "offset points",
        "xycoords": ("axes fraction", "data"),
        "fontsize": 6.5,
        "color": REFERENCE["color"],
    }
    axes[0].annotate(f"all experts alike: {most:.3g} bits", (0.01, most), va="bottom", **place)
    axes[0].set(ylabel="entropy of the choice (bits)", ylim=(-0.03 * most, 1.1 * most))
    axes[1].axhline(0, **REFERENCE)
    axes[1].set_ylabel("information with the token's id\n(bits, beyond shuffled experts)")
    _legend(figure, cases, colors)
    means = pooled.groupby(["router_gradient", "lambda_router"])[["entropy", "information"]].mean()
    texts = [f"{means.loc[(gradient, weight), 'entropy']:.2f} with {run_name(weight, gradient, cases)}" for gradient, weight in cases]
    headline(figure, f"Mean entropy of the layers' choices, of {most:.3g} bits: {'; '.join(texts)}")
    return figure


@styled
def plot_collapse_training(
    steps: pd.DataFrame, *, window: int = 10, dense_perplexity: float | None = None, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Active share of the MLP and training perplexity over the tokens seen, a line per run; moving means over `window` steps.

    Args:
        steps: lambda_router, router_gradient, seed, step, tokens, lm_loss, active_mlp_fraction (from `stack_runs` of the frames `steps`).
        window: steps of the moving mean, over the faint raw values.
        dense_perplexity: of the dense model on held-out text, a reference line.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing.

    Example:
        >>> steps = pd.DataFrame({"step": [1, 2], "tokens": [512, 1024], "lm_loss": [5.0, 4.0], "active_mlp_fraction": [0.5, 0.9]})
        >>> figure = lab.plot_collapse_training(lab.stack_runs({(0.0, "probability", 0): steps}), window=1)
        >>> print(figure.get_suptitle())
        Active MLP neurons after 1.02 K training tokens: 90 % with λ = 0
    """
    require(steps, (*CASE, "step", "tokens", "lm_loss", "active_mlp_fraction"), "plot_collapse_training")
    cases, colors = _cases(steps), lambda_colors(steps["lambda_router"])
    figure = canvas(7.6, figure)
    axes = figure.subplots(1, 2)
    named = steps.assign(run=[f"{a}|{b}|{c}" for a, b, c in zip(*(steps[name] for name in CASE), strict=True)])
    ends = {}
    for gradient, weight in cases:
        part = named[(named["router_gradient"] == gradient) & (named["lambda_router"] == weight)]
        smooth = smooth_steps(part, window)
        look = {"color": colors[float(weight)], "linestyle": gradient_line(gradient)}
        for run, mean in smooth.groupby("run", sort=False):
            raw = part[part["run"] == run].sort_values("step")
            for ax, name, scale in ((axes[0], "active_mlp_fraction", np.asarray), (axes[1], "lm_loss", np.exp)):
                ax.plot(raw["tokens"], scale(raw[name]), color=look["color"], linewidth=0.5, alpha=0.16)
                ax.plot(mean["tokens"], scale(mean[name]), **look)
        ends[(gradient, weight)] = smooth.groupby("run").tail(1)["active_mlp_fraction"].mean()
    _dense_line(axes[0], 1.0, "dense model 100 %", below=False)
    percent_axis(axes[0].yaxis)
    axes[0].set_ylabel("active MLP neurons (%)")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_ylabel("training perplexity (per token)")
    if dense_perplexity is not None:
        _dense_line(axes[1], dense_perplexity, f"dense model, held-out {dense_perplexity:.1f}", below=True)
    for ax in axes:
        ax.set_xlabel("training tokens")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        ax.grid(axis="y")
    _legend(figure, cases, colors)
    texts = [f"{percent(ends[(gradient, weight)])} with {run_name(weight, gradient, cases)}" for gradient, weight in cases]
    headline(figure, f"Active MLP neurons after {compact(steps['tokens'].max())} training tokens: {'; '.join(texts)}")
    return figure


def _cases(frame: pd.DataFrame) -> list[tuple[str, float]]:
    """(router_gradient, lambda_router) of the frame; gradients in their order, λ rising."""
    pairs = frame[["router_gradient", "lambda_router"]].drop_duplicates()
    gradients = list(dict.fromkeys(pairs["router_gradient"]))
    return sorted(pairs.itertuples(index=False, name=None), key=lambda pair: (gradients.index(pair[0]), pair[1]))


def _legend(figure: Figure | SubFigure, cases: list[tuple[str, float]], colors: dict[float, str]) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=colors[float(weight)],
            linestyle=gradient_line(gradient),
            label=f"λ_router = {weight:g}, {gradient.replace('_', '-')}",
        )
        for gradient, weight in cases
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(cases) == 3 else 2, handlelength=2.4)


def _dense_line(ax: Axes, level: float, name: str, *, below: bool) -> None:
    """The dense model's level, named above or below the line, with room for the name."""
    ax.axhline(level, **DENSE)
    place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, -2 if below else 2), "textcoords": "offset points", "fontsize": 6.5}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
    ax.annotate(name, (1, level), ha="right", va="top" if below else "bottom", color=DENSE["color"], bbox=box, zorder=5, **place)
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        room = (high / low) ** 0.08
        ax.set_ylim(min(low, level / room), max(high, level * room))
    else:
        ax.set_ylim(min(low, level - 0.08 * (high - low)), max(high, level + 0.08 * (high - low)))
