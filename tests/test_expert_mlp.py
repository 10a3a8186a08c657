"""The MLP of separate experts against experts cut out of the weights one token at a time."""

import copy

import pytest
import torch
from conftest import PICO, make_dense
from test_models import ACTIVATIONS, projections
from torch import nn
from torch.nn import functional as F

from dynamoe_lab.models import ExpertMLP, Routing, ToMoEConfig, decoder_layers, family_of

EXPERTS, UNION, D, H = 4, 40, PICO["hidden_size"], PICO["intermediate_size"]
FAMILIES = ("llama", "gemma3_text", "gpt_neox", "phi")  # gated without biases, with another activation, plain with biases


def make_mlp(family="llama", union=UNION, membership=None, **changes):
    """A random expert MLP of a pico model, by itself, in eval mode; its second expert has no neuron."""
    dense = make_dense(family, **changes)
    kind = family_of(family)
    mlp = ExpertMLP(getattr(decoder_layers(dense)[0], kind.mlp), kind, ToMoEConfig(num_experts=EXPERTS), union, 0, Routing())
    generator = torch.Generator().manual_seed(1)
    mlp.router.weight.data.normal_(generator=generator)
    members = torch.rand(EXPERTS, union, generator=generator) < torch.tensor([0.5, 0.0, 0.2, 0.9])[:, None]
    mlp.membership.copy_(members if membership is None else membership)
    return mlp.eval()


