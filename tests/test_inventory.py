"""`ls` and `show`: what stands in records and steps is what is told, also of runs that failed, are stale, or cannot be read."""

import json
import os
import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_records import make_record

from dynamoe_lab.config import load_experiment
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.inventory import find_run, list_runs, list_steps, run_rows
from dynamoe_lab.workbench.named_files import named_files
from dynamoe_lab.workbench.records import Place, RunError, StoredFile, load_record
from dynamoe_lab.workbench.runlog import RunLog
from dynamoe_lab.workbench.showing import run_facts, show_run
from dynamoe_lab.workbench.steps import run_step
from dynamoe_lab.workbench.terminal import table_text


def numbers(count: int) -> dict:
    return {"numbers": list(range(count))}


def write(folder: Path, record, size: int = 3000) -> None:
    folder.mkdir(parents=True)
    record.write(folder)
    (folder / "figure.png").write_bytes(b"x" * (size - (folder / "record.json").stat().st_size))


def up_to_date(name: str, **run):
    """A record made by today's code, with the files it names."""
    record = make_record(name, **run)
    record.env.code, record.env.rooms = environment.code_digest(), environment.room_digests()
    record.env.packages = {}
    record.results.figures = []
    return record


@pytest.fixture
def reports(project):
    """Two reports: one run with today's code, one with other code, one that failed, one that no one can read."""
    folder = project / "reports"
    ago = datetime.now(UTC) - timedelta(hours=3, minutes=5)
    write(
        folder / "quick" / "04_router_confusion", up_to_date("04_router_confusion", finished=ago.isoformat(), seconds=75.0), size=20 * 2**20
    )
    other = up_to_date("05_expert_usage", peak_memory_bytes=700 * 2**20)
    other.env.code, other.env.rooms = "other", environment.room_digests() | {"training": "other", "models": "other"}
    write(folder / "quick" / "05_expert_usage", other)
    failed = make_record("04_router_confusion", status="failed", error=RunError("ValueError", "too hot", 3, "Train", ["line 1", "line 2"]))
    write(folder / "smoke" / "04_router_confusion", failed)
    write(folder / "smoke" / "06_pareto", make_record("06_pareto"))
    (folder / "smoke" / "06_pareto" / "record.json").write_text("{")
    return folder


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_runs_are_listed_with_their_true_state_and_why(reports, project):
    text = list_runs(reports, project)
    lines = rows(text)
    assert lines[0] == ["run", "state", "age", "time", "memory", "disk", "why"]
    assert lines[1] == ["quick/04_router_confusion", "ok", "3 h", "75 s", "20 MB"]
    assert lines[2][:3] == ["quick/05_expert_usage", "stale", "1.5 s"]
    assert lines[2][3] == "700 MB"
    assert lines[2][-1] == "code of models, training changed"
    assert lines[3][:2] == ["smoke/04_router_confusion", "failed"]
    assert lines[3][-1].startswith("ValueError in cell 3: too")
    assert lines[4][:2] == ["smoke/06_pareto", "unreadable"]
    assert max(len(line) for line in text.splitlines()) <= 100
    found = run_rows(reports, project)
    assert json.loads(json.dumps(found)) == found
    assert found[0]["seconds"] == 75.0
    assert found[0]["bytes"] >= 20 * 2**20


def reason(project, record) -> str:
    """What `ls` says of a run whose record is this one."""
    folder = project / "reports" / "quick" / record.run.name
    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder)
    row = next(row for row in run_rows(project / "reports", project) if row["run"] == f"quick/{record.run.name}")
    return f"{row['state']}: {'; '.join(row['why'])}"


def test_a_changed_notebook_makes_its_run_stale(project):
    cells = [{"cell_type": "markdown", "source": ["# Title"]}, {"cell_type": "code", "source": ["a = 1\n", "b = 2"]}]
    path = project / "notebooks" / "04_router_confusion.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    record = up_to_date("04_router_confusion", source=fingerprint(["a = 1\nb = 2"]))
    assert reason(project, record) == "ok: "
    cells[1]["source"][0] = "a = 3\n"
    path.write_text(json.dumps({"cells": cells}))
    assert reason(project, record) == "stale: notebook edited"


