"""One experiment through the cache: the steps are the notebooks' own, and what comes out agrees with the library called by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import dynamoe_lab as lab
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.cells import Inputs, run_cell, static_cut, time_cells

pytestmark = pytest.mark.assets
MODES = ("router", "label", "random", 1)


@pytest.fixture(scope="module")
def experiment():
    return lab.load_experiment("smoke", ["train.steps=3", "data.heldout_tokens=1024", "data.calibration_tokens=512"])


@pytest.fixture(scope="module")
def cell(experiment, stepping):
    return run_cell(experiment, modes=MODES, step=stepping[0])


def test_the_notebooks_steps_are_found_again(cell, experiment, stepping):
    """The calls of notebooks/03_train_router.ipynb, word for word: none is computed a second time."""
    step, asked = stepping
    data, measure = experiment.data, experiment.evaluate
    dense, tokenizer = lab.load_model(
        experiment.model, dtype=experiment.dtype, device=experiment.device, trust_remote_code=experiment.trust_remote_code
    )
    common = {"context": data.context, "seed": experiment.seed}
    calibration = lab.load_blocks(data.calibration, tokenizer, tokens=data.calibration_tokens, split="calibration", **common)
    train_blocks = lab.load_blocks(data.train, tokenizer, tokens=data.train_tokens, split="train", **common)
    heldout = lab.load_blocks(data.heldout, tokenizer, tokens=data.heldout_tokens, split="heldout", **common)
    asked.clear()
    statistics = step(lab.calibrate, dense, calibration)
    model = lab.convert(dense, experiment.dynamoe, statistics=statistics)
    steps, folder = step(lab.train, model, train_blocks, experiment.train, tokenizer=tokenizer)
    model, _ = lab.load_model(folder / "checkpoint", dtype=experiment.dtype, device=experiment.device)
    routing = step(lab.trace_routing, model, heldout, batch_size=measure.batch_size, run="router")
    reference = step(lab.document_losses, dense, heldout, batch_size=measure.batch_size)
    model.set_routing("label")
    step(lab.trace_routing, model, heldout, batch_size=measure.batch_size, run="label")
    assert asked == [(name, True) for name in ("calibrate", "train", "trace_routing", "document_losses", "trace_routing")]
    pd.testing.assert_frame_equal(cell.traces["router"], routing)
    pd.testing.assert_frame_equal(cell.reference, reference)
    pd.testing.assert_frame_equal(cell.steps, steps)
    assert cell.checkpoint == folder / "checkpoint"
    assert cell.train_tokens == 3 * experiment.train.batch_size * data.context


def test_losses_are_those_of_the_routed_model(cell, experiment):
    """A trace's surprisals, summed by document, against `document_losses` of the model under the same routing."""
    model, tokenizer = lab.load_model(cell.checkpoint)
    data = experiment.data
    heldout = lab.load_blocks(data.heldout, tokenizer, context=data.context, tokens=data.heldout_tokens, split="heldout", seed=0)
    for mode in ("router", "label", 1):
        model.set_routing(mode)
        expected = lab.document_losses(model, heldout, batch_size=experiment.evaluate.batch_size).set_index("document")
        found = cell.losses[mode].set_index("document")
        assert found["tokens"].to_dict() == expected["tokens"].to_dict()
        np.testing.assert_allclose(found["nll"], expected["nll"].loc[found.index], rtol=1e-5)


def test_modes_are_what_they_say(cell):
    assert set(cell.traces) == {mode for mode in MODES if isinstance(mode, str)}, "a fixed width routes nothing"
    assert list(cell.losses) == list(cell.active) == list(MODES)
    assert (cell.traces["label"]["expert"] == cell.traces["label"]["label"]).all()
    router, drawn = (cell.traces[mode].groupby("layer")["expert"].value_counts(normalize=True) for mode in ("router", "random"))
    tokens = len(cell.traces["router"]) / 3
    gap = router.sub(drawn, fill_value=0).abs()
    assert gap.max() < 5 * 0.5 / tokens**0.5  # the same shares, up to five standard errors of a draw
    assert not np.array_equal(cell.traces["router"]["expert"], cell.traces["random"]["expert"])
    fractions = np.asarray(cell.experiment.dynamoe.experts)
    for mode in MODES:
        share = fractions[cell.traces[mode]["expert"]].mean() if mode in cell.traces else fractions[mode]  # MLPs are all of one width
        assert cell.active[mode]["active_mlp_fraction"] == pytest.approx(share, rel=1e-9)
        assert cell.active[mode]["active_params"] < cell.active[mode]["total_params"]
        weights = cell.losses[mode]["positions"]
        assert np.average(cell.losses[mode]["active_mlp_fraction"], weights=weights) == pytest.approx(share, rel=1e-9)


