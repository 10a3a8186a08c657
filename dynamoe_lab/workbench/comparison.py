"""`dynamoe-lab compare`: two folders of scores side by side, document by document."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.workbench.benchmarks import SETTINGS, score_notes
from dynamoe_lab.workbench.files import read_json
from dynamoe_lab.workbench.terminal import millions_text, table_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare_scores"]

_NO_SCORES = ("choice", "margin")  # numbers of a document of which neither more nor less is better


def compare_scores(first: Path, second: Path, *, metric: str = "acc", tasks: Sequence[str] = (), confidence: float = 0.95) -> str:
    """First minus second, task by task on the same documents, as a table of text.

    Args:
        first, second: folders that `score_to_folder` wrote; the second is what the first is compared with, usually the dense parent.
        metric: "acc", "acc_norm", "bits_per_byte" or "loglikelihood".
        tasks: those to compare; none: all, which both folders must have.

    Raises:
        InputError: no scores in a folder; other tasks, splits, versions or documents, also in text; a metric that is no score.
    """
    from dynamoe_lab.analysis.metrics import benchmark_deltas
    from dynamoe_lab.analysis.metrics.benchmarks import SHARES

    if metric in _NO_SCORES:
        raise InputError(
            f"--metric {metric}: no score, neither more nor less of it is better; give acc, acc_norm, bits_per_byte or loglikelihood"
        )
    folders = [_read(Path(folder), metric, tasks) for folder in (first, second)]
    (settings, scores, documents), (other_settings, other_scores, reference) = folders
    versions = [frame.drop_duplicates("task").set_index("task")[["split", "task_version"]] for frame in (scores, other_scores)]
    for task in versions[0].index.intersection(versions[1].index):
        for name in ("split", "task_version"):
            one, other = (frame.loc[task, name] for frame in versions)
            if one != other:
                raise InputError(f"task {task}: {name} {one} in {first}, {other} in {second}; score both with the same definition")
    _check_documents(*(frame[frame["metric"] == metric] for frame in (documents, reference)), first, second)
    deltas = benchmark_deltas(documents, reference, metric=metric, confidence=confidence)
    lines = [
        _described(letter, folder) for letter, folder in (("A", (first, settings, scores)), ("B", (second, other_settings, other_scores)))
    ]
    lines += ["", _delta_text(deltas, metric), ""]
    lines.append(f"A - B on the same documents, {confidence:.0%} intervals from resampling documents; average: mean over tasks.")
    if metric in SHARES:
        lines.append(
            "A only, B only: documents that one of them has right; p: McNemar's exact test, two-sided; Holm: p adjusted for all tasks."
        )
    level = "5 % over the number of tasks, which holds for all of them (average: 5 %)" if deltas["holm_p"].count() > 1 else "5 %"
    lines.append(f"detectable: the smallest difference that this sample shows with 80 % power at {level}.")
    return "\n".join([*lines, *score_notes(scores)])


def _check_documents(documents: "pd.DataFrame", reference: "pd.DataFrame", first: Path, second: Path) -> None:
    """Refuse tasks that only one folder has, or whose documents are not the same in both."""
    from dynamoe_lab.analysis.metrics.benchmark_pairs import other_texts

    tasks = [list(dict.fromkeys(frame["task"])) for frame in (documents, reference)]
    both = [task for task in tasks[0] if task in tasks[1]]
    for ours, theirs, here, there in ((*tasks, first, second), (*tasks[::-1], second, first)):
        if absent := [task for task in ours if task not in theirs]:
            advice = f"score it there, too, or compare --tasks {','.join(both)}" if both else "score both on the same tasks"
            raise InputError(f"task {', '.join(absent)}: scored in {here}, not in {there}; {advice}")
    for task in both:
        own, base = (frame[frame["task"] == task].drop_duplicates("doc_id") for frame in (documents, reference))
        other, shared = other_texts(own, base)
        if not len(own) == len(base) == shared:
            counts = f"{len(own)} in {first}, {len(base)} in {second}, {shared} in both"
            raise InputError(f"task {task}: the documents differ ({counts}); score both with the same --limit")
        if other:
            raise InputError(
                f"task {task}: {other} of {shared} documents differ in text between {first} and {second}; score both on the same documents"
            )


def _read(folder: Path, metric: str, tasks: Sequence[str]) -> "tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]":
    """Settings, scores and documents of a folder, the given tasks alone."""
    import pandas as pd

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it with: dynamoe-lab eval MODEL --output {folder}")
    if not (folder / SETTINGS).is_file() or not (folder / "scores.parquet").is_file():
        raise InputError(f"{folder}: no scores in this folder; make some with: dynamoe-lab eval MODEL --output {folder}")
    try:
        scores, documents = (pd.read_parquet(folder / f"{name}.parquet") for name in ("scores", "documents"))
    except (OSError, ValueError, NotImplementedError, KeyError) as error:
        raise InputError(f"{folder}: its tables cannot be read ({first_line(error)}); remove it and score again") from error
    _check_columns(folder, scores=scores, documents=documents)
    if absent := sorted(set(tasks) - set(scores["task"])):
        raise InputError(f"{folder}: task {absent[0]} was not scored; there is {', '.join(scores['task'].unique())}")
    if tasks:
        scores, documents = (frame[frame["task"].isin(tasks)] for frame in (scores, documents))
    if documents.empty:
        raise InputError(f"{folder}: {', '.join(scores['task'].unique())}: no number for each document, so nothing to compare by document")
    if metric not in set(documents["metric"]):
        raise InputError(f"--metric {metric}: not in {folder}; there is {', '.join(sorted(set(documents['metric'])))}")
    settings = read_json(folder / SETTINGS)
    if not isinstance(settings, dict):
        raise InputError(f"{folder / SETTINGS}: no settings of scores; remove {folder} and score again")
    return settings, scores, documents


def _check_columns(folder: Path, **tables: "pd.DataFrame") -> None:
    """Refuse tables that are none of ours."""
    columns = {"scores": ("task", "split", "metric", "value", "task_version"), "documents": ("task", "doc_id", "metric", "value")}
    for name, table in tables.items():
        lacks = [column for column in columns[name] if column not in table.columns]
        if lacks or table["value"].dtype.kind not in "fiub":
            told = f"lacks {', '.join(lacks)}" if lacks else "has no numbers in value"
            raise InputError(f"{folder}: {name}.parquet {told}; remove the folder and score again")


def _described(letter: str, folder: "tuple[Path, dict[str, Any], pd.DataFrame]") -> str:
    path, settings, scores = folder
    active = scores.loc[scores["metric"] == "active_params", "value"].mean()
    routed = f", routing {settings['routing']}" if settings.get("routing") else ""
    limit = f", first {settings['limit']} documents" if settings.get("limit") else ""
    return f"{letter}: {path} ({settings.get('model')}{routed}, {settings.get('dtype')}{limit}, {millions_text(active)} active parameters)"


def _delta_text(deltas: "pd.DataFrame", metric: str) -> str:
    from dynamoe_lab.analysis.metrics.benchmarks import AVERAGE4, SHARES

    share = metric in SHARES
    scale, form, sign = (100, "{:.1f} %", "{:+.1f}") if share else (1, "{:.3f}", "{:+.3f}")
    header = ["task", "n", "A", "B", "A - B" + " (points)" * share, "interval"]
    header += ["A only", "B only", "p", "p (Holm)", "detectable"] if share else ["detectable"]
    rows = []
    for row in deltas[deltas["task"] != AVERAGE4].to_dict("records"):
        ends = "" if row["low"] != row["low"] else f"{sign.format(scale * row['low'])} to {sign.format(scale * row['high'])}"
        cells = [row["task"], f"{row['n']:,}", form.format(scale * row["value"]), form.format(scale * row["reference_value"])]
        cells += [sign.format(scale * row["difference"]), ends or "no interval"]
        if share:
            tested = row["mcnemar_p"] == row["mcnemar_p"]
            cells += [f"{row[name]:.0f}" if tested else "" for name in ("only_run", "only_reference")]
            cells += [f"{row[name]:.3g}" if tested else "" for name in ("mcnemar_p", "holm_p")]
        cells.append("" if row["detectable"] != row["detectable"] else f"{scale * row['detectable']:.{1 if share else 3}f}")
        rows.append(cells)
    return table_text(header, rows, right=header[1:])
