"""One experiment from dense model to traced routing, through the step cache: what a sweep does for every cell of its grid.

It calls the library exactly as the notebooks do, so that the steps are theirs, too: a model that a notebook trained is not trained again.
The experiment's method decides how it is converted and trained; of ToMoE the deployed form is measured.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynamoe_lab.config import Experiment
    from dynamoe_lab.data import Blocks

__all__ = ["Cell", "Inputs", "check_modes", "own_model", "run_cell", "static_cut", "time_cells"]

Mode = str | int


@dataclass
class Cell:
    """What one experiment gave; a mode is who chose the experts on the held-out text."""

    experiment: "Experiment"
    steps: "pd.DataFrame | None"  # table `steps` of training; None: not trained
    traces: "dict[Mode, pd.DataFrame]"  # measured mode -> table `routing`; a fixed width has none, it routes nothing
    losses: "dict[Mode, pd.DataFrame]"  # mode -> one row a document: document, nll, tokens, positions, active_mlp_fraction
    reference: "pd.DataFrame"  # `document_losses` of the dense model
    active: "dict[Mode, pd.Series]"  # mode -> the whole model's row of `count_active_params`
    checkpoint: Path | None  # folder of the trained model
    train_tokens: int  # 0: not trained
    neurons: int = 0  # of each dense MLP
    neuron_params: int = 0  # parameters of one neuron of every MLP together
    dense_params: int = 0  # of the dense model
    fractions: Any = ()  # share of the MLP that each expert runs, as analysis takes it: [E], or by layer and expert (ToMoE)
    union_coverage: float = math.nan  # ToMoE: share of all neurons that some expert has
    masks: "pd.DataFrame | None" = None  # ToMoE: table `masks`, the neurons of every expert
    divergences: "pd.DataFrame | None" = None  # ToMoE under "router": document, domain, kl (to the dense model, nats), tokens
    settings: dict[str, Any] = field(default_factory=dict)  # the fields that a sweep set, by dotted name


class Inputs:
    """Loads the model and the blocks of an experiment and keeps the last ones: the cells of a sweep mostly share them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what is kept, to free its memory."""
        self._model_key: tuple | None = None
        self._model: Any = None
        self._converted: Any = None
        self._blocks: dict[tuple, Blocks] = {}

    def model(self, experiment: "Experiment") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The experiment's model and its tokenizer; the same objects for the same model, to be left unchanged."""
        from dynamoe_lab.loading import load_model

        key = (experiment.model, experiment.dtype, experiment.device, experiment.trust_remote_code)
        if key != self._model_key:
            self.clear()
            name, dtype, device, trust = key
            self._model = load_model(name, dtype=dtype, device=device, trust_remote_code=trust)
            self._model_key = key
        return self._model

    def blocks(self, experiment: "Experiment", split: str) -> "Blocks":
        """The blocks of a split: "train", "calibration" or "heldout"."""
        from dynamoe_lab.data import load_blocks

        _, tokenizer = self.model(experiment)
        data = experiment.data
        text, tokens = getattr(data, split), getattr(data, f"{split}_tokens")
        key = (text, data.context, tokens, split, experiment.seed)
        if key not in self._blocks:
            self._blocks[key] = load_blocks(text, tokenizer, context=data.context, tokens=tokens, split=split, seed=experiment.seed)
        return self._blocks[key]

    def converted(self, experiment: "Experiment", statistics: "pd.DataFrame | None") -> "PreTrainedModel":
        """The converted model, routed by its routers; cells that differ in settings that shape no weight share one conversion.

        Args:
            statistics: of `calibrate`, for a method whose conversion needs them.
        """
        from dynamoe_lab.conversion import convert

        dense, _ = self.model(experiment)
        method = experiment.method_config
        key, model = self._converted if self._converted else (None, None)
        if key is not None and statistics is not None and key.equals(statistics):
            with contextlib.suppress(ValueError):  # other weights: converted below
                model.reconfigure(method)
                model.set_routing("router")
                return model
        self._converted = None  # frees its memory before the next one needs it
        if statistics is None:
            return convert(dense, method)
        model = convert(dense, method, statistics=statistics)
        self._converted = (statistics, model)
        return model


