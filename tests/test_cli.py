"""The command line: exit codes, one line for bad input, and `--help` at once."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_notebook_runner import write_notebook
from typer.testing import CliRunner

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import doctor, notebooks
from dynamoe_lab.workbench.cli import app

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "project"
    shutil.copytree(CHECKOUT / "configs", root / "configs")
    (root / "notebooks").mkdir()
    monkeypatch.chdir(root)
    return root


def call(*words: str):
    return CliRunner().invoke(app, list(words))


def test_help_comes_at_once():
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "dynamoe_lab", "--help"], capture_output=True, text=True, env=environment, timeout=60)
        seconds.append(time.perf_counter() - began)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("run", "report", "doctor", "--debug"))
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy():
    script = """if True:
        import sys
        from dynamoe_lab.workbench.cli import main
        sys.argv = ["dynamoe-lab", "run", "--help"]
        try:
            main()
        except SystemExit:
            print(sorted({"torch", "transformers", "pandas", "papermill", "rich", "matplotlib", "numpy"} & set(sys.modules)))
    """
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nope"], "no notebook 'nope'"),
        (["run", "--profile", "qiuck"], "unknown profile 'qiuck'"),
        (["run", "-p", "dynamoe.teta=1"], "did you mean dynamoe.theta"),
        (["report", "nowhere"], "no records in this folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(project, words, message):
    write_notebook(project, "01_a", [])
    done = call(*words)
    assert done.exit_code == 2
    assert done.stderr.startswith("dynamoe-lab: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert "Traceback" in call("--debug", *words).stderr


def test_unknown_options_and_commands_are_exit_code_2():
    assert call("run", "--profil", "x").exit_code == 2
    assert call("walk").exit_code == 2


def test_a_run_with_every_kind_of_end(project):
    write_notebook(project, "01_good", ["print(1)"])
    write_notebook(project, "02_fails", ["1 / 0"])
    write_notebook(project, "03_input", ["from dynamoe_lab.errors import InputError\nraise InputError('give less')"])
    done = call("run", "--profile", "smoke")
    assert done.exit_code == 1
    assert "report: reports/smoke/index.html" in done.stdout
    assert "2 of 3 failed: 02_fails, 03_input" in done.stderr
    page = (project / "reports" / "smoke" / "index.html").read_text()
    assert "ZeroDivisionError" in page
    again = call("run", "01", "--profile", "smoke")
    assert (again.exit_code, again.stdout.splitlines()[0]) == (0, "01_good  up to date")
    (project / "reports" / "smoke" / "index.html").unlink()
    assert call("report", "reports/smoke").exit_code == 0
    assert (project / "reports" / "smoke" / "index.html").read_text() == page
    alone = call("run", "03", "--profile", "smoke", "--output", "out")
    assert alone.exit_code == 2
    assert "dynamoe-lab: 03_input: give less" in alone.stderr
    assert (project / "out" / "index.html").is_file()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (InputError("wrong"), 2, "dynamoe-lab: wrong"),
        (OSError(28, "No space left on device"), 2, "No space left"),
    ],
)
def test_exceptions_become_exit_codes(project, monkeypatch, error, code, said):
    def raises(*_, **__):
        raise error

    monkeypatch.setattr(notebooks, "run_notebooks", raises)
    done = call("run")
    assert done.exit_code == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_defects_keep_their_traceback(project, monkeypatch):
    def raises(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(notebooks, "run_notebooks", raises)
    assert isinstance(call("run").exception, ZeroDivisionError)


def test_doctor_says_what_to_do(project, monkeypatch):
    done = call("doctor")
    assert done.exit_code == 0, done.stdout
    for word in ("Python 3", "profiles", "packages satisfy", "torch", "memory free", "GB free", "kernel", "git"):
        assert word in done.stdout
    monkeypatch.setattr(doctor, "NEEDED_GB", 1e9)
    full = call("doctor")
    assert full.exit_code == 1
    assert "-> free some, or set DYNAMOE_LAB_HOME to another disk" in full.stdout


def test_a_doctor_that_breaks_is_a_bad_line(monkeypatch):
    def breaks():
        raise RuntimeError("odd")
        yield

    monkeypatch.setattr(doctor, "_git", breaks)
    last = list(doctor.examine())[-1]
    assert (last.kind, "broke: RuntimeError: odd" in last.text) == ("bad", True)
