"""`start` and `Run`: what a notebook writes, what is refused, and what stands in the record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from dynamoe_lab.assets import home
from dynamoe_lab.disk import locked
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.handover import notebook_lock
from dynamoe_lab.workbench.holds import held_steps
from dynamoe_lab.workbench.records import Record, RunInfo, effective_status, load_record
from dynamoe_lab.workbench.session import start

CHECKOUT = Path(__file__).parents[1]


def doubled(x: int) -> pd.DataFrame:
    return pd.DataFrame({"x": [2 * x], "random": [np.random.rand()]})


def leaves_a_file(x: int, *, output_dir) -> int:
    (Path(output_dir) / "note.txt").write_text(str(x))
    return x


def counted(blocks: list, *, scale: int) -> dict:
    return {"count": scale * len(blocks)}


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    yield
    plt.close("all")


@pytest.fixture
def frame():
    return pd.DataFrame({"layer": [0, 1, 2], "share": [0.123456789, 0.5, 1.0]})


def draw(frame):
    _, ax = plt.subplots()
    ax.plot(frame.layer, frame.share, label="share θ")
    ax.legend()
    return ax


def test_a_run_writes_files_and_a_record(project, frame, capsys):
    run = start("04_router_confusion", profile="smoke", overrides=["dynamoe.theta=0.8"])
    assert run.experiment.dynamoe.theta == 0.8
    assert run.folder == project / "reports" / "smoke" / "04_router_confusion"
    assert effective_status(load_record(run.folder)) == "running"
    run.figure(draw(frame), "share", data=frame, caption="Share  by\nlayer.")
    run.table(frame, "shares", caption="All shares.")
    run.result("accuracy", np.float32(0.5), n=np.int64(3), low=0.4, high=0.6, unit="%")
    run.finding("Layer 2 has\n most.", source="share")
    run.finish()
    record = load_record(run.folder)
    assert record.run.status == "ok"
    assert record.run.seconds > 0
    assert record.run.peak_memory_bytes > 0
    assert record.run.command == "dynamoe-lab run 04_router_confusion --profile smoke -p dynamoe.theta=0.8"
    assert record.run.config["dynamoe"]["theta"] == 0.8
    assert record.env.seeds["train"] == 0
    assert record.env.model == "smollm2-pico"
    figure = record.results.figures[0]
    assert figure.caption == "Share by layer."
    assert {f.name for f in figure.files} == {"share.png", "share.svg", "share.csv"}
    assert (run.folder / "share.csv").read_text() == "layer,share\n0,0.123457\n1,0.5\n2,1\n"
    assert "share θ" in (run.folder / "share.svg").read_text()  # text stays text
    assert record.results.findings[0].sentence == "Layer 2 has most."
    assert record.results.scalars[0].n == 3
    assert capsys.readouterr().out.endswith(
        "04_router_confusion  ok  1 figure, 1 table, 1 result, 1 finding  in ./reports/smoke/04_router_confusion\n"
    )
    text = (run.folder / "record.json").read_text()
    assert str(project.parent) not in text
    assert os.path.expanduser("~") + "/" not in text


def test_a_picture_keeps_the_colours_of_its_marks():
    """256 colours: what is filled keeps its own or nearly so, whatever else there is; edges and colour bars come close."""
    import io

    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image

    from dynamoe_lab.workbench.drawn import figure_files

    figure, ax = plt.subplots()
    ax.imshow(np.linspace(0, 1, 4096).reshape(64, 64), cmap="viridis", extent=(0, 1, 0, 1))
    for place, color in enumerate(("#cc79a7", "#0072b2", "#009e73")):
        ax.plot([0.2 + 0.3 * place], [0.5], "o", markersize=12, color=color)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    before = np.asarray(Image.open(buffer).convert("RGB")).astype(int)
    png = figure_files(ax, "x")["x.png"]
    after = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    assert len(png) < 0.6 * len(buffer.getvalue())
    for color in ((204, 121, 167), (0, 114, 178), (0, 158, 115), (255, 255, 255)):
        filled = (before == color).all(axis=-1)
        assert filled.sum() > 100
        assert np.abs(after[filled] - color).max() <= 6
    assert np.abs(after - before).mean() < 2


def test_the_same_figure_gives_the_same_bytes(project, frame):
    contents = []
    for name in ("a", "b"):
        run = start(name, profile="smoke")
        run.figure(draw(frame), "share", data=frame, caption="c")
        contents.append([(run.folder / f"share.{kind}").read_bytes() for kind in ("png", "svg", "csv")])
    assert contents[0] == contents[1]


def test_axes_arrays_figures_and_grids_are_figures(project, frame):
    import seaborn as sns

    run = start("a", profile="smoke")
    figure, axes = plt.subplots(2, 2)
    grid = sns.FacetGrid(frame, col="layer")
    sub = plt.figure().subfigures(1, 2)[0].subplots()
    for position, item in enumerate((figure, axes, axes[0, 1], list(axes[0]), grid, sub)):
        run.figure(item, f"f{position}", data=frame, caption="c")
    with pytest.raises(InputError, match="neither Axes nor Figure"):
        run.figure(3, "g", data=frame, caption="c")


def test_a_new_run_replaces_what_the_old_one_made(project, frame):
    run = start("a", profile="smoke")
    run.figure(draw(frame), "old", data=frame, caption="c")
    run.figure(draw(frame), "kept", data=frame, caption="c")
    run.finish()
    (run.folder / "notes.md").write_text("mine")
    again = start("a", profile="smoke")
    again.figure(draw(frame), "kept", data=frame, caption="new")
    assert (again.folder / "old.png").exists()
    again.finish()
    assert sorted(path.name for path in again.folder.iterdir()) == ["kept.csv", "kept.png", "kept.svg", "notes.md", "record.json"]


def test_finishing_removes_what_runs_made_and_nothing_else(project, frame):
    """Also what a run made that was killed, and what the runner's own first record stands between."""
    run = start("a", profile="smoke")
    run.figure(draw(frame), "old", data=frame, caption="c")
    run.html("<p>a</p>", "text", caption="c")
    for name in ("my_data.csv", "my_own_figure.png", "notebook.html"):
        (run.folder / name).write_text("mine")
    killed = start("a", profile="smoke")
    killed.table(frame, "half", caption="c")
    Record(RunInfo("a", pid=1)).write(killed.folder)  # as the runner does before its kernel starts
    last = start("a", profile="smoke")
    last.table(frame, "half", caption="c")
    assert (last.folder / "old.png").exists(), "the earlier results stay until there are new ones"
    last.finish()
    kept = {"half.csv", "my_data.csv", "my_own_figure.png", "notebook.html", "record.json"}
    assert {path.name for path in last.folder.iterdir()} == kept
    assert load_record(last.folder).run.earlier == []


