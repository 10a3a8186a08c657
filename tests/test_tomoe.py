"""The masked form of ToMoE: against the dense model, and against the student written out token by token from the formulas."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import FAMILIES, make_blocks, make_dense, make_tomoe
from test_models import ACTIVATIONS, projections
from torch.nn import functional as F
from transformers import LlamaConfig

from dynamoe_lab.models import MASKED_CLASSES, MASKED_CONFIGS, ToMoEConfig, decoder_layers, family_of
from dynamoe_lab.models.masking import MaskedForward

TOMOE = [family for family in FAMILIES if family in MASKED_CLASSES]
PRUNED = [family for family in TOMOE if not family_of(family).whole_heads]
TERMS = ("kl_loss", "ratio_loss", "union_loss", "balance_loss", "active_ratio_max", "active_ratio_mean", "union_coverage", "lm_loss")
every_family = pytest.mark.parametrize("family", TOMOE)


class GivenNoise:
    """Gumbel numbers from a generator of its own, kept in the order in which they were asked for."""

    def __init__(self, seed=0):
        self.generator, self.drawn = torch.Generator().manual_seed(seed), []

    def gumbel(self, shape, device):
        uniform = torch.rand(tuple(shape), generator=self.generator).clamp(1e-6, 1 - 1e-6)
        self.drawn.append(-torch.log(-torch.log(uniform)))
        return self.drawn[-1]


def make_pruned(family="llama", *, spread=4.0, **changes):
    """A masked model in which about half of everything is closed, differently for experts and tokens."""
    model = make_tomoe(family, **{"mask_offset": 0.3, **changes})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in (*model.masked_attentions(), *model.routed_mlps()):
            module.decoder.weight.mul_(spread)
            module.norm.weight.add_(0.3 * torch.randn(module.norm.weight.shape, generator=generator))
            module.norm.bias.add_(0.3 * torch.randn(module.norm.bias.shape, generator=generator))
    return model


def learns(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- the student, written out -------------------------------------------------------------------------------------------------------


def naive_gru(z, w):
    """Embeddings [M, E, S] from z [M, E, n]: both directions of a GRU, step by step (torch's convention of the reset gate)."""
    halves = []
    for suffix, order in (("", range(len(z))), ("_reverse", reversed(range(len(z))))):
        hidden, states = torch.zeros(z.shape[1], w[f"weight_hh_l0{suffix}"].shape[1], dtype=z.dtype), [None] * len(z)
        for step in order:
            r_in, u_in, n_in = (z[step] @ w[f"weight_ih_l0{suffix}"].T + w[f"bias_ih_l0{suffix}"]).chunk(3, -1)
            r_h, u_h, n_h = (hidden @ w[f"weight_hh_l0{suffix}"].T + w[f"bias_hh_l0{suffix}"]).chunk(3, -1)
            update = torch.sigmoid(u_in + u_h)
            hidden = (1 - update) * torch.tanh(n_in + torch.sigmoid(r_in + r_h) * n_h) + update * hidden
            states[step] = hidden
        halves.append(torch.stack(states))
    return torch.cat(halves, -1)


def straight_through(soft, hard):
    return soft + (hard - soft).detach()


def naive_open(logits, noise, moe):
    soft = torch.sigmoid((logits + noise + moe.mask_offset) / moe.mask_temperature)
    return straight_through(soft, torch.round(soft))


def naive_features(e, part):
    mean, variance = e.mean(-1, keepdim=True), e.var(-1, unbiased=False, keepdim=True)
    normed = (e - mean) / torch.sqrt(variance + 1e-5) * part["norm.weight"] + part["norm.bias"]
    return 0.5 * normed * (1 + torch.erf(normed / 2**0.5))


def part_of(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def rms(x, weight, eps):
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def rotated(x, positions, theta=10000.0):
    """Rotary positions, pair by pair: x [T, d], dimensions i and i + d / 2 turn together."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-2 * torch.arange(half, dtype=x.dtype) / x.shape[-1])
    first, second = x[:, :half], x[:, half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def naive_student(weights, config, moe, ids, counted, noise=None):
    """A llama with all masks per token, written from the formulas; without noise everything is open (the teacher).

    weights: name -> tensor; ids [B, T]; counted [B, T] bool. Returns logits [B, T, V] and the pieces of the losses.
    """
    w, (batch, length) = weights, ids.shape
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    draws = iter([] if noise is None else noise)
    embeddings = naive_gru(w["hypernetwork.z"], part_of(w, "hypernetwork.gru."))
    x = w["model.embed_tokens.weight"][ids]
    pieces = []
    for layer in range(config.num_hidden_layers):
        own = part_of(w, f"model.layers.{layer}.")
        piece = {}
        normed = rms(x, own["input_layernorm.weight"], config.rms_norm_eps)
        values, pairs = torch.ones(batch, length, width, dtype=x.dtype), torch.ones(batch, length, width, dtype=x.dtype)
        if noise is not None and moe.attention != "none":
            part, mean = part_of(own, "self_attn."), embeddings[2 * layer].mean(0)
            per_token = naive_features(normed @ part["router.weight"].T + mean, part) @ part["decoder.weight"].T  # [B, T, d + d / 2]
            if moe.attention == "dynamic":
                mask = naive_open(per_token, next(draws), moe)
                values, pairs = mask[..., :width], mask[..., width:].repeat(1, 1, 2)
            else:
                values = naive_open(per_token[..., :width], next(draws), moe)
                static = naive_open((naive_features(mean, part) @ part["decoder.weight"].T)[width:], next(draws), moe)
                pairs = static.repeat(2).expand(batch, length, width)
            piece |= {"values": values.sum(-1)[counted], "pairs": pairs.sum(-1)[counted]}
        outputs = []
        for row in range(batch):
            joined = []
            for head in range(heads):
                group = head // (heads // kv)
                rows, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
                position = torch.arange(length, dtype=x.dtype)
                q = rotated((normed[row] @ own["self_attn.q_proj.weight"][rows].T) * pairs[row], position)
                k = rotated((normed[row] @ own["self_attn.k_proj.weight"][shared].T) * pairs[row], position)
                v = (normed[row] @ own["self_attn.v_proj.weight"][shared].T) * values[row]
                seen = torch.ones(length, length, dtype=torch.bool).tril() & counted[row]
                scores = (q @ k.T / width**0.5).masked_fill(~seen, float("-inf"))
                joined.append((scores.softmax(-1) @ v) * values[row])
            outputs.append(torch.cat(joined, -1) @ own["self_attn.o_proj.weight"].T)
        x = x + torch.stack(outputs)
        normed = rms(x, own["post_attention_layernorm.weight"], config.rms_norm_eps).reshape(batch * length, -1)
        gate, up, down = (own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        mask = torch.ones(batch * length, len(gate), dtype=x.dtype)
        if noise is not None:
            part, table = part_of(own, "mlp."), embeddings[2 * layer + 1 if moe.attention != "none" else layer]
            soft = torch.softmax((normed @ part["router.weight"].T + next(draws)) / moe.router_temperature, -1)
            choice = straight_through(soft, F.one_hot(soft.argmax(-1), soft.shape[-1]).to(x.dtype))
            drawn = next(draws)  # [E, H]
            mask = naive_open(naive_features(choice @ table, part) @ part["decoder.weight"].T, drawn[choice.argmax(-1)], moe)
            every = naive_open(naive_features(table, part) @ part["decoder.weight"].T, drawn, moe)  # [E, H]: experts of no token, too
            piece |= {"choice": choice[counted.flatten()], "experts": every}
        x = x + ((mask * F.silu(normed @ gate.T)) * (mask * (normed @ up.T)) @ down.T).view_as(x)
        pieces.append(piece)
    logits = rms(x, w["model.norm.weight"], config.rms_norm_eps) @ w["lm_head.weight"].T
    return logits, pieces


def largest(values):
    """The maximum; ties share its gradient."""
    return values[values == values.max()].mean()


def naive_gap(a, b):
    return torch.log(max(a, b) + 0.001) - torch.log(min(a, b) + 0.001)


def naive_losses(weights, config, moe, ids, counted, noise):
    """KL, R_P, R_U, R_L written from their definitions."""
    with torch.no_grad():
        teacher, _ = naive_student(weights, config, moe, ids, counted)
    student, pieces = naive_student(weights, config, moe, ids, counted, noise)
    log_p, log_q = teacher.log_softmax(-1)[counted], student.log_softmax(-1)[counted]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    d, heads, width = config.hidden_size, config.num_attention_heads + config.num_key_value_heads, config.hidden_size // 4
    active = total = union = balance = 0
    for piece in pieces:
        dynamic = largest(piece["values"]) if "values" in piece else width
        static = largest(piece["pairs"]) if "pairs" in piece else width
        active = active + d * heads * (dynamic + static) + 3 * d * largest(piece["experts"].sum(-1))
        total = total + d * heads * 2 * width + 3 * d * config.intermediate_size
        missing = 1
        for expert in piece["experts"]:
            missing = missing * (1 - expert)
        union = union + naive_gap((1 - missing).mean(), torch.ones((), dtype=student.dtype))
        share = piece["choice"].mean(0)
        balance = balance + (share.detach() * share).sum() / len(pieces)
    union = union / (2 * config.num_hidden_layers)
    ratio = naive_gap(active / total, torch.tensor(moe.p, dtype=student.dtype))
    return {"kl_loss": kl, "ratio_loss": ratio, "union_loss": union, "balance_loss": balance}, student


@pytest.mark.parametrize(
    ("attention", "changes"),
    [("hybrid", {}), ("none", {}), ("dynamic", {}), ("hybrid", {"train_z": True, "p": 0.9}), ("hybrid", {"router_temperature": 0.7})],
)
def test_losses_and_gradients_equal_the_formulas(attention, changes):
    """All four terms, one by one, with respect to every parameter that learns; noise given, pads in the batch."""
    model = make_pruned(dense=make_dense(num_hidden_layers=2, tie_word_embeddings=False), attention=attention, **changes)
    ids, counted = make_blocks(2, 12).ids, torch.ones(2, 12, dtype=torch.bool)
    counted[1, 9:] = False
    model.noise = GivenNoise()
    model.train()
    output = model(ids, attention_mask=counted.long(), labels=ids)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exact = {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in named.items()}
    losses, logits = naive_losses(exact, model.config, model.moe, ids, counted, [each.double() for each in model.noise.drawn])
    torch.testing.assert_close(output.logits[counted].double(), logits[counted], atol=1e-4, rtol=1e-4)
    wanted = {name: value for name, value in exact.items() if value.requires_grad}
    assert set(wanted) == set(learns(model))
    for term, loss in losses.items():
        torch.testing.assert_close(getattr(output, term).double(), loss, atol=1e-5, rtol=1e-5)
        ours = torch.autograd.grad(getattr(output, term), learns(model).values(), retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(loss, wanted.values(), retain_graph=True, allow_unused=True)
        scale = max(float(each.abs().max()) for each in theirs if each is not None)
        assert scale > 1e-4, f"{term}: a test of gradients needs some"
        for name, got, expected in zip(wanted, ours, theirs, strict=True):
            got, expected = (torch.zeros_like(wanted[name]) if each is None else each.double() for each in (got, expected))
            error = float((got - expected).abs().max()) / scale
            assert error < 1e-5, f"{term}, {name}: {error}"
    weighted = 2 * losses["kl_loss"] + 16 * losses["ratio_loss"] + 3 * losses["union_loss"] + losses["balance_loss"]
    torch.testing.assert_close(output.loss.double(), weighted, atol=1e-4, rtol=1e-5)


@every_family
def test_mlp_and_its_gradients_equal_the_formula_token_by_token(family):
    """Also plain MLPs, whose masks stand on one factor only, and output biases, which no mask touches."""
    model = make_pruned(family)
    mlp = model.routed_mlps()[1]
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    embeddings = model.hypernetwork().detach()
    embeddings = embeddings.add(torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2))).requires_grad_(True)
    noise, weights = GivenNoise(), torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    with model.masking.during(MaskedForward(embeddings, noise)):
        output = mlp.train()(x)
    parameters = {name: value for name, value in mlp.named_parameters() if value.requires_grad}
    assert set(parameters) == {"router.weight", "norm.weight", "norm.bias", "decoder.weight"}
    ours = torch.autograd.grad((output * weights).sum(), [x, embeddings, *parameters.values()])

    exact = {name: value.detach().double().requires_grad_(True) for name, value in mlp.named_parameters()}
    rows, table = (each.detach().double().requires_grad_(True) for each in (x, embeddings))
    tokens, drawn = rows.reshape(18, 64), [each.double() for each in noise.drawn]
    soft = torch.softmax((tokens @ exact["router.weight"].T + drawn[0]) / 0.4, -1)
    choice = straight_through(soft, F.one_hot(soft.argmax(-1), 4).double())
    assert len(soft.argmax(-1).unique()) > 1
    features = naive_features(choice @ table[mlp.row], exact)
    mask = naive_open(features @ exact["decoder.weight"].T, drawn[1][choice.argmax(-1)], model.moe)
    *inputs, (down, bias) = projections(FakeModule(exact), family)
    raised = [tokens @ weight.T + (0 if extra is None else extra) for weight, extra in inputs]
    hidden = mask * ACTIVATIONS.get(family, F.silu)(raised[0])
    hidden = hidden * (mask * raised[1]) if len(raised) == 2 else hidden
    expected = (hidden @ down.T + (0 if bias is None else bias)).view(2, 9, 64)
    torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-4)
    theirs = torch.autograd.grad((expected * weights).sum(), [rows, table, *(exact[name] for name in parameters)])
    for name, got, wanted in zip(["x", "embeddings", *parameters], ours, theirs, strict=True):
        assert float(wanted.abs().max()) > 1e-4, name
        torch.testing.assert_close(
            got.double(), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


class FakeModule:
    """Tensors by name, where a module's parameters are asked for."""

    def __init__(self, values):
        self.values = values

    def named_parameters(self):
        return self.values.items()


# --- the dense function -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family in TOMOE for attention in ("hybrid", "none", "dynamic") if attention == "none" or family in PRUNED],
)
def test_fresh_student_and_everything_open_are_the_dense_model(family, attention):
    ids, dense, model = make_blocks().ids, make_dense(family), make_tomoe(family, attention=attention)
    expected = dense(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-3)
    pruned = make_pruned(family, attention=attention)
    assert float((pruned(ids).logits - expected).abs().max()) > 0.1, "a test of masks needs masks"
    pruned.set_routing("full")
    torch.testing.assert_close(pruned(ids).logits, expected, atol=1e-4, rtol=1e-4)
    traced = pruned(ids, labels=ids, output_kl=True)
    torch.testing.assert_close(traced.logits, expected, atol=1e-4, rtol=1e-4)
    assert float(traced.kl_loss) < 1e-5
    assert all(bool((experts == -1).all()) for experts in traced.experts)
    assert all(bool((opened == 1).all()) for opened in traced.open_values)
    assert [logits.shape for logits in traced.router_logits] == [(8 * 24, 4)] * 3


def test_the_paper_sized_student_starts_as_the_dense_model():
    """b = 3 with embeddings of 128 and 8 experts: masks start open whatever the seed."""
    for seed in range(5):
        for masks in make_tomoe(num_experts=8, embedding_size=128, noise_size=32, seed=seed).layer_masks():
            assert bool(masks.experts.all())
            assert bool(masks.pairs.all())


# --- noise, and none of it ----------------------------------------------------------------------------------------------------------


def test_noise_only_in_training(blocks):
    model = make_pruned()
    with torch.no_grad():
        first, second = (model(blocks.ids, labels=blocks.ids, output_kl=True) for _ in range(2))
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.kl_loss, second.kl_loss)
        model.noise = None  # whoever asks for noise now fails
        assert torch.equal(model(blocks.ids).logits, first.logits)
        model = make_pruned().train()
        first, second = (model(blocks.ids, labels=blocks.ids) for _ in range(2))
    assert not torch.equal(first.logits, second.logits)
    assert not any(torch.equal(one, other) for one, other in zip(first.experts, second.experts, strict=True))


