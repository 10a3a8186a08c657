"""A masked ToMoE model -> a stock `MixtralForCausalLM` with top-1 routing, which plain transformers and its ecosystem load and run.

Mixtral's experts are gated MLPs of one width without biases, behind the attention of Mistral; what has more than that is refused. Top-1
routing there weighs the one expert by p / p = 1, so the function is that of the masked model.
"""

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, initialization

from dynamoe_lab.conversion.common import filled
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import decoder_layers, dense_type_of, family_of

__all__ = ["export_mixtral"]

ALIGNED = 8  # widths are multiples of it: 16 bytes in half precision, which transformers' grouped products of experts ask for
# What both families' configs share with Mixtral's, name by name
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
)


@torch.no_grad()
def export_mixtral(masked: PreTrainedModel) -> PreTrainedModel:
    """`export` with form="mixtral"; a new model in eval mode."""
    if refused := _refused(masked):
        raise InputError(f"export: no Mixtral has {refused}; export this model with form='tomoe'")
    masks = [layer.experts for layer in masked.layer_masks()]
    width = max(1, max(int(experts.sum(dim=1).max()) for experts in masks))
    width = -(-width // ALIGNED) * ALIGNED
    config = masked.config
    values = {name: getattr(config, name) for name in _SHARED}
    values["head_dim"] = decoder_layers(masked)[0].self_attn.head_dim
    with initialization.no_init_weights(), torch.device("meta"):  # every weight is put in below
        model = MixtralForCausalLM(
            MixtralConfig(
                **values,
                intermediate_size=width,
                num_local_experts=masked.moe.num_experts,
                num_experts_per_tok=1,
                router_aux_loss_coef=0.0,  # the routers are trained
                sliding_window=getattr(config, "sliding_window", None),  # Llama has none
            )
        )
    return filled(model, masked, _weights(masked, masks, width))


def _refused(masked: PreTrainedModel) -> str | None:
    """What this model has that no Mixtral has, or None."""
    model_type = dense_type_of(masked.config.model_type)
    family, layers = family_of(model_type), decoder_layers(masked)
    if masked.moe.attention != "none":
        return f"pruned attention (tomoe.attention = {masked.moe.attention!r})"
    if family.gate is None:
        return f"MLPs without a gate ({model_type})"
    if model_type not in ("llama", "mistral", "qwen2"):
        return f"the norms of {model_type}"
    biased = [name for name, _ in layers[0].named_parameters() if name.endswith("_proj.bias")]
    if biased:
        return f"biases ({model_type}: {', '.join(biased)})"
    if model_type not in ("llama", "mistral"):
        return f"the attention of {model_type}"
    return None


def _weights(masked: PreTrainedModel, masks: list[Tensor], width: int) -> dict[str, Tensor]:
    """Mixtral's weights by its names; experts narrower than `width` end in zero neurons, whose output is 0."""
    others = {name: value for name, value in masked.state_dict().items() if ".mlp." not in name}
    found = {name: value.clone() for name, value in others.items() if not name.startswith("hypernetwork.")}
    for index, (layer, experts) in enumerate(zip(decoder_layers(masked), masks, strict=True)):
        mlp = layer.mlp
        gate, up, down = (linear.weight for linear in mlp.projections().values())
        gate_up = gate.new_zeros(len(experts), 2 * width, gate.shape[1])
        down_proj = down.new_zeros(len(experts), down.shape[0], width)
        for expert, members in enumerate(experts):
            count = int(members.sum())
            gate_up[expert, :count], gate_up[expert, width : width + count] = gate[members], up[members]
            down_proj[expert, :, :count] = down[:, members]
        prefix = f"model.layers.{index}.mlp."
        found[f"{prefix}experts.gate_up_proj"], found[f"{prefix}experts.down_proj"] = gate_up, down_proj
        found[f"{prefix}gate.weight"] = mlp.router.weight.to(gate.dtype)
    return found
