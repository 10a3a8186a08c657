"""The step cache: one expensive call of a library function, computed once, kept under `$DYNAMOE_LAB_HOME/steps`, shared by all notebooks.

A step's key is a hash of the function's name and of the inputs that matter to it. The code is not in the key (a comment must not void
hours of work): its digest is recorded, and a result made by other code reads as *stale*. Work happens in `scratch/<function>-<key>/` and
moves into place when it is whole; a killed step leaves nothing half-done in sight, and a function that takes `output_dir` finds its files
again and can resume; what was begun by other code is then recorded as made in parts (`scratch`). A step never changes its arguments:
functions that train in place work on a copy.
"""

import contextlib
import copy
import dataclasses
import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dynamoe_lab.digests import file_digest
from dynamoe_lab.disk import unreadable
from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.files import locked, read_json, write_json
from dynamoe_lab.workbench.fingerprint import describe, fingerprint, is_module
from dynamoe_lab.workbench.holds import hold_step
from dynamoe_lab.workbench.memory import PeakMemory
from dynamoe_lab.workbench.repeatable import exact_digest
from dynamoe_lab.workbench.results import read_result, write_result
from dynamoe_lab.workbench.scratch import BEGUN, STEP_VERSIONS, begin, kept_when_full, made_with, tidied

__all__ = ["STEP_FORMAT", "STEP_VERSIONS", "StepResult", "find_step", "recorded_inputs", "run_step", "takes_output_dir"]

RECOMPUTE_VARIABLE = "DYNAMOE_LAB_RECOMPUTE"  # set by `run --recompute` for the kernel: stale steps are computed again
RECORDED = ("blocks", "calibration", "heldout", "model", "dense", "reference")  # parameters whose fingerprints a run's record keeps
STEP_FORMAT = 1  # part of every key: raise it when results of an older format can no longer be read


class StepResult(NamedTuple):
    """What a step gave, and how."""

    value: Any  # the function's value; (value, folder) if the function takes `output_dir`
    folder: Path  # the step's folder: step.json, the result's files, output/
    key: str  # 32 hexadecimal digits; the folder's name has the first 16
    cached: bool  # read, not computed, by this call
    stale: bool  # made by other code than today's
    seconds: float  # what the computation took when it was made
    inputs: dict[str, str]  # fingerprint of every argument that is in the key
    made: dict[str, Any]  # step.json: when and on what it was computed, its memory, its files


class _Corrupt(Exception):
    """A published step whose files are not what step.json says."""


class _Call(NamedTuple):
    """A function with its arguments, named."""

    function: Callable
    name: str  # with its module
    arguments: dict[str, Any]
    inputs: dict[str, str]
    key: str
    label: str  # <function>-<first 16 digits of the key>: names the step's folders and its lock


def takes_output_dir(function: Callable) -> bool:
    """Whether a step of this function writes files of its own and hands out `(value, folder)`."""
    return "output_dir" in inspect.signature(function).parameters


def run_step(function: Callable, args: Sequence = (), kwargs: Mapping[str, Any] | None = None, *, home: Path) -> StepResult:
    """Call `function(*args, **kwargs)`, or hand out what an earlier call with equal inputs gave.

    Arguments that do not matter to the result are left out of the key: `output_dir`, which the step chooses, and the names in the
    function's attribute `step_ignores`, e.g. `train.step_ignores = ("progress", "config.log_steps")` (a dotted name is a field of a
    dataclass argument). A function whose attribute `step_times` is true measures times: they are kept for the processor, device, number
    of threads and torch that they were measured with. `step_reads`, a dict of parameter -> function, is for values that name files: where
    the function finds files for a value, their contents are in the key instead of the value, e.g. of a task file and of the data it reads.

    Args:
        function: a function that can be imported. It returns what `results.write_result` can keep.
        home: the cache folder; `steps/`, `scratch/` and `locks/` are made in it.

    Raises:
        InputError: the disk is full; a finished step cannot be read now; `output_dir` is given; the function has no importable name.
        TypeError: an argument without a fingerprint, or a result that cannot be kept.
    """
    call = _named(function, args, kwargs or {})
    folder, scratch = home / "steps" / call.label, home / "scratch" / call.label
    code = environment.code_digest(environment.ROOMS_WITHOUT_RESULTS)
    hold_step(home, call.label)  # before we look: from here on nobody frees it, nor what it is computed from
    with kept_when_full(home, scratch):
        with contextlib.suppress(_Corrupt, OSError):  # or somebody was freeing it before our note was there; who has the lock sees
            step = _published(folder, call.key)
            if step is not None and not _unwanted(step, code):
                return _handed_out(call, folder, step, True, code)
        with locked(home / "locks" / f"{call.label}.lock", waits_for=f"step {call.label}"):
            step, cached = _published_or_set_aside(folder, call.key), True  # the process we waited for may have made it
            if step is None or _unwanted(step, code):
                step = _whole_scratch(scratch, call.key)  # killed, or the disk was full, before it came into place
                if step is None or _unwanted(step, code):
                    step = _compute(call, scratch)
                _publish(scratch, folder)
                cached = False
            return _handed_out(call, folder, step, cached, code)


