"""What a sweep gave: one tidy table with intervals, and the two files that keep it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.workbench import environment
from dynamoe_lab.workbench.cells import Cell
from dynamoe_lab.workbench.files import remove_leftovers, without_paths, write_atomic, write_json
from dynamoe_lab.workbench.records import now

if TYPE_CHECKING:
    import pandas as pd

    from dynamoe_lab.workbench.sweep import Outcome, SweepResult

__all__ = ["read_sweep", "sweep_command", "sweep_table", "write_sweep"]

SWEEP_FORMAT = 1


def sweep_table(result: "SweepResult") -> "pd.DataFrame":
    """Table `sweep`: one row per cell, mode and metric.

    Returns:
        cell (number, from 1), a column for every field that the sweep varies (a list as its text), mode, metric, value, low, high, n
        (documents), active_mlp_fraction (of the mode), active_params, train_tokens, status ("ok" or "failed"), error. Metrics:
        perplexity_ratio (to the dense model, paired by document), active_mlp_fraction, and for mode "router" of a model whose routers
        choose: of DynaMoE router_accuracy and majority_accuracy (always answering each layer's commonest label); of ToMoE
        heldout_kl (of the next token to the dense model's, nats), active_params_fraction (of the dense model's parameters, for attention is
        pruned, too) and union_coverage (share of neurons that some expert has, which needs no sample). Intervals come from resampling
        documents. A cell that failed has one row without mode and metric.
    """
    import pandas as pd

    rows = []
    for plan, outcome in zip(result.plans, result.outcomes, strict=True):
        base: dict[str, Any] = {"cell": plan.number}
        base |= {name: _shown(_value_of(plan.experiment, name)) for name in result.sweep.fields}
        measured = _measured(result.by_number[plan.number]) if plan.number in result.by_number else [{}]
        rows += [{**base, **row, "status": outcome.status, "error": outcome.error} for row in measured]
    values = ["value", "low", "high", "n", "active_mlp_fraction", "active_params", "train_tokens"]
    frame = pd.DataFrame(rows, columns=["cell", *result.sweep.fields, "mode", "metric", *values, "status", "error"])
    return frame.astype({"mode": object, "metric": object, **dict.fromkeys(values, float)})


def read_sweep(path: str | Path) -> "pd.DataFrame":
    """The table `sweep` from the `sweep.csv` that `dynamoe-lab sweep` wrote; relative paths start at the project root.

    Raises:
        InputError: there is no such file, or it is no such table.

    Example:
        >>> from pathlib import Path
        >>> table = pd.DataFrame({"cell": [1], "mode": [1], "metric": "perplexity_ratio", "value": 1.5, "status": "ok"})
        >>> table.to_csv("sweep.csv", index=False)
        >>> lab.read_sweep(Path("sweep.csv").absolute())  # a mode is text, an expert's index, too
           cell mode            metric  value status
        0     1    1  perplexity_ratio    1.5     ok
    """
    import pandas as pd

    from dynamoe_lab.config import project_root

    try:
        table = pd.read_csv(project_root() / path, dtype={"mode": object})
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise InputError(f"{path}: {reason}; make one with: dynamoe-lab sweep FILE") from error
    if missing := [name for name in ("cell", "mode", "metric", "value", "status") if name not in table.columns]:
        raise InputError(f"{path}: no table of a sweep, it lacks {', '.join(missing)}; make one with: dynamoe-lab sweep FILE")
    return table


def _measured(cell: Cell) -> list[dict[str, Any]]:
    from dynamoe_lab.analysis import active_fraction, perplexity_ratio

    measure = cell.experiment.evaluate
    interval = {"confidence": measure.confidence, "resamples": measure.bootstrap}
    rows = []
    for mode, losses in cell.losses.items():
        active, trace = cell.active[mode], cell.traces.get(mode)
        base = {"mode": str(mode), "train_tokens": cell.train_tokens}
        base |= {name: float(active[name]) for name in ("active_mlp_fraction", "active_params")}
        ratio = perplexity_ratio(losses, cell.reference, bootstrap=measure.bootstrap, confidence=measure.confidence).iloc[0]
        found = [("perplexity_ratio", ratio["ratio"], ratio["low"], ratio["high"], ratio["n"])]
        if trace is None:  # a fixed width, known without a sample
            found.append(("active_mlp_fraction", *[base["active_mlp_fraction"]] * 3, ratio["n"]))
        else:
            share = _pooled(active_fraction(trace, fractions=cell.fractions, **interval))
            found.append(("active_mlp_fraction", share["active_fraction"], share["low"], share["high"], share["documents"]))
        if mode == "router" and cell.experiment.method == "tomoe":
            found += _mask_metrics(cell, share, interval)
        elif mode == "router" and trace is not None and "label" in trace:
            found += _router_metrics(cell, interval)
        rows += [base | dict(zip(("metric", "value", "low", "high", "n"), values, strict=True)) for values in found]
    return rows


def _router_metrics(cell: Cell, interval: dict[str, Any]) -> list[tuple]:
    """How often routers that learn labels gave them, beside the commonest label: metric, value, low, high, n."""
    from dynamoe_lab.analysis import router_chance

    method = cell.experiment.method_config
    chance = _pooled(router_chance(cell.traces["router"], theta=method.theta, experts=method.num_experts, **interval))
    accuracy = (chance[f"accuracy{end}"] for end in ("", "_low", "_high"))
    return [
        ("router_accuracy", *accuracy, chance["documents"]),
        ("majority_accuracy", chance["majority"], None, None, chance["documents"]),
    ]


def _mask_metrics(cell: Cell, share: "pd.Series", interval: dict[str, Any]) -> list[tuple]:
    """What ToMoE's masks leave of the model: metric, value, low, high, n; `share`: the pooled row of `active_fraction`."""
    from dynamoe_lab.analysis.statistics import ratio_of_sums

    divergences, active = cell.divergences, cell.active["router"]
    kl = ratio_of_sums(divergences["kl"], divergences["tokens"], **interval)
    others = active["active_params"] - active["mlp_active"]  # the same for every token
    params = [(others + share[end] * active["mlp_total"]) / cell.dense_params for end in ("active_fraction", "low", "high")]
    return [
        ("heldout_kl", kl.value, kl.low, kl.high, kl.n),
        ("active_params_fraction", *params, share["documents"]),
        ("union_coverage", *[cell.union_coverage] * 3, kl.n),
    ]


def _pooled(frame: "pd.DataFrame") -> "pd.Series":
    return frame[frame["layer"].astype(str) == "all"].iloc[0]


def _value_of(experiment: Any, name: str) -> Any:
    for part in name.split("."):
        experiment = getattr(experiment, part)
    return experiment


def _shown(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple)) else value


