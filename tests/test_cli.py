"""The command line: exit codes, one line for bad input, and `--help` at once."""

import json
import os
import shlex
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


def call(*words: str):
    return CliRunner().invoke(app, list(words))


def test_help_comes_at_once():
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "dynamoe_lab", "--help"], capture_output=True, text=True, env=environment, timeout=240)
        seconds.append(time.perf_counter() - began)
    assert done.returncode == 0
    assert all(
        word in done.stdout
        for word in (
            "run",
            "sweep",
            "convert",
            "train",
            "export",
            "eval",
            "compare",
            "ls",
            "show",
            "check",
            "report",
            "cache",
            "doctor",
            "--debug",
        )
    )
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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=240)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nope"], "no notebook 'nope'"),
        (["run", "--profile", "qiuck"], "unknown profile 'qiuck'"),
        (["run", "-p", "dynamoe.teta=1"], "did you mean dynamoe.theta"),
        (["report", "nowhere"], "no records in this folder"),
        (["sweep", "importanse"], "did you mean importance"),
        (["sweep", "importance", "-p", "dynamoe.teta=1"], "did you mean dynamoe.theta"),
        (["sweep", "importance", "-p", "dynamoe.importance=l2"], "varies dynamoe.importance"),
        (["convert", "smollm2-135m", "--output", "notebooks"], "not an empty folder"),
        (["convert", "smollm2-135m", "--output", "new", "-p", "dynamoe.teta=1"], "did you mean dynamoe.theta"),
        (["convert", "smollm2-135m", "--output", "new", "-p", "model=x"], "the command's first argument"),
        (["convert", "smollm2-135n", "--output", "new"], "did you mean smollm2-135m"),
        (["train", "smollm2-135m", "--output", "notebooks"], "no run to go on with"),
        (["train", "smollm2-135m", "--output", "new", "-p", "train.steps=0"], "nothing to train"),
        (["convert", "smollm2-135m", "--output", "new", "-p", "tomoe.p=0.4"], "method dynamoe does not read tomoe.*"),
        (
            ["convert", "smollm2-135m", "--output", "new", "-p", "method=tomoe", "-p", "dynamoe.theta=0.8"],
            "method tomoe does not read dynamoe.*; its own settings are tomoe.*",
        ),
        (
            ["train", "smollm2-135m", "--output", "new", "-p", "method=tomoe", "-p", "train.steps=9"],
            "method tomoe does not read train.*; give -p tomoe_train.steps=9",
        ),
        (["train", "smollm2-135m", "--output", "new", "-p", "method=tomoe", "-p", "tomoe_train.steps=0"], "give -p tomoe_train.steps=40"),
        (["export", "somewhere", "--output", "notebooks"], "not an empty folder"),
        (["export", "smollm2-135n", "--output", "new"], "did you mean smollm2-135m"),
        (["ls"], "no runs below reports"),
        (["ls", "--steps"], "no steps in $DYNAMOE_LAB_HOME"),
        (["show", "quick/04"], "no run 'quick/04'"),
        (["check", "quick"], "no run 'quick'"),
        (["cache"], "nothing in $DYNAMOE_LAB_HOME"),
        (["cache", "free"], "say what: --stale"),
        (["cache", "free", "--older-than", "a while"], "--older-than a while: give a number with min, h, d or w"),
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


def test_a_kernel_that_is_slow_to_say_good_bye_is_no_error(project, capfd):
    """Shutting down interrupts the kernel first; one still busy with its last answer used to print an ERROR line in a clean run."""
    late = """if True:
        import time
        kernel = get_ipython().kernel
        answer = kernel.shell_handlers["kernel_info_request"]
        async def late(*message):
            await answer(*message)
            time.sleep(1)
        kernel.shell_handlers["kernel_info_request"] = late
    """
    write_notebook(project, "01_late", [late])
    assert notebooks.run_notebooks(profile="smoke") == {"01_late": "ok"}
    assert "ERROR" not in capfd.readouterr().err


