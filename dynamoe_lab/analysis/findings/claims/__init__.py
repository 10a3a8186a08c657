"""The papers' claims beside what a report measured, each with its chance level, n, interval and a verdict that falls by a rule.

A function a claim: tables of a report in, a `Claim` out. A claim whose tables are not there is left out. Verdicts fall by `RULE`.
"""

from collections.abc import Iterable

import pandas as pd

from dynamoe_lab.analysis.findings.claims import dynamoe, not_run, open_questions, tomoe
from dynamoe_lab.analysis.findings.claims.claim import FAILS, HOLDS, UNDECIDED, Claim, Tables, Verdict, by_interval
from dynamoe_lab.errors import InputError

RULE = (
    "Holds: the 95 % interval of the difference to chance, to the control or to the paper's number lies wholly on the side that is "
    "claimed; does not hold at this scale: wholly on the other side; else undecided. Two values that were not paired are told apart when "
    "their intervals do not overlap, times when 10 to 90 % of the rounds lie on one side. Where a count or a fixed rule decides, the row "
    "says so. Intervals are over documents: a verdict is of one training, unless the row names seeds. What was not run is undecided."
)
"""The rule of all verdicts, as a reader of the table is told it."""

UNMEASURED = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, InputError)
"""What a table raises that is not there, lacks the column of an option that was not run, or came from elsewhere and is no such table."""

ORIGINS = {
    "DynaMoE": "DynaMoE (arXiv 2502.12325) says",
    "open": "What the papers left open",
    "ToMoE": "ToMoE (arXiv 2501.15316) says",
}
"""Where a claim comes from -> the heading of its group, in the order of reading."""

__all__ = [
    "FAILS",
    "HOLDS",
    "ORIGINS",
    "RULE",
    "UNDECIDED",
    "UNMEASURED",
    "Claim",
    "Tables",
    "Verdict",
    "by_interval",
    "claims_frame",
    "measured_claims",
]


def measured_claims(tables: Tables) -> list[Claim]:
    """Every claim for which the tables are there: DynaMoE's, what it left open, ToMoE's.

    Args:
        tables: `<notebook>/<stem>` -> the table; a mapping that raises KeyError for what is not there.

    Example:
        >>> from dynamoe_lab.analysis.findings.claims import measured_claims
        >>> change = pd.DataFrame([{"max_abs": 1e-4, "logit_scale": 7.0, "agreement": 1.0, "tokens": 1024}])
        >>> [claim.verdict for claim in measured_claims({"01_convert/logit_change": change}) if claim.source]
        ['holds']
    """
    found = []
    for measure in (*dynamoe.CLAIMS, *open_questions.CLAIMS, *tomoe.CLAIMS):
        try:
            found.append(measure(tables))
        except UNMEASURED:
            continue
    return (
        sorted([*found, *not_run.CLAIMS], key=lambda claim: list(ORIGINS).index(claim.origin)) if found else []
    )  # within a group in order


def claims_frame(claims: Iterable[Claim]) -> pd.DataFrame:
    """The claims as a table: claim, origin, paper, measured, control, n, verdict, source."""
    return pd.DataFrame([vars(claim) for claim in claims])
