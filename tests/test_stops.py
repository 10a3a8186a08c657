"""Killed or out of space at every touch of the disk, and two at once: the same call goes on; nothing is lost, taken for whole or mixed.

The faults come from an audit hook: Python tells it of every file that is opened for writing, made, renamed or removed below a folder. It
can refuse the n-th touch and everything after it. That is what `kill -9` leaves (no clean-up runs), or a full disk (removing still works).
"""

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import interrupt
from typer.testing import CliRunner

import dynamoe_lab as lab
from dynamoe_lab import assets
from dynamoe_lab.config import load_experiment
from dynamoe_lab.disk import hold, let_go, locked
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import checkpoints, cli, session
from dynamoe_lab.workbench.files import folder_lock, occupied
from dynamoe_lab.workbench.handover import RUNNER_VARIABLE, notebook_lock
from dynamoe_lab.workbench.notebooks import prepare, run_notebook
from dynamoe_lab.workbench.records import RunError, load_record, place_text
from dynamoe_lab.workbench.report import build_report
from dynamoe_lab.workbench.steps import run_step

CALLS: list[str] = []


class Killed(BaseException):
    """The process is gone: nothing after it happens."""


def says_who(path: Path) -> bool:
    """A lock, or a note of the steps that a process holds: of this process, not of the work, and without them the work goes on."""
    return path.suffix == ".lock" or "holds" in (path.name, path.parent.name)


class _Disk:
    """A disk that fails from its n-th touch below a folder on."""

    root, limit, touches, how = "", 0, 0, ""

    def touch(self, place: object, *, frees: bool = False) -> None:
        if not self.root or not str(place).startswith(self.root) or says_who(Path(place)):
            return
        if frees and self.how == "full":
            return
        self.touches += 1
        if self.touches >= self.limit:
            raise Killed if self.how == "killed" else OSError(errno.ENOSPC, "No space left on device", str(place))


_disk = _Disk()


