"""The step cache: what is in a key, what is handed out, and what a killed process, a full or a damaged disk leave behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_converted
from test_records import make_record

from dynamoe_lab import digests
from dynamoe_lab.config import Experiment
from dynamoe_lab.disk import told_when_full
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment, steps
from dynamoe_lab.workbench.fingerprint import fingerprint
from dynamoe_lab.workbench.provenance import step_use, why_unrepeatable
from dynamoe_lab.workbench.steps import find_step, run_step

CALLS: list[str] = []


@dataclass
class Settings:
    steps: int = 3
    log_steps: int = 1
    rates: tuple[float, ...] = (0.1, 0.2)


def table(rows: int, scale: float = 1.0, progress: bool = True) -> pd.DataFrame:
    CALLS.append("table")
    frame = pd.DataFrame(
        {
            "layer": np.arange(rows, dtype="int8"),
            "share": np.linspace(0, scale, rows, dtype="float32"),
            "domain": pd.Categorical(["web", "code"] * (rows // 2), categories=["web", "code", "math"], ordered=True),
            "expert": pd.Categorical(np.arange(rows, dtype="int8") % 4),
            "theta": pd.Categorical([0.7, 0.9] * (rows // 2)),
            "name": ["a", None] * (rows // 2),
        }
    )
    frame.attrs = {"unit": "share", "limits": [0, 1]}
    return frame


table.step_ignores = ("progress",)


def number(settings: Settings) -> dict:
    CALLS.append("number")
    return {"loss": np.float64(0.1) + 0.2, "steps": settings.steps, "list": [1, None, True], "nan": float("nan")}


number.step_ignores = ("settings.log_steps",)


def both(rows: int) -> tuple:
    return table(rows), {"rows": rows}, "text"


def same_model(model):
    return model


def trains(model, rate: float, *, output_dir, fail: bool = False) -> float:
    CALLS.append("trains")
    seen = Path(output_dir) / "progress.txt"
    begun = seen.exists()
    seen.write_text("half")
    if fail and not begun:
        raise RuntimeError("power cut")
    with torch.no_grad():
        model.weight.mul_(rate)
    Path(output_dir, "resumed.txt").write_text(str(begun))
    return model.weight.detach().sum().item()


trains.step_ignores = ("fail",)


def careless(model) -> float:
    with torch.no_grad():
        model.weight.zero_()
    return 0.0


def reads(folder: Path) -> str:
    return folder.joinpath("a.txt").read_text()


def returns_object(kind: str):
    return {"object": object(), "key": {1: 2}, "sparse": pd.DataFrame({"s": pd.Series([1, 2], dtype="object")})}[kind]


def fills_the_disk(size: int) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def _fresh_calls():
    CALLS.clear()
    digests._digests.clear()


# --- the cache ---------------------------------------------------------------------------------------------------------------------


def test_first_and_cached_results_are_equal(tmp_path):
    first = run_step(table, (8,), home=tmp_path)
    second = run_step(table, (), {"rows": 8, "scale": 1.0, "progress": False}, home=tmp_path)
    assert CALLS == ["table"]
    assert (first.cached, second.cached) == (False, True)
    assert first.key == second.key
    assert first.folder == second.folder
    assert not second.stale
    pd.testing.assert_frame_equal(first.value, second.value)
    pd.testing.assert_frame_equal(first.value, table(8))  # dtypes and categories, also of numbers, came through parquet
    assert first.value.attrs == table(8).attrs
    assert run_step(table, (8, 2.0), home=tmp_path).key != first.key


def test_a_step_can_be_looked_up_without_computing(tmp_path, monkeypatch):
    assert find_step(table, (8,), home=tmp_path) is None
    assert CALLS == []
    assert not list(tmp_path.iterdir())
    made = run_step(table, (8,), home=tmp_path)
    found = find_step(table, (), {"rows": 8, "progress": False}, home=tmp_path)
    assert (found.key, found.cached) == (made.key, True)
    pd.testing.assert_frame_equal(found.value, made.value)
    monkeypatch.setattr(steps.environment, "code_digest", lambda without=(): "other")
    assert find_step(table, (8,), home=tmp_path).stale
    monkeypatch.setenv(steps.RECOMPUTE_VARIABLE, "1")
    assert find_step(table, (8,), home=tmp_path) is None
    monkeypatch.delenv(steps.RECOMPUTE_VARIABLE)
    (made.folder / "result.parquet").unlink()
    assert find_step(table, (8,), home=tmp_path) is None
    assert made.folder.is_dir()  # looking changes nothing


def test_a_large_file_is_read_again_when_it_changed(tmp_path):
    """Its digest is remembered by size, inode and times, but not while the clock could hide another write."""
    path, hour = tmp_path / "weights", time.time() - 3600
    path.write_bytes(b"a" * (3 << 20))
    fresh = digests.file_digest(path)
    assert not digests._digests
    os.utime(path, (hour, hour))
    time.sleep(digests._SETTLED + 0.1)
    assert digests.file_digest(path) == fresh
    assert len(digests._digests) == 1
    with path.open("r+b") as stream:
        stream.write(b"b")
    os.utime(path, (hour, hour))  # as if it had not been touched: the inode knows
    changed = digests.file_digest(path)
    assert changed != fresh
    (tmp_path / "copy").write_bytes(path.read_bytes())
    assert digests.file_digest(tmp_path / "copy") == changed


def test_step_json_says_what_and_with_what(tmp_path):
    done = run_step(table, (4,), home=tmp_path)
    step = json.loads((done.folder / "step.json").read_text())
    assert done.folder == tmp_path / "steps" / f"table-{done.key[:16]}"
    assert step["function"].endswith("test_steps.table")
    assert step["key"] == done.key
    assert step["digest"] == "xxh3_128"
    assert step["inputs"]["rows"]["value"] == 4
    assert step["inputs"]["progress"]["fingerprint"] == "not in the key"
    assert set(step["files"]) == {"result.parquet"}
    assert step["seconds"] >= 0
    assert step["versions"]["torch"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_json_results_and_ignored_fields(tmp_path):
    first = run_step(number, (Settings(),), home=tmp_path).value
    assert first["loss"] == 0.1 + 0.2
    assert first["list"] == [1, None, True]
    assert np.isnan(first["nan"])
    assert run_step(number, (replace(Settings(), log_steps=9),), home=tmp_path).cached
    assert not run_step(number, (replace(Settings(), steps=9),), home=tmp_path).cached


def timed(work: int) -> dict:
    """A measured time; not that of another processor or of other threads."""
    return {"seconds": work}


timed.step_times = True


def test_times_are_kept_for_what_they_were_measured_with(tmp_path, monkeypatch):
    import torch

    def cached(*, function=timed) -> bool:
        return run_step(function, (1,), home=tmp_path).cached

    assert not cached()
    assert cached()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert not cached()
        assert cached()
    finally:
        torch.set_num_threads(threads)
    assert cached()
    monkeypatch.setattr(environment, "cpu_name", lambda: "another")
    assert not cached()


def test_measuring_functions_say_so():
    from dynamoe_lab.evaluation import measure_latency, time_parts

    assert measure_latency.step_times
    assert time_parts.step_times


def test_tuples_come_back_entry_by_entry(tmp_path):
    frame, counts, text = run_step(both, (4,), home=tmp_path).value
    pd.testing.assert_frame_equal(frame, table(4))
    assert (counts, text) == ({"rows": 4}, "text")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_come_back_as_they_were(tmp_path, dtype):
    model = make_converted().to(dtype)
    first = run_step(same_model, (model,), home=tmp_path)
    second = run_step(same_model, (model,), home=tmp_path)
    assert second.cached
    assert first.value is not model
    assert first.value.dtype == dtype
    assert fingerprint(first.value) == fingerprint(second.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, second.value.state_dict()[name])
    assert list(first.folder.glob("model/*.safetensors"))


def test_output_dir_is_published_and_the_model_given_is_left_as_it_was(tmp_path):
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    done = run_step(trains, (model, 0.5), home=tmp_path)
    value, folder = done.value
    assert value == pytest.approx(float(before.sum()) * 0.5)
    assert folder == done.folder / "output"
    assert (folder / "resumed.txt").read_text() == "False"
    assert torch.equal(model.weight, before)
    assert run_step(trains, (model, 0.5), home=tmp_path).cached


def test_a_failed_output_dir_step_finds_its_files_again(tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="power cut"):
        run_step(trains, (model, 0.5), {"fail": True}, home=tmp_path)
    assert not (tmp_path / "steps").exists()
    _, folder = run_step(trains, (model, 0.5), home=tmp_path).value
    assert (folder / "resumed.txt").read_text() == "True"


@pytest.fixture
def code(monkeypatch):
    """The package's code, in two rooms, to be changed."""
    rooms = {"models": "one", "training": "one"}
    monkeypatch.setattr(environment, "code_digest", lambda without=(): "/".join(rooms.values()))
    monkeypatch.setattr(environment, "room_digests", lambda without=(): dict(rooms))
    return rooms


