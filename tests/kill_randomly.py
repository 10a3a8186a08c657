"""Kill a smoke run at random moments (kill -9), alone and in pairs, and give the same command again until it is done.

    python tests/kill_randomly.py [KILLS] [SEED]        25 kills: about 40 minutes on two cores

A round starts from an empty cache. One runner, or two that write different reports and share the cache, run the notebooks NOTEBOOKS; at a
moment drawn evenly from the whole length of such a run a victim is killed: the runner with everything it started, the kernel alone, or
the runner alone, whose kernel is left an orphan; of a pair one or both. At once the same command is given again, which in half of the
cases is killed as well. In the end it has to finish, and everything that it made has to equal what a run made that nobody disturbed: every
table (times aside), every weight, every finding and number, with no step set aside as damaged and nothing half-done left lying about.

`make test` does a little of this (test_stops.py, test_steps.py, test_training.py); this script is the long check.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("01", "03", "04", "07", "12")
TIMES = {"seconds", "seconds_total", "share_outside_model", "tokens_per_second"}  # columns and metrics that differ from run to run
TARGETS = ("all", "kernel", "runner")


def home_with_assets(folder: Path) -> Path:
    """A cache folder of its own for steps, with the assets and models of this machine."""
    from dynamoe_lab.assets import home
    from dynamoe_lab.loading import load_model

    load_model("smollm2-pico")
    folder.mkdir()
    for part in ("assets", "models"):
        (folder / part).symlink_to(home() / part)
    return folder


# --- processes ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """One `dynamoe-lab run`, started again as often as it takes."""

    home: Path
    report: Path
    process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "dynamoe_lab", "run", *NOTEBOOKS, "--profile", "smoke", "--output", str(self.report)]
        environment = {**os.environ, "DYNAMOE_LAB_HOME": str(self.home), "HF_HUB_OFFLINE": "1"}
        with open(f"{self.report}.log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    @property
    def running(self) -> bool:
        return self.process.poll() is None


def family(process: subprocess.Popen) -> list[int]:
    """A process and everything below it: the runner's children are in process groups of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    return [process.pid]


def kill(process: subprocess.Popen) -> None:
    """kill -9 of a process and everything below it."""
    _kill(family(process))
    process.wait()


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kernels(process: subprocess.Popen) -> list[int]:
    """The kernel that a runner has started; none between two notebooks."""
    import psutil

    found = []
    for pid in family(process)[1:]:
        with contextlib.suppress(psutil.Error):
            if "ipykernel_launcher" in psutil.Process(pid).cmdline():
                found.append(pid)
    return found


def strike(runner: Runner, target: str) -> tuple[str, list[int]]:
    """Kill what is meant; returns what it was, with where it was, and the processes that were left alone."""
    where = place(runner.report)
    pids = kernels(runner.process)
    if target == "kernel":
        _kill(pids)
        runner.process.wait()  # it tells that the kernel died, and runs the other notebooks
        return f"kernel{'' if pids else ' (there was none)'} {where}", []
    if target == "runner":
        below = family(runner.process)[1:]
        _kill([runner.process.pid])
        runner.process.wait()
        return f"runner {where}", below
    kill(runner.process)
    return f"all {where}", []


def place(report: Path) -> str:
    """Notebook, cell and step that a report's records call running."""
    from dynamoe_lab.workbench.records import load_records, place_text

    running = [record.run for record in load_records(report) if record.run.status == "running"] if report.exists() else []
    return ", ".join(run.name + place_text(run.at) for run in running) or "between notebooks"


# --- what was made ------------------------------------------------------------------------------------------------------------------


def compare_homes(calm: Path, other: Path) -> int:
    """Every step of two caches, file by file; returns how many files were compared."""
    names = [sorted(path.name for path in (home / "steps").iterdir()) for home in (calm, other)]
    assert names[0] == names[1], f"other steps: {sorted(set(names[0]) ^ set(names[1]))}"
    count = 0
    for folder in (calm / "steps").iterdir():
        for path in (path for path in folder.rglob("*") if path.is_file() and path.name != "step.json"):
            twin = other / path.relative_to(calm)
            count += 1
            if path.suffix == ".parquet":
                assert_frames_equal(pd.read_parquet(path), pd.read_parquet(twin), str(twin))
            else:
                assert path.read_bytes() == twin.read_bytes(), f"{twin} differs"
    assert not list((other / "scratch").iterdir()), f"left in scratch: {list((other / 'scratch').iterdir())}"
    return count


