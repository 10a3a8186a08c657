"""The loss against transformers' own, and what it keeps in memory."""

import pytest
import torch
from conftest import make_blocks, make_converted
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from dynamoe_lab.models.causal_lm_loss import ROWS, causal_lm_loss, token_losses

B, T, V = 3, 41, 57  # more rows than are raised at a time, and not a multiple


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(B, T, V, generator=generator)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :7] = -100
    assert B * T > ROWS
    assert B * T % ROWS
    return logits, labels


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(50)}, {"shift_labels": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers(batch, dtype, extra):
    logits, labels = batch[0].to(dtype), batch[1]
    extra = {"shift_labels": labels} if extra.get("shift_labels") else extra
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss, expected = causal_lm_loss(ours, labels, V, **extra), ForCausalLMLoss(theirs, labels, V, **extra)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_token_losses_are_negative_log_probabilities(batch):
    logits, labels = batch[0].reshape(-1, V), batch[1].reshape(-1)
    losses = token_losses(logits, labels)
    expected = -logits.double().softmax(-1).log().gather(1, labels.clamp_min(0)[:, None])[:, 0]
    torch.testing.assert_close(losses.double(), expected.where(labels != -100, 0.0), atol=1e-5, rtol=1e-5)
    assert token_losses(logits[:0], labels[:0]).shape == (0,)


def test_nothing_counted_is_not_a_number(batch):
    assert torch.isnan(causal_lm_loss(batch[0], torch.full_like(batch[1], -100), V)), "as in transformers"


def test_no_second_copy_of_the_logits_is_kept(batch):
    """What autograd keeps for the backward pass: the logits themselves, and nothing else of their size."""
    logits, labels = batch[0].clone().requires_grad_(), batch[1]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        causal_lm_loss(logits, labels, V)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert {tensor.data_ptr() for tensor in large} == {logits.data_ptr()}


def test_models_use_it(family):
    model, ids = make_converted(family), make_blocks().ids
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.lm_loss, expected, atol=1e-5, rtol=1e-5)
    assert "TokenLosses" in str(output.lm_loss.grad_fn.next_functions[0][0].next_functions[0][0].next_functions)
