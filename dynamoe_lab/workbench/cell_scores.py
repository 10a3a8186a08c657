"""Benchmark scores of the cells of a sweep, through the step cache, beside those of the dense model that they come from.

What is scored are the models that the cells measured on held-out text: nothing is trained here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.cells import Cell, Inputs, own_model

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

__all__ = ["pareto_case", "score_cells"]

KINDS = ("router", "label", "random", "static")  # what of a DynaMoE cell can be scored; of another method's, the method


def pareto_case(cell: Cell, mode: str | int) -> dict[str, Any]:
    """Which setting of the table `pareto` a mode of a cell is: method, theta, seed, train_tokens.

    Methods: "static" of one width for all tokens, "tomoe p = 0.7" of ToMoE's routers ("tomoe random p = 0.7" and the like of other modes),
    of a third method its name ("split", "split random"), else the mode. theta is nan where no labels were used: of a fixed width, and of a
    static cut that was not made beside a router (of a sweep's cell whose settings name no θ).

    Example:
        >>> kept = {"steps": None, "traces": {}, "losses": {}, "reference": None, "active": {}, "checkpoint": None}
        >>> lab.pareto_case(lab.Cell(lab.Experiment(), **kept, train_tokens=40_960), "router")
        {'method': 'router', 'theta': 0.9, 'seed': 0, 'train_tokens': 40960}
    """
    experiment = cell.experiment
    if experiment.method != "dynamoe":
        method, theta = f"{experiment.method}{'' if mode == 'router' else f' {mode}'}", float("nan")
        method += f" p = {experiment.tomoe.p:g}" if experiment.method == "tomoe" else ""
    else:
        static = isinstance(mode, int) or isinstance(experiment.dynamoe.train_route, int)
        beside = not isinstance(mode, int) and not (static and cell.settings and "dynamoe.theta" not in cell.settings)
        method, theta = "static" if static else mode, experiment.dynamoe.theta if beside else float("nan")
    return {"method": method, "theta": theta, "seed": experiment.train_config.seed, "train_tokens": cell.train_tokens}


def score_cells(
    cells: Sequence[Cell],
    *,
    step: Callable[..., Any],
    methods: Sequence[str] = ("router", "static"),
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Benchmark scores of cells and of the dense model that they come from; the steps are those of notebook 08.

    Args:
        cells: of one dense model.
        step: calls a function through the step cache, as `Run.step` does.
        methods: what is scored: "router", "label" and "random" (drawn with the router's shares on the held-out text) of cells with routers;
            "static" of cells that were trained at one width; "tomoe" of ToMoE's (its routers, deployed); so of any other method.
        tasks, limit: names or task files, and the first so many documents of each, as in `evaluate_task`; no tasks: the seven of the paper.

    Returns:
        Tables `scores` and `documents` as of `evaluate_task`, with method ("dense", or of `methods`), theta (of a static cut that of the
        router it stands beside; nan of the dense model), seed, train_tokens.

    Raises:
        InputError: an unknown method, cells of several dense models, "random" of a cell without a trace of its router; as `evaluate_task`.

    Example:
        >>> small = ["train.steps=0", "data.heldout=tiny", "data.heldout_tokens=256", "data.calibration_tokens=256"]
        >>> def step(function, *args, **kwargs):  # a notebook gives run.step
        ...     return function(*args, **kwargs)
        >>> cell = lab.run_cell(lab.load_experiment("smoke", small), step=step)
        >>> _, documents = lab.score_cells([cell], step=step, methods=["router"], tasks=["sciq"], limit=2)
        >>> documents.groupby(["method", "task"])["doc_id"].nunique()
        method  task
        dense   sciq    2
        router  sciq    2
        Name: doc_id, dtype: int64
    """
    import pandas as pd

    from dynamoe_lab.config import METHODS
    from dynamoe_lab.evaluation import TASKS, evaluate_task

    known = (*KINDS, *(name for name in METHODS if name != "dynamoe"))
    if unknown := [name for name in methods if name not in known]:
        raise InputError(f"score_cells: method {unknown[0]!r}: give {', '.join(known)}")
    models = {(cell.experiment.model, cell.experiment.dtype, cell.experiment.device): cell.experiment for cell in cells}
    if len(models) != 1:
        raise InputError(f"score_cells: cells of {len(models)} dense models: {', '.join(map(str, models))}; give those of one")
    inputs, found = Inputs(), ([], [])
    ((_, experiment),) = models.items()
    dense, tokenizer = inputs.model(experiment)

    def score(model: "PreTrainedModel", run: str, **case: Any) -> None:
        for task in tasks or TASKS:
            asked = {"limit": limit, "batch_size": experiment.evaluate.batch_size, "trust_remote_code": experiment.trust_remote_code}
            for kind, frame in zip(found, step(evaluate_task, model, tokenizer, task, run=run, **asked), strict=True):
                kind.append(frame.assign(**case))

    score(dense, "dense", method="dense", theta=float("nan"), seed=0, train_tokens=0)
    for cell in cells:
        for method in (name for name in methods if name in _kinds(cell)):
            model = own_model(cell, step, inputs)
            _route(model, cell, method)
            case = pareto_case(cell, "router" if method in ("static", cell.experiment.method) else method)
            score(model, {"tomoe": "ToMoE"}.get(method, method), **case)  # names of notebook 08
    scores, documents = (pd.concat(frames, ignore_index=True) for frames in found)
    return scores, documents


def _kinds(cell: Cell) -> tuple[str, ...]:
    """The methods that a cell's model can be scored as."""
    if cell.experiment.method != "dynamoe":
        return (cell.experiment.method,)
    return ("static",) if isinstance(cell.experiment.dynamoe.train_route, int) else ("router", "label", "random")


def _route(model: "PreTrainedModel", cell: Cell, method: str) -> None:
    """Route a cell's own model as a kind of `_kinds` does."""
    from dynamoe_lab.analysis import expert_usage

    moe = cell.experiment.dynamoe
    if method != "random":
        model.set_routing({"static": moe.train_route, cell.experiment.method: "router"}.get(method, method))
    elif "router" not in cell.traces:
        raise InputError("score_cells: 'random' draws with the router's shares, and a cell has no trace of it; measure mode 'router', too")
    else:
        shares = expert_usage(cell.traces["router"], theta=moe.theta, experts=moe.num_experts)
        model.set_routing("random", shares=shares, seed=cell.experiment.seed)
