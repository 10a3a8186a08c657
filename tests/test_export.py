"""Markup made fit to publish: what a style sheet or an element may not do, and what is left as it was."""

import numpy as np
import pandas as pd
import pytest

from dynamoe_lab.analysis.tokens import render_tokens
from dynamoe_lab.workbench.export import clean_fragment, clean_html


@pytest.mark.parametrize(
    "sheet",
    [
        "p{background:url(a.png)}",
        "p{background:URL (a.png)}",
        r"p{background:u\72l(a.png)}",
        r"@\69mport 'a.css'",
        "@import 'a.css'",
        "p{background:image-set('a.png' 1x)}",
        "p{background:-webkit-image-set('a.png' 1x)}",
    ],
)
@pytest.mark.parametrize("clean", [clean_html, clean_fragment])
def test_a_sheet_that_could_load_something_is_gone(clean, sheet):
    assert clean(f"<style>{sheet}</style><style>b{{color:#222}}</style><b>x</b>") == "<style>b{color:#222}</style><b>x</b>"


@pytest.mark.parametrize(
    "declaration",
    [
        "position:fixed",
        "POSITION : sticky",
        "position:/**/fixed",
        "position/* */:fixed",
        "position:var(--p)",
        "position:absolute fixed",
        "position:fixed!important",
    ],
)
def test_a_sheet_does_not_leave_its_place(declaration):
    for sheet in (f".a{{{declaration};color:#222}}", f".a{{color:#222;{declaration}}}"):
        kept = clean_fragment(f"<style>{sheet}</style>")
        assert "color:#222" in kept
        assert "fixed" not in kept
        assert "position" not in kept.lower()


def test_positions_inside_and_other_properties_stay():
    sheet = "<style>.a{position:relative}.b{position: absolute;background-position:0 0}.c{position:static}</style>"
    assert clean_fragment(sheet) == sheet


def test_ids_and_positions_of_elements_are_gone_from_fragments_only():
    """An id would take the links of the report page; in a notebook's page pandas' styles and headings need theirs."""
    markup = '<p id="findings" style="position: absolute; color: red" title="t">x</p>'
    assert clean_fragment(markup) == '<p style="color: red;" title="t">x</p>'
    assert clean_html(markup) == '<p id="findings" style="color: red;" title="t">x</p>'


def test_what_render_tokens_makes_is_left_as_it_is():
    rows = [(p, f"<{p}>", layer, p % 3, (p + layer) % 3, np.nan if p == 0 else 1.0) for p in range(4) for layer in range(3)]
    routing = pd.DataFrame(rows, columns=["position", "token", "layer", "label", "expert", "surprisal"])
    made = render_tokens(routing, fractions=(0.25, 0.5, 1.0), title="A & B")
    kept = clean_fragment(made)

    def plain(text: str) -> str:
        return text.replace("'", '"').replace(";", "").replace(" ", "").replace("&#8203", "\u200b")

    assert plain(kept) == plain(made)
    assert kept[: kept.index("</style>")] == made[: made.index("</style>")]
