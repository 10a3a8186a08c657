"""`dynamoe-lab convert`, `train` and `export`: the library on one model, from a shell, into a folder that any transformers script loads."""

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.cells import Inputs
from dynamoe_lab.workbench.files import (
    folder_lock,
    locked,
    occupied,
    require_writable,
    told_when_full,
    without_paths,
    write_atomic,
    write_json,
)
from dynamoe_lab.workbench.holds import hold_cache
from dynamoe_lab.workbench.steps import run_step

if TYPE_CHECKING:
    from dynamoe_lab.config import Experiment

__all__ = ["convert_to_folder", "export_to_folder", "train_to_folder"]

SETTINGS = "dynamoe_lab.json"  # beside the weights: the experiment that made them
MOVED = ".moved"  # in the scratch folder: names of the files that go into a folder that was there already


def _experiment(model: str, profile: str, given: Sequence[str]) -> "Experiment":
    from dynamoe_lab.config import load_experiment

    if model_given := [pair for pair in given if pair.startswith("model=")]:
        raise InputError(f"-p {model_given[0]}: the model is the command's first argument")
    return load_experiment(profile, [*given, f"model={json.dumps(model)}"])


def _described(model: Any) -> str:
    """Experts and parameters of a converted model; a stock Mixtral, which knows nothing of us, says them in its own words."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not hasattr(model, "routed_mlps"):
        config = model.config
        return f"{config.num_local_experts} experts of {config.intermediate_size} neurons in every MLP, {total:,} parameters"
    if model.method == "dynamoe":
        experts = ", ".join(f"{fraction:.0%}" for fraction in model.moe.experts)
        routers = sum(parameter.numel() for mlp in model.routed_mlps() for parameter in mlp.router.parameters())
        return f"{model.moe.num_experts} nested experts ({experts} of each MLP), {total:,} parameters, {routers:,} of them in routers"
    widths = [params / mlp.dense_params() for mlp in model.routed_mlps() for params in mlp.expert_params()]
    return f"{model.moe.num_experts} experts, on average {sum(widths) / len(widths):.1%} of an MLP, {total:,} parameters"


@contextmanager
def _new_folder(output: Path) -> Iterator[None]:
    """Keep a folder that is new or empty for ourselves while it is being filled; what a killed command left in or beside it goes."""
    from dynamoe_lab.assets import home

    require_writable(output)
    refuses = f"{output}: is being written by pid {{pid}}; wait for it, or choose another --output"
    with locked(folder_lock(home(), output), refuses=refuses):
        hold_cache(home())
        folder = Path(os.path.abspath(output))
        for left in (path for place in (folder.parent, folder) for path in place.glob(f".{glob.escape(folder.name)}.*.tmp")):
            if re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9]+\.tmp", left.name):  # `.nested.v2.42.tmp` belongs to nested.v2
                _take_back(left, folder)
                shutil.rmtree(left, ignore_errors=True)
        if occupied(output):
            raise InputError(f"{output}: not an empty folder; choose another --output, or remove it")
        yield


def _take_back(scratch: Path, folder: Path) -> None:
    """Remove what was moved from `scratch` into a folder before the rest could follow."""
    names = (scratch / MOVED).read_text(encoding="utf-8").splitlines() if (scratch / MOVED).is_file() else []
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _save(model: Any, tokenizer: Any, output: Path, settings: dict[str, Any]) -> None:
    """Checkpoint, tokenizer and settings into a folder that is new or empty, all at once or not at all; config.json comes last."""
    folder = Path(os.path.abspath(output))  # `.` has no name of its own
    there, name = folder.exists(), f".{folder.name}.{os.getpid()}.tmp"
    scratch = folder / name if there else folder.with_name(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with told_when_full(output, "free some, or choose another --output"):
        try:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            write_json(scratch / SETTINGS, without_paths(json.loads(json.dumps(settings))))
            if there:
                paths = sorted(scratch.iterdir(), key=lambda path: path.name == "config.json")
                write_atomic(scratch / MOVED, "\n".join(path.name for path in paths))  # a kill in between: whose files these are
                for path in paths:
                    os.replace(path, folder / path.name)
                (scratch / MOVED).unlink()
            else:
                os.replace(scratch, folder)
        finally:
            _take_back(scratch, folder)  # of an error on the way
            shutil.rmtree(scratch, ignore_errors=True)


def convert_to_folder(
    model: str, output: Path, *, profile: str = "quick", given: Sequence[str] = (), say: Callable[[str], None] = print
) -> None:
    """Convert a dense model and save checkpoint and tokenizer to `output`, all at once or not at all.

    Args:
        model: an offline asset, a folder or a Hub id.
        output: a folder that does not exist yet, or is empty; one that exists stays the same folder (a shell may stand in it), and
            config.json, without which nothing loads it, comes last.
        given: `key=value` experiment fields; `method=tomoe` makes a masked ToMoE model.

    Raises:
        InputError: `output` holds something, or what loading and converting refuse.
    """
    from dynamoe_lab.conversion import convert
    from dynamoe_lab.models import METHOD_MIXINS

    with _new_folder(output):
        experiment = _experiment(model, profile, given)
        _check_given(given, model, experiment.method, converted=False)
        environment.seed_generators(experiment.seed, experiment.threads)
        inputs = Inputs()
        dense, tokenizer = inputs.model(experiment)
        text = {"calibration": inputs.blocks(experiment, "calibration")} if METHOD_MIXINS[experiment.method].calibrated else {}
        converted = convert(dense, experiment.method_config, **text)
        _save(converted, tokenizer, output, asdict(experiment))
    say(f"{_described(converted)}\nconverted: {output}")


def export_to_folder(checkpoint: str, output: Path, *, form: str = "tomoe", say: Callable[[str], None] = print) -> None:
    """Export a masked ToMoE checkpoint to its deployed form, with the tokenizer, all at once or not at all.

    Args:
        checkpoint: a masked ToMoE model, trained or not: a folder or a Hub id.
        output: a folder that does not exist yet, or is empty.
        form: "tomoe", or "mixtral": stock transformers classes, which need whole attention, and pad narrower experts with zeros.

    Raises:
        InputError: `output` holds something, no masked ToMoE model, or one that the form cannot hold.
    """
    from dynamoe_lab.conversion import export
    from dynamoe_lab.loading import load_model
    from dynamoe_lab.models import ToMoEDeployedMixin, ToMoEMixin

    with _new_folder(output):
        masked, tokenizer = load_model(checkpoint)
        if not isinstance(masked, (ToMoEMixin, ToMoEDeployedMixin)):  # of a deployed one `export` says what to give
            raise InputError(
                f"export: {checkpoint} is no masked ToMoE model; make one of a dense model with dynamoe-lab convert, or train, "
                "and -p method=tomoe (in code: lab.convert(model, lab.ToMoEConfig()))"
            )
        deployed = export(masked, form=form)
        _save(deployed, tokenizer, output, {"form": form, "moe": masked.config.moe})
    say(f"{_described(deployed)}\nexported: {output}")


def _check_given(given: Sequence[str], model: str, method: str, *, converted: bool) -> None:
    """Refuse fields that this training would not read: those of another method, and a converted model's own."""
    from dynamoe_lab.config import METHODS, unread_section

    own, training = METHODS[method]
    for pair in given:
        name = pair.partition("=")[0]
        if converted and (name.startswith(f"{own}.") or name == "method") and pair != f"method={method}":
            raise InputError(
                f"-p {pair}: {model} is converted already and keeps its settings; convert its dense parent again to change them"
            )
        if (section := unread_section(name, method)) is not None:
            hint = f"give -p {training}.{pair.partition('.')[2]}" if section.endswith("train") else f"its own settings are {own}.*"
            raise InputError(f"-p {pair}: method {method} does not read {section}.*; {hint}")


