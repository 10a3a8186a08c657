"""Routed execution of nested experts: what is computed, what is not, and how weights lie in memory."""

import copy

import pytest
import torch
from conftest import make_blocks, make_converted, make_dense
from torch.utils.flop_counter import FlopCounterMode

from dynamoe_lab.conversion import convert
from dynamoe_lab.models import DynaMoEConfig

SIXTEEN = tuple((e + 1) / 16 for e in range(16))


def one_mlp(family="llama", experts=(0.25, 0.5, 0.75, 1.0)):
    return make_converted(family, experts=experts).nested_mlps()[1].eval()


def tokens(n: int) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(3))


def given(mlp, experts: list[int]):
    """The MLP with a router that is replaced by these choices."""
    table = torch.nn.functional.one_hot(torch.tensor(experts), mlp.moe.num_experts).float()
    return mlp.router.register_forward_hook(lambda *_: table)


CHOICES = {
    "mixed": [0, 3, 1, 1, 2, 0, 3, 0],
    "absent": [0, 3, 0, 0, 3, 0, 3, 0],
    "no smallest": [2, 1, 1, 2, 3, 1, 2, 2],
    "one": [2] * 8,
    "single token": [1],
}


@torch.no_grad()
@pytest.mark.parametrize("experts", CHOICES.values(), ids=CHOICES)
def test_every_token_gets_its_own_prefix(family, experts):
    mlp, x = one_mlp(family), tokens(len(experts))
    hook = given(mlp, experts)
    output = mlp(x)
    hook.remove()
    expected = torch.cat([mlp.expert_output(row[None], expert) for row, expert in zip(x, experts, strict=True)])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sixteen_experts_and_no_token_at_all(family):
    mlp, x = one_mlp(family, SIXTEEN), tokens(40)
    experts = torch.randint(0, 16, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    hook = given(mlp, experts)
    expected = torch.cat([mlp.expert_output(row[None], expert) for row, expert in zip(x, experts, strict=True)])
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)
    hook.remove()
    assert mlp(x[:0]).shape == (0, 64)


@torch.no_grad()
@pytest.mark.parametrize("experts", CHOICES.values(), ids=CHOICES)
def test_only_the_chosen_neurons_are_multiplied(experts):
    """Multiply-adds, counted by torch: three per token, hidden dimension and neuron of its expert, and the router's."""
    mlp, x = one_mlp(), tokens(len(experts))
    hook = given(mlp, experts)
    accumulated = {torch.ops.aten.addmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}  # torch counts addmm, not addmm_
    with FlopCounterMode(display=False, custom_mapping=accumulated) as counter:
        mlp(x)
    hook.remove()
    router = sum(parameter.numel() for parameter in mlp.router.parameters()) * len(x)
    assert counter.get_total_flops() == 2 * (sum(3 * 64 * mlp.sizes[expert] for expert in experts) + router)


@torch.no_grad()
def test_absent_experts_cost_no_call(monkeypatch):
    """Sixteen experts of which two are chosen: two products of each projection, as with two experts."""
    mlp, x = one_mlp(experts=SIXTEEN), tokens(6)
    asked = []
    hidden = type(mlp)._hidden
    monkeypatch.setattr(type(mlp), "_hidden", lambda self, rows, lo, hi: (asked.append((len(rows), lo, hi)), hidden(self, rows, lo, hi))[1])
    given(mlp, [3, 15, 3, 3, 15, 3])
    mlp(x)
    assert asked == [(6, 0, mlp.sizes[3]), (2, mlp.sizes[3], mlp.sizes[15])]


@torch.no_grad()
def test_sorting_puts_large_experts_first_and_back():
    mlp, x, experts = one_mlp(), tokens(6), torch.tensor([0, 3, 1, 3, 0, 2])
    rows, order, counts = mlp.sort_tokens(x, experts)
    assert counts == [2, 1, 1, 2]
    assert experts[order].tolist() == [3, 3, 2, 1, 0, 0]
    assert order.tolist() == [1, 3, 5, 2, 0, 4]  # tokens of one expert keep their order
    assert torch.equal(rows, x[order])
    assert torch.equal(mlp.restore_order(rows, order), x)
    same, order, counts = mlp.sort_tokens(x, torch.full((6,), 2))
    assert same is x
    assert order is None
    assert counts == [0, 0, 6, 0]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["router", "random"])
