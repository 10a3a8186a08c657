"""`dynamoe-lab convert` and `train`: the library on one model, from a shell, into a folder that any transformers script can load."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.cells import Inputs
from dynamoe_lab.workbench.files import told_when_full, without_paths, write_atomic, write_json
from dynamoe_lab.workbench.steps import run_step

if TYPE_CHECKING:
    from dynamoe_lab.config import Experiment

__all__ = ["convert_to_folder", "train_to_folder"]

SETTINGS = "dynamoe_lab.json"  # beside the weights: the experiment that made them


def _experiment(model: str, profile: str, given: Sequence[str]) -> "Experiment":
    from dynamoe_lab.config import load_experiment

    if model_given := [pair for pair in given if pair.startswith("model=")]:
        raise InputError(f"-p {model_given[0]}: the model is the command's first argument")
    return load_experiment(profile, [*given, f"model={json.dumps(model)}"])


def _described(model: Any) -> str:
    routers = sum(parameter.numel() for mlp in model.nested_mlps() for parameter in mlp.router.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = ", ".join(f"{fraction:.0%}" for fraction in model.moe.experts)
    return f"{model.moe.num_experts} nested experts ({experts} of each MLP), {total:,} parameters, {routers:,} of them in routers"


def convert_to_folder(
    model: str, output: Path, *, profile: str = "quick", given: Sequence[str] = (), say: Callable[[str], None] = print
) -> None:
    """Convert a dense model and save checkpoint and tokenizer to `output`, all at once or not at all.

    Args:
        model: an offline asset, a folder or a Hub id.
        output: a folder that does not exist yet, or is empty; one that exists stays the same folder (a shell may stand in it), and
            config.json, without which nothing loads it, comes last.
        given: `key=value` experiment fields.

    Raises:
        InputError: `output` holds something, or what loading and converting refuse.
    """
    from dynamoe_lab.conversion import convert

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: not an empty folder; choose another --output, or remove it")
    experiment = _experiment(model, profile, given)
    environment.seed_generators(experiment.seed, experiment.threads)
    inputs = Inputs()
    dense, tokenizer = inputs.model(experiment)
    converted = convert(dense, experiment.dynamoe, calibration=inputs.blocks(experiment, "calibration"))
    folder = Path(os.path.abspath(output))  # `.` has no name of its own
    there, name = folder.exists(), f".{folder.name}.{os.getpid()}.tmp"
    scratch = folder / name if there else folder.with_name(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with told_when_full(output, "free some, or choose another --output"):
        try:
            converted.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            write_json(scratch / SETTINGS, without_paths(json.loads(json.dumps(asdict(experiment)))))
            if there:
                for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
                    os.replace(path, folder / path.name)
            else:
                os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    say(f"{_described(converted)}\nconverted: {output}")


def train_to_folder(
    model: str, output: Path, *, profile: str = "quick", given: Sequence[str] = (), home: Path, say: Callable[[str], None] = print
) -> None:
    """Train a model's routers and MLPs; a dense one is converted first. The same call goes on with a stopped run.

    Args:
        model: a converted checkpoint, or a dense model by any name that `load_model` takes.
        output: gets `checkpoint/` (with the tokenizer), `steps.csv`, and the experiment with the model's own dynamoe.* settings.
        given: `key=value` experiment fields. A converted checkpoint has its own dynamoe.* settings.

    Raises:
        InputError: `output` holds something that is no such run, dynamoe.* was given for a converted checkpoint, train.steps is 0.
    """
    from dynamoe_lab.conversion import calibrate, convert
    from dynamoe_lab.models import DynaMoEMixin
    from dynamoe_lab.training import train

    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "train.json").is_file())):
        raise InputError(f"{output}: not an empty folder, and no run to go on with; choose another --output, or remove it")
    experiment = _experiment(model, profile, given)
    if not experiment.train.steps:
        raise InputError("train.steps = 0: there is nothing to train; give -p train.steps=40, or use dynamoe-lab convert")
    environment.seed_generators(experiment.seed, experiment.threads)
    inputs = Inputs()
    network, tokenizer = inputs.model(experiment)
    if not isinstance(network, DynaMoEMixin):
        say(f"{model} is dense: converting it")
        statistics = run_step(calibrate, (network, inputs.blocks(experiment, "calibration")), home=home).value
        network = convert(network, experiment.dynamoe, statistics=statistics)
    elif own := [pair for pair in given if pair.startswith("dynamoe.")]:
        raise InputError(f"-p {own[0]}: {model} is converted already and keeps its settings; convert its dense parent again to change them")
    blocks = inputs.blocks(experiment, "train")
    folder = Path(os.path.abspath(output))
    with told_when_full(output, "free some, or choose another --output"):
        steps = train(network, blocks, experiment.train, output_dir=folder, tokenizer=tokenizer)
        write_json(folder / SETTINGS, without_paths(json.loads(json.dumps(asdict(replace(experiment, dynamoe=network.moe))))))
        write_atomic(folder / "steps.csv", steps.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    last = steps.iloc[-1]
    reached = f"LM loss {last['lm_loss']:.3f}, router accuracy {last['router_accuracy']:.1%} in the last step"
    say(f"{_described(network)}\n{int(last['step'])} steps, {int(last['tokens']):,} tokens: {reached}")
    say(f"trained: {output / 'checkpoint'}\nsteps: {output / 'steps.csv'}")
