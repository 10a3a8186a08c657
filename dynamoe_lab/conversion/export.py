"""A masked ToMoE model -> what it is used as: masks fixed, what they close for every token cut out (arXiv 2501.15316, export).

The function stays: the new model gives the logits of the masked one in eval mode.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, initialization

from dynamoe_lab.conversion.common import config_values, filled
from dynamoe_lab.conversion.mixtral import export_mixtral
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import (
    DEPLOYED_CLASSES,
    DEPLOYED_CONFIGS,
    LayerMasks,
    RoutedMixin,
    ToMoEDeployedMixin,
    ToMoEMixin,
    decoder_layers,
    dense_type_of,
    family_of,
)

__all__ = ["export"]

FORMS = ("tomoe", "mixtral")


def export(model: PreTrainedModel, form: str = "tomoe") -> PreTrainedModel:
    """Export a masked ToMoE model to its deployed form (arXiv 2501.15316); returns a new model in eval mode, the masked one stays as it is.

    Args:
        model: what `convert` with a `ToMoEConfig` gave, and `train` trained.
        form: "tomoe": `ToMoE<Family>ForCausalLM`, in which every expert runs on its own neurons, and queries and keys have the kept rotary
            pairs only; "mixtral": a stock `MixtralForCausalLM` with top-1 routing, for Llama and Mistral with attention="none"; experts
            are padded with zero neurons to the widest of the model, and to a multiple of 8.

    Raises:
        InputError: a model that is not a masked ToMoE model, an unknown form, or one that this model cannot take.

    Example:
        >>> dense, _ = lab.random_pair(64, 128)
        >>> masked = lab.convert(dense, lab.ToMoEConfig(num_experts=4))  # then lab.train(masked, ...)
        >>> type(masked).__name__, type(lab.export(masked)).__name__
        ('ToMoEMaskedLlamaForCausalLM', 'ToMoELlamaForCausalLM')
    """
    if form not in FORMS:
        raise InputError(f"export: form = {form!r}: choose one of {', '.join(FORMS)}")
    if isinstance(model, ToMoEDeployedMixin):
        raise InputError(f"export: {type(model).__name__} is deployed already; export the masked model that it came from")
    if not isinstance(model, ToMoEMixin):
        why = "has no masks" if isinstance(model, RoutedMixin) else "is not converted"
        raise InputError(f"export: {type(model).__name__} {why}; convert a dense model with lab.convert(model, lab.ToMoEConfig())")
    return export_mixtral(model) if form == "mixtral" else _deployed(model)


@torch.no_grad()
def _deployed(masked: PreTrainedModel) -> PreTrainedModel:
    masks = masked.layer_masks()
    model_type = dense_type_of(masked.config.model_type)
    moe = {
        **masked.config.moe,
        "union_sizes": [int(layer.experts.any(dim=0).sum()) for layer in masks],
        "qk_pairs": [_kept_pairs(layer).tolist() for layer in masks] if masked.moe.attention == "hybrid" else None,
    }
    with initialization.no_init_weights(), torch.device("meta"):  # every weight is put in below
        model = DEPLOYED_CLASSES[model_type](DEPLOYED_CONFIGS[model_type](**config_values(masked), moe=moe))
    return filled(model, masked, _weights(masked, masks))


def _kept_pairs(layer: LayerMasks) -> Tensor:
    """Indices of the rotary pairs that a layer keeps; one, with zeros for weights, where its mask closes all."""
    kept = layer.pairs.nonzero()[:, 0]
    return kept if len(kept) else kept.new_zeros(1)


def _weights(masked: PreTrainedModel, masks: list[LayerMasks]) -> dict[str, Tensor]:
    """The deployed model's weights by their names, none shared with the masked model."""
    family, attention = family_of(masked.config.model_type), masked.moe.attention
    embeddings = masked.hypernetwork()  # [M, E, S]
    changed: dict[str, Tensor] = {}
    dropped = ["hypernetwork."]
    for index, (layer, mask) in enumerate(zip(decoder_layers(masked), masks, strict=True)):
        mlp, prefix = getattr(layer, family.mlp), f"{family.layers}.{index}.{family.mlp}."
        changed |= {prefix + name: value for name, value in _mlp_weights(mlp, mask.experts).items()}
        dropped += [f"{prefix}norm.", f"{prefix}decoder."]
        if attention != "none":
            module, prefix = getattr(layer, family.attention), f"{family.layers}.{index}.{family.attention}."
            mean = embeddings[2 * index].mean(dim=0)  # rows alternate: attention, MLP
            changed |= {prefix + name: value for name, value in _attention_weights(module, mean, mask).items()}
    others = {name: value for name, value in masked.state_dict().items() if not name.startswith(tuple(dropped))}
    return {name: value.clone() for name, value in others.items() if name not in changed} | changed


def _mlp_weights(mlp: Any, experts: Tensor) -> dict[str, Tensor]:
    """Projections cut to the neurons that some expert has, and who has which: experts [E, H] bool."""
    *inputs, (down_name, down) = mlp.projections().items()
    union = experts.any(dim=0).nonzero()[:, 0]
    found = {f"{down_name}.weight": down.weight[:, union], "membership": experts[:, union].clone()}
    for name, linear in inputs:
        found[f"{name}.weight"] = linear.weight[union]
        if linear.bias is not None:
            found[f"{name}.bias"] = linear.bias[union]
    return found


def _attention_weights(attention: Any, mean: Tensor, mask: LayerMasks) -> dict[str, Tensor]:
    """The router, its bias the mean embedding [S]; the decoder's rows that are asked per token; queries and keys cut to their pairs."""
    found = {"router.bias": mean.clone()}
    if mask.pairs is None:
        return found
    width, pairs = attention.head_dim, _kept_pairs(mask)
    found["decoder.weight"] = attention.decoder.weight[:width].clone()
    dims = torch.cat((pairs, pairs + width // 2))
    for name in ("q_proj", "k_proj"):
        linear = getattr(attention, name)
        for leaf, value in linear.named_parameters():
            heads = value.unflatten(0, (-1, width))[:, dims]  # [heads, 2 pairs, ...]
            found[f"{name}.{leaf}"] = (heads if mask.pairs.any() else torch.zeros_like(heads)).flatten(0, 1)
    return found
