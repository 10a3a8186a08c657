"""Dense -> masked ToMoE: what convert keeps, draws and refuses; checkpoints saved and loaded."""

from pathlib import Path

import pytest
import torch
from conftest import make_converted, make_dense, make_tomoe
from safetensors.torch import load_file, save_file
from test_tomoe import TOMOE, every_family, make_pruned
from test_travel import same_weights, without
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaModel

import dynamoe_lab as lab
import dynamoe_lab.models
from dynamoe_lab.conversion import convert
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import MASKED_CLASSES, MASKED_CONFIGS, ToMoEConfig, family_of

OURS = ("hypernetwork.", ".router.", ".mlp.norm.", ".self_attn.norm.", ".decoder.")
WHOLE = [family for family in TOMOE if family_of(family).whole_heads]


# --- conversion ---------------------------------------------------------------------------------------------------------------------


@every_family
def test_weights_keep_their_names_and_values(family):
    dense = make_dense(family)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    model = convert(dense, lab.ToMoEConfig(attention="none" if family in WHOLE else "hybrid"))
    assert not model.training
    assert type(model) is MASKED_CLASSES[family]
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(any(part in name for part in OURS) for name in after if name not in before)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items()), "the dense model is untouched"
    model.get_input_embeddings().weight.data.add_(1)
    assert torch.equal(dense.get_input_embeddings().weight, before[next(iter(before))]), "and shares no memory"


def test_fresh_weights_come_from_the_seed():
    first, second, other = (make_tomoe(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    ours = [name for name in first if any(part in name for part in OURS)]
    for name in ours:
        assert torch.isfinite(first[name]).all()
        if ".norm." in name:
            assert bool((first[name] == (0 if name.endswith("bias") else 1)).all())
        else:
            assert not torch.equal(first[name], other[name]), name
    decoder = first["model.layers.1.mlp.decoder.weight"]
    assert float(decoder.std()) == pytest.approx((3 * 16) ** -0.5, rel=0.1), "as torch draws linear maps"
    assert float(decoder.abs().max()) <= 16**-0.5
    assert float(first["hypernetwork.z"].std()) == pytest.approx(1, rel=0.15)


def test_provenance_travels():
    moe = make_tomoe(p=0.7).config.moe
    assert (moe["method"], moe["p"], moe["trained_tokens"], moe["base"]) == ("tomoe", 0.7, 0, "")
    dense = make_dense()
    dense.config._name_or_path = "/srv/models/mine"
    assert make_tomoe(dense=dense).config.moe["base"] == "mine"


def quantized():
    dense = make_dense()
    dense.config.quantization_config = {"quant_method": "any"}
    return dense


@pytest.mark.parametrize(
    ("dense", "changes", "says"),
    [
        *((lambda family=family: make_dense(family), {}, f"hybrid.*heads of {family}.*set attention='none'") for family in WHOLE),
        *((lambda family=family: make_dense(family), {"attention": "dynamic"}, "set attention='none'") for family in WHOLE),
        (lambda: make_dense("qwen3"), {}, "normalises queries and keys"),
        (lambda: make_dense("phi"), {}, "rotates only part"),
        (lambda: make_dense("gpt_neox"), {}, "one matrix"),
        (lambda: make_dense("opt"), {"attention": "none"}, "does not take opt"),
        (lambda: make_dense("opt"), {}, "does not take opt"),
        (make_tomoe, {}, "converted one already.*tomoe_masked_llama"),
        (make_converted, {}, "converted one already"),
        (quantized, {}, "quantized"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)), {}, "gpt2.*not supported"),
        (lambda: LlamaModel(make_dense().config), {}, "no language model head"),
        (lambda: torch.nn.Linear(2, 2), {}, "expected a transformers model"),
    ],
)
def test_bad_conversions_are_refused_in_one_line(dense, changes, says):
    with pytest.raises(InputError, match=says) as refusal:
        convert(dense(), ToMoEConfig(**changes))
    assert "\n" not in str(refusal.value)


def test_a_tomoe_model_is_no_dense_parent():
    with pytest.raises(InputError, match="converted one already"):
        convert(make_tomoe())


