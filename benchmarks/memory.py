"""Peak memory of training and of evaluation. Each number is of a process of its own, since a peak cannot be taken back.

As a script it is that process: `memory.py train MODEL IDS STEPS` or `memory.py evaluate MODEL IDS TOKENS [TOKENS ...]`, where IDS is a file
of token ids [n, T]; its last line holds `peak` or, after each number of tokens, `peaks`: the largest resident memory in bytes.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from children import report, run_child
from results import GOALS, result

__all__ = ["eval_memory", "train_memory"]

BATCH = 4  # blocks of a training batch


def train_memory(dense: str, converted: Path, ids: Path, pairs: int, steps: int = 4) -> list[dict[str, Any]]:
    """Peak memory of router training over that of fine-tuning, after several AdamW steps."""
    peaks = [[run_child("memory.py", "train", model, ids, steps)["peak"] for model in (converted, dense)] for _ in range(pairs)]
    setting = f"router training over fine-tuning, batch of {BATCH} blocks, {steps} AdamW steps"
    return [
        result("train_memory", setting, [routed / plain for routed, plain in peaks], goal=GOALS["train_memory"]),
        result("train_memory", f"router training, {steps} AdamW steps", [routed / 2**30 for routed, _ in peaks], unit="GiB"),
    ]


def eval_memory(dense: str, ids: Path, times: int, tokens: tuple[int, int] = (4_096, 16_384)) -> list[dict[str, Any]]:
    """Peak memory of `document_losses` on a text over that on its beginning, one after the other in one process.

    Where an allocator puts its first blocks differs from process to process by more than a longer text costs.
    """
    rounds = [run_child("memory.py", "evaluate", dense, ids, *tokens)["peaks"] for _ in range(times)]
    setting = f"{tokens[1]:,} tokens over {tokens[0]:,}, same process"
    return [
        result("eval_memory", setting, [whole / beginning for beginning, whole in rounds], goal=GOALS["eval_memory"]),
        result("eval_memory", f"{tokens[0]:,} tokens", [beginning / 2**30 for beginning, _ in rounds], unit="GiB"),
    ]


def main(job: str, model_name: str, ids_file: str, *counts: str) -> None:
    """The child's side: do the job, report the peak."""
    import numpy as np
    import torch
    from training import make_trainer

    import dynamoe_lab as lab
    from dynamoe_lab.workbench.memory import peak_memory

    lab.keep_freed_memory()
    ids = torch.from_numpy(np.load(ids_file))
    model, _ = lab.load_model(model_name)
    if job == "train":
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(model, ids[:BATCH], Path(folder), steps=int(counts[0])).train()
        report(peak=peak_memory())
    elif job == "evaluate":
        peaks = []
        for count in map(int, counts):
            lab.document_losses(model, ids[: count // ids.shape[1]])
            peaks.append(peak_memory())
        report(peaks=peaks)
    else:
        sys.exit(f"memory.py: {job} is no job; give train or evaluate")


if __name__ == "__main__":
    main(*sys.argv[1:])
