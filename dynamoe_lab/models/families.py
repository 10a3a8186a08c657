"""The family table: the few questions a model family answers so that its MLPs can become nested experts.

A new family is a new row here, one line each in `configuration_dynamoe` and `modeling_dynamoe`, and a pico model in the tests; nothing else
asks for a model's name.
"""

from dataclasses import dataclass

from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

__all__ = ["FAMILIES", "Family", "decoder_layers", "dense_type_of", "family_of"]


@dataclass(frozen=True)
class Family:
    """Where a decoder layer keeps its MLP, what the MLP is made of, and how its output joins the residual stream r."""

    causal_lm: type[PreTrainedModel]  # the dense model class
    layers: str = "model.layers"  # path of the list of decoder layers
    mlp: str | None = "mlp"  # the MLP within a layer; None: the layer itself holds its projections
    gate: str | None = "gate_proj"  # None: a plain MLP, act(W_1 x)
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    intermediate_size: str = "intermediate_size"  # the config's name for the number of neurons H
    residual_norm: str = "post_attention_layernorm"  # the norm before the MLP; its input is the residual stream r
    norm_first: str | None = None  # config field: where it is false, residual_norm follows the sum, and r is the MLP's own input
    output_norm: str | None = None  # norm between the MLP's output and the sum; the cosine label compares outputs before it
    attention: str = "self_attn"  # the attention within a layer
    whole_heads: str | None = None  # why dimensions of attention heads cannot be pruned (ToMoE); None: they can
    parallel: bool | str = False  # attention and MLP both start from the layer's input, which then is r; a string: the config field

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the linear maps within the MLP, the down projection last."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)

    def holder(self, layer: nn.Module) -> nn.Module:
        """The module of a decoder layer whose children the projections are: the MLP, or the layer itself."""
        return layer if self.mlp is None else getattr(layer, self.mlp)

    def nested(self, layer: nn.Module) -> nn.Module:
        """Where a converted layer has its `NestedMLP`: in the place of the MLP, or of the down projection."""
        return getattr(layer, self.mlp or self.down)

    def residual_source(self, layer: nn.Module, config: PreTrainedConfig) -> nn.Module:
        """The module of a dense or converted layer whose input is the residual stream r that the MLP's output is added to.

        In parallel layers the attention's output is added to the same sum. Its input is [B, T, D] or, within OPT's MLP, [B * T, D].
        """
        if self.norm_first is None or getattr(config, self.norm_first):
            return getattr(layer, self.residual_norm)
        return getattr(layer, self.mlp or self.up)  # the module that is handed the MLP's input

    def is_parallel(self, config: PreTrainedConfig) -> bool:
        """Whether attention and MLP of this model read the same stream and are added to it together."""
        return bool(getattr(config, self.parallel) if isinstance(self.parallel, str) else self.parallel)


NORMED_HEADS = "it normalises queries and keys over the head's dimensions before rotating them, so a sliced head is another function"
PREFIXES = ("dynamoe_", "tomoe_masked_", "tomoe_")  # of converted model types

FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaForCausalLM),
    "mistral": Family(MistralForCausalLM),
    "qwen2": Family(Qwen2ForCausalLM),
    "qwen3": Family(Qwen3ForCausalLM, whole_heads=NORMED_HEADS),
    "gemma3_text": Family(
        Gemma3ForCausalLM,
        residual_norm="pre_feedforward_layernorm",
        output_norm="post_feedforward_layernorm",
        whole_heads=NORMED_HEADS,
    ),
    "gpt_neox": Family(
        GPTNeoXForCausalLM,
        layers="gpt_neox.layers",
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="act",
        attention="attention",
        whole_heads="it keeps queries, keys and values in one matrix and rotates only part of each head",
        parallel="use_parallel_residual",
    ),
    "phi": Family(
        PhiForCausalLM,
        gate=None,
        up="fc1",
        down="fc2",
        activation="activation_fn",
        residual_norm="input_layernorm",
        whole_heads="it rotates only part of each head, so dimensions beyond that part have no rotary partner",
        parallel=True,
    ),
    "opt": Family(
        OPTForCausalLM,
        layers="model.decoder.layers",
        mlp=None,
        gate=None,
        up="fc1",
        down="fc2",
        activation="activation_fn",
        intermediate_size="ffn_dim",
        residual_norm="final_layer_norm",
        norm_first="do_layer_norm_before",
        whole_heads="it has learnt positions instead of rotary ones, for which the pruned pairs are defined",
    ),
}


def dense_type_of(model_type: str) -> str:
    """The dense model type of a converted one: `dynamoe_llama` -> `llama`; a dense one stays."""
    prefix = next((prefix for prefix in PREFIXES if model_type.startswith(prefix)), "")
    return model_type.removeprefix(prefix)


def family_of(model_type: str) -> Family:
    """The family of a dense (`llama`) or converted (`dynamoe_llama`) model type.

    Raises ValueError naming the supported types if it is none of them.
    """
    dense_type = dense_type_of(model_type)
    if dense_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported: the family table has {', '.join(sorted(FAMILIES))}")
    return FAMILIES[dense_type]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a dense or converted model, in order."""
    return model.get_submodule(family_of(model.config.model_type).layers)
