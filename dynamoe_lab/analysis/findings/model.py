"""What conversion and training did to the model: function, loss, perplexity, parameters."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.wording import one_row, small_text, tokens_text, verdict
from dynamoe_lab.analysis.frames import ALL, compact, label_note, one_run, percent, require, split_layers
from dynamoe_lab.plural import plural

__all__ = ["active_params_finding", "conversion_finding", "perplexity_finding", "training_finding"]


def conversion_finding(change: pd.DataFrame, *, tolerance: float = 0.01) -> str:
    """Does reordering keep the function?

    Args:
        change: the frame of `logit_change` of the converted model at full width against the dense one: one row with max_abs, agreement
            (share of tokens with the same most likely next token) and tokens.
        tolerance: largest max_abs called rounding, in logits. Logits that change by at most d change no log-probability by more
            than 2 d nats; float32 sums in another order give some 1e-4.

    Raises:
        InputError: a column is missing, or the frame has not one row.

    Example:
        >>> print(lab.conversion_finding(pd.DataFrame([{"max_abs": 1e-4, "agreement": 1.0, "tokens": 8192}])))
        At full width the converted model computes the same function as the dense one: over 8,192 tokens no logit changes by more than
        0.0001, and the most likely next token is the same for 100 % of them.
    """
    row = one_row(change, ("max_abs", "agreement", "tokens"), "conversion_finding")
    same = row["max_abs"] <= tolerance
    moved = small_text(row["max_abs"])
    return (
        f"At full width the converted model {'computes the same function as' if same else 'differs from'} the dense one: over "
        f"{tokens_text(row['tokens'])} no logit changes by more than {moved}, and the most likely next token is the same for "
        f"{percent(row['agreement'], 1)} of them."
    )


def training_finding(steps: pd.DataFrame, *, window: int = 10, dense_loss: float | None = None, label: str = "cosine") -> str:
    """Does the loss still fall, and how far did it get?

    The last `window` steps are compared with the `window` before them: the change of the mean LM loss against 1.96 of
    its standard errors, steps taken as independent draws of batches.

    Args:
        steps: run, step, tokens, lm_loss, router_loss, router_accuracy, active_mlp_fraction of one run (`steps`).
        window: steps averaged; at most half of them.
        dense_loss: LM loss of the dense model on the same kind of text.
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.

    Raises:
        InputError: a column is missing, or the frame holds several runs.

    Example:
        >>> steps = pd.DataFrame({"run": "a", "step": [1, 2, 3, 4], "tokens": [512, 1024, 1536, 2048], "lm_loss": [5.0, 5.0, 4.0, 4.0]})
        >>> steps = steps.assign(router_loss=[1.4, 1.4, 0.7, 0.7], router_accuracy=[0.3, 0.3, 0.7, 0.7], active_mlp_fraction=0.6)
        >>> print(lab.training_finding(steps, dense_loss=3.7))
        In 4 steps (2,048 tokens) the LM loss went from 5.00 to 4.00 nats per token (dense model on held-out text: 3.70); it was still
        falling at the end (-1.00 ± 0.00); the router loss went from 1.40 to 0.70, router accuracy from 30 % to 70 %, with 60 % of the
        MLP neurons active (means of 2 steps).
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
        f"In {plural(len(steps), 'step')} ({tokens_text(steps['tokens'].iloc[-1])}) the LM loss went from {lm[0]} to {lm[1]} nats per "
        f"token{dense}; {trend}; the router loss went from {router[0]} to {router[1]}, router accuracy from "
        f"{right[0]} to {right[1]}, with {percent(last['active_mlp_fraction'].mean())} of the MLP neurons active "
        f"(means of {plural(window, 'step')}{label_note(label)})."
    )


