"""Converted models against the dense model and against formulas computed another way, for every family."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_blocks, make_converted, make_dense
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from dynamoe_lab.models import DynaMoEConfig, decoder_layers, family_of, labels_from_similarity


def naive_expert(mlp, x, fraction):
    """A separate MLP cut out of the weights, written from the definition."""
    size = round(fraction * mlp.down_proj.in_features)
    hidden = F.silu(x @ mlp.gate_proj.weight[:size].T) * (x @ mlp.up_proj.weight[:size].T)
    return hidden @ mlp.down_proj.weight[:, :size].T


def naive_labels(mlp, x, theta):
    """E separate MLPs, one cosine each, the first that is close enough."""
    outputs = [naive_expert(mlp, x, fraction) for fraction in mlp.moe.experts]
    labels = torch.full((len(x),), len(outputs) - 1)
    for expert in reversed(range(len(outputs) - 1)):
        close = F.cosine_similarity(outputs[expert].double(), outputs[-1].double(), dim=-1) >= theta
        labels[close] = expert
    return labels


def captured_inputs(model, ids, **kwargs):
    """What every nested MLP is given in one forward: list of [N, D]."""
    inputs = []
    handles = [mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1))) for mlp in model.nested_mlps()]
    with torch.no_grad():
        output = model(input_ids=ids, **kwargs)
    for handle in handles:
        handle.remove()
    return inputs, output


@torch.no_grad()
def test_full_routing_is_the_dense_function(family, blocks):
    dense, model = make_dense(family), make_converted(family)
    model.set_routing("full")
    expected = dense(blocks.ids).logits
    torch.testing.assert_close(model(blocks.ids).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(blocks.ids, output_router_logits=True).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_reordering_moved_neurons_and_dense_is_untouched(family):
    dense = make_dense(family)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    model = make_converted(family, dense=dense)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    for ours, theirs in zip(model.nested_mlps(), decoder_layers(dense), strict=True):
        assert not torch.equal(ours.up_proj.weight, theirs.mlp.up_proj.weight)
        assert torch.equal(ours.up_proj.weight.sum(1).sort().values, theirs.mlp.up_proj.weight.sum(1).sort().values)


@torch.no_grad()
@pytest.mark.parametrize("experts", [(0.25, 0.5, 0.75, 1.0), (0.1, 1.0), (0.3, 0.4, 0.7, 0.9, 1.0), (1.0,)])
def test_prefixes_equal_sliced_mlps(family, blocks, experts):
    model = make_converted(family, experts=experts)
    for mlp in model.nested_mlps():
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(mlp.layer))
        for expert, fraction in enumerate(experts):
            torch.testing.assert_close(mlp.expert_output(x, expert), naive_expert(mlp, x, fraction), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_labels_equal_separate_mlps(family, blocks):
    model = make_converted(family, theta=0.7)
    inputs, output = captured_inputs(model, blocks.ids, output_router_logits=True)
    for mlp, x, labels, similarities in zip(model.nested_mlps(), inputs, output.labels, output.similarities, strict=True):
        assert torch.equal(labels, naive_labels(mlp, x, 0.7))
        assert len(labels.unique()) > 1, "a test of labels needs labels that vary"
        for theta in (-1.0, 0.3, 0.95):
            assert torch.equal(labels_from_similarity(similarities, theta), naive_labels(mlp, x, theta))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["router", "label", "full", 0, 2])
def test_prefix_path_equals_block_path(family, blocks, mode):
    """Inference (sorted prefixes) and training (masked blocks) are the same function."""
    model = make_converted(family)
    model.set_routing(mode)
    fast = model(blocks.ids)
    traced = model(blocks.ids, output_router_logits=True)
    assert fast.router_logits is None
    torch.testing.assert_close(fast.logits, traced.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_routed_output_is_the_chosen_experts(family, blocks):
    model = make_converted(family)
    inputs, output = captured_inputs(model, blocks.ids, output_router_logits=True)
    for mlp, x, experts, logits in zip(model.nested_mlps(), inputs, output.experts, output.router_logits, strict=True):
        assert torch.equal(experts, logits.argmax(-1))
        assert len(experts.unique()) > 1
        expected = torch.stack([naive_expert(mlp, x[i], mlp.moe.experts[expert]) for i, expert in enumerate(experts.tolist())])
        torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["router", "label", "full", 1])
def test_a_token_does_not_depend_on_its_batch_or_its_future(family, blocks, mode):
    model = make_converted(family)
    model.set_routing(mode)
    together = model(blocks.ids).logits
    alone = torch.cat([model(row[None]).logits for row in blocks.ids])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(blocks.ids[:, :9]).logits, together[:, :9], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing(family, blocks):
    model = make_converted(family)
    plain = model(blocks.ids[:4], labels=blocks.ids[:4])
    pads = torch.zeros(4, 5, dtype=torch.long)
    mask = torch.ones_like(blocks.ids[:4])
    for side in ("right", "left"):
        order = (blocks.ids[:4], pads) if side == "right" else (pads, blocks.ids[:4])
        masks = (mask, pads) if side == "right" else (pads, mask)
        labels = (blocks.ids[:4], pads - 100) if side == "right" else (pads - 100, blocks.ids[:4])
        keep = slice(0, 24) if side == "right" else slice(5, None)
        attention = torch.cat(masks, 1)
        position = (attention.cumsum(1) - 1).clamp_min(0)
        padded = model(torch.cat(order, 1), attention_mask=attention, position_ids=position, labels=torch.cat(labels, 1))
        torch.testing.assert_close(padded.logits[:, keep], plain.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(padded.router_loss, plain.router_loss, atol=1e-5, rtol=1e-5)
        if side == "right":
            torch.testing.assert_close(padded.loss, plain.loss, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_with_and_without_cache(family, blocks):
    model = make_converted(family)
    prompt = blocks.ids[:3, :7]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert cached.shape == (3, 15)


@torch.no_grad()
def test_random_routing_follows_its_shares_and_its_seed(blocks):
    model = make_converted()
    shares = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 1.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    draws = []
    for _ in range(2):
        model.set_routing("random", shares=shares, seed=3)
        draws.append(model(make_blocks(64).ids, output_router_logits=True).experts)
    for layer, (first, second) in enumerate(zip(*draws, strict=True)):
        assert torch.equal(first, second)
        observed = torch.bincount(first, minlength=4) / len(first)
        torch.testing.assert_close(observed, shares[layer], atol=0.04, rtol=0)
    model.set_routing("random", shares=shares, seed=4)
    assert not torch.equal(model(make_blocks(64).ids, output_router_logits=True).experts[0], draws[0][0])


def test_random_routing_takes_a_usage_frame(blocks):
    import pandas as pd

    model = make_converted()
    frame = pd.DataFrame([{"layer": layer, "expert": expert, "share": float(expert == layer)} for layer in range(3) for expert in range(4)])
    model.set_routing("random", shares=frame)
    with torch.no_grad():
        experts = model(blocks.ids, output_router_logits=True).experts
    assert [layer.unique().tolist() for layer in experts] == [[0], [1], [2]]


@pytest.mark.parametrize("mode", ["rooter", 4, -1, True, None, "random"])
def test_bad_routing_is_refused(mode):
    with pytest.raises(ValueError, match="routing"):
        make_converted().set_routing(mode)


@torch.no_grad()
def test_theta_changes_labels_not_the_routers_choice(blocks):
    model = make_converted(theta=0.5)
    before = model(blocks.ids, output_router_logits=True)
    model.set_theta(0.95)
    after = model(blocks.ids, output_router_logits=True)
    assert model.config.moe["theta"] == 0.95
    for old, new, old_experts, new_experts in zip(before.labels, after.labels, before.experts, after.experts, strict=True):
        assert bool((new >= old).all())
        assert bool((new > old).any())
        assert torch.equal(old_experts, new_experts)
    with pytest.raises(ValueError, match="theta"):
        model.set_theta(1.5)


# --- losses and gradients -----------------------------------------------------------------------------------------------------------


def test_loss_is_the_papers(family, blocks):
    model = make_converted(family, lambda_lm=0.3, lambda_router=2.0)
    output = model(blocks.ids, labels=blocks.ids)
    lm = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), blocks.ids[:, 1:].flatten())
    router = sum(F.cross_entropy(a, b) for a, b in zip(output.router_logits, output.labels, strict=True)) / 3
    torch.testing.assert_close(output.loss, 0.3 * lm + 2.0 * router)
    torch.testing.assert_close(output.lm_loss, lm)


def reference_forward(mlp, x, gradient):
    """The training output with plain autograd: every block's product, weighted."""
    logits = mlp.router(x)
    p = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), mlp.moe.num_experts).float()
    hidden = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    products = torch.stack([hidden[:, lo:hi] @ mlp.down_proj.weight[:, lo:hi].T for lo, hi in mlp.blocks], dim=1)  # [N, E, D]
    if gradient == "probability":
        chosen = p.gather(1, logits.argmax(-1)[:, None])
        weights = hard.flip(-1).cumsum(-1).flip(-1)
        return (weights[..., None] * products).sum(1) * (chosen / chosen.detach())
    st = hard + p - p.detach() if gradient == "straight_through" else hard
    weights = torch.stack([st[:, b:].sum(-1) for b in range(mlp.moe.num_experts)], dim=-1)
    return (weights[..., None] * products).sum(1)