def test_a_sweeps_end_is_told_and_written(project, monkeypatch):
    """One cell failed: exit code 1, a line for it, both files there, and how to draw the table."""
    import pandas as pd

    from dynamoe_lab.workbench import sweep

    def ended(chosen, **asked):
        plans = chosen.resolve(asked["profile"], asked["overrides"])
        outcomes = [sweep.Outcome(plan.number, plan.settings) for plan in plans]
        outcomes[1].status, outcomes[1].error = "failed", "RuntimeError: too hot"
        result = sweep.SweepResult(chosen, plans, outcomes, {1: object()})
        result.table = pd.DataFrame({"cell": [1, 2], "value": [1.5, None]})
        assert asked["jobs"] == 2
        return result

    monkeypatch.setattr(sweep, "run_sweep", ended)
    done = call("sweep", "calibration", "--profile", "smoke", "-p", "seed=3", "--jobs", "2")
    assert done.exit_code == 1
    assert done.stdout == (
        "table: reports/sweeps/calibration/sweep.csv\ndraw it: dynamoe-lab run 20 -p sweep=reports/sweeps/calibration/sweep.csv\n"
    )
    assert done.stderr == "cell 2 failed: data.calibration_tokens=2048: RuntimeError: too hot\n"
    folder = project / "reports" / "sweeps" / "calibration"
    assert (folder / "sweep.csv").read_text() == "cell,value\n1,1.5\n2,\n"
    content = json.loads((folder / "sweep.json").read_text())
    assert content["command"] == "dynamoe-lab sweep calibration --profile smoke -p seed=3"
    assert content["cells"][1]["error"] == "RuntimeError: too hot"
    line = next(line for line in call("ls").stdout.splitlines() if line.startswith("sweeps/calibration  failed"))
    assert line.endswith("1 of 4 cells failed")
    assert [row["state"] for row in json.loads(call("ls", "--json").stdout)] == ["failed"]


@pytest.mark.parametrize("output", [None, "elsewhere/my table", "../../outside"])
def test_the_table_to_draw_is_named_from_the_root_wherever_one_stands(project, tmp_path, monkeypatch, output):
    """The printed word goes through a shell into `read_sweep`, which starts at the project root."""
    import pandas as pd

    from dynamoe_lab.workbench import sweep
    from dynamoe_lab.workbench.sweep_table import read_sweep

    def ended(chosen, **asked):
        plans = chosen.resolve("smoke")
        result = sweep.SweepResult(chosen, plans, [sweep.Outcome(plan.number, plan.settings) for plan in plans], {1: object()})
        result.table = pd.DataFrame({"cell": [1], "mode": "router", "metric": "m", "value": 1.5, "status": "ok"})
        return result

    monkeypatch.setattr(sweep, "run_sweep", ended)
    monkeypatch.chdir(project / "notebooks")
    done = call("sweep", "calibration", *(["--output", output] if output else []))
    assert done.exit_code == 0, done.output
    *words, pair = shlex.split(done.stdout.splitlines()[-1].removeprefix("draw it: "))
    assert words == ["dynamoe-lab", "run", "20", "-p"]
    place = pair.removeprefix("sweep=")
    places = {None: "reports/sweeps/calibration", "elsewhere/my table": "notebooks/elsewhere/my table"}
    assert place == f"{places.get(output, tmp_path / 'outside')}/sweep.csv"
    assert read_sweep(place)["value"].tolist() == [1.5]


