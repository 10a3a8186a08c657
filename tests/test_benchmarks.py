"""Scores on small tasks with pico models, each number against a second way of computing it; pads are nobody's tokens."""

import contextlib
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import PICO, make_converted, make_dense
from lm_eval.api.metrics import mean_stderr
from lm_eval.models.huggingface import HFLM

from dynamoe_lab.conversion import export
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import evaluate_benchmarks, evaluate_task, load_tasks
from dynamoe_lab.evaluation.benchmark_lm import BenchmarkLM
from dynamoe_lab.workbench.steps import run_step

SCORES = ["run", "task", "split", "metric", "value", "stderr", "n", "task_version", "batch_size", "dtype"]
DOCUMENTS = ["run", "task", "doc_id", "metric", "value", "n", "digest"]
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{' ' + choices[answer]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}


@pytest.fixture
def tokenizer():
    """One word a token: `w17` is token 17; without a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, PICO["vocab_size"]))]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in rng.integers(3, PICO["vocab_size"], count))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Documents of task files are kept below the home folder."""
    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(tmp_path / "own-home"))


@pytest.fixture
def make_task(tmp_path):
    """make(definition) writes a task file with 24 documents; contexts of 1 to 30 words, choices of 2 to 6."""

    def make(definition=CHOICES, name="mine", documents=24, longest=30):
        rng = np.random.default_rng(0)
        rows = []
        for _ in range(documents):
            shared = words(rng, 2)
            choices = [words(rng, 2), words(rng, 6), f"{shared} {words(rng, 1)}", f"{shared} {words(rng, 1)}"]  # two share a forward
            rng.shuffle(choices)
            rows.append({"question": words(rng, rng.integers(1, longest + 1)), "choices": choices, "answer": int(rng.integers(4))})
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, **definition, "metadata": {"version": 3}}))
        return path, rows

    return make