def tokens(count=64 * EXPERTS, seed=2):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def naive(mlp, x, experts, family="llama"):
    """Every token by itself, through an MLP of its expert's neurons."""
    outputs = []
    for row, expert in zip(x, experts, strict=True):
        kept = mlp.membership[expert].nonzero()[:, 0]
        *inputs, (down, down_bias) = projections(mlp, family)
        raised = [weight[kept] @ row + (0 if bias is None else bias[kept]) for weight, bias in inputs]
        hidden = ACTIVATIONS.get(family, F.silu)(raised[0])
        for factor in raised[1:]:
            hidden = hidden * factor
        outputs.append(down[:, kept] @ hidden + (0 if down_bias is None else down_bias))
    return torch.stack(outputs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_router_picks_one_expert_per_token(family):
    mlp, x = make_mlp(family), tokens()
    experts = (x @ mlp.router.weight.T).argmax(-1)
    assert len(experts.unique()) == EXPERTS, "a test of experts needs all of them, the one without neurons, too"
    close(mlp(x), naive(mlp, x, experts, family))
    batch = x[:20].view(4, 5, D)
    close(mlp(batch), naive(mlp, x[:20], experts[:20], family).view(4, 5, D))
    close(mlp._forward_grouped(x[:20], experts[:20]), mlp._forward_masked(x[:20], experts[:20]))
    for row in range(6):
        close(mlp(x[row : row + 1]), naive(mlp, x[row : row + 1], experts[row : row + 1], family))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_routing_modes(family):
    mlp, x = make_mlp(family), tokens()
    for expert in range(EXPERTS):
        mlp.routing.mode, mlp.routing.expert = "fixed", expert
        close(mlp(x), naive(mlp, x, torch.full((len(x),), expert), family))
        close(mlp(x[:1]), naive(mlp, x[:1], [expert], family))
    mlp.routing.mode = "random"
    mlp.routing.shares = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    mlp.routing.generators = [torch.Generator().manual_seed(3)]
    drawn = torch.multinomial(mlp.routing.shares[0], len(x), replacement=True, generator=torch.Generator().manual_seed(3))
    close(mlp(x), naive(mlp, x, drawn, family))
    mlp.routing.mode = "full"
    output = mlp(x)
    mlp.membership.fill_(True)
    close(output, naive(mlp, x, [0] * len(x), family))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_edges(family):
    """No token; no neuron at all; all tokens at one expert, also at one without neurons."""
    mlp, x = make_mlp(family), tokens()
    assert mlp(x[:0]).shape == (0, D)
    assert mlp(x[:0].view(1, 0, D)).shape == (1, 0, D)
    for expert in (0, 1, 3):
        mlp.router.weight.zero_()
        mlp.router.weight[expert] = x[:9].sum(0) * 100
        chosen = (x @ mlp.router.weight.T).argmax(-1)
        alike = x[chosen == expert]
        assert len(alike) > 1
        close(mlp(alike), naive(mlp, alike, [expert] * len(alike), family))
    empty = make_mlp(family, union=0)
    bias = empty.down.bias
    close(empty(x), torch.zeros_like(x) if bias is None else bias.expand_as(x))
    empty.routing.mode = "full"
    close(empty(x), torch.zeros_like(x) if bias is None else bias.expand_as(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_gradients_the_function_is_the_same_and_they_are_right(family):
    mlp, x = make_mlp(family), tokens()
    experts = (x @ mlp.router.weight.T).argmax(-1)
    for mode in ("router", "fixed"):
        mlp.routing.mode, mlp.routing.expert = mode, 2
        with torch.no_grad():
            fast = mlp(x)
        close(mlp(x), fast)
    mlp.routing.mode = "router"
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = [weight for pair in projections(mlp, family) for weight in pair if weight is not None]
    aim = tokens(seed=4)
    found = torch.autograd.grad((mlp(ours) * aim).sum(), [ours, *weights])
    expected = torch.autograd.grad((naive(mlp, theirs, experts, family) * aim).sum(), [theirs, *weights])
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    assert not mlp.router.weight.requires_grad, "a hard choice has no gradient"


def test_the_copies_are_nobodys_weights():
    mlp, x = make_mlp(), tokens()
    names, parameters = list(mlp.state_dict()), len(list(mlp.parameters()))
    mlp(x)
    assert mlp._laid_out is None, "with gradients there are none"
    with torch.no_grad():
        mlp(x)
    assert mlp._laid_out is not None
    assert list(mlp.state_dict()) == names == ["membership", *(f"{name}_proj.weight" for name in ("gate", "up", "down")), "router.weight"]
    assert len(list(mlp.parameters())) == parameters
    copied = sum(piece.numel() for pieces in mlp._laid_out[1] for piece in pieces if piece is not None)
    assert copied == 3 * D * int(mlp.membership.sum())
    other = copy.deepcopy(mlp)
    assert other._laid_out is None
    with torch.no_grad():
        assert torch.equal(other(x), mlp(x))
    mlp.train()
    assert mlp._laid_out is None


def _in_place(mlp):
    for _, parameter in mlp.named_parameters():
        parameter.add_(0.1)


def _optimised(mlp):
    with torch.enable_grad():
        optimiser = torch.optim.AdamW([parameter for parameter in mlp.parameters() if parameter.requires_grad], lr=0.1)
        mlp(tokens()).square().sum().backward()
        optimiser.step()


def _replaced(mlp):
    mlp.up_proj.weight = nn.Parameter(torch.randn_like(mlp.up_proj.weight))


def _loaded(mlp):
    mlp.load_state_dict({name: value.flip(0) for name, value in mlp.state_dict().items()})


def _assigned(mlp):
    mlp.load_state_dict({name: value.flip(0) for name, value in mlp.state_dict().items()}, assign=True)


def _other_members(mlp):
    mlp.membership.logical_not_()


def _trained_a_little(mlp):
    mlp.train()
    mlp.up_proj.weight.data.mul_(2)  # which no version counts
    mlp.eval()


def _adapted(mlp):
    """Wrapped, merged and unwrapped as adapters are: through `.data`, the linear map is the same one afterwards."""
    linear = mlp.up_proj
    mlp.up_proj = nn.Sequential(linear)
    linear.weight.data += 0.5
    mlp.up_proj = linear


def _looked_at_with_gradients(mlp):
    linear = mlp.up_proj
    with torch.enable_grad():
        mlp(tokens())
    linear.weight.data += 0.5


def _laid_out_again(mlp):
    mlp.up_proj.weight.data += 0.5
    mlp.lay_out()


CHANGES = [_in_place, _optimised, _replaced, _loaded, _assigned, _other_members, _trained_a_little]
CHANGES += [_adapted, _looked_at_with_gradients, _laid_out_again]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change):
    mlp, x = make_mlp(), tokens()
    before = mlp(x)
    kept = mlp._laid_out
    assert torch.equal(mlp(x), before)
    assert mlp._laid_out is kept, "nothing has changed, nothing is copied"
    change(mlp)
    after = mlp(x)
    assert not torch.allclose(after, before, atol=1e-3)
    close(after, naive(mlp, x, (x @ mlp.router.weight.T).argmax(-1)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_other_dtypes(family):
    mlp, x = make_mlp(family), tokens()
    exact = mlp(x)
    mlp.double()
    assert mlp(x.double()).dtype == torch.float64
    torch.testing.assert_close(mlp(x.double()).float(), exact, atol=1e-5, rtol=1e-5)
    mlp.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = [mlp(x), torch.cat([mlp(x[row : row + 1]) for row in range(len(x))])]
    router = copy.deepcopy(mlp.router)
    mlp.bfloat16()
    mlp.router = router  # as models have it: choices are made in float32
    mixed.append(mlp(x.bfloat16()))
    for output in mixed:
        assert (output.float() - exact).norm() < 0.02 * exact.norm()
    assert mlp(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_inference_tensors_will_do():
    with torch.inference_mode():
        mlp, x = make_mlp(), tokens()
        output = mlp(x)
    with torch.no_grad():
        close(mlp(x), output)


@torch.no_grad()
def test_what_wraps_a_projection_is_asked():
    """An adapter on a projection is part of the function, in inference, too."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp, x = make_mlp(), tokens()
    before = mlp(x)
    mlp.up_proj.__class__ = Doubled
    close(mlp(x), 2 * before)


@torch.no_grad()
def test_sorting_and_back():
    mlp, x = make_mlp(), tokens()
    experts = (x @ mlp.router.weight.T).argmax(-1)
    rows, order, counts = mlp.sort_tokens(x, experts)
    assert counts == torch.bincount(experts, minlength=EXPERTS).tolist()
    assert torch.equal(experts[order], experts.sort().values)
    assert torch.equal(rows, x[order])
    assert torch.equal(mlp.restore_order(rows, order), x)
    rows, order, counts = mlp.sort_tokens(x, torch.full((len(x),), 2))
    assert rows is x
    assert order is None
    assert counts == [0, 0, len(x), 0]


@torch.no_grad()
def test_a_few_tokens_read_the_union_once(monkeypatch):
    """Experts apart take sum of width * (tokens + 18), all at once the union * (all tokens + 18)."""
    members = torch.arange(UNION) < torch.tensor([20, 0, 10, 40])[:, None]
    mlp, taken = make_mlp(membership=members), []
    for name in ("_forward_grouped", "_forward_masked"):
        method = getattr(mlp, name)
        monkeypatch.setattr(mlp, name, lambda x, experts, name=name, method=method: (taken.append(name), method(x, experts))[1])
    for counts, way in (
        ((1, 0, 0, 0), "grouped"),  # one token
        ((2, 0, 0, 0), "grouped"),  # one expert: 20 * 20 <= 40 * 20
        ((0, 1, 1, 0), "grouped"),  # 10 * 19 <= 40 * 20
        ((1, 0, 0, 1), "masked"),  # 20 * 19 + 40 * 19 > 40 * 20
        ((30, 0, 30, 1), "grouped"),  # 20 * 48 + 10 * 48 + 40 * 19 <= 40 * 79
        ((9, 9, 9, 9), "grouped"),  # (20 + 10 + 40) * 27 <= 40 * 54
        ((3, 3, 3, 3), "masked"),  # (20 + 10 + 40) * 21 > 40 * 30
    ):
        experts = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
        monkeypatch.setattr(mlp, "_router_logits", lambda x, experts=experts: F.one_hot(experts, EXPERTS).float())
        x = tokens(len(experts))
        close(mlp(x), naive(mlp, x, experts))
        assert taken.pop() == f"_forward_{way}", counts


@torch.no_grad()
def test_a_token_does_not_depend_on_its_neighbours():
    mlp, x = make_mlp(), tokens(64)
    whole = mlp(x)
    close(torch.cat([mlp(x[:7]), mlp(x[7:8]), mlp(x[8:])]), whole)


@torch.no_grad()
def test_traces():
    mlp, x = make_mlp(), tokens()
    for mode, expert in (("router", 0), ("fixed", 2), ("full", 0)):
        mlp.routing.mode, mlp.routing.expert, mlp.routing.collect = mode, expert, False
        plain = mlp(x)
        assert mlp.trace is None
        mlp.routing.collect = True
        close(mlp(x), plain)
        close(mlp.trace.router_logits, x @ mlp.router.weight.T)
        chosen = {"router": (x @ mlp.router.weight.T).argmax(-1), "fixed": torch.full((len(x),), 2), "full": torch.full((len(x),), -1)}
        assert torch.equal(mlp.trace.experts, chosen[mode])
        mlp.trace = None


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_by_hand(family):
    mlp = make_mlp(family)
    sizes = mlp.membership.sum(1).tolist()
    assert sizes[1] == 0
    neuron, shared = (3 * D, 0) if family in ("llama", "gemma3_text") else (2 * D + 1, D)
    assert mlp.expert_params() == [size * neuron + shared for size in sizes]
    assert mlp.full_params() == UNION * neuron + shared == sum(p.numel() for name, p in mlp.named_parameters() if "router" not in name)
    dense = getattr(decoder_layers(make_dense(family))[0], family_of(family).mlp)
    assert mlp.dense_params() == H * neuron + shared == sum(parameter.numel() for parameter in dense.parameters())
