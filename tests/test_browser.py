"""In a real browser: Run All in JupyterLab, the report page at two widths, and hostile text that must stay text. `make test-browser`

`REPORT=reports/quick make test-browser` looks at a report of yours instead of the committed one.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import ROOT, Watch, find_browser, jupyter_lab, set_parameters

pytestmark = [pytest.mark.browser, pytest.mark.assets]

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
NOTEBOOKS = ("00_explore", "01_convert", "04_router_confusion", "05_expert_usage")
LOOKED_AT = """async () => {
  document.querySelectorAll("details").forEach(part => part.open = true);
  const images = [...document.images];
  images.forEach(image => image.loading = "eager");
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  const names = parts => parts.map(part => part.outerHTML.slice(0, 200));
  return {
    title: document.title,
    language: document.documentElement.lang,
    overflow: document.scrollingElement.scrollWidth - innerWidth,
    images: images.length,
    broken: names(images.filter(image => !image.naturalWidth)),
    undescribed: names(images.filter(image => !image.alt.trim() || image.alt.startsWith("No description"))),
    headless: names([...document.querySelectorAll("table")].filter(table => !table.querySelector("th"))),
    nowhere: names([...document.querySelectorAll("a[href^='#']")].filter(link => !document.getElementById(link.hash.slice(1)))),
    files: [...document.querySelectorAll("a[href]")].map(link => link.href).filter(href => href.startsWith("file:") && !href.includes("#")),
  };
}"""


@pytest.fixture(scope="module")
def chromium():
    path = find_browser()
    driver = pytest.importorskip("playwright.sync_api", reason="no browser driver: pip install playwright")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(chromium):
    with contextlib.closing(chromium.new_context(viewport={"width": 1280, "height": 900})) as context:
        yield context


def new_project(folder: Path) -> Path:
    """A checkout's notebooks and configs, to be changed by a test."""
    for part in ("notebooks", "configs"):
        shutil.copytree(ROOT / part, folder / part)
    return folder


def run(home: Path, report: Path, *given: str) -> None:
    command = [sys.executable, "-m", "dynamoe_lab", "run", *given, "--profile", "smoke", "--output", str(report)]
    environment = {**os.environ, "DYNAMOE_LAB_HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def report(home, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "smoke"
    run(home, folder, *NOTEBOOKS)
    return folder


def images(cells: list[dict]) -> int:
    """Figures that the outputs of code cells hold."""
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


# --- JupyterLab ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(context, home, tmp_path):
    project = new_project(tmp_path / "project")
    for path in (project / "notebooks").glob("*.ipynb"):
        set_parameters(path, {"profile": "smoke"})
    with jupyter_lab(context, project, home) as lab:
        yield lab


def test_run_all_in_jupyterlab(lab):
    """Notebooks 00 and 04, opened and run by the menu: every cell to its end, figures and coloured tokens on the screen, the box alive."""
    page = lab.page
    for name, figures in (("00_explore", 0), ("04_router_confusion", 3)):
        lab.open(name)
        cells = lab.run_all()
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "one run, from top to bottom"
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
        assert images(cells) == figures
        shown = page.locator(".jp-OutputArea-output img")
        assert shown.count() == figures
        assert all(shown.nth(place).evaluate("image => image.naturalWidth > 300") for place in range(figures))
        record = json.loads((lab.project / "reports" / "smoke" / name / "record.json").read_text())
        assert record["run"]["status"] == "ok"
        if name == "00_explore":
            assert page.locator(".jp-RenderedHTML .dml-tok").count() >= 3 * 10, "three texts of coloured tokens"
            use_the_box(page, "Snow is white.", "Snow")
    assert not lab.watch.errors
    assert not lab.watch.failed
    lab.watch.nothing_fired()


def use_the_box(page, text: str, piece: str) -> None:
    """Write a sentence into the box of notebook 00, colour it, continue it."""
    box, shown = page.locator(".jupyter-widgets textarea"), page.locator(".jupyter-widgets .dml-text")
    box.fill(text)
    page.get_by_role("button", name="Colour").click()
    shown.filter(has_text=piece).wait_for()
    tokens = shown.locator(".dml-tok")
    before = tokens.count()
    tokens.first.focus()
    assert tokens.first.locator(".dml-tip").is_visible(), "a token that has the focus tells its layers"
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function(f"document.querySelectorAll('.jupyter-widgets .dml-tok').length > {before}")
    assert box.input_value().startswith(text)


# --- the report ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_loads_alone_and_fits(context, report, width):
    """index.html and every notebook's page: no error, nothing asked of anybody, everything there, described and inside the screen."""
    look_at(context, report, *WIDTHS[width])


@pytest.mark.parametrize("width", WIDTHS)
def test_the_reference_or_a_report_of_yours_loads_alone_and_fits(context, width):
    look_at(context, Path(ROOT, os.environ.get("REPORT", "reports/small")), *WIDTHS[width])


def look_at(context, report: Path, width: int, height: int) -> None:
    pages = [report / "index.html", *sorted(report.glob("*/notebook.html"))]
    assert len(pages) > 1
    for path in pages:
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": height})
        watch = Watch(page, (report.as_uri(),))
        page.goto(path.as_uri())
        found = page.evaluate(LOOKED_AT)
        where = f"{path.relative_to(report)} at {width}: {found}"
        assert not watch.errors, f"{where}: {watch.errors}"
        assert not watch.failed, f"{where}: {watch.failed}"
        watch.nothing_fired()
        assert found["title"], where
        assert found["language"] == "en", where
        assert found["overflow"] <= 0, where
        assert not [found[kind] for kind in ("broken", "undescribed", "headless", "nowhere") if found[kind]], where
        assert all(Path(unquote(urlsplit(address).path)).is_file() for address in found["files"]), where
        if path.name == "notebook.html":
            notebook = json.loads(path.with_suffix(".ipynb").read_text())
            assert found["images"] == images([cell for cell in notebook["cells"] if cell["cell_type"] == "code"]), where
            record = json.loads((path.parent / "record.json").read_text())
            assert found["images"] >= len(record["results"]["figures"]), "every figure is shown in its notebook, too"
        else:
            assert found["images"] == len(list(report.glob("*/*.png"))), where
        page.close()


def test_the_report_works_from_the_keyboard_and_on_a_phone(context, report):
    """Folded parts open by Enter; a token with the focus tells its layers; a figure keeps a readable size in a box that scrolls."""
    page = context.new_page()
    page.goto((report / "index.html").as_uri())
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert summary.evaluate("summary => summary.parentElement.open")
    token = page.locator(".dml-tok").first
    token.focus()
    assert token.locator(".dml-tip").is_visible()
    page.set_viewport_size({"width": 390, "height": 844})
    figure = page.locator("#router_confusion, [id$='-router_confusion_by_layer']").first
    figure.scroll_into_view_if_needed()
    image, box = figure.locator("img").bounding_box(), figure.locator("a").first.bounding_box()
    assert image["width"] >= 500
    assert box["x"] + box["width"] <= 390
    assert figure.locator("a").first.evaluate("box => (box.scrollLeft = 100, box.scrollLeft)") == 100
    figure.locator("a").first.click()
    page.wait_for_url("**/*.svg")


# --- hostile text -------------------------------------------------------------------------------------------------------------------

IMAGE, SVG = "<img src=x onerror=window['fired']=1>", '"><svg onload=window["fired"]=1>'
HOSTILE = (
    f"<script>window.fired=1</script> {IMAGE} {SVG} </script><script>window.fired=1</script> </textarea>{IMAGE} </style>{IMAGE} --> ]]> "
    "<a href='javascript:window.fired=1'>a</a> [b](javascript:window.fired=1) ![c](http://example.org/c.png) [d](http://example.org/d) "
    "<iframe srcdoc='<script>parent.fired=1</script>'></iframe> <style>@import url(http://example.org/e.css)</style> {{ 7 * 7 }} $\\frac$"
)


@pytest.fixture(scope="module")
def hostile(home, tmp_path_factory) -> tuple[list[str], Path]:
    """A model, texts and their names, all hostile. -> overrides, the folder that holds them"""
    from dynamoe_lab.loading import load_model

    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNAMOE_LAB_HOME", str(home))
        model, tokenizer = load_model("smollm2-pico")
    tokenizer.add_tokens([IMAGE, SVG])  # a single token that holds it all
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder / IMAGE)
    tokenizer.save_pretrained(folder / IMAGE)
    texts = [folder / f"a {SVG}", folder / f"b {IMAGE} $\\frac$"]
    for text in texts:
        text.mkdir()
        lines = [json.dumps({"text": f"Page {number} of {text.name}. " + f"It says: {HOSTILE}\n" * 4}) for number in range(160)]
        (text / "pages.jsonl").write_text("\n".join(lines))
    both = "+".join(map(str, texts))
    return [f"model={folder / IMAGE}", *(f"data.{split}={both}" for split in ("train", "calibration", "heldout", "domains"))], folder


