"""One calibration pass: which neurons matter, by every importance formula at once.

Forward hooks on the down projections of the *dense* model see each neuron's activation h_j and the MLP's output, so all importance
formulas, and all settings of a conversion, share one forward, whose frame is kept. Sums are float64. Position 0 is an attention sink that
can hold nearly all of a layer's squared sum; `l2_down_tokennorm` divides a token's activations by the norm of its MLP output first, so
that no token speaks for the layer.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamoe_lab.data import Blocks, require_blocks
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import decoder_layers, family_of

__all__ = ["FORMULAS", "calibrate", "importance", "importance_table"]

SUMS = ("squares", "absolutes", "normalised_squares", "down_norm")
FORMULAS = ("l2_down", "l2_down_tokennorm", "l2", "abs", "random")


@torch.no_grad()
def calibrate(dense: PreTrainedModel, calibration: Blocks | Tensor, *, batch_size: int = 8) -> pd.DataFrame:
    """Run calibration blocks [n, T] through a dense model once and collect activation statistics of every layer's MLP.

    What arXiv 2502.12325 orders neurons by; its calibration takes 0.004 % of the training tokens. `batch_size`: blocks of a forward.

    Returns:
        One row per layer and neuron, in order: layer, neuron, squares (sum over tokens of h_tj^2), absolutes (sum of |h_tj|),
        normalised_squares (sum of (h_tj / ||MLP(x_t)||)^2), down_norm (||W_down[:, j]||), all float64; tokens (that were seen).

    Raises InputError if activations are not finite (a broken checkpoint), there are no blocks, or the model is converted already.

    Example:
        >>> dense, _ = lab.random_pair(64, 128, layers=2)
        >>> statistics = lab.calibrate(dense, torch.arange(64).view(2, 32))
        >>> statistics.shape, statistics["tokens"].unique().tolist()  # a row per layer and neuron
        ((256, 7), [64])
    """
    blocks = require_blocks(calibration, "calibrate", model=dense, batch_size=batch_size)
    if getattr(dense.config, "moe", None):
        raise InputError("calibrate: this model is a converted one already; statistics come from its dense parent")
    try:
        family = family_of(dense.config.model_type)
    except ValueError as error:
        raise InputError(f"calibrate: {error}") from error
    downs = [getattr(family.holder(layer), family.down) for layer in decoder_layers(dense)]
    shape = (len(downs), downs[0].in_features)
    squares, absolutes, normalised = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))

    def hook(layer: int):
        def accumulate(module, inputs, output):
            hidden = inputs[0].reshape(-1, shape[1]).float()  # [N, H]
            norms = output.reshape(-1, output.shape[-1]).float().norm(dim=-1, keepdim=True)  # [N, 1]
            squared = hidden.square()
            squares[layer] += squared.sum(0).double().cpu()
            absolutes[layer] += hidden.abs().sum(0).double().cpu()
            normalised[layer] += (squared / norms.square().clamp_min(1e-12)).sum(0).double().cpu()

        return accumulate

    was_training = dense.training
    dense.eval()
    handles = [down.register_forward_hook(hook(layer)) for layer, down in enumerate(downs)]
    try:
        for start in range(0, len(blocks), batch_size):
            ids = blocks.ids[start : start + batch_size].to(dense.device)
            dense(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
        dense.train(was_training)
    if not bool(torch.isfinite(squares).all()):
        layer = int((~torch.isfinite(squares)).any(dim=1).nonzero()[0])
        raise InputError(f"calibration: activations of layer {layer} are not finite; check the checkpoint and its dtype")
    down_norms = torch.stack([down.weight.float().norm(dim=0).double().cpu() for down in downs])
    layers, neurons = shape
    columns = zip(SUMS, (squares, absolutes, normalised, down_norms), strict=True)
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), neurons),
            "neuron": np.tile(np.arange(neurons), layers),
            **{name: values.flatten().numpy() for name, values in columns},
            "tokens": blocks.ids.numel(),
        }
    )


def importance(statistics: pd.DataFrame, formula: str, *, seed: int = 0) -> Tensor:
    """Importance of every neuron, [L, H] float64, larger matters more. arXiv 2502.12325 leaves the formula open.

    `l2_down`: sqrt(sum h_j^2) * ||W_down[:, j]||; `l2_down_tokennorm`: the same with each token's activations divided by the norm of its
    MLP output; `l2`: sqrt(sum h_j^2); `abs`: sum |h_j|; `random`: uniform numbers from `seed`, the control. `statistics` is the frame of
    `calibrate`.
    """
    if missing := [name for name in ("layer", *SUMS) if name not in statistics]:
        raise InputError(f"importance: the statistics lack {', '.join(missing)}; give the frame of lab.calibrate")
    layers = int(statistics["layer"].max()) + 1
    squares, absolutes, normalised, down_norm = (torch.from_numpy(statistics[name].to_numpy().reshape(layers, -1).copy()) for name in SUMS)
    if formula == "l2_down":
        return squares.sqrt() * down_norm
    if formula == "l2_down_tokennorm":
        return normalised.sqrt() * down_norm
    if formula == "l2":
        return squares.sqrt()
    if formula == "abs":
        return absolutes
    if formula == "random":
        return torch.rand(squares.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raise InputError(f"importance {formula!r}: choose one of {', '.join(FORMULAS)}")


def importance_table(statistics: pd.DataFrame, *, formulas: tuple[str, ...] = FORMULAS[:-1]) -> pd.DataFrame:
    """Importance of a dense model's neurons in order, by several formulas from the frame of one `calibrate`.

    Args:
        statistics: the frame of `calibrate`.
        formulas: of `FORMULAS`.

    Returns:
        formula, layer, rank (0 = most important neuron of its layer), value. `random` is left out unless asked for: sorted
    random numbers have a curve, too, but it says nothing about the model.

    Raises:
        InputError: an unknown formula, or a frame that is not of `calibrate`.

    Example:
        >>> statistics = pd.DataFrame({"layer": 0, "neuron": [0, 1], "squares": [1.0, 9.0], "down_norm": [1.0, 2.0]})
        >>> statistics = statistics.assign(absolutes=[1.0, 3.0], normalised_squares=[1.0, 1.0])
        >>> lab.importance_table(statistics, formulas=("l2", "l2_down"))
           formula  layer  rank  value
        0       l2      0     0    3.0
        1       l2      0     1    1.0
        2  l2_down      0     0    6.0
        3  l2_down      0     1    1.0
    """
    frames = []
    for formula in formulas:
        values = importance(statistics, formula).sort(dim=1, descending=True).values  # [L, H]
        layers, neurons = values.shape
        frames.append(
            pd.DataFrame(
                {
                    "formula": formula,
                    "layer": np.repeat(np.arange(layers), neurons),
                    "rank": np.tile(np.arange(neurons), layers),
                    "value": values.flatten().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
