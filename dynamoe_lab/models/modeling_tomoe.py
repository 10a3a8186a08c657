"""`ToMoEMasked<Family>ForCausalLM`: the frozen family with masks that learn which of it each token needs (ToMoE, arXiv 2501.15316).

A checkpoint is the dense checkpoint plus `hypernetwork.*` and, in every layer, `mlp.{router,norm,decoder}.*` and, where attention is
pruned, `self_attn.{router,norm,decoder}.*`. In training a forward with labels is two: the teacher, everything open, without gradient, and
the student. What a trained model is used as is its deployed form.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .causal_lm_loss import causal_lm_loss
from .configuration_tomoe import MASKED_CONFIGS, ToMoEConfig
from .converted_class import converted_classes
from .families import decoder_layers
from .hypernetwork import Hypernetwork
from .masked_attention import AttentionTrace, MaskedAttention
from .masked_mlp import MaskedMLP, MLPTrace
from .masking import Checkpointing, MaskedForward, Masking
from .model_card import masked_card
from .rotary_attention import attention_weights
from .routed import Routing, token_mask
from .straight_through import GumbelNoise
from .tomoe_form import ToMoEForm, labels_without_pads
from .tomoe_losses import LayerSizes, distillation_losses, next_token_loss, structure_losses
from .tomoe_output import LayerMasks, ToMoECausalLMOutput

__all__ = ["MASKED_CLASSES", "ToMoEMixin"]


class ToMoEMixin(ToMoEForm):
    """What all families share; stands before the family's class in the bases."""

    # As in the paper, and because a learning rate of 1e-3 on these is nothing that bfloat16 could hold
    _keep_in_fp32_modules_strict: ClassVar = [
        "hypernetwork",
        *(f"{part}.{name}" for part in ("mlp", "self_attn") for name in ("router", "norm", "decoder")),
    ]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not config.moe:
            raise ValueError(f"{type(config).__name__}.moe is empty: convert a dense model, or set moe=ToMoEConfig(...).to_dict()")
        self.moe = moe = ToMoEConfig.from_dict(config.moe)
        family = self._family
        self._require_heads(moe)
        self.routing, self.noise = Routing(), GumbelNoise()
        self.loss_function = causal_lm_loss
        layers = decoder_layers(self)
        step = 1 if moe.attention == "none" else 2  # pruned modules of a layer: attention, MLP
        self.hypernetwork = Hypernetwork(step * len(layers), moe)
        self.masking = Masking(self.hypernetwork)
        for index, layer in enumerate(layers):
            if step == 2:
                attention = MaskedAttention(getattr(layer, family.attention), moe, index, 2 * index, self.routing, self.masking)
                setattr(layer, family.attention, attention)
            mlp = MaskedMLP(getattr(layer, family.mlp), family, moe, index, step * (index + 1) - 1, self.routing, self.masking)
            setattr(layer, family.mlp, mlp)
        self.post_init()

    def masked_attentions(self) -> list[MaskedAttention]:
        """The masked attentions, one a layer, in order; none if attention is left whole."""
        return [module for module in self.modules() if isinstance(module, MaskedAttention)]

    @torch.no_grad()
    def layer_masks(self) -> list[LayerMasks]:
        """What every layer keeps, without noise: the masks of inference and of the deployed form."""
        embeddings = self.hypernetwork()
        mlps, attentions = self.routed_mlps(), self.masked_attentions() or [None] * len(decoder_layers(self))
        return [
            LayerMasks(mlp.open_neurons(embeddings), None if attention is None else attention.open_pairs(embeddings))
            for mlp, attention in zip(mlps, attentions, strict=True)
        ]

    # --- weights ----------------------------------------------------------------------------------------------------------------

    def method_modules(self) -> Iterator[nn.Module]:
        """The modules that ToMoE adds: the hypernetwork, and of every layer routers, norms and decoders."""
        yield self.hypernetwork
        for module in (*self.masked_attentions(), *self.routed_mlps()):
            yield from (module.router, module.norm, module.decoder)

    def freeze_base(self) -> None:
        """Leave gradients only to what ToMoE adds; done at loading and converting."""
        self.requires_grad_(False)
        for module in self.method_modules():
            module.requires_grad_(True)

    @torch.no_grad()
    def draw_weights(self, *, missing_only: bool = False) -> None:
        """Draw what ToMoE adds from the config's seed, as torch's own layers are drawn; all float32.

        With `missing_only` a checkpoint's weights stay (transformers marks what it has filled).
        """
        generator = torch.Generator().manual_seed(self.moe.seed)
        for module in self.method_modules():
            module.float()
            for name, value in (*module.named_parameters(), *module.named_buffers()):
                if value.is_meta:
                    continue
                if isinstance(module, nn.LayerNorm):
                    fresh = torch.full(value.shape, 0.0 if name == "bias" else 1.0)
                elif name == "z":
                    fresh = torch.randn(value.shape, generator=generator)
                else:
                    width = module.gru.hidden_size if isinstance(module, Hypernetwork) else module.in_features
                    fresh = (torch.rand(value.shape, generator=generator) * 2 - 1) * width**-0.5
                if not (missing_only and getattr(value, "_is_hf_initialized", False)):
                    value.copy_(fresh)

    def initialize_weights(self) -> None:
        """As in transformers, which calls it when weights are loaded, too; then what ToMoE adds is drawn, and the rest frozen."""
        super().initialize_weights()
        if hasattr(self, "masking"):  # none yet while the dense family builds itself
            self.draw_weights(missing_only=True)
            self.freeze_base()

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, Checkpointing(self.masking, gradient_checkpointing_func), **kwargs)

    # --- forward ----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        output_kl: bool = False,
        **kwargs: Any,
    ) -> ToMoECausalLMOutput:
        """The family's forward; `labels` adds the losses, `output_router_logits=True` what each layer did (see the output class).

        In training mode tokens are routed and masks sampled with noise, whatever `set_routing` says, and a forward with labels runs the
        teacher, too; `output_kl=True` does that in eval mode, without noise, and tells active ratios and union coverage. Shapes:
        `input_ids`, `labels` [B, T] with -100 where no language-model loss counts; `attention_mask` [B, T] or [B, past + T], 0 for pads.

        Raises:
            ValueError: losses with the logits of some tokens only (`logits_to_keep`), or a KL where tokens are cached.
            RuntimeError: reentrant activation checkpoints, which lose the gradient of the losses.
        """
        kwargs.pop("return_dict", None)
        kwargs.pop("num_items_in_batch", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict": True, **kwargs}
        kept = kwargs.get("logits_to_keep", 0)
        if (labels is not None or output_kl) and (isinstance(kept, Tensor) or kept):
            raise ValueError("ToMoE: losses need the logits of all tokens; leave out logits_to_keep")
        learning = self.training and labels is not None
        teacher = self._teacher_logits(inputs) if learning or output_kl else None
        told = labels is not None or bool(output_router_logits)
        output, mlps, attentions = self._student(inputs, collect=told or output_kl)
        result = ToMoECausalLMOutput(**output)
        if told:
            result.router_logits = tuple(trace.router_logits for trace in mlps)
            result.experts = tuple(trace.experts for trace in mlps)
            result.open_values = self._open_values(mlps, attentions)
        normalisers = None
        if teacher is not None:
            result.kl_loss, normalisers = self._distillation(result.logits, teacher, attention_mask)
        if labels is not None:
            result.loss = result.lm_loss = self._lm_loss(result.logits, labels, attention_mask, normalisers if learning else None)
        if output_kl and not self.training and mlps[0].masks is not None:
            with torch.no_grad():
                found = self._structure_losses(mlps, attentions, attention_mask, result.logits.device)
            for name in ("active_ratio_max", "active_ratio_mean", "union_coverage"):
                setattr(result, name, found[name])
        if learning:
            for name, value in self._structure_losses(mlps, attentions, attention_mask, result.logits.device).items():
                setattr(result, name, value)
            moe = self.moe
            result.loss = moe.lambda_kl * result.kl_loss + moe.lambda_ratio * result.ratio_loss
            result.loss = result.loss + moe.lambda_union * result.union_loss + moe.lambda_balance * result.balance_loss
        return result

    def _student(self, inputs: dict[str, Any], *, collect: bool) -> tuple[Any, list[MLPTrace] | None, list[AttentionTrace] | None]:
        """The family's output under masks, and what every layer did, where that is collected; none of attentions that are left whole."""
        whole = not self.training and self.routing.mode == "full"
        forward = MaskedForward(None if whole else self.hypernetwork(), self.noise if self.training else None)
        if collect:
            forward.mlps, forward.attentions = {}, {}
        with self.masking.during(forward), attention_weights(self.masked_attentions()) as weights:
            output = super().forward(**inputs)
        if weights and output.get("attentions") is not None:
            output["attentions"] = tuple(weights)
        mlps, attentions = ([each[layer] for layer in sorted(each)] if each else None for each in (forward.mlps, forward.attentions))
        forward.mlps = forward.attentions = None  # checkpoints keep the forward, which must not keep their graph
        return output, mlps, attentions

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """All modules in eval mode (no dropout, no checkpoints), afterwards each as it was."""
        trained = [module for module in self.modules() if module.training]
        for module in trained:
            module.training = False
        try:
            yield
        finally:
            for module in trained:
                module.training = True

    def _teacher_logits(self, inputs: dict[str, Any]) -> Tensor:
        """Logits [B, T, V] of the same model with everything open; no gradient, no dropout, no cache."""
        if inputs.get("past_key_values") is not None:
            raise ValueError("ToMoE: the teacher has no cache; give kl_loss whole sequences, without past_key_values")
        inputs = {**inputs, "use_cache": False, "output_hidden_states": False, "output_attentions": False}
        with torch.no_grad(), self._evaluating(), self.masking.during(MaskedForward(None)):
            return super().forward(**inputs).logits

    def _distillation(self, logits: Tensor, teacher: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean KL per token that is no pad, and the student's logsumexp [B * T]; uses up the teacher's logits."""
        losses, normalisers = distillation_losses(logits.flatten(0, 1), teacher.flatten(0, 1))
        counted = token_mask(attention_mask, len(losses))
        if counted is None:
            return losses.mean(), normalisers
        counted = counted.to(losses.device)
        return losses.where(counted, 0.0).sum() / counted.sum().clamp_min(1), normalisers

    def _lm_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None, normalisers: Tensor | None) -> Tensor:
        """Cross-entropy, a mean over labels whose token, and the one before it, are no pads; without gradient from given `normalisers`."""
        shifted = F.pad(labels_without_pads(labels, attention_mask), (0, 1), value=-100)[..., 1:].to(logits.device)
        if normalisers is not None:
            return next_token_loss(logits, normalisers, shifted)
        return self.loss_function(logits, None, self.config.vocab_size, shift_labels=shifted)

    def _open_values(self, mlps: list[MLPTrace], attentions: list[AttentionTrace] | None) -> tuple[Tensor, ...]:
        if attentions is None:
            return tuple(torch.ones(len(trace.experts), device=trace.experts.device) for trace in mlps)
        width = self.layer_sizes().head_dim
        return tuple(trace.value_widths.detach().float() / width for trace in attentions)

    def layer_sizes(self) -> LayerSizes:
        """What a layer's attention and MLP weights are counted from."""
        config = self.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared = heads + (getattr(config, "num_key_value_heads", None) or heads)
        return LayerSizes(config.hidden_size, shared, width, config.intermediate_size, gated=self._family.gate is not None)

    def _structure_losses(
        self, mlps: list[MLPTrace], attentions: list[AttentionTrace] | None, attention_mask: Tensor | None, device: torch.device
    ) -> dict[str, Tensor]:
        """R_P, R_U and R_L of this forward, and what they are made of."""
        counted = token_mask(attention_mask, len(mlps[0].experts))
        losses = structure_losses(
            self.layer_sizes(),
            torch.stack([trace.masks.to(device) for trace in mlps]),
            [trace.choice.to(device) for trace in mlps],
            None if attentions is None else [trace.value_widths.to(device) for trace in attentions],
            None if attentions is None else [trace.pair_widths.to(device) for trace in attentions],
            p=self.moe.p,
            counted=None if counted is None else counted.to(device),
        )
        if self._gradient_is_lost(losses["balance_loss"]):
            raise RuntimeError("the masks' losses have lost their gradient: checkpoint activations with use_reentrant=False")
        return losses

    def card(self) -> str:
        """The README.md of this model's checkpoints."""
        return masked_card(type(self).__name__, self.config)


MASKED_CLASSES = converted_classes(
    ToMoEMixin, "ToMoEMasked", MASKED_CONFIGS, "`{dense}`, frozen, with masks that learn what each token needs (ToMoE's trainable form)."
)
globals().update({cls.__name__: cls for cls in MASKED_CLASSES.values()})  # where transformers looks for them
__all__ += [cls.__name__ for cls in MASKED_CLASSES.values()]