def test_training_draws_from_the_global_generator(blocks):
    model, losses = make_pruned().train(), []
    for _ in range(2):
        torch.manual_seed(11)
        losses.append(model(blocks.ids, labels=blocks.ids).loss)
    assert torch.equal(*losses)


def test_one_static_mask_per_step_and_one_mask_per_expert(blocks):
    """In a forward all tokens share the rotary pairs, and all tokens of an expert its neurons; the next forward draws others."""
    model, seen = make_pruned().train(), []
    attention, mlp = model.masked_attentions()[1], model.routed_mlps()[1]
    attention.o_proj.register_forward_pre_hook(lambda *_: seen.append(attention._masks))
    mlp.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach() != 0))
    drawn = []
    for _ in range(2):
        seen.clear()
        output = model(blocks.ids, labels=blocks.ids)
        teacher_masks, teacher_neurons, (values, pairs), neurons = seen
        assert teacher_masks is None, "the teacher has no masks"
        assert bool(teacher_neurons.all())
        assert pairs.shape == (16,), "no token has a mask of its own"
        assert torch.equal(pairs[:8], pairs[8:]), "rotary pairs are kept or dropped together"
        assert len(values.detach().flatten(0, 1).unique(dim=0)) > 50, "values are masked token by token"
        experts = output.experts[1].sort().values  # tokens run sorted by expert
        for expert in range(4):
            assert len(neurons[experts == expert].unique(dim=0)) == 1
        drawn.append((pairs.detach(), torch.stack([neurons[experts == expert][0] for expert in range(4)])))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][1], drawn[1][1])