@pytest.mark.assets
def test_convert_and_train_into_the_folder_one_stands_in(home, project, monkeypatch):
    import dynamoe_lab as lab

    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(home))
    few = ["--profile", "smoke", "-p", "data.calibration_tokens=512", "-p", "train.steps=1"]
    for command in ("convert", "train"):
        place = project / command
        place.mkdir()
        monkeypatch.chdir(place)
        before = place.stat().st_ino
        done = call(command, "smollm2-pico", "--output", ".", *few)
        assert done.exit_code == 0, done.output
        assert place.stat().st_ino == before == Path.cwd().stat().st_ino  # the shell is not left in a folder that is gone
        assert not [path.name for path in place.iterdir() if path.name.startswith(".")]
        checkpoint = place if command == "convert" else place / "checkpoint"
        assert lab.load_model(checkpoint)[0].moe.num_experts == 4
    assert sorted(path.name for path in project.iterdir() if path.is_dir()) == ["configs", "convert", "notebooks", "train"]


@pytest.mark.assets
def test_convert_and_train_from_a_shell(home, project, monkeypatch):
    """Dense -> converted -> trained, and dense -> trained at once, give the same weights; both folders load, a second call only reads."""
    import pandas as pd
    import torch

    import dynamoe_lab as lab

    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(home))
    few = ["--profile", "smoke", "-p", "data.calibration_tokens=512"]
    short = ["-p", "train.steps=2", "-p", "train.save_steps=1"]
    done = call("convert", "smollm2-pico", "--output", "converted", *few, "-p", "dynamoe.theta=0.8")
    assert done.exit_code == 0, done.output
    model, _ = lab.load_model("converted")
    routers = sum(parameter.numel() for name, parameter in model.named_parameters() if ".router." in name)
    assert f"4 nested experts (25%, 50%, 75%, 100% of each MLP), {model.num_parameters():,} parameters, {routers:,} of" in done.stdout
    assert model.moe.theta == 0.8
    assert not list(project.glob(".converted*"))
    assert "not an empty folder" in call("convert", "smollm2-pico", "--output", "converted", *few).stderr

    done = call("train", "converted", "--output", "runs/trained", *few, *short)
    assert done.exit_code == 0, done.output
    assert "steps: runs/trained/steps.csv" in done.stdout
    steps = pd.read_csv("runs/trained/steps.csv")
    assert steps["step"].tolist() == [1, 2]
    settings = json.loads((project / "runs" / "trained" / "dynamoe_lab.json").read_text())
    assert settings["dynamoe"]["theta"] == 0.8  # the checkpoint's own, not the profile's
    assert settings["train"]["steps"] == 2
    written = (project / "runs" / "trained" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert call("train", "converted", "--output", "runs/trained", *few, *short).exit_code == 0
    assert (project / "runs" / "trained" / "checkpoint" / "model.safetensors").stat().st_mtime_ns == written
    other = call("train", "converted", "--output", "runs/trained", *few, "-p", "train.steps=3")
    assert other.exit_code == 2
    assert "holds a run with other inputs: train.steps 2 then, 3 now; choose another output_dir (the command's --output)" in other.stderr
    for where in ("eval", "train"):
        folder = call(where, "runs/trained", "--output", "runs/other", *(["--limit", "1"] if where == "eval" else few))
        assert (folder.exit_code, "did you mean runs/trained/checkpoint?" in folder.stderr) == (2, True)
    dynamoe = call("export", "runs/trained/checkpoint", "--output", "runs/other")
    assert (dynamoe.exit_code, "dynamoe-lab convert, or train, and -p method=tomoe" in dynamoe.stderr) == (2, True)
    kept = call("train", "converted", "--output", "runs/other", *few, *short, "-p", "dynamoe.theta=0.7")
    assert (kept.exit_code, "converted already" in kept.stderr) == (2, True)

    assert call("train", "smollm2-pico", "--output", "direct", *few, *short, "-p", "dynamoe.theta=0.8").exit_code == 0
    direct, trained = (lab.load_model(f"{folder}/checkpoint")[0].state_dict() for folder in ("direct", "runs/trained"))
    assert all(torch.equal(direct[name], tensor) for name, tensor in trained.items())


@pytest.mark.assets
def test_tomoe_from_a_shell(home, project, monkeypatch):
    """Dense -> masked -> trained -> deployed; the folders load, the last computes what the one before does, with fewer parameters."""
    import pandas as pd
    import torch

    import dynamoe_lab as lab

    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(home))
    profile, method = ["--profile", "smoke"], ["-p", "method=tomoe", "-p", "tomoe.mask_offset=0.1"]
    short = ["-p", "tomoe_train.steps=2", "-p", "tomoe_train.lr=0.01", "-p", "data.heldout_tokens=512"]
    done = call("convert", "smollm2-pico", "--output", "masked", *profile, *method)
    assert done.exit_code == 0, done.output
    assert "4 experts, on average " in done.stdout
    assert json.loads((project / "masked" / "dynamoe_lab.json").read_text())["method"] == "tomoe"

    done = call("train", "masked", "--output", "trained", *profile, *short)  # the checkpoint knows its method
    assert done.exit_code == 0, done.output
    assert "union coverage" in done.stdout
    assert "in the last step" in done.stdout
    steps = pd.read_csv("trained/steps.csv")
    assert steps["step"].tolist() == [1, 2]
    assert steps["heldout_kl"].notna().tolist() == [False, True], "the profile's eval_steps"
    settings = json.loads((project / "trained" / "dynamoe_lab.json").read_text())
    assert (settings["method"], settings["tomoe"]["mask_offset"], settings["tomoe_train"]["steps"]) == ("tomoe", 0.1, 2)
    for pair, message in (
        ("train.steps=3", "method tomoe does not read train.*; give -p tomoe_train.steps=3"),
        ("tomoe.p=0.3", "converted already and keeps its settings"),
        ("method=dynamoe", "converted already and keeps its settings"),
    ):
        refused = call("train", "masked", "--output", "other", *profile, "-p", pair)
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.output
    assert call("train", "smollm2-pico", "--output", "direct", *profile, *method, *short).exit_code == 0
    direct, trained = (lab.load_model(f"{folder}/checkpoint")[0] for folder in ("direct", "trained"))
    assert all(torch.equal(direct.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())

    done = call("export", "trained/checkpoint", "--output", "deployed")
    assert done.exit_code == 0, done.output
    assert "exported: deployed" in done.stdout
    assert not list(project.glob(".deployed*"))
    deployed, tokenizer = lab.load_model("deployed")
    assert deployed.num_parameters() < trained.num_parameters()
    ids = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(deployed(ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)
    assert "not an empty folder" in call("export", "trained/checkpoint", "--output", "deployed").stderr
    again = call("export", "deployed", "--output", "twice")
    assert (again.exit_code, "is deployed already" in again.stderr) == (2, True)
    refused = call("train", "deployed", "--output", "more", *profile, *short)
    assert (refused.exit_code, "its masks are fixed" in refused.stderr) == (2, True), refused.output
    unknown = call("export", "trained/checkpoint", "--output", "twice", "--form", "gguf")
    assert (unknown.exit_code, "choose one of tomoe, mixtral" in unknown.stderr) == (2, True)


@pytest.mark.assets
def test_a_stock_mixtral_from_a_shell(home, project, monkeypatch):
    import torch
    from transformers import MixtralForCausalLM

    import dynamoe_lab as lab

    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(home))
    whole = ["-p", "method=tomoe", "-p", "tomoe.attention=none", "-p", "tomoe.mask_offset=0.1"]
    assert call("convert", "smollm2-pico", "--output", "masked", "--profile", "smoke", *whole).exit_code == 0
    done = call("export", "masked", "--output", "mixtral", "--form", "mixtral")
    assert done.exit_code == 0, done.output
    assert "4 experts of " in done.stdout
    masked, tokenizer = lab.load_model("masked")
    stock = MixtralForCausalLM.from_pretrained("mixtral").eval()
    ids = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, masked(ids).logits, atol=1e-4, rtol=1e-4)


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
