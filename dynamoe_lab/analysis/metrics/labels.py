"""Difficulty labels at any threshold, read off similarities that were measured once (arXiv 2502.12325: the smallest expert within θ)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import ALL, one_run, require, whole_numbers
from dynamoe_lab.analysis.metrics.tally import layer_names, with_all
from dynamoe_lab.errors import InputError

__all__ = ["FIRST", "LATER", "label_shares", "labels_at"]

FIRST, LATER = "first token", "later tokens"  # position 0 of a block is an attention sink in many models, unlike any other token


def labels_at(similarity: pd.DataFrame, theta: float) -> np.ndarray:
    """The label of every row at one threshold: the smallest expert whose similarity is at least `theta`, else the last.

    The difficulty label of arXiv 2502.12325.

    Args:
        similarity: the frame `similarity`: similarity_0 to similarity_{E-2}.
        theta: -1 to 1; compared in the precision of the similarities, as the model does.

    Returns:
        [rows] int8, 0 to E-1.

    Raises:
        InputError: no column similarity_0, one in between is missing, or theta is not from -1 to 1.

    Example:
        >>> similarity = pd.DataFrame({"similarity_0": [0.95, 0.80, 0.50], "similarity_1": [0.99, 0.92, 0.60]})
        >>> lab.labels_at(similarity, theta=0.9)
        array([0, 1, 2], dtype=int8)
        >>> lab.labels_at(similarity, theta=0.6)
        array([0, 0, 1], dtype=int8)
    """
    values = _similarities(similarity, "labels_at")
    enough = values >= _thetas([theta], "labels_at").astype(values.dtype)  # what is nan is not enough
    return np.where(enough.any(axis=1), enough.argmax(axis=1), values.shape[1]).astype(np.int8)


def label_shares(similarity: pd.DataFrame, thetas: Sequence[float], *, fractions: Sequence[float], by_domain: bool = False) -> pd.DataFrame:
    """How often each label occurs at every threshold, per layer and for all layers ("all"), the first token of a block apart.

    Args:
        similarity: the frame `similarity` of one run: run, domain, position, layer, similarity_0 to similarity_{E-2}.
        thetas: thresholds; each is counted from the same pass over the rows.
        fractions: [E] share of the MLP that each expert runs.
        by_domain: a set of rows per domain; else all domains together, domain "all".

    Returns:
        run, theta, domain, place ("first token", "later tokens"), layer, label, fraction (share of the MLP of that label's expert), tokens,
        share (of the tokens of that place and layer): labels that do not occur included with 0. In layer "all" a token counts once in each
        layer.

    Raises:
        InputError: a column is missing, the frame holds several runs, `fractions` are not E, or a theta is not from -1 to 1.

    Example:
        >>> similarity = pd.DataFrame({"run": "a", "domain": "web", "position": [1, 2, 3, 4], "layer": 0})
        >>> shares = lab.label_shares(similarity.assign(similarity_0=[0.95, 0.8, 0.6, 0.2]), [0.5, 0.9], fractions=(0.5, 1.0))
        >>> shares.loc[shares["layer"] == "all", ["theta", "label", "tokens", "share"]]
           theta  label  tokens  share
        2    0.5      0       3   0.75
        3    0.5      1       1   0.25
        6    0.9      0       1   0.25
        7    0.9      1       3   0.75
    """
    require(similarity, ("run", "domain", "position", "layer"), "label_shares")
    one_run(similarity, "label_shares")
    thetas = _thetas(thetas, "label_shares")
    values = _similarities(similarity, "label_shares", fractions)
    # label <= e at θ exactly if the best of similarity_0..e is at least θ, so a row is counted once: how many θ does that best reach?
    best = np.maximum.accumulate(np.nan_to_num(values, nan=-np.inf), axis=1)
    reached = np.searchsorted(thetas.astype(values.dtype), best, side="right")  # (rows, E-1), 0 to thetas
    domain, domains = pd.factorize(similarity["domain"], sort=True) if by_domain else (np.zeros(len(similarity), int), [ALL])
    later = (whole_numbers(similarity["position"], "label_shares") > 0).astype(np.int64)
    layer, layers = pd.factorize(whole_numbers(similarity["layer"], "label_shares"), sort=True)
    shape = (len(domains), 2, len(layers))
    group, groups = np.ravel_multi_index((domain, later, layer), shape), int(np.prod(shape))
    width = len(thetas) + 1
    at_most = np.empty((groups, len(thetas), len(fractions)))  # rows whose label is at most e
    for expert, counts in enumerate(reached.T):
        cells = np.bincount(group * width + counts, minlength=groups * width).reshape(groups, width)
        at_most[..., expert] = cells[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    at_most[..., -1] = np.bincount(group, minlength=groups)[:, None]
    tokens = with_all(np.diff(at_most, prepend=0).reshape(*shape, len(thetas), len(fractions)), 2)
    tokens = np.moveaxis(tokens, 3, 0)  # (thetas, domains, places, layers + 1, E)
    names = ["theta", "domain", "place", "layer", "label"]
    index = pd.MultiIndex.from_product([thetas, domains, [FIRST, LATER], layer_names(layers), range(len(fractions))], names=names)
    frame = pd.DataFrame({"tokens": tokens.ravel().astype(np.int64)}, index=index).reset_index()
    frame.insert(0, "run", str(similarity["run"].iloc[0]))
    frame.insert(6, "fraction", np.asarray(fractions, dtype=np.float64)[frame["label"]])
    total = np.repeat(tokens.sum(axis=-1).ravel(), len(fractions))
    frame["share"] = frame["tokens"] / total.clip(1)
    return frame[total > 0].reset_index(drop=True)  # a sample may lack first tokens


def _similarities(similarity: pd.DataFrame, function: str, fractions: Sequence[float] | None = None) -> np.ndarray:
    """Columns similarity_0, similarity_1, ... [rows, E-1]; E must be that of `fractions`."""
    require(similarity, ("similarity_0",), function)
    count = sum(str(column).startswith("similarity_") for column in similarity.columns)
    columns = [f"similarity_{expert}" for expert in range(count)]
    require(similarity, columns, function)
    if fractions is not None and len(fractions) != count + 1:
        raise InputError(f"{function}: {len(fractions)} fractions, but similarities of {count} experts besides the last; give {count + 1}")
    return similarity[columns].to_numpy()


def _thetas(thetas: Sequence[float], function: str) -> np.ndarray:
    values = np.unique(np.asarray(thetas, dtype=np.float64))
    if not len(values) or not (np.abs(values) <= 1).all():
        raise InputError(f"{function}: theta is a similarity, give numbers from -1 to 1, e.g. 0.9")
    return values
