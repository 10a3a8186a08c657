"""Sentences about time: every number is the frame's, and a time is less than the dense model's only where its quantiles say so."""

import numpy as np
import pandas as pd
import pytest
from latency_frames import make_growth, make_parts, make_ratios, make_row

from dynamoe_lab.analysis.findings import cost_growth_finding, latency_finding, time_parts_finding
from dynamoe_lab.analysis.metrics.timing import growth_studies, row_near, setting_name, told_setting
from dynamoe_lab.errors import InputError


def row(ratios: pd.DataFrame, phase: str, batch: int, routing: str, share: float) -> pd.Series:
    found = ratios.query("phase == @phase and batch == @batch and routing == @routing and active_mlp_fraction == @share")
    assert len(found) == 1
    return found.iloc[0]


class TestLatency:
    def test_half_of_the_mlp_and_the_router_are_told(self):
        # 4 x 256 tokens: 1 - 0.6 + 0.6 * 0.56 / 0.83 = 0.805; Amdahl: 0.4 + 0.6 * 0.56 = 0.736; router 0.4 + 0.6 * 0.72 / 0.85 = 0.908
        assert latency_finding(make_ratios()) == (
            "With 50 % of the MLP active a prefill of 4 × 256 tokens takes 80 % (79 % to 83 %) of the dense model's time (Amdahl's bound "
            "74 %): of the ideal speed the MLPs reach 83 % with experts mixed and 92 % with one expert for all tokens; the trained router, "
            "with 66 % active, takes 91 % (89 % to 94 %) of the dense model's time (Amdahl's bound 83 %), its MLPs reach 85 % (medians, "
            "10 to 90 % quantiles, n = 5 rounds beside the dense model)."
        )

    def test_decoding_is_told_of_the_smallest_batch(self):
        sentence = latency_finding(make_ratios(), phase="decode")
        assert sentence.startswith("With 50 % of the MLP active a decode step at batch 1, 256 tokens cached takes ")
        time = row(make_ratios(), "decode", 1, "mixed", 0.5)["time_ratio"]
        assert f"takes {100 * time:.0f} % (" in sentence

    def test_less_and_more_follow_the_quantiles(self):
        rows = [make_row("prefill", 1, 512, "mixed", 0.5, efficiency=efficiency) for efficiency in (0.95, 0.56, 0.4)]
        assert [value["time_ratio"] for value in rows] == pytest.approx([0.7537, 1.0, 1.24], abs=1e-4)
        less, same, more = (latency_finding(pd.DataFrame([value])) for value in rows)
        assert "75 % (74 % to 78 %) of the dense model's time" in less
        assert "100 % (98 % to 103 %), not distinguishably less, of the dense model's time" in same
        assert "124 % (122 % to 128 %), more, of the dense model's time" in more

    def test_without_a_router_or_without_mixed_experts(self):
        ratios = make_ratios()
        assert "trained router" not in latency_finding(ratios[ratios["routing"] != "router"])
        alone = latency_finding(ratios[~ratios["routing"].isin(["mixed", "router"])])
        assert "reach 92 % with one expert for all tokens (" in alone
        assert latency_finding(ratios[ratios["routing"] == "router"]).startswith(
            "A prefill of 4 × 256 tokens under the trained router, with 66 % active, takes 91 %"
        )
        fixed = pd.DataFrame([make_row("prefill", 1, 512, "expert 1", 0.5)])
        assert latency_finding(fixed).startswith("Under routing 'expert 1' (50 % active) a prefill of 1 × 512 tokens takes")

    def test_what_was_not_measured_is_refused(self):
        ratios = make_ratios()
        with pytest.raises(InputError, match="no rows of a converted model in phase 'decode'"):
            latency_finding(ratios[ratios["phase"] == "prefill"], phase="decode")
        with pytest.raises(InputError, match="no rows of a converted model in phase 'prefill'"):
            latency_finding(ratios[ratios["routing"] == "dense"])


