"""Which tokens are hard: how the difficulty of a token goes with its surprisal, its rarity, its place and its domain.

A token's difficulty at θ is the mean over layers of the share of the MLP that its labels ask for. Position 0 of a block is an attention
sink in many models and has no surprisal; it is left out of every number here but the bin that says so.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from dynamoe_lab.analysis.frames import ALL, one_run, require, whole_numbers
from dynamoe_lab.analysis.metrics.labels import labels_at
from dynamoe_lab.analysis.metrics.usage import active_fraction
from dynamoe_lab.analysis.statistics import bootstrap_sums
from dynamoe_lab.errors import InputError

__all__ = ["COVARIATES", "COVARIATE_NAMES", "difficulty_bins", "difficulty_by_domain", "difficulty_by_token", "difficulty_correlations"]

COVARIATE_NAMES = {
    "surprisal": "its surprisal",
    "next_surprisal": "the next token's surprisal",
    "log_frequency": "its id's frequency in training text",
    "position": "its position in the block",
}
COVARIATES = tuple(COVARIATE_NAMES)
_TOKEN = ("domain", "document", "position", "token_id", "surprisal", "next_surprisal")


def difficulty_by_token(
    similarity: pd.DataFrame,
    theta: float,
    *,
    fractions: Sequence[float],
    counts: pd.DataFrame | None = None,
    by_layer: bool = False,
) -> pd.DataFrame:
    """Each token's difficulty at θ beside what it might depend on.

    Args:
        similarity: the frame `similarity` of one run (of `trace_similarity`), its rows in the order they were traced.
        theta: threshold of the labels.
        fractions: [E] share of the MLP that each expert runs.
        counts: token_id, tokens of the training text (from `token_counts`); without it frequency is nan.
        by_layer: a row per token and layer instead; difficulty is then the layer's own label.

    Returns:
        One row per token: run, theta, layer ("all"), domain, document, position, token_id, surprisal and next_surprisal (nats), frequency
        (share of the training text; an id that never occurs there gets half a count), difficulty (0 to 1).

    Raises:
        InputError: a column is missing, the frame holds several runs, `fractions` are not E, or layers differ in their tokens.

    Example:
        >>> similarity = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "position": [1, 2, 1, 2], "token_id": [5, 6, 5, 6]})
        >>> similarity = similarity.assign(layer=[0, 0, 1, 1], surprisal=2.0, next_surprisal=1.0, similarity_0=[0.95, 0.2, 0.95, 0.95])
        >>> lab.difficulty_by_token(similarity, 0.9, fractions=(0.5, 1.0))[["token_id", "difficulty"]]  # token 6 needs all of layer 0
           token_id  difficulty
        0         5        0.50
        1         6        0.75
    """
    require(similarity, ("run", "layer", *_TOKEN), "difficulty_by_token")
    one_run(similarity, "difficulty_by_token")
    labels = labels_at(similarity, theta)
    sizes = np.asarray(fractions, dtype=np.float64)
    if sum(str(column).startswith("similarity_") for column in similarity.columns) + 1 != len(sizes):
        raise InputError(
            f"difficulty_by_token: {len(sizes)} fractions, but the frame has similarities of other experts; give one per expert"
        )
    layer, layers = pd.factorize(whole_numbers(similarity["layer"], "difficulty_by_token"), sort=True)
    rows = np.argsort(layer, kind="stable")
    if len(rows) % len(layers) or (np.bincount(layer) != len(rows) // len(layers)).any():
        raise InputError("difficulty_by_token: the layers have different numbers of tokens; pass the whole frame of trace_similarity")
    rows = rows.reshape(len(layers), -1)  # (layers, tokens)
    for name in ("document", "position", "token_id"):  # a document may span blocks, so only the order says which rows are one token
        value = similarity[name].to_numpy()[rows]
        if (value != value[0]).any():
            raise InputError(f"difficulty_by_token: column {name} differs between layers; keep the rows in the order of trace_similarity")
    difficulty = sizes[labels][rows]
    tokens = similarity.iloc[rows[0]][["run", *_TOKEN]].reset_index(drop=True)
    tokens["frequency"] = np.nan if counts is None else _frequency(tokens["token_id"], counts)
    tokens.insert(1, "theta", float(theta))
    tokens.insert(2, "layer", ALL)
    if not by_layer:
        return tokens.assign(difficulty=difficulty.mean(axis=0))
    parts = [tokens.assign(layer=int(name), difficulty=values) for name, values in zip(layers, difficulty, strict=True)]
    return pd.concat(parts, ignore_index=True)


def difficulty_correlations(tokens: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2_000, seed: int = 0) -> pd.DataFrame:
    """Spearman's correlation of difficulty with each covariate, with a document bootstrap; position 0 is left out.

    Ranks are taken once, on the sample; a resample of documents weights the ranks it holds. (In simulations with correlations of 0.1 to 0.8
    intervals were on average 2 % shorter than with ranks taken anew in every resample, which is 1000 times the work.)

    Args:
        tokens: the frame of `difficulty_by_token`, by layer or not.
        confidence, resamples, seed: of the document bootstrap.

    Returns:
        run, theta, layer, covariate (surprisal, next_surprisal, log_frequency, position; those without values are left out), spearman,
        low, high, n (documents), tokens, confidence. nan where difficulty or covariate never varies.

    Raises:
        InputError: a column is missing, the frame holds several runs, or no token past position 0.

    Example:
        >>> tokens = pd.DataFrame({"run": "a", "theta": 0.9, "layer": "all", "domain": "web", "document": [0, 1, 2], "position": [1, 2, 3]})
        >>> tokens = tokens.assign(surprisal=[1.0, 2.0, 9.0], next_surprisal=[3.0, 2.0, 1.0], frequency=0.1, difficulty=[0.3, 0.4, 0.5])
        >>> lab.difficulty_correlations(tokens)[["covariate", "spearman"]]  # the frequency never varies
                covariate  spearman
        0       surprisal       1.0
        1  next_surprisal      -1.0
        2   log_frequency       NaN
        3        position       1.0
    """
    rows = _later_tokens(tokens, "difficulty_correlations")
    settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
    found = []
    for layer, part in rows.groupby("layer", sort=False):
        for name in COVARIATES:
            known = part[part[name].notna()]
            if known.empty:
                continue
            x, y = (stats.rankdata(known[column]) / len(known) - 0.5 for column in (name, "difficulty"))
            moments = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)
            interval = bootstrap_sums(_by_document(known["cluster"], moments), _pearson, **settings)
            case = {"run": known["run"].iloc[0], "theta": known["theta"].iloc[0], "layer": layer, "covariate": name}
            numbers = {"spearman": float(interval.value), "low": float(interval.low), "high": float(interval.high)}
            found.append({**case, **numbers, "n": interval.n, "tokens": len(known), "confidence": confidence})
    return pd.DataFrame(found)


def difficulty_bins(
    tokens: pd.DataFrame, *, bins: int = 10, confidence: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> pd.DataFrame:
    """Mean difficulty in quantile bins of each covariate, with a document bootstrap.

    Args:
        tokens: the frame of `difficulty_by_token`, one row per token.
        bins: bins of equal numbers of tokens; fewer where many tokens share a value.
        confidence, resamples, seed: of the document bootstrap.

    Returns:
        run, theta, covariate, bin (1, 2, ...; of covariate position also 0: position 0 alone, which no other bin holds), start, end, center
        (edges and mean of the covariate in the bin; log_frequency is log10 of a share), difficulty, low, high, tokens, documents (that have
        such tokens), confidence.

    Raises:
        InputError: a column is missing, the frame holds several runs or a row per layer, or bins < 1.

    Example:
        >>> tokens = pd.DataFrame({"run": "a", "theta": 0.9, "layer": "all", "domain": "web", "document": 0, "position": [1, 2, 3, 4]})
        >>> tokens = tokens.assign(surprisal=[1.0, 1.0, 9.0, 9.0], next_surprisal=1.0, frequency=0.1, difficulty=[0.3, 0.5, 0.8, 1.0])
        >>> bins = lab.difficulty_bins(tokens, bins=2)
        >>> bins.loc[bins["covariate"] == "surprisal", ["bin", "center", "difficulty", "tokens"]]
           bin  center  difficulty  tokens
        0    1     1.0         0.4       2
        1    2     9.0         0.9       2
    """
    if bins < 1:
        raise InputError(f"difficulty_bins: bins = {bins}, give a whole number of at least 1")
    rows = _later_tokens(tokens, "difficulty_bins", keep_first=True)
    if rows["layer"].nunique() > 1:
        raise InputError("difficulty_bins: the frame has a row per layer; pass difficulty_by_token without by_layer")
    settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
    first, parts = rows["position"] == 0, []
    for name in COVARIATES:
        known = rows[rows[name].notna() & (~first if name != "position" else True)]
        usual = known.loc[known["position"] > 0, name].to_numpy(dtype=np.float64)
        if not len(usual):
            continue
        start, end = _edges(usual, bins)
        x = known[name].to_numpy(dtype=np.float64)
        place = np.searchsorted(start[1:], x, side="right") + 1
        place[(known["position"] == 0).to_numpy()] = 0
        number, places = pd.factorize(place, sort=True)
        cells = np.zeros((len(known), len(places), 3))
        cells[np.arange(len(known)), number] = np.stack([known["difficulty"], np.ones(len(known)), x], axis=1)
        sums = _by_document(known["cluster"], cells)  # (documents, bins, 3)
        interval = bootstrap_sums(sums[..., :2], lambda totals: totals[..., 0] / totals[..., 1], **settings)
        count = sums[..., 1].sum(axis=0)
        ends = {"start": np.append(0, start)[places], "end": np.append(0, end)[places], "center": sums[..., 2].sum(axis=0) / count}
        numbers = {"difficulty": interval.value, "low": interval.low, "high": interval.high, "tokens": count.astype(np.int64)}
        parts.append(pd.DataFrame({"covariate": name, "bin": places, **ends, **numbers, "documents": (sums[..., 1] > 0).sum(axis=0)}))
    frame = pd.concat(parts, ignore_index=True).assign(confidence=confidence)
    frame.insert(0, "run", rows["run"].iloc[0])
    frame.insert(1, "theta", rows["theta"].iloc[0])
    return frame


def difficulty_by_domain(
    similarity: pd.DataFrame,
    theta: float,
    *,
    fractions: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean share of the MLP that labels ask for, by domain and layer, with a document bootstrap; position 0 is left out.

    Args:
        similarity: the frame `similarity` of one run: domain, document, position, layer, similarity_0 to similarity_{E-2}.
        theta: threshold of the labels.
        fractions: [E] share of the MLP that each expert runs.
        confidence, resamples, seed: of the document bootstrap.

    Returns:
        run, theta, domain, layer (also "all"), mean, low, high, tokens, documents, confidence.

    Raises:
        InputError: a column is missing, the frame holds several runs, or no token past position 0.

    Example:
        >>> similarity = pd.DataFrame({"run": "a", "domain": ["web", "web", "code", "code"], "document": [0, 0, 1, 1], "layer": 0})
        >>> similarity = similarity.assign(position=1, similarity_0=[0.95, 0.95, 0.95, 0.2])
        >>> means = lab.difficulty_by_domain(similarity, 0.9, fractions=(0.5, 1.0))
        >>> means.loc[means["layer"] == "all", ["domain", "mean", "tokens"]]
          domain  mean  tokens
        1    web  0.50       2
        3   code  0.75       2
    """
    require(similarity, ("run", "domain", "document", "position", "layer"), "difficulty_by_domain")
    one_run(similarity, "difficulty_by_domain")
    later = similarity[similarity["position"] > 0]
    require(later, (), "difficulty_by_domain: tokens after position 0")
    label = labels_at(later, theta)
    routing = later[["run", "domain", "document", "layer"]].assign(label=label, expert=label)
    settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
    frame = active_fraction(routing, theta=theta, fractions=fractions, by_domain=True, **settings)
    return frame.rename(columns={"active_fraction": "mean"})