def test_hostile_text_stays_text_in_the_report(context, home, hostile):
    """Texts, their names, tokens, the model's name and the report's: nothing of it fires on any page or in any figure."""
    overrides, folder = hostile
    report = folder / f"report {IMAGE}"
    given = [word for pair in overrides for word in ("-p", pair)]
    run(home, report, "05_expert_usage", *given)
    run(home, report, "02_difficulty", *given, "-p", "frequency_tokens=20000")
    run(home, report, "00_explore", *given, "-p", f"text={json.dumps(HOSTILE)}")
    look_at(context, report, *WIDTHS["desktop"])
    for figure in sorted(report.glob("*/*.svg")):
        page = context.new_page()
        watch = Watch(page, (report.as_uri(),))
        page.goto(figure.as_uri())
        assert not watch.errors
        watch.nothing_fired()
        page.close()
    page = context.new_page()
    page.goto((report / "index.html").as_uri())
    assert page.locator(".dml-tok", has_text=IMAGE).count(), "the token is there, as text"


def test_hostile_text_stays_text_in_jupyterlab(context, home, hostile, tmp_path):
    overrides, _ = hostile
    project = new_project(tmp_path / "project")
    changes = {"profile": "smoke", "overrides": overrides}
    set_parameters(project / "notebooks" / "00_explore.ipynb", {**changes, "text": HOSTILE})
    set_parameters(project / "notebooks" / "05_expert_usage.ipynb", changes)
    with jupyter_lab(context, project, home) as lab:
        lab.open("05_expert_usage")
        assert images(lab.run_all()) == 2
        lab.watch.nothing_fired()
        lab.open("00_explore")
        lab.run_all()
        lab.watch.nothing_fired()
        assert lab.page.locator(".dml-tok", has_text=IMAGE).count(), "the token is there, as text"
        use_the_box(lab.page, HOSTILE, IMAGE)
        lab.page.wait_for_timeout(1_000)  # what fires late
        lab.watch.nothing_fired()
        assert not lab.watch.failed
