"""Calibration statistics and importance against sums written out; what convert refuses."""

import dataclasses

import pandas as pd
import pytest
import torch
from conftest import make_blocks, make_converted, make_dense
from test_models import ACTIVATIONS, projections
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaModel

from dynamoe_lab.config import load_experiment
from dynamoe_lab.conversion import FORMULAS, calibrate, convert, importance, importance_table, reorder
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import FAMILIES, DynaMoEConfig, ToMoEConfig, decoder_layers


@torch.no_grad()
def naive_importance(dense, ids, formula):
    """The formulas written out: activations of every layer's MLP, token by token, in float64."""
    rows = []
    family = dense.config.model_type
    for layer in decoder_layers(dense):
        inputs = []
        first = layer.fc1 if family == "opt" else layer.mlp
        handle = first.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].reshape(-1, 64)))
        dense(ids)
        handle.remove()
        x = inputs[0].double()
        *ups, (down, down_bias) = [
            (weight.double(), 0 if bias is None else bias.double()) for weight, bias in projections(getattr(layer, "mlp", layer), family)
        ]
        raised = [x @ weight.T + bias for weight, bias in ups]
        hidden = ACTIVATIONS.get(family, F.silu)(raised[0]) * (raised[1] if len(raised) == 2 else 1)
        if formula == "l2_down_tokennorm":
            hidden = hidden / (hidden @ down.T + down_bias).norm(dim=1, keepdim=True)
        value = hidden.abs().sum(0) if formula == "abs" else hidden.square().sum(0).sqrt()
        rows.append(value * down.norm(dim=0) if formula.startswith("l2_down") else value)
    return torch.stack(rows)


@pytest.mark.parametrize("formula", ["l2_down", "l2_down_tokennorm", "l2", "abs"])
def test_importance_formulas(family, blocks, formula):
    dense = make_dense(family)
    statistics = calibrate(dense, blocks, batch_size=3)
    torch.testing.assert_close(importance(statistics, formula), naive_importance(dense, blocks.ids, formula), rtol=1e-4, atol=1e-6)
    assert (statistics["tokens"] == blocks.ids.numel()).all()


def test_token_normalising_tames_an_attention_sink(blocks):
    """One token with huge activations decides l2_down, and has one token's say in l2_down_tokennorm."""
    statistics = calibrate(make_dense(), blocks)
    before = importance(statistics, "l2_down_tokennorm")[0].argmax()
    here = (statistics["layer"] == 0) & (statistics["neuron"] == 5)
    statistics.loc[here, "squares"] += 1e9 * statistics["squares"].max()  # what one sink token adds to neuron 5
    statistics.loc[here, "normalised_squares"] += 1  # its normalised activations have a bounded sum
    assert importance(statistics, "l2_down")[0].argmax() == 5
    assert importance(statistics, "l2_down_tokennorm")[0].argmax() == before


def test_statistics_of_another_kind_are_refused():
    with pytest.raises(InputError, match=r"lack squares, absolutes, normalised_squares, down_norm; give the frame of lab\.calibrate"):
        importance_table(pd.DataFrame({"layer": [0], "neuron": [0]}))


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


@torch.no_grad()
def test_reordering_moves_the_frozen_copy_alike(family, blocks):
    """Also of a converted model: the full output and both kinds of label-making weights stay together."""
    model = make_converted(family, label_target="frozen")
    for mlp in model.nested_mlps():
        mlp.up.weight.mul_(1.1)  # as after training: the two sets of weights differ
    model.set_routing("full")
    before = model(blocks.ids, output_router_logits=True)
    named = {name: value.clone() for name, value in model.state_dict().items()}
    order = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(layer)) for layer in range(3)])
    reorder(model, order)
    after = model(blocks.ids, output_router_logits=True)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after.similarities[0], before.similarities[0], atol=0.01), "other prefixes, other similarities"
    for layer in range(3):
        frozen = [name for name in named if f"layers.{layer}." in name and ".frozen." in name]
        assert len(frozen) >= 2
        for name in frozen:
            down = name.split(".frozen.")[1].startswith(("down_proj", "dense_4h_to_h", "fc2"))
            value = named[name]
            moved = value if down and value.dim() == 1 else value[:, order[layer]] if down else value[order[layer]]
            assert torch.equal(model.state_dict()[name], moved), name
    reorder(model, order.argsort(dim=1))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in named.items())