def test_a_changed_profile_text_or_file_makes_a_run_stale_and_a_new_version_does_not(project):
    text = project / "notes.txt"
    text.write_text("one")
    config = json.loads(json.dumps(asdict(load_experiment("smoke", ["data.heldout=notes.txt"]))))
    asked = {"profile": "smoke", "overrides": ["data.heldout=notes.txt"], "config": config, "key": "asked"}
    record = up_to_date("04_router_confusion", inputs=named_files(config, {}, project), **asked)
    assert list(record.run.inputs) == ["notes.txt"]
    assert reason(project, record) == "ok: "
    text.write_text("another")
    assert reason(project, record) == "stale: notes.txt changed"
    text.unlink()
    assert reason(project, record) == "stale: notes.txt is gone"
    text.write_text("one")
    profile = project / "configs" / "smoke.yaml"
    before = profile.read_text()
    profile.write_text(before.replace("router_hidden_size: 32", "router_hidden_size: 64"))
    assert reason(project, record) == "stale: dynamoe.router_hidden_size was 32, is 64"
    profile.write_text(before + "\nnotebooks: {04_router_confusion: {width: 5}, 05_expert_usage: {width: 6}}\n")
    assert reason(project, record) == "stale: width was not given, is 5"
    record.run.parameters, record.run.command = {"width": 5}, "dynamoe-lab run 04_router_confusion --profile smoke"
    assert reason(project, record) == "ok: "
    record.run.parameters, record.run.command = {"width": 7}, "dynamoe-lab run 04_router_confusion --profile smoke -p width=7"
    assert reason(project, record) == "ok: "  # typed: the profile does not count
    profile.write_text(before)
    record.env.packages = {"torch": "1.0"}
    assert reason(project, record).startswith("ok: made with torch 1.0, here 2.")
    record.results.steps[0].stale, record.results.steps[0].stale_rooms = True, ["training"]
    assert reason(project, record).endswith("; train computed by other code (training)")
    record.results.tables[0].files = [StoredFile("summary.csv", "ab", 3)]
    assert reason(project, record).startswith("stale: summary.csv gone or changed")


def test_task_files_and_models_count_as_inputs(project):
    (project / "colors.yaml").write_text("task: colors\ndataset_path: json\ndataset_kwargs: {data_files: {test: colors.jsonl}}\n")
    data = project / "colors.jsonl"
    data.write_text('{"question": "Snow is"}\n')
    model = project / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    asked = (
        {"model": "model", "data": {"train": "c4+wiki", "domains": "c4+code"}},
        {"tasks": ["sciq", "colors.yaml"], "text": "Snow is white."},
    )
    first = named_files(*asked, project)
    assert list(first) == ["model", "colors.yaml"]
    data.write_text('{"question": "Grass is"}\n')
    (model / "config.json").write_text("[]")
    second = named_files(*asked, project)
    assert all(first[name] != second[name] for name in first)


def test_sweeps_are_listed_beside_runs(reports, project):
    place = reports / "sweeps" / "importance"
    place.mkdir(parents=True)
    cells = [{"status": "ok", "seconds": 60.0}, {"status": "failed", "seconds": 15.0}]
    (place / "sweep.json").write_text(json.dumps({"cells": cells, "finished": "2026-11-22T09:00:00+00:00", "env": {"code": "other"}}))
    line = rows(list_runs(reports, project))[-1]
    assert line[:2] == ["sweeps/importance", "failed"]
    assert "75 s" in line
    assert line[-1] == "1 of 2 cells failed; code changed"
    (place / "sweep.json").write_text("[]")
    assert rows(list_runs(reports, project))[-1][1] == "unreadable"


def test_no_runs_and_no_steps_are_told(tmp_path):
    with pytest.raises(InputError, match="no runs below reports; make some"):
        list_runs(tmp_path / "reports", tmp_path)
    with pytest.raises(InputError, match="no steps in "):
        list_steps(tmp_path, tmp_path)


def test_steps_are_listed_by_last_use_with_size_and_age(tmp_path, monkeypatch):
    old, new = run_step(numbers, (100_000,), home=tmp_path), run_step(numbers, (2,), home=tmp_path)
    before = time.time() - 7_300
    for place in (old.folder / "step.json", old.folder):
        os.utime(place, (before, before))
    text = list_steps(tmp_path, tmp_path)
    first, second = rows(text)[1:3]
    assert first[:2] == [new.key[:16], "numbers"]
    assert second[:2] == [old.key[:16], "numbers"]
    assert second[3:5] == ["2 h", "2 h"]
    assert second[2].endswith(" KB")
    assert int(second[2].split()[0]) * 1024 >= (old.folder / "result.json").stat().st_size
    assert text.splitlines()[-1].startswith("2 steps, ")
    assert max(len(line) for line in text.splitlines()[:-1]) <= 100
    assert "stale" not in text.splitlines()[1]
    monkeypatch.setattr(environment, "code_digest", lambda without=(): "other")
    assert "stale" in rows(list_steps(tmp_path, tmp_path))[1]


@pytest.mark.parametrize("name", ["quick/04", "quick/4", "quick/04_router_confusion", "05", "05_expert_usage"])
def test_runs_are_found_by_report_and_number_or_name(reports, name):
    assert find_run(name, reports).parent.name == "quick"
    assert find_run(name, reports).name.startswith(name.rpartition("/")[2].zfill(2)[:2])