@torch.no_grad()
@every_family
def test_inference_uses_the_masks_that_are_told(family, blocks):
    """`layer_masks` against the definition, and a forward in which neurons outside them are gone from the weights."""
    model = make_pruned(family)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    embeddings = model.hypernetwork()
    for expert in range(4):
        model.load_state_dict(whole)
        model.set_routing(expert)
        expected = model(blocks.ids, output_router_logits=True)
        assert all(bool((each == expert).all()) for each in expected.experts)
        for mlp, masks in zip(model.routed_mlps(), model.layer_masks(), strict=True):
            features = naive_features(embeddings[mlp.row], dict(mlp.named_parameters()))
            wanted = torch.sigmoid((features @ mlp.decoder.weight.T + 0.3) / 0.4).round().bool()
            assert torch.equal(masks.experts, wanted)
            assert 0.2 < float(masks.experts.float().mean()) < 0.8
            mlp.down.weight[:, ~masks.experts[expert]] = 0
        torch.testing.assert_close(model(blocks.ids).logits, expected.logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", PRUNED)
def test_closed_pairs_are_gone_from_queries_and_keys(family, blocks):
    model = make_pruned(family)
    expected = model(blocks.ids).logits
    for attention, masks in zip(model.masked_attentions(), model.layer_masks(), strict=True):
        assert 0 < int(masks.pairs.sum()) < 8
        closed = (~masks.pairs).repeat(2)
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.view(-1, 16, 64)[:, closed] = 0
            if linear.bias is not None:
                linear.bias.view(-1, 16)[:, closed] = 0
        attention.open_pairs, attention.pair_logits = None, lambda embeddings: torch.ones(8)  # as if all were open
    torch.testing.assert_close(model(blocks.ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_open_values_are_what_the_output_projection_sees(blocks):
    model, seen = make_pruned(), []
    model.masked_attentions()[1].o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 4, 16) != 0))
    output = model(blocks.ids, output_router_logits=True)
    opened = seen[0][:, 0].float().mean(-1)
    torch.testing.assert_close(output.open_values[1], opened)
    assert output.open_values[1].dtype == torch.float32
    assert 0.2 < float(opened.mean()) < 0.8
    assert all(torch.equal(seen[0][:, 0], seen[0][:, head]) for head in range(4)), "all heads share the mask"


