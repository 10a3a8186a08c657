"""How a notebook's cells run: papermill with this interpreter's kernel, a heartbeat line, and a verdict that is ours.

Papermill's own output claims that every cell completed even when the kernel died; here the engine tells which cell was running. The
heartbeat says, at every cell and every 15 seconds, where a run is: notebook, cell n/N, the heading above it, time, the last line printed.
"""

import json
import logging
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError, strip_color

from dynamoe_lab.workbench.environment import package_root
from dynamoe_lab.workbench.files import disk_full, no_space
from dynamoe_lab.workbench.handover import CELLS_VARIABLE, RUNNER_VARIABLE
from dynamoe_lab.workbench.records import RunError
from dynamoe_lab.workbench.runlog import RunLog
from dynamoe_lab.workbench.steps import RECOMPUTE_VARIABLE
from dynamoe_lab.workbench.terminal import seconds_text

__all__ = ["INTERRUPTED", "Heartbeat", "Interruption", "execute"]

INTERRUPTED = "Interrupted"
_ENGINE = "dynamoe-lab"
_INJECTED = "injected-parameters"


class Interruption(RunError):
    """How a run that was stopped ended, with the exception that stopped it, which says by what: Ctrl-C, or a signal to terminate."""

    def __init__(self, stop: KeyboardInterrupt):
        super().__init__(INTERRUPTED, "stopped by Ctrl-C or a signal; the same command goes on")
        self.stop = stop


@dataclass
class _Cell:
    number: int  # code cells of the notebook count from 1; the injected parameters belong to the parameters cell
    heading: str
    runs: bool = True  # it is not empty


def _cells(nb: Any) -> dict[int, _Cell]:
    """Position -> number and nearest heading above, for the code cells."""
    cells, number, heading = {}, 0, ""
    for position, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            found = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", cell.source, flags=re.MULTILINE)
            heading = found[-1] if found else heading
        elif cell.cell_type == "code":
            number += _INJECTED not in cell.metadata.get("tags", [])
            cells[position] = _Cell(number, heading, bool(cell.source.strip()))
    return cells


class Heartbeat:
    """Prints where a notebook is, at every cell and every `every` seconds; a context manager around the run. `log` keeps all it hears."""

    def __init__(self, name: str, *, every: float = 15.0, stream: TextIO | None = None, log: RunLog | None = None):
        self.name, self.every, self.stream, self.log = name, every, stream or sys.stdout, log
        self.cell: _Cell | None = None
        self._cells: dict[int, _Cell] = {}
        self._last, self._clock = "", time.monotonic()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def begin(self, nb: Any) -> None:
        """The notebook that runs, parameters injected."""
        self._cells = _cells(nb)

    def places(self) -> list[tuple[int, str]]:
        """Number and heading of the cells in the order in which a kernel counts them; it leaves empty ones out."""
        return [(cell.number, cell.heading) for cell in self._cells.values() if cell.runs]

    def enter(self, position: int) -> None:
        """The cell at `position` starts."""
        with self._lock:
            before, self.cell, self._last = self.cell, self._cells[position], ""
        if before is None or before.number != self.cell.number:
            self.show()

    def heard(self, text: str) -> None:
        """The running cell printed `text`."""
        if self.log is not None:
            with self._lock:
                self.log.heard(text)
        lines = [line.strip() for line in re.split(r"[\r\n]+", strip_color(text)) if line.strip()]
        if lines:
            with self._lock:
                self._last = lines[-1]

    def show(self) -> None:
        """Print the line now."""
        with self._lock:
            cell, last = self.cell, self._last
        if cell is None:
            words = [self.name, "starting the kernel"]
        else:
            total = max(other.number for other in self._cells.values())
            words = [self.name, f"cell {cell.number}/{total}", cell.heading]
        words += [seconds_text(time.monotonic() - self._clock), f"| {last[:100]}" if last else ""]
        line = "  ".join(word for word in words if word)
        print(line, file=self.stream, flush=True)
        if self.log is not None:
            with self._lock:
                self.log.line(line)

    def _beat(self) -> None:
        while not self._stop.wait(self.every):
            self.show()


class _Client(PapermillNotebookClient):
    """Papermill's client that tells a heartbeat what it hears."""

    def __init__(self, nb_man: Any, heartbeat: Heartbeat, **traits: Any):
        super().__init__(nb_man, **traits)
        self.heartbeat = heartbeat

    def process_message(self, msg: dict, *args: Any, **kwargs: Any) -> Any:
        if msg["msg_type"] == "stream":
            self.heartbeat.heard(msg["content"]["text"])
        return super().process_message(msg, *args, **kwargs)

    def papermill_execute_cells(self) -> None:
        try:
            super().papermill_execute_cells()
        except KeyboardInterrupt:
            self.shutdown_kernel = "immediate"  # asked politely, a busy kernel answers with a traceback
            raise


