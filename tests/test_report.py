"""The report page: a pure function of records, safe with hostile text, without torch and without other hosts."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.records import (
    Artifact,
    Environment,
    Finding,
    Record,
    Results,
    RunError,
    RunInfo,
    Scalar,
    StepUse,
    StoredFile,
    load_record,
)
from dynamoe_lab.workbench.report import build_report

CHECKOUT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (640).to_bytes(4, "big") + (480).to_bytes(4, "big") + b"\x08\x06\x00\x00\x00"
HOSTILE = "<script>alert(1)</script>\" onload='x' & <b>θ</b>"


def write_run(report: Path, name: str, *, caption: str = "A caption.", status: str = "ok", error: RunError | None = None) -> Record:
    folder = report / name
    folder.mkdir(parents=True)
    contents = {
        "usage.png": PNG,
        "usage.svg": b"<svg/>",
        "usage.csv": b"a,b\n1,2\n",
        "summary.csv": b"name,share_of_all\nx,0.123456789\n<i>,3\n",
    }
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    (folder / "notebook.html").write_text("<p>")
    config = {"model": "smollm2-135m", "dynamoe": {"theta": 0.9, "experts": [0.25, 1.0], "lambda_lm": 1.0, "lambda_router": 1.0}}
    files = [StoredFile.of(folder / f"usage.{kind}") for kind in ("csv", "png", "svg")]
    record = Record(
        RunInfo(
            name,
            title=f"Title {name}",
            question=f"Who? {caption}",
            command=f"dynamoe-lab run {name} --profile quick",
            config={
                **config,
                "data": {"train_tokens": 204_800, "context": 256},
                "train": {"steps": 100, "batch_size": 4, "accumulation": 1},
            },
            status=status,
            error=error,
            finished="2026-11-22T10:00:00+00:00",
            seconds=75.0,
            peak_memory_bytes=3 * 2**30,
        ),
        Results(
            scalars=[Scalar("accuracy", 0.791234, n=491520, low=0.78, high=0.8), Scalar("weights", 134_515_008, unit="parameters")],
            figures=[Artifact("usage", caption, files)],
            tables=[Artifact("summary", caption, [StoredFile.of(folder / "summary.csv")])],
            findings=[Finding(f"It works. {caption}", "usage")],
            steps=[StepUse("train", "a" * 32, True, 486.0, True)],
            notebook=[StoredFile.of(folder / "notebook.html")],
        ),
        Environment(commit="c0ffee" * 4, dirty=True, code="d" * 32, python="3.11.7", packages={"torch": "2.13.0"}, seeds={"train": 0}),
    )
    record.write(folder)
    return record


def rewrite(path: Path, content: bytes) -> None:
    """Another content of a file of a run, also in its record."""
    path.write_bytes(content)
    record = load_record(path.parent)
    for artifact in record.artifacts:
        artifact.files = [StoredFile.of(path) if entry.name == path.name else entry for entry in artifact.files]
    record.write(path.parent)


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "papermill", "matplotlib", "lm_eval"):
            raise ModuleNotFoundError(f"{name} is not installed")
sys.meta_path.insert(0, Refuse())
from dynamoe_lab.workbench.report import build_report
build_report(sys.argv[1])
"""


