"""Forced routings and the forwards that are timed: every token takes the expert drawn for it, decoding goes on where prefill ended."""

import numpy as np
import pytest
import torch
from conftest import make_blocks, make_converted, make_dense

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import mixed_shares
from dynamoe_lab.evaluation.overrule import forced_routing
from dynamoe_lab.evaluation.stopwatch import Work, step_ids

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
MIXED = mixed_shares(FRACTIONS, 0.6)
IDS = make_blocks(4, 24).ids


# --- shares -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fractions", [FRACTIONS, (0.5, 1.0), (0.1, 0.15, 0.8, 1.0), tuple(np.arange(1, 17) / 16)])
def test_mixed_shares_have_the_mean_and_the_greatest_entropy(fractions):
    rng = np.random.default_rng(0)
    widths = np.array(fractions)
    _, _, rows = np.linalg.svd(np.stack([np.ones_like(widths), widths]))
    free = rows[2:]  # directions that change neither the sum nor the mean
    for mean in np.linspace(fractions[0], 1, 12)[1:-1]:
        shares = np.array(mixed_shares(fractions, mean))
        assert shares.sum() == pytest.approx(1, abs=1e-12)
        assert shares @ widths == pytest.approx(mean, abs=1e-6)
        assert (shares > 0).all()
        for _ in range(20 if len(free) else 0):
            step = rng.normal(size=len(free)) @ free
            other = shares + step * rng.uniform(0.01, 1) * np.min(shares / np.abs(step))
            assert other @ widths == pytest.approx(mean)
            assert -(other * np.log(other)).sum() < -(shares * np.log(shares)).sum()


def test_mixed_shares_at_the_ends_and_in_the_middle():
    assert mixed_shares(FRACTIONS, 0.25) == (1, 0, 0, 0)
    assert mixed_shares(FRACTIONS, 1) == (0, 0, 0, 1)
    assert mixed_shares((1.0,), 1.0) == (1.0,)
    assert mixed_shares(FRACTIONS, 0.625) == pytest.approx([0.25] * 4)
    for mean in (0.25 + 1e-9, 1 - 1e-9):
        assert np.dot(mixed_shares(FRACTIONS, mean), FRACTIONS) == pytest.approx(mean, abs=1e-12)
    for mean in (0.2, 1.01, float("nan")):
        with pytest.raises(InputError, match=r"mixed_shares: mean = .*: experts of these widths average between 0.25 and 1"):
            mixed_shares(FRACTIONS, mean)
    for fractions in ((), (0.5, 0.25, 1.0), (0.5, 0.75), (0.0, 1.0)):
        with pytest.raises(InputError, match=r"give increasing widths above 0, the last 1\.0"):
            mixed_shares(fractions, 0.6)


# --- overruling ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_token_takes_the_expert_drawn_for_it(family):
    """On the path that is timed: each layer's output, row by row, is that of the drawn prefix of this layer's input."""
    model, passed, asked = make_converted(family), [], []
    for mlp in model.nested_mlps():
        mlp.register_forward_hook(lambda mlp, args, output: passed.append((mlp, args[0].flatten(0, -2), output.flatten(0, -2))))
        mlp.router.get_submodule("0").register_forward_hook(lambda *_: asked.append(1))
    with forced_routing(model, MIXED, rows=IDS.numel(), seed=3) as drawn:
        model(IDS, use_cache=False)
        assert len(asked) == len(passed) == len(drawn) == 3, "the routers did work"
        told = model(IDS, output_router_logits=True, use_cache=False)
    for layer, (mlp, x, output) in enumerate(passed[:3]):
        assert drawn[layer].unique().numel() == 4
        for expert in range(4):
            rows = drawn[layer] == expert
            assert torch.allclose(output[rows], mlp.expert_output(x[rows], expert), atol=1e-4), (layer, expert)
        assert torch.equal(told.experts[layer], drawn[layer])