def find_step(function: Callable, args: Sequence = (), kwargs: Mapping[str, Any] | None = None, *, home: Path) -> StepResult | None:
    """What `run_step` would hand out without computing anything; None where it would have to compute. Raises as `run_step` does."""
    call = _named(function, args, kwargs or {})
    folder = home / "steps" / call.label
    code = environment.code_digest(environment.ROOMS_WITHOUT_RESULTS)
    if not os.path.lexists(folder):
        return None
    hold_step(home, call.label)  # before we look, as in `run_step`
    with contextlib.suppress(_Corrupt, OSError):
        step = _published(folder, call.key)
        if step is not None and not _unwanted(step, code):
            return _handed_out(call, folder, step, True, code)
    return None


def recorded_inputs(function: Callable, done: StepResult) -> dict[str, str]:
    """Fingerprints of the texts and models that a step was given, as a record names them: `train.model`, `train.blocks`."""
    return {f"{function.__name__}.{parameter}": mark for parameter, mark in done.inputs.items() if parameter in RECORDED}


def _handed_out(call: _Call, folder: Path, step: dict[str, Any], cached: bool, code: str) -> StepResult:
    try:
        value = read_result(folder, step["result"], device=_device(call.arguments))
    except OSError as error:
        if unreadable(error):
            raise _not_now(folder, error) from error
        raise
    if takes_output_dir(call.function):
        value = (value, folder / "output")
    return StepResult(value, folder, call.key, cached, step["code"] != code, step["seconds"], call.inputs, step)


def _unwanted(step: dict[str, Any], code: str) -> bool:
    """Whether a finished step is to be computed again: other code made it and `run --recompute` asked for that."""
    return bool(os.environ.get(RECOMPUTE_VARIABLE)) and step["code"] != code


# --- the key -----------------------------------------------------------------------------------------------------------------------


def _named(function: Callable, args: Sequence, kwargs: Mapping[str, Any]) -> _Call:
    name = f"{function.__module__}.{function.__qualname__}" if hasattr(function, "__qualname__") else ""
    if not name or "<" in name or not inspect.isfunction(function):
        raise InputError(f"run.step: {function!r} has no importable name; give a plain function of a module")
    if "output_dir" in kwargs:
        raise InputError(f"run.step({function.__name__}): leave output_dir out; the step chooses it and returns (value, folder)")
    arguments = _arguments(function, args, kwargs)
    inputs = _input_marks(function, arguments)
    if getattr(function, "step_times", False):
        inputs["machine"] = fingerprint(_machine(arguments))
    key = fingerprint({"format": STEP_FORMAT, "function": name, "inputs": inputs})
    return _Call(function, name, arguments, inputs, key, f"{function.__name__}-{key[:16]}")


def _arguments(function: Callable, args: Sequence, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(function)
    given = dict(kwargs)
    if "output_dir" in signature.parameters:
        given["output_dir"] = None  # filled in when the step runs
    bound = signature.bind(*args, **given)
    bound.apply_defaults()
    return dict(bound.arguments)


def _input_marks(function: Callable, arguments: dict[str, Any]) -> dict[str, str]:
    ignored = ("output_dir", *getattr(function, "step_ignores", ()))
    if unknown := [name for name in ignored[1:] if name.partition(".")[0] not in arguments]:
        raise ValueError(f"{function.__qualname__}.step_ignores names {unknown[0]!r}, which is no parameter of it")
    marks, reads = {}, getattr(function, "step_reads", {})
    for name, value in arguments.items():
        if name in ignored:
            continue
        if name in reads and (files := reads[name](value)):
            value = list(files)
        fields = {entry.partition(".")[2] for entry in ignored if entry.startswith(f"{name}.")}
        if fields and dataclasses.is_dataclass(value):
            value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value) if item.name not in fields}
        try:
            marks[name] = fingerprint(value)
        except TypeError as error:
            raise TypeError(f"step {function.__qualname__}, argument {name}: {error}") from error
    return marks


