"""Next-token cross-entropy without copies of the logits: [N, V] in float32 is what fills the memory of small models in training.

The stock loss keeps, besides the logits, their float32 copy (in half precision), their log-softmax, and in the backward pass two
gradients. Here a few rows at a time are raised to float32; what stays for the backward pass is one number a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["causal_lm_loss", "rows_at_once", "token_losses"]

ROWS = 32  # raised to float32 at a time on a CPU; at a vocabulary of 50 K 6 MB, which stay in cache


def rows_at_once(logits: Tensor) -> int:
    """How many rows of logits [N, V] are raised to float32 together: few on a CPU, 128 MB where every slice is a launch of kernels."""
    return ROWS if logits.device.type == "cpu" else max(ROWS, 2**25 // logits.shape[-1])


class _TokenLosses(torch.autograd.Function):
    """loss_i = logsumexp(logits_i) - logits_i[target_i]; its gradient is softmax(logits_i) - onehot(target_i)."""

    @staticmethod
    def forward(ctx, logits, targets):
        normalisers = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(rows_at_once(logits))])
        ctx.save_for_backward(logits, targets, normalisers)
        return normalisers - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        logits, targets, normalisers = ctx.saved_tensors
        grad = torch.empty_like(logits)
        at_once = rows_at_once(logits)
        pieces = (tensor.split(at_once) for tensor in (logits, targets, normalisers, grad_losses, grad))
        for rows, aims, tops, scales, out in zip(*pieces, strict=True):
            slope = out if out.dtype == tops.dtype else torch.empty_like(out, dtype=tops.dtype)
            torch.sub(rows, tops[:, None], out=slope).exp_()
            slope.scatter_add_(1, aims[:, None], slope.new_full((len(aims), 1), -1.0)).mul_(scales[:, None])
            if slope is not out:
                out.copy_(slope)
        return grad, None


def token_losses(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """-ln p(target) of every row, in nats: logits [N, V] of any float dtype, targets [N] -> [N] float32; 0 where `ignore_index` stands."""
    if not len(targets):
        return logits.new_zeros(0, dtype=torch.float32)
    counted = targets != ignore_index
    return _TokenLosses.apply(logits, targets.where(counted, 0)).where(counted, 0.0)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    """The loss of transformers' causal language models (`ForCausalLMLoss`), with its arguments and values: a mean over counted tokens.

    Args:
        logits: [B, T, V].
        labels: [B, T], -100 where no loss counts; token t predicts label t + 1. Or `shift_labels`, shifted already.
        num_items_in_batch: divide the sum by this instead of the number of counted tokens.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    losses = token_losses(logits.reshape(-1, vocab_size), targets, ignore_index=ignore_index)
    return losses.sum() / ((targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)