# --- routing ------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_family
def test_routing_modes(family, blocks):
    model = make_pruned(family)
    output = model(blocks.ids, output_router_logits=True)
    for logits, experts in zip(output.router_logits, output.experts, strict=True):
        assert torch.equal(logits.argmax(-1), experts)
        assert len(experts.unique()) > 1
    assert model(blocks.ids).router_logits is None
    model.set_routing(2)
    fixed = model(blocks.ids, output_router_logits=True)
    assert all(bool((experts == 2).all()) for experts in fixed.experts)
    shares = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0], [0.25, 0.25, 0.25, 0.25]])
    model.set_routing("random", shares=shares, seed=1)
    random = model(blocks.ids, output_router_logits=True)
    assert set(random.experts[0].tolist()) == {0, 1}
    assert set(random.experts[1].tolist()) == {3}
    model.set_routing("random", shares=shares, seed=1)
    assert torch.equal(model(blocks.ids).logits, random.logits), "the seed repeats the draws"
    for mode, says in (("label", "no difficulty labels"), (4, "experts 0 to 3"), ("best", "router, full, random")):
        with pytest.raises(ValueError, match=says) as refusal:
            model.set_routing(mode)
        assert "\n" not in str(refusal.value)


@torch.no_grad()
def test_training_is_routed_by_the_router_whatever_is_set(blocks):
    model = make_pruned().train()
    model.set_routing("full")
    assert len(model(blocks.ids, labels=blocks.ids).experts[0].unique()) > 1


