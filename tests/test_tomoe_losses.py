"""The terms of ToMoE's loss by hand numbers and against torch's own functions."""

import math

import pytest
import torch
from torch.nn import functional as F

from dynamoe_lab.models.causal_lm_loss import causal_lm_loss
from dynamoe_lab.models.tomoe_losses import (
    LayerSizes,
    active_ratio,
    balance_loss,
    distillation_losses,
    largest_and_mean,
    log_gap,
    next_token_loss,
    structure_losses,
    union_coverage,
)

SIZES = LayerSizes(hidden_size=4, heads=3, head_dim=2, neurons=6, gated=True)  # 4 * 3 * (2 + 2) + 3 * 4 * 6 = 120 weights a layer


def logits(rows, words, seed=0, scale=3.0):
    return scale * torch.randn(rows, words, generator=torch.Generator().manual_seed(seed))


# --- distillation -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "words"), [(1, 5), (70, 11), (33, 300)])
def test_distillation_equals_kl_div(rows, words):
    teacher, weights = logits(rows, words, 1), torch.rand(rows)
    ours, theirs = (logits(rows, words, 2).requires_grad_(True) for _ in range(2))
    losses, normalisers = distillation_losses(ours, teacher.clone())
    expected = F.kl_div(theirs.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normalisers, theirs.detach().logsumexp(-1))
    (losses * weights).sum().backward(retain_graph=True)
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    (losses * weights).sum().backward()
    torch.testing.assert_close(ours.grad, 2 * theirs.grad, atol=1e-6, rtol=1e-5)


def test_a_student_that_is_the_teacher_loses_nothing():
    same = logits(9, 50)
    losses, _ = distillation_losses(same.clone().requires_grad_(True), same.clone())
    torch.testing.assert_close(losses, torch.zeros(9), atol=1e-5, rtol=0)


def test_distillation_is_exact_for_large_logits():
    student, teacher = logits(8, 40, 3, scale=200.0), logits(8, 40, 4, scale=200.0)
    expected = F.kl_div(student.double().log_softmax(-1), teacher.double().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(distillation_losses(student, teacher)[0].double(), expected, rtol=1e-5, atol=1e-3)


def test_distillation_in_half_precision():
    teacher, student = logits(40, 60, 1).bfloat16(), logits(40, 60, 2).bfloat16().requires_grad_(True)
    expected = F.kl_div(student.detach().float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="none", log_target=True)
    losses, _ = distillation_losses(student, teacher.clone())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected.sum(-1), atol=1e-4, rtol=1e-4)
    losses.sum().backward()
    slope = student.detach().float().softmax(-1) - teacher.float().softmax(-1)
    torch.testing.assert_close(student.grad.float(), slope, atol=4e-3, rtol=1e-2)


def test_next_token_loss_equals_cross_entropy():
    student = logits(14, 30).view(2, 7, 30)
    labels = torch.randint(30, (2, 7), generator=torch.Generator().manual_seed(1))
    labels[1, 4:] = -100
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
    expected = causal_lm_loss(student, labels, 30)
    torch.testing.assert_close(next_token_loss(student, student.flatten(0, 1).logsumexp(-1), shifted), expected)


# --- structure ----------------------------------------------------------------------------------------------------------------------


def test_log_gap_by_hand():
    values = torch.tensor([0.7, 0.5, 0.3])
    expected = [math.log(0.701 / 0.501), 0.0, math.log(0.501 / 0.301)]
    torch.testing.assert_close(log_gap(values, 0.5), torch.tensor(expected), atol=1e-6, rtol=1e-5)
    slopes = torch.autograd.functional.jacobian(lambda each: log_gap(each, 0.5), values).diagonal()
    torch.testing.assert_close(slopes, torch.tensor([1 / 0.701, 0.0, -1 / 0.301]), rtol=1e-5, atol=1e-6)


def test_active_ratio_by_hand():
    """Layer 0: 4 * 3 * (1 + 2) + 12 * 3 = 72 weights, layer 1: 4 * 3 * (2 + 0) + 12 * 6 = 96; 168 of 240."""
    ratio = active_ratio(SIZES, torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0]), torch.tensor([3.0, 6.0]))
    assert float(ratio) == pytest.approx(0.7)
    plain = LayerSizes(hidden_size=4, heads=3, head_dim=2, neurons=6, gated=False)  # 48 + 48 a layer
    assert float(active_ratio(plain, torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([3.0]))) == pytest.approx(72 / 96)


