"""What structural pruning kept: how experts divide a layer's neurons, what attention keeps, and whether two runs found the same.

A share of neurons, or an overlap of two masks, means nothing alone: wide masks overlap whatever they hold. Beside each therefore stands
what masks of the same widths give by chance.
"""

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from dynamoe_lab.analysis.frames import ALL, one_run, require, whole_numbers
from dynamoe_lab.errors import InputError

__all__ = ["attention_open", "mask_jaccard", "mask_union"]

_MASKS = ("run", "layer", "expert", "neuron", "neurons")
_PAIRS = ("run", "layer", "pair", "open")


def mask_union(masks: pd.DataFrame, *, experts: int) -> pd.DataFrame:
    """How many experts each neuron is in; the share in at least one is the union coverage of ToMoE (arXiv 2501.15316).

    Args:
        masks: run, layer, expert, neuron, neurons: a row per open neuron of an expert, one run (the frame of `lab.expert_masks`, where
            an expert without any has one row, with neuron -1).
        experts: number of experts E.

    Returns:
        run, layer (also "all": the mean over neurons of all layers), count (0 to E), share (of the layer's neurons that are in so many
        experts), chance (the same, were every expert's neurons drawn independently, as many as it has), neurons.

    Raises:
        InputError: a column is missing, the frame holds several runs, or an expert or neuron is beyond E or the layer's neurons.

    Example:
        >>> masks = pd.DataFrame({"run": "a", "layer": 0, "expert": [0, 0, 1, 1], "neuron": [0, 1, 0, 1], "neurons": 4})
        >>> union = lab.mask_union(masks, experts=2)  # both hold neurons 0 and 1
        >>> union.loc[union["layer"] == "all", ["count", "share", "chance"]]
           count  share  chance
        3      0    0.5    0.25
        4      1    0.0    0.50
        5      2    0.5    0.25
    """
    require(masks, _MASKS, "mask_union")
    one_run(masks, "mask_union")
    tables = _expert_tables(masks, experts, "mask_union")
    run, sizes = str(masks["run"].iloc[0]), np.array([table.shape[1] for table in tables])
    shares = np.stack([np.bincount(table.sum(axis=0), minlength=experts + 1) / table.shape[1] for table in tables])  # (L, E + 1)
    chances = np.stack([_independent(table.mean(axis=1)) for table in tables])
    parts = []
    for layer, share, chance, size in [
        *zip(range(len(tables)), shares, chances, sizes, strict=True),
        (ALL, sizes @ shares / sizes.sum(), sizes @ chances / sizes.sum(), sizes.sum()),
    ]:
        columns = {"run": run, "layer": layer, "count": range(experts + 1), "share": share, "chance": chance, "neurons": size}
        parts.append(pd.DataFrame(columns).astype({"layer": object}))
    return pd.concat(parts, ignore_index=True)