def compare_reports(calm: Path, other: Path) -> int:
    """Every table, number and finding of two reports; returns how many tables, texts, numbers and steps were compared."""
    from dynamoe_lab.workbench.checking import compare_runs
    from dynamoe_lab.workbench.records import load_records, missing_files

    count = 0
    ours, theirs = (load_records(report) for report in (calm, other))
    assert [record.run.name for record in ours] == [record.run.name for record in theirs]
    for first, second in zip(ours, theirs, strict=True):
        name = second.run.name
        assert second.run.status == "ok", f"{name} is {second.run.status}"
        assert not missing_files(second, other / name)
        assert first.results.findings == second.results.findings
        compared = compare_runs(calm / name, other / name)
        odd = [f"{entry.kind} {entry.name}: {entry.text}" for entry in compared if not entry.equal]
        assert not odd, f"{other / name}: {'; '.join(odd)}"
        count += len(compared)
    left = [path for path in other.rglob("*") if path.name.endswith(".tmp") or path.name == ".running.ipynb"]
    assert not left, f"left: {left}"
    return count


def assert_frames_equal(first: pd.DataFrame, second: pd.DataFrame, what: str) -> None:
    """Equal to the last digit, times aside."""
    first, second = (frame.drop(columns=list(TIMES & set(frame.columns))) for frame in (first, second))
    if "metric" in first.columns:
        first, second = (frame[~frame["metric"].isin(TIMES)] for frame in (first, second))
    try:
        pd.testing.assert_frame_equal(first, second, check_exact=True)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


def dies(pids: list[int], within: float = 20.0) -> bool:
    """Whether processes that lost their runner end by themselves."""
    import psutil

    deadline = time.monotonic() + within
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


# --- the check ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """Runners that share a cache, and what was left alone when one of them was killed."""

    folder: Path
    runners: list[Runner]
    orphans: list[int] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "pair" if len(self.runners) == 2 else "alone"

    def wait(self, seconds: float) -> list[Runner]:
        """Wait, at most until all have ended; returns those that run."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(runner.running for runner in self.runners):
            time.sleep(0.05)
        return [runner for runner in self.runners if runner.running]

    def finish(self, calm: Runner) -> int:
        """Let the commands end, which have to end well, and compare what they made; returns how many things were compared."""
        for runner in self.runners:
            code = runner.process.wait(timeout=3600)
            assert code == 0, Path(f"{runner.report}.log").read_text()[-3000:]
        assert dies(self.orphans), f"orphans are alive: {self.orphans}"
        return compare_homes(calm.home, self.runners[0].home) + sum(compare_reports(calm.report, each.report) for each in self.runners)


def main(kills: int = 25, seed: int = 0) -> int:
    """Rounds until so many moments are over; 0 if every one ended well, else an AssertionError says what differs."""
    chance, done, number, struck, began = random.Random(seed), 0, 0, Counter(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        calm = Runner(home_with_assets(Path(scratch, "calm")), Path(scratch, "report-calm"))
        calm.start()
        assert calm.process.wait() == 0, Path(f"{calm.report}.log").read_text()
        length = time.monotonic() - began
        print(f"undisturbed: {length:.0f} s", flush=True)
        while done < kills:
            number += 1
            (folder := Path(scratch, f"round-{number}")).mkdir()
            home = home_with_assets(folder / "home")
            this = Round(folder, [Runner(home, folder / f"report-{name}") for name in ("a", "ab")[number % 2 == 0]])
            try:
                for runner in this.runners:
                    runner.start()
                again = True
                while again and done < kills and (victims := this.wait(chance.uniform(1.0, length * len(this.runners) ** 0.5))):
                    if len(victims) == 2 and chance.random() < 0.5:
                        victims = [chance.choice(victims)]
                    done += 1
                    for runner in victims:
                        target = chance.choice(TARGETS)
                        told, left = strike(runner, target)
                        this.orphans += left
                        struck[f"{this.kind}, {target}"] += 1
                        print(f"kill {done}, round {number}, {len(victims)} of {len(this.runners)}: {told}", flush=True)
                        runner.start()
                    again = chance.random() < 0.5
                files = this.finish(calm)
            finally:
                for runner in this.runners:
                    if runner.process is not None and runner.running:
                        kill(runner.process)
            print(f"round {number} ({this.kind}) ended well: {files} things equal, {time.monotonic() - began:.0f} s", flush=True)
            shutil.rmtree(folder)
    print(json.dumps(struck))
    print(f"{done} of {done} kills survived in {number} rounds: same tables, same weights; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
