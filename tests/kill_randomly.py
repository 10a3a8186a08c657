"""Kill the runner and its kernel at random moments (kill -9) until a smoke run of notebook 03 has been killed TIMES times; then let it end.

    python tests/kill_randomly.py 10

The weights and the steps (seconds aside) have to equal those of a run that nobody disturbed. `make test` does this three times in training
and once in a notebook; this script is the longer check.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]


def start(home: Path, report: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "dynamoe_lab", "run", "03", "--profile", "smoke", "--output", str(report)]
    environment = {**os.environ, "DYNAMOE_LAB_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """The whole session: the runner's children are in process groups of their own."""
    import psutil

    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def home_with_assets(folder: Path) -> Path:
    from dynamoe_lab.assets import home
    from dynamoe_lab.loading import load_model

    load_model("smollm2-pico")
    folder.mkdir()
    for part in ("assets", "models"):
        (folder / part).symlink_to(home() / part)
    return folder


def main(times: int) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        calm, killed = home_with_assets(Path(scratch, "calm")), home_with_assets(Path(scratch, "killed"))
        began = time.monotonic()
        assert start(calm, Path(scratch, "report-calm")).wait() == 0
        length = time.monotonic() - began
        chance, kills = random.Random(0), 0
        while kills < times:
            process = start(killed, Path(scratch, "report-killed"))
            try:
                process.wait(timeout=chance.uniform(0.3, 1.0) * length)
            except subprocess.TimeoutExpired:
                kill(process)
                kills += 1
                state = [path.name for path in (killed / "steps").glob("*")] if (killed / "steps").exists() else []
                print(f"kill {kills}: {len(state)} steps finished", flush=True)
                continue
            for path in (killed / "steps", Path(scratch, "report-killed")):  # it ended first: begin again
                subprocess.run(["rm", "-rf", str(path)], check=True)
        assert start(killed, Path(scratch, "report-killed")).wait() == 0
        weights = [next(home.glob("steps/train-*/output/checkpoint/model.safetensors")).read_bytes() for home in (calm, killed)]
        assert weights[0] == weights[1], "the weights differ"
        frames = [pd.read_parquet(next(home.glob("steps/train-*/output/steps.parquet"))).drop(columns="seconds") for home in (calm, killed)]
        pd.testing.assert_frame_equal(*frames)
        assert not list(killed.glob("steps/*.corrupt-*"))
    print(f"{times} of {times} kills survived: same weights, same steps")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
