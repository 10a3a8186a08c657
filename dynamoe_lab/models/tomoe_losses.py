"""The four losses of ToMoE (arXiv 2501.15316, equations of the training objective), from what the layers of one forward did.

Knowledge distillation needs the logits of teacher and student at every token, [N, V]: a few rows at a time go through it, and the gradient
takes the place of the teacher's logits, which nobody needs afterwards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .causal_lm_loss import rows_at_once

__all__ = [
    "LayerSizes",
    "active_ratio",
    "balance_loss",
    "distillation_losses",
    "largest_and_mean",
    "log_gap",
    "next_token_loss",
    "structure_losses",
    "union_coverage",
]


def log_gap(a: Tensor, b: float, c: float = 0.001) -> Tensor:
    """f(a, b) = log(max(a, b) + c) - log(min(a, b) + c), elementwise: 0 where they are equal."""
    return ((a + c).log() - torch.log(torch.tensor(b + c, dtype=a.dtype, device=a.device))).abs()


# --- distillation -------------------------------------------------------------------------------------------------------------------


class _Distillation(torch.autograd.Function):
    """KL(teacher_i || student_i) of every row and the student's logsumexp; the gradient is softmax(student_i) - softmax(teacher_i)."""

    @staticmethod
    def forward(ctx, student, teacher):
        losses, normalisers = student.new_empty(2, len(student), dtype=torch.float32)
        at_once = rows_at_once(student)
        pieces = (tensor.split(at_once) for tensor in (student, teacher, losses, normalisers))
        for rows, targets, loss, normaliser in zip(*pieces, strict=True):
            rows, wanted = rows.float(), targets.float()
            top, wanted_top = rows.amax(-1, keepdim=True), wanted.amax(-1, keepdim=True)
            gap = wanted - rows  # [n, V]
            chances, wanted = (rows - top).exp_(), wanted.sub(wanted_top).exp_()
            total, wanted_total = chances.sum(-1, keepdim=True), wanted.sum(-1, keepdim=True)
            wanted.div_(wanted_total)
            normaliser.copy_((top + total.log())[:, 0])
            loss.copy_(torch.linalg.vecdot(wanted, gap) - (wanted_top + wanted_total.log())[:, 0] + normaliser)
            if ctx.needs_input_grad[0]:
                targets.copy_(chances.div_(total).sub_(wanted))
        ctx.save_for_backward(teacher)
        ctx.mark_non_differentiable(normalisers)
        return losses, normalisers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses, _):
        (slope,) = ctx.saved_tensors
        return slope * grad_losses[:, None].to(slope.dtype), None


def distillation_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of every row in nats, and logsumexp of the student's, which has no gradient.

    Args:
        student: logits [N, V] of any float dtype.
        teacher: logits [N, V]; their memory is used, they are gone afterwards.

    Returns:
        [N] float32 each.
    """
    return _Distillation.apply(student, teacher)


def next_token_loss(logits: Tensor, normalisers: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, a mean over counted tokens, 0 if there is none.

    logits [B, T, V], their logsumexp [B * T], shifted labels [B, T] (-100: none).
    """
    counted = labels != -100
    chosen = logits.detach().gather(-1, labels.where(counted, 0)[..., None])[..., 0].float()
    return ((normalisers.view_as(chosen) - chosen) * counted).sum() / counted.sum().clamp_min(1)


# --- structure ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSizes:
    """The sizes that count a layer's attention and MLP weights; biases and norms aside, as in the paper."""

    hidden_size: int  # D
    heads: int  # query heads and key-value heads together
    head_dim: int  # d_h
    neurons: int  # H
    gated: bool

    def weights(self, value_width: Tensor | float, pair_width: Tensor | float, neurons: Tensor | float) -> Tensor | float:
        """D (n_heads + n_kv) (dynamic + static width) + 3 D neurons; 2 D neurons if the MLP has no gate."""
        return self.hidden_size * (self.heads * (value_width + pair_width) + (3 if self.gated else 2) * neurons)


