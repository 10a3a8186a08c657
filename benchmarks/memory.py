"""Peak memory of training and of evaluation. Each number is of a process of its own, since a peak cannot be taken back.

As a script it is that process: `memory.py train MODEL IDS STEPS` or `memory.py evaluate MODEL IDS TOKENS`, where IDS is a file of token
ids [n, T]; its last line holds `peak`, the largest resident memory in bytes.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from children import report, run_child
from results import GOALS, result

__all__ = ["eval_memory", "peak_resident", "train_memory"]

BATCH = 4  # blocks of a training batch


def train_memory(dense: str, converted: Path, ids: Path, pairs: int, steps: int = 4) -> list[dict[str, Any]]:
    """Peak memory of router training over that of fine-tuning, after several AdamW steps."""
    peaks = [[run_child("memory.py", "train", model, ids, steps)["peak"] for model in (converted, dense)] for _ in range(pairs)]
    setting = f"router training over fine-tuning, batch of {BATCH} blocks, {steps} AdamW steps"
    return [
        result("train_memory", setting, [routed / plain for routed, plain in peaks], goal=GOALS["train_memory"]),
        result("train_memory", f"router training, {steps} AdamW steps", [routed / 2**30 for routed, _ in peaks], unit="GiB"),
    ]


def eval_memory(dense: str, ids: Path, times: int, tokens: tuple[int, ...] = (2_048, 8_192, 16_384)) -> list[dict[str, Any]]:
    """Peak memory of `document_losses` over more and more text, over that on the least; each round runs all lengths anew."""
    rounds = [{count: run_child("memory.py", "evaluate", dense, ids, count)["peak"] for count in tokens} for _ in range(times)]
    longer = {count: [peaks[count] / peaks[tokens[0]] for peaks in rounds] for count in tokens[1:]}
    return [
        *(
            result("eval_memory", f"{count:,} tokens over {tokens[0]:,}", ratios, goal=GOALS["eval_memory"])
            for count, ratios in longer.items()
        ),
        result("eval_memory", f"{tokens[0]:,} tokens", [peaks[tokens[0]] / 2**30 for peaks in rounds], unit="GiB"),
    ]


def peak_resident() -> int:
    """Largest resident memory of this program so far, in bytes.

    `getrusage` alone would not do: Linux counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(job: str, model_name: str, ids_file: str, count: str) -> None:
    """The child's side: do the job, report the peak."""
    import numpy as np
    import torch
    from training import make_trainer

    import dynamoe_lab as lab

    lab.keep_freed_memory()
    ids = torch.from_numpy(np.load(ids_file))
    model, _ = lab.load_model(model_name)
    if job == "train":
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(model, ids[:BATCH], Path(folder), steps=int(count)).train()
    elif job == "evaluate":
        lab.document_losses(model, ids[: int(count) // ids.shape[1]])
    else:
        sys.exit(f"memory.py: {job} is no job; give train or evaluate")
    report(peak=peak_resident())


if __name__ == "__main__":
    main(*sys.argv[1:])
