"""Scores of cells: notebook 08's own steps, every method routed as it says, and one line for what cannot be scored."""

from dataclasses import replace

import pandas as pd
import pytest

import dynamoe_lab as lab
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.cells import run_cell

pytestmark = pytest.mark.assets
SMALL = ["train.steps=2", "data.heldout_tokens=512", "data.calibration_tokens=512"]
ASKED = {"tasks": ["piqa", "sciq"], "limit": 5}


@pytest.fixture(scope="module")
def cells(stepping):
    """A routed cell and a static one."""
    fixed = ["dynamoe.train_route=1", "dynamoe.lambda_router=0", "dynamoe.theta=0.8", "train.seed=3"]
    return [run_cell(lab.load_experiment("smoke", [*SMALL, *more]), step=stepping[0]) for more in ([], fixed)]


@pytest.fixture(scope="module")
def tables(cells, stepping):
    return lab.score_cells(cells, step=stepping[0], methods=("static", "random", "router", "label"), **ASKED)


def test_each_method_goes_its_own_way(cells, tables):
    scores, documents = tables
    settings = ["method", "theta", "seed", "train_tokens"]
    cases = scores[settings].drop_duplicates().fillna(0).to_numpy().tolist()
    tokens = 2 * 4 * 64
    assert cases == [
        ["dense", 0, 0, 0],
        *(["random", 0.9, 0, tokens], ["router", 0.9, 0, tokens], ["label", 0.9, 0, tokens]),
        ["static", 0.8, 3, tokens],
    ]
    assert documents[settings].drop_duplicates().fillna(0).to_numpy().tolist() == cases
    assert (scores["run"] == scores["method"]).all()
    assert scores.groupby("method")["task"].unique().map(list).to_dict() == {case[0]: ["piqa", "sciq"] for case in cases}
    share = scores[scores["metric"] == "active_mlp_fraction"].groupby("method")["value"].mean()
    assert (share["dense"], share["static"]) == (1.0, 0.5)
    assert share["random"] == pytest.approx(cells[0].active["router"]["active_mlp_fraction"], abs=0.05), "with the router's shares"
    model, tokenizer = lab.load_model(cells[0].checkpoint)
    for method in ("router", "label"):
        model.set_routing(method)
        expected, _ = lab.evaluate_benchmarks(model, tokenizer, progress=False, **ASKED)
        own = scores[(scores["method"] == method) & scores["metric"].isin(["acc", "bits_per_byte", "active_params"])]
        pd.testing.assert_series_equal(
            own.set_index(["task", "metric"])["value"],
            expected.set_index(["task", "metric"])["value"].loc[own.set_index(["task", "metric"]).index],
        )


def test_they_are_the_steps_of_notebook_08(cells, tables, stepping):
    """The calls of notebooks/08_benchmarks.ipynb, word for word: none is computed a second time."""
    step, asked = stepping
    experiment = cells[0].experiment
    dense, tokenizer = lab.load_model(
        experiment.model, dtype=experiment.dtype, device=experiment.device, trust_remote_code=experiment.trust_remote_code
    )
    model, _ = lab.load_model(cells[0].checkpoint, dtype=experiment.dtype, device=experiment.device)
    asked.clear()
    for network, run in ((dense, "dense"), (model, "router")):
        for name in ASKED["tasks"]:
            step(lab.evaluate_task, network, tokenizer, name, run=run, limit=5, batch_size=experiment.evaluate.batch_size)
    assert asked == [("evaluate_task", True)] * 4


def test_methods_that_no_cell_has_are_left_out(cells, tables, stepping):
    scores, _ = lab.score_cells(cells[1:], step=stepping[0], methods=("router", "label"), **ASKED)
    assert scores["method"].unique().tolist() == ["dense"], "a fixed width has no routers to score"


def test_what_cannot_be_scored_is_one_line(cells, stepping):
    other = replace(cells[1], experiment=replace(cells[1].experiment, dtype="bfloat16"))
    untraced = replace(cells[0], traces={})
    for given, methods, told in [
        (cells, ["rooter"], "score_cells: method 'rooter': give router, label, random, static"),
        ([], ["router"], "score_cells: cells of 0 dense models"),
        ([cells[0], other], ["router"], "score_cells: cells of 2 dense models"),
        ([untraced], ["random"], "a cell has no trace of it; measure mode 'router', too"),
    ]:
        with pytest.raises(InputError, match=told) as caught:
            lab.score_cells(given, step=stepping[0], methods=methods, **ASKED)
        assert "\n" not in str(caught.value)