def tokens_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@torch.no_grad()
def answer(model, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood and greediness from one forward of one unpadded sequence."""
    ids, target = tokens_of(f"{context} {continuation}"), torch.tensor(tokens_of(continuation))
    logs = model(torch.tensor([ids])).logits[0, -len(target) - 1 : -1].log_softmax(-1)
    return float(logs.gather(1, target[:, None]).sum()), bool((logs.argmax(-1) == target).all())


def wide(documents: pd.DataFrame) -> pd.DataFrame:
    return documents.pivot(index="doc_id", columns="metric", values="value")


def value(scores: pd.DataFrame, metric: str) -> float:
    return scores.set_index("metric").loc[metric, "value"]


# --- scores --------------------------------------------------------------------------------------------------------------------------


def test_choices_are_scored_document_by_document(make_task, tokenizer):
    path, rows = make_task()
    model = make_dense()
    scores, documents = evaluate_task(model, tokenizer, path, batch_size=5, run="r")
    assert list(scores.columns) == SCORES
    assert list(documents.columns) == DOCUMENTS
    found = wide(documents)
    for index, row in enumerate(rows):
        logs = np.array([answer(model, row["question"], choice)[0] for choice in row["choices"]])
        right, bytes_ = row["answer"], len(row["choices"][row["answer"]].encode()) + 1
        line = found.loc[index]
        assert line["choice"] == logs.argmax()
        assert line["margin"] == pytest.approx(np.sort(logs)[-1] - np.sort(logs)[-2], abs=1e-4)
        assert line["acc"] == (logs.argmax() == right)
        assert line["acc_norm"] == ((logs / [len(choice) for choice in row["choices"]]).argmax() == right)
        assert line["loglikelihood"] == pytest.approx(logs[right], abs=1e-4)
        assert line["bits_per_byte"] == pytest.approx(-logs[right] / math.log(2) / bytes_, abs=1e-5)
    assert 0 < found["acc"].mean() < 1
    for metric in ("acc", "acc_norm", "bits_per_byte"):
        assert value(scores, metric) == pytest.approx(found[metric].mean())
        assert scores.set_index("metric").loc[metric, "stderr"] == pytest.approx(mean_stderr(found[metric].tolist()))
    constants = scores[["run", "task", "split", "task_version", "batch_size", "dtype"]].drop_duplicates()
    assert constants.values.tolist() == [["r", "mine", "test", "3", 5, "float32"]]
    assert set(documents["n"]) == {len(rows)}


def test_last_words_have_a_perplexity(make_task, tokenizer):
    path, rows = make_task(LAST_WORD)
    model = make_dense()
    scores, documents = evaluate_task(model, tokenizer, path)
    expected = [answer(model, row["question"], row["choices"][row["answer"]]) for row in rows]
    logs = np.array([log for log, _ in expected])
    found = wide(documents)
    assert found["loglikelihood"].to_numpy() == pytest.approx(logs, abs=1e-4)
    assert found["acc"].tolist() == [float(greedy) for _, greedy in expected]
    assert "perplexity" not in found
    row = scores.set_index("metric").loc["perplexity"]
    assert row["value"] == pytest.approx(math.exp(-logs.mean()), rel=1e-4)
    rng = np.random.default_rng(0)
    resampled = [-rng.choice(logs, len(logs)).mean() for _ in range(4000)]
    assert row["stderr"] / row["value"] == pytest.approx(np.std(resampled), rel=0.1), "relative error: that of the mean log-likelihood"


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_answers_are_those_of_the_stock_class(family, batch_size, make_task, tokenizer):
    """Every family: mask, positions and the head on some positions only change nothing."""
    path, _ = make_task()
    (task,) = load_tasks([path]).values()
    task.build_all_requests()
    for model in (make_dense(family), make_converted(family)):
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size).loglikelihood(task.instances, disable_tqdm=True)
        ours = BenchmarkLM(model, tokenizer, batch_size=batch_size).loglikelihood(task.instances, disable_tqdm=True)
        assert [log for log, _ in ours] == pytest.approx([log for log, _ in stock], abs=2e-4)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in stock]


def test_too_long_texts_lose_their_beginning_as_in_the_stock_class(make_task, tokenizer):
    path, _ = make_task(documents=4, longest=300)
    (task,) = load_tasks([path]).values()
    task.build_all_requests()
    assert max(len(instance.args[0].split()) for instance in task.instances) > PICO["max_position_embeddings"]
    model = make_dense()
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3).loglikelihood(task.instances, disable_tqdm=True)
    ours = BenchmarkLM(model, tokenizer, batch_size=3).loglikelihood(task.instances, disable_tqdm=True)
    assert [log for log, _ in ours] == pytest.approx([log for log, _ in stock], abs=2e-4)


def test_the_head_runs_for_scored_positions_only(family, make_task, tokenizer):
    path, rows = make_task()
    for model in (make_dense(family), make_converted(family)):
        positions = []
        hook = model.get_output_embeddings().register_forward_hook(lambda head, args, _, seen=positions: seen.append(args[0].shape[:2]))
        evaluate_task(model, tokenizer, path, batch_size=1)
        hook.remove()
        expected = {}  # a forward predicts the longest of the answers that share it
        for row in rows:
            for choice in row["choices"]:
                ids = tuple(tokens_of(f"{row['question']} {choice}")[:-1])
                expected[ids] = max(expected.get(ids, 0), len(tokens_of(choice)))
        assert sum(batch * length for batch, length in positions) == sum(expected.values())


def test_an_answer_without_tokens_is_refused(make_task, tokenizer):
    path, _ = make_task({**LAST_WORD, "doc_to_target": "{{''}}"})
    with pytest.raises(InputError, match="task mine, document 0: an answer of 0 tokens cannot be scored: give 1 to 128"):
        evaluate_task(make_dense(), tokenizer, path)


def test_half_precision_is_scored_in_single(make_task, tokenizer):
    path, _ = make_task()
    scores, documents = evaluate_task(make_dense(dtype="bfloat16"), tokenizer, path)
    assert set(scores["dtype"]) == {"bfloat16"}
    logs = wide(documents)["loglikelihood"].to_numpy()
    assert (torch.tensor(logs).bfloat16().double().numpy() != logs).any(), "log-likelihoods rounded to bfloat16"


def test_a_limit_takes_the_first_documents(make_task, tokenizer):
    path, _ = make_task()
    model = make_dense()
    _, few = evaluate_task(model, tokenizer, path, limit=5)
    _, all_ = evaluate_task(model, tokenizer, path)
    assert wide(few).index.tolist() == list(range(5))
    pd.testing.assert_frame_equal(wide(few), wide(all_).head(5), atol=1e-4)
    assert evaluate_task(model, tokenizer, path, limit=1_000)[1]["doc_id"].nunique() == 24


def test_tables_of_several_tasks(make_task, tokenizer):
    first, second = make_task(CHOICES, "first")[0], make_task(LAST_WORD, "second")[0]
    scores, documents = evaluate_benchmarks(make_dense(), tokenizer, [second, first], limit=4, run="r")
    assert scores["task"].unique().tolist() == documents["task"].unique().tolist() == ["second", "first"]
    assert scores.index.is_unique
    assert documents.dtypes["value"] == np.float64


# --- who was active ------------------------------------------------------------------------------------------------------------------


def forwards(rows: list[dict]) -> list[list[int]]:
    """The distinct inputs that the requests need: a continuation's last token is never read."""
    return [list(ids) for ids in dict.fromkeys(tuple(tokens_of(f"{r['question']} {c}")[:-1]) for r in rows for c in r["choices"])]


@torch.no_grad()
def counted(model, inputs: list[list[int]], what: str = "experts") -> tuple[float, float]:
    """Active parameters and MLP fraction over all tokens of single unpadded forwards, from the outputs' own experts and plain shapes."""
    width = 3 * PICO["hidden_size"]  # parameters of a neuron of a gated MLP without biases
    sizes = torch.tensor([round(share * PICO["intermediate_size"]) * width for share in model.moe.experts])
    used, tokens = 0, 0
    for ids in inputs:
        layers = getattr(model(torch.tensor([ids]), output_router_logits=True), what)
        used += int(sum(sizes[experts].sum() for experts in layers))
        tokens += len(ids)
    dense = PICO["num_hidden_layers"] * PICO["intermediate_size"] * width
    every = sum(parameter.numel() for parameter in model.parameters())
    return every - dense + used / tokens, used / tokens / dense


def test_pads_are_nobodys_tokens(make_task, tokenizer):
    """Batch 1 has no pads, batch 16 many: both count what single unpadded forwards count."""
    path, rows = make_task()
    model = make_converted()
    alone, together = (evaluate_task(model, tokenizer, path, batch_size=size)[0] for size in (1, 16))
    params, fraction = counted(model, forwards(rows))
    tokens = sum(map(len, forwards(rows)))
    for scores in (alone, together):
        assert value(scores, "active_params") == pytest.approx(params, rel=1e-12)
        assert value(scores, "active_mlp_fraction") == pytest.approx(fraction, rel=1e-12)
        assert set(scores.set_index("metric").loc[["active_params", "active_mlp_fraction"], "n"]) == {tokens}
    longest = max(map(len, forwards(rows)))
    padded = counted(model, [ids + [0] * (longest - len(ids)) for ids in forwards(rows)])
    assert abs(padded[1] - fraction) > 1e-3, "these pads would have shown"


def test_the_model_is_told_the_real_lengths(make_task, tokenizer, monkeypatch):
    path, rows = make_task()
    model, told = make_converted(), []
    forward = model.forward

    def watched(input_ids, attention_mask=None, **options):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values), "pads are on the right"
        told.extend(tuple(row[: int(length)].tolist()) for row, length in zip(input_ids, mask.sum(1), strict=True))
        return forward(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "forward", watched)
    evaluate_task(model, tokenizer, path, batch_size=16)
    assert sorted(told) == sorted(map(tuple, forwards(rows)))


