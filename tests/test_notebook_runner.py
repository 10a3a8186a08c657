"""The notebook runner: what is refused before a kernel starts, what is told while one runs, and what is kept however it ends."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import interrupt
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import notebooks
from dynamoe_lab.workbench.export import introduction, notebook_html, tidied
from dynamoe_lab.workbench.notebooks import prepare, run_notebook, run_notebooks, select
from dynamoe_lab.workbench.records import RunError, StepUse, effective_status, load_record, place_text
from dynamoe_lab.workbench.report import build_report

CHECKOUT = Path(__file__).parents[1]
PARAMETERS = 'profile: str = "smoke"  # a profile\noverrides: list = []\noutput: str = ""\n'


def write_notebook(root: Path, name: str, cells: list[str], parameters: str = "", kernel: str = "someone-elses-kernel") -> Path:
    """A notebook of markdown (lines that start with '#') and code cells, its parameters first."""
    first = new_code_cell(PARAMETERS + parameters, metadata={"tags": ["parameters"]})
    rest = [new_markdown_cell(text) if text.startswith("#") else new_code_cell(text) for text in cells]
    head = new_markdown_cell(f"# Title of {name}\n\nDoes *it* work, on `{name}`?\n\nMore text.")
    nb = new_notebook(cells=[head, first, *rest])
    nb.metadata.kernelspec = {"name": kernel, "display_name": "Python 3", "language": "python"}
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(nb, path)
    return path


GOOD = [
    "import dynamoe_lab as lab\nimport matplotlib.pyplot as plt\nimport pandas as pd\n"
    'run = lab.start("02_good", profile=profile, overrides=overrides, output=output)',
    "## Draw the figure",
    "frame = pd.DataFrame({'x': [1, 2], 'y': [width, run.experiment.dynamoe.theta]})\n_, ax = plt.subplots()\nax.plot(frame.x, frame.y)\n"
    'run.figure(ax, "line", data=frame, caption="A line.")',
    'import os, sys\nprint("kernel", sys.executable, os.environ["DYNAMOE_LAB_NOTEBOOK"], os.getcwd())\nrun.finish()',
]


def no_kernel(*_, **__):
    raise AssertionError("a kernel was started")


@pytest.fixture
def without_kernel(monkeypatch):
    from dynamoe_lab.workbench import kernel

    monkeypatch.setattr(kernel, "execute", no_kernel)


# --- before a kernel starts --------------------------------------------------------------------------------------------------------


def test_notebooks_are_found_by_name_number_and_file(project):
    for name in ("00_explore", "04_router_confusion", "10_any_theta"):
        write_notebook(project, name, [])
    names = lambda *given: [path.stem for path in select(given)]  # noqa: E731
    assert names() == ["00_explore", "04_router_confusion", "10_any_theta"]
    assert names("04") == names("4") == names("04_router_confusion") == names("notebooks/04_router_confusion.ipynb")
    assert names("10", "00", "10") == ["10_any_theta", "00_explore"]
    with pytest.raises(InputError, match="did you mean 04_router_confusion"):
        select(["04_router_confussion"])
    with pytest.raises(InputError, match="no notebook '1'"):
        select(["1"])


TYPED = """
width: int = 3
rate: float = 1e-3
name: str = 'a'
fast: bool = False
thetas: list[float] = [0.7, 0.9]
seed_of: int | None = None
free = 0.5
"""


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("width=4", 4),
        ("rate=1e-5", 1e-5),
        ("rate=2", 2.0),
        ("name=007", "007"),
        ("name=C # and 'F': {x", "C # and 'F': {x"),  # a sentence is no YAML
        ("fast=true", True),
        ("thetas=[1, 0.5]", [1.0, 0.5]),
        ("seed_of=null", None),
        ("seed_of=3", 3),
        ("free=1", 1.0),
        ("overrides=[seed=3]", ["seed=3"]),
    ],
)
def test_values_take_the_parameters_type(project, pair, expected):
    path = write_notebook(project, "a", [], TYPED)
    value = prepare([path], profile="smoke", given=[pair])[0].values[pair.partition("=")[0]]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("width=3.5", r"width is a int \(default 3\); write e\.g\. -p 'width=4'"),
        ("width=true", "width is a int"),
        ("width=null", "width is a int"),
        ("fast=1", "fast is a bool"),
        ("thetas=0.8", r"thetas is a list\[float\].*\[0\.8, 0\.9\]"),
        ("thetas=[a]", "thetas is a list"),
        ("seed_of=x", "seed_of is a int"),
        ("rate=quick", "rate is a float"),
        ("widht=3", "did you mean width"),
        ("dynamoe.teta=0.8", r"did you mean dynamoe\.theta"),
        ("profile=quick", "use the option --profile"),
        ("output=x", "use the option --output"),
        ("width", "write key=value"),
        ("dynamoe.theta=7", r"dynamoe\.theta"),
        ("thetas=[", "cannot be read as YAML"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_kernel_starts(project, without_kernel, pair, message):
    write_notebook(project, "a", [], TYPED)
    with pytest.raises(InputError, match=message):
        run_notebooks(["a"], profile="smoke", given=[pair])
    assert not (project / "reports").exists()


def test_a_parameter_needs_one_of_several_notebooks(project):
    paths = [write_notebook(project, "a", [], "width: int = 3\n"), write_notebook(project, "b", [])]
    jobs = prepare(paths, profile="smoke", given=["width=4", "dynamoe.theta=0.8"])
    assert [job.own for job in jobs] == [{"width": 4}, {}]
    assert [job.values["overrides"] for job in jobs] == [["dynamoe.theta=0.8"]] * 2
    assert jobs[1].command == "dynamoe-lab run b --profile smoke -p dynamoe.theta=0.8"
    with pytest.raises(InputError, match="did you mean width"):
        prepare(paths, profile="smoke", given=["widht=4"])


def test_a_profile_has_parameters_for_notebooks(project):
    paths = [write_notebook(project, "a", [], TYPED), write_notebook(project, "b", [], "width: int = 3\n")]
    profile = project / "mine.yaml"
    profile.write_text("model: smollm2-pico\nseed: 3\nnotebooks: {a: {width: 5, thetas: [1, 0.5], overrides: [dynamoe.theta=0.7]}}\n")
    a, b = prepare(paths, profile=str(profile))
    assert a.own == {"width": 5, "thetas": [1.0, 0.5]}
    assert (a.values["width"], a.values["overrides"], a.config["dynamoe"]["theta"]) == (5, ["dynamoe.theta=0.7"], 0.7)
    assert (b.own, b.values["overrides"], b.config["seed"]) == ({}, [], 3)
    typed, _ = prepare(paths, profile=str(profile), given=["width=4", "dynamoe.lambda_lm=0.1"])  # what is typed goes before the profile
    assert typed.own == {"width": 4, "thetas": [1.0, 0.5]}
    assert typed.values["overrides"] == ["dynamoe.theta=0.7", "dynamoe.lambda_lm=0.1"]
    assert len({a.key, typed.key}) == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{c: {}}", r"notebooks\.c: no such notebook"),
        ("{a: [1]}", r"notebooks\.a: no map of parameters"),
        ("{a: {widht: 3}}", r"notebooks\.a: no parameter 'widht'; did you mean width"),
        ("{a: {free: [{1: 2}]}}", r"notebooks\.a: free = .*: a key of a map is no text; put keys in quotes"),
        ("{a: {width: wide}}", r"notebooks\.a: width = 'wide', but width is a int \(default 3\)"),
        ("{a: {output: x}}", r"notebooks\.a: no parameter 'output'"),
        ("{a: {overrides: [dynamoe.teta=0.8]}}", r"did you mean dynamoe\.theta"),
    ],
)
def test_a_profiles_parameters_are_checked_before_a_kernel_starts(project, without_kernel, section, message):
    write_notebook(project, "a", [], TYPED)
    profile = project / "mine.yaml"
    profile.write_text(f"notebooks: {section}\n")
    with pytest.raises(InputError, match=message):
        run_notebooks(["a"], profile=str(profile))


def test_notebooks_that_cannot_be_run_are_named(project):
    path = project / "notebooks" / "a.ipynb"
    path.write_text("{")
    with pytest.raises(InputError, match=r"a\.ipynb: not a readable notebook"):
        prepare([path], profile="smoke")
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1")]), path)
    with pytest.raises(InputError, match="tagged 'parameters'"):
        prepare([path], profile="smoke")
    nbformat.write(new_notebook(cells=[new_code_cell("profile = 'a'", metadata={"tags": ["parameters"]})]), path)
    with pytest.raises(InputError, match="lacks overrides, output"):
        prepare([path], profile="smoke")
    nbformat.write(new_notebook(cells=[new_code_cell(PARAMETERS + "x = f()", metadata={"tags": ["parameters"]})]), path)
    with pytest.raises(InputError, match="parameter x has no literal value"):
        prepare([path], profile="smoke")


def test_defaults_with_equals_signs_are_parameters_too(project):
    path = write_notebook(project, "a", [], "extra: list = ['dynamoe.theta=0.8']\n")
    assert prepare([path], profile="smoke", given=["extra=['seed=1']"])[0].values["extra"] == ["seed=1"]


def test_the_key_follows_code_parameters_experiment_and_package(project, monkeypatch):
    path = write_notebook(project, "a", ["print(1)"], "width: int = 3\n")
    key = lambda *given: prepare([path], profile="smoke", given=given)[0].key  # noqa: E731
    first = key()
    assert key() == first
    assert len({first, key("width=4"), key("dynamoe.theta=0.5")}) == 3
    write_notebook(project, "a", ["# a new text", "print(1)"], "width: int = 3\n")
    assert key() == first
    write_notebook(project, "a", ["print(2)"], "width: int = 3\n")
    assert key() != first
    second = key()
    monkeypatch.setattr(notebooks.environment, "code_digest", lambda: "other")
    assert key() != second


def test_title_and_question_come_from_the_first_markdown(project):
    nb = nbformat.read(write_notebook(project, "a", []), as_version=4)
    assert introduction(nb) == ("Title of a", "Does it work, on a?")
    nb.cells = [new_markdown_cell("## **A** title\nThe [question](http://x)\nin two_lines."), new_markdown_cell("# B")]
    assert introduction(nb) == ("A title", "The question in two_lines.")
    nb.cells = [new_markdown_cell("# A"), new_markdown_cell("# B\ntext")]
    assert introduction(nb) == ("A", "")


def test_long_outputs_are_capped():
    lines = "".join(f"line {number}\n" for number in range(10_000))
    outputs = [
        nbformat.v4.new_output("stream", text=lines),
        nbformat.v4.new_output("display_data", {"text/html": "<p>" + "x" * 600_000, "text/plain": "short"}),
        nbformat.v4.new_output("display_data", {"text/html": "<p>" + "x" * 600_000}),
        nbformat.v4.new_output("display_data", {"text/plain": "y" * 30_000, "image/png": "A" * 600_000}),
    ]
    nb = new_notebook(cells=[new_code_cell("print()", outputs=outputs)])
    stream, html, alone, plain = tidied(nb, CHECKOUT).cells[0].outputs
    assert stream.text.startswith("line 0\nline 1\n")
    assert stream.text.endswith("line 9998\nline 9999\n")
    assert re.search(r"\nline \d+\n\[\.\.\. ([\d,]+) characters left out \.\.\.\]\nline \d+\n", stream.text)
    assert len(stream.text) < 20_100
    assert html.data == {"text/plain": "short"}
    assert list(alone.data) == ["text/plain"]
    assert len(plain.data["text/plain"]) < 20_100
    assert len(plain.data["image/png"]) == 600_000
    assert len(nb.cells[0].outputs[0].text) == len(lines), "what was given is left as it is"


def test_the_page_keeps_markup_and_drops_what_runs_or_loads():
    table = "<style scoped>.x th {color: red}</style><table class='x'><thead><tr><th>n</th></tr></thead><tr><td>1</td></tr></table>"
    bad = (
        "<script>alert(1)</script><img src='http://example.org/a.png' onerror='alert(2)'><iframe src='http://example.org'></iframe>"
        "<style>@import url(http://example.org/a.css)</style><meta http-equiv='refresh' content='0;url=http://example.org'>"
        "<a href='javascript:alert(3)'>x</a><a href=' DA\tTA:text/html,bad'>x</a>"
    )
    shown = "<span tabindex='0' style='background: #ff0'>token</span>"
    outputs = [nbformat.v4.new_output("display_data", {"text/html": text, "text/plain": "-"}) for text in (table, bad, shown)]
    cells = [
        new_markdown_cell("# A title\n\nWith a [link](https://example.org) and $x^2$.\n\n- item"),
        new_code_cell("f(x) < 1", outputs=outputs),
    ]
    page = notebook_html(new_notebook(cells=cells), "a & b")
    for kept in (
        "<h1",
        "A title</h1>",
        "<p>With a",
        "<li>item</li>",
        "<thead>",
        "<td>1</td>",
        ".x th {color: red}",
        "background: #ff0",
        "f",
        "&lt;",
    ):
        assert kept in page, kept
    assert "<title>a &amp; b</title>" in page
    assert not re.search(r"<(script|iframe|meta http-equiv=.refresh)", page)
    assert not re.search(r"<[^>]*(onerror|javascript:|src=.http|href=.\s*da\s*ta:)", page, re.IGNORECASE)
    assert "@import" not in page


def test_a_full_disk_still_says_how_a_notebook_ended(project, monkeypatch, capsys):
    """No space for the executed notebook: it goes, and the record tells the cell and the step."""
    import dynamoe_lab as lab
    from dynamoe_lab.workbench import handover, kernel

    path = write_notebook(project, "01_a", ["print(1)"])

    def dies_in_a_step(nb, saved, **_):
        run = lab.start("01_a", profile="smoke", output="reports/smoke")
        monkeypatch.setenv(handover.CELLS_VARIABLE, json.dumps([[3, "Train"]]))
        monkeypatch.setattr(handover, "_shell", lambda: SimpleNamespace(user_ns={"In": ["", "train()"]}))
        run._write(step="train")
        saved.write_text("{")  # papermill could not write all of it
        return RunError("DeadKernel", "the kernel died (out of memory?)", 3, "Train")

    monkeypatch.setenv(handover.RUNNER_VARIABLE, "01_a")
    monkeypatch.setattr(kernel, "execute", dies_in_a_step)
    (job,) = prepare([path], profile="smoke")
    assert run_notebook(job) == "failed"
    assert "01_a  failed in cell 3 (Train), step train: DeadKernel: the kernel died" in capsys.readouterr().out
    run = load_record(job.folder).run
    assert (run.status, run.error.step, run.at) == ("failed", "train", None)
    assert sorted(item.name for item in job.folder.iterdir()) == ["record.json", "run.log"]
    assert "failed in cell 3 (Train), step train: DeadKernel" in (job.folder / "run.log").read_text()

    def full(job, saved):
        raise OSError(errno.ENOSPC, "No space left on device")

    def ends_well(nb, saved, **_):
        saved.write_text("{}")
        lab.start("01_a", profile="smoke", output="reports/smoke").finish()

    monkeypatch.setattr(kernel, "execute", ends_well)
    monkeypatch.setattr(notebooks, "_keep_notebook", full)
    for _ in range(2):  # it is not up to date
        with pytest.raises(InputError, match=r"01_a: no space left in .*/01_a: .*MB free; none for the executed notebook; free some"):
            run_notebook(job)
    run = load_record(job.folder).run
    assert (run.status, run.error.message.startswith("no space left in ./reports/smoke/01_a")) == ("failed", True)
    assert not list(job.folder.glob("*notebook*")) + list(job.folder.glob(".running*"))


def test_steps_of_other_code_are_told_at_the_end(project, monkeypatch, capsys):
    import dynamoe_lab as lab
    from dynamoe_lab.workbench import handover, kernel

    path = write_notebook(project, "01_a", ["print(1)"])
    uses = [StepUse("train", "a" * 32, True, 1.0, True, ["models"]), StepUse("calibrate", "b" * 32, True, 1.0, False)]

    def ends_well(nb, saved, **_):
        saved.write_text(nbformat.writes(nb))
        run = lab.start("01_a", profile="smoke", output="reports/smoke")
        run.record.results.steps = uses
        run.finish()

    monkeypatch.setenv(handover.RUNNER_VARIABLE, "01_a")
    monkeypatch.setattr(kernel, "execute", ends_well)
    (job,) = prepare([path], profile="smoke")
    assert run_notebook(job) == "ok"
    assert capsys.readouterr().out.splitlines()[-1] == "01_a  train computed by other code (models); --recompute computes them anew"
    assert "--recompute" in (job.folder / "run.log").read_text()
    assert "computed by other code" in build_report(job.folder.parent).read_text()


# --- with kernels ------------------------------------------------------------------------------------------------------------------


def test_a_good_notebook_is_kept_and_then_up_to_date(project, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = ("MPLBACKEND", "PYTHONPATH", "DYNAMOE_LAB_NOTEBOOK", "HF_HUB_DISABLE_PROGRESS_BARS")
    before = [os.environ.get(name) for name in names]
    write_notebook(project, "02_good", GOOD, "width: int = 3\n")
    given = ["width=4", "dynamoe.theta=0.75"]
    assert run_notebooks(["02"], profile="smoke", given=given) == {"02_good": "ok"}
    assert [os.environ.get(name) for name in names] == before  # the kernel's variables are the kernel's
    said = capsys.readouterr().out
    assert "02_good  cell 3/4  Draw the figure  " in said
    folder = project / "reports" / "smoke" / "02_good"
    record = load_record(folder)
    assert (record.run.status, record.run.title, record.run.question) == ("ok", "Title of 02_good", "Does it work, on 02_good?")
    assert record.run.parameters == {"width": 4}
    assert record.run.overrides == ["dynamoe.theta=0.75"]
    assert record.run.command == "dynamoe-lab run 02_good --profile smoke -p width=4 -p dynamoe.theta=0.75"
    assert (folder / "line.csv").read_text() == "x,y\n1,4\n2,0.75\n"
    nb = nbformat.read(folder / "notebook.ipynb", as_version=4)
    assert "papermill" not in nb.metadata
    printed = next(output.text for cell in nb.cells for output in cell.get("outputs", []) if "kernel" in output.get("text", ""))
    assert printed.splitlines()[0].split()[2:] == ["02_good", "."]  # this project is the working directory, its path is not shown
    assert any("image/png" in output.get("data", {}) for cell in nb.cells for output in cell.get("outputs", []))  # inline, despite Agg
    page = (folder / "notebook.html").read_text()
    assert "<script" not in page
    assert "default-src 'none'" in page
    log = (folder / "run.log").read_text()
    for kept in (page, (folder / "notebook.ipynb").read_text(), (folder / "record.json").read_text(), log):
        assert str(project.parent) not in kept
    said = [line.partition("  ")[2] for line in log.splitlines()]
    assert said[0] == record.run.command
    assert printed.splitlines()[0] in said  # what a cell printed
    assert any(line.startswith("02_good  cell 3/4  Draw the figure") for line in said)
    assert said[-1].startswith("02_good  ok  ")
    assert sorted(path.name for path in folder.iterdir()) == [
        "line.csv",
        "line.png",
        "line.svg",
        "notebook.html",
        "notebook.ipynb",
        "record.json",
        "run.log",
    ]

    from dynamoe_lab.workbench import kernel

    monkeypatch.setattr(kernel, "execute", no_kernel)
    assert run_notebooks(["02"], profile="smoke", given=given) == {"02_good": "up to date"}
    assert capsys.readouterr().out == "02_good  up to date\n"
    for change in ({"given": ["width=5"]}, {"given": given, "force": True}):
        with pytest.raises(AssertionError, match="a kernel was started"):
            run_notebooks(["02"], profile="smoke", **change)
        record.write(folder)
    (folder / "line.svg").unlink()
    with pytest.raises(AssertionError, match="a kernel was started"):
        run_notebooks(["02"], profile="smoke", given=given)


def test_failures_are_recorded_and_the_next_notebook_runs(project, capsys):
    write_notebook(project, "01_fails", ["## Divide", "print('so far')\nx = 0\n1 / x", "print('never')"])
    write_notebook(project, "02_input", ["from dynamoe_lab.errors import InputError\nraise InputError('theta is too much: give less')"])
    write_notebook(project, "03_dies", ["## Fill the memory", "import os\nprint('last words', flush=True)\nos._exit(137)"])
    write_notebook(project, "04_plain", ["import sys\nassert sys.executable == " + repr(sys.executable)])
    statuses = run_notebooks(profile="smoke")
    assert statuses == {"01_fails": "failed", "02_input": "bad input", "03_dies": "failed", "04_plain": "ok"}
    told = capsys.readouterr()
    report = project / "reports" / "smoke"
    first = load_record(report / "01_fails").run
    assert (first.status, first.error.type, first.error.message) == ("failed", "ZeroDivisionError", "division by zero")
    assert (first.error.cell, first.error.heading) == (2, "Divide")
    assert "1 / x" in "\n".join(first.error.traceback)
    assert "01_fails  failed in cell 2 (Divide): ZeroDivisionError: division by zero" in told.out
    nb = nbformat.read(report / "01_fails" / "notebook.ipynb", as_version=4)
    assert any("so far" in output.get("text", "") for cell in nb.cells for output in cell.get("outputs", []))
    assert load_record(report / "02_input").run.error.type == "InputError"
    assert "dynamoe-lab: 02_input: theta is too much: give less" in told.err
    third = load_record(report / "03_dies").run
    assert (third.status, third.error.message, third.error.cell) == ("failed", "the kernel died (out of memory?)", 2)
    assert third.error.heading == "Fill the memory"
    assert (report / "03_dies" / "notebook.html").is_file()
    assert not list(report.glob("*/.*"))
    shutil.rmtree(report / "04_plain")
    assert run_notebooks(["04"], profile="smoke") == {"04_plain": "ok"}
    with pytest.raises(InputError, match="theta is too much"):
        run_notebook(prepare(select(["02"]), profile="smoke")[0])


def test_a_run_without_finish_is_no_success(project, capsys):
    write_notebook(project, "02_good", GOOD[:1])
    assert run_notebooks(profile="smoke") == {"02_good": "failed"}
    assert "ended without run.finish()" in capsys.readouterr().out


def test_the_heartbeat_tells_the_last_line_while_a_cell_runs(project, capsys):
    cells = ["## Train the router", "import time\nprint('step 1\\nstep 2', flush=True)\ntime.sleep(2.5)", "## Look", "1 + 1"]
    write_notebook(project, "05_slow", cells)
    run_notebooks(profile="smoke", every=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert "05_slow  starting the kernel  0s" in lines
    assert any(line.startswith("05_slow  cell 2/3  Train the router  ") and line.endswith("s  | step 2") for line in lines)
    assert any(line.startswith("05_slow  cell 3/3  Look") for line in lines)
    assert lines[-1].startswith("05_slow  ok  ")


def test_a_report_is_written_by_one_run_at_a_time_and_an_interrupt_is_told(project):
    (project / "slowly.py").write_text(
        "import time\ndef wait(seconds: int) -> int:\n    print('here', flush=True)\n    time.sleep(seconds)\n"
    )
    start = 'import slowly\nimport dynamoe_lab as lab\nrun = lab.start("06_waits", profile=profile, output=output)'
    write_notebook(project, "06_waits", ["", start, "## Wait", "run.step(slowly.wait, 60)"])
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"}
    script = "from dynamoe_lab.workbench.notebooks import run_notebooks; run_notebooks(profile='smoke', every=0.3)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.endswith("| here\n"):
            break
    with pytest.raises(InputError, match=f"reports/smoke is being written by pid {process.pid}"):
        run_notebooks(profile="smoke")
    folder = project / "reports" / "smoke" / "06_waits"
    record = load_record(folder)
    assert effective_status(record) == "running"
    assert place_text(record.run.at) == " in cell 4 (Wait), step wait", "this is what a kill -9 would leave"
    interrupt(process)
    assert process.returncode != 0
    run = load_record(folder).run
    assert (run.status, run.error.type, run.at) == ("interrupted", "Interrupted", None)
    assert place_text(run.error) == " in cell 4 (Wait), step wait"
    assert (folder / "notebook.ipynb").is_file()


def test_a_sweep_is_read_before_a_kernel_starts_and_its_content_counts(project):
    path = write_notebook(project, "20_ablation", GOOD, parameters='\nsweep: str = "mine.yaml"\n')
    mine = project / "mine.yaml"
    mine.write_text("axes: {dynamoe.theta: [0.8, 0.9]}\n")
    job = lambda *given: prepare([path], profile="smoke", given=given)[0]  # noqa: E731
    before = job()
    assert before.values["sweep"] == "mine.yaml"
    assert job("sweep=importance").values["sweep"] == "importance"
    mine.write_text("axes: {dynamoe.theta: [0.8, 0.95]}\n")
    assert job().key != before.key, "a sweep that was changed is another run"
    (project / "sub").mkdir()
    os.chdir(project / "sub")
    assert job("sweep=../mine.yaml").values["sweep"] == "mine.yaml", "as seen from the kernel's folder"
    for given, says in (
        ("sweep=importence", "did you mean importance"),
        ("sweep=5", "no sweep '5'"),
        ("sweep=gone.csv", "no such file"),
    ):
        with pytest.raises(InputError, match=says):
            job(given)
    os.chdir(project)
    mine.write_text("axes: {dynamoe.thetta: [0.8]}\n")
    with pytest.raises(InputError, match=r"no field 'dynamoe\.thetta'; did you mean dynamoe\.theta"):
        job()
