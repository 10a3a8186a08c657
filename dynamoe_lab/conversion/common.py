"""What conversions share: a dense model that they can take, a copy of its weights in the converted class, and how an export is filled."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from dynamoe_lab.errors import InputError
from dynamoe_lab.models import Family, family_of

__all__ = ["check_dense", "check_function", "config_values", "filled", "probe", "with_weights_of"]

# Of a config: what its class and its place say, which are others in the model that is made from it.
_OWN = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path", "moe")

_PRECISION = {torch.float64: 1e-3, torch.float32: 1e-3}  # of logits, beside the largest; half precisions: 0.1


def check_dense(dense: PreTrainedModel, *, why_whole: str) -> Family:
    """The family of a dense causal language model that can be converted.

    Args:
        dense: what was given to `convert`.
        why_whole: what the method needs unquantized weights for, said to who gives quantized ones.

    Raises InputError: not a transformers model, an unsupported family, no language model head, converted already, quantized.
    """
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
        raise InputError(f"convert: this model is quantized; load it in float32, bfloat16 or float16 ({why_whole})")
    return family


def probe(dense: PreTrainedModel) -> Tensor:
    """A few tokens that a model knows, [2, 16] int64, the same every time."""
    known = dense.get_input_embeddings().num_embeddings
    return torch.randint(known, (2, 16), generator=torch.Generator().manual_seed(0)).to(dense.device)


@torch.no_grad()
def check_function(dense: PreTrainedModel, model: PreTrainedModel, what: str = "with everything open") -> None:
    """Refuse a converted model that is another function than its dense parent where it has to be the same one.

    A row of the family table that is not true of this model shows nowhere else: shapes fit, numbers come out. A few tokens tell; weights
    on the meta device have no function.

    Args:
        dense: in whatever mode, which it keeps.
        model: the converted model, under a routing that leaves nothing out.
        what: of the model, for the message.

    Raises:
        InputError: logits differ by more than the precision of the weights explains.
    """
    if any(parameter.is_meta for parameter in dense.parameters()):
        return
    modes = [(module, module.training) for module in dense.modules()]
    dense.eval()
    try:
        expected, found = (each(input_ids=probe(dense), use_cache=False).logits.float() for each in (dense, model))
    finally:
        for module, training in modes:
            module.training = training
    change, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if change > _PRECISION.get(dense.dtype, 0.1) * scale:  # not of weights that are no numbers: loading refuses those
        raise InputError(
            f"convert: {what} the converted model is not the {dense.config.model_type} model: logits differ by {change:.3g} where the "
            f"largest is {scale:.3g}; its row of FAMILIES does not fit, see docs/extending.md"
        )


def config_values(model: PreTrainedModel) -> dict[str, Any]:
    """What another class of the same family takes over from a model's config: shapes and settings, `moe` aside."""
    return {name: value for name, value in model.config.to_dict().items() if name not in _OWN}


def with_weights_of(
    dense: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config_class: type[PreTrainedConfig],
    moe: dict[str, Any],
    ours: tuple[str, ...],
) -> PreTrainedModel:
    """A converted model of the same family holding a copy of the dense weights in their order.

    Args:
        dense: a model that `check_dense` let pass.
        model_class: the converted class, whose weights have the family's names but for the method's own.
        config_class: its config.
        moe: the method's settings; where the model came from (`base`, `trained_tokens`) is added.
        ours: parts of the names of the method's own weights, which are left as they come (empty) for the caller to fill.
    """
    model_type = dense.config.model_type
    values = config_values(dense)
    moe = {**moe, "base": _name_of(dense), "trained_tokens": 0}
    with initialization.no_init_weights():  # every weight is copied below or filled by the caller
        model = model_class(config_class(**values, moe=moe))
    model = model.to(device=dense.device, dtype=dense.dtype)
    for name, buffer in dense.named_buffers():  # rotary frequencies and the like stay float32 in a half-precision model
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.clone())
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    strangers = [name for name in loaded.missing_keys if not any(part in f".{name}" for part in ours)] + loaded.unexpected_keys
    if strangers:
        raise InputError(f"convert: the {model_type} model has weights that its family does not know: {', '.join(strangers[:3])}")
    model.tie_weights()
    model.generation_config = copy.deepcopy(dense.generation_config)
    model.config._attn_implementation = dense.config._attn_implementation
    return model


def filled(model: PreTrainedModel, source: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """An exported model, made on the meta device, with its weights, and buffers and settings of the model that it comes from; in eval mode.

    Raises InputError if the weights are not exactly those that the model has.
    """
    buffers = dict(source.named_buffers())
    for name, _ in list(model.named_non_persistent_buffers()):  # rotary frequencies and the like
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffers[name].clone())
    loaded = model.load_state_dict(weights, strict=False, assign=True)
    if strangers := loaded.missing_keys + loaded.unexpected_keys:
        raise InputError(f"export: {type(source).__name__} has other weights than {type(model).__name__}: {', '.join(strangers[:3])}")
    model.tie_weights()
    model.generation_config = copy.deepcopy(source.generation_config)
    model.config._attn_implementation = source.config._attn_implementation
    return model.eval()


def _name_of(dense: PreTrainedModel) -> str:
    """What to call the base model in the checkpoint: the name it was asked for by, never a path of this machine."""
    name = getattr(dense.config, "_name_or_path", "") or ""
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else name
