"""Frame in, one plain sentence out: what a notebook found, with its n and interval, and whether it is above chance.

Every number is computed from the frame that is passed; nothing is remembered. A comparison is called "above" or
"below" only when the interval of the *difference* excludes zero, else "not distinguishable from". Report a sentence
with `run.finding(sentence, source=stem)`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from dynamoe_lab.analysis.frames import ALL, compact, list_names, one_run, percent, require, split_layers
from dynamoe_lab.errors import InputError

__all__ = [
    "active_params_finding",
    "conversion_finding",
    "domain_finding",
    "neighbour_finding",
    "perplexity_finding",
    "router_finding",
    "training_finding",
    "usage_finding",
]

FEW = 10  # documents; fewer say nothing about how documents differ
_SAMPLE = ("run", "layer", "tokens", "documents", "confidence")
_CHANCE = ("errors", "majority", "token_id", "neighbour_chance", "neighbour_uniform")
_ACTIVE = (*_SAMPLE, "domain", "active_fraction", "low", "high")


def conversion_finding(change: pd.DataFrame, *, tolerance: float = 0.01) -> str:
    """Does reordering keep the function?

    Args:
        change: the frame of `logit_change` of the converted model at full width against the dense one: one row with max_abs, agreement
            (share of tokens with the same most likely next token) and tokens.
        tolerance: largest max_abs called rounding, in logits. Logits that change by at most d change no log-probability by more
            than 2 d nats; float32 sums in another order give some 1e-4.
    """
    row = _one_row(change, ("max_abs", "agreement", "tokens"), "conversion_finding")
    same = row["max_abs"] <= tolerance
    return (
        f"At full width the converted model {'computes the same function as' if same else 'differs from'} the dense one: over "
        f"{_tokens(row['tokens'])} no logit changes by more than {row['max_abs']:.2g}, and the most likely next token is the same for "
        f"{percent(row['agreement'], 1)} of them."
    )


def training_finding(steps: pd.DataFrame, *, window: int = 10, dense_loss: float | None = None) -> str:
    """Does the loss still fall, and how far did it get?

    The last `window` steps are compared with the `window` before them: the change of the mean LM loss against 1.96 of
    its standard errors, steps taken as independent draws of batches.

    Args:
        steps: run, step, tokens, lm_loss, router_loss, router_accuracy, active_mlp_fraction of one run (`steps`).
        window: steps averaged; at most half of them.
        dense_loss: LM loss of the dense model on the same kind of text.
    """
    needed = ("step", "tokens", "lm_loss", "router_loss", "router_accuracy", "active_mlp_fraction")
    require(steps, ("run", *needed), "training_finding")
    one_run(steps, "training_finding")
    steps = steps.sort_values("step")
    window = max(1, min(window, len(steps) // 2))
    first, before, last = steps.head(window), steps.iloc[-2 * window : -window], steps.tail(window)
    change = last["lm_loss"].mean() - before["lm_loss"].mean()
    noise = 1.96 * np.sqrt((last["lm_loss"].var() + before["lm_loss"].var()) / window)
    if not np.isfinite(noise):
        trend = "too few steps were run to say whether it still falls"
    elif abs(change) > noise:
        trend = f"it was still {'falling' if change < 0 else 'rising'} at the end ({change:+.2f} ± {noise:.2f})"
    else:
        trend = f"its change over the last {2 * window} steps ({change:+.2f}) is within their noise (±{noise:.2f})"
    dense = f" (dense model on held-out text: {dense_loss:.2f})" if dense_loss is not None else ""
    lm, router = ([f"{part[name].mean():.2f}" for part in (first, last)] for name in ("lm_loss", "router_loss"))
    right = [percent(part["router_accuracy"].mean()) for part in (first, last)]
    return (
        f"In {len(steps)} steps ({_tokens(steps['tokens'].iloc[-1])}) the LM loss went from {lm[0]} to {lm[1]} nats per "
        f"token{dense}; {trend}; the router loss went from {router[0]} to {router[1]}, router accuracy from "
        f"{right[0]} to {right[1]}, with {percent(last['active_mlp_fraction'].mean())} of the MLP neurons active "
        f"(means of {window} steps)."
    )


def router_finding(chance: pd.DataFrame) -> str:
    """Is the router better than the layer's commonest label, and than the token's id?

    Args:
        chance: the frame of `router_chance`, one run.
    """
    rows, row = _chance(chance, "router_finding")
    against = _against(row, "minus_majority", "the commonest label of each layer", row["majority"])
    if np.isfinite(row["token_id"]):
        known = _against(row, "minus_token_id", "a router that sees only the token id", row["token_id"])
        against += f" and {known}"
    better = int((rows["minus_majority_low"] > 0).sum())
    worse = int((rows["minus_majority_high"] < 0).sum())
    return (
        f"The router is right for {percent(row['accuracy'], 1)} of tokens ({_interval(row, 'accuracy')}; "
        f"{_sample(rows, row)}), {against}; layer by layer it is above the commonest label in {better} of {len(rows)}, "
        f"below it in {worse} and not distinguishable from it in {len(rows) - better - worse}."
    )


def neighbour_finding(chance: pd.DataFrame) -> str:
    """Do errors fall on neighbouring experts more often than chance would have it (a claim of arXiv 2502.12325)?

    Args:
        chance: the frame of `router_chance`, one run.
    """
    _, row = _chance(chance, "neighbour_finding")
    errors, documents = int(row["errors"]), int(row["documents"])
    if not errors:
        return f"The router made no error in {documents} documents, so nothing can be said about neighbours."
    verdict = _verdict(row["neighbour_minus_chance_low"], row["neighbour_minus_chance_high"])
    return (
        f"{percent(row['neighbour_share'], 1)} of the router's errors miss by exactly one expert "
        f"({_interval(row, 'neighbour_share')}; n = {errors:,} errors in {documents} documents), {verdict} the "
        f"{percent(row['neighbour_chance'], 1)} that would if expert and label were independent (difference "
        f"{_points(row, 'neighbour_minus_chance')}); errors spread evenly over the other experts would give "
        f"{percent(row['neighbour_uniform'], 1)}."
    )


def usage_finding(active: pd.DataFrame, *, usage: pd.DataFrame | None = None) -> str:
    """How much does expert usage differ between layers (a claim of arXiv 2502.12325)?

    Args:
        active: the frame of `active_fraction`, one run and one domain (or "all").
        usage: the frame of `expert_usage` of the same routing; adds in how many layers one expert takes nearly all.
    """
    require(active, _ACTIVE, "usage_finding")
    one_run(active, "usage_finding")
    if active["domain"].nunique() > 1:
        raise InputError("usage_finding: several domains in the frame; pass the rows of one, or use domain_finding")
    layers, pooled = split_layers(active)
    whole = _one_row(pooled, _ACTIVE, f"usage_finding: the row of layer '{ALL}'")
    layers = layers.set_index("layer").sort_values("active_fraction", kind="stable")
    ends = [f"{_mean(layers.iloc[at])} in layer {layers.index[at]}" for at in (0, -1)]
    few = min(3, len(layers) // 2)
    extremes = f"; least in layers {list_names(layers.index[:few])}, most in layers {list_names(layers.index[: -few - 1 : -1])}"
    sentence = (
        f"Averaged over layers a token runs {_mean(whole)} of the MLP neurons, from {ends[0]} to {ends[1]}"
        f"{extremes if few > 1 else ''} ({percent(whole['confidence'])} intervals; {_sample(layers, whole)})"
    )
    if usage is None:
        return f"{sentence}."
    require(usage, ("layer", "expert", "share"), "usage_finding")
    alone = int((usage.groupby("layer", observed=True)["share"].max() >= 0.99).sum())
    return f"{sentence}; one expert takes 99 % or more of the tokens in {alone} of {len(layers)} layers."


def domain_finding(active: pd.DataFrame) -> str:
    """Which domains run more of the MLP?

    The two extreme domains are compared; as they are picked from all pairs, the interval is widened (Bonferroni).

    Args:
        active: the frame of `active_fraction(..., by_domain=True)`, one run.
    """
    require(active, _ACTIVE, "domain_finding")
    one_run(active, "domain_finding")
    rows = split_layers(active)[1].sort_values("active_fraction")
    if len(rows) < 2:
        raise InputError("domain_finding: needs rows of layer 'all' of two or more domains; pass by_domain=True")
    least, most = rows.iloc[0], rows.iloc[-1]
    pairs = len(rows) * (len(rows) - 1) // 2
    tail = (1 - least["confidence"]) / 2
    # two domains are independent samples: the error of their difference is the root of the summed squares
    error = np.hypot(most["active_fraction"] - most["low"], least["high"] - least["active_fraction"])
    error *= stats.norm.ppf(tail / pairs) / stats.norm.ppf(tail)
    difference = most["active_fraction"] - least["active_fraction"]
    verdict = "differ" if difference > error else "are not distinguishable"
    if min(least["documents"], most["documents"]) < FEW:
        verdict = "come from too few documents to tell them apart"
    texts = [f"{row['domain']} {_mean(row)[:-1]}, n = {row['documents']})" for row in rows.to_dict("records")]
    return (
        f"Mean active MLP neurons by domain, with {percent(least['confidence'])} intervals over n documents: "
        f"{list_names(texts, 12)}; the extremes, {least['domain']} and {most['domain']}, {verdict} "
        f"({100 * difference:.1f} points{f', allowing for {pairs} pairs' if pairs > 1 else ''})."
    )


def perplexity_finding(perplexity: pd.DataFrame, *, confidence: float = 0.95) -> str:
    """What does the routing cost in perplexity?

    Args:
        perplexity: frames of `evaluate_perplexity`, one row per run: run, n (documents), tokens, perplexity, reference_perplexity, ratio,
            low, high; the ratio to the dense model is paired by document. Without a reference (ratio nan) low and high are those of
            the perplexity. A column active_mlp_fraction is told, too: a ratio without its compute says little.
        confidence: of the intervals low to high.
    """
    needed = ("run", "n", "tokens", "perplexity", "reference_perplexity", "ratio", "low", "high")
    require(perplexity, needed, "perplexity_finding")
    texts = []
    for row in perplexity.to_dict("records"):
        text = f"{row['run']}: perplexity" if row["run"] else "perplexity"
        if np.isfinite(row.get("active_mlp_fraction", np.nan)):
            text = text.replace("perplexity", f"with {percent(row['active_mlp_fraction'])} of the MLP neurons, perplexity")
        sample = f"n = {int(row['n'])} documents, {_tokens(row['tokens'])}"
        if np.isfinite(row["ratio"]):
            verdict = _verdict(row["low"] - 1, row["high"] - 1)
            text += f" {row['perplexity']:.1f}, {verdict} the dense model's {row['reference_perplexity']:.1f} on the same documents: "
            text += f"ratio {row['ratio']:.3f} ({percent(confidence)} interval {row['low']:.3f} to {row['high']:.3f}; {sample})"
        else:
            text += f" {row['perplexity']:.1f} ({percent(confidence)} interval {row['low']:.1f} to {row['high']:.1f}; {sample})"
        texts.append(text)
    return f"{'; '.join(texts)}."


def active_params_finding(params: pd.DataFrame) -> str:
    """How many parameters does a token use?

    Args:
        params: layer (with a row "all" for the whole model), mlp_active, mlp_total, active_mlp_fraction, router,
            other, active_params, total_params: mean counts per token.
    """
    needed = ("layer", "mlp_total", "active_mlp_fraction", "router", "other", "active_params", "total_params")
    require(params, needed, "active_params_finding")
    row = _one_row(split_layers(params)[1], needed, f"active_params_finding: the row of layer '{ALL}'")
    active, total, dense = row["active_params"], row["total_params"], row["total_params"] - row["router"]
    return (
        f"A token uses {compact(active)} of {compact(total)} parameters ({percent(active / total, 1)}; "
        f"{percent(active / dense, 1)} of the dense model's {compact(dense)}): "
        f"{percent(row['active_mlp_fraction'], 1)} of the MLPs' {compact(row['mlp_total'])}, plus "
        f"{compact(row['router'])} of the routers and {compact(row['other'])} that always run."
    )


def _one_row(frame: pd.DataFrame, columns: Sequence[str], function: str) -> pd.Series:
    require(frame, columns, function)
    if len(frame) != 1:
        raise InputError(f"{function}: one row is needed, the frame has {len(frame)}")
    return frame.iloc[0]


def _chance(chance: pd.DataFrame, function: str) -> tuple[pd.DataFrame, pd.Series]:
    """Rows of the layers, and the pooled row, of a `router_chance` frame."""
    needed = [*_SAMPLE, *_CHANCE]
    for name in ("accuracy", "minus_majority", "minus_token_id", "neighbour_share", "neighbour_minus_chance"):
        needed += [name, f"{name}_low", f"{name}_high"]
    require(chance, needed, function)
    one_run(chance, function)
    rows, pooled = split_layers(chance)
    require(rows, needed, f"{function}: rows of single layers")
    return rows, _one_row(pooled, needed, f"{function}: the row of layer '{ALL}'")


def _tokens(count: float) -> str:
    return f"{int(count):,} tokens"


def _sample(layers: pd.DataFrame, whole: pd.Series) -> str:
    each = _tokens(layers["tokens"].max())
    return f"n = {each} in each of {len(layers)} layers, {int(whole['documents'])} documents"


def _mean(row: pd.Series) -> str:
    """The mean active fraction with its interval."""
    spread = f"{percent(row['low'], 1)} to {percent(row['high'], 1)}" if np.isfinite(row["low"]) else "no interval"
    return f"{percent(row['active_fraction'], 1)} ({spread})"


def _interval(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if not np.isfinite([low, high]).all():
        return "no interval from one document"
    return f"{percent(row['confidence'])} interval {percent(low, 1)} to {percent(high, 1)}"


def _points(row: pd.Series, name: str) -> str:
    """A difference of shares in points, with its interval."""
    value, low, high = (100 * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    spread = f", {low:+.1f} to {high:+.1f}" if np.isfinite([low, high]).all() else ", no interval"
    return f"{value:+.1f} points{spread}"


def _verdict(low: float, high: float) -> str:
    """What the interval of a difference says; without an interval nothing can be told apart."""
    return "above" if low > 0 else "below" if high < 0 else "not distinguishable from"


def _against(row: pd.Series, name: str, baseline: str, level: float) -> str:
    verdict = _verdict(row[f"{name}_low"], row[f"{name}_high"])
    return f"{verdict} {baseline} ({percent(level, 1)}; difference {_points(row, name)})"
