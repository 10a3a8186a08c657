"""All notebooks on the smoke profile, as a person runs them: the command, stock papermill, again, after a deletion, after a kill."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from kill_randomly import kill

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {  # what every notebook draws, whatever the profile
    "00_explore": (),
    "01_convert": ("importance_curves", "expert_similarity"),
    "02_difficulty": ("label_share", "difficulty_vs_surprisal", "difficulty_by_domain"),
    "03_train_router": ("training_curves",),
    "04_router_confusion": ("router_confusion", "router_confusion_by_layer", "error_distance"),
    "05_expert_usage": ("expert_usage", "expert_usage_by_domain"),
    "06_pareto": ("pareto",),
    "07_collapse": ("collapse", "collapse_entropy", "collapse_training"),
    "08_benchmarks": ("benchmarks", "benchmark_deltas", "relative_to_base"),
    "09_latency": ("latency", "realised_vs_ideal", "time_parts", "cost_growth"),
    "12_tomoe": ("tomoe_training", "tomoe_usage", "tomoe_union", "tomoe_specialisation"),
    "20_ablation": ("ablation",),
}
COLUMNS = {  # of the documented tables
    "03_train_router/training_curves": "run step tokens loss lm_loss router_loss router_accuracy active_mlp_fraction lr seconds",
    "04_router_confusion/router_confusion_by_layer": "run theta layer label expert tokens share",
    "05_expert_usage/expert_usage": "run theta domain layer expert share tokens",
    "05_expert_usage/expert_usage_by_domain": "run theta domain layer expert share tokens",
    "06_pareto/pareto": "method theta seed train_tokens active_params active_mlp_fraction metric value low high n "
    "time_ratio time_low time_high",
    "08_benchmarks/scores": "run task split metric value stderr n task_version batch_size dtype",
    "09_latency/latency": "run phase batch tokens threads device dtype routing seconds active_mlp_fraction ideal_seconds low high n",
    "09_latency/time_parts": "run routing phase batch tokens part seconds share",
    "07_collapse/collapse": "lambda_router router_gradient seed layer expert share tokens",
    "12_tomoe/tomoe_training": "run step tokens loss lm_loss kl_loss ratio_loss union_loss balance_loss active_ratio_max active_ratio_mean "
    "union_coverage heldout_kl open_ratio open_union lr seconds",
    "12_tomoe/tomoe_union": "run layer count share chance neurons",
    "12_tomoe/tomoe_specialisation": "run factor layer association low high control control_low control_high p tokens levels clusters",
    "20_ablation/ablation": "cell dynamoe.importance mode metric value low high n active_mlp_fraction active_params train_tokens status",
}


def environment(home):
    return {**os.environ, "DYNAMOE_LAB_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def run(home, report, *notebooks, profile="smoke", check=True):
    command = [sys.executable, "-m", "dynamoe_lab", "run", *notebooks, "--profile", profile, "--output", str(report)]
    done = subprocess.run(command, env=environment(home), cwd=ROOT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def record(report, name):
    return json.loads((report / name / "record.json").read_text())


def checkpoint(home, report):
    """Weights of the model that notebook 03 of a report trained."""
    (key,) = [step["key"] for step in record(report, "03_train_router")["results"]["steps"] if step["function"] == "train"]
    return home / "steps" / f"train-{key[:16]}" / "output" / "checkpoint" / "model.safetensors"


@pytest.fixture(scope="module")
def report(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "smoke"
    run(home, folder)
    return folder


def test_every_notebook_says_what_it_draws():
    assert sorted(FIGURES) == NOTEBOOKS, "a notebook needs an entry of FIGURES in tests/test_notebooks.py: the stems of its figures"


@pytest.mark.assets
def test_every_notebook_ends_well_with_every_figure(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    for name in NOTEBOOKS:
        assert record(report, name)["run"]["status"] == "ok"
        assert (report / name / "notebook.html").is_file()
        for stem in FIGURES[name]:
            for kind in ("png", "svg", "csv"):
                path = report / name / f"{stem}.{kind}"
                assert path.stat().st_size > 200
                assert f"{name}/{stem}.{kind}" in page, f"the report does not show {stem}.{kind}"
            assert (report / name / f"{stem}.csv").stat().st_size <= 1_000_000
        shown = (report / name / "notebook.html").read_text(encoding="utf-8").count('src="data:image/png;base64,')
        assert shown == len(list((report / name).glob("*.png"))), f"{name} itself shows not every figure"
    for name, columns in COLUMNS.items():
        assert list(pd.read_csv(report / f"{name}.csv").columns)[: len(columns.split())] == columns.split()


@pytest.mark.assets
def test_usage_and_confusion_agree(report):
    """Two notebooks, one routing: the column sums of the confusion are the usage."""
    confusion = pd.read_csv(report / "04_router_confusion" / "router_confusion_by_layer.csv")
    usage = pd.read_csv(report / "05_expert_usage" / "expert_usage.csv").set_index(["layer", "expert"])["tokens"]
    counted = confusion.groupby(["layer", "expert"])["tokens"].sum()
    assert counted.to_dict() == usage.to_dict()


@pytest.mark.assets
def test_the_frontier_holds_every_control_at_its_compute(report):
    pareto = pd.read_csv(report / "06_pareto" / "pareto.csv").query("metric == 'perplexity_ratio'")
    trained = pareto["train_tokens"] > 0
    assert set(pareto["method"]) == {"dense", "label", "random", "router", "static", "tomoe p = 0.7"}
    assert set(pareto.loc[(pareto["method"] == "label") & ~trained, "theta"]) == {0.7, 0.8, 0.9, 0.95}
    assert set(pareto.loc[trained & (pareto["method"] == "router"), "theta"]) == {0.8, 0.9}
    assert pareto.loc[trained, "train_tokens"].nunique() == 1
    router = pareto[trained & (pareto["method"] == "router") & (pareto["theta"] == 0.9)].iloc[0]
    static = pareto[trained & (pareto["method"] == "static")].iloc[0]
    assert static["active_params"] == pytest.approx(router["active_params"], rel=0.002), "the router counts, too"
    drawn = pareto[(pareto["method"] == "random") & (pareto["theta"] == 0.9)].iloc[0]
    assert drawn["active_mlp_fraction"] == pytest.approx(router["active_mlp_fraction"], abs=0.02)


@pytest.mark.assets
def test_time_is_told_beside_parameters_where_it_was_measured(report):
    pareto = pd.read_csv(report / "06_pareto" / "pareto.csv").query("metric == 'perplexity_ratio'")
    timed = pareto["method"].isin(["router", "static", "dense", "tomoe p = 0.7"])
    assert pareto.loc[timed, "time_ratio"].gt(0).all()
    assert pareto.loc[~timed, "time_ratio"].isna().all(), "labels and random draws are not timed"
    assert (pareto.loc[pareto["method"] == "dense", ["time_ratio", "time_low", "time_high"]] == 1).all(axis=None)


@pytest.mark.assets
def test_benchmarks_are_scored_for_both_models_on_the_same_documents(report):
    scores = pd.read_csv(report / "08_benchmarks" / "scores.csv").query("metric == 'acc'")
    assert scores.groupby("run")["task"].nunique().to_dict() == {"dense": 7, "router": 7, "ToMoE": 7}
    assert scores["n"].nunique() == 1
    deltas = pd.read_csv(report / "08_benchmarks" / "benchmark_deltas.csv").set_index(["run", "task"])
    means = scores.groupby("run")["value"].mean()
    for run in ("router", "ToMoE"):
        assert deltas.loc[(run, "average"), "difference"] == pytest.approx(means[run] - means["dense"], abs=1e-5)
    captions = {
        entry["stem"]: entry["caption"] for kind in ("figures", "tables") for entry in record(report, "08_benchmarks")["results"][kind]
    }
    assert all("validation (stock: test)" in captions[stem] for stem in (*FIGURES["08_benchmarks"], "scores"))
    functions = [step["function"] for step in record(report, "08_benchmarks")["results"]["steps"]]
    assert functions.count("evaluate_task") == 21, "every task is a step of its own"
    trained = [step["cached"] for step in record(report, "08_benchmarks")["results"]["steps"] if step["function"] == "train"]
    assert trained == [True, True], "the models are those of notebooks 03 and 06"


@pytest.mark.assets
def test_the_frontiers_accuracy_is_that_of_the_benchmarks(report):
    """06 scores before 08 does: the same steps, so that 08 scores nothing again, and the same averages."""
    pareto = pd.read_csv(report / "06_pareto" / "pareto.csv").query("metric == 'average_accuracy'")
    scored = sorted(zip(pareto["method"], pareto["theta"].fillna(0), strict=True))
    assert scored == [("dense", 0), ("router", 0.9), ("static", 0.9), ("tomoe p = 0.7", 0)]
    scores = pd.read_csv(report / "08_benchmarks" / "scores.csv").pivot_table(index="run", columns="metric", values="value")
    for run, method in (("dense", "dense"), ("router", "router"), ("ToMoE", "tomoe p = 0.7")):
        row = pareto[pareto["method"] == method]
        assert row["value"].item() == pytest.approx(scores.loc[run, "acc"], abs=1e-5)
        assert row["active_params"].item() == pytest.approx(scores.loc[run, "active_params"], rel=1e-4)
    steps = {name: record(report, name)["results"]["steps"] for name in ("06_pareto", "08_benchmarks")}
    keys = {name: {step["key"] for step in found if step["function"] == "evaluate_task"} for name, found in steps.items()}
    assert len(keys["06_pareto"]) == 28
    assert keys["08_benchmarks"] < keys["06_pareto"]
    assert all(step["cached"] for step in steps["08_benchmarks"] if step["function"] == "evaluate_task")
    static = pd.read_csv(report / "06_pareto" / "static_accuracy.csv").set_index("task").loc["average"]
    values = pareto.set_index("method")["value"]
    assert static["difference"] == pytest.approx(values["router"] - values["static"], abs=1e-5)
    (figure,) = record(report, "06_pareto")["results"]["figures"]
    assert "SciQ and ARC-challenge: validation (stock: test)" in figure["caption"]


@pytest.mark.assets
def test_latency_knows_every_phase_and_routing(report):
    latency = pd.read_csv(report / "09_latency" / "latency.csv")
    assert set(latency["phase"]) == {"prefill", "decode"}
    assert set(latency["routing"]) == {"dense", "router", "one expert", "mixed", "ToMoE"}
    dense = latency[latency["routing"] == "dense"]
    assert (dense["ideal_seconds"] == dense["seconds"]).all()
    energy = pd.read_csv(report / "09_latency" / "energy.csv")
    assert energy["joules_per_token"].gt(0).all() or energy["note"].str.startswith("not measured: ").all()
    trained = [step["cached"] for step in record(report, "09_latency")["results"]["steps"] if step["function"] == "train"]
    assert trained == [True, True], "the models are those of notebooks 03 and 06"


@pytest.mark.assets
def test_what_tomoe_found_adds_up(report):
    """Masks, traces and costs of one model, read from its tables."""
    folder = report / "12_tomoe"
    steps, usage = pd.read_csv(folder / "tomoe_training.csv"), pd.read_csv(folder / "tomoe_usage.csv")
    assert steps["heldout_kl"].notna().any()
    assert usage.groupby("layer")["share"].sum().to_numpy() == pytest.approx(1, abs=1e-4)
    params = pd.read_csv(folder / "tomoe_params.csv", dtype={"layer": str}).set_index("layer")
    run = (usage["share"] * usage["fraction"]).groupby(usage["layer"]).sum()
    assert params.loc[run.index.astype(str), "active_mlp_fraction"].to_numpy() == pytest.approx(run.to_numpy(), abs=2e-3)
    union = pd.read_csv(folder / "tomoe_union.csv", dtype={"layer": str})
    assert union.groupby("layer")["share"].sum().to_numpy() == pytest.approx(1, abs=1e-4)
    lost = union.set_index(["layer", "count"]).loc[("all", 0), "share"]
    assert lost > 0, "a profile whose masks all stay open tests nothing"
    assert steps["open_union"].iloc[-1] == pytest.approx(1 - lost, abs=1e-4)
    perplexity = pd.read_csv(folder / "tomoe_perplexity.csv").set_index("run")
    assert perplexity.loc["all masks open", "ratio"] == pytest.approx(1, abs=1e-4), "all masks open is the dense model"
    captions = {entry["stem"]: entry["caption"] for entry in record(report, "12_tomoe")["results"]["figures"]}
    assert "training tokens (the paper: 20 million and more)" in captions["tomoe_training"]
    assert not (folder / "tomoe_seeds.png").exists(), "one seed: no masks to compare"


@pytest.mark.assets
def test_the_report_opens_with_what_was_found(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    opening = html.unescape(page[: page.index('id="01_convert"')]).replace("\u00a0", " ")
    headlines = [finding["sentence"] for name in FIGURES for finding in record(report, name)["results"]["findings"] if finding["headline"]]
    assert len(headlines) >= 6
    assert all(sentence in opening for sentence in headlines)


@pytest.mark.assets
def test_again_nothing_runs(home, report):
    before = {path: path.stat().st_mtime_ns for path in report.rglob("*.png")}
    began = time.perf_counter()
    done = run(home, report)
    assert time.perf_counter() - began < 60
    assert done.stdout.count("up to date") == len(NOTEBOOKS)
    assert before == {path: path.stat().st_mtime_ns for path in report.rglob("*.png")}


@pytest.mark.assets
def test_a_deleted_folder_is_remade_without_training(home, report):
    before = (report / "05_expert_usage" / "expert_usage.csv").read_bytes()
    shutil.rmtree(report / "05_expert_usage")
    done = run(home, report)
    assert done.stdout.count("up to date") == len(NOTEBOOKS) - 1
    steps = record(report, "05_expert_usage")["results"]["steps"]
    assert {"calibrate", "train", "trace_routing"} <= {step["function"] for step in steps}
    assert all(step["cached"] for step in steps)
    assert (report / "05_expert_usage" / "expert_usage.csv").read_bytes() == before


@pytest.mark.assets
def test_stock_papermill(home, tmp_path):
    command = [sys.executable, "-m", "papermill", "notebooks/04_router_confusion.ipynb", str(tmp_path / "out.ipynb")]
    command += ["-p", "profile", "smoke", "-p", "output", str(tmp_path / "report"), "--no-progress-bar"]
    subprocess.run(command, env=environment(home), cwd=ROOT, capture_output=True, text=True, check=True)
    assert record(tmp_path / "report", "04_router_confusion")["run"]["status"] == "ok"
    assert (tmp_path / "report" / "04_router_confusion" / "router_confusion.png").is_file()


@pytest.mark.assets
def test_killed_in_a_notebook_the_same_command_finishes(home, report, tmp_path):
    """kill -9 of the runner and its kernel in the middle of training: the record says so, the next run ends in the same weights."""
    own = tmp_path / "home"
    own.mkdir()
    for part in ("assets", "models"):
        (own / part).symlink_to((home / part).resolve())
    command = [sys.executable, "-m", "dynamoe_lab", "run", "03", "--profile", "smoke", "--output", str(tmp_path / "report")]
    process = subprocess.Popen(
        command, env=environment(own), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not list(own.glob("scratch/*/output/trainer/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    kill(process)
    assert not list(own.glob("steps/train-*")), "killed too late"
    run(own, tmp_path / "report", "03")
    assert record(tmp_path / "report", "03_train_router")["run"]["status"] == "ok"
    assert checkpoint(own, tmp_path / "report").read_bytes() == checkpoint(home, report).read_bytes()


@pytest.mark.parametrize("name", ["06_pareto", "08_benchmarks", "12_tomoe"])
def test_seeds_are_added_to_the_experiments(name):
    """Notebooks that train the same model share it under any override: no seed of the list stands for itself."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    source = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not re.findall(r"""(?:experiment\.(?:tomoe|train|tomoe_train), seed=|(?:tomoe|train)\.seed": )seeds?\b""", source)
    assert "experiment.tomoe.seed + seed" in source
    assert "experiment.tomoe_train.seed + seed" in source
