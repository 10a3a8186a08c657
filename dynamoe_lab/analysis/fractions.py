"""How wide the experts are, as metrics take it: the same in every layer (DynaMoE's prefixes), or by layer and expert (ToMoE's masks)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import require, whole_numbers
from dynamoe_lab.errors import InputError

__all__ = ["Fractions", "expert_count", "row_fractions"]

Fractions = Sequence[float] | np.ndarray | pd.DataFrame  # [E]; [L, E]; or layer, expert, fraction (the frame of lab.expert_fractions)


def _table(fractions: Fractions, function: str) -> np.ndarray:
    """[E], or [L, E] with NaN where a frame says nothing."""
    if isinstance(fractions, pd.DataFrame):
        require(fractions, ("layer", "expert", "fraction"), f"{function}: fractions")
        layer, expert = (whole_numbers(fractions[name], f"{function}: fractions") for name in ("layer", "expert"))
        table = np.full((layer.max() + 1, expert.max() + 1), np.nan)
        table[layer, expert] = fractions["fraction"]
        if len(fractions) != len(np.unique(layer * table.shape[1] + expert)):
            raise InputError(f"{function}: fractions: several rows for one layer and expert; pass those of one model")
        return table
    table = np.asarray(fractions, dtype=np.float64)
    if table.ndim not in (1, 2) or not table.size:
        raise InputError(f"{function}: fractions of shape {list(table.shape)}: give one per expert, [E], or per layer and expert, [L, E]")
    return table


def expert_count(fractions: Fractions, function: str) -> int:
    """Number of experts E."""
    return _table(fractions, function).shape[-1]


def row_fractions(fractions: Fractions, layer: pd.Series, expert: pd.Series, function: str) -> np.ndarray:
    """The share of its layer's MLP that each row's expert runs, [rows].

    Raises InputError, naming `function`, for a layer or expert that `fractions` does not have.
    """
    table, experts = _table(fractions, function), whole_numbers(expert, function)
    if len(experts) and experts.max() >= table.shape[-1]:
        raise InputError(f"{function}: the frame has expert {experts.max()}, counted from 0, but there are {table.shape[-1]} fractions")
    if table.ndim == 1:
        return table[experts]
    layers = whole_numbers(layer, function)
    if len(layers) and layers.max() >= len(table):
        raise InputError(f"{function}: the frame has layer {layers.max()}, counted from 0, but there are fractions of {len(table)} layers")
    values = table[layers, experts]
    if np.isnan(values).any():
        row = int(np.isnan(values).argmax())
        raise InputError(f"{function}: no fraction for layer {layers[row]}, expert {experts[row]}")
    return values
