"""Which rows of measured time are told, and by what name: the pictures and the sentences about `latency_ratios` pick the same ones."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import require

__all__ = ["growth_studies", "routed_rows", "row_near", "setting_name", "told_setting"]

SETTING = ("phase", "batch", "tokens")
GROWN = ("experts", "size", "tokens", "batch")  # what a growth study varies, in the order of the panels
PHASES = ("prefill", "decode")
PARTS = ("MLP", "router", "sorting", "attention", "head", "other")  # of a forward, as `time_parts` names them


def routed_rows(ratios: pd.DataFrame) -> pd.DataFrame:
    """The rows that are not the dense model itself."""
    return ratios[ratios["routing"] != "dense"]


def setting_name(phase: str, batch: int, tokens: int) -> str:
    """'4 × 256 tokens' of a prefill, 'batch 4, 256 tokens cached' of a decode step."""
    return f"batch {batch}, {tokens} tokens cached" if phase == "decode" else f"{batch} × {tokens} tokens"


def told_setting(ratios: pd.DataFrame, phase: str) -> pd.DataFrame:
    """The rows of the one setting of a phase that stands for it: the largest prefill, the decode step of the smallest batch."""
    rows = routed_rows(ratios)
    rows = rows[rows["phase"] == phase]
    if rows.empty:
        return rows
    by = ["batch", "tokens"] if phase == "decode" else ["work", "tokens"]
    best = rows.assign(work=rows["batch"] * rows["tokens"]).sort_values(by, ascending=[phase == "decode", False]).iloc[0]
    return rows[(rows["batch"] == best["batch"]) & (rows["tokens"] == best["tokens"])]


def row_near(rows: pd.DataFrame, routings: tuple[str, ...], share: float = 0.5) -> pd.Series | None:
    """The row nearest to an active share of the MLP, of the first of `routings` that `rows` have; None if they have none."""
    for routing in routings:
        part = rows[rows["routing"] == routing]
        if len(part):
            return part.loc[(part["active_mlp_fraction"] - share).abs().idxmin()]
    return None


def growth_studies(ratios: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What happens when one thing grows and the others stay: for each of "experts", "size", "tokens", "batch" the rows in its order.

    Args:
        ratios: the frame of `latency_ratios` with columns hidden_size, intermediate_size and experts. The others stay at the value that
            most measurements have.

    Returns:
        The axis -> its rows with columns place (0, 1, ... in the order of growth) and mark (how the value is written); an axis with fewer
        than two values is left out.
    """
    require(ratios, (*SETTING, "routing", "hidden_size", "intermediate_size", "experts"), "growth_studies")
    rows = routed_rows(ratios)
    rows = rows.assign(size=[f"{d} × {h}" for d, h in zip(rows["hidden_size"], rows["intermediate_size"], strict=True)])
    cases = rows[list(GROWN)].drop_duplicates()
    usual = {name: cases[name].mode().iloc[0] for name in GROWN}
    studies = {}
    for axis in GROWN:
        same = np.logical_and.reduce([rows[name] == usual[name] for name in GROWN if name != axis])
        part = rows[same].sort_values("intermediate_size" if axis == "size" else axis, kind="stable")
        order = {value: place for place, value in enumerate(dict.fromkeys(part[axis]))}
        if len(order) > 1:
            studies[axis] = part.assign(place=part[axis].map(order), mark=part[axis].astype(str))
    return studies
