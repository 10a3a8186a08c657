"""What `make bench` does with times: made-up ones with results known by hand, and its measurements on pico models, times aside."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_blocks, make_converted, make_dense, make_tomoe

from dynamoe_lab.analysis import latency_ratios

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other by name, as when one of them is started

import bench  # noqa: E402
import children  # noqa: E402
import experts  # noqa: E402
import forwards  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import results  # noqa: E402
import training  # noqa: E402


def latency_frame(run: str = "m", phase: str = "prefill", batch: int = 1) -> pd.DataFrame:
    """Three rounds on a machine that gets slower: a dense MLP of 0.8 s in a forward of 1 s, times 1, 2 and 3."""
    place = {"run": run, "phase": phase, "batch": batch, "tokens": 1024, "threads": 2, "device": "cpu", "dtype": "float32"}
    routed = [  # routing, active share, ideal share, seconds, seconds of the MLPs
        ("dense", 1.0, 1.0, 1.0, 0.8),
        ("one expert", 0.25, 0.3, 0.5, 0.28),
        ("one expert", 0.5, 0.55, 0.7, 0.5),
        ("mixed", 0.497, 0.547, 0.75, 0.55),
    ]
    rows = []
    for pair, slow in enumerate((1, 2, 3)):
        for routing, active, ideal, seconds, mlp in routed:
            times = {"pair": pair, "seconds": seconds * slow, "mlp_seconds": mlp * slow}
            rows.append({**place, "routing": routing, **times, "active_mlp_fraction": active, "ideal_share": ideal})
    return pd.DataFrame(rows)


def by_name(found: list[dict], name: str) -> dict[str, dict]:
    return {row["setting"]: row for row in found if row["name"] == name}


def test_a_result_is_a_median_with_its_spread():
    row = results.result("load", "here", [3.0, 1.0, 2.0, 5.0, 4.0], goal="< 2", unit="s")
    assert row == {
        "name": "load",
        "setting": "here",
        "value": 3.0,
        "low": pytest.approx(1.4),
        "high": pytest.approx(4.6),
        "n": 5,
        "goal": "< 2",
        "reached": False,
        "unit": "s",
    }
    assert list(row) == list(results.COLUMNS)
    for rounds in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="load, here"):
            results.result("load", "here", rounds)


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (1.10, "<= 1.10", True),
        (1.101, "<= 1.10", False),
        (0.9, ">= 0.90", True),
        (0.899, ">= 0.90", False),
        (2.0, "< 2", False),
        (7, None, None),
    ],
)
def test_goals(value, goal, met):
    assert results.reached(value, goal) is met


def test_goals_are_those_of_the_design():
    assert set(results.GOALS) <= set(bench.NAMES)
    assert results.GOALS["label_cost"] == "<= 1.10"
    assert {results.GOALS[name] for name in ("prefill_realised", "end_to_end", "train_rate")} == {">= 0.90"}
    assert results.GOALS["tomoe_train_rate"] == ">= 0.50"
    assert results.GOALS["random_mixing"] == ">= 0.95"
    assert results.GOALS["tomoe_prefill_realised"] == ">= 0.80"
    assert results.GOALS_OF_LARGE_LAYERS == {"prefill_realised": ">= 0.93", "decode_realised": ">= 0.85"}
    assert (results.GOAL_OF_A_QUARTER, results.GOALS["decode_realised"], results.GOALS["load"]) == (">= 0.85", ">= 0.75", "< 2")


def test_latency_becomes_results_with_the_goals_of_their_shares():
    found = results.latency_results(latency_ratios(latency_frame()), whole_model=True)
    realised = by_name(found, "prefill_realised")
    quarter = realised["m, 1,024 tokens, one expert, 25% active"]
    assert quarter["value"] == pytest.approx(0.8 * 0.3 / 0.28)
    assert (quarter["goal"], quarter["reached"], quarter["n"]) == (">= 0.85", True, 3)
    half = realised["m, 1,024 tokens, one expert, 50% active"]
    assert half["value"] == pytest.approx(0.8 * 0.55 / 0.5)
    assert (half["goal"], half["reached"]) == (">= 0.90", False)
    ends = by_name(found, "end_to_end")
    assert len(ends) == 2, "one expert and mixed, at half the neurons"
    bound = 1 / (1 - 0.8 * (1 - 0.547))
    assert ends["m, 1,024 tokens, mixed, 50% active"]["value"] == pytest.approx((1 / 0.75) / bound)
    assert {row["setting"] for row in found} == set(realised) | set(ends)
    large = results.latency_results(latency_ratios(latency_frame()), whole_model=False)
    assert not by_name(large, "end_to_end")
    assert {row["goal"] for row in large} == {">= 0.93"}


def test_a_decode_batch_has_no_goal():
    frames = [latency_frame(phase="decode", batch=batch) for batch in (1, 8)]
    found = by_name(results.latency_results(latency_ratios(pd.concat(frames)), whole_model=True), "decode_realised")
    assert found["m, batch 1, 1,024 tokens cached, one expert, 25% active"]["goal"] == ">= 0.75"
    crowd = found["m, batch 8, 1,024 tokens cached, mixed, 50% active"]
    assert crowd["goal"] is None
    assert crowd["reached"] is None


def test_mixing_is_compared_at_equal_shares_round_by_round():
    latency = latency_frame()
    slow = (latency["pair"] == 2) & (latency["routing"] == "mixed")
    latency.loc[slow, "mlp_seconds"] *= 2  # in one round of three: the median does not move
    (row,) = results.mixing_results(latency)
    assert row["setting"] == "m, 1,024 tokens, mixed over one expert, 50% active"
    same = (0.547 / 0.55) / (0.55 / 0.5)
    assert row["value"] == pytest.approx(same)
    assert row["low"] == pytest.approx(same / 2 + 0.2 * same / 2)
    assert row["n"] == 3


def test_the_table_says_what_was_missed():
    rows = [
        results.result("label_cost", "a", [1.05], goal="<= 1.10"),
        results.result("load", "longer setting", [2.5], goal="< 2", unit="s"),
        results.result("allocator", "b", [1.2]),
    ]
    lines = results.table(rows).splitlines()
    assert lines[0].split() == ["name", "setting", "median", "10-90", "%", "n", "goal"]
    assert re.search(r"^label_cost +a +1\.050 +1\.050 to 1\.050 +1 +<= 1\.10 +reached$", lines[1])
    assert re.search(r"^load +longer setting +2\.500 s .* < 2 +MISSED$", lines[2])
    assert re.search(r" -$", lines[3])
    assert len({line.index(" to ") for line in lines[1:]}) == 1, "columns are aligned"


def test_the_file_holds_the_machine_and_no_path(tmp_path):
    described = machine.describe()
    assert {"cpu", "cores", "threads", "memory_gb", "platform", "torch", "transformers", "commit", "date"} <= set(described)
    assert described["threads"] == torch.get_num_threads()
    assert described["torch"] == torch.__version__.partition("+")[0] or described["torch"] == torch.__version__
    rows = [results.result("load", "s", [1 / 3, 1 / 3], goal="< 2", unit="s")]
    results.write(tmp_path / "results.json", rows, described, {"memory": "RuntimeError: no"})
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["results"] == [{**rows[0], "value": 0.3333, "low": 0.3333, "high": 0.3333}]
    assert read["machine"] == described
    assert read["failed"] == {"memory": "RuntimeError: no"}
    assert str(ROOT) not in json.dumps(described)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "no temporary file is left"


# --- the command ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch):
    """Measurements that return made-up results, fail, or must not be asked; what was called, in order."""
    calls = []

    def measure(name, *values):
        def function(setup):
            calls.append((name, setup.pairs))
            if not values:
                raise RuntimeError(f"no room in {ROOT}/somewhere\nand more")
            return [results.result(name, "made up", values, goal=results.GOALS.get(name)), results.result("other", "made up", [1.0])]

        return function

    table = {"labels": (("label_cost",), measure("label_cost", 1.0, 1.2, 1.3)), "load": (("load", "other"), measure("load", 1.5))}
    monkeypatch.setattr(bench, "MEASUREMENTS", {**table, "breaks": (("allocator",), measure("allocator"))})
    return calls


def test_the_command_measures_what_is_asked(made_up, tmp_path, capsys):
    output = tmp_path / "out.json"
    assert bench.main(["--only", "label_cost", "load", "--quick", "--output", str(output)]) == 0, "a missed goal is no failure"
    assert made_up == [("label_cost", 3), ("load", 3)]
    written = json.loads(output.read_text())
    assert [(row["name"], row["value"], row["reached"]) for row in written["results"]] == [("label_cost", 1.2, False), ("load", 1.5, True)]
    assert written["failed"] == {}
    shown = capsys.readouterr().out
    assert "MISSED" in shown


def test_one_failure_does_not_stop_the_others(made_up, tmp_path, capsys):
    output = tmp_path / "out.json"
    assert bench.main(["--pairs", "5", "--output", str(output)]) == 1
    assert made_up == [("label_cost", 5), ("load", 5), ("allocator", 5)]
    written = json.loads(output.read_text())
    assert written["failed"] == {"breaks": "RuntimeError: no room in ./somewhere"}
    assert len(written["results"]) == 2
    assert "breaks: failed, RuntimeError" in capsys.readouterr().out


def test_a_part_is_not_written_over_the_whole(made_up, capsys, monkeypatch):
    monkeypatch.setattr(bench, "write", lambda *_: pytest.fail("wrote a file"))
    with pytest.raises(SystemExit):
        bench.main(["--pairs", "0"])
    assert "--pairs 0: give at least 1" in capsys.readouterr().err
    assert bench.main(["--pairs", "1"]) == 1, "fewer rounds than it takes"
    assert bench.main(["--only", "load"]) == 0
    assert bench.main(["--only", "allocator", "--quick"]) == 1, "nothing measured"
    with pytest.raises(SystemExit):
        bench.main(["--only", "lode"])
    assert "invalid choice: 'lode'" in capsys.readouterr().err


def test_make_bench_is_this_command():
    text = (ROOT / "Makefile").read_text()
    assert "\nbench: env\n\t$(BIN)/python benchmarks/bench.py\n" in text
    assert "make bench" in text.split("help:")[1].split("\nenv:")[0]


# --- the measurements, on pico models -------------------------------------------------------------------------------------------


def test_forwards_measure_every_setting(monkeypatch):
    dense, model, ids = make_dense(), make_converted(), make_blocks(8, 24).ids
    (labels,) = forwards.label_cost(dense, model, ids, 2)
    assert labels["n"] == 2
    assert labels["value"] > 0
    assert model.routing.mode == "router"
    assert forwards.one_hot(model)[1] == (0.0, 1.0, 0.0, 0.0)
    found = forwards.prefill(dense, model, 2, ids=ids, tokens=24)
    assert [row["name"] for row in found].count("prefill_realised") == 6
    assert [row["name"] for row in found].count("end_to_end") == 2
    assert len(by_name(found, "random_mixing")) == 2
    steps = forwards.decode(dense, model, 2, ids=ids, tokens=16)
    assert [row["goal"] for row in steps] == [">= 0.75"] * 4 + [None] * 2
    larger = [*forwards.grown(1, "prefill", 64, 96, tokens=16), *forwards.grown(1, "decode", 64, 96, tokens=16)]
    assert [row["name"] for row in larger] == ["prefill_realised"] * 6 + ["decode_realised"] * 4
    assert {row["setting"].split(", batch")[0].split(", 16")[0] for row in larger} == {"D = 64, H = 96"}
    names = [row["setting"] for row in (*found, *steps) if row["name"].endswith("realised")]
    assert len(set(names)) == len(names)


@torch.no_grad()
def test_separate_experts_have_half_of_the_neurons_each():
    dense, ids = make_dense(), make_blocks(8, 24).ids
    model = experts.half_experts(dense)
    assert all(mlp.membership.sum(1).tolist() == [48] * 8 for mlp in model.routed_mlps())
    assert len({tuple(row.tolist()) for row in model.routed_mlps()[0].membership}) == 8
    model.set_routing("full")
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
    rows = [*experts.tomoe_prefill(dense, 2, ids=ids, tokens=24, run="pico"), *experts.tomoe_grown(2, 64, 96, tokens=24)]
    assert [row["name"] for row in rows] == ["tomoe_prefill_realised"] * 2
    assert [row["setting"].partition(", 24")[0] for row in rows] == ["pico", "D = 64, H = 96"]
    assert rows[0]["setting"].endswith(", 24 tokens over 8 experts of 50%")
    assert {(row["n"], row["goal"]) for row in rows} == {(2, ">= 0.80")}
    (made_up,) = results.expert_results(latency_ratios(latency_frame()), 8)
    assert made_up["value"] == pytest.approx(0.8 * 0.547 / 0.55)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_both_trainings_step_the_same_weights(family, tmp_path):
    """After a step: every MLP projection has moved in both, routers in one, nothing else in either."""
    ids = make_blocks(4, 24).ids
    for model in (make_dense(family), make_converted(family)):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        step = training.OneStep(training.make_trainer(model, ids, tmp_path, steps=2), ids)
        assert step() > 0
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == {name for name in before if any(part in name for part in (".mlp.", ".fc1.", ".fc2."))}
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_of_tomoe_leaves_the_dense_weights(tmp_path):
    ids, model = make_blocks(4, 24).ids, make_tomoe(mask_offset=0.2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training.OneStep(training.make_trainer(model, ids, tmp_path, steps=2), ids)()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert not moved & set(make_dense().state_dict())


def test_one_step_is_the_trainers_own(tmp_path):
    """The same weights as `transformers.Trainer` gives after two steps on the same batch."""
    ids, schedule = make_blocks(4, 24).ids, {"steps": 2}

    def make_quiet():
        model = make_tomoe(mask_offset=0.2)
        model.noise.gumbel = lambda shape, device: torch.zeros(shape, device=device)  # drawn in the order of the tokens, which differs
        return model

    for make in (make_dense, make_converted, make_quiet):
        ours, theirs = make(), make()
        step = training.OneStep(training.make_trainer(ours, ids, tmp_path / "a", **schedule), ids)
        step()
        trainer = training.make_trainer(theirs, ids, tmp_path / "b", **schedule)
        trainer.args.max_steps = 1
        trainer.train()
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-4, msg=name)
    assert not list(tmp_path.rglob("*.safetensors")), "a benchmark of memory saves nothing"


def test_train_rate_counts_tokens(tmp_path, monkeypatch):
    times = iter([1.0, 1.0, *[4.0, 5.0, 2.0, 2.0]])  # warm-up; then dense and routed in turn: 4 / 5, 2 / 2
    order = []

    def step(self):
        order.append(type(self.trainer).__name__)
        return next(times)

    monkeypatch.setattr(training.OneStep, "__call__", step)
    ratio, rate = training.train_rate(make_dense(), make_converted(), make_blocks(4, 25).ids, tmp_path, 2)
    assert order[2:] == ["DynaMoETrainer", "FineTuning", "FineTuning", "DynaMoETrainer"], "who goes first alternates"
    assert ratio["value"] == pytest.approx(np.median([5 / 4, 2 / 2]))
    assert (ratio["name"], ratio["goal"]) == ("train_rate", ">= 0.90")
    assert rate["value"] == pytest.approx(np.median([100 / 4, 100 / 2]))
    assert rate["unit"] == "tokens/s"


def test_tomoe_train_rate_is_told_apart(tmp_path):
    ratio, rate = training.tomoe_train_rate(make_dense(), make_tomoe(), make_blocks(4, 24).ids, tmp_path, 2)
    assert (ratio["name"], ratio["n"], ratio["goal"]) == ("tomoe_train_rate", 2, ">= 0.50")
    assert ratio["setting"] == "ToMoE training over fine-tuning, batch of 4 x 24, AdamW steps"
    assert (rate["name"], rate["unit"]) == ("tomoe_train_rate", "tokens/s")


def test_memory_and_load_are_ratios_of_what_children_say(monkeypatch, tmp_path):
    asked = []

    def child(script, *arguments, environment=None):
        asked.append((script, *arguments))
        if arguments[0] == "evaluate":
            return {"peaks": [2**20 + count for count in arguments[3:]]}
        return {"peak": 3 * 2**30 if "converted" in str(arguments[1]) else 2**31}

    monkeypatch.setattr(memory, "run_child", child)
    ratio, absolute = memory.train_memory("dense", tmp_path / "converted", tmp_path / "ids.npy", 2)
    assert (ratio["value"], ratio["n"], ratio["reached"]) == (1.5, 2, False)
    assert (absolute["value"], absolute["unit"]) == (3.0, "GiB")
    longer, least = memory.eval_memory("dense", tmp_path / "ids.npy", 2)
    assert (longer["value"], longer["n"]) == ((2**20 + 16_384) / (2**20 + 4_096), 2)
    assert (least["value"], least["unit"], least["goal"]) == ((2**20 + 4_096) / 2**30, "GiB", None)
    assert [call[4:] for call in asked if call[1] == "evaluate"] == [(4_096, 16_384)] * 2, "one process for both"
    assert {call[0] for call in asked} == {"memory.py"}


def test_a_childs_peak_is_its_own(tmp_path):
    """What this process holds does not count in a child's peak, which getrusage would tell it."""
    held = np.ones(2**26)  # half a GiB
    script = tmp_path / "peak.py"
    folder = str(ROOT / "benchmarks")
    lines = (f"sys.path.insert(0, {folder!r})", "import children", "from dynamoe_lab.workbench.memory import peak_memory")
    script.write_text("\n".join(["import sys", *lines, "children.report(peak=peak_memory())"]))
    peak = children.run_child(str(script))["peak"]
    assert 2**22 < peak < held.nbytes / 2


def test_a_child_that_fails_says_why(tmp_path):
    (tmp_path / "fails.py").write_text("print('noise')\nraise ValueError('no such model')\n")
    with pytest.raises(RuntimeError, match=r"fails\.py train: ValueError: no such model"):
        children.run_child(str(tmp_path / "fails.py"), "train", 3)