def begun(home: Path, model, *, ends: bool = False) -> None:
    """A training that stops halfway, or is killed when it has finished, before it is described."""
    with pytest.raises(RuntimeError if not ends else KeyboardInterrupt):
        run_step(trains_until, (model, "end" if ends else "half"), home=home)


def trains_until(model, stop: str, *, output_dir) -> str:
    CALLS.append("trains_until")
    place = Path(output_dir, "weights")
    if not place.exists():
        place.write_text(environment.code_digest())
        raise KeyboardInterrupt if stop == "end" else RuntimeError("power cut")
    return place.read_text()


trains_until.step_ignores = ("stop",)


@pytest.mark.parametrize("ends", [False, True], ids=["halfway", "finished"])
def test_work_that_other_code_began_is_not_labelled_todays(tmp_path, code, ends):
    model = torch.nn.Linear(2, 2)
    begun(tmp_path, model, ends=ends)
    code["training"] = "two"
    done = run_step(trains_until, (model, "half"), home=tmp_path)
    assert done.value[0] == "one/one", "hours of work are not thrown away"
    assert (done.cached, done.stale) == (False, True)
    assert done.made["parts"] == ["by different code (training)"]
    use = step_use(trains_until, done)
    assert use.stale_rooms == ["training"]
    record = make_record()
    record.results.steps = [use]
    assert "trains_until computed in parts, by different code (training)" in why_unrepeatable(record, Experiment())
    code["training"] = "one"
    assert run_step(trains_until, (model, "half"), home=tmp_path).stale, "it is the work of neither"
    assert not list(done.folder.glob("begun*"))