def test_a_batch_changes_no_choice(make_task, tokenizer):
    path, _ = make_task(documents=60)
    model = make_converted()
    alone, together = (wide(evaluate_task(model, tokenizer, path, batch_size=size)[1]) for size in (1, 16))
    assert (alone["loglikelihood"] - together["loglikelihood"]).abs().max() < 1e-4
    changed = alone[alone["choice"] != together["choice"]]
    assert (changed["margin"] < 1e-3).all()


@pytest.mark.parametrize(("mode", "what"), [("label", "labels"), ("full", None), (2, None)])
def test_every_routing_is_counted(mode, what, make_task, tokenizer):
    path, rows = make_task()
    model = make_converted()
    model.set_routing(mode)
    scores, documents = evaluate_task(model, tokenizer, path, batch_size=16)
    if what:
        expected = counted(model, forwards(rows), what)[1]
        assert 0.25 < expected < 1
    else:
        expected = {"full": 1.0, 2: 0.75}[mode]
    assert value(scores, "active_mlp_fraction") == pytest.approx(expected, rel=1e-12)
    logs = [answer(model, row["question"], row["choices"][row["answer"]])[0] for row in rows]
    assert wide(documents)["loglikelihood"].to_numpy() == pytest.approx(np.array(logs), abs=1e-3)


def test_random_routing_is_counted_and_draws_the_same_again(make_task, tokenizer):
    path, rows = make_task(documents=60)
    model = make_converted()
    model.set_routing("random", shares=torch.tensor([[0.5, 0.0, 0.0, 0.5]] * 3), seed=1)
    first, again = (evaluate_task(model, tokenizer, path) for _ in range(2))
    pd.testing.assert_frame_equal(first[1], again[1])
    tokens = sum(map(len, forwards(rows)))
    sd = 0.375 / math.sqrt(3 * tokens)  # of the mean width: 0.25 or 1 with equal chances, in three layers
    assert value(first[0], "active_mlp_fraction") == pytest.approx(0.625, abs=4 * sd)


def test_dense_models_are_wholly_active(make_task, tokenizer):
    path, _ = make_task()
    model = make_dense()
    scores, _ = evaluate_task(model, tokenizer, path)
    assert value(scores, "active_params") == sum(parameter.numel() for parameter in model.parameters())
    assert value(scores, "active_mlp_fraction") == 1


