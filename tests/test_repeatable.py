"""What a rerun has to give again: a difference in the last digit is found, measured times are left out by name, and reasons are told."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_notebook_runner import write_notebook
from test_records import make_record
from typer.testing import CliRunner

from dynamoe_lab.config import Experiment
from dynamoe_lab.disk import no_space
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import notebooks
from dynamoe_lab.workbench.checking import check_runs, compare_runs, find_runs, not_promised
from dynamoe_lab.workbench.cli import app
from dynamoe_lab.workbench.provenance import step_use, why_unrepeatable
from dynamoe_lab.workbench.records import Artifact, Record, Results, Scalar, StepUse, StoredFile, load_record
from dynamoe_lab.workbench.repeatable import compare_tables, exact_digest
from dynamoe_lab.workbench.steps import run_step

FRAME = pd.DataFrame({"layer": [0, 1, 2], "loss": [0.1, 0.2, 0.3], "seconds": [1.0, 2.0, 3.0]})


def csv(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.csv"
    path.write_text(text)
    return path


# --- tables ------------------------------------------------------------------------------------------------------------------------


def test_equal_tables_are_equal_but_for_measured_times(tmp_path):
    then, now = (csv(tmp_path / side, "curve", f"step,loss,seconds\n1,0.5,{t}\n2,0.4,{t}\n") for side, t in (("a", 1.5), ("b", 9.5)))
    found = compare_tables(then, now)
    assert (found.equal, found.text) == (True, "2 rows, 2 columns")
    assert found.excepted == {"seconds": "a measured time"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "step,loss\n1,0.5\n2,0.41\n3,0.35\n",
            "row 2, column loss: 0.4 then, 0.41 now; 2 of 6 cells differ, by up to 0.05 (row 3, column loss)",
        ),
        ("step,loss\n1,0.5\n2,0.4\n", "3 rows then, 2 now"),
        ("step,lost\n1,0.5\n2,0.4\n3,0.3\n", "other columns: loss, lost"),
        ("loss,step\n0.5,1\n0.4,2\n0.3,3\n", "columns in another order: loss, step"),
        ("step,loss\n1,0.5\n2,\n3,0.3\n", "row 2, column loss: 0.4 then, empty now; 1 of 6 cells differ"),
    ],
)
def test_a_difference_is_found_and_placed(tmp_path, text, message):
    then = csv(tmp_path / "a", "curve", "step,loss\n1,0.5\n2,0.4\n3,0.3\n")
    found = compare_tables(then, csv(tmp_path / "b", "curve", text))
    assert (found.equal, found.text) == (False, message)


def test_columns_are_excepted_in_the_tables_that_hold_times_there(tmp_path):
    sides = [(side, f"seconds,low\n1,{low}\n") for side, low in (("a", 0.1), ("b", 0.2))]
    assert compare_tables(*(csv(tmp_path / side, "latency", text) for side, text in sides)).equal
    assert not compare_tables(*(csv(tmp_path / side, "pareto", text) for side, text in sides)).equal  # there low is no time


def test_rows_of_measured_metrics_are_excepted(tmp_path):
    lines = "task,metric,value,n\npiqa,acc,{},25\npiqa,seconds_total,{},25\n"
    then = csv(tmp_path / "a", "scores", lines.format(0.5, 3.25))
    assert compare_tables(then, csv(tmp_path / "b", "scores", lines.format(0.5, 4.5))).equal
    assert not compare_tables(then, csv(tmp_path / "b", "scores", lines.format(0.51, 3.25))).equal
    assert not compare_tables(then, csv(tmp_path / "b", "scores", lines.format(0.5, 3.25).replace("25\n", "26\n"))).equal


def test_a_digest_sees_the_last_digit_and_no_time():
    changed = FRAME.assign(seconds=[9.0, 9.0, 9.0])
    assert exact_digest(FRAME) == exact_digest(changed)
    changed.loc[1, "loss"] = np.nextafter(0.2, 1)
    assert exact_digest(FRAME) != exact_digest(changed)
    rows = pd.DataFrame({"metric": ["acc", "seconds_total"], "value": [0.5, 1.0]})
    assert exact_digest((rows, {"n": 1})) == exact_digest((rows.assign(value=[0.5, 2.0]), {"n": 1}))
    assert exact_digest((rows, {"n": 1})) != exact_digest((rows.assign(value=[0.6, 1.0]), {"n": 1}))
    assert rows["value"].tolist() == [0.5, 1.0]  # the frame itself is left alone


# --- runs --------------------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, *, loss: float = 0.3, score: float = 0.5, weights: str = "w1", key: str = "k", rate: float = 10.0) -> Record:
    """A run with a table, two numbers and two steps."""
    folder.mkdir(parents=True)
    frame = FRAME.assign(loss=[0.1, 0.2, loss])
    frame.to_csv(folder / "curve.csv", index=False, float_format="%.6g")
    steps = [
        StepUse("train", key * 32, False, 1.0, digests={"output/checkpoint/model.safetensors": weights, "result": "r"}),
        StepUse("measure_latency", f"{rate}", False, 1.0, times=True),
    ]
    record = make_record(folder.name, key="asked", profile="smoke", config={"seed": 3, "profile": "smoke"}, parameters={"width": 4})
    table = Artifact("curve", "A curve.", [StoredFile.of(folder / "curve.csv")], exact_digest(frame))
    record.results = Results(scalars=[Scalar("accuracy", score), Scalar("training rate", rate)], tables=[table], steps=steps)
    record.env.threads, record.env.code, record.env.packages = 1, "", {}
    record.write(folder)
    return record


def differences(tmp_path, **changed) -> list[tuple[str, str, str]]:
    write_run(tmp_path / "then" / "02_a")
    write_run(tmp_path / "now" / "02_a", **changed)
    found = compare_runs(tmp_path / "then" / "02_a", tmp_path / "now" / "02_a")
    return [(entry.kind, entry.name, entry.text) for entry in found if not entry.equal]


def test_a_run_equals_itself_but_for_its_times(tmp_path):
    assert differences(tmp_path, rate=99.0) == []


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (
            {"loss": 0.4},
            ("table", "curve", "row 3, column loss: 0.3 then, 0.4 now; 1 of 6 cells differ, by up to 0.1 (row 3, column loss)"),
        ),
        ({"loss": float(np.nextafter(0.3, 1))}, ("table", "curve", "differs beyond the six digits of its csv")),
        ({"score": 0.5000000001}, ("number", "accuracy", "value 0.5 then, 0.5000000001 now")),
        ({"weights": "w2"}, ("step", "train", "other weights: output/checkpoint/model.safetensors")),
        ({"key": "q"}, ("step", "train", f"other inputs (key {'k' * 16} then, {'q' * 16} now)")),
    ],
)
def test_every_kind_of_difference_is_found(tmp_path, changed, found):
    assert differences(tmp_path, **changed) == [found]


@pytest.fixture
def rerun(project, monkeypatch):
    """Runs are made again by writing them again, as asked for; the calls are kept."""
    calls = []

    def run_notebooks(names, *, profile, given, output):
        home = Path(os.environ["DYNAMOE_LAB_HOME"])
        calls.append(
            {"profile": json.loads(Path(profile).read_text()), "given": given, "shared": sorted(path.name for path in home.iterdir())}
        )
        calls[-1]["threads"] = os.environ.get("OMP_NUM_THREADS")
        calls[-1]["place"] = Path(profile).relative_to(os.environ["DYNAMOE_LAB_TEMPORARY"]).as_posix()
        write_run(output / names[0], **calls[0].get("changed", {}))
        return {names[0]: "ok"}

    monkeypatch.setattr(notebooks, "run_notebooks", run_notebooks)
    write_notebook(project, "02_a", [], "width: int = 3\n")
    write_run(project / "reports" / "smoke" / "02_a")
    return calls


def test_a_check_asks_for_what_was_recorded_and_says_equal(project, rerun, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = []
    assert check_runs(find_runs(["smoke"], project / "reports"), home=tmp_path / "home", root=project, say=said.append)
    assert rerun[0]["profile"] == {"seed": 3, "threads": 1}
    assert rerun[0]["given"] == ["width=4", "overrides=[]"]
    assert rerun[0]["threads"] == "1"
    assert rerun[0]["place"] == "0/smoke.yaml"
    assert "DYNAMOE_LAB_TEMPORARY" not in os.environ
    assert rerun[0]["shared"] == ["assets", "models", "wheels"]  # no step, nothing half-done
    assert said[-1].splitlines()[0] == "02_a  all equal, to the last digit  (seed 3, 1 thread)"
    assert "not compared, a measured time: seconds of curve" in said[-1]


def test_a_check_finds_a_difference(project, rerun, tmp_path, monkeypatch):
    original = write_run
    monkeypatch.setitem(globals(), "write_run", lambda folder, **_: original(folder, loss=0.31))
    said = []
    assert not check_runs([project / "reports" / "smoke" / "02_a"], home=tmp_path / "home", root=project, say=said.append)
    assert any(
        line.split()[:3] == ["differs", "table", "curve"] and "row 3, column loss: 0.3 then, 0.31 now" in line
        for line in said[-1].split("\n")
    )


def test_what_was_not_promised_is_said_first(project):
    folder = project / "reports" / "smoke" / "02_a"
    record = write_run(folder)
    record.env.packages, record.env.threads, record.run.key = {"torch": "1.0"}, 4096, ""
    record.env.unrepeatable = ["computed on cuda without torch's deterministic algorithms"]
    notes = not_promised(record, folder, project)
    assert any(note.startswith("made with torch 1.0, here ") for note in notes)
    assert any(note.startswith("made with 4,096 threads, this machine has ") for note in notes)
    assert "computed on cuda without torch's deterministic algorithms" in notes
    assert any("its notebook's parameters are not known" in note for note in notes)


def thread_count(seed: int) -> int:
    return seed


def test_a_record_says_why_other_digits_may_come_out(tmp_path):
    experiment, record = Experiment(), make_record("02_a")
    record.env.threads = 1
    done = run_step(thread_count, (3,), home=tmp_path)
    record.results.steps = [step_use(thread_count, done)]
    assert record.results.steps[0].digests == {"result": exact_digest(3)}
    record.results.steps[0].threads = 1
    assert why_unrepeatable(record, experiment) == []
    other = done._replace(
        cached=True, stale=True, made={**done.made, "threads": 2, "versions": {"torch": "1.0"}, "rooms": {"models": "other"}}
    )
    record.results.steps = [step_use(thread_count, other)]
    assert "models" in record.results.steps[0].stale_rooms
    assert why_unrepeatable(record, experiment) == [
        "thread_count computed earlier with torch 1.0",
        "thread_count computed earlier with 2 threads",
        "thread_count computed earlier by other code",
    ]
    record.results.steps[0].times = True  # what it gives is excepted anyway
    assert why_unrepeatable(record, experiment) == []
    experiment.device = "cuda"
    assert why_unrepeatable(record, experiment) == ["computed on cuda without torch's deterministic algorithms"]


def test_runs_that_cannot_be_checked_are_refused(project, tmp_path):
    folder = project / "reports" / "smoke" / "02_a"
    record = write_run(folder)
    with pytest.raises(InputError, match="no run 'quick'"):
        find_runs(["quick"], project / "reports")
    (folder / "curve.csv").write_text("edited")
    with pytest.raises(InputError, match=r"smoke/02_a: nothing to compare with, it ran, and curve\.csv is gone or changed since"):
        check_runs([folder], home=tmp_path, root=project)
    record.run.status = "failed"
    record.write(folder)
    with pytest.raises(InputError, match="smoke/02_a: nothing to compare with, it failed; run it again first"):
        check_runs([folder], home=tmp_path, root=project)
    said = []
    with pytest.raises(InputError, match="none of these runs ended well"):
        check_runs([folder, folder], home=tmp_path, root=project, say=said.append)
    assert len(said) == 2


def test_a_record_writes_nowhere_but_into_the_scratch(project, rerun, tmp_path):
    """Its profile's name may be a path: of nothing that lies there anything is changed."""
    victim = tmp_path / "victim.yaml"
    victim.write_text("mine")
    folder = project / "reports" / "smoke" / "02_a"
    for name in (str(victim.with_suffix("")), "../../victim", "..", "", "a\x00b", "x" * 300):
        record = load_record(folder)
        record.run.profile = name
        record.write(folder)
        assert check_runs([folder], home=tmp_path / "home", root=project, say=lambda line: None)
        assert re.fullmatch(r"0/[\w-]{1,60}\.yaml", rerun[-1]["place"])
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "asks",
    [
        {"config": {"seed": 3, "trust_remote_code": True}},
        {"overrides": ["trust_remote_code=true"]},
        {"parameters": {"width": 4, "trust_remote_code": True}},
        {"parameters": {"sweep": "theirs.yaml"}},
    ],
    ids=["config", "overrides", "parameters", "sweep"],
)
def test_a_record_does_not_decide_whom_to_trust(project, rerun, tmp_path, asks):
    """Nothing runs, wherever it says so; who has read the code says so in the command."""
    write_notebook(project, "02_a", [], 'width: int = 3\nsweep: str = "importance"\n')
    Path("theirs.yaml").write_text("axes: {dynamoe.theta: [0.8, 0.9]}\noverrides: [trust_remote_code=true]\n")
    folder = project / "reports" / "smoke" / "02_a"
    record = load_record(folder)
    for name, value in asks.items():
        setattr(record.run, name, value)
    record.write(folder)
    done = CliRunner().invoke(app, ["check", "smoke/02_a"])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "02_a: its record trusts Python code that comes with a model or a task" in done.stderr
    assert not rerun
    done = CliRunner().invoke(app, ["check", "smoke/02_a", "--trust-remote-code"])
    assert (done.exit_code, len(rerun)) == (0, 1), done.output


