"""Two models on the same documents: McNemar's exact test, the smallest difference that a sample could have shown, averages over tasks.

What two models share, easy and hard documents, cancels when they are compared document by document; what is left are the documents on
which they disagree (the *discordant* ones), and the tests here look at nothing else. The smallest detectable difference stands beside every
difference, for "not distinguishable" means little where 40 documents could not have shown ten points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from dynamoe_lab.analysis.statistics import CHUNK, FEWEST, expanded_tail
from dynamoe_lab.errors import InputError

__all__ = ["TaskMeans", "detectable_change", "detectable_mean", "holm", "mcnemar", "stratified_means"]

_TAILS = 1e-9  # of the number of discordant documents: counts rarer than this are left out of a power


class TaskMeans(NamedTuple):
    """The mean over tasks of two models, its difference and its ratio; each interval is (value, low, high)."""

    difference: tuple[float, float, float]
    relative: tuple[float, float, float]  # first / second - 1
    n: int  # documents of all tasks


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: under equal accuracy a discordant document is as likely right in one model as in the other.

    Args:
        only_first, only_second: documents that only the one or the other model has right. Without any the p is 1.
    """
    total = only_first + only_second
    return float(stats.binomtest(only_first, total).pvalue) if total else 1.0


def holm(p: ArrayLike) -> np.ndarray:
    """p values [n] adjusted for n tests at once (Holm 1979): any one below 5 % by chance, in all of them together, at most 5 % of the time.

    A nan, where nothing was tested, stays nan and does not count.
    """
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full_like(p, np.nan)
    order = np.argsort(np.where(np.isnan(p), np.inf, p), kind="stable")[: int((~np.isnan(p)).sum())]
    steps = p[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def detectable_change(n: int, discordant: float, *, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference of two accuracies that McNemar's exact test finds with the given power, from n documents.

    The number of discordant documents is binomial, and so is, given that number, how many of them the better model has right; the power
    is summed over both, no normal approximation. A difference cannot be larger than the discordant share, so where even the largest one
    would not do, the share grows with the difference.

    Args:
        n: documents.
        discordant: share of documents on which the two models disagree, as the sample has it.

    Returns:
        A difference of shares, e.g. 0.034; nan where n is too small to find even a difference of 1.
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise InputError(f"detectable_change: n = {n}, discordant = {discordant}: give documents and a share of them")

    def short(difference: float) -> float:
        return _power(n, max(discordant, difference), difference, level) - power

    if short(1.0) < 0:
        return float("nan")
    return float(optimize.brentq(short, 0.0, 1.0, xtol=1e-7))


def _power(n: int, share: float, difference: float, level: float) -> float:
    """Probability that McNemar's exact two-sided test at `level` tells two models with this discordant share and difference apart."""
    if share == 0:
        return 0.0
    counts = np.arange(stats.binom.ppf(_TAILS, n, share), stats.binom.isf(_TAILS, n, share) + 1)  # discordant documents
    few = stats.binom.ppf(level / 2, counts, 0.5)
    few = np.where(stats.binom.cdf(few, counts, 0.5) > level / 2, few - 1, few)  # the largest count in the lower tail; -1: none is
    better = (share + difference) / (2 * share)
    found = stats.binom.cdf(few, counts, better) + stats.binom.sf(counts - few - 1, counts, better)
    return float((stats.binom.pmf(counts, n, share) * np.where(few < 0, 0.0, found)).sum())


def detectable_mean(error: float, n: int, *, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true mean difference that a paired t test finds with the given power.

    Args:
        error: standard error of the mean difference.
        n: documents behind it (of an average over tasks: of the smallest task).

    Returns:
        In the unit of the error; nan without spread or with fewer than three documents.
    """
    if n < FEWEST or not error > 0:
        return float("nan")
    return float((stats.t.ppf(1 - level / 2, n - 1) + stats.t.ppf(power, n - 1)) * error)


def stratified_means(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], *, confidence: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> TaskMeans:
    """The unweighted mean over tasks of two models' scores, with intervals from resampling the documents within each task.

    Args:
        pairs: per task the scores [documents] of the first and of the second model on the same documents.

    Returns:
        Expanded percentile intervals as in `bootstrap_sums`, with the degrees of freedom of the smallest task; nan where that has fewer
        than three documents or nothing varies.
    """
    rng, first, second, drawn_first, drawn_second = np.random.default_rng(seed), 0.0, 0.0, 0.0, 0.0
    for one, other in pairs:
        one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
        kinds, counts = np.unique(np.stack([one, other], axis=1), axis=0, return_counts=True)  # right and wrong: four kinds of documents
        first, second, n = first + one.mean() / len(pairs), second + other.mean() / len(pairs), len(one)
        parts = []
        for start in range(0, resamples, step := max(1, CHUNK // len(kinds))):
            parts.append(rng.multinomial(n, counts / n, size=min(step, resamples - start)) @ kinds / n)
        drawn = np.concatenate(parts)  # (resamples, 2)
        drawn_first, drawn_second = drawn_first + drawn[:, 0] / len(pairs), drawn_second + drawn[:, 1] / len(pairs)
    least = min(len(one) for one, _ in pairs)

    def interval(value: float, drawn: np.ndarray) -> tuple[float, float, float]:
        drawn = drawn[np.isfinite(drawn)]
        if least < FEWEST or not len(drawn) or np.ptp(drawn) == 0:
            return float(value), float("nan"), float("nan")
        tail = expanded_tail(least, confidence)
        low, high = np.round(np.quantile(drawn, [tail, 1 - tail]), 12) + 0.0  # a sum of shares that is 0 must not be -5e-17, "below 0"
        return float(value), float(low), float(high)

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.float64(first) / second - 1 if second else np.float64("nan")
        difference, relative = interval(first - second, drawn_first - drawn_second), interval(ratio, drawn_first / drawn_second - 1)
    return TaskMeans(difference, relative, sum(len(one) for one, _ in pairs))