def test_a_record_cannot_name_files_elsewhere(project):
    run = start("a", profile="smoke")
    (project / "precious.csv").write_text("mine")
    text = (run.folder / "record.json").read_text()
    (run.folder / "record.json").write_text(text.replace('"earlier": []', '"earlier": ["../../../precious.csv"]'))
    start("a", profile="smoke").finish()
    assert (project / "precious.csv").exists()


def test_a_finished_run_leaves_anothers_results_alone(project, frame, monkeypatch):
    """In JupyterLab a cell can be run after `finish`: it writes under the lock, and not over what another process has written since."""
    monkeypatch.setattr("dynamoe_lab.workbench.session.interactive", lambda: True)
    run = start("a", profile="smoke")
    run.table(frame, "shares", caption="c")
    run.finish()
    run.result("accuracy", 0.5)
    assert load_record(run.folder).results.scalars[0].value == 0.5
    lock, told = notebook_lock(run.folder, project)
    calls = [
        lambda: run.result("accuracy", 0.6),
        lambda: run.table(frame[:1], "shares", caption="c"),
        lambda: run.step(doubled, 2),
        run.finish,
    ]
    with locked(lock, refuses=told):  # another kernel or runner is at work
        for call in calls:
            with pytest.raises(InputError, match="is being written by pid"):
                call()
        Record(RunInfo("a", status="ok", pid=1, process_started=1.0)).write(run.folder)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    for call in calls:
        with pytest.raises(InputError, match=r"smoke/a: another run has written its results since this one began; run the notebook again"):
            call()
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    monkeypatch.setattr("dynamoe_lab.workbench.session.now", lambda: "2030-01-01T00:00:00+00:00")  # not in the same second
    again = start("a", profile="smoke")
    with pytest.raises(InputError, match="another run"):
        run.finish()
    with pytest.raises(InputError, match="is being written"), locked(lock, refuses=told):
        pytest.fail("an older run gave up the lock of the one that is running")
    again.finish()