def test_a_second_time_nothing_is_computed(cell, experiment, stepping):
    step, asked = stepping
    asked.clear()
    again = run_cell(experiment, modes=MODES, step=step)
    assert len(asked) == 3 + len(MODES)
    assert all(cached for _, cached in asked)
    for mode in MODES:
        pd.testing.assert_frame_equal(again.losses[mode], cell.losses[mode])


def test_cells_that_differ_in_no_weight_share_a_conversion(experiment, stepping, monkeypatch):
    """And what they measure is what a conversion of their own would give."""
    from dynamoe_lab import conversion

    step, _ = stepping
    untrained = replace(experiment, train=replace(experiment.train, steps=0))
    others = [replace(untrained, dynamoe=replace(experiment.dynamoe, theta=theta)) for theta in (0.6, 0.95)]
    own = [run_cell(other, modes=("label",), step=step) for other in others]
    converted, convert = [], conversion.convert
    monkeypatch.setattr(conversion, "convert", lambda *args, **kwargs: converted.append(1) or convert(*args, **kwargs))
    inputs = Inputs()
    for other, alone in zip(others, own, strict=True):
        shared = run_cell(other, modes=("label", 0), step=step, inputs=inputs)
        pd.testing.assert_frame_equal(shared.losses["label"], alone.losses["label"])
    assert len(converted) == 1
    run_cell(replace(untrained, dynamoe=replace(experiment.dynamoe, experts=(0.5, 1.0))), modes=(0,), step=step, inputs=inputs)
    assert len(converted) == 2


def test_without_training_nothing_is_trained_and_no_training_text_is_read(experiment, stepping, monkeypatch):
    from dynamoe_lab import data

    step, asked = stepping
    read, load_blocks = [], data.load_blocks
    monkeypatch.setattr(data, "load_blocks", lambda *args, **kwargs: read.append(kwargs["split"]) or load_blocks(*args, **kwargs))
    asked.clear()
    untrained = lab.load_experiment("smoke", ["train.steps=0", "data.heldout_tokens=1024", "data.calibration_tokens=512"])
    cell = run_cell(untrained, modes=("full",), step=step)
    assert (cell.steps, cell.checkpoint, cell.train_tokens) == (None, None, 0)
    assert sorted(read) == ["calibration", "heldout"]
    assert "train" not in [name for name, _ in asked]
    merged = cell.losses["full"].merge(cell.reference, on="document", suffixes=("", "_dense"))
    np.testing.assert_allclose(merged["nll"], merged["nll_dense"], rtol=1e-4)  # at full width it is the dense function


SMALL = ["train.steps=2", "data.heldout_tokens=512", "data.calibration_tokens=512"]


@pytest.fixture(scope="module")
def static(stepping):
    fields = [*SMALL, "dynamoe.train_route=1", "dynamoe.lambda_router=0"]
    return run_cell(lab.load_experiment("smoke", fields), modes=("random", "router"), step=stepping[0])


def test_the_static_control_goes_the_way_it_was_trained(static):
    """A fixed width asks no router: none is traced, none is counted, and "random" with all shares on one expert is that width."""
    model, tokenizer = lab.load_model(static.checkpoint)
    model.set_routing(1)
    data, batch = static.experiment.data, static.experiment.evaluate.batch_size
    heldout = lab.load_blocks(data.heldout, tokenizer, context=data.context, tokens=data.heldout_tokens, split="heldout", seed=0)
    expected = lab.document_losses(model, heldout, batch_size=batch)
    assert "router" not in static.traces
    assert "random" not in static.traces
    for mode in ("router", "random"):
        assert static.active[mode]["router"] == 0
        assert static.active[mode]["active_mlp_fraction"] == pytest.approx(0.5)
        assert (static.losses[mode]["active_mlp_fraction"] == static.active[mode]["active_mlp_fraction"]).all()
        pd.testing.assert_frame_equal(static.losses[mode][list(expected.columns)], expected)