def sweep_command(file: str, profile: str | None, given: Sequence[str], output: Path | None) -> list[str]:
    """The words that run a sweep again."""
    words = ["dynamoe-lab", "sweep", file, *(["--profile", profile] if profile else [])]
    for pair in given:
        words += ["-p", pair]
    return [*words, *(["--output", str(output)] if output else [])]


def write_sweep(result: "SweepResult", folder: Path, *, root: Path, command: list[str]) -> Path:
    """Write `sweep.csv` (the table) and `sweep.json` (what was asked, how every cell ended, what it ran on) into `folder`, atomically.

    Args:
        root: the project; its paths and other paths of the machine are shortened in the JSON.
        command: the words that make it again.

    The caller holds the folder's lock.

    Returns:
        The path of the csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    csv = folder / "sweep.csv"
    write_atomic(csv, result.table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    commit, dirty = environment.git_state(root)
    content = {
        "format": SWEEP_FORMAT,
        "sweep": asdict(result.sweep),
        "command": shlex.join(command),
        "finished": now(),
        "cells": [
            {**_ending(outcome), "config": asdict(plan.experiment)} for plan, outcome in zip(result.plans, result.outcomes, strict=True)
        ],
        "env": {
            "commit": commit,
            "dirty": dirty,
            "code": environment.code_digest(),
            "rooms": environment.room_digests(),
            "platform": environment.platform_name(),
            "packages": environment.versions(),
        },
    }
    write_json(folder / "sweep.json", without_paths(json.loads(json.dumps(content)), root))
    return csv


def _ending(outcome: "Outcome") -> dict[str, Any]:
    steps = [{"function": use.function, "key": use.key, "cached": use.cached, "stale": use.stale} for use in outcome.steps]
    return {
        "cell": outcome.number,
        "settings": outcome.settings,
        "status": outcome.status,
        "error": outcome.error,
        "seconds": round(outcome.seconds, 3),
        "cached": outcome.cached,
        "threads": outcome.threads,
        "steps": steps,
    }
