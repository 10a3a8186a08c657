"""Straight-through samples: hard values exactly, soft gradients exactly, noise with Gumbel's distribution."""

import math

import pytest
import torch

from dynamoe_lab.models.straight_through import GumbelNoise, one_hot_sample, open_sample, open_slope


def gradient(function, logits):
    logits = logits.clone().requires_grad_(True)
    weights = torch.linspace(-1, 2, logits.numel()).view_as(logits)
    (function(logits) * weights).sum().backward()
    return logits.grad


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_one_hot_is_hard_forward_and_a_softmax_backward(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(7, 5, generator=generator) for _ in range(2))
    sample = one_hot_sample(logits.requires_grad_(True), noise, temperature)
    assert set(sample.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(sample.detach().argmax(-1), (logits + noise).argmax(-1))
    assert torch.equal(sample.detach().sum(-1), torch.ones(7))
    expected = gradient(lambda each: ((each + noise) / temperature).softmax(-1), logits.detach())
    torch.testing.assert_close(gradient(lambda each: one_hot_sample(each, noise, temperature), logits.detach()), expected)
    without = one_hot_sample(logits.detach(), None, temperature)
    assert torch.equal(without.argmax(-1), logits.argmax(-1)), "without noise the largest logit wins"


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_open_is_rounded_forward_and_a_sigmoid_backward(temperature):
    logits = torch.cat((torch.tensor([0.0, 1e-9, -1e-9]), torch.randn(50, generator=torch.Generator().manual_seed(0))))
    sample = open_sample(logits.clone().requires_grad_(True), temperature).detach()
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    assert sample[:3].tolist() == [0.0, 1.0, 0.0], "open where the logit is above 0, as in the exported masks"
    assert torch.equal(sample[3:], torch.round(torch.sigmoid(logits[3:] / temperature)))
    assert torch.equal(open_sample(logits, temperature), sample), "the same mask without gradient"
    expected = gradient(lambda each: torch.sigmoid(each / temperature), logits)
    torch.testing.assert_close(gradient(lambda each: open_sample(each, temperature), logits), expected)
    slope = gradient(lambda each: torch.sigmoid(each / temperature), logits) / torch.linspace(-1, 2, len(logits))
    torch.testing.assert_close(open_slope(logits, temperature), slope)


def test_noise_is_gumbel():
    torch.manual_seed(0)
    drawn = GumbelNoise().gumbel((200_000,), torch.device("cpu"))
    assert drawn.dtype == torch.float32
    assert bool(torch.isfinite(drawn).all())
    assert float(drawn.mean()) == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert float(drawn.std()) == pytest.approx(math.pi / 6**0.5, abs=0.01)
    for value in (-1.0, 0.0, 2.0):
        assert float((drawn < value).float().mean()) == pytest.approx(math.exp(-math.exp(-value)), abs=0.005)


def test_noise_comes_from_the_global_generator():
    torch.manual_seed(3)
    first = GumbelNoise().gumbel((4, 5), torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(GumbelNoise().gumbel((4, 5), torch.device("cpu")), first)
    assert not torch.equal(GumbelNoise().gumbel((4, 5), torch.device("cpu")), first)


def test_extreme_numbers_stay_finite(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, device=None: torch.tensor([0.0, 1.0]))
    assert bool(torch.isfinite(GumbelNoise().gumbel((2,), torch.device("cpu"))).all())
