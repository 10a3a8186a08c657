"""Scores on lm-eval's tasks, in-process: its definitions, its evaluator, our count of what was active.

lm-eval's request cache is not used: it does not know which model answered. A task is a step of its own (`run.step(evaluate_task, ...)`),
kept as it finishes, under a key with the model's weights, routing and dtype, the tokenizer, the limit, the batch size and `DEFINITIONS`.
"""

import contextlib
import copy
import math
import numbers
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.benchmark_tables import document_table, right_choices, task_scores
from dynamoe_lab.evaluation.perplexity import in_eval_mode
from dynamoe_lab.evaluation.routing import evaluating
from dynamoe_lab.evaluation.task_sources import is_task_file, task_sources
from dynamoe_lab.evaluation.tasks import DEFINITIONS, TASKS, error_text, load_tasks, quiet_libraries, task_split
from dynamoe_lab.models import RoutedMixin

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["check_tasks", "evaluate_benchmarks", "evaluate_task"]

_EVERY = 10.0  # seconds between progress lines
_SEED = 1234  # lm-eval's own, for tasks with examples in the prompt; the seven have none


def check_tasks(tasks: Iterable[str | Path] = (), *, limit: int | None = None, trust_remote_code: bool = False) -> list[str | Path]:
    """The tasks that are going to be scored, the seven of `TASKS` if none is given, checked before hours are spent on a model.

    Raises:
        InputError: limit below 1; as `load_tasks`.

    Example:
        >>> lab.check_tasks(["sciq", "piqa"], limit=100)
        ['sciq', 'piqa']
    """
    tasks = [tasks] if isinstance(tasks, (str, Path)) else list(tasks) or list(TASKS)
    _check(limit, 1)
    load_tasks(tasks, trust_remote_code=trust_remote_code)
    return tasks


def evaluate_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str | Path] = TASKS,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    run: str = "",
    progress: bool = True,
    trust_remote_code: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`evaluate_task` of every task, one table of each kind: scores, documents. Names are checked before anything is scored.

    Args:
        model, tokenizer, limit, batch_size, run, progress: as in `evaluate_task`.
        tasks: names or task files as in `load_tasks`; by default the seven of arXiv 2502.12325, Table 1.

    Raises:
        InputError: as `evaluate_task` and `load_tasks`.

    Example:
        >>> model, tokenizer = lab.load_model("smollm2-pico")
        >>> scores, documents = lab.evaluate_benchmarks(model, tokenizer, ["sciq", "piqa"], limit=2, run="pico", progress=False)
        >>> documents.groupby("task")["doc_id"].nunique()
        task
        piqa    2
        sciq    2
        Name: doc_id, dtype: int64
    """
    tasks = [tasks] if isinstance(tasks, (str, Path)) else list(tasks)
    _check(limit, batch_size)
    load_tasks(tasks, trust_remote_code=trust_remote_code)
    options = {"limit": limit, "batch_size": batch_size, "run": run, "progress": progress, "trust_remote_code": trust_remote_code}
    parts = [evaluate_task(model, tokenizer, task, **options) for task in tasks]
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
    trust_remote_code: bool = False,
    definitions: str = DEFINITIONS,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score a dense or converted model, zero-shot, under the routing that is set, which is left as it was.

    Args:
        model, tokenizer: what is scored; both stay as they are.
        task: a name or task file as in `load_tasks`; a step's key has the contents of the file and of all that it reads (`task_sources`).
        limit: score the first so many documents; None: all.
        batch_size: sequences of a forward. It moves scores within float ties only.
        run: names the model in the tables.
        progress: say on stderr how far it is and how long it still takes.
        trust_remote_code: run Python code that a task file names, see `load_tasks`.
        definitions: leave it: it puts the versions of lm-eval and of the local documents into a step's key.

    Returns:
        Table `scores`, a row per metric: run, task, split (also how it differs from the stock one), metric, value, stderr (NaN where it
        has none), n, task_version, batch_size, dtype. Metrics: the task's own (acc; acc_norm: the choice by log-likelihood per character;
        perplexity: LAMBADA's, of the last word); bits_per_byte (-log2 p of the right answer over the UTF-8 bytes of what is scored, its
        leading space too; mean over documents); active_params and active_mlp_fraction (mean over the tokens of all forwards, pads left
        out; n: these tokens); seconds_total, and share_outside_model (of them: loading data, tokens, scoring, tables; 0 to 1).
        Table `documents`, a row per document and metric: run, task, doc_id, metric, value, n (documents of the task), digest (equal where
        the same was asked, with the same right answer: what `benchmark_deltas` pairs). Metrics: acc, acc_norm; bits_per_byte and
        loglikelihood (nats), of the right answer, where there is one; for tasks with choices also choice (index of the most likely one) and
        margin (nats between it and the next: near 0, the choice is a float tie; NaN of a single choice).

    Raises:
        InputError: limit or batch size below 1; as `load_tasks`; no document has a right choice; a task file that cannot be scored.

    Example:
        >>> model, tokenizer = lab.load_model("smollm2-pico")
        >>> scores, documents = lab.evaluate_task(model, tokenizer, "sciq", limit=4, run="pico", progress=False)
        >>> scores.loc[scores["metric"] == "active_mlp_fraction", ["run", "task", "split", "value"]]  # a dense model
            run  task                     split  value
        4  pico  sciq  validation (stock: test)    1.0
        >>> documents["doc_id"].nunique()
        4
    """
    _check(limit, batch_size)
    began = time.perf_counter()
    ((name, definition),) = load_tasks([task], trust_remote_code=trust_remote_code).items()
    whose = f"task file {Path(task).expanduser()}" if is_task_file(task) else f"task {name}"
    # lm-eval gives a tokenizer a pad token, and may add one to its vocabulary: to a copy
    with _scoring(model, copy.deepcopy(tokenizer), batch_size, _Progress(name) if progress else None) as lm:
        try:
            samples, values = _run(lm, name, definition, None if limit is None else int(limit))
            _check_targets(samples, definition, whose)
            documents = document_table(samples, definition)
        except Exception as error:
            if isinstance(error, InputError) or lm.in_model or not is_task_file(task):
                raise
            raise InputError(f"{whose}: cannot be scored ({error_text(error)})") from error
        active = lm.active() if lm.tokens else None
    if lm.shortened:
        what = f"{lm.shortened:,} of {lm.asked:,} prompts are longer than the model's {lm.max_length:,} positions and lose their beginning"
        print(f"{whose}: {what}", file=sys.stderr, flush=True)
    n = len({sample["doc_id"] for sample in samples})
    rows = task_scores(values, documents, n)
    if active is not None:  # generated text is not counted
        rows += [("active_params", active[0], math.nan, lm.tokens), ("active_mlp_fraction", active[1], math.nan, lm.tokens)]
    seconds = time.perf_counter() - began
    rows += [("seconds_total", seconds, math.nan, n), ("share_outside_model", 1 - lm.model_seconds / seconds, math.nan, n)]
    scores = pd.DataFrame(rows, columns=["metric", "value", "stderr", "n"])
    names = {"run": run, "task": name, "split": task_split(task, definition)}
    conditions = {"task_version": str(definition.VERSION), "batch_size": batch_size, "dtype": str(model.dtype).removeprefix("torch.")}
    scores = scores.assign(**names, **conditions)[[*names, *scores.columns, *conditions]]
    return scores, documents.assign(run=run, task=name, n=n)[["run", "task", "doc_id", "metric", "value", "n", "digest"]]


