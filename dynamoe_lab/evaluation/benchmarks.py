"""Scores on lm-eval's tasks, in-process: its definitions, its evaluator, our count of what was active.

lm-eval's request cache is not used: it does not know which model answered. A task is a step of its own (`run.step(evaluate_task, ...)`),
kept as it finishes, under a key with the model's weights, routing and dtype, the tokenizer, the limit, the batch size and `DEFINITIONS`.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.routing import evaluating
from dynamoe_lab.evaluation.task_sources import task_sources
from dynamoe_lab.evaluation.tasks import DEFINITIONS, TASKS, load_tasks, quiet_libraries, task_split
from dynamoe_lab.models import RoutedMixin

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["evaluate_benchmarks", "evaluate_task"]

_EVERY = 10.0  # seconds between progress lines
_SEED = 1234  # lm-eval's own, for tasks with examples in the prompt; the seven have none


def evaluate_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str | Path] = TASKS,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    run: str = "",
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`evaluate_task` of every task, one table of each kind: scores, documents. Names are checked before anything is scored.

    Raises:
        InputError: as `evaluate_task` and `load_tasks`.
    """
    tasks = [tasks] if isinstance(tasks, (str, Path)) else list(tasks)
    _check(limit, batch_size)
    load_tasks(tasks)
    parts = [evaluate_task(model, tokenizer, task, limit=limit, batch_size=batch_size, run=run, progress=progress) for task in tasks]
    scores, documents = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    return scores, documents


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    run: str = "",
    progress: bool = True,
    definitions: str = DEFINITIONS,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score a dense or converted model, zero-shot, under the routing that is set, which is left as it was.

    Args:
        task: a name or task file as in `load_tasks`; a step's key has the contents of the file and of all that it reads (`task_sources`).
        limit: score the first so many documents; None: all.
        batch_size: sequences of a forward. It moves scores within float ties only.
        run: names the model in the tables.
        progress: say on stderr how far it is and how long it still takes.
        definitions: leave it: it puts the versions of lm-eval and of the local documents into a step's key.

    Returns:
        Table `scores`, a row per metric: run, task, split (also how it differs from the stock one), metric, value, stderr (NaN where it
        has none), n, task_version, batch_size, dtype. Metrics: the task's own (acc; acc_norm: the choice by log-likelihood per character;
        perplexity: LAMBADA's, of the last word); bits_per_byte (-log2 p of the right answer over the UTF-8 bytes of what is scored, its
        leading space too; mean over documents); active_params and active_mlp_fraction (mean over the tokens of all forwards, pads left
        out; n: these tokens); seconds_total, and share_outside_model (of them: loading data, tokens, scoring, tables; 0 to 1).
        Table `documents`, a row per document and metric: run, task, doc_id, metric, value, n (documents of the task). Metrics: acc,
        acc_norm, bits_per_byte; loglikelihood (nats, of the right answer); for tasks with choices also choice (index of the most
        likely one) and margin (nats between it and the next: near 0, the choice is a float tie).

    Raises:
        InputError: limit or batch size below 1; as `load_tasks`.
    """
    _check(limit, batch_size)
    began = time.perf_counter()
    ((name, definition),) = load_tasks([task]).items()
    with _scoring(model, tokenizer, batch_size, _Progress(name) if progress else None) as lm:
        samples, values = _run(lm, name, definition, limit)
        active = lm.active() if lm.tokens else None
    documents = _documents(samples, definition)
    n = documents["doc_id"].nunique()
    rows = [(metric, *measured, n) for metric, measured in _task_scores(values, documents).items()]
    if active is not None:  # generated text is not counted
        rows += [("active_params", active[0], math.nan, lm.tokens), ("active_mlp_fraction", active[1], math.nan, lm.tokens)]
    seconds = time.perf_counter() - began
    rows += [("seconds_total", seconds, math.nan, n), ("share_outside_model", 1 - lm.model_seconds / seconds, math.nan, n)]
    scores = pd.DataFrame(rows, columns=["metric", "value", "stderr", "n"])
    names = {"run": run, "task": name, "split": task_split(task, definition)}
    conditions = {"task_version": str(definition.VERSION), "batch_size": batch_size, "dtype": str(model.dtype).removeprefix("torch.")}
    scores = scores.assign(**names, **conditions)[[*names, *scores.columns, *conditions]]
    return scores, documents.assign(run=run, task=name, n=n)[["run", "task", *documents.columns, "n"]]


evaluate_task.step_ignores = ("progress",)  # how it is watched does not change what comes out
evaluate_task.step_reads = {"task": task_sources}


def _check(limit: int | None, batch_size: int) -> None:
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is None and name == "limit":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} = {value!r}: give a whole number of at least 1" + (", or none for all documents" * (name == "limit")))


# --- lm-eval -----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _scoring(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Callable | None) -> Iterator[Any]:
    """The model as lm-eval wants it; afterwards as it was found. The tokenizer gets a pad token of lm-eval's choice for the time."""
    from dynamoe_lab.evaluation.benchmark_lm import BenchmarkLM

    was_training, pad = model.training, tokenizer.pad_token
    routed = evaluating(model, "evaluate_task") if isinstance(model, RoutedMixin) else contextlib.nullcontext()
    try:
        with routed, quiet_libraries():
            yield BenchmarkLM(model, tokenizer, batch_size=batch_size, progress=progress)
    finally:
        model.train(was_training)
        tokenizer.pad_token = pad