def test_a_run_without_a_runner_shows_no_earlier_log(project, monkeypatch):
    folder = start("a", profile="smoke").folder
    for name in ("run.log", "run.log.1"):
        (folder / name).write_text("what the runner heard")
    monkeypatch.setenv("DYNAMOE_LAB_NOTEBOOK", "a")
    start("a", profile="smoke")
    assert (folder / "run.log").exists(), "the runner's, which is open"
    monkeypatch.delenv("DYNAMOE_LAB_NOTEBOOK")
    start("a", profile="smoke")
    assert not list(folder.glob("run.log*"))


def test_what_a_run_loads_before_its_first_step_is_held(project):
    start("a", profile="smoke")
    assert set(held_steps(home()).values()) == {os.getpid()}


def test_a_headline_is_recorded_and_a_sentence_stands_once(project, frame):
    run = start("a", profile="smoke")
    run.table(frame, "shares", caption="c")
    run.finding("Layer 2 has most.", source="shares")
    run.finding("Layer 2  has most.", source="shares", headline=True)  # the cell again, with another mind
    run.finding("Layer 0 has least.", source="shares")
    found = [(finding.sentence, finding.headline) for finding in load_record(run.folder).results.findings]
    assert found == [("Layer 2 has most.", True), ("Layer 0 has least.", False)]


def test_a_text_is_kept_without_what_runs_or_loads(project):
    run = start("a", profile="smoke")
    bad = "<script>alert(1)</script><img src='http://example.org/a.png'><a href='javascript:alert(2)' onclick='x()'>b</a>"
    run.html(f"<style>.t{{color:#222}}</style><span class='t' style='background: #9cf' title='63 %'>Paris</span>{bad}", "text", caption="c")
    kept = (run.folder / "text.html").read_text()
    assert ".t{color:#222}" in kept
    assert "background: #9cf" in kept
    assert 'title="63 %">Paris</span>' in kept
    for gone in ("<script", "example.org", "javascript:", "onclick"):
        assert gone not in kept
    run.finish()
    assert load_record(run.folder).results.fragments[0].files[0].name == "text.html"


def test_a_text_has_no_ids_and_stays_in_its_place(project):
    run = start("a", profile="smoke")
    sheet = "<style>p{position:fixed;color:#222}</style>"
    run.html(f"<p id='findings' style='position: fixed; top: 0; color: red'>b</p>{sheet}", "text", caption="c")
    kept = (run.folder / "text.html").read_text()
    assert "color: red" in kept
    assert "color:#222" in kept
    assert "id=" not in kept
    assert "position" not in kept


def test_steps_are_recorded_with_what_they_were_given(project):
    run = start("a", profile="smoke")
    run.step(counted, ["a", "b"], scale=2)
    marks = load_record(run.folder).env.fingerprints
    assert list(marks) == ["counted.blocks"]
    assert marks["counted.blocks"] == fingerprint(["a", "b"])


