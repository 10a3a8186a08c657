"""Sweeps: what a file may say, cells in processes, one that fails, everything finished, and processes that are stopped or killed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import interrupt

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment, sweep
from dynamoe_lab.workbench.records import load_record
from dynamoe_lab.workbench.session import start
from dynamoe_lab.workbench.sweep import Sweep, SweepFailed, load_sweep, run_sweep
from dynamoe_lab.workbench.sweep_file import shipped_sweeps
from dynamoe_lab.workbench.sweep_table import read_sweep, write_sweep

CHECKOUT = Path(__file__).parents[1]
COLUMNS = ["mode", "metric", "value", "low", "high", "n", "active_mlp_fraction", "active_params", "train_tokens", "status", "error"]
SMALL = ["train.steps=2", "data.heldout_tokens=512", "data.calibration_tokens=512"]


# --- the file ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_sweeps())
def test_every_shipped_sweep_is_valid_and_says_why_and_what_it_costs(name):
    chosen = load_sweep(name)
    assert chosen.name == name
    assert chosen.title.endswith("?")
    plans = chosen.resolve()
    assert len(plans) >= 2
    assert {plan.experiment.profile for plan in plans} == {"quick"}
    comment = [line for line in (CHECKOUT / "configs" / "sweeps" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert comment
    if any(plan.experiment.train_config.steps for plan in plans):
        assert "Cost: " in "\n".join(comment)


def write(project: Path, text: str) -> Path:
    path = project / "mine.yaml"
    path.write_text(text)
    return path


def test_a_grid_and_single_cells(project):
    text = """
        profile: smoke
        overrides: [seed=3]
        axes: {dynamoe.experts: [[0.5, 1.0], [0.25, 1.0]], dynamoe.theta: [0.8, 9e-1]}
        cells: [{dynamoe.importance: random}]
        modes: [router, 1]
    """
    chosen = load_sweep(write(project, text))
    plans = chosen.resolve(overrides=["data.context=32"])
    seen = [(plan.experiment.dynamoe.experts, plan.experiment.dynamoe.theta, plan.experiment.dynamoe.importance) for plan in plans]
    assert seen == [
        ((0.5, 1.0), 0.8, "l2_down"),
        ((0.5, 1.0), 0.9, "l2_down"),
        ((0.25, 1.0), 0.8, "l2_down"),
        ((0.25, 1.0), 0.9, "l2_down"),
        ((0.25, 0.5, 0.75, 1.0), 0.9, "random"),
    ]
    assert {(plan.experiment.seed, plan.experiment.data.context, plan.experiment.model) for plan in plans} == {(3, 32, "smollm2-pico")}
    assert [plan.number for plan in plans] == [1, 2, 3, 4, 5]
    assert str(plans[0]) == "dynamoe.experts=[0.5, 1.0], dynamoe.theta=0.8"
    assert chosen.fields == ["dynamoe.experts", "dynamoe.theta", "dynamoe.importance"]
    quick = chosen.resolve("quick")[0].experiment
    assert (quick.model, quick.data.context) == ("smollm2-135m", 256)


def test_methods_may_stand_side_by_side(project):
    cells = [{"method": "tomoe", "tomoe.p": 0.4}, {"dynamoe.theta": 0.8}, {"method": "tomoe"}]
    plans = Sweep(profile="smoke", cells=cells, modes=["router", 3]).resolve()
    assert [plan.experiment.method for plan in plans] == ["tomoe", "dynamoe", "tomoe"]
    assert len(Sweep(profile="smoke", overrides=["method=tomoe"], axes={"tomoe.p": [0.4, 0.5]}).resolve()) == 2
    assert len(Sweep(profile="smoke", axes={"method": ["tomoe", "dynamoe"], "seed": [0, 1]}).resolve()) == 4


@pytest.mark.parametrize("name", [name for name in shipped_sweeps() if name.startswith("tomoe_")])
def test_sweeps_of_tomoe_vary_what_they_name(name):
    plans = load_sweep(name).resolve("smoke")
    assert {plan.experiment.method for plan in plans} == {"tomoe"}
    if name == "tomoe_union":
        assert [(plan.experiment.tomoe.lambda_union, plan.experiment.tomoe.p) for plan in plans] == [(0.0, 0.4), (2.0, 0.4)]
    if name == "tomoe_transfer":  # a model is trained once, whatever it is measured on
        assert {plan.experiment.tomoe_train.eval_steps for plan in plans} == {0}
        assert len({plan.experiment.data.train for plan in plans}) ** 2 == len(plans)


def test_values_of_a_notebook_are_values_of_a_file():
    plans = Sweep(profile="smoke", axes={"dynamoe.theta": np.linspace(0.5, 0.7, 2), "dynamoe.experts": [(0.5, 1.0)]}).resolve()
    assert [plan.settings for plan in plans] == [{"dynamoe.theta": theta, "dynamoe.experts": [0.5, 1.0]} for theta in (0.5, 0.7)]
    json.dumps([plan.settings for plan in plans])


@pytest.mark.parametrize("value", [0.9, "router", None, {"a": 0.9}, np.float64(0.9), np.array(0.9)])
def test_an_axis_that_is_no_list_is_one_line(project, value):
    """A notebook's axes are not checked by OmegaConf, and a text is a sequence, of letters."""
    with pytest.raises(InputError, match=r"the axis dynamoe\.theta is .*give a list of values") as caught:
        start("06_pareto", profile="smoke").sweep(axes={"dynamoe.theta": value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cell", [None, "dynamoe.theta", 3])
def test_a_cell_that_is_no_mapping_is_one_line(project, cell):
    with pytest.raises(InputError, match=r"the cell .* is no mapping"):
        start("06_pareto", profile="smoke").sweep(cells=[{"dynamoe.theta": 0.8}, cell])


def test_ranges_and_arrays_are_lists():
    axes = {"train.seed": range(2), "dynamoe.theta": pd.Series([0.5, 0.6])}
    assert len(Sweep(profile="smoke", axes=axes).resolve()) == 4


def test_computed_cells_may_be_none_but_a_file_has_something_to_do(project):
    run = start("06_pareto", profile="smoke")
    for result in (run.sweep(cells=[]), run.sweep({}, cells=[])):
        assert (result.cells, result.failed, result.outcomes) == ([], [], [])
        assert len(result.table) == 0
        assert list(result.table.columns) == ["cell", *COLUMNS]
    for nothing in ({}, {"axes": {}}, {"file": write(project, "title: nothing")}):
        with pytest.raises(InputError, match="nothing to do"):
            run.sweep(**nothing)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axis: {dynamoe.theta: [0.8]}", r"no entry 'axis'; did you mean axes\?$"),
        (
            "model: smollm2-135m\nseed: 3",
            "this is no sweep, it has 'model'; a sweep has title, profile, overrides, axes, cells, modes; fields",
        ),
        ("axes: {dynamoe.theta: [0.8]}\nseed: 3", "no entry 'seed'; a sweep has title"),
        ("axes: {dynamoe.theta: 0.8}", r"axes\.dynamoe\.theta.*list of values"),
        ("axes: {dynamoe: {theta: [0.8]}}", "sweep .*axes"),
        ("axes: {dynamoe.teta: [0.8]}", r"no field 'dynamoe\.teta'; did you mean dynamoe\.theta"),
        ("axes: {theta: [0.8]}", r"did you mean dynamoe\.theta"),
        ("axes: {profile: [smoke]}", "no field 'profile'"),
        ("axes: {dynamoe.theta: []}", r"the axis dynamoe\.theta is empty"),
        ("axes: {dynamoe.theta: [0.8, 7]}", r"cell 2 \(dynamoe\.theta=7\): dynamoe\.theta = 7\.0"),
        ("axes: {dynamoe.theta: [0.8, 0.80]}", "cell 2 .* is the same experiment as cell 1"),
        ("axes: {dynamoe.theta: [0.8]}\ncells: [{dynamoe.theta: 0.8, dynamoe.importance: l2_down}]", "same experiment as cell 1"),
        ("cells: [{dynamoe.theta: 0.8}]\nmodes: [rooter]", "mode 'rooter'"),
        ("cells: [{dynamoe.experts: [0.5, 1.0]}]\nmodes: [2]", r"mode 2: .* from 0 to 1"),
        ("cells: [{dynamoe.theta: 0.8}]\nmodes: []", "no modes"),
        ("cells: [{method: tomoe}]\nmodes: [label]", "mode 'label': ToMoE has no difficulty labels"),
        ("cells: [{method: tomoe}]\nmodes: [4]", r"mode 4: give router, full, random, or an expert's index from 0 to 3"),
        (
            "overrides: [method=tomoe]\naxes: {train.seed: [0, 1]}",
            r"method tomoe does not read train\.seed; vary tomoe\.\* and tomoe_train",
        ),
        ("axes: {method: [tomoe, dynamoe], dynamoe.theta: [0.8]}", r"cell 1 .*method tomoe does not read dynamoe\.theta"),
        ("axes: {tomoe.p: [0.5]}", r"method dynamoe does not read tomoe\.p; vary dynamoe\.\* and train"),
        ("axes: {tomoe.p: [1.5]}\noverrides: [method=tomoe]", r"tomoe\.p = 1\.5"),
        ("cells: [3]", "sweep "),
        ("title: nothing", "nothing to do"),
        ("- 1", "sweep "),
        ("axes: {dynamoe.theta: [0.8", "not a readable YAML file"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_runs(project, monkeypatch, tmp_path, text, message):
    monkeypatch.setattr(sweep, "run_cell", lambda *_, **__: pytest.fail("a cell was run"))
    path = write(project, text)
    with pytest.raises(InputError, match=message) as caught:
        run_sweep(load_sweep(path), profile="smoke", home=tmp_path / "home")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home").exists()


def test_names_overrides_and_jobs_are_checked(project, tmp_path):
    with pytest.raises(InputError, match="did you mean importance"):
        load_sweep("importanse")
    with pytest.raises(InputError, match="give a path to a YAML file or one of"):
        load_sweep("nowhere/zzz.yaml")
    chosen = Sweep(profile="smoke", axes={"dynamoe.theta": [0.8]})
    with pytest.raises(InputError, match=r"varies dynamoe\.theta"):
        run_sweep(chosen, overrides=["dynamoe.theta=0.9"], home=tmp_path)
    with pytest.raises(InputError, match="jobs = 0"):
        run_sweep(chosen, jobs=0, home=tmp_path)


def test_jobs_are_what_cells_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=8 * 2**30))
    assert sweep._jobs_that_fit(20, 2**28) == 3  # 4 x 0.25 GB + 1.5 GB each
    assert sweep._jobs_that_fit(2, 2**28) == 2
    assert sweep._jobs_that_fit(20, 2**33) == 1
    assert sweep._jobs_that_fit(20, 0) == 4  # pairs of cores
    monkeypatch.setattr(environment, "usable_cores", lambda: 1)
    assert sweep._jobs_that_fit(20, 0) == 1


# --- cells in processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(home):
    """Two cells that share their conversion, one that cannot be converted, one that is not trained; two at a time."""
    cells = [{"train.seed": 0}, {"train.seed": 1}, {"dynamoe.experts": [0.001, 1.0]}, {"train.steps": 0}]
    chosen = Sweep(name="mixed", profile="smoke", overrides=SMALL, cells=cells, modes=["router", "label", 0])
    said = []
    result = run_sweep(chosen, home=home, jobs=2, progress=said.append)
    return chosen, result, said


@pytest.mark.assets
def test_one_cell_fails_and_the_others_do_not(done):
    _, result, said = done
    assert [outcome.status for outcome in result.outcomes] == ["ok", "ok", "failed", "ok"]
    assert [cell.settings for cell in result.cells] == [{"train.seed": 0}, {"train.seed": 1}, {"train.steps": 0}]
    (failed,) = result.failed
    assert str(failed).startswith("dynamoe.experts=[0.001, 1.0]: convert: dynamoe.experts = [0.001, 1.0] gives sizes [0, 256]")
    assert len(said) == 4
    assert said[0].startswith("cell 1/4  ")
    assert said[-1].startswith("cell 4/4  ")
    assert any("  failed  dynamoe.experts=[0.001, 1.0]: convert" in line for line in said)


@pytest.mark.assets
def test_a_step_that_two_cells_need_is_computed_once(done):
    _, result, _ = done
    first, second = result.outcomes[:2]
    converted = [use for outcome in (first, second) for use in outcome.steps if use.function in ("calibrate", "document_losses")]
    assert len({use.key for use in converted if use.function == "calibrate"}) == 1
    assert sum(not use.cached for use in converted if use.function == "calibrate") == 1


@pytest.mark.assets
def test_processes_share_the_cores_and_are_gone_afterwards(done):
    _, result, _ = done
    assert {outcome.threads for outcome in result.outcomes} == {max(1, environment.usable_cores() // 2)}
    children = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not [command for command in children if any("popen_loky" in word for word in command)]


@pytest.mark.assets
def test_what_is_finished_is_only_read(done, home, monkeypatch):
    chosen, result, _ = done
    monkeypatch.setattr(sweep, "_in_processes", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr(sweep, "run_step", lambda *_, **__: pytest.fail("a step was asked for that is not there"))
    finished = Sweep(profile="smoke", overrides=SMALL, cells=[chosen.cells[0], chosen.cells[1], chosen.cells[3]], modes=chosen.modes)
    said = []
    again = run_sweep(finished, home=home, progress=said.append)
    assert all(line.endswith("  finished before") for line in said)
    assert all(outcome.cached for outcome in again.outcomes)
    columns = ["mode", "metric", "value", "low", "high", "n"]
    before = result.table[result.table["status"] == "ok"][columns].reset_index(drop=True)
    assert again.table[columns].equals(before)


@pytest.mark.assets
def test_the_table_is_tidy_and_agrees_with_the_losses(done):
    _, result, _ = done
    table = result.table
    assert list(table.columns) == ["cell", "train.seed", "dynamoe.experts", "train.steps", *COLUMNS]
    assert not table.duplicated(["cell", "mode", "metric"]).any()
    (failed,) = table[table["status"] == "failed"].to_dict("records")
    assert (failed["cell"], failed["dynamoe.experts"], math.isnan(failed["value"])) == (3, "[0.001, 1.0]", True)
    assert set(table.loc[table["cell"] == 1, "dynamoe.experts"]) == {"[0.25, 0.5, 0.75, 1.0]"}
    cell = result.cells[1]
    rows = table[table["cell"] == 2].set_index(["mode", "metric"])
    reference = cell.reference["nll"].sum() / cell.reference["tokens"].sum()
    for mode in ("router", "label", 0):
        own = cell.losses[mode]["nll"].sum() / cell.losses[mode]["tokens"].sum()
        row = rows.loc[(str(mode), "perplexity_ratio")]
        assert row["value"] == pytest.approx(math.exp(own - reference), rel=1e-5)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["n"] == len(cell.reference)
    trace = cell.traces["router"]
    assert rows.loc[("router", "router_accuracy"), "value"] == pytest.approx((trace["expert"] == trace["label"]).mean())
    commonest = sum(group.value_counts().max() for _, group in trace.groupby("layer")["label"]) / len(trace)
    assert rows.loc[("router", "majority_accuracy"), "value"] == pytest.approx(commonest)
    assert ("label", "router_accuracy") not in rows.index
    assert rows.loc[("0", "active_mlp_fraction"), "value"] == pytest.approx(0.25)
    assert set(table.loc[table["cell"] == 4, "train_tokens"]) == {0}


@pytest.mark.assets
def test_files_say_how_every_cell_ended_and_name_no_path_of_the_machine(done, tmp_path):
    _, result, _ = done
    csv = write_sweep(result, tmp_path / "out", root=CHECKOUT, command=["dynamoe-lab", "sweep", "mixed"])
    assert len(csv.read_text().splitlines()) == 1 + len(result.table)
    text = (tmp_path / "out" / "sweep.json").read_text()
    content = json.loads(text)
    assert [cell["status"] for cell in content["cells"]] == ["ok", "ok", "failed", "ok"]
    assert content["cells"][1]["config"]["train"]["seed"] == 1
    assert content["cells"][2]["settings"] == {"dynamoe.experts": [0.001, 1.0]}
    assert content["sweep"]["overrides"] == SMALL
    assert content["env"]["packages"]["torch"]
    assert str(CHECKOUT) not in text
    assert str(Path.home()) + "/" not in text


@pytest.mark.assets
def test_a_notebooks_sweep_starts_from_its_experiment_and_records_the_steps(done, home, project, monkeypatch):
    _, result, _ = done
    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(home))
    monkeypatch.setattr(sweep, "_in_processes", lambda *_: pytest.fail("a process was started"))
    run = start("06_pareto", profile="smoke", overrides=[*SMALL, "train.seed=7"])
    again = run.sweep({"train.seed": [0, 1]}, modes=("router", "label", 0))  # the axis goes before what the run was given
    assert [cell.experiment for cell in again.cells] == [cell.experiment for cell in result.cells[:2]]
    used = load_record(run.folder).results.steps
    assert len({use.key for use in used}) == len(used)
    assert {use.function for use in used} == {"calibrate", "train", "document_losses", "trace_routing"}
    marks = load_record(run.folder).env.fingerprints  # what the steps were given, as `Run.step` records it
    assert {name.partition(".")[0] for name in marks} == {use.function for use in used}
    trained = [outcome.fingerprints["train.blocks"] for outcome in again.outcomes]
    assert marks["train.blocks"] == trained[0] == trained[1]
    assert marks["trace_routing.model"] == " | ".join(outcome.fingerprints["trace_routing.model"] for outcome in again.outcomes)
    assert marks["trace_routing.model"].count(" | ") == 1  # two seeds, two models
    with pytest.raises(SweepFailed, match=r"1 of 1 cells failed: dynamoe\.experts=\[0\.001, 1\.0\]: convert"):
        run.sweep(cells=[{"dynamoe.experts": [0.001, 1.0]}], overrides=["train.seed=0"])
    with pytest.raises(InputError, match="not both"):
        run.sweep({"train.seed": [0]}, file="importance")


@pytest.mark.assets
def test_a_sweep_of_both_methods_is_one_table_that_can_be_drawn(home, tmp_path):
    """ToMoE beside DynaMoE on the same text, from the cells to notebook 20's picture and sentence."""
    import dynamoe_lab as lab

    few = ["data.heldout_tokens=512", "data.calibration_tokens=512", "train.steps=1", "tomoe_train.steps=1", "tomoe.mask_offset=0.1"]
    cells = [{"method": "tomoe", "tomoe.p": 0.4}, {"method": "tomoe", "tomoe.p": 0.6}, {"method": "dynamoe"}]
    chosen = Sweep(name="both", profile="smoke", overrides=few, cells=cells, modes=["router", "random"])
    result = run_sweep(chosen, home=home, jobs=1, progress=None)
    assert not result.failed
    table = read_sweep(write_sweep(result, tmp_path / "out", root=CHECKOUT, command=["dynamoe-lab", "sweep", "both"]))
    found = table[table["mode"] == "router"].groupby("cell")["metric"].agg(set).to_dict()
    pruned = {"perplexity_ratio", "active_mlp_fraction", "heldout_kl", "active_params_fraction", "union_coverage"}
    assert found == {1: pruned, 2: pruned, 3: {"perplexity_ratio", "active_mlp_fraction", "router_accuracy", "majority_accuracy"}}
    for metric in ("perplexity_ratio", "heldout_kl", "union_coverage"):
        ours = table[table["method"] == "tomoe"].drop(columns="method")
        assert lab.plot_ablation(ours, axis="tomoe.p", metric=metric) is not None
        assert lab.ablation_finding(ours, axis="tomoe.p", metric=metric).startswith(f"{metric} by tomoe.p")
    assert lab.plot_ablation(table[table["tomoe.p"] != 0.6], axis="method") is not None


def test_processes_that_die_leave_their_cells_failed(tmp_path, monkeypatch):
    """One cell came back, then the pool broke: the cells that were waiting fail with advice, the first one stands."""
    import joblib

    class Breaking:
        def __init__(self, **_):
            pass

        def __call__(self, calls):
            plan = next(iter(calls))[1][0]  # (function, args, kwargs)
            yield sweep.Outcome(plan.number, plan.settings), None
            raise BrokenProcessPool("killed")

    monkeypatch.setattr(joblib, "Parallel", Breaking)
    plans = Sweep(profile="smoke", axes={"train.seed": [0, 1, 2]}).resolve()
    ended = [outcome for outcome, _ in sweep._in_processes(plans, ["router"], tmp_path, 2)]
    assert [outcome.status for outcome in ended] == ["ok", "failed", "failed"]
    assert "out of memory?" in ended[1].error
    assert "--jobs 1" in ended[2].error


# --- stopped and killed ------------------------------------------------------------------------------------------------------------


def _spawn(project: Path, home: Path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "DYNAMOE_LAB_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "dynamoe_lab", "sweep", "mine.yaml", *words]
    return subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _until_training(process: subprocess.Popen, home: Path) -> list[psutil.Process]:
    """Wait until both cells train; returns the processes below."""
    deadline = time.monotonic() + 120
    while len(list(home.glob("scratch/train-*/output/train.json"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.slow
@pytest.mark.assets
def test_stopped_or_killed_no_process_is_left_and_finished_steps_are(home, project, tmp_path):
    own = tmp_path / "home"
    own.mkdir()
    for part in ("assets", "models"):
        (own / part).symlink_to((home / part).resolve())
    fields = "train.steps=400, train.save_steps=1, data.heldout_tokens=512, data.calibration_tokens=512"
    write(project, f"profile: smoke\noverrides: [{fields}]\naxes: {{train.seed: [0, 1]}}\n")
    stopped = _spawn(project, own, "--jobs", "2")
    family = _until_training(stopped, own)
    _, err = interrupt(stopped, signal.SIGTERM)  # as a batch system does; Ctrl-C is tried in test_notebook_runner.py
    assert stopped.returncode == 143, err
    assert "interrupted; finished steps" in err
    assert "Traceback" not in err
    assert not psutil.wait_procs(family, timeout=10)[1]
    converted = {path: path.stat().st_mtime_ns for path in own.glob("steps/calibrate-*/step.json")}
    assert len(converted) == 1

    for path in own.glob("scratch/train-*"):
        shutil.rmtree(path)
    killed = _spawn(project, own, "--jobs", "2")
    family = _until_training(killed, own)
    killed.kill()
    killed.wait()
    assert not psutil.wait_procs(family, timeout=20)[1], "a process outlived the sweep"
    assert {path: path.stat().st_mtime_ns for path in own.glob("steps/calibrate-*/step.json")} == converted
    killed.communicate()


def test_a_written_table_is_read_back(tmp_path):
    rows = [(1, "l2", "label", "perplexity_ratio", 1.5, "ok"), (2, "abs", "1", "perplexity_ratio", 2.5, "ok")]
    written = pd.DataFrame(rows, columns=["cell", "dynamoe.importance", "mode", "metric", "value", "status"])
    written["mode"] = written["mode"].astype(object)  # pandas 3 has a type of its own for texts
    written.to_csv(tmp_path / "sweep.csv", index=False)
    pd.testing.assert_frame_equal(read_sweep(tmp_path / "sweep.csv"), written)


@pytest.mark.parametrize(("content", "says"), [(None, "no such file"), ("a,b\n1,2\n", "lacks cell, mode"), ("", "No columns")])
def test_what_is_no_table_is_told(tmp_path, content, says):
    if content is not None:
        (tmp_path / "sweep.csv").write_text(content)
    with pytest.raises(InputError, match=f"{says}.*make one with"):
        read_sweep(tmp_path / "sweep.csv")