class HeartbeatEngine(NBClientEngine):
    """Papermill's engine with a heartbeat and the kernel of this interpreter."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, heartbeat: Heartbeat, environment: dict[str, str], start_timeout: int = 120, **_: Any
    ) -> None:
        """Run the cells of `nb_man.nb`; see papermill's engines."""
        heartbeat.begin(nb_man.nb)
        environment = environment | {CELLS_VARIABLE: json.dumps(heartbeat.places())}
        client = _Client(
            nb_man,
            heartbeat,
            kernel_name=kernel_name,
            kernel_manager_class=_own_kernel_manager(),
            startup_timeout=start_timeout,
            timeout=None,
            iopub_timeout=60,  # a busy machine delivers a large figure late; that is no failure
            coalesce_streams=True,
            store_widget_state=False,  # nothing that reads the saved notebook can show live widgets
            log=logging.getLogger("papermill"),
            on_cell_execute=lambda cell, cell_index: heartbeat.enter(cell_index),
        )
        client.execute(env=environment)


def _own_kernel_manager() -> type:
    """A kernel manager that starts `sys.executable`, whatever kernels named python3 this machine has, over an encrypted connection."""
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class OwnKernelManager(AsyncKernelManager):
        def __init__(self, **traits: Any):
            if self.has_trait("transport_encryption") and zmq.has("curve"):  # older jupyter clients know no encryption
                traits.setdefault("transport_encryption", "auto")
            super().__init__(**traits)

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(resource_dir="", **get_kernel_dict())

        async def _async_interrupt_kernel(self) -> None:
            """A shutdown interrupts the kernel first; one that still says good-bye to its last message would print an ERROR for it."""
            if not self.shutting_down:
                await super()._async_interrupt_kernel()

    return OwnKernelManager


def kernel_environment(name: str, *, recompute: bool = False) -> dict[str, str]:
    """The kernel's environment variables; those of this process stay as they are."""
    variables = dict(os.environ)
    variables.pop("MPLBACKEND", None)  # the kernel shows figures inline; a backend of the shell would hide them
    source = str(package_root().parent)  # the kernel imports the package that started it
    variables["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [variables.get("PYTHONPATH")])])
    return variables | {
        RUNNER_VARIABLE: name,
        RECOMPUTE_VARIABLE: "1" if recompute else "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def execute(
    nb: Any,
    saved: Path,
    *,
    name: str,
    parameters: dict[str, Any],
    cwd: Path,
    every: float = 15.0,
    recompute: bool = False,
    log: RunLog | None = None,
) -> RunError | None:
    """Run a notebook in a fresh kernel and save it, with what it printed, to `saved` as it goes; `log` hears all of it.

    Returns None if every cell ran, else what went wrong and where; an `Interruption` if Ctrl-C or a signal stopped it, and its kernel.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    papermill_engines.register(_ENGINE, HeartbeatEngine)
    for logger in ("papermill", "traitlets"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # what they would say, we say
    heartbeat = Heartbeat(name, every=every, log=log)
    try:
        with heartbeat:
            papermill.execute_notebook(
                nb,
                str(saved).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
                parameters=parameters,
                engine_name=_ENGINE,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=120,
                cwd=str(cwd),
                heartbeat=heartbeat,
                environment=kernel_environment(name, recompute=recompute),
            )
    except PapermillExecutionError as error:
        lines = [line for line in strip_color("\n".join(error.traceback)).splitlines() if line.strip()]
        message = error.evalue or ("out of memory" if error.ename == "MemoryError" else "no message")
        return _located(heartbeat, RunError(error.ename, message, traceback=lines[-40:]))
    except DeadKernelError:
        return _located(heartbeat, RunError("DeadKernel", "the kernel died (out of memory?)"))
    except KeyboardInterrupt as stop:
        return _located(heartbeat, Interruption(stop))
    except Exception as error:
        if disk_full(error):  # papermill saves as it goes
            return _located(heartbeat, RunError("InputError", no_space(saved.parent, "free some, or choose another --output")))
        message = str(error).strip().splitlines()
        return _located(heartbeat, RunError(type(error).__name__, message[0] if message else "no message", traceback=message[1:][-12:]))
    return None


def _located(heartbeat: Heartbeat, error: RunError) -> RunError:
    if heartbeat.cell is not None:
        error.cell, error.heading = heartbeat.cell.number, heartbeat.cell.heading
    return error