def active_ratio(sizes: LayerSizes, value_widths: Tensor, pair_widths: Tensor, neurons: Tensor) -> Tensor:
    """Share of attention and MLP weights that are active, T / T_total, from the widths of L layers, [L] each."""
    whole = sizes.weights(float(sizes.head_dim), float(sizes.head_dim), float(sizes.neurons))
    return (sizes.weights(value_widths, pair_widths, neurons) / whole).mean()


def union_coverage(masks: Tensor) -> Tensor:
    """Share of the neurons that some expert has, mean_j(1 - prod_e(1 - s_ej)): masks [..., E, H] -> [...]."""
    return 1 - (1 - masks).prod(dim=-2).mean(dim=-1)


def balance_loss(choice: Tensor, counted: Tensor | None = None) -> Tensor:
    """sum_e f_e P_e of one layer: 1 / E if experts are used alike, 1 if one expert has all tokens; the gradient flows through P_e.

    Args:
        choice: [N, E], one-hot with the router's straight-through gradient.
        counted: [N] bool, tokens that are no pads; None: all.
    """
    share = choice.mean(dim=0) if counted is None else (choice * counted[:, None]).sum(dim=0) / counted.sum().clamp_min(1)
    return (share.detach() * share).sum()


def largest_and_mean(widths: list[Tensor], counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Largest and mean width of L layers over tokens that are no pads, [L] each, from [N] per layer, or [] where all tokens share it.

    The gradient of a maximum that several tokens reach is shared among them. The mean has none.
    """
    if counted is not None:
        widths = [each if each.dim() == 0 else each[counted] for each in widths]
    return torch.stack([each.amax() for each in widths]), torch.stack([each.detach().mean() for each in widths])


def structure_losses(
    sizes: LayerSizes,
    masks: Tensor,
    choices: list[Tensor],
    value_widths: list[Tensor] | None,
    pair_widths: list[Tensor] | None,
    *,
    p: float,
    counted: Tensor | None = None,
) -> dict[str, Tensor]:
    """R_P, R_U and R_L of one forward with what they are made of, by their names in the model's output.

    Args:
        sizes: of a layer, all open.
        masks: [L, E, H], 0 or 1.
        choices: per layer [N, E], one-hot.
        value_widths: per layer the open dimensions of a head's values, [N]; None: attention is whole.
        pair_widths: the same of queries and keys, or [] per layer where all tokens share them.
        p: target ratio of active weights.
        counted: [N] bool, tokens that are no pads; None: all. If there is none, losses are 0.

    R_U is divided by M = 2 L, whatever is pruned: attention counts as a module that contributes 0, so that its weight is the same.
    """
    empty = counted is not None and not bool(counted.any())
    if empty:
        counted = None
    neurons = masks.sum(dim=-1)  # [L, E]
    whole = (neurons.new_full((len(masks),), float(sizes.head_dim)),) * 2
    values = whole if value_widths is None else largest_and_mean(value_widths, counted)
    pairs = whole if pair_widths is None else largest_and_mean(pair_widths, counted)
    ratio, coverage = active_ratio(sizes, values[0], pairs[0], neurons.amax(dim=-1)), union_coverage(masks)
    with torch.no_grad():
        usage = torch.stack([(choice if counted is None else choice[counted]).mean(dim=0) for choice in choices])  # [L, E]
        mean_ratio = active_ratio(sizes, values[1], pairs[1], (neurons * usage).sum(dim=-1))
    found = {
        "ratio_loss": log_gap(ratio, p),
        "union_loss": log_gap(coverage, 1.0).sum() / (2 * len(masks)),
        "balance_loss": torch.stack([balance_loss(choice, counted) for choice in choices]).mean(),
        "active_ratio_max": ratio.detach(),
        "active_ratio_mean": mean_ratio,
        "union_coverage": coverage.detach().mean(),
    }
    return {name: value * 0 if empty and name.endswith("_loss") else value for name, value in found.items()}
