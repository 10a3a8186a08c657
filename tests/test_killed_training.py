"""Training that is killed at any moment ends in the same weights, whatever the method."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from conftest import make_blocks, make_converted, make_tomoe
from dynamoe_lab.config import ToMoETrainConfig, TrainConfig
from dynamoe_lab.training import train
common = dict(steps=40, batch_size=2, save_steps=3, log_steps=1)
{call}
"""
CALLS = {
    "dynamoe": """
config = TrainConfig(**common, warmup_steps=1, mlp_lr=1e-3, router_lr=1e-2)
train(make_converted(), make_blocks(32), config, output_dir=sys.argv[1])
""",
    "tomoe": """
config = ToMoETrainConfig(**common, lr=1e-2, eval_steps=4)
train(make_tomoe(mask_offset=0.2), make_blocks(32), config, output_dir=sys.argv[1], heldout=make_blocks(2, seed=5))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", CALLS)
def test_killed_three_times_ends_in_the_same_weights(method, tmp_path):
    """kill -9 at three moments of training; the same call finishes, bit for bit as if nothing had happened."""
    command = [sys.executable, "-c", PROGRAM.format(tests=str(Path(__file__).parent), call=CALLS[method])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    for wanted in (4, 11, 27):  # lines of progress to wait for before the kill
        with subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= wanted:
                    time.sleep(0.02)
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment, capture_output=True)
    whole, killed = (tmp_path / name / "checkpoint" / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    frames = [pd.read_parquet(tmp_path / name / "steps.parquet").drop(columns="seconds") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*frames)
    assert json.loads((tmp_path / "killed" / "checkpoint" / "config.json").read_text())["moe"]["trained_tokens"] == 40 * 2 * 24