def test_a_run_that_cannot_be_repeated_is_a_difference_and_the_others_are_checked(project, rerun, tmp_path):
    """A notebook that was renamed, a field that is gone, a record that is none: each has its line, and the last run is compared."""
    reports = project / "reports" / "smoke"
    write_run(reports / "01_renamed")
    write_run(reports / "02")  # a number finds another notebook, but not the one of the record
    write_notebook(project, "03_field", [])
    record = write_run(reports / "03_field")
    record.run.config["dynamoe"] = {"tetha": 0.9}
    record.write(reports / "03_field")
    write_run(reports / "04_broken")
    (reports / "04_broken" / "record.json").write_text("{")
    said = []
    asked = {"home": tmp_path / "home", "root": project}
    assert not check_runs(find_runs(["smoke"], project / "reports"), say=said.append, **asked)
    told = "\n".join(said)
    assert "no notebook '01_renamed'; did you mean" in told
    assert "no notebook '02' in this project; it may have been renamed to 02_a" in told
    assert re.search(r"differs  run   03_field  it cannot be repeated: .*tetha", told)
    assert re.search(r"04_broken.record\.json: not readable as JSON", told)
    assert "02_a  all equal, to the last digit" in told
    assert len(rerun) == 1
    with pytest.raises(InputError, match="no notebook '01_renamed'"):
        check_runs([reports / "01_renamed"], **asked)


