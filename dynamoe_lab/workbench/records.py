"""A record: what one notebook run was, gave and ran on, as typed dataclasses and as `record.json` beside its figures.

`run` says what was asked and how it ended, `results` what came out (scalars with n and interval, figures and tables with sha256, findings,
the steps it used), `env` what it ran on. Written atomically after every change, so a killed run shows what it had. The status is ours:
a record that says `running` while its process is gone reads as `interrupted`. No user name, no host, no absolute path stands in it.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.workbench.files import read_json, sha256, write_json

__all__ = [
    "Artifact",
    "Environment",
    "Finding",
    "Place",
    "Record",
    "RunError",
    "RunInfo",
    "Scalar",
    "Status",
    "StepUse",
    "StoredFile",
    "effective_status",
    "load_record",
    "load_records",
    "missing_files",
    "now",
    "place_text",
    "process_alive",
    "process_identity",
]

RECORD_FORMAT = 1
RECORD_NAME = "record.json"
Status = Literal["running", "ok", "failed", "interrupted", "stale"]


@dataclass
class RunError:
    """Why a run failed."""

    type: str  # exception class, or "DeadKernel"
    message: str
    cell: int | None = None  # code cells of the notebook count from 1
    heading: str = ""  # the heading above that cell
    traceback: list[str] = field(default_factory=list)  # its last lines
    step: str = ""  # function of the step that was running


@dataclass
class Place:
    """Where a run is: what there is to say of one that was killed."""

    cell: int | None = None  # as in RunError; not known of a notebook that runs in JupyterLab
    heading: str = ""
    step: str = ""  # function of the step that is running


@dataclass
class RunInfo:
    """What was asked, and how it ended."""

    name: str
    profile: str = "quick"
    title: str = ""  # the notebook's first heading
    question: str = ""  # the paragraph below it
    command: str = ""  # what to type to make it again
    overrides: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)  # the notebook's own parameters that were given
    config: dict[str, Any] = field(default_factory=dict)  # the resolved experiment
    status: str = "running"
    error: RunError | None = None
    at: Place | None = None  # of a run that is not finished
    started: str = ""  # ISO 8601, UTC
    finished: str = ""
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    pid: int | None = None
    process_started: float | None = None  # with the pid it names the process: pids are used again
    profile_path: str = ""  # of a profile that is a file of its own; empty: one of configs/, or not known
    inputs: dict[str, str] = field(default_factory=dict)  # local files and folders that the experiment names -> their digest
    swept: dict[str, str] = field(default_factory=dict)  # the sweep that a parameter names, as seen from the root -> `sweep_mark`
    key: str = ""  # hash of notebook code, parameters, experiment and package code; set by the runner
    source: str = ""  # hash of the notebook's code cells alone
    earlier: list[str] = field(default_factory=list)  # files that runs before this one left in the folder; they go when it has finished


@dataclass
class Scalar:
    """One number, with its interval and sample size where there are such."""

    name: str
    value: float
    n: int | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""


@dataclass
class StoredFile:
    """A file beside the record."""

    name: str
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        """The entry of a file that exists."""
        return cls(path.name, sha256(path), path.stat().st_size)


@dataclass
class Artifact:
    """A figure, a table or a text."""

    stem: str
    caption: str
    files: list[StoredFile] = field(default_factory=list)
    exact: str = ""  # fingerprint of the frame at full precision, without its measured times: the csv has six digits


@dataclass
class Finding:
    """A sentence computed from a figure's or table's frame."""

    sentence: str
    source: str  # stem
    headline: bool = False  # one of the few that open the report


@dataclass
class StepUse:
    """A step that the run used."""

    function: str
    key: str
    cached: bool
    seconds: float  # of the computation, also when it was read
    stale: bool = False  # made by other code than that of the run
    stale_rooms: list[str] = field(default_factory=list)  # whose code is other; empty also where the step does not say
    peak_memory_bytes: int | None = None  # of the process while it computed this step
    memory_before_bytes: int | None = None
    times: bool = False  # it measures times, so its result differs from run to run
    threads: int | None = None  # of torch when it was computed
    unlike: dict[str, str] = field(default_factory=dict)  # what it was computed with where the run has other: {"torch": "2.12.0"}
    parts: list[str] = field(default_factory=list)  # how its parts differ if it was killed and went on: ["by different code (training)"]
    digests: dict[str, str] = field(default_factory=dict)  # xxh3_128 of its weights, and of results that hold no time


@dataclass
class Results:
    """What came out."""

    scalars: list[Scalar] = field(default_factory=list)
    figures: list[Artifact] = field(default_factory=list)
    tables: list[Artifact] = field(default_factory=list)
    fragments: list[Artifact] = field(default_factory=list)  # sanitized HTML: texts with coloured tokens
    findings: list[Finding] = field(default_factory=list)
    steps: list[StepUse] = field(default_factory=list)
    notebook: list[StoredFile] = field(default_factory=list)  # notebook.ipynb, notebook.html


@dataclass
class Environment:
    """What it ran on."""

    commit: str = ""
    dirty: bool = False
    code: str = ""  # digest of the package's sources
    rooms: dict[str, str] = field(default_factory=dict)  # the same by room, e.g. models, training
    python: str = ""
    platform: str = ""
    cpu: str = ""
    threads: int | None = None
    packages: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    model: str = ""
    data: dict[str, str] = field(default_factory=dict)  # what was read for what
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the blocks and models that steps were given; " | " between a sweep's
    unrepeatable: list[str] = field(default_factory=list)  # why other digits may come out with the same seed, threads and versions


@dataclass
class Record:
    """One notebook run."""

    run: RunInfo
    results: Results = field(default_factory=Results)
    env: Environment = field(default_factory=Environment)
    format: int = RECORD_FORMAT
    _placed = False  # no field: whether this record lies in its folder already

    @property
    def artifacts(self) -> list[Artifact]:
        """Figures, tables and texts."""
        return [*self.results.figures, *self.results.tables, *self.results.fragments]

    @property
    def artifact_files(self) -> list[str]:
        """Names of their files."""
        return [entry.name for artifact in self.artifacts for entry in artifact.files]

    def write(self, folder: Path) -> None:
        """Write `record.json` into `folder`, atomically. The record of another run that it replaces lives on in `run.earlier`."""
        if not self._placed:
            with suppress(InputError):  # none yet, or none that can be read
                replaced = load_record(folder)
                self.run.earlier = sorted({*self.run.earlier, *replaced.run.earlier, *replaced.artifact_files})
        write_json(folder / RECORD_NAME, _json(asdict(self)))
        self._placed = True

    def may_go_to(self, folder: Path) -> bool:
        """Whether `folder` is this run's to write: True before its first write, or if what lies there is its record, or none.

        Raises `InputError` if the record there cannot be read.
        """
        if not self._placed or not (folder / RECORD_NAME).exists():
            return True
        there, ours = load_record(folder).run, self.run
        return (there.pid, there.process_started, there.started) == (ours.pid, ours.process_started, ours.started)


def now() -> str:
    """The time, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def place_text(place: RunError | Place | None) -> str:
    """Where, to be put behind a word; empty where nothing is known.

    >>> from dynamoe_lab.workbench.records import Place, place_text
    >>> "failed" + place_text(Place(3, "Train the router", step="train"))
    'failed in cell 3 (Train the router), step train'
    """
    if place is None:
        return ""
    cell = f" in cell {place.cell}" + (f" ({place.heading})" if place.heading else "") if place.cell else ""
    return cell + (f"{',' if cell else ' in'} step {place.step}" if place.step else "")


