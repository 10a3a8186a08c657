"""How sure a number is: bootstrap intervals over clusters (documents), for one number or for a whole table of them at once.

Tokens of one document are alike, so the sample is documents, not tokens. Everything here works on *sums per document*: a resample of
documents is a product of multiplicities and sums, [resamples, documents] @ [documents, sums], after which any statistic of the sums (a
ratio, an accuracy in each of 30 layers, a difference) is one vectorised expression.

Intervals are percentile intervals at the levels of Student's t ("expanded percentile", Hesterberg 2015, doi 10.1080/00031305.2015.1089789).
A plain percentile interval is too short when documents are few, and the quick profile has 25; in a simulation of token-weighted means over
20 documents of very unequal length it covered the truth 90-91 % of the time instead of 95, this one 93-94, BCa 87-89.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from dynamoe_lab.errors import InputError

__all__ = ["Interval", "bootstrap_sums", "expanded_tail", "paired_difference", "ratio_of_sums"]

FEWEST = 3  # clusters; the interval of two would be their range, whatever the confidence
CHUNK = 4_000_000  # multiplicities held at once, so that memory does not grow with resamples x documents


class Interval(NamedTuple):
    """A number with its confidence interval; floats, or arrays of one shape from `bootstrap_sums`."""

    value: float  # on the sample itself
    low: float  # nan when the sample has one or two clusters and says nothing about its spread
    high: float
    n: int  # clusters resampled

    def map(self, function: Callable) -> "Interval":
        """The interval of an increasing function of the number, e.g. `np.exp` for a perplexity ratio."""
        return Interval(function(self.value), function(self.low), function(self.high), self.n)


def bootstrap_sums(
    sums: ArrayLike,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Intervals of any statistic of totals over clusters, by resampling the clusters.

    Args:
        sums: [clusters, ...] what each cluster adds to the totals, e.g. correct tokens and tokens per layer.
        statistic: maps totals [..., *sums.shape[1:]] to values [..., *out] for any leading axes; all values
            share the same resamples.
        confidence: of the interval, between 0 and 1.
        resamples: bootstrap samples.
        seed: the same seed and clusters in the same order give the same interval.

    Returns:
        Interval of arrays of shape [*out]. `low` and `high` are nan with fewer than three clusters, whose resamples
        are the clusters themselves, and where no resample gives a finite value.
    """
    sums = np.asarray(sums, dtype=np.float64)
    if sums.ndim < 1 or not len(sums):
        raise InputError("bootstrap_sums: no clusters to resample")
    if not 0 < confidence < 1:
        raise InputError(f"bootstrap_sums: confidence = {confidence}, give a number between 0 and 1, e.g. 0.95")
    if resamples < 1:
        raise InputError(f"bootstrap_sums: resamples = {resamples}, give a whole number of at least 1")
    clusters = len(sums)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is an honest nan
        value = np.asarray(statistic(sums.sum(axis=0)), dtype=np.float64)
        low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
        if clusters < FEWEST:
            return Interval(value[()], low[()], high[()], clusters)
        rng = np.random.default_rng(seed)
        flat = sums.reshape(clusters, -1)
        parts = []
        for start in range(0, resamples, step := max(1, CHUNK // clusters)):
            rows = min(step, resamples - start)
            draws = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
            times = np.bincount(draws.ravel(), minlength=rows * clusters).reshape(rows, clusters)
            parts.append(statistic((times.astype(np.float64) @ flat).reshape(rows, *sums.shape[1:])))
    drawn = np.concatenate(parts)  # (resamples, *out)
    tail = expanded_tail(clusters, confidence)
    some = np.isfinite(drawn).any(axis=0)
    if some.any():
        drawn = np.where(np.isfinite(drawn), drawn, np.nan)[:, some]
        quantile = np.nanquantile if np.isnan(drawn).any() else np.quantile  # the slow one only where a resample divided by 0
        low[some], high[some] = quantile(drawn, [tail, 1 - tail], axis=0)
    return Interval(value[()], low[()], high[()], clusters)


def expanded_tail(clusters: int, confidence: float) -> float:
    """The share of resamples below the lower end of an expanded percentile interval of so many clusters (see the top of this file)."""
    return float(stats.norm.cdf(np.sqrt(clusters / (clusters - 1)) * stats.t.ppf((1 - confidence) / 2, clusters - 1)))


def ratio_of_sums(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """sum(numerator) / sum(denominator) with its interval, e.g. correct tokens over tokens: a token-weighted mean over documents.

    Args:
        numerator, denominator: [rows] what each row (a token, a document) adds.
        clusters: [rows] the document of each row; None: every row is its own.

    Returns:
        Interval of floats; `n` is the number of clusters.
    """
    columns = np.stack(_rows("ratio_of_sums", numerator=numerator, denominator=denominator), axis=1)  # (rows, 2)
    if clusters is not None:
        names = np.asarray(clusters).ravel()
        if len(names) != len(columns):
            raise InputError(f"ratio_of_sums: {len(names)} clusters for {len(columns)} rows")
        _, codes = np.unique(names, return_inverse=True)
        columns = np.stack([np.bincount(codes, weights=column) for column in columns.T], axis=1)  # (clusters, 2)
    settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
    value, low, high, n = bootstrap_sums(columns, lambda totals: totals[..., 0] / totals[..., 1], **settings)
    return Interval(float(value), float(low), float(high), n)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Weighted mean of `first - second`, row by row on the same items, with its interval.

    Args:
        first, second: [rows] two measurements of each row, e.g. the loss per token of two models on the same
            document.
        weights: [rows] e.g. tokens per document; None: 1 each.
        clusters: [rows] the document of each row; None: every row is its own.

    Returns:
        Interval of floats, in the unit of `first`; `n` is the number of clusters.
    """
    weights = np.ones_like(np.asarray(first, dtype=np.float64)) if weights is None else weights
    first, second, weights = _rows("paired_difference", first=first, second=second, weights=weights)
    settings = {"clusters": clusters, "confidence": confidence, "resamples": resamples, "seed": seed}
    return ratio_of_sums((first - second) * weights, weights, **settings)


def _rows(function: str, **columns: ArrayLike) -> list[np.ndarray]:
    """The columns as float64 vectors of one length, without nans."""
    arrays = {name: np.asarray(column, dtype=np.float64).ravel() for name, column in columns.items()}
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise InputError(f"{function}: one value per row is needed, but the lengths differ: {lengths}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{function}: {name} has {(~np.isfinite(array)).sum()} values that are not finite; drop them")
    return list(arrays.values())
