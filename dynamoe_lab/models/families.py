"""The family table: the few questions a model family answers so that its MLPs can become nested experts.

A new family is a new row here and a pico model in `tests/conftest.py` (README, "Add a model family"): its converted classes are made from
the row, and nothing else asks for a model's name.
"""

from dataclasses import dataclass

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "PREFIXES", "Family", "decoder_layers", "dense_type_of", "family_of"]

UNCHECKED = "nobody has checked yet that its heads are rotated as Llama's are"


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
    residual_norm: str | None = "post_attention_layernorm"  # the norm before the MLP, whose input is the residual stream r; None: no norm
    norm_first: str | None = None  # config field: where it is false, residual_norm follows the sum, and r is the MLP's own input
    output_norm: str | None = None  # norm between the MLP's output and the sum; labels beside r compare outputs after it, others before it
    attention: str = "self_attn"  # the attention within a layer
    whole_heads: str | None = UNCHECKED  # why dimensions of attention heads cannot be pruned (ToMoE); None: they can, as in Llama
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
        norm_before = self.norm_first is None or getattr(config, self.norm_first)
        if self.residual_norm is not None and norm_before:
            return getattr(layer, self.residual_norm)
        return getattr(layer, self.mlp or self.up)  # the module that is handed the MLP's input

    def is_parallel(self, config: PreTrainedConfig) -> bool:
        """Whether attention and MLP of this model read the same stream and are added to it together."""
        return bool(getattr(config, self.parallel) if isinstance(self.parallel, str) else self.parallel)


NORMED_HEADS = "it normalises queries and keys over the head's dimensions before rotating them, so a sliced head is another function"
PREFIXES: set[str] = set()  # of converted model types; `converted_configs` enters them

FAMILIES: dict[str, Family] = {
    "llama": Family(transformers.LlamaForCausalLM, whole_heads=None),
    "mistral": Family(transformers.MistralForCausalLM, whole_heads=None),
    "qwen2": Family(transformers.Qwen2ForCausalLM, whole_heads=None),
    "qwen3": Family(transformers.Qwen3ForCausalLM, whole_heads=NORMED_HEADS),
    "smollm3": Family(
        transformers.SmolLM3ForCausalLM,
        whole_heads="some of its layers do not rotate queries and keys, and the pruned pairs are defined by the rotation",
    ),
    "gemma3_text": Family(
        transformers.Gemma3ForCausalLM,
        residual_norm="pre_feedforward_layernorm",
        output_norm="post_feedforward_layernorm",
        whole_heads=NORMED_HEADS,
    ),
    "olmo2": Family(
        transformers.Olmo2ForCausalLM,
        residual_norm=None,
        output_norm="post_feedforward_layernorm",
        whole_heads="it normalises queries and keys over all heads together before rotating them, so a sliced head is another function",
    ),
    "cohere": Family(
        transformers.CohereForCausalLM,
        residual_norm="input_layernorm",
        whole_heads="it rotates each dimension with its neighbour, not with the one half a head away, and may normalise queries and keys",
        parallel=True,
    ),
    "gpt_neox": Family(
        transformers.GPTNeoXForCausalLM,
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
        transformers.PhiForCausalLM,
        gate=None,
        up="fc1",
        down="fc2",
        activation="activation_fn",
        residual_norm="input_layernorm",
        whole_heads="it rotates only part of each head, so dimensions beyond that part have no rotary partner",
        parallel=True,
    ),
    "opt": Family(
        transformers.OPTForCausalLM,
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
    prefix = max((prefix for prefix in PREFIXES if model_type.startswith(prefix)), key=len, default="")
    return model_type.removeprefix(prefix)


def family_of(model_type: str) -> Family:
    """The family of a dense (`llama`) or converted (`dynamoe_llama`) model type.

    Raises ValueError naming the supported types if it is none of them.
    """
    dense_type = dense_type_of(model_type)
    if dense_type not in FAMILIES:
        known = f"the family table has {', '.join(sorted(FAMILIES))}"
        raise ValueError(f"model type {model_type!r} is not supported: {known}; to add one: dynamoe-lab's README, Add a model family")
    return FAMILIES[dense_type]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a dense or converted model, in order."""
    return model.get_submodule(family_of(model.config.model_type).layers)