@pytest.mark.parametrize("ends", [False, True], ids=["halfway", "finished"])
def test_recomputing_does_not_go_on_from_other_codes_work(tmp_path, code, monkeypatch, ends):
    model = torch.nn.Linear(2, 2)
    begun(tmp_path, model, ends=ends)
    code["training"] = "two"
    monkeypatch.setenv(steps.RECOMPUTE_VARIABLE, "1")
    begun(tmp_path, model, ends=ends)  # from the start again, and stopped again
    done = run_step(trains_until, (model, "half"), home=tmp_path)  # but what today's code began it goes on from
    assert CALLS == ["trains_until"] * 3
    assert (done.value[0], done.stale, done.made["parts"]) == ("one/two", False, [])


def test_every_one_who_worked_on_a_step_is_known(tmp_path, code):
    """Other code in the middle counts, and so does work that nobody signed."""
    model = torch.nn.Linear(2, 2)
    begun(tmp_path, model)
    (scratch,) = (tmp_path / "scratch").iterdir()
    (weights := scratch / "output" / "weights").rename(scratch / "output" / "other")
    code["models"] = "two"
    begun(tmp_path, model)
    assert len(json.loads((scratch / "begun.json").read_text())) == 2
    code["models"] = "one"
    (again := tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "scratch", again / "scratch")
    done = run_step(trains_until, (model, "half"), home=tmp_path)
    assert (done.stale, done.made["parts"]) == (True, ["by different code (models)"])
    assert not weights.exists()
    (again / "scratch" / scratch.name / "begun.json").unlink()
    done = run_step(trains_until, (model, "half"), home=again)
    assert (done.stale, done.made["parts"], done.made["rooms"]) == (True, ["by different code"], {})


