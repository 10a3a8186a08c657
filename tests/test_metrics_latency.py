"""Ratios of measured times against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from dynamoe_lab.analysis import latency_ratios, latency_table
from dynamoe_lab.errors import InputError

PLACE = {"run": "r", "phase": "prefill", "batch": 1, "tokens": 512, "threads": 2, "device": "cpu", "dtype": "float32"}
RATIOS = ["time_ratio", "realised", "speedup", "amdahl", "of_bound"]


def make_latency(rounds: list[tuple], routing="mixed", active=0.5, ideal=0.6, **changes) -> pd.DataFrame:
    """Rounds of (dense seconds, dense MLP seconds, seconds, MLP seconds)."""
    rows = []
    for pair, (whole, whole_mlp, seconds, mlp) in enumerate(rounds):
        times = {"pair": pair, "seconds": whole, "mlp_seconds": whole_mlp}
        rows.append({**PLACE, "routing": "dense", **times, "active_mlp_fraction": 1.0, "ideal_share": 1.0})
        times = {"pair": pair, "seconds": seconds, "mlp_seconds": mlp}
        rows.append({**PLACE, "routing": routing, **times, "active_mlp_fraction": active, "ideal_share": ideal})
    return pd.DataFrame(rows).assign(**changes)


ROUNDS = [(10.0, 5.0, 8.0, 4.0), (20.0, 10.0, 18.0, 10.0), (10.0, 6.0, 9.0, 4.0)]


def row_of(frame: pd.DataFrame, routing: str) -> pd.Series:
    (row,) = (row for _, row in frame.iterrows() if row["routing"] == routing)
    return row


def test_ratios_by_hand():
    ratios = latency_ratios(make_latency(ROUNDS))
    assert list(ratios.columns) == [
        *PLACE,
        *("routing", "active_mlp_fraction", "ideal_share"),
        *(f"{name}{end}" for name in RATIOS for end in ("", "_low", "_high")),
        "n",
    ]
    row = row_of(ratios, "mixed")
    # round by round: 8/10, 18/20, 9/10
    assert [row[name] for name in ("time_ratio", "time_ratio_low", "time_ratio_high")] == pytest.approx([0.9, 0.82, 0.9])
    # 5 * .6 / 4, 10 * .6 / 10, 6 * .6 / 4 = .75, .6, .9; a tenth of the way from .6 to .75, and nine tenths from .75 to .9
    assert [row[name] for name in ("realised", "realised_low", "realised_high")] == pytest.approx([0.75, 0.63, 0.87])
    assert row["speedup"] == pytest.approx(1 / 0.9)
    # 10 / (10 - 5 * .4), 20 / (20 - 10 * .4), 10 / (10 - 6 * .4) = 1.25, 1.25, 1.3158
    assert row["amdahl"] == pytest.approx(1.25)
    assert row["amdahl_high"] == pytest.approx(1.25 + 0.8 * (1 / 0.76 - 1.25))
    # 1.25 / 1.25, 1.1111 / 1.25, 1.1111 / 1.3158 = 1, .8889, .8444: the median of ratios, not the ratio of medians
    assert [row[name] for name in ("of_bound", "of_bound_low")] == pytest.approx([8 / 9, 0.8 * 0.844444 + 0.2 * 0.888889], rel=1e-5)
    assert (row["n"], row["active_mlp_fraction"], row["ideal_share"]) == (3, 0.5, 0.6)


def test_the_dense_rows_are_one():
    row = row_of(latency_ratios(make_latency(ROUNDS)), "dense")
    assert all(row[f"{name}{end}"] == 1 for name in RATIOS for end in ("", "_low", "_high"))


def test_pairing_removes_what_both_share():
    """A machine that is three times slower in one round changes no ratio."""
    slower = [tuple(3 * value for value in ROUNDS[0]), *ROUNDS[1:]]
    pd.testing.assert_frame_equal(latency_ratios(make_latency(slower)), latency_ratios(make_latency(ROUNDS)))


def test_an_ideal_implementation_realises_all():
    """Seconds that are what Amdahl's bound says: all of it is there."""
    ideal = [(whole, mlp, whole - mlp * 0.4, mlp * 0.6) for whole, mlp, *_ in ROUNDS]
    row = row_of(latency_ratios(make_latency(ideal)), "mixed")
    assert row[["realised", "realised_low", "of_bound", "of_bound_high"]].tolist() == pytest.approx([1] * 4)
    assert row["speedup"] == pytest.approx(row["amdahl"])


