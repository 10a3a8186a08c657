"""Run a benchmark's script as a process of its own, and read the one JSON line it ends with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["report", "run_child"]


def run_child(script: str, *arguments: str | int | Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Start a script of this folder, wait for it, return what it reported.

    Args:
        environment: the whole environment of the child; None: this process's own.

    Raises:
        RuntimeError: the child failed, with the last line of its complaint.
    """
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ} if environment is None else environment)
    if done.returncode:
        complaint = done.stderr.strip().splitlines()
        raise RuntimeError(f"{script} {' '.join(map(str, arguments[:1]))}: {complaint[-1] if complaint else f'exit {done.returncode}'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(**values: Any) -> None:
    """What a child says last."""
    print(json.dumps(values), flush=True)
