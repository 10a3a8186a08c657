"""Task files of one's own: what is wrong with one is a line that names it, and its documents are those that are there now."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_dense
from test_benchmarks import CHOICES, LAST_WORD, make_task, own_cache, tokenizer, value, wide  # noqa: F401

import dynamoe_lab as lab
from dynamoe_lab.assets import home
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import evaluate_task, load_tasks
from dynamoe_lab.evaluation.tasks import task_split

GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 3},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "doc_to_choice": None,
    "metric_list": [{"metric": "bits_per_byte"}],
}


def refused(call, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def rewrite(path, rows) -> None:
    """Other documents for a task file, in a file of the same name, size and time."""
    data, text = path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows)
    before = data.stat()
    assert len(text.encode()) == before.st_size
    data.write_text(text)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))


class TestDocuments:
    def test_a_file_replaced_within_its_time_gives_the_new_documents(self, make_task):  # noqa: F811
        path, rows = make_task()
        (before,) = load_tasks([path]).values()
        rewrite(path, rows[::-1])
        (after,) = load_tasks([path]).values()
        assert [row["question"] for row in before.eval_docs] == [row["question"] for row in rows]
        assert [row["question"] for row in after.eval_docs] == [row["question"] for row in rows[::-1]]

    def test_they_are_kept_below_home_or_where_the_file_says(self, make_task, tmp_path, monkeypatch):  # noqa: F811
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "not-here")
        load_tasks([make_task()[0]])
        assert len(list((home() / "datasets").iterdir())) == 1
        path, _ = make_task(name="elsewhere")
        config = yaml.safe_load(path.read_text())
        config["dataset_kwargs"]["cache_dir"] = str(tmp_path / "there")
        path.write_text(yaml.safe_dump(config))
        load_tasks([path])
        assert list((tmp_path / "there").rglob("*.arrow"))
        assert str(datasets.config.HF_DATASETS_CACHE).endswith("not-here")
        assert not (tmp_path / "not-here").exists()

    def test_a_digest_stands_for_prompt_and_right_answer(self, make_task, tokenizer):  # noqa: F811
        path, rows = make_task()
        first = evaluate_task(make_dense(), tokenizer, path, limit=6)[1]
        assert (first.groupby("doc_id")["digest"].nunique() == 1).all()
        assert first["digest"].nunique() == 6
        assert wide(first).notna().all(axis=None)
        again = evaluate_task(make_dense(seed=1), tokenizer, path, limit=6, batch_size=1)[1]
        assert again["digest"].tolist() == first["digest"].tolist(), "of another model"
        rows[0]["answer"] = (rows[0]["answer"] + 1) % 4
        rows[2]["choices"] = rows[2]["choices"][::-1]
        rewrite(path, rows)
        changed = evaluate_task(make_dense(), tokenizer, path, limit=6)[1]
        digests = [frame.drop_duplicates("doc_id").set_index("doc_id")["digest"] for frame in (first, changed)]
        assert np.flatnonzero((digests[0] != digests[1]).to_numpy()).tolist() == [0, 2]

    def test_a_split_is_told_as_the_file_says(self, make_task):  # noqa: F811
        path, _ = make_task()
        (task,) = load_tasks([path]).values()
        assert task_split(path, task) == "test"
        path.write_text(path.read_text().replace("version: 3", "version: 3\n  documents: test (mine)"))
        (task,) = load_tasks([path]).values()
        assert task_split(path, task) == "test (mine)"


class TestRightChoices:
    def test_a_target_that_is_no_choice_is_refused(self, make_task, tokenizer):  # noqa: F811
        path, _ = make_task({**CHOICES, "doc_to_target": "answr"})
        told = (
            r"task file .*mine.yaml: no document has a right choice: doc_to_target \(answr\) gives 'answr' for the first one, .*correct it"
        )
        refused(lambda: evaluate_task(make_dense(), tokenizer, path), told)

    def test_some_without_one_are_told_and_counted_as_wrong(self, make_task, tokenizer, capfd):  # noqa: F811
        path, rows = make_task()
        for number in (3, 7):
            rows[number]["answer"] = 9
        rewrite(path, rows)
        scores, documents = evaluate_task(make_dense(), tokenizer, path, progress=False)
        told = capfd.readouterr().err
        assert told.count("\n") == 1
        assert "2 of 24 documents have no right choice by doc_to_target (answer), the first is document 3; they count as wrong" in told
        found, n = wide(documents), scores.set_index("metric")["n"]
        assert found.index[found["bits_per_byte"].isna()].tolist() == [3, 7]
        assert found.loc[[3, 7], "acc"].tolist() == [0, 0]
        assert (n["acc"], n["acc_norm"], n["bits_per_byte"]) == (24, 24, 22)
        assert value(scores, "bits_per_byte") == pytest.approx(found["bits_per_byte"].mean())
        assert value(scores, "acc") == pytest.approx(found["acc"].sum() / 24)

    def test_texts_and_several_right_choices_are_choices(self, make_task, tokenizer, capfd):  # noqa: F811
        path, _ = make_task({**CHOICES, "doc_to_target": "{{choices[answer]}}"})
        _, texts = evaluate_task(make_dense(), tokenizer, path, progress=False)
        assert wide(texts)["bits_per_byte"].notna().all()
        path, _ = make_task({**CHOICES, "doc_to_target": "{{[answer, 0]}}"}, name="several")
        scores, several = evaluate_task(make_dense(), tokenizer, path, progress=False)
        assert capfd.readouterr().err == ""
        assert value(scores, "acc") >= wide(texts)["acc"].mean()
        assert "bits_per_byte" not in wide(several)

    def test_spaces_that_are_scored_with_the_answer_are_among_its_bytes(self, make_task, tokenizer):  # noqa: F811
        for name, text in (("tight", "{{question}}"), ("loose", "{{question}}  ")):
            path, rows = make_task({**CHOICES, "doc_to_text": text}, name=name)
            (task,) = load_tasks([path]).values()
            assert task.doc_to_text(rows[0]) == rows[0]["question"] + text[12:]
            found = wide(evaluate_task(make_dense(), tokenizer, path)[1])
            size = np.array([len(row["choices"][row["answer"]].encode()) + 1 + len(text[12:]) for row in rows])
            assert found["bits_per_byte"].to_numpy() == pytest.approx(-found["loglikelihood"].to_numpy() / np.log(2) / size)


class TestErrors:
    def test_they_are_a_line_that_names_the_file(self, make_task, tokenizer, tmp_path):  # noqa: F811
        (tmp_path / "mine.py").write_text(
            "def text(document):\n    return str(1 / (len(document['question'].split()) - LENGTH))\n".replace("LENGTH", "9")
        )
        path, rows = make_task()
        path.write_text(path.read_text().replace("'{{question}}'", "!function mine.text"))
        assert "!function" in path.read_text()
        refused(
            lambda: evaluate_task(make_dense(), tokenizer, path, trust_remote_code=True),
            "task file .*mine.yaml: cannot be scored .ZeroDivisionError: division by",
        )
        path, rows = make_task(name="empty")
        path.with_suffix(".jsonl").write_text("".join(json.dumps({**row, "answer": None}) + "\n" for row in rows))
        with pytest.raises(InputError, match=r"task file .*empty.yaml: cannot be scored .TypeError") as caught:
            evaluate_task(make_dense(), tokenizer, path)
        assert isinstance(caught.value.__cause__, TypeError)

    def test_an_error_of_the_model_is_not_the_files(self, make_task, tokenizer, monkeypatch):  # noqa: F811
        path, _ = make_task()
        model = make_dense()

        def broken(*args, **options):
            raise RuntimeError("defect")

        monkeypatch.setattr(model, "forward", broken)
        with pytest.raises(RuntimeError, match="defect"):
            evaluate_task(model, tokenizer, path)

    def test_one_choice_has_no_margin(self, make_task, tokenizer):  # noqa: F811
        path, rows = make_task()
        path.with_suffix(".jsonl").write_text(
            "".join(json.dumps({**row, "choices": row["choices"][:1], "answer": 0}) + "\n" for row in rows)
        )
        scores, documents = evaluate_task(make_dense(), tokenizer, path)
        assert wide(documents)["margin"].isna().all()
        assert value(scores, "acc") == 1

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"unsafe_code": True}, r"task .*mine.yaml: runs code that a model writes \(unsafe_code: true\)"),
            ({"task": None}, r"task file .*mine.yaml: names no task; write `task: `"),
            (
                {"metric_list": [{"metric": "akuracy", "aggregation": "mean"}]},
                "task file .*mine.yaml: metric 'akuracy' is none of lm-eval's; did you mean",
            ),
        ],
    )
    def test_what_cannot_be_loaded(self, make_task, change, told):  # noqa: F811
        path, _ = make_task()
        config = {**yaml.safe_load(path.read_text()), **change}
        path.write_text(yaml.safe_dump({key: entry for key, entry in config.items() if entry is not None}))
        refused(lambda: load_tasks([path]), told)

    def test_no_documents(self, make_task):  # noqa: F811
        path, _ = make_task()
        path.with_suffix(".jsonl").write_text("")
        refused(lambda: load_tasks([path]), "task file .*mine.yaml: its data hold no documents")

    def test_hub_and_a_file(self):
        refused(
            lambda: load_tasks(["hub:colors.yaml"]),
            "task 'hub:colors.yaml': hub: goes before a name of lm-eval; give the file as colors.yaml",
        )


class TestKinds:
    def test_generated_answers_are_timed(self, make_task, tokenizer):  # noqa: F811
        path, _ = make_task(GENERATE)
        scores, documents = evaluate_task(make_dense(), tokenizer, path, limit=3)
        assert 0 < value(scores, "share_outside_model") < 1
        assert value(scores, "exact_match") == wide(documents)["exact_match"].mean()
        assert documents["digest"].nunique() == 3

    def test_whole_texts_have_their_n(self, make_task, tokenizer):  # noqa: F811
        path, _ = make_task(ROLLING)
        scores, documents = evaluate_task(make_dense(), tokenizer, path, limit=5)
        assert scores.set_index("metric").loc["bits_per_byte", "n"] == 5
        assert documents.empty

    def test_texts_that_lose_their_beginning_are_told(self, make_task, tokenizer, capfd):  # noqa: F811
        path, rows = make_task(documents=6, longest=300)
        evaluate_task(make_dense(), tokenizer, path, progress=False)
        long = sum(len(f"{row['question']} {choice}".split()) > 129 for row in rows for choice in row["choices"])
        assert 0 < long < 24
        assert f"{long} of 24 prompts are longer than the model's 128 positions and lose their beginning" in capfd.readouterr().err


def test_a_tokenizer_is_left_whole(make_task):  # noqa: F811
    """Without an end or unknown token lm-eval adds a token to the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(3, 128)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w5")
    evaluate_task(make_dense(), bare, make_task()[0], limit=2)
    assert (len(bare), bare.pad_token) == (125, None)