@torch.no_grad()
@every_family
def test_parameters_are_counted(family):
    model, dense = make_pruned(family), make_dense(family)
    layer = decoder_layers(dense)[0].mlp
    whole = sum(parameter.numel() for parameter in layer.parameters())
    inputs = 1 if family in ("phi", "gpt_neox") else 2
    biased = family in ("phi", "gpt_neox")
    for mlp, masks in zip(model.routed_mlps(), model.layer_masks(), strict=True):
        assert mlp.dense_params() == mlp.full_params() == whole
        widths = masks.experts.sum(1).tolist()
        assert mlp.expert_params() == [width * ((inputs + 1) * 64 + biased) + 64 * biased for width in widths]


def test_layers_alone(blocks):
    """An MLP can be called alone, as benchmarks do, but not trained: its noise and embeddings belong to the model."""
    model, x = make_pruned(), torch.randn(3, 64)
    mlp = model.routed_mlps()[0]
    with torch.no_grad():
        experts = mlp.router(x).argmax(-1)
        masks = mlp.open_neurons()[experts].float()
        expected = (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T) * masks) @ mlp.down_proj.weight.T
        torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)
        model.set_routing("full")
        assert not torch.allclose(mlp(x), expected)
    with pytest.raises(RuntimeError, match="outside its model's forward"):
        mlp.train()(x)


