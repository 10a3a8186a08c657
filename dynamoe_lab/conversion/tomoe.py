"""Dense -> ToMoE, its trainable form: frozen weights as they are, beside them what learns to mask them (arXiv 2501.15316).

Nothing is measured on text and no weight moves, so the converted model is the dense one until it is trained: its masks start open.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from dynamoe_lab.conversion.common import check_dense, check_function, probe, with_weights_of
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import MASKED_CLASSES, MASKED_CONFIGS, ToMoEConfig, decoder_layers

__all__ = ["convert_tomoe"]


def convert_tomoe(dense: PreTrainedModel, config: ToMoEConfig, **_: Any) -> PreTrainedModel:
    """`convert` for a `ToMoEConfig`; what is new is drawn from `config.seed`, no text is read."""
    family = check_dense(dense, why_whole="gradients go through its weights")
    model_type = dense.config.model_type
    if model_type not in MASKED_CLASSES:
        raise InputError(
            f"convert: ToMoE does not take {model_type}: {family.whole_heads}, and its layers hold the projections of the MLP themselves"
        )
    if config.attention != "none" and family.whole_heads is not None:
        raise InputError(
            f"convert: tomoe.attention = {config.attention!r}: heads of {model_type} cannot be pruned: {family.whole_heads}; "
            "set attention='none'"
        )
    if not decoder_layers(dense):
        raise InputError("convert: this model has no layers")
    ours = (".hypernetwork.", *(f".{name}." for name in ("router", "norm", "decoder")))
    model = with_weights_of(dense, MASKED_CLASSES[model_type], MASKED_CONFIGS[model_type], config.to_dict(), ours)
    model.draw_weights()
    model.freeze_base()
    model.eval().set_routing("full")
    check_function(dense, model)
    model.set_routing("router")
    if _all_open(model, dense):
        check_function(dense, model, "as it starts")
    return model


@torch.no_grad()
def _all_open(model: PreTrainedModel, dense: PreTrainedModel) -> bool:
    """Whether the student's masks close nothing before training, which of the paper's size they never do."""
    if any(parameter.is_meta for parameter in dense.parameters()):
        return False
    told = model(input_ids=probe(dense), use_cache=False, output_router_logits=True)
    pairs = [masks.pairs for masks in model.layer_masks() if masks.pairs is not None]
    masks = [*(masks.experts for masks in model.layer_masks()), *pairs, *(opened == 1 for opened in told.open_values or ())]
    return all(bool(mask.all()) for mask in masks)
