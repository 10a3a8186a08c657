"""What a disk can do to us: a writer is killed halfway, another process is at work, there is no space left.

`write_atomic` leaves the old file or the new one, `locked` lets one process in and says whom the others wait for, `told_when_full` says
in one line which folder is full, `unreadable` tells a file that the machine could not read now from one that is damaged. Notable: nothing
here imports more than the standard library until it is called.
"""

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynamoe_lab.errors import InputError

__all__ = [
    "TEMPORARY_VARIABLE",
    "disk_full",
    "full_place",
    "hold",
    "is_file",
    "let_go",
    "locked",
    "no_space",
    "remove_leftovers",
    "told_when_full",
    "unreadable",
    "write_atomic",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # what lies there is not what was written
TEMPORARY_VARIABLE = "DYNAMOE_LAB_TEMPORARY"  # a folder that a command made for itself and its processes, wherever TMPDIR says
_held: dict[Path, object] = {}  # lock files that `hold` keeps for this process


def is_file(path: Path) -> bool:
    """Whether a file is there; False for what no file can be called (a name that is too long, or with a NUL)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


# --- writing -----------------------------------------------------------------------------------------------------------------------


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


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what a killed `write_atomic` left in a folder; with `name`, of that file alone. Only for who holds the folder's lock."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(f".{name}" + ("." if name else "")) and path.name.endswith(".tmp") and path.is_file():
            path.unlink(missing_ok=True)


# --- reading -----------------------------------------------------------------------------------------------------------------------


def unreadable(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, is the machine's: it says nothing about the file that was to be read.

    Too many open files, no permission, a failing device: next time the file may be read. One that is missing, or that a library could
    not make sense of, is damaged.

    >>> from dynamoe_lab.disk import unreadable
    >>> unreadable(OSError(24, "Too many open files")), unreadable(FileNotFoundError(2, "No such file")), unreadable(OSError("no parquet"))
    (True, False, False)
    """
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno not in (None, *_DAMAGE)


# --- a full disk -------------------------------------------------------------------------------------------------------------------


def disk_full(error: BaseException) -> bool:
    """Whether an exception, or one that caused it, says that there is no space left.

    >>> from dynamoe_lab.disk import disk_full
    >>> disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    True
    >>> disk_full(PermissionError(13, "Permission denied"))
    False
    """
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in _FULL:
            return True
        if "no space left on device" in str(link).lower():  # safetensors, torch and pip say it in words of their own
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that caused it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def full_place(error: BaseException, folder: Path) -> Path:
    """The folder whose disk is full: that of the file that the error names, if it lies on another disk than `folder`; else `folder`."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in _FULL and isinstance(link.filename, (str, bytes, os.PathLike)):
            with suppress(OSError, ValueError, StopIteration):
                named, home = (_existing(place.absolute()) for place in (Path(os.fsdecode(link.filename)), folder))
                if named.stat().st_dev != home.stat().st_dev:
                    return named if named.is_dir() else named.parent
    return folder


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def no_space(folder: Path, advice: str) -> str:
    """The line about a full disk: the folder, which need not exist, its free space where the system tells, and what to do.

    Of a folder below `$DYNAMOE_LAB_TEMPORARY` the advice is our own: no option and no variable of ours says where that lies.
    """
    temporary = os.environ.get(TEMPORARY_VARIABLE)
    if temporary and Path(os.path.abspath(folder)).is_relative_to(temporary):
        advice = "free some, or set TMPDIR to another disk"
    with suppress(OSError, StopIteration):
        advice = f"{shutil.disk_usage(_existing(folder)).free / 2**20:,.0f} MB free; {advice}"
    return f"no space left in {folder}: {advice}"


@contextmanager
def told_when_full(folder: Path, advice: str) -> Iterator[None]:
    """Turn "no space left" inside the block into an `InputError` that names the folder and its free space.

    Where the error names a file on another disk, the line is about that one, and `advice`, which is for `folder`, is left out.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not disk_full(error):
            raise
        place = full_place(error, folder)
        raise InputError(no_space(place, advice if place == folder else "free some there")) from error


# --- several processes -------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, *, waits_for: str = "", refuses: str = "") -> Iterator[None]:
    """Hold the lock file `path`; the operating system frees it when its holder dies, however it dies.

    Args:
        waits_for: if another process holds it, say on stderr that we wait for this, and wait.
        refuses: instead of waiting raise `InputError(refuses)`; `{pid}` in it becomes the holder's process id.
    """
    lock = _acquire(path, waits_for, refuses)
    try:
        yield
    finally:
        lock.release()


def hold(path: Path, *, refuses: str) -> bool:
    """Take the lock file `path` until `let_go` or the end of this process; as often as one likes. Refuses as `locked` does.

    Returns:
        Whether it was taken now; False: this process has it already.
    """
    if path.absolute() in _held:
        return False
    _held[path.absolute()] = _acquire(path, "", refuses)
    return True


def let_go(path: Path) -> None:
    """Give up what `hold` took; nothing if it took nothing."""
    if (lock := _held.pop(path.absolute(), None)) is not None:
        lock.release()


def _acquire(path: Path, waits_for: str, refuses: str):
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if refuses:
            raise InputError(refuses.replace("{pid}", _holder(path))) from None
        print(f"waiting for {waits_for}, held by pid {_holder(path)}", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.2)
    with suppress(OSError):  # who holds it is a courtesy
        path.write_text(str(os.getpid()))
    return lock


def _holder(path: Path) -> str:
    """The process id in a lock file that is held; `?` where it cannot be known."""
    import psutil

    for _ in range(20):  # the number of a dead holder stands there until the living one has written its own
        with suppress(OSError, ValueError):  # Windows does not let others read a locked file
            if psutil.pid_exists(pid := int(path.read_text())):
                return str(pid)
        time.sleep(0.01)
    return "?"