# --- batches ------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_family
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 24)])
def test_a_token_does_not_depend_on_its_batch_or_its_future(family, shape):
    model, ids = make_pruned(family), make_blocks(*shape).ids
    together = model(ids).logits
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids[:, : (shape[1] + 1) // 2]).logits, together[:, : (shape[1] + 1) // 2], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_nothing_and_count_in_no_loss(family, side):
    """A row of 17 tokens padded to 24 beside a whole row: its logits and losses are those it has alone."""
    model, ids = make_pruned(family), make_blocks(2, 24).ids
    kept = slice(7, None) if side == "left" else slice(0, 17)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1] = 0
    mask[1, kept] = 1
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = ids.where(mask.bool(), 0)
    both = model(padded, attention_mask=mask, position_ids=position, labels=padded, output_kl=True)
    first, second = (model(each[None], labels=each[None], output_kl=True) for each in (ids[0], ids[1, kept]))
    torch.testing.assert_close(both.logits[0], first.logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.logits[1, kept], second.logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.kl_loss, (24 * first.kl_loss + 17 * second.kl_loss) / 41, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.lm_loss, (23 * first.lm_loss + 16 * second.lm_loss) / 39, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["hybrid", "dynamic"])
def test_pads_count_in_no_training_loss(attention):
    """What stands at pads changes none of the losses; the noise, given, is the same."""
    model = make_pruned(attention=attention).train()
    ids, mask = make_blocks(2, 16).ids, torch.ones(2, 16, dtype=torch.long)
    mask[0, 10:] = 0
    losses = []
    for filler in (5, 77):
        model.noise = GivenNoise()
        output = model(ids.where(mask.bool(), filler), attention_mask=mask, labels=ids.where(mask.bool(), -100))
        losses.append([float(getattr(output, name).detach()) for name in TERMS])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    model.noise = GivenNoise()
    whole = model(ids, labels=ids)
    assert losses[0] != pytest.approx([float(getattr(whole, name).detach()) for name in TERMS], rel=1e-3)


