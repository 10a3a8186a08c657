"""Checkpoints on their way: saved, loaded, read as the plain dense family, and used in an environment that has no dynamoe_lab."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, PICO, make_blocks, make_converted, make_dense
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import dynamoe_lab.models
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
    found["similarities"] = float((torch.stack(output.similarities) - expected["similarities"]).abs().max())

    prompt = greedy = expected["ids"][:2, :6]
    for _ in range(8):  # without a cache, one whole forward a token
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
    assert not list(again.glob("*.bin"))
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


def bare_environment(folder: Path) -> Path:
    """The Python of a virtual environment with everything that is installed here but this package and .pth files."""
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if (
                not entry.name.startswith(("dynamoe_lab", "__editable__"))
                and entry.suffix != ".pth"
                and not (packages / entry.name).exists()
            ):
                (packages / entry.name).symlink_to(entry)
    return Path(sysconfig.get_path("scripts", "venv", vars={"base": str(folder)})) / Path(sys.executable).name


def word_tokenizer():
    """A tokenizer of one word a token, made here: `w17` is token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(PICO["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def travelled(tmp_path_factory):
    """What one fresh process without this package found in every family's checkpoint."""
    folder = tmp_path_factory.mktemp("travel")
    blocks, cases = make_blocks(), {name: (name, {}) for name in FAMILIES} | {"frozen": ("opt", {"label_target": "frozen"})}
    for name, (family, changes) in cases.items():
        model = make_converted(family, **changes)
        model.save_pretrained(folder / "models" / name)
        word_tokenizer().save_pretrained(folder / "models" / name)
        with torch.no_grad():
            output = model(blocks.ids, output_router_logits=True)
        expected = {"ids": blocks.ids, "logits": output.logits, "similarities": torch.stack(output.similarities)}
        torch.save(expected, folder / "models" / name / "expected.pt")
    (folder / "program.py").write_text(PROGRAM)
    keep = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "HF_MODULES_CACHE": str(folder / "modules"), "HOME": str(folder)}
    command = [bare_environment(folder / "venv"), folder / "program.py", folder / "models", folder / "results.json"]
    done = subprocess.run(command, cwd=folder, env={**keep, **cache}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", [*FAMILIES, "frozen"])
def test_works_where_this_package_is_not_installed(travelled, name):
    found = travelled[1][name]
    assert "error" not in found, found["error"]
    assert found["module"].startswith("transformers_modules.")
    assert found["logits"] < 1e-5
    assert found["similarities"] < 1e-5
    assert found["generates"], "generation with a cache is not the greedy continuation"
    assert found["pipeline"][0] == found["pipeline"][1]
    assert len(found["pipeline"][0]) == 8
    assert found["reloaded"] < 1e-5


def test_the_code_beside_the_weights_is_this_code(travelled):
    source = Path(dynamoe_lab.models.__file__).parent
    for folder in (travelled[0] / "models").iterdir():
        for copy in (folder, folder / "again"):
            files = sorted(copy.glob("*.py"))
            assert {path.name for path in files} >= {"modeling_dynamoe.py", "nested_mlp.py", "layer_mlp.py", "families.py"}
            for path in files:
                assert path.read_text() == (source / path.name).read_text()
            assert json.loads((copy / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"].startswith("modeling_dynamoe.")
