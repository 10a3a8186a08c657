"""Calibration statistics and importance against sums written out; what convert refuses."""

import pytest
import torch
from conftest import make_blocks, make_converted, make_dense
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaModel

from dynamoe_lab.conversion import FORMULAS, calibrate, convert, importance, importance_table
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import DynaMoEConfig, decoder_layers


@torch.no_grad()
def naive_importance(dense, ids, formula):
    """The formulas written out: activations of every layer's MLP, token by token, in float64."""
    rows = []
    for layer in decoder_layers(dense):
        inputs = []
        handle = layer.mlp.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].flatten(0, 1)))
        dense(ids)
        handle.remove()
        x, mlp = inputs[0].double(), layer.mlp
        hidden = F.silu(x @ mlp.gate_proj.weight.double().T) * (x @ mlp.up_proj.weight.double().T)
        down = mlp.down_proj.weight.double()
        if formula == "l2_down_tokennorm":
            hidden = hidden / (hidden @ down.T).norm(dim=1, keepdim=True)
        value = hidden.abs().sum(0) if formula == "abs" else hidden.square().sum(0).sqrt()
        rows.append(value * down.norm(dim=0) if formula.startswith("l2_down") else value)
    return torch.stack(rows)


@pytest.mark.parametrize("formula", ["l2_down", "l2_down_tokennorm", "l2", "abs"])
def test_importance_formulas(family, blocks, formula):
    dense = make_dense(family)
    statistics = calibrate(dense, blocks, batch_size=3)
    torch.testing.assert_close(importance(statistics, formula), naive_importance(dense, blocks.ids, formula), rtol=1e-4, atol=1e-6)
    assert statistics.tokens == blocks.ids.numel()


def test_token_normalising_tames_an_attention_sink(blocks):
    """One token with huge activations decides l2_down, and has one token's say in l2_down_tokennorm."""
    statistics = calibrate(make_dense(), blocks)
    spike = torch.zeros_like(statistics.squares[0])
    spike[5] = 1e9 * statistics.squares.max()  # what one sink token adds to neuron 5
    statistics.squares[0] += spike
    statistics.normalised_squares[0] += spike / spike.sum()  # its normalised activations have a bounded sum
    assert importance(statistics, "l2_down")[0].argmax() == 5
    assert (
        importance(statistics, "l2_down_tokennorm")[0].argmax()
        == importance(calibrate(make_dense(), blocks), "l2_down_tokennorm")[0].argmax()
    )


def test_random_importance_is_seeded(blocks):
    statistics = calibrate(make_dense(), blocks)
    assert torch.equal(importance(statistics, "random", seed=1), importance(statistics, "random", seed=1))
    assert not torch.equal(importance(statistics, "random", seed=1), importance(statistics, "random", seed=2))


def test_neurons_come_in_order_of_importance(family):
    """The reordered weights, put back into the dense family and calibrated again, show their neurons sorted."""
    dense = make_dense(family)
    model = make_converted(family, dense=dense)
    order = importance(calibrate(dense, make_blocks(seed=7)), "l2_down").sort(dim=1, descending=True).values
    dense.load_state_dict({name: value for name, value in model.state_dict().items() if ".router." not in name})
    torch.testing.assert_close(importance(calibrate(dense, make_blocks(seed=7)), "l2_down"), order, rtol=1e-4, atol=1e-6)


def test_a_converted_model_is_not_calibrated_again():
    with pytest.raises(InputError, match="dense parent"):
        calibrate(make_converted(), make_blocks())


def test_importance_table_is_sorted(blocks):
    table = importance_table(make_dense(), blocks)
    assert list(table.columns) == ["formula", "layer", "rank", "value"]
    assert set(table["formula"]) == set(FORMULAS) - {"random"}
    assert len(table) == (len(FORMULAS) - 1) * 3 * 96
    assert table.groupby(["formula", "layer"])["value"].apply(lambda values: values.is_monotonic_decreasing).all()