def test_a_full_temporary_disk_is_told_with_what_moves_it(project, rerun, tmp_path, monkeypatch):
    folder = project / "reports" / "smoke" / "02_a"
    asked = {"home": tmp_path / "home", "root": project}

    def told(*_, **__):
        return no_space(Path(os.environ["DYNAMOE_LAB_HOME"], "steps"), "set DYNAMOE_LAB_HOME")  # as a step does, in the kernel

    def full(*_, **__):
        raise OSError(errno.ENOSPC, told())

    monkeypatch.setattr(notebooks, "run_notebooks", full)
    with pytest.raises(InputError, match=r"no space left in .*dynamoe-lab-check-\w+: .*free some, or set TMPDIR to another disk$") as error:
        check_runs([folder], **asked)
    assert str(error.value.__cause__).endswith("free some, or set TMPDIR to another disk")
    assert no_space(tmp_path, "set DYNAMOE_LAB_HOME").endswith("set DYNAMOE_LAB_HOME")


def test_a_notebook_that_is_run_again_gives_the_same_but_for_what_is_random(project, home, monkeypatch):
    """With kernels: one table comes from a step and the recorded seed, one from the system's entropy."""
    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(home))
    write_notebook(
        project,
        "03_chance",
        [
            "import os\nimport numpy as np\nimport pandas as pd\nimport dynamoe_lab as lab\n"
            'run = lab.start("03_chance", profile=profile, overrides=overrides, output=output)',
            'run.table(pd.DataFrame({"x": np.random.rand(width)}), "seeded", caption="From the recorded seed.")\n'
            'run.table(pd.DataFrame({"x": list(os.urandom(8))}), "wild", caption="From nowhere.")\nrun.finish()',
        ],
        "width: int = 3\n",
    )
    assert notebooks.run_notebooks(["03"], profile="smoke", given=["width=4", "seed=7"]) == {"03_chance": "ok"}
    folder = project / "reports" / "smoke" / "03_chance"
    (project / "configs" / "smoke.yaml").write_text("seed: 9\n")  # the record knows what it was, and says that it changed
    said = []
    assert not check_runs([folder], home=home, root=project, say=said.append)
    lines = [line.split() for line in said[-1].splitlines()]
    assert any(words[:3] == ["equal", "table", "seeded"] for words in lines)
    assert any(words[:3] == ["differs", "table", "wild"] for words in lines)
    assert any("equality is not promised" in line for line in said)
    assert "1 of 2 differ  (seed 7" in said[-1]