def report_without_torch(folder: Path) -> None:
    """The report anew, in a process where torch and its like cannot be imported."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(folder)], check=True, env=environment, timeout=240)


class Page(HTMLParser):
    """Tags, ids and links of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.links, self.images, self.text = [], set(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids |= {values["id"]} if "id" in values else set()
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.images += [values] if tag == "img" else []

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(tmp_path):
    folder = tmp_path / "reports" / "quick"
    write_run(folder, "04_router_confusion")
    write_run(folder, "02_difficulty")
    return folder


def test_the_same_records_give_the_same_bytes(report, tmp_path):
    first = build_report(report).read_bytes()
    assert build_report(report).read_bytes() == first
    shutil.copytree(report, tmp_path / "elsewhere")
    assert build_report(tmp_path / "elsewhere").read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_everything_recorded_is_shown_and_every_link_leads_somewhere(report):
    text = build_report(report).read_text()
    page = Page(text)
    for link in page.links:
        target = link.removeprefix("#")
        assert (target in page.ids) if link.startswith("#") else link.startswith("data:") or (report / link).is_file(), link
    assert [image["src"] for image in page.images] == ["02_difficulty/usage.png", "04_router_confusion/usage.png"]
    assert all(image["alt"] == "A caption." and image["width"] == "640" for image in page.images)
    for shown in (
        "0.7912",
        "[0.78, 0.8]",
        "491,520",
        "134,515,008 parameters",
        "75 s",
        "peak 3.0 GB",
        "102,400",
        "share of all",
        "0.12346",
    ):
        assert shown in page.text, shown
    assert "dynamoe-lab run 04_router_confusion --profile quick" in page.text
    assert "c0ffeec0ffee with uncommitted changes" in page.text
    assert "read from the cache stale" in " ".join(page.text.split())
    assert page.text.index("Title 02_difficulty") < page.text.index("Title 04_router_confusion")
    assert "not run" not in page.text


def test_the_page_asks_no_other_host_for_anything(report):
    text = build_report(report).read_text()
    assert not re.search(r"https?://|(src|href)=[\"']//|url\(|@import", text)
    assert "<script" not in text


def test_the_page_forbids_what_it_does_not_need(report):
    """No script, no frame, no form, no other host: images of the folder and the page's own styles."""
    text = build_report(report).read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert policy.group(1).split("; ") == [
        "default-src 'none'",
        "img-src 'self' data:",
        "style-src 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert policy.start() < min(text.index("<style"), text.index("<link"), text.index("<title"))
    assert "figure .text { contain: content;" in text  # what a fragment positions stays in its frame


def test_hostile_text_stays_text(tmp_path):
    report = tmp_path / "quick"
    error = RunError(HOSTILE, HOSTILE, 3, HOSTILE, [HOSTILE])
    write_run(report, "04_a", caption=HOSTILE, status="failed", error=error)
    page = Page(build_report(report).read_text())
    assert {"script", "i"} & set(page.tags) == set()
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert page.images[0]["alt"] == HOSTILE
    assert "onload" not in page.images[0]


def test_failed_interrupted_and_missing_notebooks_are_named(report):
    write_run(report, "05_usage", status="failed", error=RunError("ValueError", "too hot", 5, "Train it", ["line 1", "line 2"]))
    write_run(report, "06_pareto", status="running")
    names = ["02_difficulty", "04_router_confusion", "05_usage", "06_pareto", "07_collapse"]
    page = Page(build_report(report, expected=names).read_text())
    text = " ".join(page.text.split())
    assert "ValueError in cell 5 (Train it): too hot line 1 line 2" in text
    assert "Title 06_pareto interrupted dynamoe-lab run 06_pareto --profile quick" in text
    assert "07_collapse not run dynamoe-lab run 07_collapse --profile quick" in text


def test_notebooks_of_the_project_are_expected(report, tmp_path):
    shutil.copytree(CHECKOUT / "configs", tmp_path / "configs")
    (tmp_path / "notebooks").mkdir()
    for name in ("02_difficulty", "03_train_router", "04_router_confusion"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text("{}")
    text = " ".join(Page(build_report(report).read_text()).text.split())
    assert "03_train_router not run" in text
    assert "02_difficulty not run" not in text


def add_findings(report: Path, name: str, *findings: Finding) -> None:
    record = write_run(report, name)
    record.results.findings = list(findings)
    record.write(report / name)


def test_headlines_open_the_page_in_the_order_a_reader_asks(tmp_path):
    report = tmp_path / "quick"
    for name in (
        "00_explore",
        "01_convert",
        "02_difficulty",
        "03_train",
        "04_confusion",
        "06_pareto",
        "07_collapse",
        "12_tomoe",
        "20_sweep",
    ):
        add_findings(report, name, Finding(f"Also of {name}.", "summary"), Finding(f"Headline of {name}.", "usage", headline=True))
    text = build_report(report).read_text()
    page = Page(text)
    order = re.findall(r"Headline of (\d\d)", text)
    assert order == ["01", "06", "04", "07", "02", "03", "20", "00", "12"]
    assert text.count("Also of 06_pareto.") == 1  # in its section, not among the headlines
    assert text.index("Headline of 12") < text.index('<section id="00_explore">') < text.index("Also of 00_explore.")
    assert 'href="#06_pareto-usage"' in text
    assert "06_pareto-usage" in page.ids
    short = text[text.index("The findings, one by one") : text.index("Notebooks")]
    assert short.index("Headline of 00") < short.index("<summary>1 more</summary>") < short.index("Headline of 12")


def test_without_headlines_the_findings_stand_in_their_sections(report):
    text = build_report(report).read_text()
    assert "No notebook has recorded a headline" in text
    section = text[text.index('<section id="04_router_confusion">') :]
    assert "It works. A caption." in section


def test_many_findings_of_a_notebook_are_folded(tmp_path):
    report = tmp_path / "quick"
    add_findings(report, "04_a", *(Finding(f"Finding {number}.", "usage") for number in range(11)))
    text = build_report(report).read_text()
    assert text.index("Finding 7.") < text.index("<summary>3 more findings</summary>") < text.index("Finding 8.")


def test_wide_figures_get_more_than_the_column(report):
    wide = PNG[:16] + (1800).to_bytes(4, "big") + PNG[20:]
    rewrite(report / "02_difficulty" / "usage.png", wide)
    text = build_report(report).read_text()
    assert '<figure id="02_difficulty-usage" class="wide">' in text
    assert '<figure id="04_router_confusion-usage">' in text
    assert re.search(r'<a href="02_difficulty/usage.svg"><img src="02_difficulty/usage.png"', text)  # a click opens the svg


def test_a_text_is_shown_in_place_unless_it_was_changed(report):
    folder = report / "02_difficulty"
    (folder / "sentence.html").write_text('<span style="background: #9cf;" title="63 %">Paris</span>\n')
    record = write_run(report, "00_explore")
    record.results.fragments = [Artifact("sentence", "A coloured text.", [StoredFile.of(folder / "sentence.html")])]
    shutil.copy(folder / "sentence.html", report / "00_explore" / "sentence.html")
    record.write(report / "00_explore")
    text = build_report(report).read_text()
    assert '<span style="background: #9cf;" title="63 %">Paris</span>' in text
    (report / "00_explore" / "sentence.html").write_text("<script>alert(1)</script>")
    changed = build_report(report).read_text()
    assert "alert(1)" not in changed
    assert "Gone or changed since the run: sentence.html." in changed


def test_files_that_are_gone_are_told(report):
    (report / "02_difficulty" / "usage.png").unlink()
    (report / "02_difficulty" / "summary.csv").unlink()
    page = Page(build_report(report).read_text())
    assert len(page.images) == 1
    assert "Gone or changed since the run: usage.png." in page.text
    assert "Gone or changed since the run: summary.csv." in page.text


def test_only_the_executed_notebook_of_this_run_is_linked(report):
    """What a runner left is not that of a later run in JupyterLab, which keeps none; nor is one that was changed since."""
    pages = lambda: [link for link in Page(build_report(report).read_text()).links if link.endswith("notebook.html")]  # noqa: E731
    assert pages() == ["02_difficulty/notebook.html", "04_router_confusion/notebook.html"]
    record = load_record(report / "02_difficulty")
    record.results.notebook = []
    record.write(report / "02_difficulty")
    assert pages() == ["04_router_confusion/notebook.html"]
    (report / "04_router_confusion" / "notebook.html").write_text("<p>another")
    assert pages() == []


def test_long_tables_are_cut(report):
    rows = "".join(f"{i},{i / 7}\n" for i in range(100))
    rewrite(report / "02_difficulty" / "summary.csv", f"a,b\n{rows}".encode())
    assert "60 more rows in the csv" in Page(build_report(report).read_text()).text


def test_a_random_model_is_told(report):
    record = write_run(report, "08_smoke")
    record.run.config["model"] = "smollm2-pico"
    record.write(report / "08_smoke")
    assert "random and small" in build_report(report).read_text()


def test_a_folder_without_records_is_bad_input(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no records in this folder"):
            build_report(folder)
    write_run(tmp_path, "04_a")
    (tmp_path / "04_a" / "record.json").write_text("{")
    with pytest.raises(InputError, match=r"04_a.record\.json"):
        build_report(tmp_path)


def test_it_works_without_torch(report):
    expected = build_report(report).read_bytes()
    (report / "index.html").unlink()
    report_without_torch(report)
    assert (report / "index.html").read_bytes() == expected
