"""Pictures of what structural pruning found: its training, who takes the tokens and how wide they are, what is shared and what is lost."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dynamoe_lab.analysis.frames import ALL, compact, one_run, percent, require, split_layers, whole_numbers
from dynamoe_lab.analysis.metrics.curves import smooth_steps
from dynamoe_lab.analysis.style import DENSE, HEATMAP, REFERENCE, canvas, headline, heatmap, percent_axis, share_bar, styled
from dynamoe_lab.plural import plural

__all__ = ["plot_mask_stability", "plot_tomoe_training", "plot_tomoe_union", "plot_tomoe_usage"]

_RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STEPS = ("run", "step", "tokens", "kl_loss", "balance_loss", "active_ratio_max", "active_ratio_mean", "union_coverage", "heldout_kl")
_LOST = "#D55E00"  # neurons in no expert
_PAIRS, _VALUES = "#0072B2", "#E69F00"
_ANNOTATED = 36  # layers up to which two digits fit into a cell at page width
_SHORT = 2_048_000  # training tokens: a tenth of what the paper's shortest runs saw


@styled
def plot_tomoe_training(
    steps: pd.DataFrame, *, p: float, experts: int, window: int = 5, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """KL from the dense model, active ratio, union coverage and balance over the tokens seen; a colour per run.

    Args:
        steps: run, step, tokens, kl_loss (nats per token, unscaled), balance_loss, active_ratio_max, active_ratio_mean, union_coverage,
            heldout_kl (nan where it was not measured): the frame `steps` of ToMoE, one or several runs; with open_ratio and open_union,
            what is active and covered without noise, where that was measured.
        p: target of the active ratio.
        experts: number of experts E: 1 / E is the balance of experts that are used alike.
        window: steps of the moving mean of KL and balance, drawn over the faint raw values; the others are told step by step.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing.

    Example:
        >>> steps = pd.DataFrame({"run": "a", "step": [1, 2], "tokens": [512, 1024], "kl_loss": [0.1, 0.3], "heldout_kl": [0.2, 0.3]})
        >>> steps = steps.assign(active_ratio_mean=[0.9, 0.8], active_ratio_max=[1.0, 0.9], union_coverage=1.0, balance_loss=0.125)
        >>> print(lab.plot_tomoe_training(steps, p=0.7, experts=8).get_suptitle())
        Short training: after 1.02 K tokens the mean active ratio under training
        noise is 80 % (target 70 %) at a held-out KL of 0.3 nats per token
    """
    require(steps, _STEPS, "plot_tomoe_training")
    figure = canvas(11.6, figure)
    axes = figure.subplots(2, 2, sharex=True)
    smooth = smooth_steps(steps, window)
    runs = list(dict.fromkeys(steps["run"]))
    noisy, clean = "training batches, with noise", "held-out, without noise"
    for number, run in enumerate(runs):
        color = _RUNS[number % len(_RUNS)]
        raw, mean = (frame[frame["run"] == run].sort_values("step") for frame in (steps, smooth))
        for ax, name in ((axes[0, 0], "kl_loss"), (axes[1, 1], "balance_loss")):  # what changes from batch to batch
            ax.plot(raw["tokens"], raw[name], color=color, alpha=0.25, linewidth=0.7, rasterized=len(raw) > 2000)
        first = number == 0
        axes[0, 0].plot(mean["tokens"], mean["kl_loss"], color=color, label=noisy if first else None)
        largest = {"linestyle": (0, (4, 1.5)), "label": "widest expert and token, with noise" if first else None}
        axes[0, 1].plot(raw["tokens"], raw["active_ratio_max"], color=color, **largest)
        axes[0, 1].plot(raw["tokens"], raw["active_ratio_mean"], color=color, label="mean over tokens, with noise" if first else None)
        axes[1, 0].plot(raw["tokens"], raw["union_coverage"], color=color, label=noisy if first else None)
        for ax, name in ((axes[0, 0], "heldout_kl"), (axes[0, 1], "open_ratio"), (axes[1, 0], "open_union")):
            if name in raw and raw[name].notna().any():
                held = raw.dropna(subset=[name])
                look = {"color": color, "markersize": 3.2, "markerfacecolor": "white", "label": clean if first else None}
                ax.plot(held["tokens"], held[name], "o--", **look)
        axes[1, 1].plot(mean["tokens"], mean["balance_loss"], color=color, label=str(run))
    labels = ("KL to dense (nats/token)", "active ratio of weights (%)", "union (% of neurons)", "balance Σ f·P of experts")
    for ax, label in zip(axes.flat, labels, strict=True):
        ax.set_ylabel(label)
        ax.grid(axis="y")
    _levels(axes[0, 0], [(0, "dense model 0", DENSE)])
    _levels(axes[0, 1], [(1, "dense model 100 %", DENSE), (p, f"target p {percent(p)}", REFERENCE)], left=p)
    _levels(axes[1, 0], [(1, "no neuron lost", REFERENCE)], least=0.01)
    _levels(
        axes[1, 1], [(1 / experts, f"used alike 1/{experts}", REFERENCE), (1, "one expert takes all tokens", REFERENCE)], below=1 / experts
    )
    for ax in (axes[0, 1], axes[1, 0]):
        percent_axis(ax.yaxis)
    for ax in axes.flat:  # above the axes, where no curve is
        title = f"with noise; faint: each step, line: mean of the last {window}" if window > 1 and ax is axes[1, 1] else None
        names = {"ncols": min(len(runs), 3), "title": title, "title_fontsize": 6.5, "alignment": "left"} if ax is axes[1, 1] else {}
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2}
        ax.legend(**place, handlelength=2.2, fontsize=6.5, **names)
    for ax in axes[1]:
        ax.set_xlabel("training tokens")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    headline(figure, _training_message(steps, smooth, p))
    return figure


@styled
def plot_tomoe_usage(usage: pd.DataFrame, widths: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Two heatmaps, layer by expert: the share of the layer's tokens that each expert takes, and the share of its neurons that it holds.

    Experts are numbered anew in every layer: a row is no expert across layers.

    Args:
        usage: layer, expert, share, tokens of one run and one domain (from `expert_usage`).
        widths: layer, expert, fraction (of the layer's MLP; the frame of `lab.expert_fractions`).
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, or the frame holds several runs.

    Example:
        >>> usage = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "share": [0.5, 0.5, 0.0, 1.0], "tokens": [4, 4, 0, 8]})
        >>> widths = usage[["layer", "expert"]].assign(fraction=0.7)
        >>> print(lab.plot_tomoe_usage(usage, widths).get_suptitle())
        The most used expert takes 50 % to 100 % of a layer's tokens (used alike:
        50.0 %); 1 of 2 layers are on one expert; a token runs 70 % of a layer's neurons
    """
    require(usage, ("layer", "expert", "share", "tokens"), "plot_tomoe_usage")
    require(widths, ("layer", "expert", "fraction"), "plot_tomoe_usage: widths")
    one_run(usage, "plot_tomoe_usage")
    tables = []
    for frame, column in ((split_layers(usage)[0], "share"), (widths, "fraction")):
        numbers = {name: whole_numbers(frame[name], "plot_tomoe_usage") for name in ("layer", "expert")}
        tables.append(frame.assign(**numbers).pivot(index="expert", columns="layer", values=column))
    share, width = tables
    width = width.reindex(index=share.index, columns=share.columns)
    figure = canvas(5.2 + 0.62 * len(share), figure)
    above, below = figure.subplots(2, 1, sharex=True)
    annotate = share.shape[1] <= _ANNOTATED
    for ax, table, vmax, size in ((above, share, max(2 / len(share), float(share.to_numpy().max())), 6.0), (below, width, 1.0, 5.6)):
        heatmap(ax, table, annotate=annotate, text_size=size, vmax=vmax)
        every = max(1, -(-table.shape[1] // 36))
        ax.set_xticks(np.arange(0, table.shape[1], every) + 0.5, table.columns[::every], fontsize=6.5)
        ax.set_ylabel("expert of the layer")
    above.tick_params(labelbottom=False)
    below.set_xlabel("layer")
    share_bar(figure, above, "tokens of\nthe layer (%)", aspect=12)
    share_bar(figure, below, "neurons of\nthe layer (%)", aspect=12)
    most = share.max()
    mean = (share * width).sum()  # by layer: the width that a token runs
    alone = int((most >= 0.99).sum())
    headline(
        figure,
        f"The most used expert takes {percent(most.min())} to {percent(most.max())} of a layer's tokens (used alike: "
        f"{percent(1 / len(share), 1)}); {alone} of {len(most)} layers are on one expert; a token runs {_span(mean, percent)} of a "
        "layer's neurons",
    )
    return figure


@styled
def plot_tomoe_union(
    union: pd.DataFrame, attention: pd.DataFrame | None = None, *, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """In how many experts the neurons of each layer are, beside experts drawn at random; under it what attention keeps.

    Args:
        union: run, layer (also "all"), count, share, chance, neurons (from `mask_union`), one run.
        attention: layer, pairs_kept, values_open, values_low, values_high (from `attention_open`); None: not drawn.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column or the rows of layer "all" are missing, or the frame holds several runs.

    Example:
        >>> masks = pd.DataFrame({"run": "a", "layer": 0, "expert": [0, 0, 1, 1], "neuron": [0, 1, 0, 1], "neurons": 4})
        >>> print(lab.plot_tomoe_union(lab.mask_union(masks, experts=2)).get_suptitle())  # both hold the neurons 0 and 1
        50.0 % of the neurons are in some expert (least: 50.0 %, layer 0); 50.0 % are
        in all 2, where experts of these widths drawn at random would share 25.0 %
    """
    require(union, ("run", "layer", "count", "share", "chance", "neurons"), "plot_tomoe_union")
    one_run(union, "plot_tomoe_union")
    single, pooled = split_layers(union)
    require(pooled, (), f"plot_tomoe_union: rows of layer '{ALL}'")
    table = single.pivot(index="layer", columns="count", values="share")
    experts, layers = int(table.columns.max()), np.arange(len(table))
    colors = {count: HEATMAP(0.12 + 0.8 * (count - 1) / max(experts - 1, 1)) for count in range(1, experts + 1)} | {0: _LOST}
    figure = canvas(11.5 if attention is not None else 7.4, figure)
    rows = figure.subplots(
        2 if attention is not None else 1, 2, width_ratios=[3.2, 1], height_ratios=[1.7, 1][: 1 + (attention is not None)], squeeze=False
    )
    bars, whole = rows[0]
    bottom = np.zeros(len(table))
    for count in range(experts, -1, -1):
        bars.bar(layers, table[count], bottom=bottom, width=0.86, color=colors[count], linewidth=0, label=str(count))
        bottom += table[count].to_numpy()
    every = max(1, -(-len(table) // 16))
    bars.set(xlim=(-0.6, len(table) - 0.4), ylim=(0, 1), ylabel="neurons of the layer (%)")
    pooled = pooled.set_index("count")
    counts = np.arange(experts + 1)
    whole.barh(counts, pooled["share"].reindex(counts), color=[colors[count] for count in counts], height=0.8)
    whole.plot(
        pooled["chance"].reindex(counts),
        counts,
        "D",
        color="#222222",
        markersize=3,
        markerfacecolor="white",
        label="drawn at random",
    )
    whole.set(xlabel=f"all {int(pooled['neurons'].iloc[0]):,} neurons (%)", ylabel="in so many experts", ylim=(-0.6, experts + 0.6))
    whole.set_yticks(counts[:: max(1, -(-len(counts) // 17))])
    whole.legend(loc="lower right", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, handlelength=1, handletextpad=0.4)
    whole.tick_params(axis="y", length=0)
    percent_axis(bars.yaxis)
    whole.xaxis.set_major_locator(MaxNLocator(4))
    percent_axis(whole.xaxis)
    last = bars
    if attention is not None:
        last = rows[1, 0]
        _attention(last, rows[1, 1], attention, layers)
    for ax in {bars, last}:
        ax.set_xticks(layers[::every], table.index[::every])
    last.set_xlabel("layer")
    headline(figure, _union_message(table, pooled, experts))
    return figure


@styled
def plot_mask_stability(jaccard: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """How alike the masks of different seeds are, layer by layer, beside masks of the same widths that know nothing of each other.

    Args:
        jaccard: run_a, run_b, part, layer (also "all"), jaccard, chance, chance_low, chance_high, draws (from `mask_jaccard`; several
            pairs of runs and both parts one below the other). Several pairs: the mean, and a faint line each.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column or the rows of layer "all" are missing.

    Example:
        >>> first = pd.DataFrame({"run": "a", "layer": 0, "expert": 0, "neuron": range(8), "neurons": 16})
        >>> second = first.assign(run="b", neuron=range(4, 12))  # 4 neurons of 12 are in both
        >>> print(lab.plot_mask_stability(lab.mask_jaccard(first, second)).get_suptitle())
        Mean Jaccard index between seeds: 0.33 for experts' neurons (chance ...); 1 pair of runs
    """
    needed = ("run_a", "run_b", "part", "layer", "jaccard", "chance", "chance_low", "chance_high", "draws")
    require(jaccard, needed, "plot_mask_stability")
    single, pooled = split_layers(jaccard)
    require(pooled, (), f"plot_mask_stability: rows of layer '{ALL}'")
    names = {"mlp": "experts' neurons", "attention": "kept pairs of Q and K"}
    parts = [part for part in names if part in set(single["part"])]
    figure = canvas(7.4, figure)
    texts = []
    for ax, part in zip(figure.subplots(1, len(parts), squeeze=False, sharey=True)[0], parts, strict=True):
        rows, color = single[single["part"] == part], {"mlp": "#009E73", "attention": _PAIRS}[part]
        mean = rows.groupby("layer")[["jaccard", "chance", "chance_low", "chance_high"]].mean()
        ax.fill_between(mean.index, mean["chance_low"], mean["chance_high"], color=REFERENCE["color"], alpha=0.25, linewidth=0)
        ax.plot(mean.index, mean["chance"], label=f"chance ({int(jaccard['draws'].iloc[0])} draws)", **REFERENCE)
        pairs = list(rows.groupby(["run_a", "run_b"], sort=False))
        for _, pair in pairs if len(pairs) > 1 else ():
            ax.plot(pair["layer"], pair["jaccard"], color=color, linewidth=0.5, alpha=0.45)
        ax.plot(mean.index, mean["jaccard"], color=color, marker="o", markersize=2.2, label="between seeds")
        ax.set(xlabel="layer", title=names[part])
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.grid(axis="y")
        ax.legend(loc="best")
        ends = pooled[pooled["part"] == part][["jaccard", "chance"]].mean()
        texts.append(f"{ends['jaccard']:.2f} for {names[part]} (chance {ends['chance']:.2f})")
    figure.axes[0].set_ylabel("Jaccard index of masks")
    pairs = len(pooled[["run_a", "run_b"]].drop_duplicates())
    headline(figure, f"Mean Jaccard index between seeds: {' and '.join(texts)}; {plural(pairs, 'pair')} of runs")
    return figure


def _training_message(steps: pd.DataFrame, smooth: pd.DataFrame, p: float) -> str:
    """Where training ended: KL on held-out text if it was measured, else the moving mean of training batches."""
    ends, means = (frame.sort_values("step").groupby("run", sort=False, observed=True).tail(1) for frame in (steps, smooth))
    held = steps.dropna(subset=["heldout_kl"]).sort_values("step").groupby("run", sort=False, observed=True)["heldout_kl"].last()
    divergence = f"a held-out KL of {_span(held, '{:.3g}'.format)}" if len(held) else f"a KL of {_span(means['kl_loss'], '{:.3g}'.format)}"
    tokens = steps["tokens"].max()
    ratio, noise = ends["active_ratio_mean"], "under training noise"
    if "open_ratio" in steps and steps["open_ratio"].notna().any():
        measured = steps.dropna(subset=["open_ratio"]).sort_values("step")
        ratio, noise = measured.groupby("run", sort=False, observed=True)["open_ratio"].last(), "without noise"
    return (
        f"{'Short training: after' if tokens < _SHORT else 'After'} {compact(tokens)} tokens the mean active ratio {noise} is "
        f"{_span(ratio, percent)} (target {percent(p)}) at {divergence} nats per token"
    )


def _union_message(table: pd.DataFrame, pooled: pd.DataFrame, experts: int) -> str:
    """What experts share and lose; `table` [layer, count] of shares, `pooled` by count."""
    if pooled.loc[experts, "share"] == 1:
        return f"None of the {int(pooled['neurons'].iloc[0]):,} neurons is closed in any of the {experts} experts"
    least = 1 - table[0]
    return (
        f"{percent(1 - pooled.loc[0, 'share'], 1)} of the neurons are in some expert (least: {percent(least.min(), 1)}, layer "
        f"{least.idxmin()}); {percent(pooled.loc[experts, 'share'], 1)} are in all {experts}, where experts of these widths drawn at "
        f"random would share {percent(pooled.loc[experts, 'chance'], 1)}"
    )


def _attention(ax: Axes, beside: Axes, attention: pd.DataFrame, layers: np.ndarray) -> None:
    """What attention keeps, by layer; the key in the place `beside`."""
    require(attention, ("layer", "pairs_kept", "values_open", "values_low", "values_high"), "plot_tomoe_union: attention")
    single, _ = split_layers(attention)
    ax.axhline(1, clip_on=False, **DENSE)
    kept = single["pairs_kept"].to_numpy(dtype=float)
    lines = []
    if np.isfinite(kept).any():
        lines += ax.plot(layers, kept, color=_PAIRS, marker="o", markersize=2.4, label="pairs of Q and K kept\n(one choice a layer)")
    values = single[["values_open", "values_low", "values_high"]].to_numpy(dtype=float).T
    ax.fill_between(layers, values[1], values[2], color=_VALUES, alpha=0.25, linewidth=0)
    lines += ax.plot(layers, values[0], color=_VALUES, marker="s", markersize=2.2, label="dims of V and O open for\na token (10 to 90 %)")
    ax.set(xlim=(-0.6, len(layers) - 0.4), ylabel="of the head's\ndims (%)")
    ax.set_ylim(top=1)
    low = ax.get_ylim()[0]
    ax.set_ylim(bottom=max(0.0, low))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    percent_axis(ax.yaxis)
    ax.grid(axis="y")
    beside.axis("off")
    beside.legend(handles=lines, loc="center left", bbox_to_anchor=(-0.25, 0.45), handlelength=1.6)
    ax.annotate("dense model", (1, 1), xycoords="axes fraction", xytext=(0, 2), textcoords="offset points", ha="right", fontsize=6.5)


def _levels(
    ax: Axes, levels: list[tuple[float, str, dict]], *, least: float = 0.0, below: float | None = None, left: float | None = None
) -> None:
    """Reference lines (value, name, look), named above them on the right; the axis spans `least` or more.

    The name of value `below` stands under its line, that of value `left` on the left, where curves that end there have not come yet.
    """
    for value, name, look in levels:
        ax.axhline(value, **look)
        under = value == below
        place = {
            "xycoords": ("axes fraction", "data"),
            "xytext": (2 if value == left else -2, -2 if under else 2),
            "textcoords": "offset points",
        }
        at, side = (0, "left") if value == left else (1, "right")
        note = ax.annotate(name, (at, value), ha=side, va="top" if under else "bottom", fontsize=6.5, color=look["color"], **place)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])  # curves may cross it
    low, high = ax.dataLim.intervaly
    low = min(low, high - least)
    ax.set_ylim(low - (0.06 if below is None else 0.11) * (high - low), high + 0.11 * (high - low))


def _span(values: pd.Series, text) -> str:
    """One number if the runs agree, else the least and the most."""
    return " to ".join(dict.fromkeys((text(values.min()), text(values.max()))))