def test_steps_are_recorded_and_shared(project):
    first = start("a", profile="smoke")
    value = first.step(doubled, 2)
    np.random.rand(5)
    assert first.step(doubled, x=3)["random"].item() == value["random"].item()  # every step starts from the seed
    second = start("b", profile="smoke")
    pd.testing.assert_frame_equal(second.step(doubled, 2), value)
    number, folder = second.step(leaves_a_file, 7)
    assert number == 7
    assert (folder / "note.txt").read_text() == "7"
    used = load_record(second.folder).results.steps
    assert [(use.function, use.cached, use.stale) for use in used] == [("doubled", True, False), ("leaves_a_file", False, False)]


def test_output_is_relative_to_the_project(project, tmp_path, monkeypatch):
    (project / "notebooks" / "deep").mkdir()
    monkeypatch.chdir(project / "notebooks" / "deep")
    run = start("a", profile="smoke", output="elsewhere/report")
    assert run.folder == project / "elsewhere" / "report" / "a"
    assert run.record.run.command.endswith("--output elsewhere/report")
    assert start("a", profile="smoke", output=tmp_path / "out").folder == tmp_path / "out" / "a"
    assert start("a", profile="smoke", output="").folder == project / "reports" / "smoke" / "a"


def test_what_is_refused(project, frame):
    with pytest.raises(InputError, match="becomes a folder"):
        start("../a", profile="smoke")
    with pytest.raises(InputError, match=r"did you mean dynamoe\.theta"):
        start("a", profile="smoke", overrides=["dynamoe.teta=1"])
    run = start("a", profile="smoke")
    run.table(frame, "shares", caption="c")
    for call, message in (
        (lambda: run.figure(draw(frame), "shares", data=frame, caption="c"), "used twice"),
        (lambda: run.table(frame, "../x", caption="c"), "becomes a file name"),
        (lambda: run.table(frame, "record", caption="c"), "not record"),
        (lambda: run.table(frame, "x", caption=" "), "give a caption"),
        (lambda: run.table(frame[:0], "x", caption="c"), "at least one row"),
        (lambda: run.table(pd.DataFrame({"x": np.random.rand(200_000)}), "x", caption="c"), r"aggregate"),
        (lambda: run.finding("s", source="nowhere"), "there is shares"),
        (lambda: run.result("a", "much"), "is no number"),
        (lambda: run.result("a", 1.0, n="many"), "n = 'many' is no number"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    run.result("a", 1)
    with pytest.raises(InputError, match="used twice"):
        run.result("a", 2)
    assert [path.name for path in run.folder.iterdir() if path.name.startswith("x")] == []


def test_a_notebook_must_give_its_own_name(project, monkeypatch):
    monkeypatch.setenv("DYNAMOE_LAB_NOTEBOOK", "05_expert_usage")
    with pytest.raises(InputError, match="this notebook is 05_expert_usage"):
        start("04_router_confusion", profile="smoke")


def test_finish_sees_that_a_file_is_gone(project, frame):
    run = start("a", profile="smoke")
    run.table(frame, "shares", caption="c")
    (run.folder / "shares.csv").unlink()
    with pytest.raises(InputError, match=r"shares\.csv is gone"):
        run.finish()
    assert load_record(run.folder).run.status == "running"


def test_a_run_without_finish_reads_as_interrupted(project):
    script = "import dynamoe_lab as lab; run = lab.start('a', profile='smoke')"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    record = load_record(project / "reports" / "smoke" / "a")
    assert record.run.status == "running"
    assert effective_status(record) == "interrupted"


def test_threads_and_seeds_are_set(project):
    import torch

    before = torch.get_num_threads()
    try:
        run = start("a", profile="smoke", overrides=["threads=1", "seed=5"])
        assert torch.get_num_threads() == 1
        assert torch.initial_seed() == 5
        assert json.loads((run.folder / "record.json").read_text())["env"]["threads"] == 1
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS", None)