def test_models_refuse_what_convert_refuses():
    values = {name: value for name, value in make_dense("qwen3").config.to_dict().items() if name != "model_type"}
    with pytest.raises(ValueError, match="normalises queries and keys"):
        MASKED_CLASSES["qwen3"](MASKED_CONFIGS["qwen3"](**values, moe=ToMoEConfig().to_dict()))
    with pytest.raises(ValueError, match="moe is empty"):
        MASKED_CLASSES["qwen3"](MASKED_CONFIGS["qwen3"](**values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_experts": 0}, "num_experts = 0"),
        ({"p": 0}, "p = 0"),
        ({"p": 1.2}, "p = 1.2"),
        ({"attention": "static"}, "hybrid, none, dynamic"),
        ({"router_temperature": 0}, "router_temperature"),
        ({"mask_temperature": -1}, "mask_temperature"),
        ({"lambda_union": -1}, "lambda_union"),
        ({"embedding_size": 7}, "even"),
        ({"noise_size": 0}, "noise_size"),
    ],
)
def test_impossible_settings_are_refused(values, says):
    with pytest.raises(ValueError, match=says) as refusal:
        ToMoEConfig(**values)
    assert "\n" not in str(refusal.value)


# --- checkpoints --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_family
def test_save_and_load(family, blocks, tmp_path):
    model = make_pruned(family, train_z=family == "llama")
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_weights(loaded, model)
    assert torch.equal(loaded.eval()(blocks.ids).logits, model(blocks.ids).logits)
    assert ToMoEConfig.from_dict(loaded.config.moe) == model.moe
    assert loaded.config.moe == model.config.moe
    learns = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, parameter in model.named_parameters() if parameter.requires_grad}, "frozen weights stay frozen"
    assert not list(tmp_path.glob("*.bin"))
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"tomoe_masked_{family}"


@torch.no_grad()
def test_what_tomoe_adds_is_float32_in_half_precision_files(blocks, tmp_path):
    model = make_pruned(dense=make_dense(dtype="bfloat16"))
    model.save_pretrained(tmp_path)
    for dtype in ("auto", torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert same_weights(loaded, model)
        for name, value in loaded.state_dict().items():
            assert value.dtype == (torch.float32 if any(part in name for part in OURS) else torch.bfloat16), name
        assert torch.equal(loaded.eval()(blocks.ids).logits, model(blocks.ids).logits)


@torch.no_grad()
@every_family
def test_without_our_tensors_it_is_a_plain_dense_checkpoint(family, blocks, tmp_path):
    dense = make_dense(family)
    dense.save_pretrained(tmp_path / "dense")
    make_tomoe(family).save_pretrained(tmp_path / "moe")
    weights = without(tmp_path / "moe", *OURS)
    original = load_file(tmp_path / "dense" / "model.safetensors")
    assert weights.keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in weights.items())


@torch.no_grad()
@every_family
def test_what_a_file_lacks_is_drawn(family, blocks, tmp_path):
    """A dense-only file loads (through the meta device) with what ToMoE adds fresh from the seed; nothing is left empty."""
    model = make_tomoe(family)
    model.save_pretrained(tmp_path)
    save_file(without(tmp_path, *OURS), tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(any(part in key for part in OURS) for key in info["missing_keys"])
    assert same_weights(loaded, model), "the seed draws what convert drew"
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert all(bool(torch.isfinite(value).all()) for value in fresh.state_dict().values())
    assert all(
        torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items() if name.startswith("hypernetwork")
    )


@torch.no_grad()
def test_tied_embeddings_stay_tied(tmp_path):
    for tied in (True, False):
        model = make_tomoe(dense=make_dense(tie_word_embeddings=tied))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        for each in (model, loaded):
            assert (each.get_output_embeddings().weight is each.get_input_embeddings().weight) == tied


def test_model_card(tmp_path):
    model = make_tomoe(p=0.7, attention="dynamic")
    model.config.moe = {**model.config.moe, "trained_tokens": 1234}
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert all(word in card for word in ("ToMoEMaskedLlamaForCausalLM", "1,234 tokens", "| 0.7 |", "pruned per token", "lab.export"))
    make_tomoe().save_pretrained(tmp_path)
    assert "converted only" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert str(Path.home()) not in card + (tmp_path / "config.json").read_text()