def test_a_row_of_a_fixed_width_is_of_no_trace(static):
    """Whatever other modes were measured: its share is known without a sample, and no router was right or wrong."""
    from dynamoe_lab.workbench.sweep_table import _measured

    rows = pd.DataFrame(_measured(static))
    metrics = rows.groupby("mode")["metric"].agg(list).to_dict()
    assert metrics == {mode: ["perplexity_ratio", "active_mlp_fraction"] for mode in ("random", "router")}
    shares = rows[rows["metric"] == "active_mlp_fraction"]
    assert (shares[["value", "low", "high"]] == 0.5).all(axis=None)


def test_shares_for_random_leave_no_trace_of_the_router(cell, experiment, stepping):
    step, asked = stepping
    asked.clear()
    alone = run_cell(experiment, modes=("random",), step=step)
    assert list(alone.traces) == list(alone.losses) == ["random"]
    pd.testing.assert_frame_equal(alone.traces["random"], cell.traces["random"])
    assert [name for name, _ in asked].count("trace_routing") == 2
    asked.clear()
    both = run_cell(experiment, modes=("random", "router"), step=step)
    pd.testing.assert_frame_equal(both.traces["router"], cell.traces["router"])
    assert [name for name, _ in asked].count("trace_routing") == 2  # the router's is asked for once


# --- the static control of a routed cell -------------------------------------------------------------------------------------------


def test_a_static_cut_costs_what_the_routed_model_costs(cell, stepping):
    settings = static_cut(cell)
    assert list(settings) == ["dynamoe.theta", "train.seed", "dynamoe.experts", "dynamoe.train_route", "dynamoe.lambda_router"]
    assert settings["dynamoe.theta"] == cell.experiment.dynamoe.theta
    assert settings["train.seed"] == cell.experiment.train.seed
    width, whole = settings["dynamoe.experts"]
    routed = cell.active["router"]
    assert whole == 1.0
    assert width == round(width, 3) > routed["active_mlp_fraction"]  # it asks no router
    fields = [f"{name}={value}" for name, value in settings.items()]
    cut = run_cell(lab.load_experiment("smoke", [*SMALL, "train.steps=0", *fields]), step=stepping[0])
    assert cut.active["router"]["router"] == 0
    assert 0.998 * routed["active_params"] < cut.active["router"]["active_params"] <= routed["active_params"]


@pytest.mark.parametrize("neurons", [96, 256, 1536])
@pytest.mark.parametrize("bias", [0, 64])  # of the down projections: a cut does not save it
def test_a_static_cut_is_the_widest_that_is_no_dearer(cell, neurons, bias):
    """Also where rounding to whole neurons adds half a neuron: against a search through every width."""
    per = 193
    for budget in np.random.default_rng(0).uniform(0.3, 0.99, size=40) * neurons * per:
        total = neurons * per + bias
        active = pd.Series({"mlp_total": total, "mlp_active": budget - 500.0, "router": 500})
        found = static_cut(replace(cell, active={"router": active}, neurons=neurons, neuron_params=per))
        cheap = [n for n in range(1, 1000) if n / 1000 * total <= budget and round(n / 1000 * neurons) * per + bias <= budget]
        assert found["dynamoe.experts"] == [max(cheap) / 1000, 1.0]


def test_where_the_dense_model_is_as_cheap_there_is_no_static_cut(cell):
    def routed(router: int):
        active = pd.Series({"mlp_total": 1000, "mlp_active": 900.0, "router": router})
        return replace(cell, active={"router": active}, neurons=1000, neuron_params=1)

    assert [static_cut(routed(router)) is None for router in (0, 99, 100, 101)] == [False, False, True, True]
    active = cell.active["label"]
    with pytest.raises(InputError, match="no mode 'router' but label, 1"):
        static_cut(replace(cell, active={"label": active, 1: active}))


def test_a_neuron_is_counted_in_every_layer(cell):
    from dynamoe_lab.evaluation import count_active_params

    model, _ = lab.load_model(cell.checkpoint)
    model.set_routing(0)
    narrow = count_active_params(model).iloc[-1]
    assert cell.neurons == 256
    assert narrow["mlp_total"] - narrow["mlp_active"] == (256 - 64) * cell.neuron_params


