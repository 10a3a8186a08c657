"""`ls` and the runner are of one mind: what would run again is stale, and nothing else is."""

import json
import os
import threading
from pathlib import Path

import pytest
from test_notebook_runner import write_notebook

from dynamoe_lab.workbench.files import with_paths, without_paths
from dynamoe_lab.workbench.inventory import run_rows
from dynamoe_lab.workbench.named_files import named_files
from dynamoe_lab.workbench.notebooks import _up_to_date, prepare, run_notebooks, select
from dynamoe_lab.workbench.records import load_record
from dynamoe_lab.workbench.stale import stale_because

AGREE = (True, "ok", [])


def verdicts(root: Path, **asked) -> tuple[bool, str, list[str]]:
    """Whether the runner would skip the one notebook, and what `ls` says of its run."""
    (job,) = prepare(select([]), **asked)
    (row,) = run_rows(root / "reports", root)
    return _up_to_date(job), row["state"], row["why"]


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """The home folder of someone, beside the project."""
    folder = tmp_path / "house"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_inputs_are_found_again_by_their_recorded_names(project, house, monkeypatch):
    """Absolute paths below the project, the home folder and the cache: no path of the machine is kept, and none is looked for in vain."""
    cache = project.parent / "cache"
    cache.mkdir()
    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(cache))
    texts = [project / "inside.txt", house / "own.txt", house / "more.txt", cache / "kept.txt"]
    for path in texts:
        path.write_text("one")
    (project / "default.txt").write_text("one")
    write_notebook(project, "01_a", ["print(1)"], 'note: str = "default.txt"\nother: str = ""\n')
    heldout, train = f"data.heldout={texts[0]}", f"data.train={texts[1]}+{texts[2]}"
    asked = {"profile": "smoke", "given": [heldout, train, f"other={texts[3]}"]}
    assert run_notebooks(**asked) == {"01_a": "ok"}
    folder = project / "reports" / "smoke" / "01_a"
    assert sorted(load_record(folder).run.inputs) == [
        "$DYNAMOE_LAB_HOME/kept.txt",
        "./inside.txt",
        "default.txt",
        "~/more.txt",
        "~/own.txt",
    ]
    assert str(project.parent) not in (folder / "record.json").read_text()
    assert verdicts(project, **asked) == AGREE
    for path, name in zip(texts, ("./inside.txt", "~/own.txt", "~/more.txt", "$DYNAMOE_LAB_HOME/kept.txt"), strict=True):
        path.write_text("another")
        assert verdicts(project, **asked) == (False, "stale", [f"{name} changed"])
        path.write_text("one")
    (project / "default.txt").write_text("another")
    assert verdicts(project, **asked) == (False, "stale", ["default.txt changed"])
    (project / "default.txt").write_text("one")
    texts[1].unlink()
    assert verdicts(project, **asked)[1:] == ("stale", ["~/own.txt is gone"])
    texts[1].write_text("one")

    record = load_record(folder)  # as older versions wrote it
    record.run.inputs = with_paths(record.run.inputs, cache)
    assert str(house / "own.txt") in record.run.inputs
    assert stale_because(record, folder, project) == []


def test_names_of_this_machine_come_and_go(house, tmp_path):
    names = [f"{house}/a.txt+{house}/b.txt", f"data.train={house}/a.txt", f"c4 + {house}/a.txt", f"{tmp_path}/cache/model", "c~/a", "a ~/b"]
    short = ["~/a.txt+~/b.txt", "data.train=~/a.txt", "c4 + ~/a.txt", f"{tmp_path}/cache/model", "c~/a", "a ~/b"]
    assert without_paths(names) == short
    assert with_paths({"of": short, "~/key": 1}, tmp_path / "cache") == {"of": names, f"{house}/key": 1}
    assert with_paths("$DYNAMOE_LAB_HOME/model", tmp_path / "cache") == f"{tmp_path}/cache/model"


