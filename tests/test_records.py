"""Records: what is written is what is read, a killed run reads as interrupted, and no path of the machine stands in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.files import locked, read_json, told_when_full, without_paths, write_atomic, write_json
from dynamoe_lab.workbench.records import (
    Artifact,
    Environment,
    Finding,
    Record,
    Results,
    RunError,
    RunInfo,
    Scalar,
    StepUse,
    StoredFile,
    effective_status,
    load_record,
    load_records,
    missing_files,
    process_identity,
)


def make_record(name: str = "04_router_confusion", **run) -> Record:
    """A record with something in every field."""
    info = {"title": "Router confusion", "question": "Where?", "config": {"dynamoe": {"theta": 0.9}}, "status": "ok", "seconds": 1.5, **run}
    return Record(
        RunInfo(name, **info),
        Results(
            scalars=[Scalar("accuracy", 0.5, n=100, low=0.4, high=0.6), Scalar("parameters", 134_515_008, unit="weights")],
            figures=[Artifact("confusion", "Who is taken for whom.", [StoredFile("confusion.png", "ab", 3)])],
            tables=[Artifact("summary", "A table.")],
            fragments=[Artifact("sentence", "A coloured text.")],
            findings=[Finding("It errs next door.", "confusion")],
            steps=[StepUse("train", "0" * 32, True, 12.0, False)],
        ),
        Environment(commit="c0ffee", code="d1", packages={"torch": "2.13.0"}, seeds={"train": 0}),
    )


def test_a_record_survives_writing_and_reading(tmp_path):
    record = make_record(error=RunError("ValueError", "bad", 3, "Train", ["line"]), peak_memory_bytes=5, pid=7, process_started=1.25)
    record.write(tmp_path)
    assert load_record(tmp_path) == record
    assert list(json.loads((tmp_path / "record.json").read_text())) == ["run", "results", "env", "format"]
    assert isinstance(load_record(tmp_path).results.scalars[1].value, int)  # a count is not rounded


def test_numbers_that_are_none_are_valid_json(tmp_path):
    record = make_record()
    record.results.scalars = [Scalar("diverged", float("inf"), low=float("nan"))]
    record.write(tmp_path)
    text = (tmp_path / "record.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    scalar = load_record(tmp_path).results.scalars[0]
    assert scalar.value == float("inf")
    assert scalar.low != scalar.low


def test_records_come_in_notebook_order(tmp_path):
    for name in ("10_any", "04_b", "01_a"):
        (tmp_path / name).mkdir()
        make_record(name).write(tmp_path / name)
    (tmp_path / "not_a_run").mkdir()
    assert [record.run.name for record in load_records(tmp_path)] == ["01_a", "04_b", "10_any"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": 9, "run": {}}', '{"format": 1, "run": {}}', '{"format": 1, "run": {"name": "a", "seconds": "x"}}'],
)
def test_an_unreadable_record_names_its_file(tmp_path, content):
    (tmp_path / "04_a").mkdir()
    (tmp_path / "04_a" / "record.json").write_text(content)
    with pytest.raises(InputError, match=r"04_a.record\.json"):
        load_records(tmp_path)


def test_entries_of_later_versions_are_left_aside(tmp_path):
    make_record().write(tmp_path)
    content = json.loads((tmp_path / "record.json").read_text())
    content["run"]["mood"] = "sunny"
    del content["run"]["title"]
    (tmp_path / "record.json").write_text(json.dumps(content))
    assert load_record(tmp_path).run.title == ""


def test_records_of_earlier_versions_are_read(tmp_path):
    """Written before findings could be headlines and texts were kept."""
    make_record().write(tmp_path)
    content = json.loads((tmp_path / "record.json").read_text())
    del content["results"]["fragments"], content["results"]["findings"][0]["headline"]
    (tmp_path / "record.json").write_text(json.dumps(content))
    results = load_record(tmp_path).results
    assert results.findings == [Finding("It errs next door.", "confusion", headline=False)]
    assert results.fragments == []


def test_running_is_running_only_while_its_process_lives():
    pid, started = process_identity()
    assert effective_status(make_record(status="running", pid=pid, process_started=started)) == "running"
    assert (
        effective_status(make_record(status="running", pid=pid, process_started=started - 100)) == "interrupted"
    )  # the pid was used again
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert effective_status(make_record(status="running", pid=gone.pid, process_started=started)) == "interrupted"
    assert effective_status(make_record(status="running")) == "interrupted"


def test_stale_is_told_by_code_and_source():
    record = make_record(source="s1")
    assert effective_status(record) == "ok"
    assert effective_status(make_record(status="failed")) == "failed"
    assert effective_status(make_record(status="nonsense")) == "failed"


def test_missing_files_are_those_gone_or_changed(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_text(name)
    record = make_record()
    record.results.figures = [Artifact("a", "c", [StoredFile.of(tmp_path / name) for name in ("a.png", "b.png", "c.png")])]
    (tmp_path / "b.png").write_text("other")
    (tmp_path / "c.png").unlink()
    assert missing_files(record, tmp_path) == ["b.png", "c.png"]


def test_atomic_writing_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(InputError, match=r"no space left in .*make room"), told_when_full(tmp_path, "make room"):
        write_atomic(path, "x")
    assert read_json(path) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_paths_of_the_machine_are_shortened(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(tmp_path / "cache"))
    project, packages = tmp_path / "someone" / "project", Path(pytest.__file__).parents[1]
    text = [
        f"{project}/notebooks/a.ipynb",
        f"{project}-other/x",
        f"{tmp_path}/someone/y",
        {"k": f"{tmp_path}/cache/steps"},
        f"{packages}/pytest",
        3,
    ]
    assert without_paths(text, project) == [
        "./notebooks/a.ipynb",
        "~/project-other/x",
        "~/y",
        {"k": "$DYNAMOE_LAB_HOME/steps"},
        "site-packages/pytest",
        3,
    ]


def test_a_held_lock_refuses_with_the_holders_pid(tmp_path):
    with locked(tmp_path / "run.lock"):
        script = (
            "import sys; from pathlib import Path; from dynamoe_lab.workbench.files import locked\n"
            "from dynamoe_lab.errors import InputError\n"
            "try:\n    locked(Path(sys.argv[1]), refuses='held by {pid}').__enter__()\nexcept InputError as error:\n    print(error)"
        )
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run.lock")], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == f"held by {os.getpid()}", done.stderr
    with locked(tmp_path / "run.lock", refuses="no"):
        pass
