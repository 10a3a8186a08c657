"""Methods are entered where docs/extending.md says, and nowhere else: one that is not ours goes through every door."""

import dataclasses

import pandas as pd
import pytest
import torch
from conftest import make_blocks, make_dense
from small_method import SPLIT_CLASSES, SplitConfig, SplitExperiment, SplitMixin, SplitTrainConfig, SplitTrainer, convert_split
from transformers import AutoModelForCausalLM

import dynamoe_lab as lab
from dynamoe_lab import config
from dynamoe_lab.conversion.convert import CONVERTERS
from dynamoe_lab.models import METHOD_MIXINS, RoutedMixin, register
from dynamoe_lab.training.run import TRAINERS
from dynamoe_lab.workbench import cell_scores, sweep_table
from dynamoe_lab.workbench.cells import Inputs, run_cell, static_cut


@pytest.mark.parametrize("method", config.METHODS)
def test_a_method_is_entered_everywhere(method):
    names = {item.name for item in dataclasses.fields(config.Experiment)}
    own, training = config.METHODS[method]
    assert {own, training} <= names, f"config.py: give Experiment the fields {own} and {training}"
    experiment = config.Experiment(method=method)
    assert any(isinstance(experiment.method_config, kind) for kind in CONVERTERS), f"conversion/convert.py: enter {method} in CONVERTERS"
    assert experiment.train_config.section == training, f"config.py: section of {method}'s training settings"
    assert method in METHOD_MIXINS, f"models/__init__.py: enter {method} in METHOD_MIXINS"
    mixin = METHOD_MIXINS[method]
    assert issubclass(mixin, RoutedMixin)
    assert mixin.method == method
    assert {"router", "full", "random", "label"} <= set(mixin.routing_modes), "of a mode that it has not, say why"
    assert mixin in TRAINERS, f"training/run.py: enter {mixin.__name__} in TRAINERS"
    assert TRAINERS[mixin].config_class is type(experiment.train_config)


@pytest.fixture
def split(monkeypatch):
    """The small method entered in every table."""
    monkeypatch.setitem(config.METHODS, "split", ("split", "split_train"))
    monkeypatch.setitem(METHOD_MIXINS, "split", SplitMixin)
    monkeypatch.setitem(CONVERTERS, SplitConfig, convert_split)
    monkeypatch.setitem(TRAINERS, SplitMixin, SplitTrainer)
    register(SPLIT_CLASSES.values())


@pytest.mark.parametrize("family", ["llama", "olmo2", "phi"])
def test_by_hand(split, family, tmp_path):
    """Convert, train, save, load, measure: with the functions that a notebook calls."""
    dense, blocks = make_dense(family), make_blocks(12)
    model = lab.convert(dense, SplitConfig(num_experts=3))
    model.set_routing("full")
    with torch.no_grad():
        torch.testing.assert_close(model(blocks.ids).logits, dense(blocks.ids).logits, atol=1e-4, rtol=1e-4)
    steps = lab.train(model, blocks[:4], SplitTrainConfig(steps=4, warmup_steps=0), output_dir=tmp_path, heldout=blocks[:4], progress=False)
    assert list(steps) == ["run", "step", "tokens", "loss", "lm_loss", "heldout_loss", "lr", "seconds"]
    assert steps["lm_loss"].iloc[-1] < steps["lm_loss"].iloc[0]
    loaded = type(model).from_pretrained(tmp_path / "checkpoint")
    routing = lab.trace_routing(loaded, blocks)
    assert "label" not in routing
    params = lab.count_active_params(loaded, routing).iloc[-1]
    assert params["active_mlp_fraction"] == pytest.approx(1 / 3, abs=0.02)
    cost = lab.model_cost(loaded, routing)
    assert cost.loc[(cost["layer"] == "all") & (cost["part"] == "mlp"), "active_params"].item() == pytest.approx(params["mlp_active"])
    with pytest.raises(lab.InputError, match="split has no difficulty labels"):
        lab.trace_similarity(loaded, blocks)
    assert lab.evaluate_perplexity(loaded, blocks, reference=dense)["ratio"].item() > 0


def test_through_the_workbench(split, monkeypatch, tmp_path):
    """A sweep's cell, its row in tables, its static control and the scores it could have, without a word about the method there."""
    monkeypatch.setattr(Inputs, "model", lambda *_: (make_dense(), None))
    monkeypatch.setattr(Inputs, "blocks", lambda self, experiment, part: make_blocks(12, seed=len(part)))
    monkeypatch.setattr("dynamoe_lab.loading.load_model", lambda path, **_: (AutoModelForCausalLM.from_pretrained(path), None))

    def step(function, *args, **kwargs):
        if function is not lab.train:
            return function(*args, **kwargs)
        return function(*args, **{**kwargs, "tokenizer": None}, output_dir=tmp_path, progress=False), tmp_path

    measure = config.EvaluateConfig(bootstrap=100)
    experiment = SplitExperiment(split=SplitConfig(num_experts=3), split_train=SplitTrainConfig(steps=2), evaluate=measure)
    cell = run_cell(experiment, modes=("router", "random", "full", 1), step=step)
    assert cell.active["router"]["active_mlp_fraction"] == pytest.approx(1 / 3, abs=0.02)
    rows = pd.DataFrame(sweep_table._measured(cell))
    assert {(row.mode, row.metric) for row in rows.itertuples()} == {
        (mode, metric) for mode in ("router", "random", "full", "1") for metric in ("perplexity_ratio", "active_mlp_fraction")
    }
    assert cell_scores.pareto_case(cell, "router")["method"] == "split"
    assert cell_scores.pareto_case(cell, "random")["method"] == "split random"
    assert static_cut(cell)["train.steps"] == 2
