"""What a task file is made of: every file that decides a score is found, and one that is missing is told in a line."""

import os

import pytest

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.task_sources import task_sources
from dynamoe_lab.workbench.steps import run_step


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A task file that includes another, names functions of modules beside both, and reads two files by a pattern."""
    (tmp_path / "parts" / "code").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.yaml").write_text(
        "include: parts/base.yaml\ntask: mine\ndoc_to_text: !function utils.text\n"
        "metric_list: [{metric: !function code.scores.exact}, {metric: !function math.sqrt}]\n"
        "dataset_kwargs: {data_files: {test: 'data/*.jsonl', train: [more.jsonl, 'https://far.away/x.jsonl']}}\n"
    )
    (tmp_path / "parts" / "base.yaml").write_text(
        "dataset_path: json\ndoc_to_target: !function code.scores.target\ndataset_kwargs: {data_files: gone.jsonl}\n"
    )
    for name in ("utils.py", "parts/code/scores.py", "data/a.jsonl", "data/b.jsonl", "more.jsonl", "unused.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


READ = ("mine.yaml", "parts/base.yaml", "parts/code/scores.py", "utils.py", "data/a.jsonl", "data/b.jsonl", "more.jsonl")


def names(task, folder) -> list[str]:
    return [os.path.relpath(path, folder) for path in task_sources(task)]


def test_every_file_that_decides_a_score_is_named_once(folder):
    assert names("mine.yaml", folder) == list(READ), "the included data_files are overruled; math is no file"
    assert task_sources(folder / "mine.yaml") == task_sources("mine.yaml") == task_sources("./mine.yaml")


@pytest.mark.parametrize("name", ["sciq", "hub:sciq", "arc_easy"])
def test_a_name_is_no_file(name):
    assert task_sources(name) == []


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("dataset_kwargs: {data_files: more.jsonl}", ["more.jsonl"]),
        ("dataset_kwargs: {data_files: [more.jsonl, data/a.jsonl]}", ["more.jsonl", "data/a.jsonl"]),
        ("dataset_kwargs: {data_dir: data, data_files: {test: b.jsonl}}", ["data/b.jsonl"]),
        ("dataset_kwargs: {data_dir: data}", ["data"]),
        ("dataset_path: ./data\ndataset_kwargs: {data_files: {test: b.jsonl}}", ["data/b.jsonl"]),
        ("dataset_path: ./data", ["data"]),
        ("dataset_path: data", []),
        ("dataset_path: allenai/ai2_arc\ndataset_name: ARC-Easy", []),
    ],
)
def test_data_is_looked_up_as_datasets_does(folder, options, found):
    (folder / "mine.yaml").write_text(f"task: mine\n{options}\n")
    assert names("mine.yaml", folder) == ["mine.yaml", *found]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dataset_kwargs: {data_files: {test: nowhere.jsonl}}", "no data file nowhere.jsonl .relative to .*; write it, or correct"),
        ("dataset_kwargs: {data_files: 'data/*.csv'}", r"no data file data/\*.csv"),
        ("dataset_kwargs: {data_files: /nowhere/x.jsonl}", "no data file /nowhere/x.jsonl; write it"),
        ("include: nowhere.yaml", "includes .*nowhere.yaml, which is not there"),
        ("include: mine.yaml", "includes itself"),
        ("include: [broken", "cannot be loaded"),
        ("- a\n- b", "holds no fields"),
    ],
)
def test_what_is_missing_is_one_line(folder, text, told):
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=f"^task file mine.yaml: .*{told}") as caught:
        task_sources("mine.yaml")
    assert "\n" not in str(caught.value)


def given(task: str) -> str:
    return task


given.step_reads = {"task": task_sources}


def test_a_steps_key_has_their_contents(folder):
    def cached(task="mine.yaml") -> bool:
        return run_step(given, (task,), home=folder / "home").cached

    assert [cached(), cached(), cached(folder / "mine.yaml")] == [False, True, True], "however the file is named"
    for name in READ:
        (folder / name).write_text((folder / name).read_text() + "# changed\n")
        assert [cached(), cached()] == [False, True], name
    (folder / "unused.py").write_text("# changed\n")
    assert cached()
    assert not cached("sciq"), "a name stands for itself"
    assert cached("sciq")