@torch.no_grad()
def test_one_expert_for_all_is_that_expert(family):
    model = make_converted(family)
    for expert in range(4):
        model.set_routing(expert)
        expected = model(IDS, use_cache=False).logits
        with forced_routing(model, tuple(float(e == expert) for e in range(4)), rows=IDS.numel()) as drawn:
            assert (drawn == expert).all()
            assert torch.allclose(model(IDS, use_cache=False).logits, expected, atol=1e-4)
        assert model.routing.mode == "router"


def test_draws_are_seeded_independent_and_have_the_shares():
    model = make_converted()

    def draws(seed: int) -> torch.Tensor:
        with forced_routing(model, MIXED, rows=1000, calls=5, seed=seed) as drawn:
            return drawn

    drawn = draws(0)
    assert drawn.shape == (3, 5000)
    assert torch.equal(drawn, draws(0))
    assert (drawn == draws(1)).float().mean() < 0.5
    for layer in range(3):
        shares = torch.bincount(drawn[layer]) / 5000
        assert torch.allclose(shares, torch.tensor(MIXED), atol=0.03), "over four standard errors off"
        agree = (drawn[layer] == drawn[(layer + 1) % 3]).float().mean()
        assert float(agree) == pytest.approx(sum(share**2 for share in MIXED), abs=0.03), "layers draw for themselves"


# --- the forwards that are timed ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("routing", ["dense", "router", MIXED], ids=["dense", "router", "mixed"])
def test_decode_steps_are_those_of_one_long_prefill(family, routing):
    model = make_dense(family) if routing == "dense" else make_converted(family)
    work = Work(model, "decode", IDS, 20)
    assert (work.rows, work.calls) == (4, 4)
    if routing == MIXED:  # one expert for all tokens ever, so that both forwards agree on it
        routing = (0.0, 1.0, 0.0, 0.0)
        model.set_routing(1)
        expected = model(IDS, use_cache=False).logits
        with forced_routing(model, routing, rows=80):
            work.prefill()
        with forced_routing(model, routing, rows=4, calls=4):
            steps = torch.cat([output.logits for output in work.run()], dim=1)
    else:
        expected = model(IDS, use_cache=False).logits
        first = work.prefill().logits
        assert first.shape == (4, 1, 128)
        assert torch.allclose(first[:, 0], expected[:, 19], atol=1e-3)
        steps = torch.cat([output.logits for output in work.run()], dim=1)
    assert torch.allclose(steps, expected[:, 20:], atol=1e-3)
    work.rewind()
    assert work.cache.get_seq_length() == 20
    if routing in ("dense", "router"):
        again = torch.cat([output.logits for output in work.run()], dim=1)
        assert torch.allclose(again, steps, atol=1e-5), "rewound, the same steps come again"


@torch.no_grad()
def test_decode_steps_take_their_draws_in_turn():
    model = make_converted()
    work = Work(model, "decode", IDS, 20)
    work.prefill()
    with forced_routing(model, MIXED, rows=work.rows, calls=work.calls) as drawn:
        for _ in range(2):
            outputs = work.run(output_router_logits=True)
            work.rewind()
            taken = torch.stack([torch.stack(output.experts) for output in outputs], dim=1)  # [L, steps, B]
            assert torch.equal(taken.flatten(1), drawn)


def test_ids_go_on_and_come_round():
    model, settings = make_dense(), {"phase": "decode", "batch": 2, "tokens": 20, "steps": 8, "seed": 0}
    ids = step_ids(model, "f", **settings, ids=IDS)
    assert torch.equal(ids, torch.cat([IDS[:2], IDS[:2, :4]], dim=1))
    assert torch.equal(step_ids(model, "f", **{**settings, "phase": "prefill"}, ids=IDS), IDS[:2, :20])
    drawn = step_ids(model, "f", **settings, ids=None)
    assert drawn.shape == (2, 28)
    assert torch.equal(drawn, step_ids(model, "f", **settings, ids=None))
    assert 0 <= drawn.min() < drawn.max() < 128