def test_a_converted_model_is_not_calibrated_again():
    with pytest.raises(InputError, match="dense parent"):
        calibrate(make_converted(), make_blocks())


def test_importance_table_is_sorted(blocks):
    table = importance_table(calibrate(make_dense(), blocks))
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


def test_statistics_of_another_model_are_refused(blocks):
    with pytest.raises(InputError, match="3 layers of 96 neurons, the model has 3 of 64"):
        convert(make_dense(intermediate_size=64), DynaMoEConfig(), statistics=calibrate(make_dense(), blocks))


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
        (lambda: make_dense("opt"), {"config": DynaMoEConfig(experts=(0.501, 0.502, 1.0))}, "intermediate size 96"),
        (lambda: make_dense("opt", layerdrop=0.1), {}, "layerdrop = 0"),
    ],
)
def test_bad_conversions_are_refused_in_one_line(dense, arguments, says):
    with pytest.raises(InputError, match=says) as refusal:
        convert(dense(), arguments.pop("config", None), **{"calibration": make_blocks(), **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("config", [DynaMoEConfig(), ToMoEConfig()], ids=["dynamoe", "tomoe"])
def test_a_row_of_the_family_table_that_is_not_true_is_noticed(monkeypatch, config):
    """Shapes fit and numbers come out; only the dense model tells that they are others. Its mode stays as it was."""
    dense = make_dense().train()
    convert(dense, config, calibration=make_blocks())
    assert all(module.training for module in dense.modules())
    swapped = dataclasses.replace(FAMILIES["llama"], gate="up_proj", up="gate_proj")
    monkeypatch.setitem(FAMILIES, "llama", swapped)
    with pytest.raises(InputError, match=r"is not the llama model: logits differ.*FAMILIES"):
        convert(dense, config, calibration=make_blocks())


def test_a_projection_that_holds_two_is_refused():
    dense = make_dense()
    dense.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 192, bias=False)
    with pytest.raises(InputError, match="up_proj has 192 neurons, not 96"):
        reorder(dense, torch.arange(96).repeat(3, 1))


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
        ({"label_target": "thawed"}, "label_target"),
        ({"train_route": "random"}, "train_route = 'random'.*from 0 to 3"),
        ({"train_route": 4}, "train_route = 4"),
        ({"train_route": -1}, "train_route"),
        ({"train_route": True}, "train_route"),
        ({"train_route": 1.0}, "train_route"),
        ({"train_route": 2, "experts": (0.5, 1.0)}, "train_route = 2.*from 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(values, says):
    with pytest.raises(ValueError, match=says) as refusal:
        DynaMoEConfig(**values)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("route", ["router", "label", "full", 0, 2])
def test_train_route_from_the_command_line(route):
    experiment = load_experiment("quick", [f"dynamoe.train_route={route}", "dynamoe.label_target=frozen"])
    assert experiment.dynamoe == DynaMoEConfig(**{**vars(load_experiment("quick").dynamoe), "train_route": route, "label_target": "frozen"})
    assert type(experiment.dynamoe.train_route) is type(route)


@pytest.mark.parametrize(
    "override", ["dynamoe.train_route=7", "dynamoe.train_route=best", "dynamoe.train_route=[1]", "dynamoe.train_route=1.5"]
)
def test_a_bad_train_route_from_the_command_line_is_refused(override):
    with pytest.raises(InputError, match="train_route") as refusal:
        load_experiment("quick", [override])
    assert "\n" not in str(refusal.value)


def test_sizes_round_fractions():
    assert DynaMoEConfig().sizes(1536) == (384, 768, 1152, 1536)
    assert DynaMoEConfig(experts=(0.1, 0.33, 1.0)).sizes(1000) == (100, 330, 1000)


def test_paper_numbers_for_mistral_7b():
    """Shapes only: 33.6 M router parameters, 7.24 B in all, and a floor of 3.01 B when every token takes the quarter expert."""
    from transformers import MistralConfig

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
    floor = total - routers - sum(mlp.expert_params()[-1] - mlp.expert_params()[0] for mlp in mlps)
    assert floor / 1e9 == pytest.approx(3.02, abs=0.011)


def test_the_converted_models_generation_settings_are_its_own():
    dense = make_dense()
    model = convert(dense, DynaMoEConfig(), calibration=make_blocks())
    model.generation_config.max_new_tokens = 7
    assert dense.generation_config.max_new_tokens is None
