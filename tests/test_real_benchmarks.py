"""SmolLM2-135M on real documents: the scores that stock lm-eval gave, batch sizes, pads; and the stock command without this package."""

import json
import os
import subprocess

import pytest
import torch
from bare import bare_environment
from lm_eval.models.huggingface import HFLM

from dynamoe_lab.conversion import convert
from dynamoe_lab.data import load_blocks
from dynamoe_lab.evaluation import TASKS, evaluate_benchmarks, evaluate_task, export_tasks, load_tasks
from dynamoe_lab.evaluation.benchmark_lm import BenchmarkLM
from dynamoe_lab.loading import load_model
from dynamoe_lab.models import DynaMoEConfig


@pytest.fixture(scope="module")
def smol():
    """Dense model, tokenizer, converted model under its untrained routers."""
    dense, tokenizer = load_model("smollm2-135m")
    calibration = load_blocks("c4+wiki", tokenizer, context=256, tokens=1024, split="calibration")
    return dense, tokenizer, convert(dense, DynaMoEConfig(router_init_std=1.0), calibration=calibration)


def wide(documents):
    return documents.pivot(index="doc_id", columns="metric", values="value")


def values(scores) -> dict[str, float]:
    return scores.set_index("metric")["value"].to_dict()


@pytest.mark.slow  # two to three minutes on two free cores
@pytest.mark.assets
@pytest.mark.parametrize(
    ("task", "limit", "expected"), [("sciq", 200, {"acc": 0.73, "acc_norm": 0.715}), ("lambada_openai", 400, {"acc": 0.305})]
)
def test_the_scores_of_stock_lm_eval(task, limit, expected):
    dense, tokenizer = load_model("smollm2-135m")
    scores, _ = evaluate_task(dense, tokenizer, task, limit=limit, batch_size=16)
    assert {metric: round(values(scores)[metric], 9) for metric in expected} == expected
    assert values(scores)["share_outside_model"] < 0.15


@pytest.mark.real
def test_document_by_document_as_the_stock_class(smol):
    dense, tokenizer, _ = smol
    for name, limit in (("arc_easy", 6), ("lambada_openai", 8)):
        (task,) = load_tasks([name]).values()
        task.build_all_requests(limit=limit)
        stock = HFLM(pretrained=dense, tokenizer=tokenizer, batch_size=4).loglikelihood(task.instances, disable_tqdm=True)
        ours = BenchmarkLM(dense, tokenizer, batch_size=8).loglikelihood(task.instances, disable_tqdm=True)
        assert [log for log, _ in ours] == pytest.approx([log for log, _ in stock], abs=2e-3)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in stock]


@pytest.mark.real
@torch.no_grad()
def test_batches_and_pads_change_nothing(smol):
    """Batch 16 has pads, batch 1 none; both count what single forwards count, and choose alike."""
    _, tokenizer, model = smol
    (alone, first), (together, second) = (evaluate_task(model, tokenizer, "arc_easy", limit=10, batch_size=size) for size in (1, 16))
    first, second = wide(first), wide(second)
    assert (first["loglikelihood"] - second["loglikelihood"]).abs().max() < 5e-3
    assert (first.loc[first["choice"] != second["choice"], "margin"] < 5e-3).all()

    (task,) = load_tasks(["arc_easy"]).values()
    task.build_all_requests(limit=10)
    texts = dict.fromkeys(
        tuple(tokenizer(context + answer)["input_ids"][:-1]) for context, answer in (item.args for item in task.instances)
    )
    used, tokens = 0.0, 0
    for ids in texts:
        experts = torch.stack(model(torch.tensor([ids]), output_router_logits=True).experts)
        used += float(torch.tensor(model.moe.experts)[experts].mean(0).sum())
        tokens += len(ids)
    assert 0.3 < used / tokens < 0.95
    for scores in (alone, together):
        row = scores.set_index("metric").loc["active_mlp_fraction"]
        assert row["n"] == tokens
        assert row["value"] == pytest.approx(used / tokens, rel=1e-4), "a router's ties aside"


@pytest.mark.real
def test_all_seven_tasks_run(smol):
    dense, tokenizer, _ = smol
    scores, documents = evaluate_benchmarks(dense, tokenizer, limit=2)
    assert tuple(scores["task"].unique()) == TASKS
    table = scores.pivot(index="task", columns="metric", values="value")
    assert table["bits_per_byte"].between(0.01, 10).all()
    assert table["acc_norm"].notna().sum() == 5, "WinoGrande and LAMBADA have none"
    assert table["perplexity"].notna().sum() == 1
    assert documents.groupby("task")["doc_id"].nunique().eq(2).all()
    assert {split for split in scores["split"] if "stock" in split} == {"validation (stock: test)"}


@pytest.mark.slow
@pytest.mark.assets
def test_the_stock_command_gives_the_same_scores_without_this_package(tmp_path):
    """`lm_eval` on a converted checkpoint that brings its code along, on exported files, in an environment that lacks this package."""
    dense, tokenizer = load_model("smollm2-pico")
    calibration = load_blocks("c4", tokenizer, context=64, tokens=512, split="calibration")
    model = convert(dense, DynaMoEConfig(router_init_std=1.0), calibration=calibration)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    names = export_tasks(tmp_path / "tasks", ["sciq", "winogrande", "lambada_openai", "hellaswag"])
    python = bare_environment(tmp_path / "venv")
    keep = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "LD_LIBRARY_PATH") if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path), "TOKENIZERS_PARALLELISM": "false"}
    missing = subprocess.run([python, "-c", "import dynamoe_lab"], env=keep, capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'dynamoe_lab'" in missing.stderr
    arguments = f"--model hf --model_args pretrained={tmp_path}/model,trust_remote_code=True,dtype=float32 --include_path {tmp_path}/tasks"
    more = f"--tasks {','.join(names)} --limit 25 --batch_size 4 --device cpu --output_path {tmp_path}/results.json --log_samples"
    command = [python, "-m", "lm_eval", *arguments.split(), *more.split()]
    done = subprocess.run(command, env={**keep, **offline}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("results*.json")
    results = json.loads(written.read_text())
    scores, documents = evaluate_benchmarks(model, tokenizer, [name.removesuffix("_local") for name in names], limit=25)
    for name in names:
        theirs, task = results["results"][name], name.removesuffix("_local")
        ours = values(scores[scores["task"] == task])
        for metric in ("acc", "acc_norm", "perplexity"):
            assert (metric in ours) == (f"{metric},none" in theirs)
            if metric in ours:
                assert ours[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-4), (name, metric)
        (samples,) = tmp_path.glob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        accuracy = wide(documents[documents["task"] == task])["acc"]
        assert [row["acc"] for row in sorted(rows, key=lambda row: row["doc_id"])] == accuracy.tolist()
    assert values(scores[scores["task"] == "sciq"])["active_mlp_fraction"] < 1
