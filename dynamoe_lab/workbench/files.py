"""Files the careful way: JSON, digests, texts without paths of this machine, and from `disk` atomic writes and locks.

Notable: nothing here imports more than the standard library until it is called; all other modules of the workbench write through it.
"""

import hashlib
import json
import os
import re
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from dynamoe_lab.disk import disk_full, hold, let_go, locked, no_space, remove_leftovers, told_when_full, write_atomic
from dynamoe_lab.errors import InputError

__all__ = [
    "disk_full",
    "file_digest",
    "folder_lock",
    "hold",
    "let_go",
    "locked",
    "no_space",
    "occupied",
    "read_json",
    "remove_leftovers",
    "sha256",
    "told_when_full",
    "without_paths",
    "write_atomic",
    "write_json",
]

_CHUNK = 1 << 22  # bytes read at a time
_REMEMBERED = 1 << 20  # bytes: digests of larger files are remembered by this process
_SETTLED = 2.0  # seconds: a file that was written later than this before it was read may change without a new time stamp
_digests: dict[tuple, str] = {}


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, one entry a line, keys in the order given. Raises ValueError for NaN and infinity, which are no JSON."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `InputError` naming the file if it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); remove it and run again") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's content, hexadecimal: as good against accidents as SHA-256 and ten times as fast on checkpoints.

    A large file that this process has read before and that has the same inode, size and times since is not read again.
    """
    import xxhash

    stat = path.stat()
    known = (str(path.absolute()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if known in _digests:
        return _digests[known]
    settled = stat.st_size >= _REMEMBERED and time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if settled:
        _digests[known] = digest.hexdigest()
    return digest.hexdigest()


def folder_lock(home: Path, folder: Path) -> Path:
    """The lock file of an output folder, in the cache: nothing of ours but results lies in a folder that a person named."""
    import xxhash

    return home / "locks" / f"folder-{xxhash.xxh3_64(str(folder.resolve()).encode()).hexdigest()}.lock"


def occupied(folder: Path, *ours: str) -> bool:
    """Whether something lies at `folder` that no command may write into: a file, or a folder with more than `ours` and leftovers."""
    if not folder.is_dir():
        return folder.exists()
    return any(item.name not in ours and not (item.name.startswith(".") and item.name.endswith(".tmp")) for item in folder.iterdir())


def without_paths(value: Any, root: Path | None = None) -> Any:
    """The same text (or list or dict of texts) with folders of this machine replaced by what they are.

    The project `root` becomes `.`, the cache `$DYNAMOE_LAB_HOME`, installed packages `site-packages`, the home folder `~`, a cell's
    temporary file `<cell>`.
    """
    places = [(root, "."), (os.environ.get("DYNAMOE_LAB_HOME"), "$DYNAMOE_LAB_HOME")]
    paths = sysconfig.get_paths()
    places += [(paths["purelib"], "site-packages"), (paths["stdlib"], "python"), (Path.home(), "~")]
    pairs = {str(form): short for place, short in places if place for form in (Path(place), Path(place).resolve())}
    ordered = sorted(((path, short) for path, short in pairs.items() if len(path) > 1), key=lambda pair: -len(pair[0]))
    rules = [(re.compile(re.escape(path) + r"(?![\w.-])"), short) for path, short in ordered]
    rules.append((re.compile(re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py"), "<cell>"))
    return _replaced(value, rules)


def _replaced(value: Any, rules: list[tuple[re.Pattern, str]]) -> Any:
    if isinstance(value, str):
        for pattern, short in rules:
            value = pattern.sub(lambda _, short=short: short, value)
        return value
    if isinstance(value, dict):
        return type(value)((key, _replaced(item, rules)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, rules) for item in value)
    return value