def attention_open(pairs: pd.DataFrame | None, routing: pd.DataFrame) -> pd.DataFrame:
    """What is left of attention, by layer: rotary pairs of queries and keys, and dims of values and outputs that are open for a token.

    Args:
        pairs: run, layer, pair, open (the frame of `lab.attention_masks`); None or without rows: no pair is masked.
        routing: run, layer, open_values, a row per token and layer, one run (the frame of `lab.trace_routing`).

    Returns:
        run, layer (also "all": the mean over layers), pairs_kept (share; nan where none is masked), values_open (mean share over tokens),
        values_low, values_high (10 and 90 % quantiles over tokens; of "all" nan), tokens.

    Raises:
        InputError: a column is missing, or a frame holds several runs.

    Example:
        >>> pairs = pd.DataFrame({"run": "a", "layer": 0, "pair": range(4), "open": [True, True, True, False]})
        >>> routing = pd.DataFrame({"run": "a", "layer": 0, "open_values": [0.5, 1.0]})
        >>> lab.attention_open(pairs, routing)[["layer", "pairs_kept", "values_open", "tokens"]]
          layer  pairs_kept  values_open  tokens
        0     0        0.75         0.75       2
        1   all        0.75         0.75       2
    """
    require(routing, ("run", "layer", "open_values"), "attention_open")
    one_run(routing, "attention_open")
    layer = pd.Series(whole_numbers(routing["layer"], "attention_open"), name="layer")
    values = routing["open_values"].reset_index(drop=True).astype(np.float64).groupby(layer)
    frame = pd.DataFrame({"values_open": values.mean(), "values_low": values.quantile(0.1), "values_high": values.quantile(0.9)})
    frame = frame.assign(tokens=values.size(), pairs_kept=np.nan)
    if pairs is not None and len(pairs):
        require(pairs, _PAIRS, "attention_open: pairs")
        one_run(pairs, "attention_open: pairs")
        kept = pairs["open"].astype(bool).groupby(whole_numbers(pairs["layer"], "attention_open: pairs")).mean()
        frame["pairs_kept"] = kept.reindex(frame.index)
    frame = frame.reset_index().astype({"layer": object})
    pooled = frame[["pairs_kept", "values_open"]].mean().to_dict() | {"tokens": frame["tokens"].sum(), "layer": ALL}
    whole = pd.concat([frame, pd.DataFrame([pooled])], ignore_index=True)
    whole.insert(0, "run", str(routing["run"].iloc[0]))
    return whole[["run", "layer", "pairs_kept", "values_open", "values_low", "values_high", "tokens"]]


