"""`ToMoE<Family>ForCausalLM`: what is left of a dense model when ToMoE's masks are fixed (arXiv 2501.15316, its export).

A checkpoint has the family's parameter names. Missing are the neurons that no expert has and, where attention is pruned, the rows of
queries and keys that the layer's mask closes; added are, in every layer, `mlp.router`, the experts' `mlp.membership`, and what decides the
masks of values, `self_attn.{router,norm,decoder}`. Sizes are in the config's `moe`. It loads with `AutoModelForCausalLM` after
`import dynamoe_lab.models`, or with `trust_remote_code=True` where this package is not installed, since these files travel with it.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .causal_lm_loss import causal_lm_loss
from .configuration_tomoe import DEPLOYED_CONFIGS, ToMoEConfig
from .converted_class import converted_classes
from .expert_mlp import ExpertMLP
from .families import decoder_layers
from .model_card import deployed_card
from .pruned_attention import PrunedAttention
from .rotary_attention import attention_weights
from .routed import Routing
from .tomoe_form import ToMoEForm, labels_without_pads
from .tomoe_output import ToMoECausalLMOutput

__all__ = ["DEPLOYED_CLASSES", "ToMoEDeployedMixin"]


class ToMoEDeployedMixin(ToMoEForm):
    """What all families share; stands before the family's class in the bases."""

    # Choices that are close turn over in coarser numbers
    _keep_in_fp32_modules_strict: ClassVar = ["mlp.router", *(f"self_attn.{name}" for name in ("router", "norm", "decoder"))]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not config.moe or "union_sizes" not in config.moe:
            raise ValueError(f"{type(config).__name__}.moe lacks the deployed sizes: export a masked ToMoE model with lab.export")
        self.moe = moe = ToMoEConfig.from_dict(config.moe)
        family, layers = self._family, decoder_layers(self)
        self._require_heads(moe)
        unions, pairs = config.moe["union_sizes"], config.moe.get("qk_pairs") or [None] * len(layers)
        if not len(unions) == len(pairs) == len(layers):
            raise ValueError(f"{type(config).__name__}.moe has sizes of {len(unions)} and {len(pairs)} layers, the model has {len(layers)}")
        self.routing = Routing()
        self.loss_function = causal_lm_loss
        for index, layer in enumerate(layers):
            if moe.attention != "none":
                setattr(layer, family.attention, PrunedAttention(getattr(layer, family.attention), moe, pairs[index], self.routing))
            setattr(layer, family.mlp, ExpertMLP(getattr(layer, family.mlp), family, moe, unions[index], index, self.routing))
        self.post_init()

    def pruned_attentions(self) -> list[PrunedAttention]:
        """The pruned attentions, one a layer, in order; none if attention is left whole."""
        found = [getattr(layer, self._family.attention) for layer in decoder_layers(self)]
        return [attention for attention in found if isinstance(attention, PrunedAttention)]

    def lay_out(self) -> None:
        """Copy the experts' weights now rather than with the first inference forward; see `ExpertMLP.lay_out`, also for the memory."""
        for mlp in self.routed_mlps():
            mlp.lay_out()

    def initialize_weights(self) -> None:
        """As in transformers, which calls it when weights are loaded, too; experts that a checkpoint does not name have all neurons.

        What makes hard choices is frozen.
        """
        for module in self.modules():
            if isinstance(module, ExpertMLP):
                ready = getattr(module, "_is_hf_initialized", False) or getattr(module.membership, "_is_hf_initialized", False)
                if not (ready or module.membership.is_meta):
                    module.membership.fill_(True)
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, (ExpertMLP, PrunedAttention)):
                module.freeze_choices()

    # --- forward ----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> ToMoECausalLMOutput:
        """The family's forward; `labels` adds the loss, `output_router_logits=True` what each layer did (see the output class).

        Shapes: `input_ids`, `labels` [B, T] with -100 where no loss counts; `attention_mask` [B, T] or [B, past + T], 0 for pads.
        """
        kwargs.pop("return_dict", None)
        kwargs.pop("num_items_in_batch", None)
        collect = labels is not None or bool(output_router_logits)
        if labels is not None:
            labels = labels_without_pads(labels, attention_mask)
        mlps, attentions = self.routed_mlps(), self.pruned_attentions()
        self.routing.collect = collect
        try:
            with attention_weights(attentions) as weights:
                output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, return_dict=True, **kwargs)
            traces, opened = ([mlp.trace for mlp in mlps], [each.trace for each in attentions]) if collect else ([], [])
        finally:
            self.routing.collect = False
            for module in (*mlps, *attentions):
                module.trace = None
        result = ToMoECausalLMOutput(**output)
        if weights and result.attentions is not None:
            result.attentions = tuple(weights)
        result.lm_loss = result.loss
        if collect:
            result.router_logits = tuple(trace.router_logits for trace in traces)
            result.experts = tuple(trace.experts for trace in traces)
            result.open_values = tuple(opened) or tuple(torch.ones(len(each), device=each.device) for each in result.experts)
        return result

    # --- saving -----------------------------------------------------------------------------------------------------------------

    def card(self) -> str:
        """The README.md of this model's checkpoints."""
        return deployed_card(type(self).__name__, self.config)


DEPLOYED_CLASSES = converted_classes(
    ToMoEDeployedMixin, "ToMoE", DEPLOYED_CONFIGS, "`{dense}` whose MLPs are experts with their own neurons (ToMoE's deployed form)."
)
globals().update({cls.__name__: cls for cls in DEPLOYED_CLASSES.values()})  # where transformers looks for them
__all__ += [cls.__name__ for cls in DEPLOYED_CLASSES.values()]