def test_threads_that_changed_meanwhile_are_told(tmp_path):
    model, threads = torch.nn.Linear(2, 2), torch.get_num_threads()
    begun(tmp_path, model)
    try:
        torch.set_num_threads(threads + 1)
        done = run_step(trains_until, (model, "half"), home=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert (done.stale, done.made["parts"]) == (False, [f"with {threads}, then {threads + 1} threads"])
    assert step_use(trains_until, done).parts == done.made["parts"]


def test_a_step_that_changes_its_model_in_place_is_told_on(tmp_path, capsys):
    run_step(careless, (torch.nn.Linear(2, 2),), home=tmp_path)
    assert "changed its argument model in place" in capsys.readouterr().err


def test_paths_count_by_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("one")
    assert run_step(reads, (tmp_path / "a",), home=tmp_path / "home").value == "one"
    os.rename(tmp_path / "a", tmp_path / "b")
    assert run_step(reads, (tmp_path / "b",), home=tmp_path / "home").cached


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "nojson", "empty"])
def test_a_damaged_step_is_set_aside_and_made_again(tmp_path, capsys, damage):
    first = run_step(table, (4,), home=tmp_path)
    path = first.folder / "result.parquet"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "remove":
        path.unlink()
    elif damage == "nojson":
        (first.folder / "step.json").write_text('{"key": ')
    else:
        (first.folder / "step.json").write_text("[]")
    again = run_step(table, (4,), home=tmp_path)
    assert not again.cached
    pd.testing.assert_frame_equal(again.value, first.value)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "is damaged" in told
    assert len(list((tmp_path / "steps").glob("*.corrupt-*"))) == 1
    assert run_step(table, (4,), home=tmp_path).cached