@pytest.mark.parametrize("mode", ["rooter", 4, -1, True, None])
def test_modes_that_are_none_are_refused_before_anything_is_loaded(experiment, mode):
    with pytest.raises(InputError, match="expert's index from 0 to 3"):
        run_cell(experiment, modes=(mode,), step=None)


def test_inputs_are_loaded_once_and_let_go(experiment, monkeypatch):
    from dynamoe_lab import loading

    loaded, load_model = [], loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: loaded.append(args) or load_model(*args, **kwargs))
    inputs = Inputs()
    first = inputs.model(experiment)[0]
    assert inputs.blocks(experiment, "heldout") is inputs.blocks(experiment, "heldout")
    assert inputs.model(experiment)[0] is first
    other = lab.load_experiment("smoke", ["seed=1", "data.heldout_tokens=1024"])
    assert inputs.blocks(other, "heldout").fingerprint() != inputs.blocks(experiment, "heldout").fingerprint()
    assert len(loaded) == 1
    inputs.clear()
    assert inputs.model(experiment)[0] is not first


# --- measured time -----------------------------------------------------------------------------------------------------------------


def test_modes_that_save_time_are_timed_on_the_cells_own_model(cell, static, experiment, stepping):
    """The numbers are those of the library called by hand: here from the cache, so that both are one measurement."""
    step, asked = stepping
    asked.clear()
    routed, cut = time_cells([cell, static], step=step, pairs=2)
    assert set(routed) == {"router", 1}, "labels and random draws save no time of their own"
    assert set(cut) == {"router"}
    assert asked == [("measure_latency", False), ("measure_latency", False)]
    dense, tokenizer = lab.load_model(experiment.model)
    model, _ = lab.load_model(cell.checkpoint)
    data = experiment.data
    ids = lab.load_blocks(data.heldout, tokenizer, context=data.context, tokens=data.heldout_tokens, split="heldout", seed=0).ids
    asked.clear()
    latency = step(lab.measure_latency, dense, model, batch=2, tokens=64, routings=("router", 1), pairs=2, ids=ids[:2])
    assert asked == [("measure_latency", True)]
    seconds = latency.pivot(index="pair", columns="routing", values="seconds")
    for mode, name in (("router", "router"), (1, "expert 1")):
        assert routed[mode]["time_ratio"] == pytest.approx((seconds[name] / seconds["dense"]).median())
        assert routed[mode]["n"] == 2
    assert routed[1]["active_mlp_fraction"] == pytest.approx(0.5)
    assert cut["router"]["active_mlp_fraction"] == pytest.approx(0.5), "a static control goes the way it was trained"
    experts = cell.traces["router"].query("document >= 0")["expert"]
    assert 0 < routed["router"]["active_mlp_fraction"] <= max(experiment.dynamoe.experts[expert] for expert in set(experts))


def test_what_was_not_trained_is_converted_again_to_be_timed(stepping):
    step, asked = stepping
    untrained = run_cell(lab.load_experiment("smoke", [*SMALL, "train.steps=0"]), modes=("label", 0), step=step)
    asked.clear()
    (times,) = time_cells([untrained], step=step, pairs=1, batch=1)
    assert asked == [("calibrate", True), ("measure_latency", False)]
    assert times[0]["active_mlp_fraction"] == pytest.approx(0.25)


def test_nothing_is_loaded_where_nothing_is_to_be_timed(cell):
    assert time_cells([cell], step=None, pairs=0) == [{}]
    labels = replace(cell, losses={"label": cell.losses["label"]})
    assert time_cells([labels], step=None) == [{}]


# --- ToMoE -------------------------------------------------------------------------------------------------------------------------

PRUNED = ["method=tomoe", "tomoe.mask_offset=0.1", "tomoe_train.steps=3", "tomoe_train.lr=1e-2", "data.heldout_tokens=1024"]
TOMOE_MODES = ("router", "full", "random", 1)


@pytest.fixture(scope="module")
def pruned(stepping):
    """A cell of ToMoE whose masks are about half closed from the beginning; and what its steps were."""
    step, asked = stepping
    asked.clear()
    cell = run_cell(lab.load_experiment("smoke", PRUNED), modes=TOMOE_MODES, step=step)
    return cell, list(asked)


