"""What has to come out again with the same seed, threads and versions, to the last digit, and what need not: the one place that says so.

Measured times and energies differ from run to run. They are excepted here, by name and with the reason; no tolerance hides anything else.
A table is compared as it was written (six digits), and by a fingerprint of its frame at full precision.
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dynamoe_lab.workbench.fingerprint import fingerprint

__all__ = [
    "EXCEPTED_COLUMNS",
    "EXCEPTED_METRICS",
    "EXCEPTED_RESULTS",
    "Excepted",
    "TableComparison",
    "compare_tables",
    "exact_digest",
    "excepted_columns",
]


class Excepted(NamedTuple):
    """Columns of tables that a rerun need not reproduce."""

    tables: str  # pattern of the stem, whole
    columns: str  # pattern of the name, whole
    reason: str


EXCEPTED_COLUMNS = (
    Excepted(r".*", r"seconds|ideal_seconds", "a measured time"),
    Excepted(r".*", r"(time|time_ratio|realised|speedup|amdahl|of_bound)(_low|_high)?", "computed from measured times"),
    Excepted(r"latency|latency_seconds", r"low|high", "interval of a measured time"),
    Excepted(r"time_parts", r"share", "share of a measured time"),
    Excepted(r".*", r"joules\w*|watts\w*", "measured energy"),
    Excepted(r".*", r"\w*memory_bytes|peak_rss", "measured memory"),
)
EXCEPTED_METRICS = Excepted(r".*", r"seconds\w*|share_outside_model", "a measured time, as rows")  # names in the column `metric`
METRIC_VALUES = ("value", "stderr", "low", "high")  # what such a row does not have to give again
EXCEPTED_RESULTS = (  # numbers of `run.result`, by name
    Excepted(r".*", r".*\brate\b.*", "work over a measured time"),
    Excepted(r".*", r"(time|share of time|seconds|memory|energy)\b.*", "measured"),
)


def excepted_columns(stem: str, names: Iterable[str], declared: Iterable[Excepted] = EXCEPTED_COLUMNS) -> dict[str, str]:
    """Those of the columns `names` of table `stem` that need not come out again, each with the reason."""
    found = {}
    for name in names:
        for entry in declared:
            if re.fullmatch(entry.tables, stem) and re.fullmatch(entry.columns, str(name)):
                found.setdefault(str(name), entry.reason)
    return found


def exact_digest(value: Any, stem: str = "") -> str:
    """Fingerprint of a frame, number, text, or list or tuple of these at full precision, excepted columns left out; "" of anything else."""
    if isinstance(value, tuple):
        return fingerprint([exact_digest(entry, stem) for entry in value])
    if hasattr(value, "columns") and hasattr(value, "drop"):
        kept = value.drop(columns=list(excepted_columns(stem, value.columns)))
        if "metric" in kept.columns:
            times = kept["metric"].astype(str).str.fullmatch(EXCEPTED_METRICS.columns)
            kept.loc[times, [name for name in METRIC_VALUES if name in kept.columns]] = float("nan")
        kept.attrs = {}  # notes beside the table; the csv has none
        try:
            return fingerprint(kept)
        except TypeError:  # cells that hold objects
            return ""
    return fingerprint(value) if isinstance(value, (bool, int, float, str, list, dict)) else ""


@dataclass
class TableComparison:
    """How a table came out the second time."""

    stem: str
    equal: bool
    text: str  # one line: what was compared, or the first difference
    excepted: dict[str, str]  # columns left out -> reason


def compare_tables(then: Path, now: Path, stem: str = "") -> TableComparison:
    """Compare two csv files of one table cell by cell, excepted columns left out.

    The text of a difference has the first row (from 1, the header aside) and column that differ, both values, how many cells differ and
    the largest difference of two numbers.
    """
    stem = stem or then.stem
    (head, *rows), (new_head, *new_rows) = _rows(then), _rows(now)
    left_out = excepted_columns(stem, head)

    def verdict(equal: bool, text: str) -> TableComparison:
        return TableComparison(stem, equal, text, left_out)

    if head != new_head:
        odd = [name for name in head if name not in new_head] + [name for name in new_head if name not in head]
        return verdict(False, f"other columns: {', '.join(odd)}" if odd else f"columns in another order: {', '.join(new_head)}")
    kept = [place for place, name in enumerate(head) if name not in left_out]
    metric = head.index("metric") if "metric" in head else None
    pairs, found = list(zip(rows, new_rows, strict=False)), []
    for number, (old, new) in enumerate(pairs, start=1):
        timed = metric is not None and re.fullmatch(EXCEPTED_METRICS.columns, old[metric]) is not None
        if timed:
            left_out[f"metric {old[metric]}"] = EXCEPTED_METRICS.reason
        differing = [place for place in kept if old[place] != new[place] and not (timed and head[place] in METRIC_VALUES)]
        found += [(number, head[place], old[place], new[place]) for place in differing]
    if not found and len(rows) == len(new_rows):
        return verdict(True, f"{len(rows):,} rows, {len(kept)} columns")
    parts = []
    if found:
        row, column, old, new = found[0]
        parts.append(f"row {row}, column {column}: {old or 'empty'} then, {new or 'empty'} now")
        gaps = [(gap, number, name) for number, name, a, b in found if (gap := _gap(a, b)) is not None]
        cells = f"{len(found):,} of {len(pairs) * len(kept):,} cells differ"
        if gaps:
            gap, row, column = max(gaps, key=lambda entry: entry[0])
            cells += f", by up to {gap:.3g} (row {row}, column {column})"
        parts.append(cells)
    if len(rows) != len(new_rows):
        parts.append(f"{len(rows):,} rows then, {len(new_rows):,} now")
    return verdict(False, "; ".join(parts))


def _rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream)) or [[]]


def _gap(first: str, second: str) -> float | None:
    try:
        gap = abs(float(first) - float(second))
    except ValueError:
        return None
    return gap if gap == gap else None
