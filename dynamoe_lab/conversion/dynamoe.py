"""Dense -> DynaMoE: order every MLP's neurons by importance, then let prefixes be experts (arXiv 2502.12325).

Reordering permutes the rows (and biases) of gate and up and the columns of down, so the function stays; the dense model is left untouched.
"""

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, initialization

from dynamoe_lab.conversion.statistics import calibrate, importance
from dynamoe_lab.data import Blocks
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import CONFIG_CLASSES, MODEL_CLASSES, DynaMoEConfig, decoder_layers, family_of

__all__ = ["convert", "convert_dynamoe", "reorder"]


def convert(
    dense: PreTrainedModel,
    config: DynaMoEConfig | None = None,
    *,
    calibration: Blocks | Tensor | None = None,
    statistics: pd.DataFrame | None = None,
) -> PreTrainedModel:
    """Convert a dense causal language model; returns a new model in eval mode, the dense one stays as it is.

    Args:
        dense: a model of a family in `dynamoe_lab.models.FAMILIES`.
        config: the method and its settings; None: `DynaMoEConfig()`.
        calibration: blocks [n, T] for the calibration pass (the paper: 0.004 % of the training tokens), or
        statistics: the frame of `calibrate` on this model, so that several settings share one pass.

    Raises:
        InputError: not a transformers model, an unsupported family, a model that is converted already, sizes that collapse, no calibration.
    """
    config = DynaMoEConfig() if config is None else config
    if not isinstance(config, DynaMoEConfig):
        raise InputError(f"convert: {type(config).__name__} is not a method's config; give a DynaMoEConfig")
    return convert_dynamoe(dense, config, calibration=calibration, statistics=statistics)


def convert_dynamoe(
    dense: PreTrainedModel,
    config: DynaMoEConfig,
    *,
    calibration: Blocks | Tensor | None = None,
    statistics: pd.DataFrame | None = None,
) -> PreTrainedModel:
    """`convert` for a `DynaMoEConfig`."""
    if not isinstance(dense, PreTrainedModel):
        raise InputError(f"convert: expected a transformers model, got {type(dense).__name__}; load one with lab.load_model")
    model_type = dense.config.model_type
    if getattr(dense.config, "moe", None):
        raise InputError(f"convert: this model is a converted one already ({model_type}); start from its dense parent")
    try:
        family = family_of(model_type)
    except ValueError as error:
        raise InputError(f"convert: {error}") from error
    if not isinstance(dense, family.causal_lm):
        raise InputError(f"convert: {type(dense).__name__} has no language model head; load it as {family.causal_lm.__name__}")
    if getattr(dense.config, "quantization_config", None) is not None:
        raise InputError("convert: this model is quantized; load it in float32, bfloat16 or float16 (its MLP rows have to be permuted)")
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

    model = _with_weights_of(dense, config, calibration_tokens=int(statistics["tokens"].iloc[0]))
    reorder(model, order)
    for mlp in model.nested_mlps():
        for frozen in (mlp.frozen or {}).values():
            frozen.remember()
    _fresh_routers(model, config)
    return model.eval()


def _with_weights_of(dense: PreTrainedModel, config: DynaMoEConfig, *, calibration_tokens: int) -> PreTrainedModel:
    """A converted model of the same family holding a copy of the dense weights in their order."""
    model_type = dense.config.model_type
    values = dense.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path"):
        values.pop(name, None)
    moe = {**config.to_dict(), "base": _name_of(dense), "calibration_tokens": calibration_tokens, "trained_tokens": 0}
    with initialization.no_init_weights():  # every weight is copied below, routers are drawn after
        model = MODEL_CLASSES[model_type](CONFIG_CLASSES[model_type](**values, moe=moe))
    model = model.to(device=dense.device, dtype=dense.dtype)
    for name, buffer in dense.named_buffers():  # rotary frequencies and the like stay float32 in a half-precision model
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.clone())
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    ours = (".router.", ".frozen.")
    strangers = [name for name in loaded.missing_keys if not any(part in name for part in ours)] + loaded.unexpected_keys
    if strangers:
        raise InputError(f"convert: the {model_type} model has weights that its family does not know: {', '.join(strangers[:3])}")
    model.tie_weights()
    model.lay_out()
    model.generation_config = dense.generation_config
    model.config._attn_implementation = dense.config._attn_implementation
    return model


def _name_of(dense: PreTrainedModel) -> str:
    """What to call the base model in the checkpoint: the name it was asked for by, never a path of this machine."""
    name = getattr(dense.config, "_name_or_path", "") or ""
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else name


@torch.no_grad()
def reorder(model: PreTrainedModel, order: Tensor) -> None:
    """Permute the MLP neurons of every layer in place, frozen copies too; the model's function stays.

    Args:
        model: dense or converted model.
        order: [L, H] int64; neuron `order[l, k]` of layer l becomes its k-th.
    """
    family = family_of(model.config.model_type)
    for layer, permutation in zip(decoder_layers(model), order, strict=True):
        holder = family.holder(layer)
        frozen = getattr(family.nested(layer), "frozen", None) or {}
        for name in family.projections:
            for linear in (getattr(holder, name), *([frozen[name]] if frozen else [])):
                indices = permutation.to(linear.weight.device)
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
