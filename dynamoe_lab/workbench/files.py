"""Files the careful way: JSON, texts without paths of this machine, and from `disk` atomic writes and locks.

Notable: nothing here imports more than the standard library until it is called; all other modules of the workbench write through it.
"""

import hashlib
import json
import os
import re
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from dynamoe_lab.disk import disk_full, hold, let_go, locked, no_space, remove_leftovers, told_when_full, write_atomic
from dynamoe_lab.errors import InputError, first_line

__all__ = [
    "disk_full",
    "folder_lock",
    "hold",
    "let_go",
    "locked",
    "no_space",
    "occupied",
    "read_json",
    "remove_leftovers",
    "require_writable",
    "sha256",
    "told_when_full",
    "with_paths",
    "without_paths",
    "write_atomic",
    "write_json",
]


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, one entry a line, keys in the order given. Raises ValueError for NaN and infinity, which are no JSON."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `InputError` naming the file if it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({first_line(error)}); remove it and run again") from error


def require_writable(folder: Path, option: str = "--output") -> None:
    """Raise `InputError` if results cannot come into `folder`, which need not exist yet: told before they are computed, not after."""
    try:
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        fits = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {folder}: no name of a folder ({first_line(error)}); choose another one") from error
    if not fits:
        raise InputError(f"{option} {folder}: {place} is {'not writable' if place.is_dir() else 'a file'}; choose another folder")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    """The same text (or list or dict of texts, keys among them) with folders of this machine replaced by what they are.

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
        return type(value)((_replaced(key, rules), _replaced(item, rules)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, rules) for item in value)
    return value


def with_paths(value: Any, home: Path) -> Any:
    """Names of this machine's folders in the place of what `without_paths` wrote for the cache (`home`) and the home folder.

    Names below `.` start at the project root, as they do for a kernel; packages and cells are named by no experiment.
    """
    if isinstance(value, dict):
        return {with_paths(key, home): with_paths(item, home) for key, item in value.items()}
    if isinstance(value, list):
        return [with_paths(item, home) for item in value]
    if isinstance(value, str):
        value = value.replace("$DYNAMOE_LAB_HOME", str(home))
        # texts are joined by +, an override has its field's name before it
        return re.sub(r"(?:^|(?<=[+=])|(?<=\+ ))~(?=/)", lambda _: str(Path.home()), value)
    return value
