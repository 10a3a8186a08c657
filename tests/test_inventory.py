"""`ls` and `show`: what stands in records and steps is what is told, also of runs that failed or cannot be read."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from test_records import make_record

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.inventory import find_run, list_runs, list_steps, show_run, table_text
from dynamoe_lab.workbench.records import RunError
from dynamoe_lab.workbench.steps import run_step


def numbers(count: int) -> dict:
    return {"numbers": list(range(count))}


def write(folder: Path, record, size: int = 3000) -> None:
    folder.mkdir(parents=True)
    record.write(folder)
    (folder / "figure.png").write_bytes(b"x" * (size - (folder / "record.json").stat().st_size))


@pytest.fixture
def reports(tmp_path):
    """Two reports: one run with today's code, one with other code, one that failed, one that no one can read."""
    folder = tmp_path / "reports"
    now = make_record("04_router_confusion", finished="2026-11-22T12:52:09+00:00", seconds=75.0)
    now.env.code = environment.code_digest()
    write(folder / "quick" / "04_router_confusion", now, size=20 * 2**20)
    write(folder / "quick" / "05_expert_usage", make_record("05_expert_usage"))
    failed = make_record("04_router_confusion", status="failed", error=RunError("ValueError", "too hot", 3, "Train", ["line 1", "line 2"]))
    write(folder / "smoke" / "04_router_confusion", failed)
    write(folder / "smoke" / "06_pareto", make_record("06_pareto"))
    (folder / "smoke" / "06_pareto" / "record.json").write_text("{")
    return folder


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_runs_are_listed_with_their_true_status(reports, tmp_path):
    lines = rows(list_runs(reports, tmp_path / "notebooks"))
    assert lines[0] == ["report", "notebook", "status", "finished (UTC)", "time", "size", "stale"]
    assert lines[1] == ["quick", "04_router_confusion", "ok", "2026-11-22 12:52", "75 s", "20 MB"]
    assert lines[2] == ["quick", "05_expert_usage", "ok", "1.5 s", "3 KB", "stale"]
    assert lines[3][:3] == ["smoke", "04_router_confusion", "failed"]
    assert lines[4][:3] == ["smoke", "06_pareto", "unreadable"]


def test_a_changed_notebook_makes_its_run_stale(reports, tmp_path):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    cells = [{"cell_type": "markdown", "source": ["# Title"]}, {"cell_type": "code", "source": ["a = 1\n", "b = 2"]}]
    path = notebooks / "04_router_confusion.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    record = make_record("04_router_confusion", source=fingerprint(["a = 1\nb = 2"]))
    record.env.code = environment.code_digest()
    record.write(reports / "quick" / "04_router_confusion")
    assert rows(list_runs(reports, notebooks))[1][-1] != "stale"
    cells[1]["source"][0] = "a = 3\n"
    path.write_text(json.dumps({"cells": cells}))
    assert rows(list_runs(reports, notebooks))[1][-1] == "stale"


def test_sweeps_are_listed_beside_runs(reports, tmp_path):
    place = reports / "sweeps" / "importance"
    place.mkdir(parents=True)
    cells = [{"status": "ok", "seconds": 60.0}, {"status": "failed", "seconds": 15.0}]
    (place / "sweep.json").write_text(json.dumps({"cells": cells, "finished": "2026-11-22T09:00:00+00:00", "env": {"code": "other"}}))
    line = rows(list_runs(reports, tmp_path))[-1]
    assert line[:5] == ["sweeps", "importance", "1 of 2 failed", "2026-11-22 09:00", "75 s"]
    assert line[-1] == "stale"
    (place / "sweep.json").write_text("[]")
    assert rows(list_runs(reports, tmp_path))[-1][2] == "unreadable"


def test_no_runs_and_no_steps_are_told(tmp_path):
    with pytest.raises(InputError, match="no runs below reports; make some"):
        list_runs(tmp_path / "reports", tmp_path)
    with pytest.raises(InputError, match="no steps in "):
        list_steps(tmp_path)


def test_steps_are_listed_newest_first_with_size_and_age(tmp_path, monkeypatch):
    old, new = run_step(numbers, (100_000,), home=tmp_path), run_step(numbers, (2,), home=tmp_path)
    before = time.time() - 7_300
    os.utime(old.folder / "step.json", (before, before))
    text = list_steps(tmp_path)
    first, second = rows(text)[1:3]
    assert first[:2] == [new.key[:16], "numbers"]
    assert second[:2] == [old.key[:16], "numbers"]
    assert second[3] == "2 h"
    size = sum(path.stat().st_size for path in old.folder.rglob("*") if path.is_file())
    assert second[2] == f"{size / 2**10:.0f} KB"
    assert text.splitlines()[-1].startswith("2 steps, ")
    assert "stale" not in text.splitlines()[1]
    monkeypatch.setattr(environment, "code_digest", lambda without=(): "other")
    assert rows(list_steps(tmp_path))[1][-1] == "stale"


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


def test_a_record_is_shown_whole(reports):
    text = show_run(reports / "quick" / "04_router_confusion")
    assert text.splitlines()[0] == "04_router_confusion  ok  Router confusion"
    for line in ("time         75 s", "commit       c0ffee", "- It errs next door. [confusion]"):
        assert line in text.splitlines()
    found = rows(text)
    assert ["accuracy", "0.5", "[0.4, 0.6]", "100"] in found
    assert ["parameters", "134,515,008 weights"] in found
    assert ["figure", "confusion", "Who is taken for whom."] in found
    assert ["train", "0" * 16, "12 s", "read from the cache"] in found
    failed = show_run(reports / "smoke" / "04_router_confusion")
    assert "ValueError in cell 3 (Train): too hot\nline 1\nline 2" in failed
    with pytest.raises(InputError, match=r"06_pareto.record\.json"):
        show_run(reports / "smoke" / "06_pareto")


def test_columns_are_aligned():
    text = table_text(("name", "n"), [("a", "1"), ("longer", "1,000")], right=("n",))
    assert text.splitlines() == ["name        n", "a           1", "longer  1,000"]
