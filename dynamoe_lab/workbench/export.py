"""An executed notebook made fit to publish: without paths of the machine, and as one HTML page that asks no other host for anything."""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from dynamoe_lab.workbench.files import without_paths

__all__ = ["clean_fragment", "clean_html", "introduction", "notebook_html", "tidied"]

_TEMPLATES = Path(__file__).parent / "templates"
_SHEET = re.compile(r"<style[^>]*>(.*?)</style\s*>", re.DOTALL | re.IGNORECASE)
_LOADS = re.compile(r"<|\\|@import|url\s*\(|image-set", re.IGNORECASE)  # a backslash can hide the others
_COMMENT = re.compile(r"/\*.*?(\*/|\Z)", re.DOTALL)
# What leaves the place in the page where it stands.
_LEAVES = re.compile(r"(?<![\w-])position\s*:(?!\s*(?:relative|absolute|static)\s*(?:[;}]|\Z))[^;}]*", re.IGNORECASE)


def _words(text: str) -> set[str]:
    return set(text.split())


_TAGS = _words(  # what text, tables and `render_tokens` are made of
    "a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li mark "
    "ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr u ul"
)
_ATTRIBUTES = _words("align alt aria-label class colspan height id open role rowspan scope style tabindex title width")
_CSS = _words(
    "background background-color border border-bottom border-collapse border-color border-left border-radius border-right border-top "
    "bottom color display font font-family font-size font-style font-weight gap height left letter-spacing line-height margin "
    "margin-bottom margin-left margin-right margin-top max-width min-width opacity outline overflow overflow-x padding padding-bottom "
    "padding-left padding-right padding-top right text-align text-decoration top vertical-align white-space width"
)
_WIDGET = "application/vnd.jupyter.widget-view+json"
_LONGEST_TEXT = 20_000  # characters of an output
_LONGEST_MARKUP = 500_000  # characters: `render_tokens` of a long text is one
# What a page without scripts can show, best first.
_SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]


def tidied(nb: Any, root: Path) -> Any:
    """A copy without papermill's bookkeeping (it holds paths and times), with paths in outputs and injected parameters shortened.

    Outputs are capped: of a long text begin and end stay, markup that is longer than a page gives way to its text.
    """
    nb = deepcopy(nb)
    nb.metadata.pop("papermill", None)
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = without_paths(cell.source, root)
        for output in cell.get("outputs", []):
            for name in ("text", "traceback", "evalue"):
                if name in output:
                    output[name] = without_paths(output[name], root)
            if isinstance(output.get("text"), str):
                output["text"] = _capped(output["text"])
            for kind, content in output.get("data", {}).items():
                if not kind.startswith("image/") or kind == "image/svg+xml":
                    output.data[kind] = without_paths(content, root)
            for kind in ("text/html", "text/markdown", "text/latex"):
                if len(output.get("data", {}).get(kind, "")) > _LONGEST_MARKUP:
                    del output.data[kind]
                    output.data.setdefault("text/plain", f"[{kind} of more than {_LONGEST_MARKUP:,} characters left out]")
            if isinstance(plain := output.get("data", {}).get("text/plain"), str):
                output.data["text/plain"] = _capped(plain)
    return nb


def _capped(text: str) -> str:
    """A text as it is, or, if it is long, its begin and its end, cut between lines where there are some, and how much stood between."""
    if len(text) <= _LONGEST_TEXT:
        return text
    head, tail = text[: _LONGEST_TEXT // 2], text[-_LONGEST_TEXT // 2 :]
    head, tail = head[: head.rfind("\n") + 1] or head + "\n", tail[tail.find("\n") + 1 :] or tail
    return f"{head}[... {len(text) - len(head) - len(tail):,} characters left out ...]\n{tail}"


def notebook_html(nb: Any, title: str) -> str:
    """One self-contained page: no script runs, nothing is loaded from elsewhere, markup of markdown and outputs is sanitized."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    config = Config({"NbConvertBase": {"display_data_priority": _SHOWN}})
    exporter = HTMLExporter(
        config=config,
        extra_template_paths=[str(_TEMPLATES)],
        template_file="notebook.html.j2",
        sanitize_html=True,
        exclude_anchor_links=True,
    )
    nb = _without_a_kernel(nb)
    exporter.register_filter("clean_html", clean_html)  # nbconvert's own takes headings and paragraphs for unsafe
    return exporter.from_notebook_node(nb, resources={"metadata": {"name": title}})[0]


def _without_a_kernel(nb: Any) -> Any:
    """A copy for a page: a widget's place says what it was, and a picture is described by the heading that it stands under."""
    nb, heading = deepcopy(nb), ""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#{1,6}\s+(.+?)\s*#*$", cell.source, flags=re.MULTILINE) or [heading])[-1]
        for output in cell.get("outputs", []):
            if _WIDGET in output.get("data", {}):
                output.data = {"text/markdown": "*Live in JupyterLab only.*"}
            elif "data" in output:
                output.metadata["alt"] = f"Figure: {_plain(heading)}" if heading else "Figure"
    return nb


def clean_html(markup: Any) -> str:
    """Markup without scripts, frames, forms, handlers and addresses of images: what is not allowed shows as text.

    Style sheets (pandas and `render_tokens` write them) are kept without comments and fixed positions, unless they could load something;
    the policies of both pages forbid that anyway. Styles of single elements set no position.
    """
    return _cleaned(markup, _allowed)


def clean_fragment(markup: Any) -> str:
    """`clean_html` for a part of the report page, whose links lead to ids: the part has none of its own."""
    return _cleaned(markup, lambda tag, name, value: name != "id" and _allowed(tag, name, value))


def _cleaned(markup: Any, allowed: Callable[[str, str, str], bool]) -> str:
    import bleach
    from bleach.css_sanitizer import CSSSanitizer

    text = markup.decode() if isinstance(markup, bytes) else str(markup)
    sheets = [_LEAVES.sub("", _COMMENT.sub(" ", sheet)) for sheet in _SHEET.findall(text) if not _LOADS.search(sheet)]
    css = CSSSanitizer(allowed_css_properties=_CSS)
    cleaned = bleach.clean(
        _SHEET.sub("", text), tags=_TAGS, attributes=allowed, protocols=["http", "https", "mailto", "data"], css_sanitizer=css
    )
    return "".join(f"<style>{sheet}</style>" for sheet in sheets) + cleaned


def _allowed(tag: str, name: str, value: str) -> bool:
    if name == "src":
        return tag == "img" and value.startswith("data:image/")
    if name == "href":
        return tag == "a" and not re.sub(r"[\x00-\x20]", "", value).lower().startswith("data:")  # browsers skip what is taken out here
    return name in _ATTRIBUTES


def introduction(nb: Any) -> tuple[str, str]:
    """Title and question of a notebook: its first markdown heading and the first paragraph below it, as plain text."""
    title = question = ""
    text = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    for block in re.split(r"\n\s*\n|(?<=\n)(?=#)", text):
        lines = [line.strip() for line in block.strip().splitlines()]
        while lines and lines[0].startswith("#"):
            if title:
                return title, question
            title = _plain(lines.pop(0).lstrip("#"))
        if lines and title:
            return title, _plain(" ".join(lines))
    return title, question


def _plain(markdown: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r"\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", text).split())
