"""Converted models against the dense model and against formulas computed another way, for every family."""

import copy
import dataclasses
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, make_blocks, make_converted, make_dense
from torch.nn import functional as F

from dynamoe_lab.models import DynaMoEConfig, decoder_layers, families, family_of, labels_from_similarity

ROOT = Path(__file__).parents[1]
tanh_gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gemma3_text": tanh_gelu, "gpt_neox": F.gelu, "phi": tanh_gelu, "opt": F.relu}  # the others: SiLU


def projections(mlp, family="llama"):
    """(weight, bias) of gate, up and down, or of up and down of a plain MLP, by the family's names for them."""
    values = dict(mlp.named_parameters())
    if family == "opt" and "weight" in values:  # the nested MLP is the layer's fc2
        values |= {"fc2.weight": values["weight"], "fc2.bias": values["bias"]}
    return [(values[f"{name}.weight"], values.get(f"{name}.bias")) for name in family_of(family).projections]


def naive_expert(mlp, x, fraction, family="llama", parts=None):
    """A separate MLP cut out of the weights, written from the definition."""
    *inputs, (down, down_bias) = projections(mlp, family) if parts is None else parts
    size = round(fraction * down.shape[1])
    raised = [x @ weight[:size].T + (0 if bias is None else bias[:size]) for weight, bias in inputs]
    hidden = ACTIVATIONS.get(family, F.silu)(raised[0])
    if len(raised) == 2:
        hidden = hidden * raised[1]
    return hidden @ down[:, :size].T + (0 if down_bias is None else down_bias)


def naive_labels(mlp, x, theta, family="llama", parts=None):
    """E separate MLPs, one cosine each, the first that is close enough."""
    outputs = [naive_expert(mlp, x, fraction, family, parts) for fraction in mlp.moe.experts]
    labels = torch.full((len(x),), len(outputs) - 1)
    for expert in reversed(range(len(outputs) - 1)):
        close = F.cosine_similarity(outputs[expert].double(), outputs[-1].double(), dim=-1) >= theta
        labels[close] = expert
    return labels


def captured_inputs(model, ids, **kwargs):
    """What every nested MLP is given in one forward: list of [N, D]."""
    inputs = []
    handles = [
        mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
        for mlp in model.nested_mlps()
    ]
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
    for ours, layer in zip(model.nested_mlps(), decoder_layers(dense), strict=True):
        for (moved, moved_bias), (fixed, fixed_bias) in zip(
            projections(ours, family), projections(getattr(layer, "mlp", layer), family), strict=True
        ):
            assert not torch.equal(moved, fixed)
            assert torch.equal(moved.flatten().sort().values, fixed.flatten().sort().values)
            if fixed_bias is not None:
                assert torch.equal(moved_bias.sort().values, fixed_bias.sort().values)
                assert torch.equal(moved_bias, fixed_bias) == (len(fixed_bias) == 64), "biases of neurons move, the output's stays"


@torch.no_grad()
@pytest.mark.parametrize("experts", [(0.25, 0.5, 0.75, 1.0), (0.1, 1.0), (0.3, 0.4, 0.7, 0.9, 1.0), (1.0,)])
def test_prefixes_equal_sliced_mlps(family, blocks, experts):
    model = make_converted(family, experts=experts)
    for mlp in model.nested_mlps():
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(mlp.layer))
        for expert, fraction in enumerate(experts):
            torch.testing.assert_close(mlp.expert_output(x, expert), naive_expert(mlp, x, fraction, family), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_labels_equal_separate_mlps(family, blocks):
    model = make_converted(family, theta=0.7)
    inputs, output = captured_inputs(model, blocks.ids, output_router_logits=True)
    for mlp, x, labels, similarities in zip(model.nested_mlps(), inputs, output.labels, output.similarities, strict=True):
        assert torch.equal(labels, naive_labels(mlp, x, 0.7, family))
        assert len(labels.unique()) > 1, "a test of labels needs labels that vary"
        for theta in (-1.0, 0.3, 0.95):
            assert torch.equal(labels_from_similarity(similarities, theta), naive_labels(mlp, x, theta, family))


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
        parts = [naive_expert(mlp, x, fraction, family) for fraction in mlp.moe.experts]
        expected = torch.stack([parts[expert][i] for i, expert in enumerate(experts.tolist())])
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
@pytest.mark.parametrize("positions", ["given", "by the model"])
def test_padding_changes_nothing(family, blocks, positions):
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
        extra = {"position_ids": (attention.cumsum(1) - 1).clamp_min(0)} if positions == "given" else {}
        padded = model(torch.cat(order, 1), attention_mask=attention, labels=torch.cat(labels, 1), **extra)
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


def test_reconfiguring_equals_converting_again(blocks):
    changed = {"theta": 0.4, "lambda_lm": 1.0, "lambda_router": 0.1, "train_route": "label", "router_gradient": "probability"}
    model, fresh = make_converted(), make_converted(**changed)
    model.reconfigure(fresh.moe)
    assert model.config.moe == fresh.config.moe
    losses = [candidate.train()(blocks.ids, labels=blocks.ids).loss for candidate in (model, fresh)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match=r"experts = .* convert the dense model again"):
        model.reconfigure(DynaMoEConfig(experts=(0.5, 1.0)))


def test_loss_is_the_papers(family, blocks):
    model = make_converted(family, lambda_lm=0.3, lambda_router=2.0)
    output = model(blocks.ids, labels=blocks.ids)
    lm = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), blocks.ids[:, 1:].flatten())
    router = sum(F.cross_entropy(a, b) for a, b in zip(output.router_logits, output.labels, strict=True)) / 3
    torch.testing.assert_close(output.loss, 0.3 * lm + 2.0 * router)
    torch.testing.assert_close(output.lm_loss, lm)


