"""What structural pruning (ToMoE) keeps, as frames: the neurons of every expert, the rotary pairs of attention; and how wide experts are.

Masks are read without noise, by the same code that evaluation and export go by.
"""

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.layer_cost import expert_neurons
from dynamoe_lab.models import RoutedMixin, family_of

__all__ = ["attention_masks", "expert_fractions", "expert_masks"]


def expert_fractions(model: PreTrainedModel) -> pd.DataFrame:
    """How much of its layer's dense MLP every expert of a converted model has, of any method.

    Returns:
        layer, expert, fraction (of the dense MLP's neurons, 0 to 1): what metrics take as their `fractions`.

    Raises:
        InputError: the model is not converted.

    Example:
        >>> _, model = lab.random_pair(64, 128, experts=(0.5, 1.0), layers=1)
        >>> lab.expert_fractions(model)
           layer  expert  fraction
        0      0       0       0.5
        1      0       1       1.0
    """
    _require(model, "expert_fractions")
    config = model.config
    neurons = getattr(config, family_of(config.model_type).intermediate_size)
    rows = [
        (layer, expert, width / neurons)
        for layer, mlp in enumerate(model.routed_mlps())
        for expert, width in enumerate(expert_neurons(mlp))
    ]
    return pd.DataFrame(rows, columns=["layer", "expert", "fraction"])


@torch.no_grad()
def expert_masks(model: PreTrainedModel, run: str = "") -> pd.DataFrame:
    """Which neurons of its layer's MLP every expert of a ToMoE model (arXiv 2501.15316) has.

    Args:
        model: in the masked form, whose neurons are the dense model's; in the deployed form they are gone where no expert has them.
        run: names the model in the table.

    Returns:
        One row per open neuron of an expert: run, layer, expert, neuron (its index in the dense MLP), neurons (of the dense MLP). An
        expert that has none has one row, with neuron -1: every layer and expert is in the frame.

    Raises:
        InputError: the model's experts are not masks, or their neurons' places in the dense model are not known.

    Example:
        >>> masked = lab.convert(lab.random_pair(64, 128, layers=1)[0], lab.ToMoEConfig(num_experts=2, mask_offset=30.0))
        >>> masks = lab.expert_masks(masked)  # so large an offset opens everything
        >>> masks.groupby(["layer", "expert"])["neuron"].agg(["count", "min", "max"])
                      count  min  max
        layer expert
        0     0         128    0  127
              1         128    0  127
    """
    _require(model, "expert_masks", masked=True)
    if not hasattr(model, "layer_masks"):
        raise InputError(
            f"expert_masks: {type(model).__name__} does not know which of the dense model's neurons it kept; give the masked model"
        )
    parts = []
    for layer, masks in enumerate(model.layer_masks()):
        opened = masks.experts.cpu().numpy()
        expert, neuron = opened.nonzero()
        empty = np.flatnonzero(~opened.any(axis=1))
        columns = {"expert": np.append(expert, empty), "neuron": np.append(neuron, np.full(len(empty), -1))}
        parts.append(pd.DataFrame({"layer": layer, **columns, "neurons": opened.shape[1]}).sort_values("expert", kind="stable"))
    frame = pd.concat(parts, ignore_index=True)
    frame.insert(0, "run", run)
    return frame


@torch.no_grad()
def attention_masks(model: PreTrainedModel, run: str = "") -> pd.DataFrame:
    """Which rotary pairs of queries and keys each layer of a ToMoE model (arXiv 2501.15316) keeps, the same for all heads and tokens.

    Returns:
        One row per pair: run, layer, pair (dimensions i and i + d_h / 2 of a head), open (bool). No rows where no mask holds for a whole
        layer: attention "none" leaves all pairs, "dynamic" decides for every token.

    Raises:
        InputError: the model is no ToMoE model.

    Example:
        >>> masked = lab.convert(lab.random_pair(64, 128, layers=1)[0], lab.ToMoEConfig(num_experts=2, mask_offset=30.0))
        >>> pairs = lab.attention_masks(masked)  # so large an offset opens everything
        >>> len(pairs), bool(pairs["open"].all())  # one head of 64 dimensions
        (32, True)
    """
    _require(model, "attention_masks", masked=True)
    if hasattr(model, "layer_masks"):
        kept = [None if layer.pairs is None else layer.pairs.cpu().numpy() for layer in model.layer_masks()]
    else:
        kept = _kept_pairs(model)
    parts = [
        pd.DataFrame({"layer": layer, "pair": range(len(pairs)), "open": pairs}) for layer, pairs in enumerate(kept) if pairs is not None
    ]
    empty = pd.DataFrame({"layer": np.empty(0, int), "pair": np.empty(0, int), "open": np.empty(0, bool)})
    frame = pd.concat(parts, ignore_index=True) if parts else empty
    frame.insert(0, "run", run)
    return frame


def _kept_pairs(model: PreTrainedModel) -> list[np.ndarray | None]:
    """Of a deployed model, whose config says what every layer kept: [d_h / 2] bool each, None where all pairs are there."""
    lists = model.config.moe.get("qk_pairs")
    if lists is None:
        return [None] * model.config.num_hidden_layers
    found = []
    for attention, pairs in zip(model.pruned_attentions(), lists, strict=True):
        kept = np.isin(np.arange(attention.head_dim // 2), pairs)
        found.append(kept & bool(attention.q_proj.weight.any()))  # a layer without any keeps one, of zeros
    return found


def _require(model: PreTrainedModel, function: str, *, masked: bool = False) -> None:
    if not isinstance(model, RoutedMixin):
        raise InputError(f"{function}: {type(model).__name__} has no experts; convert it first with lab.convert")
    if masked and model.method != "tomoe":
        raise InputError(f"{function}: the experts of {type(model).__name__} are not masks; convert with a lab.ToMoEConfig")
