"""Trainer's checkpoints, told apart: whole ones, from which training goes on to the same weights, and what a kill or a full disk left.

Trainer loads what it finds and says nothing of what is missing: without the optimizer's file it would go on with other weights. So a
checkpoint counts only if its state parses and everything that it needs is there to its last byte.
"""

import json
import shutil
import sys
import zipfile
from pathlib import Path

from transformers import TrainerState

from dynamoe_lab.errors import InputError, first_line

__all__ = ["complete_checkpoint"]

_ZIP = b"PK\3\4"  # how a file of torch begins


def complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete Trainer checkpoint below `folder`, or None; incomplete ones are removed with a line each on stderr.

    Complete: `trainer_state.json`, which Trainer writes last, parses; the weights, the optimizer and the random state are there; no file
    is cut off. Contents are not compared with anything: a bit that flipped is not seen here.

    Raises:
        InputError: a checkpoint cannot be read, which says nothing about it; it is left alone.
    """
    complete = []
    for path in sorted(folder.glob("checkpoint-*")):
        try:
            complete.append((_checked_step(path), path))
        except (OSError, RuntimeError) as error:  # of safetensors; whole or not, it cannot be read now: a disk went away, say
            raise InputError(f"{path}: cannot be read ({first_line(error)}); correct that, and give the same command") from error
        except (ValueError, KeyError, TypeError) as error:
            print(f"removed the incomplete checkpoint {path.name} ({first_line(error)})", file=sys.stderr, flush=True)
            shutil.rmtree(path, ignore_errors=True)
    return max(complete)[1] if complete else None


def _checked_step(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint.

    Raises ValueError, KeyError or TypeError if it is not whole, OSError or RuntimeError if it cannot be read.
    """
    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValueError("no trainer_state.json") from None
    except (ValueError, TypeError) as error:
        raise ValueError("trainer_state.json cannot be read") from error
    files = {item.name: item for item in checkpoint.iterdir() if item.is_file()}
    sharded = any(item.is_dir() for item in checkpoint.iterdir())  # FSDP and DeepSpeed keep weights and optimizer in folders
    for name, path in files.items():
        _require_whole(name, path)
    for name, path in files.items():
        if name.endswith(".safetensors.index.json"):
            lacking = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()) - set(files)
            if lacking:
                raise ValueError(f"no {min(lacking)}")
    if not sharded and not any(name.endswith(".safetensors") for name in files):
        raise ValueError("no weights")
    if not sharded and not {"optimizer.pt", "optimizer.bin"} & set(files):
        raise ValueError("no optimizer.pt")
    if "scheduler.pt" not in files:
        raise ValueError("no scheduler.pt")
    if not any(name.startswith("rng_state") for name in files):
        raise ValueError("no rng_state.pth")
    return int(state.global_step)


def _require_whole(name: str, path: Path) -> None:
    """Raise ValueError if a file is cut off: both formats say where they end."""
    from safetensors import SafetensorError, safe_open

    if name.endswith(".safetensors"):
        try:
            with safe_open(path, "pt"):  # reads the header and compares it with the file's size
                pass
        except SafetensorError as error:
            raise ValueError(f"{name} is cut off") from error
    elif name.endswith((".pt", ".pth")) and not zipfile.is_zipfile(path):  # the directory of a zip stands at its end
        with path.open("rb") as stream:
            head = stream.read(len(_ZIP))
        if head == _ZIP[: len(head)] or not any(head):  # else nothing of ours was cut off: torch refuses it, and `train` says so
            raise ValueError(f"{name} is cut off")