@pytest.mark.parametrize("gradient", ["straight_through", "probability", "none"])
def test_gradients_equal_plain_autograd(gradient):
    model = make_converted(router_gradient=gradient).double()
    mlp = model.nested_mlps()[1]
    x = torch.randn(11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = torch.randn(11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names = ["x", *(name for name, _ in mlp.named_parameters())]
    grads = []
    for forward in (mlp, lambda value: reference_forward(mlp, value, gradient)):
        loss = (forward(x) * target).sum()
        grads.append(torch.autograd.grad(loss, [x, *mlp.parameters()], allow_unused=True))
    for name, ours, expected in zip(names, *grads, strict=True):
        if gradient == "none" and name.startswith("router"):
            assert ours is None or not ours.any()
            continue
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_accumulation_equals_one_batch(family, blocks):
    """Four micro-batches of two, their losses averaged, give the loss and router gradient of one batch of eight."""
    model = make_converted(family)
    whole = model(blocks.ids, labels=blocks.ids).loss
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if ".router." in name}
    model.zero_grad()
    total = 0.0
    for start in range(0, 8, 2):
        loss = model(blocks.ids[start : start + 2], labels=blocks.ids[start : start + 2]).loss / 4
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach(), atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_label_route_trains_on_the_labels(blocks):
    model = make_converted(train_route="label").train()
    output = model(blocks.ids, labels=blocks.ids)
    assert all(torch.equal(a, b) for a, b in zip(output.experts, output.labels, strict=True))
    model.eval()
    output = model(blocks.ids, labels=blocks.ids)
    assert all(torch.equal(a, b.argmax(-1)) for a, b in zip(output.experts, output.router_logits, strict=True))


def test_gradient_checkpointing_changes_no_gradient(blocks):
    model = make_converted().train()
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(blocks.ids, labels=blocks.ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# --- checkpoints --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_and_load(family, blocks, tmp_path):
    model = make_converted(family)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(blocks.ids).logits, model(blocks.ids).logits)
    assert DynaMoEConfig.from_dict(loaded.config.moe) == model.moe
    assert not list(tmp_path.glob("*.bin"))
    model.config.moe = {**model.config.moe, "trained_tokens": 1234}
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "1,234 tokens" in card
    assert "theta" in card
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert str(Path.home()) not in card + (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_without_routers_it_is_a_plain_dense_checkpoint(family, blocks, tmp_path):
    model = make_converted(family)
    model.save_pretrained(tmp_path / "moe")
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    dense = make_dense(family)
    (tmp_path / "plain").mkdir()
    save_file(
        {name: value for name, value in weights.items() if ".router." not in name},
        tmp_path / "plain" / "model.safetensors",
        {"format": "pt"},
    )
    dense.config.save_pretrained(tmp_path / "plain")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert type(plain) is family_of(family).causal_lm
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(plain.eval()(blocks.ids).logits, dense(blocks.ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tied_embeddings_stay_tied(family, tmp_path):
    model = make_converted(family, dense=make_dense(family, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untied = make_converted(family, dense=make_dense(family, tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_missing_routers_are_initialised(family, tmp_path):
    """A dense-only weight file loads (through the meta device) with fresh routers: no NaN, no zeros left from empty memory."""
    model = make_converted(family)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in weights.items() if ".router." not in name}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(".router." in key for key in info["missing_keys"])
    for mlp in loaded.nested_mlps():
        for parameter in mlp.router.parameters():
            assert bool(torch.isfinite(parameter).all())
            assert 0 < float(parameter.detach().std()) < 1


@torch.no_grad()
def test_loads_in_a_fresh_process_without_this_package(family, blocks, tmp_path):
    model = make_converted(family)
    model.save_pretrained(tmp_path / "model")
    torch.save({"ids": blocks.ids, "logits": model(blocks.ids).logits}, tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["dynamoe_lab"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True).eval()
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], atol=1e-5, rtol=1e-5)
model.generate(expected["ids"][:1, :5], max_new_tokens=3)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_config_survives_json(family, tmp_path):
    config = make_converted(family).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.model_type == f"dynamoe_{family}"
    assert loaded.moe == config.moe


@torch.no_grad()
def test_bfloat16_runs_and_stays_close(blocks):
    model = make_converted()
    model.set_routing("full")
    expected = model(blocks.ids).logits
    half = model.to(torch.bfloat16)
    half.set_routing("full")
    assert float((half(blocks.ids).logits.float() - expected).abs().mean() / expected.abs().mean()) < 0.05
    half.set_routing("router")
    assert bool(torch.isfinite(half(blocks.ids, labels=blocks.ids).loss))