def process_identity() -> tuple[int, float]:
    """Process id and start time of this process."""
    import psutil

    process = psutil.Process()
    return process.pid, process.create_time()


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become the texts `nan` and `inf`, and numbers again on reading."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return value


# --- reading -----------------------------------------------------------------------------------------------------------------------


def load_record(folder: Path) -> Record:
    """Read `folder/record.json`. Raises `InputError` naming the file if it is missing, no JSON, or no record."""
    path = folder / RECORD_NAME
    content = read_json(path)
    try:
        if content["format"] != RECORD_FORMAT:
            raise TypeError(f"format {content['format']}, this version reads {RECORD_FORMAT}")
        record = _typed(Record, content, "record")
        _check_names(record)
        record._placed = True
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not a record ({first_line(error)}); remove it and run the notebook again") from error
    return record


def _check_names(record: Record) -> None:
    """Raise ValueError unless every file of a record lies beside it: it may come from elsewhere, and the report shows what it names."""
    for name in (record.run.name, *record.artifact_files, *record.run.earlier, *(entry.name for entry in record.results.notebook)):
        if not name or name != PurePosixPath(name).name or name.startswith(".") or "\\" in name:
            raise ValueError(f"{name!r} is no plain file name")


def load_records(folder: Path) -> list[Record]:
    """The records of a report folder (`folder/<notebook>/record.json`), in notebook order; `InputError` names an unreadable one."""
    return [load_record(place.parent) for place in sorted(folder.glob(f"*/{RECORD_NAME}"), key=lambda place: place.parent.name)]


def _typed(wanted: Any, value: Any, place: str) -> Any:
    """`value` from JSON as the annotated type; unknown entries are left aside, missing ones take their default."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return value
    if origin is UnionType:
        return None if value is None else _typed(next(part for part in parts if part is not NoneType), value, place)
    if is_dataclass(wanted):
        if not isinstance(value, dict):
            raise TypeError(f"{place} is no object")
        hints = get_type_hints(wanted)
        known = [item.name for item in fields(wanted) if item.name in value]
        return wanted(**{name: _typed(hints[name], value[name], f"{place}.{name}") for name in known})
    if origin is list and isinstance(value, list):
        return [_typed(parts[0], item, f"{place}[{position}]") for position, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _typed(parts[1], item, f"{place}.{key}") for key, item in value.items()}
    if wanted is float and (value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        return float(value) if isinstance(value, str) else value  # a count stays a whole number
    if isinstance(wanted, type) and isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
        return value
    raise TypeError(f"{place} is {value!r}")


# --- judging -----------------------------------------------------------------------------------------------------------------------


def effective_status(record: Record) -> Status:
    """How a run ended, or that it runs: `interrupted` if it says running but its process is gone, else what the record says.

    Whether what is ok is up to date is for `stale.standing` to say.
    """
    run = record.run
    if run.status == "running":
        return "running" if process_alive(run.pid, run.process_started) else "interrupted"
    return run.status if run.status in get_args(Status) else "failed"


def process_alive(pid: int | None, started: float | None) -> bool:
    """Whether the process with this id that began at `started` (seconds since 1970; None: whichever has the id) still runs."""
    import psutil

    if pid is None or pid <= 0:
        return False
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and (started is None or abs(process.create_time() - started) < 1.0)
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except psutil.AccessDenied:
        return True


def missing_files(record: Record, folder: Path) -> list[str]:
    """Names of the record's files that are gone or changed since they were written."""
    entries = [entry for artifact in record.artifacts for entry in artifact.files] + record.results.notebook
    return [e.name for e in entries if not (folder / e.name).is_file() or sha256(folder / e.name) != e.sha256]