class TestParts:
    def test_the_first_run_beside_the_last(self):
        # 50 %: 0.3 + 0.04 + 0.05 + 0.25 + 0.05 + 0.1 = 0.79 s, of which MLPs 0.3 / 0.79 = 38 %
        assert time_parts_finding(make_parts()) == (
            "A prefill of 1 × 512 tokens takes: dense 1.00 s, of which 60 % MLPs, 25 % attention, 10 % other and 5 % head; 50 % 0.79 s, of "
            "which 38 % MLPs, 32 % attention, 13 % other, 6 % sorting, 6 % head and 5 % router. A decode step at batch 1, 256 tokens "
            "cached takes: dense 30 ms, of which 60 % MLPs, 25 % attention, 10 % other and 5 % head; 50 % 23.7 ms, of which 38 % MLPs, "
            "32 % attention, 13 % other, 6 % sorting, 6 % head and 5 % router."
        )


class TestGrowth:
    def test_what_falls_rises_or_stays(self):
        # realised 0.95 - 0.01 E - 8 / D (decode: 0.2 less), quantiles 2 % below and 3 % above
        sentence = cost_growth_finding(make_growth())
        assert "from 2 to 16 experts prefill 87 % to 73 % (falls), decode 67 % to 53 % (falls);" in sentence
        assert "from 64 × 256 to 1024 × 4096 hidden × MLP size prefill 78 % to 90 % (rises), decode 58 % to 70 % (rises);" in sentence
        assert "from 64 to 1024 tokens prefill 85 % to 85 % (not distinguishable)" in sentence
        assert "with about 62 % active" in sentence
        assert sentence.endswith("(medians of n = 5 rounds; falls and rises where the 10 to 90 % quantiles lie apart).")

    def test_nothing_that_grows_is_refused(self):
        growth = make_growth()
        with pytest.raises(InputError, match="nothing grows"):
            cost_growth_finding(growth.query("experts == 4 and hidden_size == 128 and tokens == 256 and batch == 1"))

    def test_studies_hold_the_rest_still(self):
        studies = growth_studies(make_growth().sample(frac=1, random_state=0))  # in any order
        assert {name: list(dict.fromkeys(part.sort_values("place")["mark"])) for name, part in studies.items()} == {
            "experts": ["2", "4", "8", "16"],
            "size": ["64 × 256", "128 × 512", "256 × 1024", "1024 × 4096"],
            "tokens": ["64", "256", "1024"],
            "batch": ["1", "4", "16"],
        }
        for axis, part in studies.items():
            usual = {"experts": 4, "size": "128 × 512", "tokens": 256, "batch": 1}
            assert all((part[name] == value).all() for name, value in usual.items() if name != axis)
            assert len(part) == 2 * part["place"].nunique()  # both phases
            assert "dense" not in set(part["routing"])


class TestWhatIsTold:
    def test_the_largest_prefill_and_the_smallest_batch(self):
        ratios = make_ratios()
        assert told_setting(ratios, "prefill")[["batch", "tokens"]].drop_duplicates().to_numpy().tolist() == [[4, 256]]
        assert told_setting(ratios, "decode")[["batch", "tokens"]].drop_duplicates().to_numpy().tolist() == [[1, 256]]
        assert told_setting(ratios[ratios["phase"] == "prefill"], "decode").empty

    def test_the_nearest_row_of_the_first_routing_there_is(self):
        rows = told_setting(make_ratios(), "prefill")
        assert row_near(rows, ("mixed", "one expert"), 0.3)[["routing", "active_mlp_fraction"]].tolist() == ["mixed", 0.5]
        assert row_near(rows, ("nobody", "one expert"), 0.3)[["routing", "active_mlp_fraction"]].tolist() == ["one expert", 0.25]
        assert row_near(rows, ("nobody",)) is None

    def test_names(self):
        assert setting_name("prefill", 4, 256) == "4 × 256 tokens"
        assert setting_name("decode", 1, 256) == "batch 1, 256 tokens cached"


@pytest.mark.parametrize(
    ("finding", "column"), [(latency_finding, "time_ratio"), (time_parts_finding, "seconds"), (cost_growth_finding, "realised")]
)
def test_a_missing_column_and_the_finding_are_named(finding, column):
    with pytest.raises(InputError, match=rf"^\w+_finding: the frame lacks the column\(s\) .*{column}"):
        finding(pd.DataFrame({"run": ["a"], "phase": ["prefill"], "n": [np.nan]}))