def test_a_step_that_cannot_be_read_now_is_no_damaged_one(tmp_path):
    """Too many open files: said in one line, and hours of work stay where they are."""
    resource = pytest.importorskip("resource")
    made = run_step(table, (4,), home=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for way in (run_step, find_step):
        told = ""
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            way(table, (4,), home=tmp_path)
        except InputError as error:
            told = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert told.startswith(f"step {made.folder.name}: step.json cannot be read (Too many open files); nothing was changed")
    assert CALLS == ["table"]
    assert run_step(table, (4,), home=tmp_path).cached
    assert [path.name for path in (tmp_path / "steps").iterdir()] == [made.folder.name]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_result_file_that_cannot_be_read_now_is_no_damaged_one(tmp_path, monkeypatch, number):
    run_step(table, (4,), home=tmp_path)

    def fails(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(steps, "file_digest", fails)
    with pytest.raises(InputError, match=rf"result\.parquet cannot be read \({os.strerror(number)}\); nothing was changed"):
        run_step(table, (4,), home=tmp_path)
    monkeypatch.undo()
    assert run_step(table, (4,), home=tmp_path).cached


def test_other_code_makes_a_result_stale_not_void(tmp_path, monkeypatch):
    run_step(table, (4,), home=tmp_path)
    monkeypatch.setattr(steps.environment, "code_digest", lambda without=(): "other")
    again = run_step(table, (4,), home=tmp_path)
    assert again.cached
    assert again.stale


@pytest.mark.parametrize(("kind", "message"), [("object", "returned builtins.object"), ("key", "the key 1"), ("sparse", "columns s")])
def test_results_that_cannot_be_kept_are_refused(tmp_path, kind, message):
    with pytest.raises(TypeError, match=message):
        run_step(returns_object, (kind,), home=tmp_path)


def test_bad_calls_are_told(tmp_path):
    with pytest.raises(TypeError, match="argument rows"):
        run_step(table, (object(),), home=tmp_path)
    with pytest.raises(InputError, match="leave output_dir out"):
        run_step(trains, (torch.nn.Linear(1, 1), 0.5), {"output_dir": tmp_path}, home=tmp_path)
    with pytest.raises(InputError, match="no importable name"):
        run_step(lambda: 1, home=tmp_path)
    with pytest.raises(TypeError, match="missing a required argument"):
        run_step(table, home=tmp_path)


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"no space left in .*MB free.*DYNAMOE_LAB_HOME"):
        run_step(fills_the_disk, (1,), home=tmp_path)


def fills_a_device(device: str) -> int:
    with open(device, "w") as stream:
        stream.write("x")


def fills_a_device_halfway(device: str, *, output_dir) -> int:
    Path(output_dir, "half").write_text("half")
    fills_a_device(device)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_told_as_it_is(tmp_path):
    """What is kept, if anything, and no more about where than the system says."""
    with pytest.raises(InputError, match=r"if that is enough, another disk that fills_a_device-\w+ writes to is full; free some") as told:
        run_step(fills_a_device, ("/dev/full",), home=tmp_path)
    assert "kept" not in str(told.value)
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(InputError, match=r"what fills_a_device_halfway-\w+ wrote so far is kept in scratch"):
        run_step(fills_a_device_halfway, ("/dev/full",), home=tmp_path)
    assert len(list((tmp_path / "scratch").glob("*/output/half"))) == 1


def fills_another_disk(place: str) -> int:
    raise OSError(errno.ENOSPC, "No space left on device", place)


def test_a_full_disk_elsewhere_is_named(tmp_path):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other disk here")
    with pytest.raises(InputError, match=r"^no space left in /dev/shm: [\d,]+ MB free; free some there$"):
        run_step(fills_another_disk, ("/dev/shm/folder/file",), home=tmp_path)
    with pytest.raises(InputError, match=r"^no space left in /dev/shm: .*free some there$"), told_when_full(tmp_path, "choose another"):
        fills_another_disk("/dev/shm/file")
    with pytest.raises(InputError, match=rf"^no space left in {tmp_path}: .*choose another$"), told_when_full(tmp_path, "choose another"):
        fills_another_disk(str(tmp_path / "file"))


# --- several processes -------------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
import pandas as pd

def slow(seconds: float, log: str, *, output_dir) -> pd.DataFrame:
    out = Path(output_dir)
    with open(log, "a") as stream:
        stream.write("started\\n")
    done = len(list(out.glob("part*")))
    for part in range(done, 5):
        (out / f"part{part}").write_text(str(part))
        print("part", part, flush=True)
        time.sleep(seconds)
    return pd.DataFrame({"part": sorted(int(p.read_text()) for p in out.glob("part*")), "resumed": done})

def quick(seconds: float, log: str) -> pd.DataFrame:
    with open(log, "a") as stream:
        stream.write("started\\n")
    print("part 0", flush=True)
    time.sleep(seconds)
    return pd.DataFrame({"x": [1, 2]})

slow.step_ignores = quick.step_ignores = ("seconds",)

if __name__ == "__main__":
    import slow_steps
    from dynamoe_lab.workbench.steps import run_step
    done = run_step(getattr(slow_steps, sys.argv[1]), (float(sys.argv[2]), sys.argv[3]), home=Path(sys.argv[4]))
    print("cached", done.cached, done.value[0].to_dict("list") if isinstance(done.value, tuple) else done.value.to_dict("list"))
"""


def _spawn(tmp_path: Path, function: str, seconds: float) -> subprocess.Popen:
    script = tmp_path / "slow_steps.py"
    script.write_text(textwrap.dedent(SLOW))
    arguments = [sys.executable, str(script), function, str(seconds), str(tmp_path / "log"), str(tmp_path / "home")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("function", ["slow", "quick"])
def test_a_killed_step_is_made_right_the_next_time(tmp_path, function):
    process = _spawn(tmp_path, function, 30)
    assert process.stdout.readline().startswith("part 0")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    home = tmp_path / "home"
    assert not list((home / "steps").glob("*"))  # nothing half-done in sight
    assert len(list((home / "scratch").iterdir())) == 1
    out, err = _spawn(tmp_path, function, 0).communicate(timeout=240)
    expected = {"part": [0, 1, 2, 3, 4], "resumed": [1] * 5} if function == "slow" else {"x": [1, 2]}
    assert f"cached False {expected}" in out, err
    assert len(list((home / "steps").iterdir())) == 1
    assert not list((home / "scratch").iterdir())
    assert f"cached True {expected}" in _spawn(tmp_path, function, 0).communicate(timeout=240)[0]


def test_two_processes_compute_a_step_once(tmp_path):
    first = _spawn(tmp_path, "quick", 4)
    assert first.stdout.readline().startswith("part 0")
    began = time.monotonic()
    second = _spawn(tmp_path, "quick", 0)
    out, err = second.communicate(timeout=240)
    assert "cached True {'x': [1, 2]}" in out
    assert time.monotonic() - began > 1
    assert "waiting for step quick-" in err
    assert f"held by pid {first.pid}" in err
    assert "cached False" in first.communicate(timeout=240)[0]
    assert (tmp_path / "log").read_text() == "started\n"


def test_stale_steps_are_computed_again_on_request(tmp_path, monkeypatch):
    """Other code made it: read back as stale, and computed anew only when --recompute asks."""
    from dynamoe_lab.workbench import environment
    from dynamoe_lab.workbench.steps import RECOMPUTE_VARIABLE, run_step

    function = _importable_counter(tmp_path, monkeypatch)
    digest = {"value": "one"}
    monkeypatch.setattr(environment, "code_digest", lambda without=(): digest["value"])
    assert run_step(function, (3,), home=tmp_path / "home").value == {"calls": 1}
    digest["value"] = "two"
    again = run_step(function, (3,), home=tmp_path / "home")
    assert (again.value, again.cached, again.stale) == ({"calls": 1}, True, True)
    monkeypatch.setenv(RECOMPUTE_VARIABLE, "1")
    fresh = run_step(function, (3,), home=tmp_path / "home")
    assert (fresh.value, fresh.cached, fresh.stale) == ({"calls": 2}, False, False)
    assert run_step(function, (3,), home=tmp_path / "home").cached


def _importable_counter(tmp_path, monkeypatch):
    """A step function of a module of its own that counts its calls on disk."""
    import importlib

    (tmp_path / "counting_steps.py").write_text(
        "from pathlib import Path\n"
        "def count(number: int) -> dict:\n"
        f"    path = Path({str(tmp_path / 'calls')!r})\n"
        "    calls = 1 + (int(path.read_text()) if path.exists() else 0)\n"
        "    path.write_text(str(calls))\n"
        "    return {'calls': calls}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("counting_steps").count


def test_sources_that_make_no_results_are_there():
    """A name of something that is gone would leave nothing aside and say nothing."""
    from dynamoe_lab.workbench import environment

    root = environment.package_root()
    assert [name for name in environment.ROOMS_WITHOUT_RESULTS if not (root / name).exists()] == []