def test_a_profile_of_ones_own_is_not_the_shipped_one_of_that_name(project):
    (project / "my").mkdir()
    own = project / "my" / "smoke.yaml"
    own.write_text("model: smollm2-pico\nseed: 5\nnotebooks: {01_a: {width: 4}}\n")
    write_notebook(project, "01_a", ["print(1)"], "width: int = 3\n")
    (project / "sub").mkdir()
    os.chdir(project / "sub")  # the path is typed from here, and told from the root
    asked = {"profile": "../my/smoke.yaml"}
    run_notebooks(**asked)
    os.chdir(project)
    folder = project / "reports" / "smoke" / "01_a"
    record = load_record(folder)
    assert (record.run.profile, record.run.profile_path) == ("smoke", "./my/smoke.yaml")
    asked["profile"] = "my/smoke.yaml"
    assert verdicts(project, **asked) == AGREE
    text = own.read_text()
    own.write_text(text.replace("seed: 5", "seed: 6"))
    assert verdicts(project, **asked) == (False, "stale", ["seed was 5, is 6"])
    own.write_text(text.replace("width: 4", "width: 5"))
    assert verdicts(project, **asked) == (False, "stale", ["width was 4, is 5"])
    own.unlink()
    assert stale_because(record, folder, project) == ["its profile ./my/smoke.yaml is gone"]
    record.run.profile_path = ""  # as older versions wrote it
    assert stale_because(record, folder, project) == []
    record.run.command = "dynamoe-lab run 'no end of it"
    assert stale_because(record, folder, project) == ["its profile or overrides do not fit today's fields"]


def test_a_text_below_the_project_that_a_profile_names_by_its_whole_path(project):
    (project / "notes.txt").write_text("one")
    own = project / "own.yaml"
    own.write_text(f"model: smollm2-pico\ndata: {{heldout: {project}/notes.txt}}\nnotebooks: {{01_a: {{text: {project}/notes.txt}}}}\n")
    write_notebook(project, "01_a", ["print(1)"], 'text: str = ""\n')
    run_notebooks(profile="own.yaml")
    assert verdicts(project, profile="own.yaml") == AGREE


def test_an_edited_sweep_is_told(project):
    write_notebook(project, "20_ablation", ["print(1)"], 'sweep: str = "importance"\n')
    shipped, mine, table = project / "configs" / "sweeps" / "importance.yaml", project / "mine.yaml", project / "sweep.csv"
    mine.write_text("axes: {dynamoe.theta: [0.8, 0.9]}\n")
    table.write_text("cell,mode,metric,value,status\n1,router,perplexity_ratio,1.5,ok\n")
    for given, name, path, old, new in (
        ([], "importance", shipped, ", random", ""),
        (["sweep=mine.yaml"], "mine.yaml", mine, "0.9", "0.95"),
        (["sweep=sweep.csv"], "sweep.csv", table, "1.5", "1.6"),
    ):
        asked = {"profile": "smoke", "given": given}
        run_notebooks(**asked)
        assert list(load_record(project / "reports" / "smoke" / "20_ablation").run.swept) == [name]
        assert verdicts(project, **asked) == AGREE
        text = path.read_text()
        path.write_text(text.replace(old, new))
        assert verdicts(project, **asked) == (False, "stale", [f"sweep {name} changed"])
        path.unlink()
        (row,) = run_rows(project / "reports", project)
        assert row["why"] == [f"sweep {name} is gone, or no sweep any more"]
        path.write_text(text)
    folder = project / "reports" / "smoke" / "20_ablation"
    content = json.loads((folder / "record.json").read_text())
    del content["run"]["swept"], content["run"]["profile_path"]  # as older versions wrote it
    (folder / "record.json").write_text(json.dumps(content))
    assert verdicts(project, **asked) == AGREE


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_or_a_device_is_no_input(project):
    """It would be read for ever."""
    os.mkfifo(project / "pipe")
    os.mkfifo(project / "pipe.jsonl")
    (project / "task.yaml").write_text("task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: pipe.jsonl}}\n")
    asked = ({"model": "pipe", "data": {"train": "pipe+c4", "heldout": "/dev/zero"}}, {"text": "/dev/zero", "tasks": ["task.yaml", "pipe"]})
    found = []
    worker = threading.Thread(target=lambda: found.append(named_files(*asked, project)), daemon=True)
    worker.start()
    worker.join(20)
    assert [list(names) for names in found] == [["task.yaml"]]
