"""Dense -> DynaMoE: order every MLP's neurons by importance, then let prefixes be experts (arXiv 2502.12325).

Reordering permutes the rows (and biases) of gate and up and the columns of down, so the function stays; the dense model is left untouched.
"""

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamoe_lab.conversion.common import check_dense, check_function, with_weights_of
from dynamoe_lab.conversion.statistics import calibrate, importance
from dynamoe_lab.data import Blocks
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import CONFIG_CLASSES, MODEL_CLASSES, DynaMoEConfig, decoder_layers, family_of

__all__ = ["convert_dynamoe", "reorder"]


def convert_dynamoe(
    dense: PreTrainedModel,
    config: DynaMoEConfig,
    *,
    calibration: Blocks | Tensor | None = None,
    statistics: pd.DataFrame | None = None,
) -> PreTrainedModel:
    """`convert` for a `DynaMoEConfig`: neurons are ordered by importance, routers are fresh."""
    family = check_dense(dense, why_whole="its MLP rows have to be permuted")
    model_type = dense.config.model_type
    try:
        config.sizes(getattr(dense.config, family.intermediate_size))
    except ValueError as error:
        raise InputError(f"convert: {error}") from error
    if getattr(dense.config, "layerdrop", 0):
        raise InputError(
            "convert: this model skips layers at random in training, so that a router may see no token; set config.layerdrop = 0"
        )
    if statistics is None:
        if calibration is None:
            raise InputError("convert: importance needs text; pass calibration=lab.load_blocks(..., split='calibration')")
        statistics = calibrate(dense, calibration)
    scores = importance(statistics, config.importance, seed=config.importance_seed)  # [L, H]
    width = getattr(dense.config, family.intermediate_size)
    if scores.shape != (len(decoder_layers(dense)), width):
        raise InputError(
            f"convert: these statistics are of {scores.shape[0]} layers of {scores.shape[1]} neurons, the model has "
            f"{len(decoder_layers(dense))} of {width}; calibrate this model"
        )
    order = scores.argsort(dim=1, descending=True, stable=True)

    moe = {**config.to_dict(), "calibration_tokens": int(statistics["tokens"].iloc[0])}
    model = with_weights_of(dense, MODEL_CLASSES[model_type], CONFIG_CLASSES[model_type], moe, (".router.", ".frozen."))
    model.lay_out()
    reorder(model, order)
    for mlp in model.nested_mlps():
        for frozen in (mlp.frozen or {}).values():
            frozen.remember()
    _fresh_routers(model, config)
    model.eval().set_routing("full")
    check_function(dense, model, "at full width")
    model.set_routing("router")
    return model


@torch.no_grad()
def reorder(model: PreTrainedModel, order: Tensor) -> None:
    """Permute the MLP neurons of every layer in place, frozen copies too; the model's function stays.

    Args:
        model: dense or converted model.
        order: [L, H] int64; neuron `order[l, k]` of layer l becomes its k-th.

    Raises InputError: a projection with more or fewer neurons.
    """
    family = family_of(model.config.model_type)
    for layer, permutation in zip(decoder_layers(model), order, strict=True):
        holder = family.holder(layer)
        frozen = getattr(family.nested(layer), "frozen", None) or {}
        for name in family.projections:
            for linear in (getattr(holder, name), *([frozen[name]] if frozen else [])):
                indices = permutation.to(linear.weight.device)
                rows, columns = linear.weight.shape
                if (neurons := columns if name == family.down else rows) != len(indices):
                    raise InputError(
                        f"convert: {name} has {neurons} neurons, not {len(indices)}: a projection that holds several cannot be nested"
                    )
                if name == family.down:
                    linear.weight.copy_(linear.weight[:, indices])
                    continue
                linear.weight.copy_(linear.weight[indices])
                if linear.bias is not None:
                    linear.bias.copy_(linear.bias[indices])


@torch.no_grad()
def _fresh_routers(model: PreTrainedModel, config: DynaMoEConfig) -> None:
    generator = torch.Generator().manual_seed(config.router_seed)
    for mlp in model.nested_mlps():
        for parameter in mlp.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * config.router_init_std)
