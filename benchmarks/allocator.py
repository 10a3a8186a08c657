"""What keeping freed memory is worth: tokens/s of a dense forward with `lab.keep_freed_memory()` over those without, processes in turn.

As a script it is such a process: `allocator.py MODEL IDS keep` or `... leave`, where IDS is a file of token ids [n, T]; its last line
holds `rate`.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from children import report, run_child
from results import result

__all__ = ["allocator"]

BATCH, FORWARDS = 4, 3


def allocator(dense: str, ids: Path, pairs: int) -> list[dict[str, Any]]:
    """Forward passes with logits of all tokens, as evaluation does them: its tensors are big and short-lived."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ratios = []
    for pair in range(pairs):
        order = ("keep", "leave") if pair % 2 else ("leave", "keep")
        rates = {choice: run_child("allocator.py", dense, ids, choice, environment=plain)["rate"] for choice in order}
        ratios.append(rates["keep"] / rates["leave"])
    return [result("allocator", f"SmolLM2-135M, forward of {BATCH} blocks, freed memory kept over glibc's defaults", ratios)]


def main(model_name: str, ids_file: str, choice: str) -> None:
    """The child's side: one forward to warm up, then the median rate of some more."""
    import numpy as np
    import torch

    import dynamoe_lab as lab

    if choice == "keep":
        lab.keep_freed_memory()
    ids = torch.from_numpy(np.load(ids_file))[:BATCH]
    model, _ = lab.load_model(model_name)
    rates = []
    with torch.inference_mode():
        for _ in range(FORWARDS + 1):
            began = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            rates.append(ids.numel() / (time.perf_counter() - began))
    report(rate=statistics.median(rates[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
