"""Seconds to load a converted checkpoint, imports aside, in a process of its own.

As a script it is that process: `starting.py FOLDER`; its last line holds `seconds`.
"""

import sys
import time
from pathlib import Path
from typing import Any

from children import report, run_child
from results import GOALS, result

__all__ = ["load"]


def load(converted: Path, times: int = 5) -> list[dict[str, Any]]:
    """`from_pretrained` of a converted SmolLM2, its files in the page cache."""
    seconds = [run_child("starting.py", converted)["seconds"] for _ in range(times)]
    return [result("load", "from_pretrained of a converted SmolLM2-135M, imports aside", seconds, goal=GOALS["load"], unit="s")]


def main(folder: str) -> None:
    """The child's side: import, load, report."""
    import accelerate  # noqa: F401  transformers imports it when it loads
    from transformers import AutoModelForCausalLM

    import dynamoe_lab.models  # noqa: F401  registers the classes of converted checkpoints

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    seconds = time.perf_counter() - began
    if not hasattr(model, "set_routing"):
        sys.exit(f"starting.py: {type(model).__name__} is no converted model")
    report(seconds=seconds)


if __name__ == "__main__":
    main(sys.argv[1])