def test_settings_are_kept_apart():
    narrow = make_latency([(1.0, 0.5, 0.7, 0.3)], active=0.25, ideal=0.3)
    wide = make_latency([(1.0, 0.5, 0.9, 0.4)], active=0.75, ideal=0.8)
    both = pd.concat([narrow, wide[wide["routing"] != "dense"]])
    assert latency_ratios(both).query("routing == 'mixed'")["time_ratio"].tolist() == pytest.approx([0.7, 0.9])
    for change in ({"phase": "decode"}, {"batch": 4}, {"tokens": 64}, {"threads": 1}, {"run": "other"}, {"dtype": "bfloat16"}):
        other = make_latency([(2.0, 1.0, 1.0, 0.5)], **change)
        ratios = latency_ratios(pd.concat([make_latency(ROUNDS), other]))
        assert len(ratios) == 4
        assert ratios.query("routing == 'mixed'")["time_ratio"].tolist() == pytest.approx([0.9, 0.5]), change


def test_sizes_are_kept_apart():
    frame = pd.concat(
        [
            make_latency([(1.0, 0.5, 0.7, 0.3)], hidden_size=64, intermediate_size=256, experts=4),
            make_latency([(9.0, 6.0, 4.5, 1.5)], hidden_size=128, intermediate_size=512, experts=4),
        ]
    )
    ratios = latency_ratios(frame).query("routing == 'mixed'")
    assert ratios[["hidden_size", "time_ratio"]].to_numpy().tolist() == [[64, pytest.approx(0.7)], [128, pytest.approx(0.5)]]
    assert latency_table(frame)["intermediate_size"].tolist() == [256, 256, 512, 512]


def test_read_back_from_csv(tmp_path):
    """An empty run name comes back as NaN, which is no reason to lose rows."""
    frame = make_latency(ROUNDS, run="")
    frame.to_csv(tmp_path / "latency.csv", index=False)
    back = pd.read_csv(tmp_path / "latency.csv")
    names = [f"{name}{end}" for name in RATIOS for end in ("", "_low", "_high")]
    assert np.allclose(latency_ratios(back)[names], latency_ratios(frame)[names])
    assert latency_table(back)["n"].tolist() == [3, 3]


def test_table_by_hand():
    table = latency_table(make_latency(ROUNDS))
    names = ["run", "phase", "batch", "tokens", "threads", "device", "dtype", "routing", "seconds", "active_mlp_fraction", "ideal_seconds"]
    assert list(table.columns) == [*names, "low", "high", "n"]
    dense, mixed = row_of(table, "dense"), row_of(table, "mixed")
    # medians: dense 10 and 6 in its MLPs; a tenth of the way from 10 to 10, nine tenths of the way: 10 + .8 * 10
    assert dense[["seconds", "ideal_seconds", "low", "high", "n"]].tolist() == pytest.approx([10, 10, 10, 18, 3])
    assert mixed[["seconds", "ideal_seconds", "low", "high", "n"]].tolist() == pytest.approx([9, 10 - 6 * 0.4, 8.2, 16.2, 3])
    assert mixed["active_mlp_fraction"] == 0.5


@pytest.mark.parametrize("function", [latency_ratios, latency_table])
def test_bad_frames_are_refused(function):
    frame = make_latency(ROUNDS)
    with pytest.raises(InputError, match=rf"{function.__name__}: the frame lacks the column\(s\) mlp_seconds"):
        function(frame.drop(columns="mlp_seconds"))
    with pytest.raises(InputError, match=f"{function.__name__}: .*run 'r' has no dense row"):
        function(frame[frame["routing"] != "dense"])


def test_rounds_have_one_dense_row_each():
    frame = make_latency(ROUNDS)
    with pytest.raises(InputError, match=r"round 1 of run 'r' has no dense row; pass whole rounds"):
        latency_ratios(frame.drop(index=2))
    with pytest.raises(InputError, match="several dense rows"):
        latency_ratios(pd.concat([frame, frame]))