def test_both_paths_agree_where_there_are_pads(family, mode):
    model, ids = make_converted(family), make_blocks().ids[:4]
    padded = torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 5, dtype=torch.long)], 1)
    logits = []
    for collect in (False, True):
        model.set_routing(mode, **({"shares": torch.ones(3, 4), "seed": 5} if mode == "random" else {}))
        logits.append(model(padded, attention_mask=mask, output_router_logits=collect).logits[:, :24])
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_autocast_runs_the_prefixes(family):
    """Autocast casts what it multiplies: hidden rows are bfloat16, weights float32."""
    model, ids = make_converted(family), make_blocks().ids
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model(ids, output_router_logits=True).experts[0].unique()) > 1
        mixed = model(ids).logits.float()
        blocks = model(ids, output_router_logits=True).logits.float()
    error, scale = (mixed - blocks).abs().mean(), blocks.abs().mean()
    assert float(error / scale) < 0.1  # choices of close calls differ in bfloat16


class Float32(torch.nn.Module):
    """An activation that answers in float32, as some do under autocast on GPUs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.float())


@torch.no_grad()
def test_autocast_with_an_activation_in_float32(family):
    model, ids = make_converted(family), make_blocks().ids
    for mlp in model.nested_mlps():
        mlp.act_fn = Float32(mlp.act_fn)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.isfinite(model(ids).logits).all())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_rounds_and_no_more(dtype, close):
    """The same choices in half precision: the error is that of its rounding, for tokens of every expert."""
    mlp, x, experts = one_mlp(), tokens(8), CHOICES["mixed"]
    given(mlp, experts)
    exact, half = mlp(x), mlp.to(dtype)(x.to(dtype)).float()
    assert float(((half - exact).norm(dim=1) / exact.norm(dim=1)).max()) < close


# --- memory -------------------------------------------------------------------------------------------------------------------------


def one_piece(model) -> bool:
    """Whether every prefix of every down projection is one contiguous piece of memory."""
    return all(mlp.down.weight[:, : mlp.sizes[0]].t().is_contiguous() for mlp in model.nested_mlps())


def test_prefixes_are_one_piece_of_memory(family, tmp_path):
    dense = make_dense(family)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model = convert(dense, DynaMoEConfig(router_hidden_size=16), calibration=make_blocks(seed=7))
    assert one_piece(model)
    assert one_piece(copy.deepcopy(model))
    assert one_piece(model.to(torch.bfloat16).to(torch.float32))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert one_piece(loaded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(tensor.stride() == before[name].stride() for name, tensor in dense.state_dict().items()), "the dense model stays as it was"


def test_training_keeps_the_layout():
    model, ids = make_converted(), make_blocks().ids
    for mlp in model.nested_mlps():
        mlp.down.weight.data = mlp.down.weight.data.contiguous()
    assert not one_piece(model)
    with torch.inference_mode():
        model.lay_out()  # weights laid out in inference mode can be trained
    assert one_piece(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model.nested_mlps()[0].down.weight.detach().clone()
    model.train()(ids, labels=ids).loss.backward()
    down = model.nested_mlps()[0].down.weight
    assert down.grad.stride() == down.stride(), "else every step would copy between the two orders"
    optimizer.step()
    assert not torch.equal(model.nested_mlps()[0].down.weight, before)
    assert one_piece(model)


def test_layouts_can_be_exchanged_for_sharding(tmp_path):
    """FSDP2 takes contiguous parameters only: `lab.train` lays weights out by rows before they are wrapped."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    model, ids = make_converted(), make_blocks().ids
    expected = model(ids).logits
    model.lay_out(columns=False)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.train()(ids, labels=ids).loss.backward()
    finally:
        distributed.destroy_process_group()


def test_training_runs_by_rows_and_ends_by_columns(tmp_path, monkeypatch):
    from dynamoe_lab.config import TrainConfig
    from dynamoe_lab.models import DynaMoEMixin
    from dynamoe_lab.training import dynamoe, run, train

    seen = []

    class Watched(dynamoe.DynaMoETrainer):
        def train(self, *args, **kwargs):
            seen.append(all(parameter.is_contiguous() for parameter in self.model.parameters()))
            return super().train(*args, **kwargs)

    monkeypatch.setitem(run.TRAINERS, DynaMoEMixin, Watched)
    model = make_converted()
    train(model, make_blocks().ids, TrainConfig(steps=1, batch_size=2), output_dir=tmp_path, progress=False)
    assert seen == [True]
    assert one_piece(model)