def reference_forward(mlp, x, gradient, family):
    """The training output with plain autograd: every block's product, weighted."""
    logits = mlp.router(x)
    p = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), mlp.moe.num_experts).to(p)
    outputs = [naive_expert(mlp, x, fraction, family) for fraction in mlp.moe.experts]
    bias = projections(mlp, family)[-1][1]
    bias = 0 if bias is None else bias
    products = torch.stack([outputs[0] - bias] + [high - low for low, high in pairwise(outputs)], dim=1)  # [N, E, D]
    if gradient == "probability":
        chosen = p.gather(1, logits.argmax(-1)[:, None])
        weights = hard.flip(-1).cumsum(-1).flip(-1)
        return (weights[..., None] * products).sum(1) * (chosen / chosen.detach()) + bias
    st = hard + p - p.detach() if gradient == "straight_through" else hard
    weights = torch.stack([st[:, b:].sum(-1) for b in range(mlp.moe.num_experts)], dim=-1)
    return (weights[..., None] * products).sum(1) + bias


@pytest.mark.parametrize("gradient", ["straight_through", "probability", "none"])
def test_gradients_equal_plain_autograd(family, gradient):
    model = make_converted(family, router_gradient=gradient).double()
    mlp = model.nested_mlps()[1]
    x = torch.randn(11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = torch.randn(11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names = ["x", *(name for name, _ in mlp.named_parameters())]
    grads = []
    for forward in (mlp, lambda value: reference_forward(mlp, value, gradient, family)):
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


def test_reentrant_checkpointing_is_refused(blocks):
    """It makes traces without gradient: the routers would silently not learn."""
    model = make_converted().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.model.embed_tokens.register_forward_hook(lambda *_: _[-1].requires_grad_())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(blocks.ids, labels=blocks.ids, use_cache=False)


def test_gradient_checkpointing_changes_no_gradient(family, blocks):
    model = make_converted(family).train()
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(5)  # of the dropout of those families that have it
        model(blocks.ids, labels=blocks.ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# --- label targets and training routes -----------------------------------------------------------------------------------------------


@torch.no_grad()
def move_mlps(model):
    """As training would: every MLP weight goes elsewhere, routers stay."""
    generator = torch.Generator().manual_seed(3)
    for mlp in model.nested_mlps():
        for name, parameter in mlp.named_parameters():
            if not name.startswith("router"):
                parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def test_frozen_labels_stay_those_of_the_conversion(family, blocks):
    """Equal to current labels before training; after it those of MLPs cut out of the old weights, on the inputs of today."""
    frozen, current = (make_converted(family, theta=0.7, label_target=target) for target in ("frozen", "current"))
    before = [[(w.clone(), None if b is None else b.clone()) for w, b in projections(mlp, family)] for mlp in frozen.nested_mlps()]
    outputs = [model(blocks.ids, output_router_logits=True) for model in (frozen, current)]
    for ours, theirs in zip(outputs[0].similarities, outputs[1].similarities, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    move_mlps(frozen)
    inputs, moved = captured_inputs(frozen, blocks.ids, output_router_logits=True)
    for mlp, x, old, labels in zip(frozen.nested_mlps(), inputs, before, moved.labels, strict=True):
        assert torch.equal(labels, naive_labels(mlp, x, 0.7, family, old))
        assert not torch.equal(labels, naive_labels(mlp, x, 0.7, family))
    frozen.set_routing("label")
    routed = frozen(blocks.ids, output_router_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(routed.experts, routed.labels, strict=True))
    torch.testing.assert_close(frozen(blocks.ids).logits, routed.logits, atol=1e-4, rtol=1e-4)


def test_frozen_copies_neither_learn_nor_count(family, blocks):
    frozen, current = (make_converted(family, label_target=target).train() for target in ("frozen", "current"))
    assert [name for name, _ in frozen.named_parameters()] == [name for name, _ in current.named_parameters()]
    assert [mlp.expert_params() for mlp in frozen.nested_mlps()] == [mlp.expert_params() for mlp in current.nested_mlps()]
    extra = set(frozen.state_dict()) - set(current.state_dict())
    per_layer = [len([name for name, _ in mlp.named_parameters() if not name.startswith("router")]) for mlp in frozen.nested_mlps()]
    assert len(extra) == sum(per_layer)
    assert all(".frozen." in name for name in extra)
    frozen(blocks.ids, labels=blocks.ids).loss.backward()
    assert not any(frozen.state_dict()[name].requires_grad for name in extra)


@pytest.mark.parametrize("gradient", ["straight_through", "probability"])
@pytest.mark.parametrize("route", [0, 2, 3, "full"])
def test_a_static_route_trains_its_prefix_alone(family, blocks, route, gradient):
    """The LM loss reaches the first blocks as it would in a model whose MLPs end there, and neither the rest nor the router."""
    model = make_converted(family, train_route=route, router_gradient=gradient, lambda_router=0.0, lambda_lm=1.0)
    last = 3 if route == "full" else route
    width = (24, 48, 72, 96)[last]
    model.set_routing("label")  # decides in eval mode only
    model.train()
    for module in model.modules():  # of the families that have it; it would differ between the two models
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    output = model(blocks.ids, labels=blocks.ids)
    assert all(bool((experts == last).all()) for experts in output.experts)
    with torch.no_grad():
        torch.testing.assert_close(model(blocks.ids).logits, output.logits, atol=1e-4, rtol=1e-4)  # the same by the prefix path
    output.loss.backward()
    cut = make_dense(family)
    cut.load_state_dict({name: value for name, value in model.state_dict().items() if ".router." not in name})
    with torch.no_grad():
        for layer in decoder_layers(cut):
            projections(getattr(layer, "mlp", layer), family)[-1][0][:, width:] = 0  # neurons beyond the prefix say nothing
    cut(blocks.ids, labels=blocks.ids).loss.backward()
    for mlp, layer in zip(model.nested_mlps(), decoder_layers(cut), strict=True):
        assert not any(parameter.grad.any() for parameter in mlp.router.parameters())
        ours, theirs = projections(mlp, family), projections(getattr(layer, "mlp", layer), family)
        for index, ((weight, bias), (expected, expected_bias)) in enumerate(zip(ours, theirs, strict=True)):
            mine, other = (weight.grad.T, expected.grad.T) if index == len(ours) - 1 else (weight.grad, expected.grad)  # [H, D]
            torch.testing.assert_close(mine[:width], other[:width], atol=1e-5, rtol=1e-3)
            assert bool(mine[:width].any())
            assert not mine[width:].any()
            if bias is not None:
                torch.testing.assert_close(bias.grad, expected_bias.grad, atol=1e-5, rtol=1e-3)


def test_a_static_route_leaves_the_router_its_own_loss(blocks):
    model = make_converted(train_route=1, lambda_lm=0.0, lambda_router=1.0).train()
    output = model(blocks.ids, labels=blocks.ids)
    output.loss.backward()
    torch.testing.assert_close(
        output.loss, sum(F.cross_entropy(a, b) for a, b in zip(output.router_logits, output.labels, strict=True)) / 3
    )
    assert all(bool(parameter.grad.any()) for mlp in model.nested_mlps() for parameter in mlp.router.parameters())
    model.eval()
    assert not all(bool((experts == 1).all()) for experts in model(blocks.ids, output_router_logits=True).experts)


def test_every_family_of_the_table_is_tested():
    assert set(families.FAMILIES) == set(FAMILIES), (
        "a family of models/families.py needs a pico model, an entry of FAMILIES in tests/conftest.py"
    )


def test_readme_names_every_family_of_the_table():
    listed = re.search(r"^Families: (.+?)\. ToMoE", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S).group(1)
    named = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in listed.split(",")}
    known = {re.sub(r"[^a-z0-9]", "", name): name for name in families.FAMILIES}  # gpt_neox is GPT-NeoX
    missing = ", ".join(name for key, name in known.items() if key not in named)
    assert not missing, f"README's list of families (In your own code) does not name {missing}"
    assert not named.keys() - known.keys(), "README's list of families names one that the table does not have"
    pruned = [key for key, name in known.items() if families.FAMILIES[name].whole_heads is None]
    assert pruned == list(named)[:3], "README says that ToMoE prunes attention in the first three of its list"


def test_the_guide_explains_every_field_of_a_family():
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    table = guide.partition("what its row answers")[2].partition("\n## ")[0]
    missing = [item.name for item in dataclasses.fields(families.Family) if not re.search(rf"^\|.*`{item.name}\b", table, re.M)]
    assert not missing, f"docs/extending.md does not say what {', '.join(missing)} of Family is"


def test_an_unknown_family_is_told_where_to_begin():
    with pytest.raises(ValueError, match=r"'granite' is not supported: the family table has cohere, .*README, Add a model family"):
        family_of("granite")
    assert "### Add a model family" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- what the family table says -------------------------------------------------------------------------------------------------------

VARIANTS = [
    *((name, {}) for name in FAMILIES),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("phi", {"qk_layernorm": True}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),  # OPT-350m
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),  # Galactica
    ("gemma3_text", {"final_logit_softcapping": 5.0, "attention_bias": True}),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "+".join(value) or "-")
@pytest.mark.parametrize("converted", [False, True])
def test_the_residual_stream_is_where_the_table_says(family, changes, converted, blocks):
    """r plus the MLP's output (after its norm) plus, in parallel layers, the attention's output is the layer's output."""
    dense = make_dense(family, **changes)
    model = make_converted(family, dense=dense) if converted else dense
    row, seen = family_of(family), {}

    def keep(name, value):
        seen[name] = (value[0] if isinstance(value, tuple) else value).reshape(-1, 64)

    for layer in decoder_layers(model):
        attention = getattr(layer, "self_attn", None) or layer.attention
        row.residual_source(layer, model.config).register_forward_pre_hook(lambda module, args: keep("residual", args))
        row.nested(layer).register_forward_hook(lambda module, args, output: keep("mlp", output))
        attention.register_forward_hook(lambda module, args, output: keep("attention", output))
        layer.register_forward_hook(lambda module, args, output: keep("layer", output))
    model(blocks.ids)  # what stays is of the last layer
    output = seen["mlp"] if row.output_norm is None else getattr(layer, row.output_norm)(seen["mlp"])
    total = seen["residual"] + output + (seen["attention"] if row.is_parallel(model.config) else 0)
    if row.norm_first and not getattr(model.config, row.norm_first):
        total = getattr(layer, row.residual_norm)(total)
    torch.testing.assert_close(total, seen["layer"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"), VARIANTS[len(FAMILIES) :], ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_variants_keep_the_dense_function(family, changes, blocks, tmp_path):
    dense = make_dense(family, **changes)
    model = make_converted(family, dense=dense)
    model.save_pretrained(tmp_path)
    for candidate in (model, type(model).from_pretrained(tmp_path).eval()):
        candidate.set_routing("full")
        torch.testing.assert_close(candidate(blocks.ids).logits, dense(blocks.ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(family, blocks):
    model = make_converted(family, label_target="frozen")
    before = model(blocks.ids, output_router_logits=True)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    after = twin(blocks.ids, output_router_logits=True)
    assert torch.equal(after.logits, before.logits)
    assert all(torch.equal(a, b) for a, b in zip(after.similarities, before.similarities, strict=True))


@torch.no_grad()
def test_half_precision_keeps_the_dense_buffers(family, blocks):
    """Rotary frequencies stay float32: cast with the weights they would turn far positions."""
    dense = make_dense(family, dtype="bfloat16")
    model = make_converted(family, dense=dense)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    theirs, ours = dict(dense.named_buffers()), dict(model.named_buffers())
    assert theirs.keys() == ours.keys()
    assert all(value.dtype == ours[name].dtype and torch.equal(value, ours[name]) for name, value in theirs.items())
    model.set_routing("full")
    expected = dense(blocks.ids).logits.float()
    assert float((model(blocks.ids).logits.float() - expected).abs().mean() / expected.abs().mean()) < 0.05
    model.set_routing("router")
    assert bool(torch.isfinite(model(blocks.ids, labels=blocks.ids).loss))


@torch.no_grad()
def test_bfloat16_runs_and_stays_close(family, blocks):
    model = make_converted(family)
    model.set_routing("full")
    expected = model(blocks.ids).logits
    half = model.to(torch.bfloat16)
    assert float((half(blocks.ids).logits.float() - expected).abs().mean() / expected.abs().mean()) < 0.05
    half.set_routing("router")
    assert bool(torch.isfinite(half(blocks.ids, labels=blocks.ids).loss))
