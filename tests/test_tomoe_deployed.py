"""Deployed ToMoE models on their way: saved, loaded, generating; test_travel_bare has them where dynamoe_lab is not installed."""

from pathlib import Path

import pytest
import torch
from conftest import make_blocks, make_dense
from deployed_models import CASES, make_deployed
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dynamoe_lab.models import ToMoEConfig, decoder_layers

cases = pytest.mark.parametrize(("family", "attention"), CASES)
pruned = pytest.mark.parametrize(("family", "attention"), [case for case in CASES if case[0] in ("llama", "gpt_neox")])


@torch.no_grad()
@cases
def test_save_and_load(family, attention, blocks, tmp_path):
    model = make_deployed(family, attention=attention)
    expected = model(blocks.ids).logits  # which lays out copies, none of which is saved
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded.eval()(blocks.ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert loaded.config.moe == model.config.moe
    assert ToMoEConfig.from_dict(loaded.config.moe) == model.moe
    assert not list(tmp_path.glob("*.bin"))
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"tomoe_{family}"
    ours, theirs = ({name for name, parameter in each.named_parameters() if parameter.requires_grad} for each in (loaded, model))
    assert ours == theirs


@torch.no_grad()
@pruned
def test_what_a_file_lacks_is_initialised(family, attention, blocks, tmp_path):
    """Through the meta device: nothing is left empty, and what is there stays."""
    model = make_deployed(family, attention=attention)
    model.save_pretrained(tmp_path)
    parts = (".router.", "membership", ".decoder.", "self_attn.norm.")
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not any(part in k for part in parts)}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(any(part in key for part in parts) for key in info["missing_keys"])
    for name, value in loaded.state_dict().items():
        assert bool(torch.isfinite(value).all())
        assert any(part in name for part in parts) or torch.equal(value, model.state_dict()[name])
    for mlp in loaded.routed_mlps():
        assert bool(mlp.membership.all()), "experts that nobody names have all neurons"
        assert 0 < float(mlp.router.weight.std()) < 1
    assert bool(torch.isfinite(loaded.eval()(blocks.ids).logits).all())


@torch.no_grad()
def test_initialising_again_leaves_the_experts(tmp_path):
    model = make_deployed()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.init_weights()
    for mine, other in zip(loaded.routed_mlps(), model.routed_mlps(), strict=True):
        assert torch.equal(mine.membership, other.membership)


@torch.no_grad()
@cases
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(family, attention, cache):
    """With a cache as without one, a padded batch, too."""
    model = make_deployed(family, attention=attention)
    prompt = greedy = make_blocks(2, 6).ids
    for _ in range(8):
        greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "cache_implementation": cache}
    assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options), greedy)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, 9)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], greedy)


@torch.no_grad()
def test_sliced_keys_make_a_smaller_cache():
    model, dense = make_deployed(), make_dense()
    ids = make_blocks(2, 6).ids
    caches = [each(ids, use_cache=True).past_key_values for each in (model, dense)]
    for layer, pairs in enumerate(model.config.moe["qk_pairs"]):
        ours, theirs = (cache.layers[layer] for cache in caches)
        assert ours.keys.shape == (*theirs.keys.shape[:-1], 2 * len(pairs))
        assert ours.values.shape == theirs.values.shape


@torch.no_grad()
@pytest.mark.parametrize("attention", ["hybrid", "dynamic"])
def test_attention_kernels_agree(attention, blocks):
    model = make_deployed(attention=attention)
    expected = model(blocks.ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(blocks.ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tied_embeddings_stay_tied(tmp_path):
    model = make_deployed(dense=make_dense(tie_word_embeddings=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@torch.no_grad()
def test_copies_follow_the_model(blocks):
    """Laid out at once, kept while nothing changes, dropped by a move."""
    model = make_deployed()
    model.lay_out()
    copies = [mlp._laid_out for mlp in model.routed_mlps()]
    assert all(copies)
    expected = model(blocks.ids).logits
    assert all(mlp._laid_out is kept for mlp, kept in zip(model.routed_mlps(), copies, strict=True))
    model.double()
    assert not any(mlp._laid_out for mlp in model.routed_mlps())
    torch.testing.assert_close(model(blocks.ids).logits.float(), expected, atol=1e-4, rtol=1e-4)
    model.to("meta")
    assert not any(mlp._laid_out for mlp in model.routed_mlps())


def test_activations_may_be_computed_twice(blocks):
    model = make_deployed()
    gradients = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(blocks.ids, labels=blocks.ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_model_card(tmp_path):
    model = make_deployed()
    model.config.moe = {**model.config.moe, "trained_tokens": 1234}
    model.save_pretrained(tmp_path)
    card, moe = (tmp_path / "README.md").read_text(), model.config.moe
    assert "1,234 tokens" in card
    assert f"| {sum(moe['union_sizes']) / 3:.0f} of 96 per layer on average |" in card
    assert f"| {sum(map(len, moe['qk_pairs'])) / 3:.1f} of 8 rotary pairs per layer on average" in card
    assert "| values and output projection | masked per token, computed in full: fewer active parameters, no time saved |" in card
    make_deployed(attention="none").save_pretrained(tmp_path)
    assert "| values and output projection | whole |" in (tmp_path / "README.md").read_text()
    assert str(Path.home()) not in card + (tmp_path / "config.json").read_text()
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_every_layer_of_a_family_is_deployed():
    model = make_deployed("gemma3_text")
    assert [mlp.layer for mlp in model.routed_mlps()] == list(range(len(decoder_layers(model))))
    assert model.pruned_attentions() == []
