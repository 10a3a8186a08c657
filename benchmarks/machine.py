"""What the numbers were measured on: processor, cores, memory, versions, commit, date; no name of a user, host or folder."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from dynamoe_lab.workbench.environment import cpu_name, git_state, platform_name, usable_cores, versions

__all__ = ["ROOT", "describe"]

ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, Any]:
    """The machine and the software of this process, as plain values."""
    commit, changed = git_state(ROOT)
    known = versions()
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform_name(),
        "python": platform.python_version(),
        "torch": known["torch"],
        "transformers": known["transformers"],
        "commit": commit,
        "uncommitted_changes": changed,
        "date": datetime.now(UTC).date().isoformat(),
    }
