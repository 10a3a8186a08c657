"""What is copied out of a report says by which definition of difficulty it was made; the paper's cosine goes without saying."""

import re
from itertools import combinations
from pathlib import Path

import nbformat
import pytest
import test_findings
import test_findings_studies
from matplotlib.axis import Tick
from matplotlib.text import Text
from test_plots import close_figures, frames, routing, title  # noqa: F401

from dynamoe_lab.analysis import findings, plots
from dynamoe_lab.models import LABELS

LONGEST = max(LABELS, key=len)
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
DRAW = {
    "expert_similarity": lambda given, **label: plots.plot_expert_similarity(given["similarity"], theta=0.75, **label),
    "label_share": lambda given, **label: plots.plot_label_share(given["shares"], theta=0.8, **label),
    "difficulty_vs_surprisal": lambda given, **label: plots.plot_difficulty_vs_surprisal(
        given["bins"], correlations=given["correlations"], **label
    ),
    "difficulty_bins_alone": lambda given, **label: plots.plot_difficulty_vs_surprisal(given["bins"], **label),
    "difficulty_by_domain": lambda given, **label: plots.plot_difficulty_by_domain(given["means"], **label),
    "training_curves": lambda given, **label: plots.plot_training_curves(given["steps"], majority=0.61, **label),
}
SAY = {
    "label_share": lambda given, **label: findings.label_share_finding(given["shares"], 0.8, **label),
    "difficulty": lambda given, **label: findings.difficulty_finding(given["correlations"], **label),
    "domains": lambda given, **label: findings.difficulty_domain_finding(given["means"], **label),
    "training": lambda given, **label: findings.training_finding(given["steps"], **label),
}
CALLS = "plot_expert_similarity|plot_label_share|plot_difficulty_\\w+|plot_training_curves|label_share_finding|difficulty_\\w*finding"
CALLS = rf"lab\.(?:{CALLS}|training_finding|active_params_finding|perplexity_finding)\("


def written(figure) -> list[Text]:
    """The texts of a drawn figure but the ticks', some of which matplotlib keeps outside of the axes."""
    figure.canvas.draw()
    ticks = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    return [text for text in figure.findobj(Text) if text not in ticks and text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_names_the_label_and_still_fits(frames, name):  # noqa: F811
    figure = DRAW[name](frames, label=LONGEST)
    texts = written(figure)
    assert LONGEST in title(figure)
    assert any(LONGEST in text.get_text() for text in texts if text.get_text() != figure.get_suptitle()), "the title may be cut off"
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert not [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    assert not [text for text, box in boxes if not figure.bbox.padded(2).contains(box.x0, box.y0)]
    assert not [text for text, box in boxes if not figure.bbox.padded(2).contains(box.x1, box.y1)]


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_of_the_papers_label_is_what_it_was(frames, name):  # noqa: F811
    plain, named = (sorted(text.get_text() for text in written(DRAW[name](frames, **label))) for label in ({}, {"label": "cosine"}))
    assert plain == named
    assert not any(mark in text for mark in ("(cosine)", "labels by", "labels:") for text in plain)


@pytest.mark.parametrize("name", SAY)
def test_a_finding_names_the_label(frames, name):  # noqa: F811
    plain, named = SAY[name](frames), SAY[name](frames, label="l1_share")
    assert named != plain == SAY[name](frames, label="cosine")
    assert re.sub(r" \(l1_share\)|; labels by l1_share", "", named) == plain


def test_where_the_label_stands():
    rows = test_findings_studies.TestDifficulty.correlations(surprisal=0.36)
    assert findings.difficulty_finding(rows, label="l1_share").startswith("At θ = 0.9 (l1_share) a token's difficulty")
    training = findings.training_finding(test_findings.TestTraining.steps([5.0, 4.0]), label="l1_share")
    assert training.endswith("(means of 1 step; labels by l1_share).")


@pytest.mark.parametrize("name", ["01_convert", "02_difficulty", "03_train_router"])
def test_notebooks_pass_the_label_and_name_it_in_captions(name):
    sources = [cell.source for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    lines = [line for source in sources for line in source.splitlines()]
    calls = [line for line in lines if re.search(CALLS, line)]
    assert calls
    assert not [line for line in calls if "label=experiment.dynamoe.label" not in line]
    captions = [line for line in lines if "caption=" in line and not re.search("Logits|importance", line)]
    assert captions
    assert not [line for line in captions if "{experiment.dynamoe.label}" not in line]
