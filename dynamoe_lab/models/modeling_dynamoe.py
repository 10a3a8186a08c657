"""`DynaMoE<Family>ForCausalLM`: the family's own class with nested experts for MLPs (arXiv 2502.12325).

A checkpoint is the dense checkpoint, reordered, plus `router.*` (with `label_target="frozen"` also `frozen.*`, the MLPs as they were at
conversion); it loads with `AutoModelForCausalLM` after `import dynamoe_lab.models`, or with `trust_remote_code=True` where this package is
not installed, since these files travel with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from inspect import getsource
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .causal_lm_loss import causal_lm_loss
from .configuration_dynamoe import CONFIG_CLASSES, DynaMoEConfig
from .converted_class import converted_classes
from .families import decoder_layers, family_of
from .labels import LABELS, labels_from_similarity
from .layer_mlp import nest_experts
from .model_card import dynamoe_card
from .nested_mlp import FrozenLinear, NestedMLP
from .routed import RoutedMixin, Routing, token_mask

__all__ = ["MODEL_CLASSES", "DynaMoECausalLMOutput", "DynaMoEMixin"]


@dataclass
class DynaMoECausalLMOutput(MoeCausalLMOutputWithPast):
    """The transformers MoE output; with `labels` given or `output_router_logits=True` also what each layer did.

    Per-layer tuples run over N = batch * sequence tokens: `router_logits` [N, E], `labels` [N] (difficulty labels, the smallest expert
    within theta), `experts` [N] (whose output was used), `similarities` [N, E] (of every expert to the full output, as `label` says).
    `loss` = lambda_lm * `lm_loss` + lambda_router * `router_loss`, each a mean over the batch's own tokens, pads left out.
    """

    lm_loss: Tensor | None = None
    router_loss: Tensor | None = None
    labels: tuple[Tensor, ...] | None = None
    experts: tuple[Tensor, ...] | None = None
    similarities: tuple[Tensor, ...] | None = None


class DynaMoEMixin(RoutedMixin):
    """What all families share; stands before the family's class in the bases."""

    method = "dynamoe"
    calibrated = True
    routing_modes: ClassVar = {"router": None, "label": None, "full": None, "random": None}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not config.moe:
            raise ValueError(f"{type(config).__name__}.moe is empty: convert a dense model, or set moe=DynaMoEConfig(...).to_dict()")
        self.moe = DynaMoEConfig.from_dict(config.moe)
        self.routing = Routing()
        self.loss_function = causal_lm_loss
        family = family_of(config.model_type)
        for index, layer in enumerate(decoder_layers(self)):
            nest_experts(layer, family, self.moe, index, self.routing)
        self._watch_residual()
        self.post_init()

    def nested_mlps(self) -> list[NestedMLP]:
        """The nested MLPs, one a layer, in order."""
        family = family_of(self.config.model_type)
        return [family.nested(layer) for layer in decoder_layers(self)]

    routed_mlps = nested_mlps

    def _watch_residual(self) -> None:
        """Lead the residual stream to the labels, if they are defined beside it."""
        family, needed = family_of(self.config.model_type), LABELS[self.moe.label].residual
        for layer, mlp in zip(decoder_layers(self), self.nested_mlps(), strict=True):
            source = family.residual_source(layer, self.config) if needed else None
            mlp.watch_residual(source, None if family.output_norm is None else getattr(layer, family.output_norm))

    def code_mark(self) -> str:
        """Stands for the source of its label's definition: with another formula under the same name the model is another function."""
        try:
            return getsource(LABELS[self.moe.label].similarity)
        except (OSError, TypeError):  # typed into a console, or compiled
            return self.moe.label

    def lay_out(self, *, columns: bool = True) -> None:
        """Order the memory of the MLPs so that every expert is one piece, or as in files; see `NestedMLP.lay_out`."""
        for module in self.modules():  # none yet while the dense family builds itself
            if isinstance(module, NestedMLP):
                module.lay_out(columns=columns)

    def initialize_weights(self) -> None:
        """As in transformers, which calls it when weights are loaded, too; then memory is laid out for inference.

        A frozen copy that a checkpoint lacks is taken from the weights it has.
        """
        super().initialize_weights()
        self.lay_out()
        for module in self.modules():
            if isinstance(module, FrozenLinear):
                module.remember(missing_only=True)

    # --- routing ----------------------------------------------------------------------------------------------------------------

    def set_theta(self, theta: float) -> None:
        """Change the similarity threshold of the labels from the next forward on; a router's choice does not depend on it."""
        values = {**self.moe.to_dict(), "theta": theta}
        DynaMoEConfig.from_dict(values)  # refuses a theta that cannot be
        self.moe.theta = float(theta)
        self.config.moe = {**self.config.moe, "theta": float(theta)}

    def reconfigure(self, config: DynaMoEConfig) -> None:
        """Take over the settings that shape no weight: label and theta, loss weights, how training routes, how the LM loss reaches routers.

        Raises ValueError if `config` differs in one that does (expert sizes, importance, router, label target): that needs a conversion.
        """
        free = ("label", "theta", "lambda_lm", "lambda_router", "train_route", "router_gradient")
        if not isinstance(config, DynaMoEConfig):
            raise ValueError(f"reconfigure: a {type(config).__name__} is another method's; convert the dense model again")
        if other := [
            item.name for item in fields(config) if item.name not in free and getattr(config, item.name) != getattr(self.moe, item.name)
        ]:
            raise ValueError(
                f"reconfigure: {other[0]} = {getattr(config, other[0])!r} shapes the model's weights; convert the dense model again"
            )
        for name in free:
            setattr(self.moe, name, getattr(config, name))  # in place: every layer holds this object
        origin = {name: value for name, value in self.config.moe.items() if name not in {item.name for item in fields(config)}}
        self.config.moe = {**origin, **self.moe.to_dict()}
        self._watch_residual()

    def labels_at(self, similarities: Iterable[Tensor], theta: float) -> tuple[Tensor, ...]:
        """Labels of every layer at another theta from the similarities of one forward: L x [N, E] -> L x [N]."""
        return tuple(labels_from_similarity(layer, theta) for layer in similarities)

    # --- forward ----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> DynaMoECausalLMOutput:
        """The family's forward; `labels` adds the loss, `output_router_logits=True` the routing of every layer (see the output class).

        Shapes: `input_ids`, `labels` [B, T] with -100 where no loss counts; `attention_mask` [B, T] or [B, past + T], 0 for pads.
        """
        collect = labels is not None or bool(output_router_logits)
        kwargs.pop("return_dict", None)
        mlps = self.nested_mlps()
        self.routing.collect = collect
        try:
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, return_dict=True, **kwargs)
            traces = [mlp.trace for mlp in mlps] if collect else []
        finally:
            self.routing.collect = False
            for mlp in mlps:
                mlp.trace = None
        result = DynaMoECausalLMOutput(**{name: value for name, value in output.items() if name != "loss"})
        if collect:
            result.router_logits = tuple(trace.router_logits for trace in traces)
            result.labels = tuple(trace.labels for trace in traces)
            result.experts = tuple(trace.experts for trace in traces)
            result.similarities = tuple(trace.similarities for trace in traces)
        if labels is not None:
            result.lm_loss = output.loss
            result.router_loss = self._router_loss(result.router_logits, result.labels, attention_mask)
            if self._gradient_is_lost(result.router_loss):
                raise RuntimeError("the routers' loss has lost its gradient: checkpoint activations with use_reentrant=False")
            result.loss = self.moe.lambda_lm * result.lm_loss + self.moe.lambda_router * result.router_loss
        return result

    def _router_loss(self, logits: tuple[Tensor, ...], labels: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        """Cross-entropy of the routers against the labels, mean over layers and over tokens that are no pads (the paper's L_router)."""
        counted = token_mask(attention_mask, len(labels[0]))
        losses = []
        for layer_logits, layer_labels in zip(logits, labels, strict=True):
            loss = F.cross_entropy(layer_logits.float(), layer_labels.to(layer_logits.device), reduction="none")
            if counted is not None:
                weight = counted.to(loss)
                losses.append((loss * weight).sum() / weight.sum().clamp_min(1))
            else:
                losses.append(loss.mean())
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    # --- saving -----------------------------------------------------------------------------------------------------------------

    def card(self) -> str:
        """The README.md of this model's checkpoints."""
        return dynamoe_card(type(self).__name__, self.config)


MODEL_CLASSES = converted_classes(DynaMoEMixin, "DynaMoE", CONFIG_CLASSES, "`{dense}` whose MLPs are nested experts with a router.")
globals().update({cls.__name__: cls for cls in MODEL_CLASSES.values()})  # where transformers looks for them: DynaMoELlamaForCausalLM, ...
__all__ += [cls.__name__ for cls in MODEL_CLASSES.values()]