def perplexity_finding(perplexity: pd.DataFrame, *, confidence: float = 0.95, label: str = "cosine") -> str:
    """What does the routing cost in perplexity?

    Args:
        perplexity: frames of `evaluate_perplexity`, one row per run: run, n (documents), tokens, perplexity, reference_perplexity, ratio,
            low, high; the ratio to the dense model is paired by document. Without a reference (ratio nan) low and high are those of
            the perplexity. A column active_mlp_fraction is told, too: a ratio without its compute says little.
        confidence: of the intervals low to high.
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.

    Raises:
        InputError: a column is missing.

    Example:
        >>> row = {"run": "router", "n": 25, "tokens": 8160, "perplexity": 60.0, "reference_perplexity": 40.0, "ratio": 1.5}
        >>> print(lab.perplexity_finding(pd.DataFrame([row | {"low": 1.34, "high": 1.64, "active_mlp_fraction": 0.67}])))
        router: with 67 % of the MLP neurons, perplexity 60.0, above the dense model's 40.0 on the same documents: ratio 1.500 (95 %
        interval 1.340 to 1.640; n = 25 documents, 8,160 tokens).
    """
    needed = ("run", "n", "tokens", "perplexity", "reference_perplexity", "ratio", "low", "high")
    require(perplexity, needed, "perplexity_finding")
    texts = []
    for row in perplexity.to_dict("records"):
        text = f"{row['run']}: perplexity" if row["run"] else "perplexity"
        if np.isfinite(row.get("active_mlp_fraction", np.nan)):
            text = text.replace("perplexity", f"with {percent(row['active_mlp_fraction'])} of the MLP neurons, perplexity")
        sample = f"n = {plural(row['n'], 'document')}, {tokens_text(row['tokens'])}"
        if np.isfinite(row["ratio"]):
            against = verdict(row["low"] - 1, row["high"] - 1)
            text += f" {row['perplexity']:.1f}, {against} the dense model's {row['reference_perplexity']:.1f} on the same documents: "
            text += f"ratio {row['ratio']:.3f} ({percent(confidence)} interval {row['low']:.3f} to {row['high']:.3f}; {sample})"
        else:
            text += f" {row['perplexity']:.1f} ({percent(confidence)} interval {row['low']:.1f} to {row['high']:.1f}; {sample})"
        texts.append(text)
    return f"{'; '.join(texts)}{label_note(label)}."


def active_params_finding(params: pd.DataFrame, *, label: str = "cosine") -> str:
    """How many parameters does a token use?

    Args:
        params: layer (with a row "all" for the whole model), mlp_active, mlp_total, active_mlp_fraction, router,
            other, active_params, total_params: mean counts per token.
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.

    Raises:
        InputError: a column or the row "all" is missing.

    Example:
        >>> counts = {"mlp_total": 80e6, "active_mlp_fraction": 0.5, "router": 5e6, "other": 55e6}
        >>> print(lab.active_params_finding(pd.DataFrame([counts | {"layer": "all", "active_params": 100e6, "total_params": 140e6}])))
        A token uses 100 M of 140 M parameters (71.4 %; 74.1 % of the dense model's 135 M): 50.0 % of the MLPs' 80 M, plus 5 M of the
        routers and 55 M that always run.
    """
    needed = ("layer", "mlp_total", "active_mlp_fraction", "router", "other", "active_params", "total_params")
    require(params, needed, "active_params_finding")
    row = one_row(split_layers(params)[1], needed, f"active_params_finding: the row of layer '{ALL}'")
    active, total, dense = row["active_params"], row["total_params"], row["total_params"] - row["router"]
    return (
        f"A token uses {compact(active)} of {compact(total)} parameters ({percent(active / total, 1)}; "
        f"{percent(active / dense, 1)} of the dense model's {compact(dense)}): "
        f"{percent(row['active_mlp_fraction'], 1)} of the MLPs' {compact(row['mlp_total'])}, plus "
        f"{compact(row['router'])} of the routers and {compact(row['other'])} that always run{label_note(label)}."
    )
