"""A routing frame counted once, by document, layer, label and expert; every routing metric starts here."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import ALL, require, whole_numbers
from dynamoe_lab.errors import InputError

__all__ = ["Tally", "layer_names", "tallies", "with_all"]


class Tally(NamedTuple):
    """One run, counted."""

    run: str
    domain: str
    layers: np.ndarray  # (L,) layer numbers
    joint: np.ndarray  # (documents, L, E, E) tokens by label and expert
    rows: pd.DataFrame  # codes of each row: document, layer, label, expert (int64)


def tallies(
    routing: pd.DataFrame,
    experts: int | None,
    function: str,
    *,
    by_domain: bool = False,
    also: Sequence[str] = (),
) -> Iterator[Tally]:
    """Counts of each run (and domain); E is `experts`, or the highest label or expert plus one."""
    require(routing, ("run", "domain", "document", "layer", "label", "expert", *also), function)
    codes = {name: whole_numbers(routing[name], function) for name in ("layer", "label", "expert", *also)}
    highest = int(max(codes["label"].max(), codes["expert"].max())) + 1
    experts = highest if experts is None else experts
    if highest > experts:
        raise InputError(f"{function}: expert or label {highest - 1} (counted from 0) in the frame, but experts = {experts}")
    rows = pd.DataFrame({"domain": routing["domain"].to_numpy(), "run": routing["run"].to_numpy(), **codes})
    # a document belongs to one domain; numbering may start anew in each
    rows["document"] = routing["document"].to_numpy()
    rows["document"] = rows.groupby(["domain", "document"], dropna=False).ngroup()
    keys = ["run", "domain"] if by_domain else ["run"]
    for names, part in rows.groupby(keys, sort=False, dropna=False):
        part = part.drop(columns=["run", "domain"])
        part["document"] = pd.factorize(part["document"], sort=True)[0]
        layer, layers = pd.factorize(part["layer"], sort=True)
        part["layer"] = layer
        shape = (int(part["document"].max()) + 1, len(layers), experts, experts)
        cells = np.ravel_multi_index([part[name].to_numpy() for name in ("document", "layer", "label", "expert")], shape)
        joint = np.bincount(cells, minlength=int(np.prod(shape))).reshape(shape)
        yield Tally(names[0], names[1] if by_domain else ALL, np.asarray(layers), joint, part)


def with_all(counts: np.ndarray, axis: int) -> np.ndarray:
    """Counts with one more entry along the layer `axis`: the sum over layers."""
    return np.concatenate([counts, counts.sum(axis=axis, keepdims=True)], axis=axis)


def layer_names(layers: np.ndarray) -> list:
    """What the entries of `with_all` are called: the layer numbers, then "all"."""
    return [*map(int, layers), ALL]
