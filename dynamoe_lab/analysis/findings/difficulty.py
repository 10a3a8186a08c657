"""Which tokens are hard, where, and on what text."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.wording import domains_text, tokens_text
from dynamoe_lab.analysis.frames import ALL, label_mark, list_names, one_run, percent, require, signed, split_layers
from dynamoe_lab.analysis.metrics.difficulty import COVARIATE_NAMES
from dynamoe_lab.analysis.metrics.labels import FIRST, LATER
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural

__all__ = ["difficulty_domain_finding", "difficulty_finding", "label_share_finding"]


def difficulty_finding(correlations: pd.DataFrame, *, label: str = "cosine") -> str:
    """Does difficulty go with surprisal, rarity or position?

    Args:
        correlations: the frame of `difficulty_correlations`, one run; the rows of layer "all".
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.

    Raises:
        InputError: a column or the rows of layer "all" are missing, or the frame holds several runs.

    Example:
        >>> rows = pd.DataFrame({"covariate": ["surprisal", "log_frequency"], "spearman": [-0.03, -0.38], "low": [-0.11, -0.42]})
        >>> rows = rows.assign(high=[0.09, -0.33], run="a", theta=0.9, layer="all", n=25, tokens=8925, confidence=0.95)
        >>> print(lab.difficulty_finding(rows))
        At θ = 0.9 a token's difficulty, the mean share of the MLP that its labels ask for, falls with its id's frequency in training
        text (-0.38, -0.42 to -0.33) and has no relation beyond its interval to its surprisal (-0.03, -0.11 to +0.09) (Spearman, 95 %
        intervals over documents; n = 25 documents, 8,925 tokens, position 0 left out).
    """
    needed = ("run", "theta", "layer", "covariate", "spearman", "low", "high", "n", "tokens", "confidence")
    require(correlations, needed, "difficulty_finding")
    one_run(correlations, "difficulty_finding")
    rows = split_layers(correlations)[1]
    require(rows, needed, f"difficulty_finding: rows of layer '{ALL}'")
    texts = {"rises": [], "falls": [], "neither": []}
    for row in rows.to_dict("records"):
        spread = f", {signed(row['low'])} to {signed(row['high'])}" if np.isfinite(row["low"]) else ", no interval"
        way = "rises" if row["low"] > 0 else "falls" if row["high"] < 0 else "neither"
        texts[way].append(f"{COVARIATE_NAMES.get(row['covariate'], row['covariate'])} ({signed(row['spearman'])}{spread})")
    parts = [f"{way} with {list_names(names)}" for way, names in texts.items() if names and way != "neither"]
    if texts["neither"]:
        parts.append(f"has no relation beyond its interval to {list_names(texts['neither'])}")
    first = rows.iloc[0]
    at = f"At θ = {first['theta']:g}{label_mark(label)}"
    return (
        f"{at} a token's difficulty, the mean share of the MLP that its labels ask for, {', '.join(parts[:-1])}"
        f"{' and ' if len(parts) > 1 else ''}{parts[-1]} (Spearman, {percent(first['confidence'])} intervals over documents; "
        f"n = {plural(rows['n'].max(), 'document')}, {tokens_text(rows['tokens'].max())}, position 0 left out)."
    )


def label_share_finding(shares: pd.DataFrame, theta: float, *, label: str = "cosine") -> str:
    """How much of the MLP do labels ask for: by layer, over θ, and at the first token of a block?

    Args:
        shares: the frame of `label_shares`, one run and domain.
        theta: the threshold that is told; the nearest one in the frame is taken.
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.

    Raises:
        InputError: a column or the rows of later tokens are missing, or the frame holds several runs or domains.

    Example:
        >>> similarity = pd.DataFrame({"run": "a", "domain": "web", "position": [1, 2, 3, 4], "layer": 0})
        >>> shares = lab.label_shares(similarity.assign(similarity_0=[0.95, 0.8, 0.6, 0.2]), [0.5, 0.9], fractions=(0.5, 1.0))
        >>> print(lab.label_share_finding(shares, theta=0.9))
        At θ = 0.9 labels ask for 87.5 % of the MLP on average; over thresholds the mean goes from 62 % at θ = 0.5 to 88 % at θ = 0.9;
        one label covers 99 % or more of the tokens in 0 of 1 layers (n = 4 tokens in each layer).
    """
    needed = ("run", "theta", "domain", "place", "layer", "label", "fraction", "tokens", "share")
    require(shares, needed, "label_share_finding")
    one_run(shares, "label_share_finding")
    if shares["domain"].nunique() > 1:
        raise InputError("label_share_finding: several domains in the frame; pass the rows of one")
    single, pooled = split_layers(shares)
    later = single[single["place"] == LATER]
    require(later, needed, f"label_share_finding: rows of single layers, place '{LATER}'")
    thetas = np.sort(later["theta"].unique())
    theta = thetas[np.abs(thetas - theta).argmin()]
    at = later[later["theta"] == theta]
    by_layer = (at["share"] * at["fraction"]).groupby(at["layer"]).sum()
    whole = (pooled["share"] * pooled["fraction"]).groupby([pooled["place"], pooled["theta"]]).sum()
    most = at.loc[at.groupby("layer")["share"].idxmax(), "share"]
    alone = int((most >= 0.99).sum())
    sentence = f"At θ = {theta:.3g}{label_mark(label)} labels ask for {percent(whole[LATER, theta], 1)} of the MLP on average"
    if len(by_layer) > 1:
        ends = [f"{percent(by_layer[layer], 1)} in layer {layer}" for layer in (by_layer.idxmin(), by_layer.idxmax())]
        sentence += f", from {ends[0]} to {ends[1]}"
    if len(thetas) > 1:
        ends = [f"{percent(whole[LATER, value])} at θ = {value:.3g}" for value in thetas[[0, -1]]]
        sentence += f"; over thresholds the mean goes from {ends[0]} to {ends[1]}"
    sentence += f"; one label covers 99 % or more of the tokens in {alone} of {len(by_layer)} layers"
    if FIRST in whole.index.get_level_values(0):
        sentence += f"; the first token of a block, counted apart, asks for {percent(whole[FIRST, theta], 1)}"
    return f"{sentence} (n = {tokens_text(at.groupby('layer')['tokens'].sum().max())} in each layer)."


def difficulty_domain_finding(means: pd.DataFrame, *, label: str = "cosine") -> str:
    """On which domains are tokens harder? The two extremes are compared, allowing for all pairs they were picked from.

    Args:
        means: the frame of `difficulty_by_domain`, one run.
        label: the definition of difficulty, the experiment's `dynamoe.label`; named unless it is the paper's.

    Raises:
        InputError: a column or the rows of layer "all" are missing, or the frame holds several runs.

    Example:
        >>> means = pd.DataFrame({"run": "a", "theta": 0.9, "domain": ["web", "code"], "layer": "all", "mean": [0.5, 0.8], "tokens": 512})
        >>> means = means.assign(low=means["mean"] - 0.1, high=means["mean"] + 0.1, documents=25, confidence=0.95)
        >>> print(lab.difficulty_domain_finding(means))
        Mean share of the MLP that labels ask for at θ = 0.9 by domain, with 95 % intervals over n documents: web 50.0 % (40.0 % to
        60.0 %, n = 25) and code 80.0 % (70.0 % to 90.0 %, n = 25); the extremes, web and code, differ (30.0 points).
    """
    needed = ("run", "theta", "domain", "layer", "mean", "low", "high", "tokens", "documents", "confidence")
    require(means, needed, "difficulty_domain_finding")
    one_run(means, "difficulty_domain_finding")
    rows = split_layers(means)[1]
    text = domains_text(rows, "mean", "difficulty_domain_finding")
    at = f"θ = {means['theta'].iloc[0]:g}{label_mark(label)}"
    return f"Mean share of the MLP that labels ask for at {at} by domain, {text}."