def test_tomoe_is_trained_and_its_deployed_form_measured(pruned, stepping):
    """The calls of a notebook, word for word, and no other: nothing is calibrated; full and single experts are no routing to trace."""
    cell, asked = pruned
    measured = ["document_losses", "trace_routing", "document_losses", "trace_routing", "document_losses", "document_divergences"]
    assert [name for name, _ in asked] == ["train", *measured]
    step, _ = stepping
    experiment, data = cell.experiment, cell.experiment.data
    dense, tokenizer = lab.load_model(experiment.model)
    common = {"context": data.context, "seed": experiment.seed}
    train_blocks = lab.load_blocks(data.train, tokenizer, tokens=data.train_tokens, split="train", **common)
    heldout = lab.load_blocks(data.heldout, tokenizer, tokens=data.heldout_tokens, split="heldout", **common)
    stepping[1].clear()
    model = lab.convert(dense, experiment.tomoe)
    steps, folder = step(lab.train, model, train_blocks, experiment.tomoe_train, tokenizer=tokenizer, heldout=heldout)
    masked, _ = lab.load_model(folder / "checkpoint")
    deployed = lab.export(masked)
    routing = step(lab.trace_routing, deployed, heldout, batch_size=experiment.evaluate.batch_size, run="router")
    assert stepping[1] == [("train", True), ("trace_routing", True)]
    pd.testing.assert_frame_equal(cell.steps, steps)
    pd.testing.assert_frame_equal(cell.traces["router"], routing)
    pd.testing.assert_frame_equal(cell.masks, lab.expert_masks(masked))
    pd.testing.assert_frame_equal(cell.fractions, lab.expert_fractions(deployed))
    assert cell.checkpoint == folder / "checkpoint"
    assert cell.train_tokens == 3 * experiment.tomoe_train.batch_size * data.context
    assert cell.union_coverage == pytest.approx(cell.masks.query("neuron >= 0").groupby("layer")["neuron"].nunique().mean() / 256)
    assert 0 < cell.union_coverage < 1
    assert (cell.neurons, cell.dense_params) == (256, dense.num_parameters())


def test_modes_of_tomoe_are_what_they_say(pruned):
    cell, _ = pruned
    assert set(cell.traces) == {"router", "random"}
    assert list(cell.losses) == list(cell.active) == list(TOMOE_MODES)
    widths = cell.fractions.set_index(["layer", "expert"])["fraction"]
    for mode in ("router", "random"):
        trace = cell.traces[mode]
        share = widths.loc[pd.MultiIndex.from_frame(trace[["layer", "expert"]])].mean()
        assert cell.active[mode]["active_mlp_fraction"] == pytest.approx(share, rel=1e-6)
        weights = cell.losses[mode]["positions"]
        assert np.average(cell.losses[mode]["active_mlp_fraction"], weights=weights) == pytest.approx(share, rel=1e-6)
    assert cell.active["full"]["active_mlp_fraction"] == pytest.approx(cell.union_coverage), "all neurons that some expert has"
    assert cell.active[1]["active_mlp_fraction"] == pytest.approx(widths.xs(1, level="expert").mean())
    masked, tokenizer = lab.load_model(cell.checkpoint)
    data, batch = cell.experiment.data, cell.experiment.evaluate.batch_size
    heldout = lab.load_blocks(data.heldout, tokenizer, context=data.context, tokens=data.heldout_tokens, split="heldout", seed=0)
    for mode in ("router", 1):  # the masked form is the same function
        masked.set_routing(mode)
        expected = lab.document_losses(masked, heldout, batch_size=batch).set_index("document")
        found = cell.losses[mode].set_index("document")
        np.testing.assert_allclose(found["nll"], expected["nll"].loc[found.index], rtol=1e-4)
    masked.set_routing("router")
    pd.testing.assert_frame_equal(cell.divergences, lab.document_divergences(masked, heldout, batch_size=batch), rtol=1e-3)


def test_rows_of_tomoe_hold_what_its_masks_leave(pruned):
    from dynamoe_lab.workbench.sweep_table import _measured

    cell, _ = pruned
    rows = pd.DataFrame(_measured(cell)).set_index(["mode", "metric"])
    both = ["perplexity_ratio", "active_mlp_fraction"]
    metrics = rows.reset_index().groupby("mode", sort=False)["metric"].agg(list).to_dict()
    own = ["heldout_kl", "active_params_fraction", "union_coverage"]
    assert metrics == {"router": both + own, "full": both, "random": both, "1": both}, "no labels, so no router accuracy"
    kl = rows.loc[("router", "heldout_kl")]
    assert kl["value"] == pytest.approx(cell.divergences["kl"].sum() / cell.divergences["tokens"].sum())
    assert kl["low"] < kl["value"] < kl["high"]
    assert (rows.loc[("router", "union_coverage"), ["value", "low", "high"]] == cell.union_coverage).all(), "known without a sample"
    share = rows.loc[("router", "active_params_fraction")]
    assert share["value"] == pytest.approx(share["active_params"] / cell.dense_params)
    assert share["low"] < share["value"] < share["high"] < 1