def _later_tokens(tokens: pd.DataFrame, function: str, *, keep_first: bool = False) -> pd.DataFrame:
    """Rows after position 0 with log_frequency and a code of their document."""
    require(tokens, ("run", "theta", "layer", "domain", "document", "position", "frequency", "difficulty", *COVARIATES[:2]), function)
    one_run(tokens, function)
    rows = tokens if keep_first else tokens[tokens["position"] > 0]
    require(rows, (), f"{function}: tokens after position 0")
    cluster = rows.groupby(["domain", "document"], observed=True).ngroup()  # numbering may start anew in each domain
    return rows.assign(log_frequency=np.log10(rows["frequency"].astype(np.float64)), cluster=cluster)


def _edges(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Where quantile bins start and end; of few distinct values each is a bin of its own."""
    distinct = np.unique(values)
    if len(distinct) <= bins:
        return distinct, distinct
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))
    return edges[:-1], edges[1:]


def _frequency(token_id: pd.Series, counts: pd.DataFrame) -> np.ndarray:
    require(counts, ("token_id", "tokens"), "difficulty_by_token: counts")
    seen = counts.groupby("token_id")["tokens"].sum()
    return token_id.map(seen).fillna(0.5).to_numpy(dtype=np.float64) / seen.sum()


def _by_document(cluster: pd.Series, values: np.ndarray) -> np.ndarray:
    """Sums of `values` [rows, ...] over the rows of each document -> [documents, ...]."""
    code, documents = pd.factorize(cluster)
    sums = np.zeros((len(documents), *values.shape[1:]))
    np.add.at(sums, code, values)
    return sums


def _pearson(totals: np.ndarray) -> np.ndarray:
    """Correlation from sums [..., 6] of 1, x, y, x², y², xy; nan where x or y does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(totals, -1, 0)
    spread = (xx - x * x / n) * (yy - y * y / n)
    return (xy - x * y / n) / np.sqrt(np.where(spread > 1e-12 * n * n, spread, np.nan))