def _audit(event: str, arguments: tuple) -> None:
    if not _disk.root:
        return
    if event == "open":
        path, mode, flags = arguments
        if (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+"):
            _disk.touch(path)
    elif event in ("os.rename", "os.mkdir"):
        _disk.touch(arguments[0])
    elif event in ("os.remove", "os.rmdir"):
        relative = len(arguments) > 1 and arguments[1] != -1  # to an open folder: shutil.rmtree
        _disk.touch(os.readlink(f"/proc/self/fd/{arguments[1]}") if relative else arguments[0], frees=True)


sys.addaudithook(_audit)  # there is no way to take one away; it rests while no disk fails


@contextmanager
def failing(root: Path, limit: int, how: str):
    _disk.root, _disk.limit, _disk.touches, _disk.how = str(root), limit, 0, how
    try:
        yield _disk
    finally:
        _disk.root = ""


def stopped(work, root: Path, limit: int, how: str) -> str | None:
    """Do it on a disk that fails; returns what was said, None if all was done before the disk could fail."""
    try:
        with failing(root, limit, how):
            work(root)
    except (Killed, InputError) as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def _calls(monkeypatch):
    CALLS.clear()
    monkeypatch.setattr(session, "now", lambda: "2030-01-01T00:00:00+00:00")
    monkeypatch.setattr(session.time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(session, "peak_memory", lambda: 1)
    monkeypatch.setattr(session.environment, "git_state", lambda folder: ("", False))  # a process each
    monkeypatch.setattr(os, "fsync", lambda handle: _disk.touch(_disk.root))  # where a full disk may tell first; not done, it is slow
    yield
    _disk.root = ""


def everything(root: Path) -> dict[str, bytes]:
    """The files below a folder but locks and notes, by their names; of a step's description and times only that they are there."""
    names = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file() and not says_who(path)}
    return {name: b"" if path.name == "step.json" else path.read_bytes() for name, path in names.items()}


# --- what is done to a disk --------------------------------------------------------------------------------------------------------


def table(rows: int) -> pd.DataFrame:
    CALLS.append("table")
    return pd.DataFrame({"row": range(rows)})


def writes(parts: int, *, output_dir) -> dict:
    """Goes on where it was."""
    for part in range(parts):
        place = Path(output_dir, f"part{part}")
        if not place.exists():
            CALLS.append(f"part{part}")
            scratch = place.with_suffix(".new")
            scratch.write_text(str(part))
            os.replace(scratch, place)
    return {"parts": parts}


def a_step(root: Path) -> None:
    run_step(table, (3,), home=root)


def a_step_that_resumes(root: Path) -> None:
    run_step(writes, (3,), home=root)


def a_notebook(root: Path) -> None:
    run = lab.start("01_a", profile="smoke", output=str(root))
    run.table(pd.DataFrame({"x": [1, 2]}), "numbers", caption="Two numbers.")
    run.html("<p>text</p>", "words", caption="A text.")
    run.result("one", 1.0)
    run.finding("One is one.", source="numbers")
    run.finish()


def a_report(root: Path) -> None:
    if not (root / "01_a").exists():
        failing_root, _disk.root = _disk.root, ""
        a_notebook(root)
        _disk.root = failing_root
    build_report(root, expected=["01_a"])


def an_asset(root: Path) -> None:
    wheel = root.parent / "toy.whl"
    if not wheel.exists():
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in ("toy/a.txt", "toy/b.txt", "toy/LICENSE"):
                archive.writestr(name, name)

    def build(folder: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)

    assets.build_once(root / "assets" / "toy", {"toy": 1}, build, what="asset toy", megabytes=1)


class _Saves:
    """A model or a tokenizer, as far as saving goes."""

    def __init__(self, *names: str):
        self.names = names

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        for name in self.names:
            (folder / name).write_text(name)


def _convert(output: Path) -> None:
    try:
        with checkpoints._new_folder(output):
            checkpoints._save(_Saves("config.json", "model.safetensors"), _Saves("tokenizer.json"), output, {"a": 1})
    except InputError as error:
        if "not an empty folder" not in str(error) or not (output / "config.json").exists():
            raise  # else it is finished, and refused


def a_new_checkpoint(root: Path) -> None:
    _convert(root / "checkpoint")


def a_checkpoint_in_a_folder(root: Path) -> None:
    _convert(root)


def test_the_work_of_another_folder_stays(tmp_path):
    """`nested.v2` is being converted beside `nested`, which looks for what a killed command left of it."""
    others, mine = tmp_path / ".nested.v2.4242.tmp", tmp_path / ".nested.4242.tmp"
    for folder in (others, mine):
        folder.mkdir()
    _convert(tmp_path / "nested")
    assert others.is_dir()
    assert not mine.exists()


WORK = [a_step, a_step_that_resumes, a_notebook, a_report, an_asset, a_new_checkpoint, a_checkpoint_in_a_folder]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the hook asks Linux where an open folder lies")
@pytest.mark.parametrize("how", ["killed", "full"])
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_at_every_touch_of_the_disk(project, tmp_path, monkeypatch, work, how):
    """Stopped at the first, second ... last touch, the same call gives what an undisturbed one gives, and leaves nothing else."""
    smoke = functools.cache(lambda: load_experiment("smoke"))  # a hundred times
    monkeypatch.setattr("dynamoe_lab.config.load_experiment", lambda profile, given: smoke())
    (root := tmp_path / "place").mkdir()
    work(root)
    expected, once = everything(root), len(CALLS)
    for limit in range(1, 200):
        shutil.rmtree(root)
        root.mkdir()
        CALLS.clear()
        told = stopped(work, root, limit, how)
        if told is None:
            break
        assert how == "killed" or "no space left" in told or "is full" in told
        finished = any(root.glob("*/*/step.json"))
        work(root)
        assert everything(root) == expected, f"stopped at touch {limit}"
        if work in (a_step, a_step_that_resumes):
            assert len(CALLS) <= once + (0 if finished else 1), "what was finished is made again"
    assert limit > 3, "no touch was seen"
    assert _disk.touches == limit - 1


def test_a_finished_step_is_replaced_without_a_moment_of_loss(tmp_path, monkeypatch):
    """A stale step is computed again and the kill comes before the new result is in its place: it is taken from where it lies."""
    from dynamoe_lab.workbench import steps

    digest = {"value": "one"}
    monkeypatch.setattr(steps.environment, "code_digest", lambda without=(): digest["value"])
    run_step(table, (3,), home=tmp_path)
    digest["value"] = "two"
    monkeypatch.setenv(steps.RECOMPUTE_VARIABLE, "1")
    replace, moves = os.replace, []

    def killed_between(source: Path, target: Path) -> None:
        if "steps" in str(target):
            raise Killed
        moves.append(replace(source, target))

    monkeypatch.setattr(os, "replace", killed_between)
    with pytest.raises(Killed):
        run_step(table, (3,), home=tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    assert CALLS == ["table", "table"]
    assert not list((tmp_path / "steps").iterdir())  # the worst moment: the old one is away, the new one not there
    assert run_step(table, (3,), home=tmp_path).value["row"].tolist() == [0, 1, 2]
    assert CALLS == ["table", "table"]
    assert not list((tmp_path / "scratch").iterdir())


# --- two at once -------------------------------------------------------------------------------------------------------------------


def test_a_notebook_is_written_by_one_kernel_or_one_runner(project, monkeypatch):
    """Open in JupyterLab, or in a run: the other one is refused with the holder's pid, before anything is written."""
    from test_notebook_runner import write_notebook

    path = write_notebook(project, "01_a", ["print(1)"])
    (job,) = prepare([path], profile="smoke")
    pid = f"reports/smoke/01_a is being written by pid {os.getpid()}"
    run = lab.start("01_a", profile="smoke")  # a kernel that a person opened
    with pytest.raises(InputError, match=pid):
        run_notebook(job)
    assert lab.start("01_a", profile="smoke").record.run.status == "running", "its own first cell may run again"
    run.finish()
    lock, told = notebook_lock(job.folder, project)
    with locked(lock, refuses=told):  # a runner
        with pytest.raises(InputError, match=pid):
            lab.start("01_a", profile="smoke")
        monkeypatch.setenv(RUNNER_VARIABLE, "01_a")
        assert lab.start("01_a", profile="smoke").record.run.at.cell is None, "its own kernel may write"


def test_a_step_that_runs_stands_in_the_record(project):
    """What a killed run leaves: the step that was running, and none between two."""
    run = lab.start("01_a", profile="smoke")
    assert run.step(reads_its_own_record, str(run.folder)) == {"step": "reads_its_own_record"}
    assert load_record(run.folder).run.at.step == ""
    assert place_text(RunError("E", "m", 3, "Train", step="train")) == " in cell 3 (Train), step train"
    run.finish()
    assert load_record(run.folder).run.at is None


def reads_its_own_record(folder: str) -> dict:
    return {"step": load_record(Path(folder)).run.at.step}


def test_a_folder_has_one_command_at_a_time(project, tmp_path):
    """A sweep, a conversion: refused before anything is loaded, with the pid of the one at work."""
    output = tmp_path / "out"
    Path("two.yaml").write_text(yaml.dump({"axes": {"dynamoe.theta": [0.8, 0.9]}, "profile": "smoke"}))
    with locked(folder_lock(assets.home(), output), refuses="nobody else is here"):
        for command in (["sweep", "two.yaml"], ["convert", "smollm2-pico"], ["export", "nowhere"]):
            result = CliRunner().invoke(cli.app, [*command, "--output", str(output)])
            assert result.exit_code == 2
            assert f"is being written by pid {os.getpid()}; wait for it, or choose another --output" in result.output
    assert not output.exists()


def test_a_report_waits_for_the_one_that_is_being_built(project, capsys):
    """The page that is written last is one of the latest records."""
    run = lab.start("01_a", profile="smoke")
    run.finish()
    report = run.folder.parent
    released = threading.Event()

    def builds() -> None:
        build_report(report, expected=[])
        assert released.is_set()

    with locked(report / "report.lock", waits_for="nobody"):
        worker = threading.Thread(target=builds)
        worker.start()
        worker.join(0.3)
        assert worker.is_alive()
        assert not (report / "index.html").exists()
        released.set()
    worker.join()
    assert (report / "index.html").is_file()
    assert f"waiting for the report of {report}, held by pid {os.getpid()}\n" in capsys.readouterr().err


def test_the_lock_of_a_dead_process_is_free(tmp_path, monkeypatch):
    """Its number in the file means nothing, and is not told as the holder's while a living one has yet to write its own."""
    lock = tmp_path / "a.lock"
    lock.write_text("4194305")  # more than any pid
    with locked(lock, refuses="no"):
        assert lock.read_text() == str(os.getpid())
        lock.write_text("4194305")
        with pytest.raises(InputError, match=r"^held by \?$"):
            hold(lock, refuses="held by {pid}")
    hold(lock, refuses="no")
    let_go(lock)
    let_go(lock)
    with locked(lock, refuses="no"):
        pass


def test_leftovers_do_not_occupy_a_folder(tmp_path):
    assert not occupied(tmp_path / "new")
    assert not occupied(tmp_path)
    (tmp_path / ".scores.csv.abc.tmp").write_text("half")
    (tmp_path / "train.lock").write_text("1")
    assert not occupied(tmp_path, "train.lock")
    assert occupied(tmp_path)
    assert occupied(tmp_path / "train.lock")


def test_a_polite_signal_is_an_interrupt(monkeypatch):
    """SIGTERM: the record and the exit code say so; what it does to a run is tried below."""

    def terminated(*_, **__):
        cli._terminated(15, None)

    monkeypatch.setattr("dynamoe_lab.workbench.report.build_report", terminated)
    result = CliRunner().invoke(cli.app, ["report", "somewhere"])
    assert result.exit_code == 143
    assert "give the same command again" in result.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_ends_as_the_signal_says(project, number, code):
    """A batch system tells a command that it ended itself from one that a person stopped; the record says interrupted in any case."""
    from test_notebook_runner import write_notebook

    write_notebook(project, "01_waits", ["## Wait", "import time\nprint('here', flush=True)\ntime.sleep(60)"])
    words = [sys.executable, "-m", "dynamoe_lab", "run", "01", "--profile", "smoke"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    log = project / "reports" / "smoke" / "01_waits" / "run.log"
    until = time.monotonic() + 120
    while not (log.is_file() and "here" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    _, told = interrupt(process, number)
    assert process.returncode == code, told
    assert told.splitlines()[-1].startswith("dynamoe-lab: interrupted; finished steps and notebooks are kept")
    assert load_record(log.parent).run.status == "interrupted"


def test_a_check_that_is_stopped_does_not_claim_to_go_on(project):
    """Nothing of it is kept, so nothing is promised."""
    from test_notebook_runner import write_notebook

    write_notebook(
        project, "01_waits", ["import time\nfrom pathlib import Path\nPath('began').touch()\ntime.sleep(60 * Path('wait').exists())"]
    )
    assert run_notebook(prepare([project / "notebooks" / "01_waits.ipynb"], profile="smoke")[0]) == "ok"
    Path("began").rename("wait")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-m", "dynamoe_lab", "check", "smoke/01"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + 120
    while not Path("began").exists() and time.monotonic() < until:
        time.sleep(0.1)
    _, told = interrupt(process, signal.SIGTERM)
    assert process.returncode == 143, told
    assert told.splitlines()[-1].startswith(
        "dynamoe-lab: interrupted; a check keeps nothing that it computed: the same command starts over"
    )
