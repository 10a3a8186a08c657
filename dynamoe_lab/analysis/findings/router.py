"""Is the router right, and are its errors neighbours? Always beside chance."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.wording import against_text, interval_text, one_row, points_text, sample_text, verdict
from dynamoe_lab.analysis.frames import ALL, one_run, percent, require, split_layers
from dynamoe_lab.plural import plural

__all__ = ["neighbour_finding", "router_finding"]

_CHANCE = ("run", "layer", "tokens", "documents", "confidence", "errors", "majority", "token_id", "neighbour_chance", "neighbour_uniform")


def router_finding(chance: pd.DataFrame) -> str:
    """Is the router better than the layer's commonest label, and than the token's id?

    Args:
        chance: the frame of `router_chance`, one run.

    Raises:
        InputError: a column or the row "all" is missing, or the frame holds several runs.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": range(6), "layer": 0, "token_id": 7})
        >>> routing = routing.assign(label=[0, 0, 0, 0, 1, 1], expert=[0, 0, 0, 0, 1, 1])  # no error, but six documents
        >>> chance = lab.router_chance(routing, theta=0.9)
        >>> print(lab.router_finding(chance))
        The router is right for 100 % of tokens (95 % interval 100 % to 100 %; n = 6 tokens in 1 layer, 6 documents), not distinguishable
        from the commonest label of each layer (66.7 %; difference +33.3 points, ...) and not distinguishable from a
        router that sees only the token id (66.7 %; difference +33.3 points, ...); layer by layer ... in 1.
    """
    rows, row = _chance(chance, "router_finding")
    against = against_text(row, "minus_majority", "the commonest label of each layer", row["majority"])
    if np.isfinite(row["token_id"]):
        known = against_text(row, "minus_token_id", "a router that sees only the token id", row["token_id"])
        against += f" and {known}"
    better = int((rows["minus_majority_low"] > 0).sum())
    worse = int((rows["minus_majority_high"] < 0).sum())
    return (
        f"The router is right for {percent(row['accuracy'], 1)} of tokens ({interval_text(row, 'accuracy')}; "
        f"{sample_text(rows, row)}), {against}; layer by layer it is above the commonest label in {better} of {len(rows)}, "
        f"below it in {worse} and not distinguishable from it in {len(rows) - better - worse}."
    )


def neighbour_finding(chance: pd.DataFrame) -> str:
    """Do errors fall on neighbouring experts more often than chance would have it (a claim of arXiv 2502.12325)?

    Args:
        chance: the frame of `router_chance`, one run.

    Raises:
        InputError: a column or the row "all" is missing, or the frame holds several runs.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": range(4), "layer": 0, "token_id": 7, "label": [0, 0, 2, 2]})
        >>> chance = lab.router_chance(routing.assign(expert=[0, 1, 1, 0]), theta=0.9)  # three errors, two of them by one expert
        >>> print(lab.neighbour_finding(chance))
        66.7 % of the router's errors miss by exactly one expert (95 % interval ...; n = 3 errors in 4 documents), not distinguishable
        from the 66.7 % that would if expert and label were independent (difference +0.0 points, ...); errors spread evenly over the
        other experts would give 50.0 %.
    """
    _, row = _chance(chance, "neighbour_finding")
    errors, documents = int(row["errors"]), int(row["documents"])
    if not errors:
        return f"The router made no error in {plural(documents, 'document')}, so nothing can be said about neighbours."
    against = verdict(row["neighbour_minus_chance_low"], row["neighbour_minus_chance_high"])
    return (
        f"{percent(row['neighbour_share'], 1)} of the router's errors miss by exactly one expert "
        f"({interval_text(row, 'neighbour_share')}; n = {plural(errors, 'error')} in {plural(documents, 'document')}), {against} the "
        f"{percent(row['neighbour_chance'], 1)} that would if expert and label were independent (difference "
        f"{points_text(row, 'neighbour_minus_chance')}); errors spread evenly over the other experts would give "
        f"{percent(row['neighbour_uniform'], 1)}."
    )


def _chance(chance: pd.DataFrame, function: str) -> tuple[pd.DataFrame, pd.Series]:
    """Rows of the layers, and the pooled row, of a `router_chance` frame."""
    needed = list(_CHANCE)
    for name in ("accuracy", "minus_majority", "minus_token_id", "neighbour_share", "neighbour_minus_chance"):
        needed += [name, f"{name}_low", f"{name}_high"]
    require(chance, needed, function)
    one_run(chance, function)
    rows, pooled = split_layers(chance)
    require(rows, needed, f"{function}: rows of single layers")
    return rows, one_row(pooled, needed, f"{function}: the row of layer '{ALL}'")
