"""Where the router errs, against what chance would have done (a claim of arXiv 2502.12325)."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import ALL, require
from dynamoe_lab.analysis.metrics.tally import Tally, layer_names, tallies, with_all
from dynamoe_lab.analysis.statistics import bootstrap_sums

__all__ = ["error_distance", "pool_layers", "router_chance", "router_confusion"]

_SAMPLED = (  # columns of `router_chance` that get an interval; the other chances are reference values
    "accuracy",
    "token_id",
    "minus_majority",
    "minus_token_id",
    "neighbour_share",
    "neighbour_minus_chance",
    "distance",
)


def router_confusion(routing: pd.DataFrame, *, theta: float, experts: int | None = None) -> pd.DataFrame:
    """How often each label (the smallest sufficient expert, arXiv 2502.12325) went to each expert, per layer.

    Args:
        routing: the frame `routing`: run, domain, document, layer, label, expert; a row per token and layer.
        theta: threshold of the labels in it; copied into the result.
        experts: number of experts E; None: the highest label or expert in the frame.

    Returns:
        run, theta, layer, label, expert, tokens, share: one row per layer and pair, pairs that never occur
        included. `share` is of the layer's tokens with that label, so it sums to 1 over experts; nan where a
        layer has no such label.

    Raises:
        InputError: a column is missing, or an expert or label is not below `experts`.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": 0, "label": [0, 0, 1, 1], "expert": [0, 1, 1, 1]})
        >>> lab.router_confusion(routing, theta=0.9)[["label", "expert", "tokens", "share"]]
           label  expert  tokens  share
        0      0       0       1    0.5
        1      0       1       1    0.5
        2      1       0       0    0.0
        3      1       1       2    1.0
    """
    parts = []
    for tally in tallies(routing, experts, "router_confusion"):
        joint = tally.joint.sum(axis=0)  # (L, label, expert)
        labelled = joint.sum(axis=-1, keepdims=True)
        share = np.divide(joint, labelled, out=np.full(joint.shape, np.nan), where=labelled > 0)
        axes = [tally.layers, range(joint.shape[1]), range(joint.shape[2])]
        index = pd.MultiIndex.from_product(axes, names=["layer", "label", "expert"])
        frame = pd.DataFrame({"tokens": joint.ravel(), "share": share.ravel()}, index=index).reset_index()
        parts.append(frame.assign(run=tally.run, theta=theta))
    columns = ["run", "theta", "layer", "label", "expert", "tokens", "share"]
    return pd.concat(parts, ignore_index=True)[columns]


def pool_layers(confusion: pd.DataFrame) -> pd.DataFrame:
    """The confusion of all layers together, where a token counts once in each layer.

    Args:
        confusion: the frame of `router_confusion`: run, theta, layer, label, expert, tokens.

    Returns:
        The columns of `router_confusion`, with layer "all".

    Raises:
        InputError: a column is missing.

    Example:
        >>> confusion = pd.DataFrame({"run": "a", "theta": 0.9, "layer": [0, 0, 1, 1], "label": 0, "expert": [0, 1, 0, 1]})
        >>> lab.pool_layers(confusion.assign(tokens=[3, 1, 1, 3]))[["layer", "label", "expert", "tokens", "share"]]
          layer  label  expert  tokens  share
        0   all      0       0       4    0.5
        1   all      0       1       4    0.5
    """
    require(confusion, ("run", "theta", "layer", "label", "expert", "tokens"), "pool_layers")
    keys = ["run", "theta", "label", "expert"]
    how = {"sort": False, "observed": True, "dropna": False}
    pooled = confusion.groupby(keys, **how)["tokens"].sum().reset_index()
    labelled = pooled.groupby(keys[:-1], **how)["tokens"].transform("sum")
    pooled["share"] = pooled["tokens"] / labelled.where(labelled > 0)
    pooled.insert(2, "layer", ALL)
    return pooled


def router_chance(
    routing: pd.DataFrame,
    *,
    theta: float,
    experts: int | None = None,
    folds: int = 5,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> pd.DataFrame:
    """A router's accuracy and neighbouring errors beside what chance gives, per layer and for all layers.

    Args:
        routing: the frame `routing`: run, domain, document, token_id, layer, label, expert; a row per token and layer.
        theta: threshold of the labels in it; copied into the result.
        experts: number of experts; None: the highest label or expert in the frame.
        folds: groups of documents for `token_id`.
        confidence, resamples, seed: of the document bootstrap; the seed also deals the documents into folds.

    Returns:
        One row per layer and one with layer "all" (`tokens` then counts a token once in each layer; chance is
        taken within each layer):

        - run, theta, layer, tokens, documents, errors, confidence
        - accuracy: share of tokens whose expert is the label
        - majority: accuracy of always answering the layer's commonest label in this very sample, the best
          constant there is
        - marginals: expected accuracy if expert and label were independent, each as frequent as it is
        - token_id: accuracy of the commonest label of the token's id in the layer, counted on the documents
          of the other folds; ties and unseen ids go to the layer's commonest label. It knows no more than
          this sample, in which many ids are rare. nan with one document
        - minus_majority, minus_token_id: accuracy minus those, paired by token (resamples keep the majority
          label and the token-id answers)
        - neighbour_share: share of the errors that miss by exactly one expert; neighbour_chance: the same if
          expert and label were independent; neighbour_uniform: the same if each error fell evenly on the
          other experts; neighbour_minus_chance: share minus chance
        - distance: mean |expert - label| over all tokens, in experts; distance_chance: if independent
        - <name>_low, <name>_high for accuracy, token_id, the differences, neighbour_share and distance

    Raises:
        InputError: a column is missing, or an expert or label is not below `experts`.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": 0, "label": [0, 0, 0, 1], "expert": [0, 0, 1, 1]})
        >>> chance = lab.router_chance(routing.assign(token_id=7), theta=0.9)
        >>> chance.loc[chance["layer"] == "all", ["accuracy", "majority", "marginals"]]  # 3/4 are right; 3/4 * 2/4 + 1/4 * 2/4 by chance
           accuracy  majority  marginals
        1      0.75      0.75        0.5
    """
    settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
    parts = []
    for tally in tallies(routing, experts, "router_chance", also=("token_id",)):
        documents, layers, count, _ = tally.joint.shape
        hits = _token_id_hits(tally, count, min(folds, documents), seed)  # (documents, L)
        majority = tally.joint.sum(axis=(0, 3)).argmax(axis=-1)  # (L,) label
        sums = np.concatenate([tally.joint.reshape(documents, layers, -1), hits[..., None]], axis=-1)

        def scores(totals: np.ndarray, majority: np.ndarray = majority) -> np.ndarray:
            return np.stack(list(_scores(totals, majority).values()), axis=-1)  # (..., L + 1, scores)

        interval = bootstrap_sums(sums, scores, **settings)
        joint = with_all(tally.joint.sum(axis=0), 0)  # (L + 1, E, E)
        tokens = joint.sum(axis=(1, 2))
        frame = pd.DataFrame({"run": tally.run, "theta": theta, "layer": layer_names(tally.layers)})
        frame = frame.assign(tokens=tokens, documents=documents)
        frame["errors"] = tokens - np.trace(joint, axis1=1, axis2=2)
        for column, name in enumerate(_scores(sums.sum(axis=0), majority)):
            frame[name] = interval.value[:, column]
            if name in _SAMPLED:
                frame[f"{name}_low"] = interval.low[:, column]
                frame[f"{name}_high"] = interval.high[:, column]
        parts.append(frame.assign(confidence=confidence))
    return pd.concat(parts, ignore_index=True)


def _scores(totals: np.ndarray, majority: np.ndarray) -> dict[str, np.ndarray]:
    """Ratios of `router_chance`, each [..., L + 1] with the pooled layer last.

    totals: [..., L, E*E + 1] confusion counts and, last, the hits of the token-id predictor; majority: [L]
        labels.
    """
    experts = round((totals.shape[-1] - 1) ** 0.5)
    joint = totals[..., :-1].reshape(*totals.shape[:-1], experts, experts)  # (..., L, label, expert)
    label, expert = joint.sum(axis=-1), joint.sum(axis=-2)  # (..., L, E)
    tokens = np.maximum(label.sum(axis=-1), 1)  # (..., L); a layer without tokens may occur in a resample
    independent = label[..., :, None] * expert[..., None, :] / tokens[..., None, None]
    steps = np.abs(np.subtract.outer(np.arange(experts), np.arange(experts)))  # |label - expert|
    wrong = label - np.diagonal(joint, axis1=-2, axis2=-1)  # (..., L, E) errors by label
    beside = (steps == 1).sum(axis=1) / max(experts - 1, 1)  # share of its other experts

    def pooled(counts: np.ndarray) -> np.ndarray:
        return with_all(counts, -1)

    def total(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return pooled(np.einsum("...le,le->...", counts, weights))

    n = pooled(label.sum(axis=-1))
    right = total(joint, steps == 0)
    constant = np.take_along_axis(label, np.broadcast_to(majority[:, None], (*label.shape[:-1], 1)), axis=-1)
    constant, known = pooled(constant[..., 0]), pooled(totals[..., -1])
    with np.errstate(divide="ignore", invalid="ignore"):  # no error at all: its neighbour share is nan
        near = total(joint, steps == 1) / total(joint, steps > 0)
        near_independent = total(independent, steps == 1) / total(independent, steps > 0)
        near_uniform = pooled(wrong @ beside) / total(joint, steps > 0)
        return {
            "accuracy": right / n,
            "majority": constant / n,
            "marginals": total(independent, steps == 0) / n,
            "token_id": known / n,
            "minus_majority": (right - constant) / n,
            "minus_token_id": (right - known) / n,
            "neighbour_share": near,
            "neighbour_chance": near_independent,
            "neighbour_uniform": near_uniform,
            "neighbour_minus_chance": near - near_independent,
            "distance": total(joint, steps) / n,
            "distance_chance": total(independent, steps) / n,
        }


def _token_id_hits(tally: Tally, labels: int, folds: int, seed: int) -> np.ndarray:
    """Tokens that a predictor by token id and layer, fitted on the other folds' documents, labels right.

    Returns [documents, L] counts; nan when there are not two folds.
    """
    documents, layers = tally.joint.shape[:2]
    if folds < 2:
        return np.full((documents, layers), np.nan)
    fold_of = np.random.default_rng(seed).permutation(documents) % folds
    document, layer, label = (tally.rows[name].to_numpy() for name in ("document", "layer", "label"))
    token, ids = pd.factorize(tally.rows["token_id"])
    fold = fold_of[document]
    hits = np.zeros((documents, layers))
    order = np.argsort(layer, kind="stable")
    for rows in np.split(order, np.searchsorted(layer[order], np.arange(1, layers))):  # a layer: bounds memory
        cells = np.ravel_multi_index((fold[rows], token[rows], label[rows]), (folds, len(ids), labels))
        counts = np.bincount(cells, minlength=folds * len(ids) * labels).reshape(folds, len(ids), labels)
        others = counts.sum(axis=0) - counts  # (folds, ids, labels) seen outside the fold
        prior = others.sum(axis=1, keepdims=True)
        prior = 0.5 * prior / np.maximum(prior.sum(axis=-1, keepdims=True), 1)  # < 1: breaks ties
        answer = (others + prior).argmax(axis=-1)  # (folds, ids)
        right = answer[fold[rows], token[rows]] == label[rows]
        hits[:, layer[rows[0]]] = np.bincount(document[rows], weights=right, minlength=documents)
    return hits


def error_distance(
    routing: pd.DataFrame,
    *,
    experts: int | None = None,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> pd.DataFrame:
    """How far and to which side the router misses, per layer and for all layers ("all").

    Args:
        routing: the frame `routing`: run, domain, document, layer, label, expert; a row per token and layer.
        experts: number of experts E; None: the highest label or expert in the frame.
        confidence, resamples, seed: of the document bootstrap.

    Returns:
        - run, layer, distance: expert - label, in experts; negative: too small an expert
        - share, tokens: of all tokens of the layer; chance: the share if expert and label were independent
        - error_share, error_low, error_high: of the errors alone, with its document bootstrap; error_chance:
          if independent. nan at distance 0
        - confidence: of the interval

    Raises:
        InputError: a column is missing, or an expert or label is not below `experts`.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": 0, "label": [0, 0, 1, 2], "expert": [0, 1, 2, 0]})
        >>> errors = lab.error_distance(routing)
        >>> errors.loc[errors["layer"] == "all", ["distance", "share", "error_share"]]
           distance  share  error_share
        5        -2   0.25     0.333333
        6        -1   0.00     0.000000
        7         0   0.25          NaN
        8         1   0.50     0.666667
        9         2   0.00     0.000000
    """
    settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
    parts = []
    for tally in tallies(routing, experts, "error_distance"):
        count = tally.joint.shape[-1]
        distances = np.arange(1 - count, count)
        ahead = -np.subtract.outer(np.arange(count), np.arange(count))  # expert - label
        pick = (ahead == distances[:, None, None]).astype(np.float64)  # (distances, label, expert)
        joint = tally.joint.sum(axis=0)  # (L, label, expert)
        independent = joint.sum(axis=2)[:, :, None] * joint.sum(axis=1)[:, None, :]
        independent = independent / joint.sum(axis=(1, 2))[:, None, None]
        found = with_all(np.einsum("ale,dle->ad", joint, pick), 0)  # (L + 1, distances)
        chance = with_all(np.einsum("ale,dle->ad", independent, pick), 0)
        by_document = np.einsum("nale,dle->nad", tally.joint, pick)
        interval = bootstrap_sums(by_document, lambda totals: _of_errors(with_all(totals, -2)), **settings)
        columns = {
            "share": found / found.sum(axis=1, keepdims=True),
            "tokens": np.rint(found).astype(np.int64),
            "chance": chance / chance.sum(axis=1, keepdims=True),
            "error_share": interval.value,
            "error_low": interval.low,
            "error_high": interval.high,
            "error_chance": _of_errors(chance),
        }
        index = pd.MultiIndex.from_product([layer_names(tally.layers), distances], names=["layer", "distance"])
        frame = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index)
        parts.append(frame.reset_index().assign(run=tally.run, confidence=confidence))
    names = ["run", "layer", "distance", *columns, "confidence"]
    return pd.concat(parts, ignore_index=True)[names]


def _of_errors(counts: np.ndarray) -> np.ndarray:
    """Counts [..., 2E - 1] by distance as shares of the errors; nan at distance 0 and without errors."""
    wrong = np.arange(counts.shape[-1]) != counts.shape[-1] // 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(wrong, counts, np.nan) / (counts * wrong).sum(axis=-1, keepdims=True)