def mask_jaccard(
    masks_a: pd.DataFrame,
    masks_b: pd.DataFrame,
    *,
    experts: int | None = None,
    draws: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Did two runs keep the same? Jaccard index of their masks, layer by layer, beside chance.

    Which expert is which is arbitrary, so that the experts of a layer are matched one to one by the assignment with the highest mean
    Jaccard index. By chance the neurons of `masks_b` are renumbered at random, the same for all experts of a layer: masks of the same
    widths and with the same overlaps among themselves that know nothing of `masks_a`; they are matched, too.

    Args:
        masks_a, masks_b: one run each: frames of `lab.expert_masks`, or both of `lab.attention_masks` (one mask a layer, nothing to match).
        experts: number of experts E; None: the highest expert in either frame.
        draws: random renumberings of each layer.
        confidence: of the band of chance.
        seed: of the renumberings.

    Returns:
        run_a, run_b, part ("mlp" or "attention"), layer (also "all": the mean over layers), jaccard (mean over matched experts; 1 where
        both masks are empty), chance (mean over draws), chance_low, chance_high (the band that holds `confidence` of the draws), width_a,
        width_b (mean share open), elements (neurons or pairs a mask can hold), draws.

    Raises:
        InputError: the frames are of different kinds, or of models of different shapes.

    Example:
        >>> first = pd.DataFrame({"run": "a", "layer": 0, "expert": [0, 0, 1, 1], "neuron": [0, 1, 2, 3], "neurons": 4})
        >>> second = first.assign(run="b", expert=[1, 1, 0, 0])  # the same experts, numbered the other way round
        >>> lab.mask_jaccard(first, second)[["layer", "jaccard", "width_a", "width_b"]]
          layer  jaccard  width_a  width_b
        0     0      1.0      0.5      0.5
        1   all      1.0      0.5      0.5
    """
    if draws < 1:
        raise InputError(f"mask_jaccard: draws = {draws}, give a whole number of at least 1")
    part = "attention" if "pair" in getattr(masks_a, "columns", ()) else "mlp"
    for name, frame in (("masks_a", masks_a), ("masks_b", masks_b)):
        require(frame, _PAIRS if part == "attention" else _MASKS, f"mask_jaccard: {name}")
        one_run(frame, f"mask_jaccard: {name}")
    if part == "attention":
        first, second = (_pair_tables(frame) for frame in (masks_a, masks_b))
    else:
        highest = max(int(whole_numbers(frame["expert"], "mask_jaccard").max()) for frame in (masks_a, masks_b))
        first, second = (_expert_tables(frame, experts or highest + 1, "mask_jaccard") for frame in (masks_a, masks_b))
    if [table.shape for table in first] != [table.shape for table in second]:
        shapes = [f"{len(tables)} layers of {tables[0].shape[1]}" for tables in (first, second)]
        raise InputError(f"mask_jaccard: masks of different models cannot be compared: {shapes[0]} and {shapes[1]} elements")
    rng = np.random.default_rng(seed)
    found = np.array([_matched(*pair) for pair in zip(first, second, strict=True)])  # (L,)
    chance = np.array(
        [[_matched(one, two[:, rng.permutation(two.shape[1])]) for _ in range(draws)] for one, two in zip(first, second, strict=True)]
    )  # (L, draws)
    widths = [np.array([table.mean() for table in tables]) for tables in (first, second)]
    found, chance, *widths = (np.concatenate([values, values.mean(axis=0, keepdims=True)]) for values in (found, chance, *widths))
    low, high = np.quantile(chance, [(1 - confidence) / 2, (1 + confidence) / 2], axis=1)
    columns = {"run_a": str(masks_a["run"].iloc[0]), "run_b": str(masks_b["run"].iloc[0]), "part": part}
    columns |= {"layer": [*range(len(first)), ALL], "jaccard": found, "chance": chance.mean(axis=1), "chance_low": low, "chance_high": high}
    sample = {"width_a": widths[0], "width_b": widths[1], "elements": first[0].shape[1], "draws": draws}
    return pd.DataFrame({**columns, **sample})


def _expert_tables(masks: pd.DataFrame, experts: int, function: str) -> list[np.ndarray]:
    """Per layer [E, H] bool; an expert whose only row has neuron -1, or that has none, has nothing open."""
    layer, expert, neurons = (whole_numbers(masks[name], function) for name in ("layer", "expert", "neurons"))
    neuron = whole_numbers(masks["neuron"], function, least=-1)
    if expert.max() >= experts:
        raise InputError(f"{function}: the frame has expert {expert.max()}, counted from 0, but experts = {experts}")
    if (neuron >= neurons).any():
        raise InputError(
            f"{function}: the frame has neuron {neuron.max()}, counted from 0, in a layer of {neurons[neuron.argmax()]} neurons"
        )
    sizes = np.full(layer.max() + 1, neurons.max())
    sizes[layer] = neurons
    tables = [np.zeros((experts, size), dtype=bool) for size in sizes]
    for number, table in enumerate(tables):
        rows = (layer == number) & (neuron >= 0)
        table[expert[rows], neuron[rows]] = True
    return tables


def _pair_tables(pairs: pd.DataFrame) -> list[np.ndarray]:
    """Per layer [1, pairs] bool."""
    layer, pair = (whole_numbers(pairs[name], "mask_jaccard") for name in ("layer", "pair"))
    table = np.zeros((layer.max() + 1, pair.max() + 1), dtype=bool)
    table[layer, pair] = pairs["open"].to_numpy(dtype=bool)
    return list(table[:, None, :])


def _independent(widths: np.ndarray) -> np.ndarray:
    """Distribution of how many of independent events with probabilities `widths` [E] happen, [E + 1]."""
    counts = np.ones(1)
    for width in widths:
        counts = np.convolve(counts, (1 - width, width))
    return counts


def _matched(first: np.ndarray, second: np.ndarray) -> float:
    """Mean Jaccard index of the masks [E, H] of two layers, matched one to one for the highest."""
    one, two = first.astype(np.float32), second.astype(np.float32)
    both = one @ two.T  # (E, E); exact, for float32 counts to 16 million
    either = one.sum(axis=1)[:, None] + two.sum(axis=1)[None, :] - both
    index = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return float(index[linear_sum_assignment(index, maximize=True)].mean())