def test_a_second_time_nothing_of_tomoe_is_computed(pruned, stepping):
    step, asked = stepping
    asked.clear()
    again = run_cell(pruned[0].experiment, modes=TOMOE_MODES, step=step)
    assert len(asked) == len(pruned[1])
    assert all(cached for _, cached in asked)
    for mode in TOMOE_MODES:
        pd.testing.assert_frame_equal(again.losses[mode], pruned[0].losses[mode])


def test_untrained_tomoe_is_nearly_the_dense_model(stepping):
    step, asked = stepping
    asked.clear()
    experiment = lab.load_experiment("smoke", ["method=tomoe", "tomoe_train.steps=0", "data.heldout_tokens=512"])
    cell = run_cell(experiment, modes=("router",), step=step)
    assert (cell.steps, cell.checkpoint, cell.train_tokens) == (None, None, 0)
    assert [name for name, _ in asked] == ["document_losses", "trace_routing", "document_divergences"]
    merged = cell.losses["router"].merge(cell.reference, on="document", suffixes=("", "_dense"))
    np.testing.assert_allclose(merged["nll"], merged["nll_dense"], rtol=1e-3)


def test_where_no_steps_are_to_be_measured_training_reads_no_heldout_text(pruned, stepping):
    """So that models of one training may be measured on several texts."""
    step, asked = stepping
    cells, blind = [], [*PRUNED, "tomoe_train.eval_steps=0"]
    asked.clear()
    for text in ("c4", "wiki"):
        cells.append(run_cell(lab.load_experiment("smoke", [*blind, f"data.heldout={text}"]), modes=("router",), step=step))
    assert [cached for name, cached in asked if name == "train"] == [False, True]
    assert cells[0].steps["heldout_kl"].isna().all()
    assert set(cells[0].losses["router"]["domain"]) == {"c4"}
    assert set(cells[1].losses["router"]["domain"]) == {"wiki"}
    untouched = ["seconds", "heldout_kl", "open_ratio", "open_union"]
    pd.testing.assert_frame_equal(cells[0].steps.drop(columns=untouched), pruned[0].steps.drop(columns=untouched))


def test_a_label_is_refused_with_the_reason(stepping):
    experiment = lab.load_experiment("smoke", PRUNED)
    with pytest.raises(InputError, match=r"mode 'label': ToMoE has no difficulty labels"):
        run_cell(experiment, modes=("router", "label"), step=None)
    with pytest.raises(InputError, match=r"mode 4: give router, full, random, or an expert's index from 0 to 3"):
        run_cell(experiment, modes=(4,), step=None)


def test_the_deployed_model_is_timed(pruned, stepping):
    step, asked = stepping
    asked.clear()
    (times,) = time_cells([pruned[0]], step=step, pairs=1)
    assert asked == [("measure_latency", False)]
    assert set(times) == {"router", "full", 1}, "random draws stand for the router's own work"
    assert times["full"]["active_mlp_fraction"] == pytest.approx(pruned[0].union_coverage)


def test_the_static_cut_of_a_tomoe_cell_saves_in_mlps_what_it_saves_everywhere(pruned, stepping):
    cell, _ = pruned
    settings = static_cut(cell)
    training = {"train.steps": 3, "train.batch_size": 4, "train.accumulation": 1, "train.seed": 0}
    control = {"dynamoe.train_route": 0, "dynamoe.lambda_router": 0.0}
    assert settings == {"method": "dynamoe", **training, "dynamoe.experts": settings["dynamoe.experts"], **control}
    fields = [f"{name}={value}" for name, value in settings.items()]
    cut = run_cell(lab.load_experiment("smoke", [*SMALL, *fields, "train.steps=0"]), modes=("router",), step=stepping[0])
    routed = cell.active["router"]["active_params"]
    assert 0.998 * routed < cut.active["router"]["active_params"] <= routed