def test_runs_are_found_by_path_and_others_are_told(reports):
    folder = reports / "smoke" / "04_router_confusion"
    assert find_run(str(folder), reports) == find_run(str(folder / "record.json"), reports) == folder
    with pytest.raises(InputError, match="several runs: quick/04_router_confusion, smoke/04_router_confusion"):
        find_run("04", reports)
    with pytest.raises(InputError, match="no run 'quick/9'; there is quick/04_router_confusion, quick/05_expert_usage"):
        find_run("quick/9", reports)
    shutil.rmtree(reports)
    with pytest.raises(InputError, match="make some with"):
        find_run("quick/04", reports)


def test_a_record_is_shown_whole(reports, project):
    folder = reports / "quick" / "04_router_confusion"
    record = load_record(folder)
    use = record.results.steps[0]
    use.peak_memory_bytes, use.memory_before_bytes, use.threads = 900 * 2**20, 500 * 2**20, 2
    record.env.threads, record.env.unrepeatable = 1, ["train computed earlier with 2 threads"]
    record.write(folder)
    text = show_run(folder, project)
    assert text.splitlines()[0] == "04_router_confusion  ok  Router confusion"
    for line in ("time         75 s", "commit       c0ffee", "- It errs next door. [confusion]"):
        assert line in text.splitlines()
    assert "repeatable   no: train computed earlier with 2 threads" in text.splitlines()
    found = rows(text)
    assert ["accuracy", "0.5", "[0.4, 0.6]", "100"] in found
    assert ["parameters", "134,515,008 weights"] in found
    assert ["table", "summary", "A table."] in found
    assert ["train", "0" * 16, "12 s", "900 MB", "+400 MB", "read from the cache", "threads 2"] in found
    assert max(len(line) for line in text.splitlines()) <= 100
    facts = run_facts(folder, project)
    assert facts["standing"]["state"] == "ok"
    assert json.loads(json.dumps(facts))["run"]["name"] == "04_router_confusion"


def test_a_run_that_failed_is_shown_with_the_end_of_its_log(reports, project):
    folder = reports / "smoke" / "04_router_confusion"
    with RunLog(folder, project) as log:
        log.line("\n".join(f"line {number}" for number in range(40)))
    failed = show_run(folder, project)
    assert "ValueError in cell 3 (Train): too hot\nline 1\nline 2" in failed
    assert "log          reports/smoke/04_router_confusion/run.log" in failed.splitlines()
    assert "line 39" in failed
    assert "line 3\n" not in failed
    with pytest.raises(InputError, match=r"06_pareto.record\.json"):
        show_run(reports / "smoke" / "06_pareto", project)


def test_a_record_does_not_reach_the_terminals_controls(project):
    """It may come from anywhere, and holds what a cell raised: neither `show` nor `ls` clears a screen or retitles a window."""
    bad = "\x1b[2J\x1b]0;title\x07\u202e\x9b1m"
    folder = project / "reports" / "quick" / "04_router_confusion"
    folder.mkdir(parents=True)
    error = RunError(bad, f"too hot{bad}\nby far", 3, bad, [f"line 1\t{bad}", "line 2"])
    record = make_record("04_router_confusion", status="failed", error=error, title=bad, question=bad, command=bad, finished="yesterday")
    record.results.findings[0].sentence = record.results.tables[0].caption = record.results.scalars[0].unit = bad
    record.env.cpu = record.env.model = record.results.steps[0].function = bad
    record.write(folder)
    (folder / "run.log").write_text(f"a{bad}b\n")
    for text in (show_run(folder, project), list_runs(project / "reports", project)):
        assert all(character.isprintable() or character == "\n" for character in text)
        assert "\\x1b[2J" in text
    assert "\nby far\nline 1  " in show_run(folder, project)
    assert "finished     yesterday" in show_run(folder, project).splitlines()
    assert run_facts(folder, project)["run"]["error"]["message"] == error.message, "for machines it is what it was"


def test_columns_are_aligned():
    text = table_text(("name", "n"), [("a", "1"), ("longer", "1,000")], right=("n",))
    assert text.splitlines() == ["name        n", "a           1", "longer  1,000"]
    assert table_text(("name", "text"), [("a\nb", "\x1b[1m")]).splitlines()[1] == "a\\nb  \\x1b[1m"
    assert table_text(("name", "text"), [("a", "b" * 30)], width=20).splitlines()[1] == f"a     {'b' * 11}..."


def test_of_a_killed_run_it_is_told_where_it_was(project):
    folder = project / "reports" / "quick" / "04_router_confusion"
    folder.mkdir(parents=True)
    make_record("04_router_confusion", status="running", at=Place(3, "Train the routers", step="train")).write(folder)
    with RunLog(folder) as log:
        log.line("the last it said")
    told = show_run(folder, project)
    assert "its process ended in cell 3 (Train the routers), step train; the same command goes on" in told
    assert "the last it said" in told
    stopped = RunError("Interrupted", "stopped by Ctrl-C", 3, "Train the routers", step="train")
    make_record("04_router_confusion", status="interrupted", error=stopped).write(folder)
    told = show_run(folder, project)
    assert "Interrupted in cell 3 (Train the routers), step train: stopped by Ctrl-C" in told
    assert "its process ended" not in told
