"""What structural pruning (ToMoE, arXiv 2501.15316) found: how far training came, what is shared, who specialises, what repeats."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.wording import FEW, one_row, tokens_text
from dynamoe_lab.analysis.frames import ALL, compact, list_names, one_run, percent, require, split_layers
from dynamoe_lab.analysis.metrics.specialisation import FACTORS, above_control
from dynamoe_lab.plural import plural

__all__ = ["mask_stability_finding", "pruned_params_finding", "specialisation_finding", "tomoe_training_finding", "union_finding"]

_PAPER_TOKENS = 20_480_000  # 10,000 steps of 2,048 tokens
_NAMED = {"domain": "domain of the text", "token class": "class of the token"}
_SAME = {"mlp": "experts' neurons", "attention": "kept pairs of queries and keys"}


def tomoe_training_finding(steps: pd.DataFrame, *, p: float, experts: int) -> str:
    """How far did training come: active ratio against its target, divergence from the dense model, coverage, balance?

    Divergence rises while the model closes and falls once it has; the last two measurements on held-out text say which. What is active
    and covered is told without noise where that was measured; the noise of training closes and opens what the model does not.

    Args:
        steps: run, step, tokens, active_ratio_mean, active_ratio_max, union_coverage, balance_loss, heldout_kl of one run (the frame
            `steps` of ToMoE), and open_ratio and open_union where they were measured.
        p: target of the active ratio.
        experts: number of experts E.

    Raises:
        InputError: a column is missing, or the frame holds several runs.

    Example:
        >>> steps = pd.DataFrame({"run": "a", "step": [1, 2], "tokens": [512, 1024], "active_ratio_mean": [0.9, 0.8]})
        >>> steps = steps.assign(active_ratio_max=[1.0, 0.9], union_coverage=1.0, balance_loss=0.125, heldout_kl=[0.2, 0.3])
        >>> print(lab.tomoe_training_finding(steps, p=0.7, experts=8))
        A short training: after 2 steps (1,024 tokens) 80.0 % of the weights of attention and MLPs are active on average under
        training noise (by the widest expert and token 90.0 %; target 70 %), and under that noise 100 % of the neurons are in some
        expert; without noise the KL from the dense model on held-out text is 0.300 nats per token, rising (before: 0.200); balance is
        0.125 (used alike: 0.125, one expert alone: 1; mean of 1 step); the paper's runs saw 20,000 times as many tokens.
    """
    needed = ("step", "tokens", "active_ratio_mean", "active_ratio_max", "union_coverage", "balance_loss", "heldout_kl")
    require(steps, needed, "tomoe_training_finding")
    one_run(steps, "tomoe_training_finding")
    steps = steps.sort_values("step")
    last, held = steps.iloc[-1], steps.dropna(subset=["heldout_kl"])["heldout_kl"]
    if held.empty:
        divergence = "the divergence from the dense model was not measured on held-out text"
    else:
        trend = ""
        if len(held) > 1:
            change = round(held.iloc[-1], 3) - round(held.iloc[-2], 3)
            trend = f", {'rising' if change > 0 else 'falling'} (before: {held.iloc[-2]:.3f})" if change else ", unchanged"
        divergence = f"without noise the KL from the dense model on held-out text is {held.iloc[-1]:.3f} nats per token{trend}"
    noise = f"by the widest expert and token {percent(last['active_ratio_max'], 1)}"
    if "open_ratio" in steps and steps["open_ratio"].notna().any():
        ratio, union = (steps[name].dropna().iloc[-1] for name in ("open_ratio", "open_union"))
        told = (
            f"{percent(ratio, 1)} of the weights of attention and MLPs are active on average on held-out text, without noise (under "
            f"training noise {percent(last['active_ratio_mean'], 1)}, {noise}; target {percent(p)}), and {percent(union, 1)} of the "
            f"neurons are in some expert (under training noise {percent(last['union_coverage'], 1)})"
        )
    else:
        told = (
            f"{percent(last['active_ratio_mean'], 1)} of the weights of attention and MLPs are active on average under training noise "
            f"({noise}; target {percent(p)}), and under that noise {percent(last['union_coverage'], 1)} of the neurons are in some expert"
        )
    scale = (
        f"; the paper's runs saw {_PAPER_TOKENS / last['tokens']:,.0f} times as many tokens" if last["tokens"] < 0.1 * _PAPER_TOKENS else ""
    )
    short = "A short training: after" if scale else "After"
    window = steps["balance_loss"].tail(max(1, min(10, len(steps) // 2)))
    return (
        f"{short} {plural(len(steps), 'step')} ({tokens_text(last['tokens'])}) {told}; {divergence}; balance is {window.mean():.3f} "
        f"(used alike: {1 / experts:.3f}, one expert alone: 1; mean of {plural(len(window), 'step')}){scale}."
    )


def union_finding(union: pd.DataFrame, attention: pd.DataFrame | None = None) -> str:
    """Do the experts differ, and what do all of them leave out?

    Args:
        union: layer (also "all"), count, share, chance, neurons (from `mask_union`), one run.
        attention: layer (also "all"), pairs_kept, values_open, tokens (from `attention_open`).

    Raises:
        InputError: a column or the rows of layer "all" are missing, or the frame holds several runs.

    Example:
        >>> masks = pd.DataFrame({"run": "a", "layer": 0, "expert": [0, 0, 1, 1], "neuron": [0, 1, 0, 1], "neurons": 4})
        >>> print(lab.union_finding(lab.mask_union(masks, experts=2)))  # both experts hold the neurons 0 and 1
        Of 4 neurons in 1 layer 50.00 % are in at least one of 2 experts (least in layer 0: 50.00 %; experts of the same widths drawn at
        random: 75.00 %), and 50.0 % in all of them, against 25.0 % at random: more than at random in 1 of 1 layers.
    """
    require(union, ("layer", "count", "share", "chance", "neurons"), "union_finding")
    one_run(union, "union_finding")
    single, pooled = split_layers(union)
    require(pooled, (), f"union_finding: rows of layer '{ALL}'")
    pooled = pooled.set_index("count")
    experts, neurons = int(pooled.index.max()), int(pooled["neurons"].iloc[0])
    lost = single[single["count"] == 0].set_index("layer")["share"]
    apart = single[single["count"] == experts].set_index("layer")
    left = "" if attention is None else f"; {_attention_text(attention)}"
    if pooled.loc[experts, "share"] == 1:
        return f"None of {neurons:,} neurons in {plural(len(lost), 'layer')} is closed in any of {experts} experts{left}."
    more = int((apart["share"] > apart["chance"]).sum())
    whole = pooled.loc[experts]
    return (
        f"Of {neurons:,} neurons in {plural(len(lost), 'layer')} {percent(1 - pooled.loc[0, 'share'], 2)} are in at least one of "
        f"{experts} experts (least in layer {lost.idxmax()}: {percent(1 - lost.max(), 2)}; experts of the same widths drawn at random: "
        f"{percent(1 - pooled.loc[0, 'chance'], 2)}), and {percent(whole['share'], 1)} in all of them, against "
        f"{percent(whole['chance'], 1)} at random: more than at random in {more} of {len(lost)} layers{left}."
    )


def pruned_params_finding(params: pd.DataFrame, *, dense_params: int) -> str:
    """How many parameters does a token use, and how many are left at all?

    Args:
        params: layer (with a row "all"), mlp_total, active_mlp_fraction, router, active_params, total_params, masked_params (the frame of
            `lab.count_active_params` of a deployed ToMoE model): mean counts per token.
        dense_params: of the dense model.

    Raises:
        InputError: a column or the row "all" is missing.

    Example:
        >>> counts = {"layer": "all", "mlp_total": 60e6, "active_mlp_fraction": 0.5, "router": 1e6, "active_params": 80e6}
        >>> params = pd.DataFrame([counts | {"total_params": 110e6, "masked_params": 2e6}])
        >>> print(lab.pruned_params_finding(params, dense_params=134e6))
        A token uses 80 M parameters, 59.7 % of the dense model's 134 M: 50.0 % of the MLPs' 60 M, 1 M that choose experts and masks,
        and what is left of the rest; the deployed model holds 110 M (82.1 %); its masks leave out 2 M more in values and outputs of
        attention, which are computed all the same.
    """
    needed = ("layer", "mlp_total", "active_mlp_fraction", "router", "active_params", "total_params", "masked_params")
    require(params, needed, "pruned_params_finding")
    row = one_row(split_layers(params)[1], needed, f"pruned_params_finding: the row of layer '{ALL}'")
    active, total, masked = row["active_params"], row["total_params"], row["masked_params"]
    idle = (
        f"; its masks leave out {compact(masked)} more in values and outputs of attention, which are computed all the same"
        if masked > 0
        else ""
    )
    return (
        f"A token uses {compact(active)} parameters, {percent(active / dense_params, 1)} of the dense model's {compact(dense_params)}: "
        f"{percent(row['active_mlp_fraction'], 1)} of the MLPs' {compact(row['mlp_total'])}, {compact(row['router'])} that choose experts "
        f"and masks, and what is left of the rest; the deployed model holds {compact(total)} ({percent(total / dense_params, 1)}){idle}."
    )


def specialisation_finding(specialisation: pd.DataFrame, *, before: pd.DataFrame | None = None) -> str:
    """Does the choice of expert go with domain and with token class, beyond what clusters alone give?

    All layers together are one test: the mean association over layers against the same mean under shuffled labels. Of single layers it is
    told how many are above the control's band, and how many would be by chance alone.

    Args:
        specialisation: factor, layer (also "all"), association, low, high, control, control_low, control_high, p, tokens, levels, clusters,
            documents, permutations, confidence (from `specialisation`), one run.
        before: the same of the model before training, on the same text: routers that have learnt nothing divide tokens, too.

    Raises:
        InputError: a column or a factor's row "all" is missing, or the frame holds several runs.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "document": np.repeat(range(10), 10), "position": 1, "layer": 0, "token_id": 1})
        >>> routing = routing.assign(domain=np.where(routing["document"] < 5, "code", "web"), expert=(routing["document"] < 5).astype(int))
        >>> classes = pd.DataFrame({"token_id": [1], "token_class": "word"})  # the domain decides; one class cannot
        >>> print(lab.specialisation_finding(lab.specialisation(routing, classes, experts=2)))
        The association of the choice of expert: with the domain of the text (2 of them) it goes beyond shuffled labels (p ...): mean
        Cramér's V over layers 1.00 (...), ... (...) when labels are shuffled among 10 documents; 1 of 1 layers are above their band,
        where chance alone would put about 0.0 (95 % intervals over documents and bands over 400 shuffles; n = 100 tokens, 10
        documents, position 0 left out).
    """
    needed = ("factor", "layer", "association", "low", "high", "control", "control_low", "control_high", "p", "tokens", "levels")
    require(specialisation, (*needed, "clusters", "documents", "permutations", "confidence"), "specialisation_finding")
    one_run(specialisation, "specialisation_finding")
    single, pooled = split_layers(specialisation)
    texts = []
    for factor in (factor for factor in FACTORS if factor in set(single["factor"])):
        layers = single[single["factor"] == factor]
        row = one_row(pooled[pooled["factor"] == factor], needed, f"specialisation_finding: {factor}, the row of layer '{ALL}'")
        above = above_control(single, factor)
        tail = (1 - row["confidence"]) / 2
        spread = f" ({row['low']:.2f} to {row['high']:.2f})" if np.isfinite(row["low"]) else " (no interval)"
        band = f"{row['control']:.2f} ({row['control_low']:.2f} to {row['control_high']:.2f})"
        if row["clusters"] < FEW:
            told = f"cannot be told apart from shuffled labels with so few {FACTORS[factor]}s"
        elif row["p"] <= tail:
            told = f"goes beyond shuffled labels (p {_p_text(row['p'])})"
        else:
            told = f"is not distinguishable from shuffled labels (p {_p_text(row['p'])})"
        texts.append(
            f"with the {_NAMED[factor]} ({int(row['levels'])} of them) it {told}: mean Cramér's V over layers {row['association']:.2f}"
            f"{spread}, {band} when labels are shuffled among {int(row['clusters']):,} {FACTORS[factor]}s; "
            f"{above} of {len(layers)} layers are above their band, where chance alone would put about "
            f"{tail * len(layers):.1f}{_before_text(before, factor)}"
        )
    row = pooled.iloc[0]
    return (
        f"The association of the choice of expert: {'; '.join(texts)} ({percent(row['confidence'])} intervals over documents and bands "
        f"over {int(row['permutations'])} shuffles; "
        f"n = {tokens_text(row['tokens'])}, {plural(row['documents'], 'document')}, position 0 left out)."
    )


def mask_stability_finding(jaccard: pd.DataFrame) -> str:
    """Do different seeds find the same masks?

    Args:
        jaccard: run_a, run_b, part, layer (also "all"), jaccard, chance, chance_low, chance_high, draws (from `mask_jaccard`; several pairs
            of runs and both parts one below the other).

    Raises:
        InputError: a column or the rows of layer "all" are missing.

    Example:
        >>> first = pd.DataFrame({"run": "a", "layer": 0, "expert": 0, "neuron": range(8), "neurons": 16})
        >>> second = first.assign(run="b", neuron=range(4, 12))  # 4 neurons of 12 are in both
        >>> print(lab.mask_stability_finding(lab.mask_jaccard(first, second)))
        Between 2 runs (a and b) the mean Jaccard index over layers is of experts' neurons 0.333, not distinguishable from chance
        (...; band ...; single layers: 0 of 1 above their band); chance: masks of the same widths that know nothing of each other, 100
        draws.
    """
    needed = ("run_a", "run_b", "part", "layer", "jaccard", "chance", "chance_low", "chance_high", "draws")
    require(jaccard, needed, "mask_stability_finding")
    single, pooled = split_layers(jaccard)
    require(pooled, (), f"mask_stability_finding: rows of layer '{ALL}'")
    texts = []
    for part in (part for part in _SAME if part in set(pooled["part"])):
        rows, layers = pooled[pooled["part"] == part], single[single["part"] == part]
        above, below = (rows["jaccard"] > rows["chance_high"]).sum(), (rows["jaccard"] < rows["chance_low"]).sum()
        pairs = len(rows)
        told = (
            f"above chance in {'every pair' if pairs > 1 else 'the one pair'} of runs"
            if above == pairs
            else f"above chance in {above} of {pairs} pairs of runs, below it in {below}"
            if above or below
            else "not distinguishable from chance"
        )
        span = " to ".join(dict.fromkeys(f"{value:.3f}" for value in (rows["jaccard"].min(), rows["jaccard"].max())))
        texts.append(
            f"of {_SAME[part]} {span}, {told} "
            f"({rows['chance'].mean():.3f}; band {rows['chance_low'].mean():.3f} to {rows['chance_high'].mean():.3f}; single layers: "
            f"{int((layers['jaccard'] > layers['chance_high']).sum())} of {len(layers)} above their band)"
        )
    runs = sorted({*pooled["run_a"], *pooled["run_b"]})
    return (
        f"Between {len(runs)} runs ({list_names(runs)}) the mean Jaccard index over layers is {' and '.join(texts)}; chance: masks of the "
        f"same widths that know nothing of each other, {int(pooled['draws'].iloc[0])} draws."
    )


def _attention_text(attention: pd.DataFrame) -> str:
    """What attention keeps, as the end of a sentence."""
    row = one_row(split_layers(attention)[1], ("pairs_kept", "values_open", "tokens"), f"union_finding: attention of layer '{ALL}'")
    kept = f"{percent(row['pairs_kept'], 1)} of the pairs of queries and keys, and " if np.isfinite(row["pairs_kept"]) else ""
    return f"attention keeps {kept}{percent(row['values_open'], 1)} of the dims of values and outputs for a token, on average"


def _before_text(before: pd.DataFrame | None, factor: str) -> str:
    """The same association before training, as the end of a clause."""
    if before is None:
        return ""
    row = one_row(
        split_layers(before[before["factor"] == factor])[1], ("association", "low", "high"), f"specialisation_finding: before, {factor}"
    )
    spread = f" ({row['low']:.2f} to {row['high']:.2f})" if np.isfinite(row["low"]) else ""
    return f" (before training: mean {row['association']:.2f}{spread}, above in {above_control(before, factor)})"


def _p_text(p: float) -> str:
    """'0.03'; what is as small as the shuffles allow is still told with its own size."""
    return f"{p:.2f}" if p >= 0.1 else f"{p:.1g}"
