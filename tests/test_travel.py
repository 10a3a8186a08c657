"""Checkpoints on their way: saved, loaded, read as the plain dense family; test_travel_bare has them where dynamoe_lab is not installed."""

from pathlib import Path

import pytest
import torch
from conftest import make_converted, make_dense
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dynamoe_lab.models import DynaMoEConfig, family_of


def same_weights(first, second) -> bool:
    values = second.state_dict()
    return all(torch.equal(value, values[name]) for name, value in first.state_dict().items()) and len(values) == len(first.state_dict())


def without(folder: Path, *parts: str) -> dict:
    """The weights of a checkpoint but those whose name has one of these parts."""
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if not any(part in name for part in parts)}


@torch.no_grad()
@pytest.mark.parametrize("target", ["current", "frozen"])
def test_save_and_load(family, target, blocks, tmp_path):
    model = make_converted(family, label_target=target)
    for mlp in model.nested_mlps():  # so that what the labels come from is no longer what makes the output
        mlp.up.weight.mul_(1 + 0.1 * torch.randn(mlp.up.weight.shape))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_weights(loaded, model)
    ours, theirs = (each.eval()(blocks.ids, output_router_logits=True) for each in (loaded, model))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)  # rounding depends on where in memory the weights lie
    for first, second in zip(ours.similarities, theirs.similarities, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert DynaMoEConfig.from_dict(loaded.config.moe) == model.moe
    assert not list(tmp_path.glob("*.bin"))


def test_model_card(tmp_path):
    model = make_converted(label_target="frozen")
    model.config.moe = {**model.config.moe, "trained_tokens": 1234}
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert all(word in card for word in ("1,234 tokens", "theta", "frozen.*"))
    make_converted().save_pretrained(tmp_path)
    assert "frozen.*" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert str(Path.home()) not in card + (tmp_path / "config.json").read_text()


@torch.no_grad()
@pytest.mark.parametrize("target", ["current", "frozen"])
def test_without_our_tensors_it_is_a_plain_dense_checkpoint(family, target, blocks, tmp_path):
    dense = make_dense(family)
    dense.save_pretrained(tmp_path / "dense")
    make_converted(family, label_target=target).save_pretrained(tmp_path / "moe")
    parts = (".router.", ".frozen.") if target == "frozen" else (".router.",)
    weights = without(tmp_path / "moe", *parts)
    original = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in original.items()}
    (tmp_path / "plain").mkdir()
    save_file(weights, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    dense.config.save_pretrained(tmp_path / "plain")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert type(plain) is family_of(family).causal_lm
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(plain.eval()(blocks.ids).logits, dense(blocks.ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tied_embeddings_stay_tied(family, tmp_path):
    model = make_converted(family, dense=make_dense(family, tie_word_embeddings=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    untied = make_converted(family, dense=make_dense(family, tie_word_embeddings=False))
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


@torch.no_grad()
def test_what_a_file_lacks_is_initialised(family, tmp_path):
    """A dense-only file loads (through the meta device) with fresh routers and a frozen copy of its own MLPs; nothing is left empty."""
    model = make_converted(family, label_target="frozen")
    model.save_pretrained(tmp_path)
    save_file(without(tmp_path, ".router.", ".frozen."), tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(".router." in key or ".frozen." in key for key in info["missing_keys"])
    for mlp in loaded.nested_mlps():
        for parameter in mlp.router.parameters():
            assert bool(torch.isfinite(parameter).all())
            assert 0 < float(parameter.std()) < 1
    for name, value in model.state_dict().items():
        assert ".router." in name or torch.equal(loaded.state_dict()[name], value), name


def test_config_survives_json(family, tmp_path):
    config = make_converted(family, train_route=2, label_target="frozen").config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.model_type == f"dynamoe_{family}"
    assert loaded.moe == config.moe
    assert DynaMoEConfig.from_dict(loaded.moe).train_route == 2