def _check_steps(experiment: "Experiment") -> None:
    section = experiment.train_config.section
    if not experiment.train_config.steps:
        raise InputError(f"{section}.steps = 0: there is nothing to train; give -p {section}.steps=40, or use dynamoe-lab convert")


def train_to_folder(
    model: str, output: Path, *, profile: str = "quick", given: Sequence[str] = (), home: Path, say: Callable[[str], None] = print
) -> None:
    """Train a converted model; a dense one is converted first, as `method` says. The same call goes on with a stopped run.

    Args:
        model: a converted checkpoint, or a dense model by any name that `load_model` takes.
        output: gets `checkpoint/` (with the tokenizer), `steps.csv`, and the experiment with the model's own settings.
        given: `key=value` experiment fields. A converted checkpoint has its own method and dynamoe.* or tomoe.* settings.

    Raises:
        InputError: `output` holds something that is no such run, a field was given that the model does not read, there are no steps.
    """
    from dynamoe_lab.config import METHODS
    from dynamoe_lab.conversion import calibrate, convert
    from dynamoe_lab.models import METHOD_MIXINS, RoutedMixin
    from dynamoe_lab.training import train
    from dynamoe_lab.training.run import LOCK

    require_writable(output)
    if occupied(output, LOCK) and not (output / "train.json").is_file():
        raise InputError(f"{output}: not an empty folder, and no run to go on with; choose another --output, or remove it")
    experiment = _experiment(model, profile, given)
    hold_cache(home)
    _check_steps(experiment)
    if any(pair.startswith("method=") for pair in given):  # else a converted model decides, and it has to be loaded first
        _check_given(given, model, experiment.method, converted=False)
    environment.seed_generators(experiment.seed, experiment.threads)
    inputs = Inputs()
    network, tokenizer = inputs.model(experiment)
    if converted := isinstance(network, RoutedMixin):
        experiment = replace(experiment, method=network.method)
    _check_given(given, model, experiment.method, converted=converted)
    _check_steps(experiment)  # the method may be another than was thought
    settings = experiment.train_config
    if not converted:
        say(f"{model} is dense: converting it")
        text = {}
        if METHOD_MIXINS[experiment.method].calibrated:
            text["statistics"] = run_step(calibrate, (network, inputs.blocks(experiment, "calibration")), home=home).value
        network = convert(network, experiment.method_config, **text)
    blocks = inputs.blocks(experiment, "train")
    measured = {"heldout": inputs.blocks(experiment, "heldout")} if settings.eval_steps else {}
    folder = Path(os.path.abspath(output))
    with told_when_full(output, "free some, or choose another --output"):
        steps = train(network, blocks, settings, output_dir=folder, tokenizer=tokenizer, **measured)
        own = replace(experiment, **{METHODS[experiment.method][0]: network.moe})
        write_json(folder / SETTINGS, without_paths(json.loads(json.dumps(asdict(own)))))
        write_atomic(folder / "steps.csv", steps.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    last = steps.iloc[-1]
    say(f"{_described(network)}\n{int(last['step'])} steps, {int(last['tokens']):,} tokens: {_reached(last)} in the last step")
    say(f"trained: {output / 'checkpoint'}\nsteps: {output / 'steps.csv'}")


def _reached(last: Any) -> str:
    """How far training came, from the last row of the steps frame."""
    if "router_accuracy" in last:
        return f"LM loss {last['lm_loss']:.3f}, router accuracy {last['router_accuracy']:.1%}"
    if "active_ratio_mean" not in last:
        return f"LM loss {last['lm_loss']:.3f}"
    ratios = f"active ratio {last['active_ratio_mean']:.1%} (by the largest widths {last['active_ratio_max']:.1%})"
    reached = f"under training noise KL {last['kl_loss']:.3f} nats, {ratios}, union coverage {last['union_coverage']:.1%}"
    if last["open_ratio"] == last["open_ratio"]:  # measured: no nan
        held = f"KL {last['heldout_kl']:.3f} nats, active ratio {last['open_ratio']:.1%}, union coverage {last['open_union']:.1%}"
        reached = f"on held-out text without noise {held}; {reached}"
    return reached