@pytest.mark.parametrize("attention", ["hybrid", "none"])
@pytest.mark.parametrize("what", ["pads", "labels"])
def test_a_batch_of_which_nothing_counts(attention, what):
    """Only pads give no gradient at all; text without labels is distilled all the same."""
    model, ids = make_pruned(attention=attention).train(), make_blocks(2, 16).ids
    inputs = {"labels": torch.full_like(ids, -100)}
    if what == "pads":
        inputs["attention_mask"] = torch.zeros_like(ids)
    output = model(ids, **inputs)
    assert all(bool(torch.isfinite(getattr(output, name))) for name in TERMS)
    assert float(output.lm_loss) == 0
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
    if what == "pads":
        assert float(output.loss.detach()) == 0
        assert not any(bool(gradient.any()) for gradient in gradients if gradient is not None)
    else:
        assert float(output.kl_loss.detach()) > 0


def test_trainer_divides_the_loss_by_accumulation():
    assert make_tomoe().accepts_loss_kwargs is False


@torch.no_grad()
@every_family
def test_generation_with_a_cache_is_greedy_continuation(family):
    model, prompt = make_pruned(family), make_blocks(2, 6).ids
    greedy = prompt
    for _ in range(8):
        greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options), greedy)


@torch.no_grad()
def test_losses_of_some_tokens_only_are_refused(blocks):
    model = make_tomoe()
    assert model(blocks.ids, logits_to_keep=1).logits.shape[1] == 1
    with pytest.raises(ValueError, match="leave out logits_to_keep"):
        model(blocks.ids, labels=blocks.ids, logits_to_keep=1)
    cache = model(blocks.ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without past_key_values"):
        model(blocks.ids, output_kl=True, past_key_values=cache)


# --- training -----------------------------------------------------------------------------------------------------------------------


@every_family
def test_only_what_tomoe_adds_learns(family, blocks):
    model, dense = make_tomoe(family), make_dense(family)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in dense.named_parameters()}
    model.train()
    model(blocks.ids, labels=blocks.ids).loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in learns(model).values())
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_the_teacher_has_no_dropout_and_leaves_no_trace(blocks):
    model = make_tomoe(dense=make_dense(attention_dropout=0.5)).train()
    frozen = model.model.layers[0].mlp.act_fn.eval()
    with torch.no_grad():
        expected = make_dense()(blocks.ids).logits
        kept = []
        model._distillation, original = (lambda *args: kept.append(args[1].clone()) or original(*args)), model._distillation
        model(blocks.ids, labels=blocks.ids)
    torch.testing.assert_close(kept[0], expected, atol=1e-4, rtol=1e-4)
    assert model.training
    assert not frozen.training, "a module that was in eval mode stays so"
    assert model.masking.current is None


