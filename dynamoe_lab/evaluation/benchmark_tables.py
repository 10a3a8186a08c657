"""Tables of benchmark scores from lm-eval's samples: a number per document and metric, their means, and which documents they were."""

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["document_table", "right_choices", "task_scores"]


def document_table(samples: list[dict[str, Any]], definition: "Task") -> pd.DataFrame:
    """Table `documents` of lm-eval's samples, without run and task: doc_id, metric, value, digest (as `evaluate_task` has them)."""
    rows = []
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        own = {f"{metric}{suffix}": sample[metric] for metric in sample["metrics"] if isinstance(sample[metric], (int, float, np.number))}
        own.pop("perplexity", None)  # lm-eval's name for a document's log-likelihood, which comes next
        digest = _digest(sample)
        rows += [(sample["doc_id"], metric, float(value), digest) for metric, value in {**own, **_answer(sample, definition)}.items()]
    table = pd.DataFrame(rows, columns=["doc_id", "metric", "value", "digest"])
    return table.astype({"doc_id": "int64", "value": "float64"})  # also of tasks without a number per document


def right_choices(document: dict[str, Any], choices: list[str], definition: "Task") -> list[int]:
    """Indices of the right choices of a document; none where what the task names is no choice."""
    # with several contexts for one continuation (WinoGrande) the text's place holds the index
    gold = definition.doc_to_text(document) if definition.multiple_input else definition.doc_to_target(document)
    gold = [choices.index(one) if isinstance(one, str) and one in choices else one for one in (gold if isinstance(gold, list) else [gold])]
    return [one for one in gold if isinstance(one, int) and 0 <= one < len(choices)]


def task_scores(values: dict[str, float], documents: pd.DataFrame, n: int) -> list[tuple[str, float, float, int]]:
    """(metric, value, standard error, n documents): errors of the mean over documents; perplexity's by the delta method.

    Args:
        values: lm-eval's metrics by name.
        documents: of `document_table`. bits_per_byte is the mean over the documents that have one.
        n: documents of the task.
    """
    columns = {metric: part["value"].to_numpy() for metric, part in documents.groupby("metric")}

    def error(metric: str) -> float:
        column = columns.get(metric, np.empty(0))
        return float(column.std(ddof=1) / math.sqrt(len(column))) if len(column) > 1 else math.nan

    found = {
        metric: (value, value * error("loglikelihood") if metric == "perplexity" else error(metric), n) for metric, value in values.items()
    }
    if "bits_per_byte" in columns:
        column = columns["bits_per_byte"]
        found["bits_per_byte"] = (float(column.mean()), error("bits_per_byte"), len(column))
    return [(metric, *measured) for metric, measured in found.items()]


def _digest(sample: dict[str, Any]) -> str:
    """16 hexadecimal digits that stand for what a document asks and for its right answer."""
    asked = json.dumps([sample["arguments"], sample["target"]], ensure_ascii=False, default=str)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _answer(sample: dict[str, Any], definition: "Task") -> dict[str, float]:
    """What the log-likelihoods of a document say of its right answer, and of the choice."""
    if definition.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return {}
    logs, right, found = [float(log) for log, _ in sample["filtered_resps"]], 0, {}
    if definition.OUTPUT_TYPE == "multiple_choice":
        choices = definition.doc_to_choice(sample["doc"])
        logs = logs[: len(choices)]  # tasks that score mutual information ask once more, without context
        best, following = [*sorted(logs, reverse=True), math.nan][:2]
        found = {"choice": float(np.argmax(logs)), "margin": best - following}
        named = right_choices(sample["doc"], choices, definition)
        if len(named) != 1:
            return found
        right = named[0]
    context, scored = sample["arguments"][right][:2]
    scored = context[len(context.rstrip()) :] + scored  # lm-eval scores a context's last spaces with the answer
    bits = -logs[right] / math.log(2) / len(scored.encode("utf-8"))
    return {"bits_per_byte": bits, "loglikelihood": logs[right], **found}
