"""What a result depends on besides its inputs: code, commit, package versions, platform, threads.

Nothing here names a user, a host or a folder. Versions are read from package metadata, so no package is imported to be asked.
"""

import os
import platform
import random
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import xxhash

from dynamoe_lab.plural import plural

__all__ = [
    "PACKAGES",
    "ROOMS_WITHOUT_RESULTS",
    "code_digest",
    "cpu_name",
    "git_state",
    "package_root",
    "platform_name",
    "room_digests",
    "seed_generators",
    "torch_threads",
    "usable_cores",
    "versions",
]

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "lm_eval",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "matplotlib",
    "seaborn",
    "papermill",
    "omegaconf",
)

# Sources that draw, tell and book-keep: a change in them leaves the result of a step as it was. (analysis/statistics.py makes intervals.)
ROOMS_WITHOUT_RESULTS = (
    "analysis/findings",
    "analysis/plots",
    "analysis/style.py",
    "analysis/tokens.py",
    "workbench",
)


def package_root() -> Path:
    """The folder of the package `dynamoe_lab` that is running."""
    return Path(__file__).resolve().parents[1]


@cache
def code_digest(without: tuple[str, ...] = ()) -> str:
    """One digest of the package's sources, as they were when first asked for; files and folders named in `without` left aside."""
    digest = xxhash.xxh3_128()
    for name, content in _sources(without):
        _feed(digest, name, content)
    return digest.hexdigest()


@cache
def room_digests(without: tuple[str, ...] = ()) -> dict[str, str]:
    """The same by room, to say later which rooms changed: `{"config": "3f1c...", "models": ...}`, 16 digits each."""
    rooms: dict[str, xxhash.xxh3_64] = {}
    for name, content in _sources(without):
        _feed(rooms.setdefault(name.parts[0].removesuffix(".py"), xxhash.xxh3_64()), name, content)
    return {room: digest.hexdigest() for room, digest in sorted(rooms.items())}


@cache
def _sources(without: tuple[str, ...]) -> list[tuple[Path, bytes]]:
    root = package_root()
    named = [(path.relative_to(root), path) for path in sorted(root.rglob("*.py"))]
    return [(name, path.read_bytes()) for name, path in named if not any(name.is_relative_to(left) for left in without)]


def _feed(digest: xxhash.xxh3_128 | xxhash.xxh3_64, name: Path, content: bytes) -> None:
    digest.update(f"{name.as_posix()}:{len(content)}:".encode())
    digest.update(content)


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; absent ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> tuple[str, bool]:
    """Commit of the checkout that `folder` is the top of, and whether tracked files differ from it; `("", False)` outside of git.

    Reports do not count: a run writes the committed one itself.
    """
    if not (folder / ".git").exists():
        return "", False
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!reports"))
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or a folder of someone else
        return "", False


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def platform_name() -> str:
    """Operating system, machine and usable cores, e.g. `Linux x86_64, 2 cores`; no host name."""
    cores = usable_cores()
    return f"{platform.system()} {platform.machine()}, {plural(cores, 'core')}"


@cache
def cpu_name() -> str:
    """The processor's name as the system gives it, e.g. `AMD EPYC`."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_generators(seed: int, threads: int | None = None) -> None:
    """Seeds of the global generators, and torch's threads unless None; torch and numpy are not imported for it."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for a torch that comes later
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
        if threads:
            torch.set_num_threads(threads)


def torch_threads() -> int | None:
    """Threads that torch computes with now; None where torch was not imported, which is not done for it."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else None