evaluate_task.step_ignores = ("progress", "trust_remote_code")  # how it is watched does not change what comes out
evaluate_task.step_reads = {"task": task_sources}


def _check(limit: int | None, batch_size: int) -> None:
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is None and name == "limit":
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise InputError(f"{name} = {value!r}: give a whole number of at least 1" + (", or none for all documents" * (name == "limit")))


# --- lm-eval -----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _scoring(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Callable | None) -> Iterator[Any]:
    """The model as lm-eval wants it; afterwards as it was found. The tokenizer is lm-eval's to keep."""
    from dynamoe_lab.evaluation.benchmark_lm import BenchmarkLM

    as_found = evaluating(model, "evaluate_task") if isinstance(model, RoutedMixin) else in_eval_mode(model)
    with as_found, quiet_libraries():
        yield BenchmarkLM(model, tokenizer, batch_size=batch_size, progress=progress)


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


def _check_targets(samples: list[dict[str, Any]], definition: "Task", whose: str) -> None:
    """Refuse a task whose right answers are none of its choices, for it would score 0 %; say so where that is so of some documents."""
    if definition.OUTPUT_TYPE != "multiple_choice" or callable(definition.config.process_results):  # the task's own rules
        return
    documents = {sample["doc_id"]: sample["doc"] for sample in samples}
    wrong = [
        number for number, document in documents.items() if not right_choices(document, definition.doc_to_choice(document), definition)
    ]
    if not wrong:
        return
    field = "doc_to_text" if definition.multiple_input else "doc_to_target"
    value, first = getattr(definition.config, field), documents[wrong[0]]
    named = f"{field} ({getattr(value, '__name__', value)})"
    if len(wrong) == len(documents):
        gives = f"{getattr(definition, field)(first)!r} for the first one, which is no choice and no index of one"
        raise InputError(f"{whose}: no document has a right choice: {named} gives {gives}; correct it")
    told = f"{len(wrong):,} of {len(documents):,} documents have no right choice by {named}, the first is document {wrong[0]}"
    print(f"{whose}: {told}; they count as wrong", file=sys.stderr, flush=True)


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
