"""Perplexity from losses per document, and its ratio to another model's on the same documents.

Two perplexities measured on the same text differ far less from each other than each does from document to document, so the ratio is formed
document by document and its interval comes from resampling documents, not tokens. The losses come from `document_losses`, or, for a
routed model, from the trace of its routing, so that one forward pass gives both.
"""

import math

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.fractions import Fractions, row_fractions
from dynamoe_lab.analysis.frames import one_run, require, whole_numbers
from dynamoe_lab.analysis.statistics import ratio_of_sums
from dynamoe_lab.errors import InputError

__all__ = ["perplexity_ratio", "routed_losses"]


def routed_losses(routing: pd.DataFrame, *, fractions: Fractions) -> pd.DataFrame:
    """What each document lost and what it cost, from the trace of one run.

    Args:
        routing: the frame `routing`, one run: domain, document, layer, expert, surprisal (nats; NaN where a token was not predicted:
            position 0 of a block), and label where the method has labels.
        fractions: share of the MLP that each expert runs: [E], [L, E], or the frame of `lab.expert_fractions`.

    Returns:
        run, document, domain, nll (nats, summed over predicted tokens), tokens (predicted), positions (tokens run), active_mlp_fraction
        (mean over the document's tokens and layers), and where the method has labels correct (share of token and layer cells whose
        expert was the label).

    Raises:
        InputError: a column is missing, the frame holds several runs, or `fractions` says nothing about a layer or expert of it.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": [0, 0, 1, 1], "expert": [0, 1, 1, 1]})
        >>> losses = lab.routed_losses(routing.assign(surprisal=[np.nan, 2.0, np.nan, 2.0]), fractions=(0.5, 1.0))  # two tokens, two layers
        >>> losses[["document", "nll", "tokens", "positions", "active_mlp_fraction"]]
           document  nll  tokens  positions  active_mlp_fraction
        0         0  2.0       1          2                0.875
    """
    require(routing, ("run", "domain", "document", "layer", "expert", "surprisal"), "routed_losses")
    one_run(routing, "routed_losses")
    keys = ["document", "domain"]
    cells = routing[keys].assign(active_mlp_fraction=row_fractions(fractions, routing["layer"], routing["expert"], "routed_losses"))
    if "label" in routing:
        label, expert = (whole_numbers(routing[name], "routed_losses") for name in ("label", "expert"))
        cells["correct"] = expert == label
    cost = cells.groupby(keys, observed=True)[list(cells.columns[len(keys) :])].mean()
    tokens = routing[routing["layer"] == routing["layer"].iloc[0]]  # a token's surprisal is repeated in every layer's row
    predicted = tokens["surprisal"].notna()
    parts = tokens[keys].assign(nll=tokens["surprisal"].fillna(0.0).astype(np.float64), tokens=predicted.astype(np.int64), positions=1)
    losses = parts.groupby(keys, observed=True)[["nll", "tokens", "positions"]].sum().join(cost).reset_index()
    losses["domain"] = losses["domain"].astype(str)
    losses.insert(0, "run", str(routing["run"].iloc[0]))
    return losses


def perplexity_ratio(
    losses: pd.DataFrame,
    reference: pd.DataFrame | None = None,
    *,
    bootstrap: int = 2_000,
    confidence: float = 0.95,
    seed: int = 0,
    run: str | None = None,
) -> pd.DataFrame:
    """Perplexity of a model and, with a reference, its ratio paired by document.

    Args:
        losses: document, nll (nats), tokens: of `document_losses` or `routed_losses`.
        reference: the same of another model (usually the dense parent) on the same documents.
        bootstrap, confidence, seed: resamples of documents and level of the interval.
        run: name of the row; None: the run in `losses`, if it has one.

    Returns:
        One row: run, n (documents resampled for the interval), tokens, perplexity, reference_perplexity, ratio, low, high; with
        active_mlp_fraction (mean over tokens) if `losses` has it. Without a reference low and high are those of the perplexity itself
        (ratio NaN).

    Raises:
        InputError: no token was predicted, or the reference was measured on other documents.

    Example:
        >>> dense = pd.DataFrame({"document": [0, 1, 2], "nll": [20.0, 30.0, 50.0], "tokens": [10, 10, 20]})
        >>> losses = dense.assign(nll=dense["nll"] + 0.1 * dense["tokens"])  # 0.1 nats more for every token
        >>> lab.perplexity_ratio(losses, dense)[["n", "ratio", "low", "high"]].round(3)
           n  ratio    low   high
        0  3  1.105  1.105  1.105
    """
    require(losses, ("document", "nll", "tokens"), "perplexity_ratio")
    every, losses = losses, losses[losses["tokens"] > 0]  # of some documents only a block's first token was read
    require(losses, (), "perplexity_ratio: documents with predicted tokens")
    tokens = int(losses["tokens"].sum())
    if run is None:
        run = str(losses["run"].iloc[0]) if "run" in losses else ""
    row = {"run": run, "n": len(losses), "tokens": tokens, "perplexity": math.exp(losses["nll"].sum() / tokens)}
    settings = {"resamples": bootstrap, "confidence": confidence, "seed": seed}
    if reference is None:
        interval = ratio_of_sums(losses["nll"], losses["tokens"], **settings)
        row |= {"reference_perplexity": math.nan, "ratio": math.nan}
    else:
        require(reference, ("document", "nll", "tokens"), "perplexity_ratio: the reference")
        base = reference.loc[reference["tokens"] > 0, ["document", "nll", "tokens"]]
        paired = losses[["document", "nll", "tokens"]].merge(base, on="document", suffixes=("", "_reference"))
        if len(paired) != len(losses) or len(base) != len(losses) or not (paired["tokens"] == paired["tokens_reference"]).all():
            raise InputError("perplexity_ratio: the reference was measured on other documents; measure it on the same blocks")
        interval = ratio_of_sums(paired["nll"] - paired["nll_reference"], paired["tokens"], **settings)
        row |= {"reference_perplexity": math.exp(base["nll"].sum() / tokens), "ratio": math.exp(interval.value)}
    row |= {"low": math.exp(interval.low), "high": math.exp(interval.high)}
    if "active_mlp_fraction" in every and "positions" in every:
        row["active_mlp_fraction"] = float(np.average(every["active_mlp_fraction"], weights=every["positions"]))
    return pd.DataFrame([row])
