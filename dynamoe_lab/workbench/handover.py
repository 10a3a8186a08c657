"""What the notebook runner and the kernel that it started know of each other: which notebook, which cell, who may write its results.

The runner says it in environment variables of the kernel. A kernel that a person opened in JupyterLab has none of them.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.files import hold, let_go, without_paths
from dynamoe_lab.workbench.records import Record

__all__ = ["CELLS_VARIABLE", "RUNNER_VARIABLE", "interactive", "notebook_lock", "own_results", "running_cell"]

RUNNER_VARIABLE = "DYNAMOE_LAB_NOTEBOOK"  # the notebook that is running
CELLS_VARIABLE = "DYNAMOE_LAB_CELLS"  # number and heading of every cell, as JSON, in the order in which the kernel counts them


def notebook_lock(folder: Path, root: Path) -> tuple[Path, str]:
    """The lock of one notebook's results, and how to refuse: the runner holds it for its kernel, or a kernel that a person opened."""
    shown = without_paths(str(folder), root).removeprefix("./")
    told = f"{shown} is being written by pid {{pid}} (the notebook is open in JupyterLab?); finish or restart it, or choose another output"
    return folder.with_name(f".{folder.name}.lock"), told


@contextmanager
def own_results(record: Record, folder: Path, root: Path, *, locks: bool) -> Iterator[None]:
    """Write into a run's folder inside: with `locks` under its lock, which a finished run in JupyterLab has given up.

    Raises `InputError` if another process has the lock, or if another run has written its results there since this one's record did.
    """
    lock, told = notebook_lock(folder, root)
    taken = locks and hold(lock, refuses=told)
    try:
        if not record.may_go_to(folder):
            shown = without_paths(str(folder), root).removeprefix("./")
            raise InputError(f"{shown}: another run has written its results since this one began; run the notebook again from the top")
        yield
    finally:
        if taken:
            let_go(lock)


def running_cell() -> tuple[int | None, str]:
    """Number and heading of the cell that is running; (None, "") in a kernel that no runner started."""
    cells, shell = json.loads(os.environ.get(CELLS_VARIABLE) or "[]"), _shell()
    ran = len(shell.user_ns["In"]) - 1 if shell is not None else 0  # this cell included; entry 0 is empty
    return tuple(cells[ran - 1]) if 1 <= ran <= len(cells) else (None, "")


def interactive() -> bool:
    """Whether this process is a kernel or an IPython shell."""
    return _shell() is not None


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()
