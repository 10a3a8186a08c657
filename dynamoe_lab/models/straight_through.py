"""Decisions that are hard in the forward pass and soft in the backward pass, with Gumbel noise in training (ToMoE, arXiv 2501.15316).

Everything else in ToMoE is an ordinary function of these: which expert a token takes, which neuron an expert has.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GumbelNoise", "one_hot_sample", "open_sample", "open_slope"]


class GumbelNoise:
    """Where all noise of a model is drawn: from torch's global generator, which a resumed training run restores."""

    def gumbel(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Independent Gumbel numbers -log(-log U) of this shape, float32."""
        limits = torch.finfo(torch.float32)
        uniform = torch.rand(shape, device=device).clamp_(limits.tiny, 1 - limits.eps)
        return uniform.log_().neg_().log_().neg_()


def one_hot_sample(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """Straight-through Gumbel-softmax over the last dimension: values exactly one-hot, the gradient that of softmax((logits + noise) / T).

    Args:
        logits: [N, E].
        noise: [N, E], or None: the largest logit wins.

    Returns:
        [N, E] in the dtype of the logits.
    """
    noisy = logits if noise is None else logits + noise
    hard = F.one_hot(noisy.detach().argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return hard
    soft = (noisy / temperature).softmax(dim=-1)
    return hard + (soft - soft.detach())


def open_sample(logits: Tensor, temperature: float) -> Tensor:
    """Straight-through Gumbel-sigmoid: 1 where the logits, noise and offset included, are positive, else 0; the gradient that of
    sigmoid(logits / T). Any shape; the dtype of the logits."""
    hard = (logits.detach() > 0).to(logits.dtype)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return hard
    soft = (logits / temperature).sigmoid()
    return hard + (soft - soft.detach())


def open_slope(logits: Tensor, temperature: float) -> Tensor:
    """The derivative that `open_sample` passes backward: that of sigmoid(logits / T)."""
    soft = (logits.detach() / temperature).sigmoid()
    return soft * (1 - soft) / temperature