def test_numbers_of_numpy_are_numbers(make_task, tokenizer):  # noqa: F811
    path, _ = make_task()
    assert evaluate_task(make_dense(), tokenizer, path, limit=np.int64(3), batch_size=np.int32(2))[1]["doc_id"].nunique() == 3


def test_tasks_and_limit_are_checked_without_a_model(make_task):  # noqa: F811
    path, _ = make_task()
    assert lab.check_tasks([path], limit=3) == [path]
    assert lab.check_tasks(str(path)) == [str(path)]
    refused(lambda: lab.check_tasks([path], limit=0), "limit = 0: give a whole number of at least 1")
    refused(lambda: lab.check_tasks([path, path.with_name("nowhere.yaml")]), "nowhere.yaml: no such file")
    refused(lambda: lab.check_tasks([path, path]), "named twice")


def test_the_readmes_task_file_is_one(tmp_path, monkeypatch, tokenizer):  # noqa: F811
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    definition = re.search(r"```yaml\n(task: .*?)```", text, re.S)[1]
    document = re.search(r"# colors.jsonl: (\{.*\})", definition)[1]
    (tmp_path / "colors.yaml").write_text(definition)
    (tmp_path / "colors.jsonl").write_text(document + "\n")
    monkeypatch.chdir(tmp_path)
    scores, documents = evaluate_task(make_dense(), tokenizer, "colors.yaml")
    assert scores.set_index("metric").loc["acc", "n"] == 1
    assert "bits_per_byte" in wide(documents)


def test_perplexity_tasks_have_no_choices_to_check(make_task, tokenizer, capfd):  # noqa: F811
    evaluate_task(make_dense(), tokenizer, make_task(LAST_WORD)[0], progress=False)
    assert capfd.readouterr().err == ""
