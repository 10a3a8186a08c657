"""What a ToMoE model returns, masked or deployed."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

__all__ = ["LayerMasks", "ToMoECausalLMOutput"]


@dataclass
class ToMoECausalLMOutput(MoeCausalLMOutputWithPast):
    """The transformers MoE output; with `labels` given or `output_router_logits=True` also what each layer did.

    Per-layer tuples run over N = batch * sequence tokens: `router_logits` [N, E], `experts` [N] (-1 if everything was open), `open_values`
    [N] float32 (share of a head's value dimensions open for the token; 1 where attention is not pruned).

    With `labels` also `lm_loss`, cross-entropy in nats, a mean over tokens, pads left out. It is `loss` but in a masked model's training:
    there `loss` is the method's weighted sum of `kl_loss` (mean KL(teacher || student) per token, nats), `ratio_loss` (R_P), `union_loss`
    (R_U) and `balance_loss` (R_L), and `lm_loss` has no gradient. Beside them stand `active_ratio_max` and `active_ratio_mean` (share of
    attention and MLP weights that are active, by the largest and by the mean widths) and `union_coverage` (share of neurons that some
    expert has, a mean over layers); in eval mode `output_kl=True` gives these three, without noise, and `kl_loss`.
    """

    lm_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    ratio_loss: Tensor | None = None
    union_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    active_ratio_max: Tensor | None = None
    active_ratio_mean: Tensor | None = None
    union_coverage: Tensor | None = None
    experts: tuple[Tensor, ...] | None = None
    open_values: tuple[Tensor, ...] | None = None


@dataclass
class LayerMasks:
    """What a layer keeps, without noise."""

    experts: Tensor  # [E, H] bool: the neurons of each expert
    pairs: Tensor | None  # [d_h / 2] bool: the rotary pairs of queries and keys; None where no mask holds for the whole layer