def _machine(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a time depends on besides the work."""
    import torch

    where = {"cpu": environment.cpu_name(), "cores": environment.usable_cores(), "threads": torch.get_num_threads()}
    device = torch.device(_device(arguments))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return where | {"device": name, "torch": torch.__version__}


def _device(arguments: dict[str, Any]) -> Any:
    """Where a model that comes back belongs: where the one that went in is."""
    for value in arguments.values():
        if is_module(value):
            return next((parameter.device for parameter in value.parameters()), "cpu")
    return "cpu"


# --- reading -----------------------------------------------------------------------------------------------------------------------


def _published(folder: Path, key: str) -> dict[str, Any] | None:
    """step.json of a finished step whose files are all as they were written; None if there is none.

    Raises `InputError` for a file that may be read another time: hours of work are not thrown away for too many open files.
    """
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _not_now(folder, error) from error
    try:
        step = read_json(folder / "step.json")
        if step["key"] != key or step["format"] != STEP_FORMAT:
            raise _Corrupt("step.json belongs to another step")
        for name, expected in step["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or file_digest(path) != expected[step["digest"]]:
                raise _Corrupt(f"{name} is not what was written")
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:  # among them InputError, of step.json
        if unreadable(error):
            raise _not_now(folder, error) from error
        raise _Corrupt(str(error)) from error
    return step


def _not_now(folder: Path, error: Exception) -> InputError:
    """The line about a step that is there but cannot be read, for a reason that is not in its files."""
    cause = error if isinstance(error, OSError) else error.__cause__
    where = Path(os.fsdecode(cause.filename)).name if isinstance(cause.filename, (str, bytes, os.PathLike)) else "a file"
    return InputError(f"step {folder.name}: {where} cannot be read ({cause.strerror}); nothing was changed: run again, or free the step")


def _published_or_set_aside(folder: Path, key: str) -> dict[str, Any] | None:
    try:
        return _published(folder, key)
    except _Corrupt as error:
        aside = folder.with_name(f"{folder.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
        os.replace(folder, aside)
        print(f"step {folder.name} is damaged ({error}); set aside as {aside.name}, computing it again", file=sys.stderr, flush=True)
        return None


# --- computing ---------------------------------------------------------------------------------------------------------------------


def _whole_scratch(scratch: Path, key: str) -> dict[str, Any] | None:
    """step.json of work that is finished but still in scratch."""
    with contextlib.suppress(_Corrupt):
        return _published(scratch, key)
    return None


def _publish(scratch: Path, folder: Path) -> None:
    """Move finished work into place; a stale result that lies there goes, and a kill in between loses neither."""
    (scratch / BEGUN).unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = scratch.with_name(f"{scratch.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(scratch, folder)
    shutil.rmtree(old, ignore_errors=True)


def _compute(call: _Call, scratch: Path) -> dict[str, Any]:
    """Call the function and describe what it gave in `scratch`, step.json last."""
    with tidied(scratch):
        makers = begin(scratch, resumes=takes_output_dir(call.function), anew=bool(os.environ.get(RECOMPUTE_VARIABLE)))
        step = _described(call, scratch) | made_with(makers)
        files = sorted(path for path in scratch.rglob("*") if path.is_file() and path != scratch / BEGUN)
        step["files"] = {p.relative_to(scratch).as_posix(): {"bytes": p.stat().st_size, "xxh3_128": file_digest(p)} for p in files}
        weights = {name: entry["xxh3_128"] for name, entry in step["files"].items() if name.endswith(".safetensors")}
        step["digests"] = weights | step["digests"]  # what has to come out again, at full precision
        write_json(scratch / "step.json", step)
    return step


def _described(call: _Call, scratch: Path) -> dict[str, Any]:
    """Call the function, write what it gave, and say what that is and what it took."""
    function, arguments, inputs = call.function, call.arguments, call.inputs
    started, clock = datetime.now(UTC), time.perf_counter()
    output, values = None, dict(arguments)
    if takes_output_dir(function):
        output = scratch / "output"
        values = {key: copy.deepcopy(value) if is_module(value) else value for key, value in values.items()} | {"output_dir": output}
    with PeakMemory() as peak:
        value = _call(function, values)
    seconds = time.perf_counter() - clock
    if output is None:
        _warn_of_changes(function, arguments, inputs)
    times = bool(getattr(function, "step_times", False))
    exact = "" if times else exact_digest(value)
    return {
        "format": STEP_FORMAT,
        "function": call.name,
        "key": call.key,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak.bytes,  # of the process while it computed this
        "memory_before_bytes": peak.before,
        "memory_measured": peak.how,
        "inputs": {
            parameter: {"value": describe(given), "fingerprint": inputs.get(parameter, "not in the key")}
            for parameter, given in arguments.items()
            if parameter != "output_dir"
        },
        "commit": environment.git_state(environment.package_root().parent)[0],
        "times": times,  # what it returns are measured times
        "result": write_result(value, scratch, output=output),
        "digest": "xxh3_128",
        "digests": {"result": exact} if exact else {},
    }


def _call(function: Callable, values: dict[str, Any]) -> Any:
    positional, named = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(values[name])
        elif parameter.kind is parameter.VAR_KEYWORD:
            named.update(values[name])
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = values[name]
        else:
            positional.append(values[name])
    return function(*positional, **named)


def _warn_of_changes(function: Callable, arguments: dict[str, Any], inputs: dict[str, str]) -> None:
    """A cached call would not change a model; say so if this one did, for the notebook's next cell must not depend on it."""
    for name, value in arguments.items():
        if name in inputs and is_module(value) and fingerprint(value) != inputs[name]:
            print(f"step {function.__qualname__} changed its argument {name} in place; a cached call does not", file=sys.stderr, flush=True)
