"""The sentence about benchmarks: every number is the frame's, and nothing is told apart that the exact test does not tell apart."""

import numpy as np
import pandas as pd
import pytest

from dynamoe_lab.analysis.findings import benchmark_finding
from dynamoe_lab.errors import InputError


def make_row(task: str, difference: float, half: float, p: float = np.nan, **changes) -> dict:
    row = {"run": "router", "task": task, "metric": "acc", "value": 0.5 + difference, "reference_value": 0.5, "difference": difference}
    row |= {"low": difference - half, "high": difference + half, "holm_p": p, "detectable": 0.1, "n": 40, "confidence": 0.95}
    return row | {"split": "validation (stock: test)" if task == "sciq" else ""} | changes


def make_deltas(**changes) -> pd.DataFrame:
    rows = [make_row("piqa", -0.125, 0.1, 0.004), make_row("sciq", -0.05, 0.04, 0.3), make_row("arc_easy", 0.1, 0.08, 0.02)]
    rows.append(make_row("winogrande", 0.0, np.nan, 1.0, detectable=0.19))
    return pd.DataFrame([*rows, make_row("average", -0.019, 0.01, n=160), make_row("average4", 0, 0)]).assign(**changes)


def test_the_whole_sentence():
    assert benchmark_finding(make_deltas()) == (
        "Averaged over 4 tasks the accuracy of router is below the dense model's on the same documents: 48.1 % against 50.0 %, -1.9 points "
        "(95 % interval -2.9 to -0.9); single tasks below by McNemar's exact test, adjusted for all tasks: PIQA -12.5 points (-22.5 to "
        "-2.5, p = 0.004); single tasks above by McNemar's exact test, adjusted for all tasks: ARC-easy +10.0 points (+2.0 to +18.0, p = "
        "0.02); not distinguishable: SciQ and WinoGrande, where the samples could show differences of 10.0 to 19.0 points or more "
        "at 5 % over the number of tasks (n = 40 documents a task; SciQ: validation (stock: test))."
    )


def test_another_reference_is_named_wherever_the_dense_model_would_be():
    for deltas in (make_deltas(), make_deltas().query("task == 'piqa'")):
        assert "the dense model's" in (sentence := benchmark_finding(deltas))
        assert benchmark_finding(deltas, reference="the static cut's") == sentence.replace("the dense model's", "the static cut's")


def test_an_interval_without_zero_is_not_enough():
    """SciQ's interval is -9 to -1 points, its adjusted p 0.3."""
    sentence = benchmark_finding(make_deltas().query("task == 'sciq'"))
    assert sentence == (
        "Not distinguishable by McNemar's exact test, adjusted for all tasks: SciQ, where the samples could show differences of 10.0 "
        "points or more at 5 % over the number of tasks (n = 40 documents a task; SciQ: validation (stock: test))."
    )


@pytest.mark.parametrize(
    ("low", "high", "said"), [(-0.03, 0.01, "not distinguishable from"), (0.01, 0.02, "above"), (np.nan, np.nan, "not")]
)
def test_the_average_goes_by_its_interval(low, high, said):
    deltas = make_deltas()
    deltas.loc[deltas["task"] == "average", ["low", "high"]] = low, high
    sentence = benchmark_finding(deltas)
    assert f"the accuracy of router is {said}" in sentence
    assert ("no interval" in sentence) == np.isnan(low)


def test_a_number_per_document_has_no_points_and_no_mcnemar():
    deltas = make_deltas(metric="bits_per_byte", holm_p=np.nan).drop(columns="split")
    sentence = benchmark_finding(deltas)
    assert "points" not in sentence
    assert "McNemar" not in sentence
    assert "bits per byte of the right answer of router is below the dense model's on the same documents: 0.481 against 0.500" in sentence
    assert "single tasks below: PIQA -0.125 (-0.225 to -0.025) and SciQ -0.050 (-0.090 to -0.010)" in sentence


def test_every_run_is_told():
    both = pd.concat([make_deltas(), make_deltas(run="static")])
    assert benchmark_finding(both).count("veraged over 4 tasks the accuracy of") == 2


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match=r"benchmark_finding: the frame lacks the column\(s\) holm_p"):
        benchmark_finding(make_deltas().drop(columns="holm_p"))
