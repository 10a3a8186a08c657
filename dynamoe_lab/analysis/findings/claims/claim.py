"""What a claim is once it was measured, and the few rules by which its verdict falls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from dynamoe_lab.analysis.frames import percent, signed

__all__ = ["FAILS", "HOLDS", "UNDECIDED", "Claim", "Tables", "Verdict", "by_interval", "extremes", "points", "ratio", "share", "together"]

Verdict = Literal["holds", "does not hold at this scale", "undecided"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold at this scale"
UNDECIDED: Verdict = "undecided"

Tables = Mapping[str, pd.DataFrame]
"""`<notebook>/<stem>` -> the table of that name, as it is in the csv of a report."""


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, or a question that it left open, beside what was measured."""

    claim: str
    origin: str  # "DynaMoE", "ToMoE", or "open" for what the papers did not measure
    paper: str  # what the paper says in numbers; "" where it says none
    measured: str  # with its interval
    control: str  # chance level, or what it is compared with, and the difference
    n: str
    verdict: Verdict
    source: str = ""  # "<notebook>/<stem>" of the table it was computed from; "" of what was not run


def by_interval(low: float, high: float, *, at: float = 0.0, above: bool = True) -> Verdict:
    """The verdict of an interval on a claim that the value lies above (or below) `at`.

    >>> from dynamoe_lab.analysis.findings.claims import by_interval
    >>> by_interval(0.01, 0.03), by_interval(-0.01, 0.03), by_interval(1.01, 1.2, at=1.0, above=False)
    ('holds', 'undecided', 'does not hold at this scale')
    """
    if not np.isfinite([low, high]).all():
        return UNDECIDED
    over, under = low > at, high < at
    return HOLDS if (over if above else under) else FAILS if (under if above else over) else UNDECIDED


def together(*verdicts: Verdict) -> Verdict:
    """A claim of several parts holds if all of them do, and does not if one does not."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def extremes(rows: pd.DataFrame, name: str, *, confidence: float = 0.95) -> tuple[pd.Series, pd.Series, float, float]:
    """The rows with the least and the largest value of `name`, their difference and its half interval.

    The two are picked from all pairs, so the interval is widened by Bonferroni. Their errors are taken as independent, an approximation
    where they come from the same documents.

    Args:
        rows: `name`, low, high: two or more means with intervals of the level `confidence`.
    """
    ordered = rows.sort_values(name, kind="stable")
    least, most = ordered.iloc[0], ordered.iloc[-1]
    pairs, tail = len(rows) * (len(rows) - 1) // 2, (1 - confidence) / 2
    error = np.hypot(most[name] - most["low"], least["high"] - least[name]) * stats.norm.ppf(tail / pairs) / stats.norm.ppf(tail)
    return least, most, float(most[name] - least[name]), float(error)


def share(value: float, low: float = np.nan, high: float = np.nan) -> str:
    """'77.4 % (76.4 to 78.1)'."""
    spread = f" ({_end(low)} to {_end(high)})" if np.isfinite([low, high]).all() else ""
    return f"{percent(value, 1)}{spread}"


def _end(value: float) -> str:
    return percent(value, 1).removesuffix(" %")


def points(value: float, low: float = np.nan, high: float = np.nan) -> str:
    """'+10.0 points (+9.1 to +10.8)'."""
    spread = f" ({signed(100 * low, 1)} to {signed(100 * high, 1)})" if np.isfinite([low, high]).all() else ""
    return f"{signed(100 * value, 1)} points{spread}"


def ratio(value: float, low: float = np.nan, high: float = np.nan) -> str:
    """'1.37 (1.28 to 1.46)'; a ratio near 1 in three digits."""
    digits = 3 if 0.9 < value < 1.1 else 2 if value < 100 else 0
    spread = f" ({low:.{digits}f} to {high:.{digits}f})" if np.isfinite([low, high]).all() else ""
    return f"{value:.{digits}f}{spread}"
