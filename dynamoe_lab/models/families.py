"""The family table: the few questions a model family answers so that its MLPs can become nested experts.

A new family is a new row here, one line in `configuration_dynamoe` and a pico model in the tests; nothing else asks for a model's name.
"""

from dataclasses import dataclass

from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

__all__ = ["FAMILIES", "Family", "decoder_layers", "family_of"]


@dataclass(frozen=True)
class Family:
    """Where a decoder layer keeps its MLP, and what the MLP is made of."""

    causal_lm: type[PreTrainedModel]  # the dense model class
    layers: str = "model.layers"  # path of the list of decoder layers
    mlp: str = "mlp"  # the MLP within a layer
    gate: str | None = "gate_proj"  # None: a plain MLP, act(W_1 x)
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    residual_norm: str = "post_attention_layernorm"  # its input is the residual stream that the MLP's output is added to

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the linear maps within the MLP, the down projection last."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaForCausalLM),
    "mistral": Family(MistralForCausalLM),
    "qwen2": Family(Qwen2ForCausalLM),
    "qwen3": Family(Qwen3ForCausalLM),
}


def family_of(model_type: str) -> Family:
    """The family of a dense (`llama`) or converted (`dynamoe_llama`) model type.

    Raises ValueError naming the supported types if it is none of them.
    """
    dense_type = model_type.removeprefix("dynamoe_")
    if dense_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported: the family table has {', '.join(sorted(FAMILIES))}")
    return FAMILIES[dense_type]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a dense or converted model, in order."""
    return model.get_submodule(family_of(model.config.model_type).layers)