def check_modes(modes: Sequence[Mode], experts: int, where: str, method: str = "dynamoe") -> None:
    """Raise `InputError` unless every mode is one that the method has, or an expert's index below `experts`."""
    from dynamoe_lab.models import METHOD_MIXINS

    known = METHOD_MIXINS[method].routing_modes
    if not modes:
        raise InputError(f"{where}: no modes; give e.g. [router]")
    names = ", ".join(name for name, reason in known.items() if reason is None)
    for mode in modes:
        if isinstance(mode, str) and known.get(mode) is not None:
            raise InputError(f"{where}: mode {mode!r}: {known[mode]}")
        fits = mode in known if isinstance(mode, str) else isinstance(mode, int) and not isinstance(mode, bool) and 0 <= mode < experts
        if not fits:
            raise InputError(f"{where}: mode {mode!r}: give {names}, or an expert's index from 0 to {experts - 1}")


def run_cell(
    experiment: "Experiment", *, modes: Sequence[Mode] = ("router",), step: Callable[..., Any], inputs: Inputs | None = None
) -> Cell:
    """Convert, train and measure one experiment.

    Args:
        experiment: `train.steps = 0` (ToMoE: `tomoe_train.steps`) leaves the model as it was converted. Where `eval_steps` asks for it,
            training measures the held-out text. With `dynamoe.train_route` an expert's index (a fixed width for every token: the static
            control) the modes "router" and "random" are that index, for its routers were never followed: drawing with all shares on one
            expert is that expert.
        modes: routings that are measured on the held-out text: "router", "full", an expert's index, "random", drawn with the router's own
            shares in every layer from `experiment.seed`, and of DynaMoE "label". A ToMoE model is exported first: what is measured is the
            deployed form, of which "full" is all neurons that some expert has.
        step: calls a function through the step cache, as `Run.step` does.
        inputs: where models and blocks come from; cells that are given the same one share them.

    Raises:
        InputError: a mode that this experiment does not have, and whatever the steps refuse.

    Example:
        >>> small = ["train.steps=0", "data.heldout=tiny", "data.heldout_tokens=256", "data.calibration_tokens=256"]
        >>> def step(function, *args, **kwargs):  # a notebook gives run.step
        ...     return function(*args, **kwargs)
        >>> cell = lab.run_cell(lab.load_experiment("smoke", small), modes=["router", 1], step=step)
        >>> list(cell.traces), float(cell.active[1]["active_mlp_fraction"])
        (['router'], 0.5)
    """
    from dynamoe_lab.analysis import expert_usage, routed_losses
    from dynamoe_lab.evaluation import count_active_params, document_divergences, document_losses, trace_routing
    from dynamoe_lab.loading import load_model
    from dynamoe_lab.training import train

    method, training = experiment.method_config, experiment.train_config
    check_modes(modes, method.num_experts, "run_cell", experiment.method)
    inputs = Inputs() if inputs is None else inputs
    dense, tokenizer = inputs.model(experiment)
    model = _converted(experiment, step, inputs)
    steps, checkpoint = None, None
    if training.steps:
        measured = {"heldout": inputs.blocks(experiment, "heldout")} if training.eval_steps else {}  # as notebooks do
        steps, folder = step(train, model, inputs.blocks(experiment, "train"), training, tokenizer=tokenizer, **measured)
        checkpoint = folder / "checkpoint"
        model, _ = load_model(checkpoint, dtype=experiment.dtype, device=experiment.device)
    model, found = _measurable(experiment, model)
    heldout = inputs.blocks(experiment, "heldout")
    measured = {"batch_size": experiment.evaluate.batch_size}
    reference = step(document_losses, dense, heldout, **measured)
    traces, losses, active, routed = {}, {}, {}, None

    def routed_by_routers() -> "pd.DataFrame":
        nonlocal routed
        if routed is None:
            model.set_routing("router")
            routed = step(trace_routing, model, heldout, **measured, run="router")
        return routed

    for mode in modes:
        width = _followed(experiment, mode)
        if width == "random":
            shares = expert_usage(routed_by_routers(), experts=method.num_experts)
            model.set_routing("random", shares=shares, seed=experiment.seed)
        else:
            model.set_routing(width)
        if width == "full" or isinstance(width, int):  # no routing to trace, and only the chosen neurons to compute
            active[mode] = count_active_params(model, run=str(mode)).iloc[-1]
            losses[mode] = step(document_losses, model, heldout, **measured)
            losses[mode]["positions"] = losses[mode]["tokens"]
            losses[mode]["active_mlp_fraction"] = active[mode]["active_mlp_fraction"]
        else:
            traces[mode] = routed_by_routers() if mode == "router" else step(trace_routing, model, heldout, **measured, run=mode)
            active[mode] = count_active_params(model, traces[mode], run=mode).iloc[-1]
            losses[mode] = routed_losses(traces[mode], fractions=found["fractions"])
    if experiment.method == "tomoe" and "router" in modes:
        model.set_routing("router")
        found["divergences"] = step(document_divergences, model, heldout, reference=dense, **measured)
    neurons, neuron_params = _neurons(dense)
    return Cell(
        experiment=experiment,
        steps=steps,
        traces=traces,
        losses=losses,
        reference=reference,
        active=active,
        checkpoint=checkpoint,
        train_tokens=0 if steps is None else int(steps["tokens"].iloc[-1]),
        neurons=neurons,
        neuron_params=neuron_params,
        dense_params=dense.num_parameters(),
        **found,
    )