def _run(lm: Any, name: str, definition: "Task", limit: int | None) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """lm-eval's samples, and its metrics by name; standard errors are ours, since its bootstrap would start processes."""
    from lm_eval.evaluator import evaluate

    definition.set_fewshot_seed(_SEED)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):  # bars that no setting turns off
        results = evaluate(lm, {"tasks": {name: definition}}, limit=limit, bootstrap_iters=0)
    values = {
        _plain_name(metric): float(value)
        for metric, value in results["results"][name].items()
        if "," in metric and "_stderr," not in metric and isinstance(value, (int, float))
    }
    return results["samples"][name], values


def _plain_name(metric: str) -> str:
    """lm-eval's "acc,none" is acc; of several filters the name stays."""
    return metric.removesuffix(",none")


class _Progress:
    """Tells how far the scoring is, at most every few seconds; its stderr is the one from before lm-eval's bars were silenced."""

    def __init__(self, name: str):
        self.name, self.stream = name, sys.stderr
        self.began = self.told = time.perf_counter()

    def __call__(self, done: int, whole: int) -> None:
        now = time.perf_counter()
        if now - self.told < _EVERY and done < whole:
            return
        self.told, used = now, now - self.began
        left = f"about {used * (whole - done) / done:.0f} s left" if done < whole else f"{whole / used:.0f} tokens/s"
        print(f"{self.name}: {done:,} of {whole:,} tokens in {used:.0f} s, {left}", file=self.stream, flush=True)


# --- tables ------------------------------------------------------------------------------------------------------------------------


def _documents(samples: list[dict[str, Any]], definition: "Task") -> pd.DataFrame:
    """Table `documents` without run and task."""
    rows = []
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        own = {f"{metric}{suffix}": sample[metric] for metric in sample["metrics"] if isinstance(sample[metric], (int, float, np.number))}
        own.pop("perplexity", None)  # lm-eval's name for a document's log-likelihood, which comes next
        rows += [(sample["doc_id"], metric, float(value)) for metric, value in {**own, **_answer(sample, definition)}.items()]
    return pd.DataFrame(rows, columns=["doc_id", "metric", "value"])


def _answer(sample: dict[str, Any], definition: "Task") -> dict[str, float]:
    """What the log-likelihoods of a document say of its right answer, and of the choice."""
    if definition.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return {}
    logs, right, found = [float(log) for log, _ in sample["filtered_resps"]], 0, {}
    if definition.OUTPUT_TYPE == "multiple_choice":
        choices = definition.doc_to_choice(sample["doc"])
        logs = logs[: len(choices)]  # tasks that score mutual information ask once more, without context
        right = _right_choice(sample["doc"], choices, definition)
        best, following = sorted(logs, reverse=True)[:2]
        found = {"choice": float(np.argmax(logs)), "margin": best - following}
        if right is None:
            return found
    scored = sample["arguments"][right][1]
    bits = -logs[right] / math.log(2) / len(scored.encode("utf-8"))
    return {"bits_per_byte": bits, "loglikelihood": logs[right], **found}


def _right_choice(document: dict[str, Any], choices: list[str], definition: "Task") -> int | None:
    """The index of the right choice; None if the task names none, or several."""
    # with several contexts for one continuation (WinoGrande) the text's place holds the index
    gold = definition.doc_to_text(document) if definition.multiple_input else definition.doc_to_target(document)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def _task_scores(values: dict[str, float], documents: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Metric -> its value and standard error: of the mean over documents; perplexity's by the delta method."""
    columns = {metric: part["value"].to_numpy() for metric, part in documents.groupby("metric")}

    def error(metric: str) -> float:
        column = columns.get(metric, np.empty(0))
        return float(column.std(ddof=1) / math.sqrt(len(column))) if len(column) > 1 else math.nan

    found = {
        metric: (value, value * error("loglikelihood") if metric == "perplexity" else error(metric)) for metric, value in values.items()
    }
    if "bits_per_byte" in columns:
        found["bits_per_byte"] = (float(columns["bits_per_byte"].mean()), error("bits_per_byte"))
    return found
