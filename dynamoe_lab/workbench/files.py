"""Files the careful way: atomic writes, locks that name their holder, texts without paths of this machine.

Notable: nothing here imports more than the standard library until it is called; all other modules of the workbench write through it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dynamoe_lab.errors import InputError, first_line

__all__ = [
    "disk_full",
    "locked",
    "read_json",
    "require_writable",
    "sha256",
    "told_when_full",
    "without_paths",
    "write_atomic",
    "write_json",
]


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part: temporary sibling, fsync, rename."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)  # mkstemp makes private files; results are meant to be read
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


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


def disk_full(error: BaseException) -> bool:
    """Whether an exception, or one that caused it, says that there is no space left."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(link):  # safetensors and torch raise their own types
            return True
        link = link.__cause__ or link.__context__
    return False


@contextmanager
def told_when_full(folder: Path, advice: str) -> Iterator[None]:
    """Turn "no space left" inside the block into an `InputError` that names the folder and its free space."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not disk_full(error):
            raise
        with suppress(OSError):
            existing = next(place for place in (folder, *folder.parents) if place.exists())
            advice = f"{shutil.disk_usage(existing).free / 2**20:,.0f} MB free; {advice}"
        raise InputError(f"no space left in {folder}: {advice}") from error


@contextmanager
def locked(path: Path, *, waits_for: str = "", refuses: str = "") -> Iterator[None]:
    """Hold the lock file `path`; the operating system frees it when its holder dies, however it dies.

    Args:
        waits_for: if another process holds it, say on stderr that we wait for this, and wait.
        refuses: instead of waiting raise `InputError(refuses)`; `{pid}` in it becomes the holder's process id.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            holder = path.read_text().strip() or "?"
        except OSError:  # Windows does not let others read a locked file
            holder = "?"
        if refuses:
            raise InputError(refuses.replace("{pid}", holder)) from None
        print(f"waiting for {waits_for}, held by pid {holder}", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.2)
    try:
        with suppress(OSError):
            path.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


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
