"""The hypernetwork against a GRU written out, its features and their derivative against autograd."""

import pytest
import torch
from conftest import make_tomoe
from test_tomoe import naive_features, naive_gru
from torch import nn

from dynamoe_lab.models import ToMoEConfig
from dynamoe_lab.models.hypernetwork import Hypernetwork, embedding_features, feature_tangents


@torch.no_grad()
def test_embeddings_are_a_bidirectional_gru_over_modules():
    model = make_tomoe()
    weights = {name: value.double() for name, value in model.hypernetwork.gru.named_parameters()}
    embeddings = model.hypernetwork()
    assert embeddings.shape == (6, 4, 16), "attention and MLP of three layers"
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.double(), naive_gru(model.hypernetwork.z.double(), weights), atol=1e-6, rtol=1e-5)
    spread = torch.cdist(embeddings.flatten(0, 1), embeddings.flatten(0, 1)) + 10 * torch.eye(24)
    assert float(spread.min()) > 0.01, "every expert of every module has an embedding of its own"


def test_only_mlps_are_modules_where_attention_is_whole():
    assert make_tomoe(attention="none").hypernetwork().shape == (3, 4, 16)


def test_experts_are_independent_sequences():
    model = make_tomoe()
    before = model.hypernetwork()
    with torch.no_grad():
        model.hypernetwork.z[:, 1] += 1
    after = model.hypernetwork()
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert bool((after[:, 1] != before[:, 1]).all(-1).all())


def test_z_is_fixed_unless_asked_for():
    assert "z" in dict(Hypernetwork(3, ToMoEConfig()).named_buffers())
    assert "z" in dict(Hypernetwork(3, ToMoEConfig(train_z=True)).named_parameters())
    model = make_tomoe(train_z=True)
    model.hypernetwork().sum().backward()
    assert float(model.hypernetwork.z.grad.abs().sum()) > 0


def test_paper_sizes():
    """z [M, E, 32], 64 units per direction, embeddings of 128."""
    network = Hypernetwork(64, ToMoEConfig())
    assert network.z.shape == (64, 8, 32)
    assert network.gru.hidden_size == 64
    assert network.gru.bidirectional
    assert sum(parameter.numel() for parameter in network.parameters()) == 2 * 3 * (64 * 32 + 64 * 64 + 2 * 64)


def test_float32_under_autocast():
    model = make_tomoe()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = model.hypernetwork()
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, model.hypernetwork())


@pytest.mark.parametrize("size", [2, 16])
def test_features_and_their_derivative(size):
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(size).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size, generator=generator))
        norm.bias.copy_(torch.randn(size, generator=generator))
    embeddings = torch.randn(3, size, generator=generator, dtype=torch.float64)
    directions = torch.randn(5, size, generator=generator, dtype=torch.float64)
    parts = {f"norm.{name}": value for name, value in norm.named_parameters()}
    torch.testing.assert_close(embedding_features(embeddings, norm), naive_features(embeddings, parts))
    with torch.no_grad():
        tangents = feature_tangents(embeddings, directions, norm)
    for expert in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda e: naive_features(e, parts), embeddings[expert])
        torch.testing.assert_close(tangents[expert], directions @ jacobian.T)