def test_conversion_repeats_itself():
    first, second = make_converted(), make_converted()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert first.config.moe == second.config.moe


def test_statistics_can_be_shared():
    dense = make_dense()
    statistics = calibrate(dense, make_blocks(seed=7))
    config = DynaMoEConfig(theta=0.7, router_hidden_size=16, router_init_std=1.0)
    shared = convert(dense, config, statistics=statistics).state_dict()
    assert all(torch.equal(value, shared[name]) for name, value in make_converted().state_dict().items())


def test_provenance_travels(blocks):
    moe = make_converted().config.moe
    assert moe["calibration_tokens"] == make_blocks(seed=7).ids.numel()
    assert moe["trained_tokens"] == 0
    assert moe["method"] == "dynamoe"


def not_finite():
    dense = make_dense()
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return dense


@pytest.mark.parametrize(
    ("dense", "arguments", "says"),
    [
        (lambda: make_converted(), {}, "converted one already"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)), {}, "gpt2.*not supported.*llama"),
        (lambda: LlamaModel(make_dense().config), {}, "no language model head"),
        (lambda: torch.nn.Linear(2, 2), {}, "expected a transformers model"),
        (make_dense, {"config": DynaMoEConfig(experts=(0.501, 0.502, 1.0))}, "intermediate size 96"),
        (make_dense, {"config": {"theta": 1}}, "not a method's config"),
        (make_dense, {"calibration": None}, "calibration="),
        (make_dense, {"calibration": torch.zeros(0, 4, dtype=torch.long)}, "no blocks"),
        (not_finite, {}, "layer 1 are not finite"),
    ],
)
def test_bad_conversions_are_refused_in_one_line(dense, arguments, says):
    with pytest.raises(InputError, match=says) as refusal:
        convert(dense(), arguments.pop("config", None), **{"calibration": make_blocks(), **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"experts": (0.5, 0.25, 1.0)}, "increasing"),
        ({"experts": (0.25, 0.5)}, "end the list with 1.0"),
        ({"experts": ()}, "end the list with 1.0"),
        ({"experts": (0.0, 1.0)}, "above 0"),
        ({"theta": 2.0}, "theta"),
        ({"lambda_router": -1.0}, "lambda_router"),
        ({"router_hidden_size": 0}, "router_hidden_size"),
        ({"importance": "magic"}, "importance"),
        ({"router_gradient": "reinforce"}, "router_gradient"),
    ],
)
def test_impossible_settings_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        DynaMoEConfig(**values)


def test_sizes_round_fractions():
    assert DynaMoEConfig().sizes(1536) == (384, 768, 1152, 1536)
    assert DynaMoEConfig(experts=(0.1, 0.33, 1.0)).sizes(1000) == (100, 330, 1000)


def test_paper_numbers_for_mistral_7b():
    """Shapes only: 33.6 M router parameters, 7.24 B in all, and a floor of 3.01 B when every token takes the quarter expert."""
    from transformers import MistralConfig

    from dynamoe_lab.evaluation import expert_params
    from dynamoe_lab.models import CONFIG_CLASSES, MODEL_CLASSES

    values = {
        name: value
        for name, value in MistralConfig(vocab_size=32768).to_dict().items()
        if name not in ("model_type", "transformers_version")
    }
    with torch.device("meta"):
        model = MODEL_CLASSES["mistral"](CONFIG_CLASSES["mistral"](**values, moe=DynaMoEConfig().to_dict()))
    mlps = model.nested_mlps()
    routers = sum(parameter.numel() for mlp in mlps for parameter in mlp.router.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert routers == 32 * (4096 * 256 + 256 * 4)
    assert round(routers / 1e6, 1) == 33.6
    assert (total - routers) / 1e9 == pytest.approx(7.25, abs=0.011)
    floor = total - routers - sum(expert_params(mlp)[-1] - expert_params(mlp)[0] for mlp in mlps)
    assert floor / 1e9 == pytest.approx(3.02, abs=0.011)
