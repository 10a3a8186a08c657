"""A headless Chromium, and a JupyterLab for it, for `test_browser.py`: both started here, watched, and ended with the test.

The driver (playwright) comes with the development packages; the browser is the machine's own: `$CHROMIUM`, else the first of `BROWSERS`
that is there. Without one the tests that ask for it are skipped and say so.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
FIRED = "window.fired"  # what hostile text sets if it ever runs
ELSEWHERE = (
    "[onerror], [onload], [srcdoc], [href^='javascript:'], [href*='example.org'], [src*='example.org']"  # its markup, if it ever is any
)


def find_browser() -> str:
    """Path of the machine's browser; skips the test where there is none, fails where `$CHROMIUM` leads nowhere."""
    if given := os.environ.get("CHROMIUM"):
        path = shutil.which(given)
        assert path, f"CHROMIUM={given} is no program"
        return path
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH; install Chromium, or give its path as CHROMIUM=...")


class Watch:
    """Everything that must not happen on a page: errors, failed requests, other hosts, dialogs.

    `own` are the beginnings of the addresses that the page may ask for.
    """

    def __init__(self, page, own: tuple[str, ...]):
        self.page, self.own = page, own
        self.errors, self.failed, self.foreign, self.dialogs = [], [], [], []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        page.on("request", self._request)
        page.on("requestfailed", lambda request: self.failed.append(f"{request.url[:200]}: {request.failure}"))
        page.on("response", self._response)
        page.on("dialog", self._dialog)
        page.on("popup", lambda popup: self.foreign.append(f"opened {popup.url}"))

    def _console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text[:500]}")

    def _request(self, request) -> None:
        if not request.url.startswith((*self.own, "data:", "blob:", "about:")):
            self.foreign.append(request.url[:200])

    def _response(self, response) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url[:200]}")

    def _dialog(self, dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def nothing_fired(self) -> None:
        """Assert that no hostile text ran, asked or reached another host."""
        assert self.page.evaluate(f"typeof {FIRED}") == "undefined", "text ran as a script"
        assert not self.page.locator(ELSEWHERE).count(), self.page.locator(ELSEWHERE).first.evaluate("part => part.outerHTML.slice(0, 300)")
        assert not self.dialogs
        assert not self.foreign, f"asked other hosts: {self.foreign}"


class Lab:
    """A running JupyterLab on `project`, and a page of the browser in it."""

    def __init__(self, context, project: Path, port: int, token: str):
        self.project, self.address, self._token = project, f"http://127.0.0.1:{port}", token
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.watch = Watch(self.page, (self.address, self.address.replace("http", "ws")))

    def open(self, notebook: str) -> None:
        """Show a notebook alone, as its address does, until its kernel is idle."""
        self.page.goto(f"{self.address}/lab/tree/notebooks/{notebook}.ipynb?reset&token={self._token}")
        self.page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-CodeCell")
        self.page.locator("#jp-main-statusbar", has_text="| Idle").wait_for()  # sooner, Run All asks which kernel

    def menu(self, name: str, item: str) -> None:
        """Choose an item of the menu bar, as a person does."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{name}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).click()

    def run_all(self, *, seconds: float = 300) -> list[dict]:
        """Run > Run All Cells; waits for the last cell and saves. -> the code cells as they are in the saved file

        Raises AssertionError with the error's text as soon as a cell has one.
        """
        self.menu("Run", "Run All Cells")
        until = time.monotonic() + seconds
        prompts, error = self.page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt"), self.page.locator("[data-mime-type*='error']")
        while True:
            told = prompts.all_text_contents()  # inner text is empty where a cell is out of sight
            if error.count():
                raise AssertionError(f"{told}: {error.first.inner_text()[-3000:]}")
            if all(re.fullmatch(r"\[\d+\]:", text.strip()) for text in told):
                break
            assert time.monotonic() < until, f"not at its end after {seconds} s: {told}"
            self.page.wait_for_timeout(500)
        return self.saved()

    def saved(self) -> list[dict]:
        """Save the notebook that is shown. -> its code cells, from the file"""
        name = urlsplit(self.page.url).path.removeprefix("/lab/tree/")
        path = self.project / name
        before = path.stat().st_mtime_ns
        self.menu("File", "Save Notebook")
        until = time.monotonic() + 30
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < until, f"{name} was not saved"
            self.page.wait_for_timeout(100)
        return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def set_parameters(path: Path, values: dict) -> None:
    """Write values into a notebook's parameters cell, as a person does before Run All."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    (cell,) = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    lines = "".join(cell["source"]).splitlines()
    for name, value in values.items():
        (place,) = [number for number, line in enumerate(lines) if line.startswith(f"{name}: ")]
        lines[place] = f"{lines[place].split('=')[0]}= {value!r}"
    cell["source"] = "\n".join(lines)
    path.write_text(json.dumps(notebook), encoding="utf-8")


@contextlib.contextmanager
def jupyter_lab(context, project: Path, home: Path) -> Iterator[Lab]:
    """JupyterLab as `make lab` starts it, with settings, caches and a token of its own, on a free port, for the time of a `with`."""
    token, private = secrets.token_hex(16), project.parent / "jupyter"
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = {
        **os.environ,
        **{name: str(private / name.lower()) for name in (*places, "IPYTHONDIR")},
        "DYNAMOE_LAB_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("MPLBACKEND", None)  # conftest's: a notebook draws inline
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    command += [f"--ServerApp.root_dir={project}", f"--IdentityProvider.token={token}", "--LabApp.news_url=None"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    private.mkdir(exist_ok=True)
    with (private / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield Lab(context, project, _port(server, private), token)
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _port(server: subprocess.Popen, private: Path) -> int:
    """The port that the server chose, from the file it leaves in its runtime folder, once it answers."""
    until = time.monotonic() + 90
    while time.monotonic() < until and server.poll() is None:
        for path in (private / "jupyter_runtime_dir").glob("jpserver-*.json"):
            with contextlib.suppress(OSError, ValueError):
                info = json.loads(path.read_text())
                urllib.request.urlopen(f"{info['url']}api?token={info['token']}", timeout=5).close()
                return info["port"]
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start: {(private / 'log').read_text()[-3000:]}")