def test_experts_of_a_stock_class_are_counted(make_task, tokenizer):
    """The export as a Mixtral: one expert of four a token; what share of the dense MLP that is, the file does not say."""
    from deployed_models import make_masked

    path, _ = make_task()
    masked = make_masked(attention="none")
    model = export(masked, form="mixtral")
    config = model.config
    scores, _ = evaluate_task(model, tokenizer, path)
    expert = 3 * config.hidden_size * config.intermediate_size
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert value(scores, "active_params") == whole - config.num_hidden_layers * 3 * expert
    assert math.isnan(value(scores, "active_mlp_fraction"))


# --- how it behaves ------------------------------------------------------------------------------------------------------------------


def test_everything_is_left_as_it_was(make_task, tokenizer):
    path, _ = make_task()
    model = make_converted().train()
    model.set_routing(1)
    assert tokenizer.pad_token is None
    evaluate_task(model, tokenizer, path, limit=2)
    assert tokenizer.pad_token is None
    assert model.training
    assert (model.routing.mode, model.routing.expert) == ("fixed", 1)
    assert not any(mlp.router._forward_hooks for mlp in model.nested_mlps())


def test_progress_is_ours_alone(make_task, tokenizer, capfd):
    path, _ = make_task()
    evaluate_task(make_dense(), tokenizer, path)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("mine: ")
    assert "tokens/s" in printed.err
    evaluate_task(make_dense(), tokenizer, path, progress=False)
    assert capfd.readouterr() == ("", "")


def test_time_outside_the_model_is_told(make_task, tokenizer, monkeypatch):
    path, _ = make_task()
    model, clock = make_dense(), [0.0]
    forward = model.forward
    monkeypatch.setattr("dynamoe_lab.evaluation.benchmarks.time.perf_counter", lambda: clock[0])

    def slow(*args, **kwargs):
        clock[0] += 3.0
        return forward(*args, **kwargs)

    def load(names, **options):
        clock[0] += 6.0
        return load_tasks(names, **options)

    monkeypatch.setattr(model, "forward", slow)
    monkeypatch.setattr("dynamoe_lab.evaluation.benchmarks.load_tasks", load)
    scores, _ = evaluate_task(model, tokenizer, path, limit=1, batch_size=1, progress=False)
    assert value(scores, "seconds_total") == 3 * 3.0 + 6.0  # four choices, of which two share a forward
    assert value(scores, "share_outside_model") == pytest.approx(6 / 15)


def test_a_killed_run_goes_on_with_the_next_task(make_task, tokenizer, tmp_path, monkeypatch):
    first, second = make_task(CHOICES, "first")[0], make_task(LAST_WORD, "second")[0]
    model, scored = make_converted(), []
    real = BenchmarkLM._loglikelihood_tokens

    def watched(self, requests, **options):
        scored.append(len(requests))
        if len(scored) == 2:
            raise KeyboardInterrupt
        return real(self, requests, **options)

    monkeypatch.setattr(BenchmarkLM, "_loglikelihood_tokens", watched)

    def run(**changes):
        options = {"limit": 6, "batch_size": 4, "run": "r", **changes}
        return [run_step(evaluate_task, (model, tokenizer, task), options, home=tmp_path / "home") for task in (first, second)]

    with contextlib.suppress(KeyboardInterrupt):
        run()
    assert len(scored) == 2
    done = run()
    assert [step.cached for step in done] == [True, False]
    assert len(scored) == 3, "the finished task was scored again"
    assert [list(frame.columns) for frame in done[0].value] == [SCORES, DOCUMENTS]
    assert [step.cached for step in run(progress=False)] == [True, True]
    for change in ({"limit": 5}, {"batch_size": 3}, {"definitions": "lm-eval 9"}):
        assert not any(step.cached for step in run(**change)), change
    model.set_routing("full")
    assert not any(step.cached for step in run())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"limit": 0}, "limit = 0: give a whole number of at least 1, or none for all documents"),
        ({"limit": -1}, "limit = -1"),
        ({"limit": True}, "limit = True"),
        ({"limit": 0.5}, "limit = 0.5"),
        ({"batch_size": 0}, "batch_size = 0: give a whole number of at least 1"),
        ({"batch_size": None}, "batch_size = None"),
    ],
)
def test_impossible_numbers_are_one_line(options, told, tokenizer):
    for function, tasks in ((evaluate_task, "sciq"), (evaluate_benchmarks, ["sciq"])):
        with pytest.raises(InputError, match=told) as caught:
            function(make_dense(), tokenizer, tasks, **options)
        assert "\n" not in str(caught.value)


def test_names_are_checked_before_anything_is_scored(make_task, tokenizer, monkeypatch):
    path, _ = make_task()
    monkeypatch.setattr(BenchmarkLM, "_loglikelihood_tokens", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        evaluate_benchmarks(make_dense(), tokenizer, [path, "nowhere.yaml"])
