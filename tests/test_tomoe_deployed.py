"""Deployed ToMoE models on their way: saved, loaded, generating, and used in an environment that has no dynamoe_lab."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import make_blocks, make_dense
from deployed_models import CASES, make_deployed, make_masked
from safetensors.torch import load_file, save_file
from test_travel import bare_environment, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import dynamoe_lab.models
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


# --- an environment without this package ---------------------------------------------------------------------------------------------

PROGRAM = """
import importlib.util, json, sys, traceback
from pathlib import Path
assert importlib.util.find_spec("dynamoe_lab") is None, "dynamoe_lab can be imported here"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_grad_enabled(False)


def check(folder):
    found = {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    found["module"] = type(model).__module__
    expected = torch.load(folder / "expected.pt", weights_only=True)
    output = model(expected["ids"], output_router_logits=True)
    found["logits"] = float((output.logits - expected["logits"]).abs().max())
    found["experts"] = bool((torch.stack(output.experts) == expected["experts"]).all())

    prompt = greedy = expected["ids"][:2, :6]
    for _ in range(8):
        greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], dim=1)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
    found["generates"] = torch.equal(cached, greedy)

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    write = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, trust_remote_code=True)
    text = write(tokenizer.decode(prompt[0]), return_full_text=False, **options)[0]["generated_text"]
    found["pipeline"] = [text.split(), tokenizer.decode(greedy[0, 6:]).split()]

    again = folder / "again"
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    found["reloaded"] = float((reloaded(expected["ids"]).logits - output.logits).abs().max())
    return found


results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        results[folder.name] = check(folder)
    except Exception:
        results[folder.name] = {"error": traceback.format_exc()}
Path(sys.argv[2]).write_text(json.dumps(results))
"""
TRAVELLERS = {f"{family}-{attention}": (family, attention) for family, attention in CASES}


@pytest.fixture(scope="module")
def travelled(tmp_path_factory):
    """What one fresh process without this package found in every family's checkpoint; expected is what the masked models say."""
    folder = tmp_path_factory.mktemp("travel")
    blocks = make_blocks()
    for name, (family, attention) in TRAVELLERS.items():
        make_deployed(family, attention=attention).save_pretrained(folder / "models" / name)
        word_tokenizer().save_pretrained(folder / "models" / name)
        with torch.no_grad():
            output = make_masked(family, attention=attention)(blocks.ids, output_router_logits=True)
        expected = {"ids": blocks.ids, "logits": output.logits, "experts": torch.stack(output.experts)}
        torch.save(expected, folder / "models" / name / "expected.pt")
    (folder / "program.py").write_text(PROGRAM)
    keep = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "HF_MODULES_CACHE": str(folder / "modules"), "HOME": str(folder)}
    command = [bare_environment(folder / "venv"), folder / "program.py", folder / "models", folder / "results.json"]
    done = subprocess.run(command, cwd=folder, env={**keep, **cache}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", TRAVELLERS)
def test_works_where_this_package_is_not_installed(travelled, name):
    found = travelled[1][name]
    assert "error" not in found, found["error"]
    assert found["module"].startswith("transformers_modules.")
    assert found["logits"] < 1e-4
    assert found["experts"]
    assert found["generates"], "generation with a cache is not the greedy continuation"
    assert found["pipeline"][0] == found["pipeline"][1]
    assert len(found["pipeline"][0]) == 8
    assert found["reloaded"] < 1e-5


def test_the_code_beside_the_weights_is_this_code(travelled):
    source = Path(dynamoe_lab.models.__file__).parent
    for folder in (travelled[0] / "models").iterdir():
        for copy in (folder, folder / "again"):
            files = {path.name for path in copy.glob("*.py")}
            assert files >= {"modeling_tomoe_deployed.py", "expert_mlp.py", "pruned_attention.py", "families.py", "routed.py"}
            assert not files & {"hypernetwork.py", "masked_mlp.py", "modeling_tomoe.py", "nested_mlp.py"}, "only what it needs"
            for name in files:
                assert (copy / name).read_text() == (source / name).read_text()
            automatic = json.loads((copy / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
            assert automatic.startswith("modeling_tomoe_deployed.ToMoE")


def test_every_layer_of_a_family_is_deployed():
    model = make_deployed("gemma3_text")
    assert [mlp.layer for mlp in model.routed_mlps()] == list(range(len(decoder_layers(model))))
    assert model.pruned_attentions() == []
