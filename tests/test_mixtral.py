"""ToMoE models as stock Mixtrals: equal logits, loaded by transformers alone; and which models cannot be one."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import PICO, close, make_blocks, make_dense
from deployed_models import make_masked
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import dynamoe_lab as lab
from dynamoe_lab.errors import InputError

families = pytest.mark.parametrize("family", ["llama", "mistral"])
UNLIKE_MISTRAL = {  # what either family may have and Mixtral has, too
    "plain": {},
    "long rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "wide heads, one shared": {"head_dim": 32, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "another activation": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
}


@torch.no_grad()
@families
@pytest.mark.parametrize("changes", UNLIKE_MISTRAL.values(), ids=UNLIKE_MISTRAL)
def test_equals_the_masked_model(family, changes, blocks, tmp_path):
    masked = make_masked(family, dense=make_dense(family, **changes), attention="none")
    model = lab.export(masked, form="mixtral")
    assert type(model) is MixtralForCausalLM
    assert type(model.config) is MixtralConfig
    assert not model.training
    expected = masked(blocks.ids).logits
    close(model(blocks.ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MixtralForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(loaded.eval()(blocks.ids).logits, expected)
    assert not list(tmp_path.glob("*.py")), "no code of ours goes with it"
    assert "moe" not in model.config.to_dict()


@torch.no_grad()
@families
def test_shapes(family):
    masked = make_masked(family, attention="none")
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    model = lab.export(masked, form="mixtral")
    widths = [layer.experts.sum(1) for layer in masked.layer_masks()]
    width = model.config.intermediate_size
    assert max(int(each.max()) for each in widths) <= width < max(int(each.max()) for each in widths) + 8
    assert width % 8 == 0
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 1)
    for layer, counts in zip(model.model.layers, widths, strict=True):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        down = layer.mlp.experts.down_proj
        for expert, count in enumerate(counts):
            for rows in (gate[expert], up[expert], down[expert].T):
                assert bool(rows[:count].any(dim=1).all())
                assert not rows[count:].any()
    assert all(torch.equal(before[name], value) for name, value in masked.state_dict().items())


@torch.no_grad()
def test_windows_are_the_familys():
    """A Llama has none; Mistral's may be shorter than the text."""
    blocks = make_blocks(3, 24)
    assert lab.export(make_masked("llama", attention="none"), form="mixtral").config.sliding_window is None
    for window in (None, 5):
        dense = make_dense("mistral")
        dense.config.sliding_window = window
        masked = make_masked("mistral", dense=dense, attention="none")
        model = lab.export(masked, form="mixtral")
        assert model.config.sliding_window == window
        close(model(blocks.ids).logits, masked(blocks.ids).logits)


@torch.no_grad()
@families
def test_generate_and_pads(family, blocks):
    masked = make_masked(family, attention="none")
    model = lab.export(masked, form="mixtral")
    mask = torch.ones_like(blocks.ids)
    mask[1, :5] = mask[2, :9] = 0
    close(model(blocks.ids, attention_mask=mask).logits[mask.bool()], masked(blocks.ids, attention_mask=mask).logits[mask.bool()])
    prompt = blocks.ids[:2, :6]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **options), masked.generate(prompt, **options))


@torch.no_grad()
def test_experts_without_neurons(blocks):
    masked = make_masked(attention="none")
    for mlp in masked.routed_mlps():
        features = torch.nn.functional.gelu(mlp.norm(masked.hypernetwork()[mlp.layer]))
        aim = torch.tensor([-2.0, 2.0, -2.0, -2.0])
        mlp.decoder.weight.copy_(torch.linalg.lstsq(features, aim[:, None]).solution.T.expand_as(mlp.decoder.weight))
    assert masked.layer_masks()[0].experts.any(1).tolist() == [False, True, False, False]
    model = lab.export(masked, form="mixtral")
    close(model(blocks.ids).logits, masked(blocks.ids).logits)
    for mlp in masked.routed_mlps():
        mlp.decoder.weight.zero_()
    masked.moe.mask_offset = -1.0
    assert not masked.layer_masks()[0].experts.any()
    close(lab.export(masked, form="mixtral")(blocks.ids).logits, masked(blocks.ids).logits)


@torch.no_grad()
def test_half_precision(blocks, tmp_path):
    masked = make_masked(dense=make_dense(dtype="bfloat16"), attention="none")
    model = lab.export(masked, form="mixtral")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    theirs = masked(blocks.ids).logits.float()
    near = (model(blocks.ids).logits.float() - theirs).norm(dim=-1) < 0.1 * theirs.norm(dim=-1)
    assert near.float().mean() > 0.8, "its router is bfloat16, too, so that some tokens take another expert"


PROGRAM = """
import sys
import torch
from transformers import AutoModelForCausalLM
expected = torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(expected["ids"]).logits
    prompt = expected["ids"][:2, :6]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
assert not [name for name in sys.modules if name.startswith("dynamoe_lab")]
print(type(model).__name__, float((logits - expected["logits"]).abs().max()) < 1e-4, torch.equal(text, expected["text"]))
"""


@torch.no_grad()
def test_a_process_that_knows_nothing_of_us(blocks, tmp_path):
    masked = make_masked("mistral", attention="none")
    lab.export(masked, form="mixtral").save_pretrained(tmp_path)
    prompt = blocks.ids[:2, :6]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    text = masked.generate(prompt, **options)
    torch.save({"ids": blocks.ids, "logits": masked(blocks.ids).logits, "text": text}, tmp_path / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["MixtralForCausalLM", "True", "True"]


REFUSED = {
    "pruned attention": ({}, {"attention": "hybrid"}, "llama", r"pruned attention \(tomoe.attention = 'hybrid'\)"),
    "masks per token": ({}, {"attention": "dynamic"}, "mistral", r"pruned attention \(tomoe.attention = 'dynamic'\)"),
    "qwen2": ({}, {"attention": "none"}, "qwen2", r"biases \(qwen2: self_attn.q_proj.bias"),
    "attention_bias": ({"attention_bias": True}, {"attention": "none"}, "llama", r"biases \(llama: self_attn.q_proj.bias"),
    "mlp_bias": ({"mlp_bias": True}, {"attention": "none"}, "llama", r"biases \(llama: mlp.gate_proj.bias"),
    "qwen3": ({}, {}, "qwen3", "the norms of qwen3"),
    "gemma3_text": ({}, {}, "gemma3_text", "the norms of gemma3_text"),
    "gpt_neox": ({}, {}, "gpt_neox", r"MLPs without a gate \(gpt_neox\)"),
    "phi": ({}, {}, "phi", r"MLPs without a gate \(phi\)"),
}


@pytest.mark.parametrize(("dense", "changes", "family", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(dense, changes, family, reason):
    masked = make_masked(family, dense=make_dense(family, **dense), **changes)
    with pytest.raises(InputError, match=f"export: no Mixtral has {reason}.*; export this model with form='tomoe'") as refused:
        lab.export(masked, form="mixtral")
    assert "\n" not in str(refused.value)
    assert re.search(r"tomoe", str(refused.value))


def test_no_expert_count_is_lost():
    masked = make_masked(attention="none", num_experts=2)
    model = lab.export(masked, form="mixtral")
    assert model.config.num_local_experts == 2
    assert model.model.layers[0].mlp.gate.weight.shape == (2, PICO["hidden_size"])
