"""Tables `scores` and `documents` as `evaluate_benchmarks` gives them, made up: a dense model and a routed one that is a little worse."""

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.metrics import benchmark_deltas, benchmark_table, paper_table, relative_table

TASKS = ("arc_easy", "lambada_openai", "piqa", "winogrande", "sciq", "hellaswag", "arc_challenge")
ACCURACY = dict(zip(TASKS, (0.52, 0.32, 0.66, 0.51, 0.74, 0.35, 0.27), strict=True))  # of the dense model
LOCAL = {"arc_easy", "sciq", "arc_challenge"}  # scored on the validation split where lm-eval has test
PARAMS = {"dense": 135e6, "router": 113e6}


def make_documents(n: int = 40, runs: dict[str, float] | None = None, seed: int = 0, tasks=TASKS) -> pd.DataFrame:
    """n documents a task; `runs` -> by how much a run is worse than dense; runs agree on most documents."""
    rng, rows = np.random.default_rng(seed), []
    runs = {"dense": 0.0, "router": 0.06} if runs is None else runs
    for task in tasks:
        hardness, noise = rng.random(n), {run: rng.normal(0, 0.08, n) for run in runs}
        surprise = rng.gamma(4, 0.3, n)
        for run, worse in runs.items():
            right = (hardness + (noise[run] if worse else 0) < ACCURACY[task] - worse).astype(float)
            values = {"acc": right, "bits_per_byte": surprise * (1 + worse) + 0.1 * np.abs(noise[run])}
            for metric, value in values.items():
                rows.append(pd.DataFrame({"run": run, "task": task, "doc_id": range(n), "metric": metric, "value": value, "n": n}))
    return pd.concat(rows, ignore_index=True)


def make_scores(documents: pd.DataFrame | None = None) -> pd.DataFrame:
    """Table `scores` of these documents, with the active parameters of every task."""
    documents = make_documents() if documents is None else documents
    rows = []
    for (run, task, metric), part in documents.groupby(["run", "task", "metric"], sort=False):
        split = (
            "test (line breaks are spaces)" if task == "lambada_openai" else "validation (stock: test)" if task in LOCAL else "validation"
        )
        place = {"run": run, "task": task, "split": split, "n": len(part), "task_version": "1.0", "batch_size": 8, "dtype": "float32"}
        rows.append(place | {"metric": metric, "value": part["value"].mean(), "stderr": part["value"].sem()})
        if metric == "acc":
            params = PARAMS.get(run, 120e6) + 1e5 * TASKS.index(task) * (run != "dense")
            rows.append(place | {"metric": "active_params", "value": params, "stderr": float("nan")})
    columns = ["run", "task", "split", "metric", "value", "stderr", "n", "task_version", "batch_size", "dtype"]
    return pd.DataFrame(rows)[columns]


def make_deltas(n: int = 150, runs=("router",), **settings) -> pd.DataFrame:
    """What `benchmark_deltas` gives of runs that are 6, 10, ... points worse than dense."""
    documents = make_documents(n, {"dense": 0.0, **{run: 0.06 + 0.04 * number for number, run in enumerate(runs)}})
    documents = documents.merge(make_scores(documents)[["task", "split"]].drop_duplicates(), on="task")
    dense = documents["run"] == "dense"
    return benchmark_deltas(documents[~dense], documents[dense], **settings)


def make_relative(n: int = 60) -> pd.DataFrame:
    """Ours beside the paper's."""
    return relative_table(make_deltas(n), paper_table(), active=benchmark_table(make_scores(make_documents(n))))