def _converted(experiment: "Experiment", step: Callable[..., Any], inputs: Inputs) -> "PreTrainedModel":
    """The model as it is before training; calibrated first where the method's conversion needs it."""
    from dynamoe_lab.conversion import calibrate
    from dynamoe_lab.models import METHOD_MIXINS

    if not METHOD_MIXINS[experiment.method].calibrated:
        return inputs.converted(experiment, None)
    dense, _ = inputs.model(experiment)
    return inputs.converted(experiment, step(calibrate, dense, inputs.blocks(experiment, "calibration")))


def _measurable(experiment: "Experiment", model: "PreTrainedModel") -> "tuple[PreTrainedModel, dict[str, Any]]":
    """The form of a model that is measured, and what a cell keeps of it; of a method that needs nothing of its own, the model itself."""
    from dynamoe_lab.evaluation import expert_fractions

    if experiment.method == "dynamoe":
        return model, {"fractions": experiment.dynamoe.experts}
    return _deployed(model) if experiment.method == "tomoe" else (model, {"fractions": expert_fractions(model)})


def _deployed(model: "PreTrainedModel") -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Of a masked ToMoE model the form that it is used in, and what its masks leave."""
    from dynamoe_lab.conversion import export
    from dynamoe_lab.evaluation import expert_fractions, expert_masks
    from dynamoe_lab.models import family_of

    masks, deployed = expert_masks(model), export(model)
    width = getattr(model.config, family_of(model.config.model_type).intermediate_size)
    union = deployed.config.moe["union_sizes"]
    found = {"fractions": expert_fractions(deployed), "masks": masks, "union_coverage": sum(union) / (len(union) * width)}
    return deployed, found


def _followed(experiment: "Experiment", mode: Mode) -> Mode:
    """Who really decides under a mode: a model that was trained at one width goes that way, its routers were never followed."""
    route = getattr(experiment.method_config, "train_route", None)
    return route if mode in ("router", "random") and isinstance(route, int) else mode


def time_cells(cells: Sequence[Cell], *, step: Callable[..., Any], pairs: int = 3, batch: int = 2) -> "list[dict[Mode, pd.Series]]":
    """Measured time of a prefill beside the dense model, for every cell and each of its modes that saves time.

    Cells are timed one after the other, in this process, for a neighbour on the same cores would be measured, too; a sweep may run several
    at once, so call this when it is done. "label" and "random" are not timed: labels take the full MLP, and random draws stand for the
    router's own work.

    Args:
        cells: of a sweep, or of `run_cell`.
        step: calls a function through the step cache, as `Run.step` does.
        pairs: rounds in which the dense model and each mode run once; 0: nothing is measured.
        batch: held-out blocks of one prefill, which are the ones that the router is timed on.

    Returns:
        A dict per cell: mode -> row of `latency_ratios` (time_ratio, time_ratio_low, time_ratio_high, amdahl, realised, ...).

    Raises:
        InputError: what `measure_latency` refuses, e.g. more blocks than there are.

    Example:
        >>> small = ["train.steps=0", "data.heldout=tiny", "data.heldout_tokens=256", "data.calibration_tokens=256"]
        >>> def step(function, *args, **kwargs):  # a notebook gives run.step
        ...     return function(*args, **kwargs)
        >>> cell = lab.run_cell(lab.load_experiment("smoke", small), modes=[1], step=step)
        >>> (times,) = lab.time_cells([cell], step=step, pairs=1, batch=1)
        >>> float(times[1]["active_mlp_fraction"]), int(times[1]["n"])
        (0.5, 1)
    """
    from dynamoe_lab.analysis import latency_ratios
    from dynamoe_lab.evaluation import measure_latency
    from dynamoe_lab.evaluation.overrule import routing_name

    inputs, found = Inputs(), []
    for cell in cells:
        widths = {mode: _followed(cell.experiment, mode) for mode in cell.losses if mode not in ("label", "random")}
        if not widths or not pairs:
            found.append({})
            continue
        dense, _ = inputs.model(cell.experiment)
        ids = inputs.blocks(cell.experiment, "heldout").ids[:batch]
        setting = {"batch": batch, "tokens": ids.shape[1], "routings": tuple(dict.fromkeys(widths.values())), "pairs": pairs}
        ratios = latency_ratios(step(measure_latency, dense, own_model(cell, step, inputs), ids=ids, **setting)).set_index("routing")
        found.append({mode: ratios.loc[routing_name(width)] for mode, width in widths.items()})
    return found


def own_model(cell: Cell, step: Callable[..., Any], inputs: Inputs) -> "PreTrainedModel":
    """The model that a cell measured: of its checkpoint, or of the conversion where nothing was trained."""
    from dynamoe_lab.loading import load_model

    experiment = cell.experiment
    if cell.checkpoint is not None:
        model, _ = load_model(cell.checkpoint, dtype=experiment.dtype, device=experiment.device)
    else:
        model = _converted(experiment, step, inputs)
    return _measurable(experiment, model)[0]


def _neurons(dense: "PreTrainedModel") -> tuple[int, int]:
    """Neurons of each MLP, and the parameters of one neuron of every MLP together: rows of gate and up, a column of down, biases within."""
    from dynamoe_lab.models import decoder_layers, family_of

    family = family_of(dense.config.model_type)
    neurons, params = getattr(dense.config, family.intermediate_size), 0
    for layer in decoder_layers(dense):
        held = [getattr(family.holder(layer), name) for name in family.projections]
        shared = 0 if held[-1].bias is None else held[-1].bias.numel()
        params += (sum(parameter.numel() for linear in held for parameter in linear.parameters()) - shared) // neurons
    return neurons, params


def static_cut(cell: Cell) -> dict[str, Any] | None:
    """The static control of a routed cell: one width for all tokens, trained with as many, that costs what the routed model costs.

    The cut asks no router, so at the same number of active parameters its MLPs are wider than the routed model's are on average: its width
    is the largest multiple of 1/1000 of the MLP whose parameters are no more than those of the cell's active MLPs and routers. What a ToMoE
    model saves in attention, its cut has to save in the MLPs, too.

    Args:
        cell: a cell with mode "router".

    Returns:
        Settings for `run.sweep(cells=[...], modes=["router"])`: theta and train.seed of the cell, experts [width, 1.0], every token sent to
        the first, no router loss; other fields are those of the run. Of another method's cell: method dynamoe, with its steps, batches and
        seed. None if the dense model is as cheap.

    Raises:
        InputError: the cell was measured without mode "router".

    Example:
        >>> active = {"router": pd.Series({"mlp_total": 1000, "mlp_active": 600, "router": 60})}
        >>> kept = {"steps": None, "traces": {}, "losses": {}, "reference": None, "checkpoint": None, "train_tokens": 0}
        >>> cell = lab.Cell(lab.Experiment(), active=active, neurons=1000, neuron_params=1, **kept)
        >>> lab.static_cut(cell)["dynamoe.experts"]  # 600 + 60 of 1000 parameters
        [0.66, 1.0]
    """
    if "router" not in cell.active:
        raise InputError(f"static_cut: the cell has no mode 'router' but {', '.join(map(str, cell.active))}; measure it with router, too")
    active, experiment = cell.active["router"], cell.experiment
    total, budget = float(active["mlp_total"]), float(active["mlp_active"] + active["router"])
    if experiment.method == "dynamoe":
        settings = {"dynamoe.theta": experiment.dynamoe.theta, "train.seed": experiment.train.seed}
    else:
        budget += float(active["other"]) - (cell.dense_params - total)
        training = {name: getattr(experiment.train_config, name) for name in ("steps", "batch_size", "accumulation", "seed")}
        settings = {"method": "dynamoe", **{f"train.{name}": value for name, value in training.items()}}
    if budget >= total:
        return None
    thousandths = int(1000 * budget // total)
    neurons = cell.neurons
    while neurons and thousandths > 1 and total - (neurons - round(thousandths / 1000 * neurons)) * cell.neuron_params > budget:
        thousandths -= 1  # a width becomes whole neurons, and this one was rounded up
    return {
        **settings,
        "dynamoe.experts": [thousandths / 1000, 1.0],
        "dynamoe.train_route": 0,
        "dynamoe.lambda_router": 0.0,
    }