def test_union_by_hand():
    masks = torch.tensor([[[1.0, 0, 0, 0], [1, 1, 0, 0]], [[1, 0, 1, 0], [0, 1, 0, 1]]])
    torch.testing.assert_close(union_coverage(masks), torch.tensor([0.5, 1.0]))
    wanted = torch.autograd.functional.jacobian(lambda each: union_coverage(each)[0], masks)[0]
    # a neuron of one expert alone, or of none, matters to the union; where another expert has it, too, it does not
    torch.testing.assert_close(wanted, torch.tensor([[0.0, 0, 0.25, 0.25], [0, 0.25, 0.25, 0.25]]))


def test_balance_by_hand():
    alike, collapsed = torch.eye(4), F.one_hot(torch.zeros(4, dtype=torch.long), 4).float()
    assert float(balance_loss(alike)) == pytest.approx(1 / 4)
    assert float(balance_loss(collapsed)) == pytest.approx(1.0)
    choice = F.one_hot(torch.tensor([0, 0, 0, 1]), 2).float().requires_grad_(True)
    balance_loss(choice).backward()
    torch.testing.assert_close(choice.grad, torch.tensor([[0.75, 0.25]] * 4) / 4)  # f_e / N: through P_e alone, not through the count
    counted = torch.tensor([True, False, False, True])
    assert float(balance_loss(choice.detach(), counted)) == pytest.approx(0.5)


def test_largest_and_mean_widths():
    tokens, shared = torch.tensor([3.0, 5.0, 5.0, 9.0], requires_grad=True), torch.tensor(4.0)
    counted = torch.tensor([True, True, True, False])
    largest, mean = largest_and_mean([tokens, shared], counted)
    assert largest.tolist() == [5.0, 4.0]
    torch.testing.assert_close(mean, torch.tensor([13 / 3, 4.0]))
    largest.sum().backward()
    assert tokens.grad.tolist() == [0.0, 0.5, 0.5, 0.0], "tokens that reach the maximum share its gradient"


def test_structure_losses_by_hand():
    """Two layers as in the ratio above; of the second expert's tokens one is a pad."""
    masks = torch.zeros(2, 2, 6)
    masks[0, 0, :3], masks[0, 1, 2:4] = 1, 1  # widths 3 and 2, union 4 of 6
    masks[1, 0, :], masks[1, 1, :2] = 1, 1  # widths 6 and 2, union whole
    choices = [F.one_hot(torch.tensor([0, 0, 1, 1]), 2).float()] * 2
    counted = torch.tensor([True, True, True, False])
    values = [torch.tensor([1.0, 0, 1, 2]), torch.tensor([2.0, 2, 2, 2])]
    pairs = [torch.tensor(2.0), torch.tensor(0.0)]
    found = structure_losses(SIZES, masks, choices, values, pairs, p=0.5, counted=counted)
    assert float(found["active_ratio_max"]) == pytest.approx(0.7)
    assert float(found["ratio_loss"]) == pytest.approx(math.log(0.701 / 0.501), rel=1e-5)
    first, second = 12 * (2 / 3 + 2) + 12 * (2 / 3 * 3 + 1 / 3 * 2), 12 * 2 + 12 * (2 / 3 * 6 + 1 / 3 * 2)
    assert float(found["active_ratio_mean"]) == pytest.approx((first + second) / 240)
    assert float(found["union_coverage"]) == pytest.approx((4 / 6 + 1) / 2)
    assert float(found["union_loss"]) == pytest.approx(math.log(1.001 / (4 / 6 + 0.001)) / 4, rel=1e-5)
    assert float(found["balance_loss"]) == pytest.approx((2 / 3) ** 2 + (1 / 3) ** 2)
    whole = structure_losses(SIZES, masks, choices, None, None, p=0.5)
    assert float(whole["active_ratio_max"]) == pytest.approx((48 + 36 + 48 + 72) / 240), "attention that is whole counts as whole"
    assert float(whole["union_loss"]) == pytest.approx(math.log(1.001 / (4 / 6 + 0.001)) / 4, rel=1e-5), "of 2 L modules, too"