@pytest.mark.parametrize("attention", ["hybrid", "none", "dynamic"])
def test_steps_lower_the_loss(attention, blocks):
    model = make_tomoe(attention=attention).train()
    optimizer = torch.optim.AdamW(learns(model).values(), lr=1e-2)
    torch.manual_seed(0)
    losses, ratios = [], []
    for _ in range(50):
        output = model(blocks.ids, labels=blocks.ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
        ratios.append(float(output.active_ratio_max))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert ratios[0] > 0.99
    assert sum(ratios[-5:]) / 5 < 0.7
    dense = make_dense().state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items() if name in dense)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_activation_checkpoints_change_no_gradient(family, blocks):
    """Layers run a second time in the backward pass: with the noise of the first time, also if another forward came between."""
    gradients = []
    for checkpoints in (False, True):
        model = make_pruned(family).train()
        model.config.use_cache = False
        if checkpoints:
            model.activation_checkpointing_enable()
            model = copy.deepcopy(model)  # as wrappers and trackers do: the copy checkpoints with its own masks
        torch.manual_seed(4)
        output = model(blocks.ids, labels=blocks.ids)
        if checkpoints:
            with torch.no_grad():
                model.eval()(blocks.ids)
                model.train()
        output.loss.backward()
        gradients.append([output.loss.detach(), *(parameter.grad for parameter in learns(model).values())])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpoints_are_refused(blocks):
    model = make_pruned().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(blocks.ids, labels=blocks.ids)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_step_leaves_nothing_behind(checkpoints, blocks):
    model = make_pruned().train()
    if checkpoints:
        model.activation_checkpointing_enable()
    gc.collect()
    gc.disable()  # what only the collector could free would stay until it runs
    try:
        output = model(blocks.ids, labels=blocks.ids)
        output.loss.backward()
        held = [weakref.ref(each) for each in (output.logits, output.router_logits[0], output.loss)]
        del output
        assert all(each() is None for each in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision(how, blocks):
    """What ToMoE adds stays float32, and learns."""
    model = make_pruned(dense=make_dense(dtype="bfloat16" if how == "bfloat16" else "float32")).train()
    assert all(parameter.dtype == torch.float32 for parameter in learns(model).values())
    reference = make_pruned().train()
    torch.manual_seed(0)
    expected = reference(blocks.ids, labels=blocks.ids)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        output = model(blocks.ids, labels=blocks.ids)
    output.loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in learns(model).values())
    assert float(output.kl_loss.detach()) == pytest.approx(float(expected.kl_loss.detach()), rel=0.2)
    assert float(output.ratio_loss.detach()) == pytest.approx(float(expected.ratio_loss.detach()), rel=0.05)


def test_extra_parameters_on_llama_2_7b():
    """Shapes only, the form that is trained: routers D -> E and D -> 128, decoders 128 -> H and 128 -> 192, norms, and one GRU."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "transformers_version")}
    with torch.device("meta"):
        model = MASKED_CLASSES["llama"](MASKED_CONFIGS["llama"](**values, moe=ToMoEConfig().to_dict()))
    extra = sum(parameter.numel() for module in model.method_modules() for parameter in module.parameters())
    layer = 4096 * 8 + 128 * 11008 + 4096 * 128 + 128 * 192 + 4 * 128
    assert extra == 32 * layer + 2 * 3 * (64 * 32 + 64 * 64 + 2 * 64)
    base = sum(parameter.numel() for parameter in model.parameters()) - extra
    assert base / 1e9 == pytest.approx(6.738, abs=0.001)
    assert model.hypernetwork.z.shape == (64, 8, 32)
