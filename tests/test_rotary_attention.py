"""Attention that is masked or cut asks its kernel for what the family's own does, and gives its weights where the family's does."""

import pytest
import torch
from conftest import make_dense
from deployed_models import make_deployed, make_masked
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

WINDOWS = {
    "llama": ({}, [None] * 3),
    "mistral": ({"sliding_window": 8}, [8] * 3),
    "qwen2": (
        {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        [8, None, 8],
    ),
}


@pytest.fixture
def asked() -> list[dict]:
    """What the attention function "recording" was asked for since the test began, a dict a call."""
    calls = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        calls.append({name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)})
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("attention", ["hybrid", "dynamic"])
def test_kernels_are_asked_for_the_same(family, attention, asked, blocks):
    """Fused kernels know the window from this call alone."""
    changes, windows = WINDOWS[family]
    dense = make_dense(family, **changes)
    for model in (dense, make_masked(family, dense=dense, attention=attention), make_deployed(family, dense=dense, attention=attention)):
        model.set_attn_implementation("recording")
        model(blocks.ids)
    calls = [asked[start : start + 3] for start in range(0, len(asked), 3)]
    assert len(calls) == 3
    for layer, window in enumerate(windows):
        first, *others = ({"sliding_window": None, **call[layer]} for call in calls)
        assert first["sliding_window"] == window
        for other in others:
            assert {name: other.get(name) for name in first} == first


@torch.no_grad()
@pytest.mark.parametrize("family", WINDOWS)
def test_attention_weights(family, blocks):
    """With everything open those of the dense model, from the masked and from the deployed form that has all pairs."""
    dense = make_dense(family)
    dense.set_attn_implementation("eager")
    expected = dense(blocks.ids, output_attentions=True).attentions
    for make in (make_masked, make_deployed):
        model = make(family, attention="dynamic", dense=make_dense(family))
        model.set_attn_implementation("eager")
        model.set_routing("full")
        found = model(blocks.ids, output_attentions=True).attentions
        assert len(found) == len(expected) == 3
        if make is make_masked:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert all(weights.shape == (len(blocks), 4, 24, 24) for weights in found)
        assert model(blocks.ids).attentions is None
    hybrid = make_deployed(family)
    hybrid.set_attn_implementation("eager")
    assert len(hybrid(blocks.ids, output_attentions=True).attentions) == 3
