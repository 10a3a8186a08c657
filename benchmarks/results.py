"""What the benchmarks make of measured numbers: ratios pair by pair, medians, goals, the table, the file. Nothing here measures.

Every result is a median with its 10-90 % spread over n rounds in which the two things compared alternated.
"""

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dynamoe_lab.workbench.files import write_json

__all__ = [
    "COLUMNS",
    "GOALS",
    "GOALS_OF_LARGE_LAYERS",
    "expert_results",
    "latency_results",
    "mixing_results",
    "reached",
    "result",
    "table",
    "write",
]

COLUMNS = ("name", "setting", "value", "low", "high", "n", "goal", "reached", "unit")
GOALS = {
    "label_cost": "<= 1.10",
    "prefill_realised": ">= 0.90",
    "decode_realised": ">= 0.75",
    "end_to_end": ">= 0.90",
    "random_mixing": ">= 0.95",
    "tomoe_prefill_realised": ">= 0.80",
    "train_rate": ">= 0.90",
    "tomoe_train_rate": ">= 0.50",
    "train_memory": "<= 1.20",
    "eval_memory": "<= 1.05",
    "load": "< 2",
}
GOAL_OF_A_QUARTER = ">= 0.85"  # prefill_realised where a quarter of the neurons is active: less work to hide the sorting behind
GOALS_OF_LARGE_LAYERS = {"prefill_realised": ">= 0.93", "decode_realised": ">= 0.85"}  # D = 2048, at every share
ACTIVE = (0.25, 0.5, 0.75, 1.0)  # the shares that are measured; those that tokens drew at random lie near one
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt}


def reached(value: float, goal: str | None) -> bool | None:
    """Whether a value meets a goal such as "<= 1.10"; None where there is none."""
    if goal is None:
        return None
    sign, limit = goal.split()
    return bool(_OPERATORS[sign](value, float(limit)))


def result(name: str, setting: str, values: Iterable[float], *, goal: str | None = None, unit: str = "ratio") -> dict[str, Any]:
    """One result from its value in each round: median, 10 % and 90 % quantile, the rounds, and whether the median reaches the goal."""
    rounds = np.asarray(list(values), dtype=np.float64)
    if not len(rounds) or not np.isfinite(rounds).all():
        raise ValueError(f"{name}, {setting}: rounds {rounds.tolist()} are no measurement")
    low, value, high = (float(quantile) for quantile in np.quantile(rounds, (0.1, 0.5, 0.9)))
    return _row(name, setting, value, low, high, len(rounds), goal, unit)


def _row(name: str, setting: str, value: float, low: float, high: float, n: int, goal: str | None, unit: str = "ratio") -> dict[str, Any]:
    return dict(zip(COLUMNS, (name, setting, value, low, high, n, goal, reached(value, goal), unit), strict=True))


def _active(fraction: float) -> float:
    return min(ACTIVE, key=lambda share: abs(share - fraction))


def _setting(row: pd.Series | dict) -> str:
    work = f"{row['tokens']:,} tokens" if row["phase"] == "prefill" else f"batch {row['batch']}, {row['tokens']:,} tokens cached"
    return f"{row['run']}, {work}, {row['routing']}, {_active(row['active_mlp_fraction']):.0%} active"


def latency_results(ratios: pd.DataFrame, *, whole_model: bool) -> list[dict[str, Any]]:
    """`prefill_realised` or `decode_realised` of every routed row of `lab.latency_ratios`; with `whole_model` also `end_to_end` at 50 %.

    Without it the rows are of a few large layers, which have goals of their own.

    A decode step of several sequences has no goal: its tokens read every block of weights, so that time cannot follow the work.
    """
    found = []
    for _, row in ratios[ratios["routing"] != "dense"].iterrows():
        name, half = f"{row['phase']}_realised", _active(row["active_mlp_fraction"]) == 0.5
        goal = GOALS[name] if whole_model else GOALS_OF_LARGE_LAYERS[name]
        if whole_model and row["phase"] == "prefill" and _active(row["active_mlp_fraction"]) == 0.25:
            goal = GOAL_OF_A_QUARTER
        if row["phase"] == "decode" and row["batch"] > 1:
            goal = None
        found.append(_measured(row, name, "realised", goal))
        if whole_model and half and row["phase"] == "prefill":
            found.append(_measured(row, "end_to_end", "of_bound", GOALS["end_to_end"]))
    return found


def _measured(row: pd.Series, name: str, column: str, goal: str | None) -> dict[str, Any]:
    values = (float(row[column + suffix]) for suffix in ("", "_low", "_high"))
    return _row(name, _setting(row), *values, int(row["n"]), goal)


def expert_results(ratios: pd.DataFrame, experts: int) -> list[dict[str, Any]]:
    """`tomoe_prefill_realised` of every row of `lab.latency_ratios` whose tokens are spread over so many separate experts."""
    found = []
    for _, row in ratios[ratios["routing"] == "mixed"].iterrows():
        values = (float(row[column]) for column in ("realised", "realised_low", "realised_high"))
        setting = f"{row['run']}, {row['tokens']:,} tokens over {experts} experts of {_active(row['active_mlp_fraction']):.0%}"
        found.append(_row("tomoe_prefill_realised", setting, *values, int(row["n"]), GOALS["tomoe_prefill_realised"]))
    return found


def mixing_results(latency: pd.DataFrame) -> list[dict[str, Any]]:
    """`random_mixing`: realised share of tokens mixed at random over that of tokens all alike, at the same active share, round by round."""
    routed = latency[latency["routing"].isin(["one expert", "mixed"])]
    pace = routed.assign(active=routed["active_mlp_fraction"].map(_active), pace=routed["ideal_share"] / routed["mlp_seconds"])
    found = []
    for active, rows in pace.groupby("active"):
        rounds = rows.pivot(index="pair", columns="routing", values="pace")
        if "mixed" in rounds:
            setting = _setting({**rows.iloc[0], "routing": "mixed over one expert", "active_mlp_fraction": active})
            found.append(result("random_mixing", setting, rounds["mixed"] / rounds["one expert"], goal=GOALS["random_mixing"]))
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as lines of text, columns aligned."""
    lines = [("name", "setting", "median", "10-90 %", "n", "goal", "")]
    for row in results:
        number = f"{row['value']:.3f}" + ("" if row["unit"] == "ratio" else f" {row['unit']}")
        mark = {None: "", True: "reached", False: "MISSED"}[row["reached"]]
        spread = f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append((row["name"], row["setting"], number, spread, str(row["n"]), row["goal"] or "-", mark))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def write(path: Path, results: Sequence[dict[str, Any]], machine: dict[str, Any], failed: dict[str, str]) -> None:
    """Write the machine, the results and what failed (measurement -> reason) to a JSON file, whole or not at all."""
    rounded = [{name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in results]
    write_json(path, {"machine": machine, "results": rounded, "failed": failed})
