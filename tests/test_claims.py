"""The papers' claims: each verdict falls by its interval, on frames whose answer is known, and what is not there is left out."""

import numpy as np
import pandas as pd
import pytest

from dynamoe_lab.analysis.findings.claims import FAILS, HOLDS, UNDECIDED, by_interval, claims_frame, measured_claims
from dynamoe_lab.analysis.findings.claims import dynamoe as of_dynamoe
from dynamoe_lab.analysis.findings.claims import open_questions as left_open
from dynamoe_lab.analysis.findings.claims import tomoe as of_tomoe
from dynamoe_lab.analysis.findings.claims.claim import extremes, together
from dynamoe_lab.analysis.findings.settings import SETTINGS_HEADER, settings_note, settings_rows, settings_table

NAN = np.nan


def chance_frame(**change) -> pd.DataFrame:
    row = {"layer": "all", "tokens": 4096, "documents": 25, "errors": 900, "accuracy": 0.77, "accuracy_low": 0.76, "accuracy_high": 0.78}
    row |= {"majority": 0.67, "minus_majority": 0.10, "minus_majority_low": 0.09, "minus_majority_high": 0.11}
    row |= {"token_id": 0.71, "minus_token_id": 0.06, "minus_token_id_low": 0.05, "minus_token_id_high": 0.07}
    row |= {"neighbour_share": 0.94, "neighbour_share_low": 0.93, "neighbour_share_high": 0.95, "neighbour_chance": 0.84}
    row |= {"neighbour_minus_chance": 0.10, "neighbour_minus_chance_low": 0.09, "neighbour_minus_chance_high": 0.11}
    return pd.DataFrame([row | {"layer": 0}, row | change])


CONFUSION = pd.DataFrame({"label": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "tokens": [90, 10, 80, 20]})


def shares(values: dict, *, error: float = 0.01, **columns) -> pd.DataFrame:
    """Mean active shares, one a name, and the row of all."""
    rows = [{"layer": name, "active_fraction": value} for name, value in values.items()]
    frame = pd.DataFrame([*rows, {"layer": "all", "active_fraction": np.mean(list(values.values()))}])
    frame = frame.assign(low=frame["active_fraction"] - error, high=frame["active_fraction"] + error)
    return frame.assign(tokens=4096, documents=25, confidence=0.95, **columns)


def usage_frame(share: float, *, weight: float = 0.0, seed: int = 0, gradient: str = "straight_through", layers: int = 3) -> pd.DataFrame:
    """Every layer gives expert 1 this share of its tokens."""
    rows = [{"layer": layer, "expert": expert, "share": [1 - share, share][expert]} for layer in range(layers) for expert in (0, 1)]
    frame = pd.DataFrame(rows).assign(lambda_router=weight, router_gradient=gradient, seed=seed)
    return frame.assign(tokens=(1000 * frame["share"]).round().astype(int))


def pareto_rows(*rows: dict) -> pd.DataFrame:
    """Rows of the table `pareto`, beside the dense model."""
    base = {"method": "router", "theta": NAN, "seed": 0, "train_tokens": 100_000, "active_params": 100e6, "active_mlp_fraction": 0.6}
    base |= {"metric": "perplexity_ratio", "value": 1.5, "low": 1.4, "high": 1.6, "n": 25, "time_ratio": NAN, "time_low": NAN}
    base |= {"time_high": NAN, "tasks": NAN, "chance": NAN, "note": "", "told_apart": False}
    dense = {
        "method": "dense",
        "train_tokens": 0,
        "active_params": 134e6,
        "active_mlp_fraction": 1.0,
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
    }
    return pd.DataFrame([base | row for row in (dense, *rows)])


def accuracy(theta: float, value: float, spread: float, *, active: float = 110e6) -> dict:
    row = {"theta": theta, "value": value, "low": value - spread, "high": value + spread, "metric": "average_accuracy", "n": 1400}
    return row | {"chance": 0.29, "tasks": 7, "active_params": active}


DENSE_ACCURACY = {"method": "dense", "train_tokens": 0, "metric": "average_accuracy", "value": 0.5, "low": 0.5, "high": 0.5, "n": 1400}
DENSE_ACCURACY |= {"active_params": 134e6, "chance": 0.29, "tasks": 7}


class TestRules:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [(0.1, 0.2, HOLDS), (-0.2, -0.1, FAILS), (-0.1, 0.2, UNDECIDED), (0.0, 0.2, UNDECIDED), (NAN, 1, UNDECIDED)],
    )
    def test_an_interval_decides(self, low, high, expected):
        assert by_interval(low, high) == expected
        assert by_interval(-high, -low, above=False) == expected
        assert by_interval(low + 1, high + 1, at=1.0) == expected

    def test_parts_of_a_claim(self):
        assert together(HOLDS, HOLDS) == HOLDS
        assert together(HOLDS, UNDECIDED) == UNDECIDED
        assert together(HOLDS, UNDECIDED, FAILS) == FAILS

    def test_extremes_widen_for_all_pairs(self):
        """Beside the formula written out: two means of standard error 0.1, picked from the 6 pairs of four."""
        rows = pd.DataFrame({"mean": [3.0, 1.0, 2.0, 2.5]}).assign(low=lambda f: f["mean"] - 0.196, high=lambda f: f["mean"] + 0.196)
        least, most, difference, error = extremes(rows, "mean")
        assert (least["mean"], most["mean"], difference) == (1.0, 3.0, 2.0)
        assert error == pytest.approx(2.638257 * np.sqrt(2) * 0.1, rel=1e-4)  # 2.638257: the normal quantile of 1 - 0.025 / 6


class TestDynaMoE:
    @pytest.mark.parametrize(("moved", "expected"), [(8e-5, HOLDS), (0.5, FAILS)])
    def test_function(self, moved, expected):
        frame = pd.DataFrame([{"max_abs": moved, "logit_scale": 7.2, "agreement": 1.0, "tokens": 1024}])
        assert of_dynamoe.function_kept({"01_convert/logit_change": frame}).verdict == expected

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({}, HOLDS),
            ({"minus_token_id_low": -0.01}, UNDECIDED),
            ({"minus_token_id": -0.06, "minus_token_id_low": -0.07, "minus_token_id_high": -0.05}, FAILS),
            ({"token_id": NAN, "minus_token_id_low": NAN}, HOLDS),  # not known: the commonest label alone
        ],
    )
    def test_the_router_is_held_against_the_stronger_of_two(self, change, expected):
        claim = of_dynamoe.router_learns(
            {"04_router_confusion/router_chance": chance_frame(**change), "04_router_confusion/router_confusion": CONFUSION}
        )
        assert claim.verdict == expected
        assert "77.0 % (76.0 to 78.0)" in claim.measured
        assert claim.measured.endswith("of those that need the largest expert 20.0 %")
        assert "67.0 %: +10.0 points (+9.0 to +11.0)" in claim.control

    def test_neighbours_are_beside_chance(self):
        claim = of_dynamoe.neighbours({"04_router_confusion/router_chance": chance_frame()})
        assert (claim.verdict, claim.n) == (HOLDS, "900 errors, 25 documents")
        assert "94.0 %" in claim.measured
        assert "84.0 % by chance" in claim.control
        less = chance_frame(neighbour_minus_chance_low=-0.02, neighbour_minus_chance_high=-0.01)
        assert of_dynamoe.neighbours({"04_router_confusion/router_chance": less}).verdict == FAILS

    @pytest.mark.parametrize(("values", "expected"), [({0: 0.3, 1: 0.8, 2: 0.5}, HOLDS), ({0: 0.495, 1: 0.50, 2: 0.505}, UNDECIDED)])
    def test_usage_by_layer(self, values, expected):
        claim = of_dynamoe.usage_by_layer({"05_expert_usage/active_by_layer": shares(values)})
        assert claim.verdict == expected
        assert "in layer 0" in claim.measured
        assert "layer 0.0" not in claim.measured

    @pytest.mark.parametrize(("values", "expected"), [([0.3, 0.5, 0.8], HOLDS), ([0.5, 0.505, 0.51], UNDECIDED)])
    def test_usage_by_theta(self, values, expected):
        parts = [shares({0: value}, theta=theta, **{"train.seed": 0}) for theta, value in zip((0.7, 0.8, 0.9), values, strict=True)]
        assert of_dynamoe.usage_by_theta({"06_pareto/theta_usage": pd.concat(parts)}).verdict == expected

    @pytest.mark.parametrize(
        ("taken", "expected"), [([1.0, 1.0], HOLDS), ([1.0, 0.9], UNDECIDED), ([0.97, 0.9], UNDECIDED), ([0.94, 0.9], FAILS)]
    )
    def test_collapse_needs_every_layer_of_every_seed(self, taken, expected):
        frames = [usage_frame(share, seed=seed) for seed, share in enumerate(taken)] + [usage_frame(0.5, weight=1.0)]
        training = pd.DataFrame({"tokens": [1024, 20_480]})
        claim = of_dynamoe.collapse(
            {"07_collapse/collapse": pd.concat(frames, ignore_index=True), "07_collapse/collapse_training": training}
        )
        assert claim.verdict == expected
        assert claim.control.startswith("with λ = 1: 0 of 3 layers at 99 %; ")
        assert claim.n == "2 seeds of 20,480 training tokens, 1,000 tokens in each layer"

    @pytest.mark.parametrize(
        ("gains", "expected"),
        [([(0.5, 0.6), (0.7, 0.8)], HOLDS), ([(0.5, 0.6), (0.9, 1.1)], UNDECIDED), ([(0.5, 0.6), (1.1, 1.2)], FAILS)],
    )
    def test_theta_and_perplexity(self, gains, expected):
        steps = pd.DataFrame({"theta": [0.8, 0.9], "lower_theta": [0.7, 0.8], "seed": 0, "n": 25, "tokens": 8160})
        steps = steps.assign(low=[low for low, _ in gains], high=[high for _, high in gains], ratio=[sum(pair) / 2 for pair in gains])
        steps = steps.assign(active_params=[100e6, 110e6], lower_active_params=[90e6, 100e6])
        pareto = pareto_rows({"theta": 0.7, "value": 3.0, "low": 2.5, "high": 3.5, "active_params": 90e6}, {"theta": 0.9})
        claim = left_open.theta_and_perplexity({"06_pareto/theta_steps": steps, "06_pareto/pareto": pareto})
        assert claim.verdict == expected
        assert "3.00 (2.50 to 3.50) at θ = 0.7 (90 M active)" in claim.measured

    @pytest.mark.parametrize(("low", "high", "expected"), [(0.01, 0.03, HOLDS), (-0.01, 0.03, UNDECIDED), (-0.03, -0.01, FAILS)])
    def test_theta_and_accuracy(self, low, high, expected):
        gains = pd.DataFrame(
            {"run": "θ = 0.9 over 0.8", "task": ["sciq", "average"], "difference": 0.01, "low": [1, low], "high": [1, high]}
        )
        pareto = pareto_rows(DENSE_ACCURACY, accuracy(0.8, 0.44, 0.02, active=95e6), accuracy(0.9, 0.46, 0.02))
        claim = of_dynamoe.theta_and_accuracy({"06_pareto/theta_accuracy": gains, "06_pareto/pareto": pareto})
        assert claim.verdict == expected
        assert "44.0 % at θ = 0.8 (95 M active), 46.0 % at θ = 0.9" in claim.measured
        assert "dense 50.0 %, guessing 29.0 %" in claim.control

    @pytest.mark.parametrize(("value", "spread", "expected"), [(0.49, 0.01, HOLDS), (0.48, 0.02, UNDECIDED), (0.40, 0.02, FAILS)])
    def test_the_loss_of_accuracy_is_relative_to_the_base(self, value, spread, expected):
        """Table 1 at θ = 0.9: 70.1 of 74.2 %, -5.5 %; here from 50 %: 47.24 % would be as much."""
        claim = of_dynamoe.accuracy_at(0.9)({"06_pareto/pareto": pareto_rows(DENSE_ACCURACY, accuracy(0.9, value, spread))})
        assert claim.verdict == expected
        assert claim.paper == "-5.5 % with 86 % of the parameters active"
        assert f"{100 * (value / 0.5 - 1):+.1f} %" in claim.measured


class TestOpen:
    @pytest.mark.parametrize(("low", "high", "expected"), [(1.01, 1.07, FAILS), (0.93, 0.98, HOLDS), (0.97, 1.02, UNDECIDED)])
    def test_static(self, low, high, expected):
        row = {"method": "router", "theta": 0.9, "seed": 0, "active_mlp_fraction": 0.67, "static_fraction": 0.73, "n": 25, "tokens": 8160}
        frame = pd.DataFrame(
            [row | {"ratio": (low + high) / 2, "low": low, "high": high}, row | {"method": "tomoe p = 0.7", "low": 2.0, "high": 3.0}]
        )
        claim = left_open.beats_static({"06_pareto/static_comparison": frame})
        assert claim.verdict == expected
        assert "73 % for every token" in claim.control

    @pytest.mark.parametrize(("pair", "expected"), [((0.6, 0.8), HOLDS), ((0.9, 1.1), UNDECIDED), ((1.1, 1.2), FAILS)])
    def test_random_is_paired(self, pair, expected):
        rows = pd.DataFrame(
            {"run": ["trained, router", "trained, random at the router's shares"], "ratio": [1.5, 2.5], "n": 25, "tokens": 8160}
        )
        rows = rows.assign(low=rows["ratio"] - 0.2, high=rows["ratio"] + 0.2, active_mlp_fraction=0.67)
        paired = pd.DataFrame(
            [{"run": "router over trained, random", "ratio": sum(pair) / 2, "low": pair[0], "high": pair[1], "n": 25, "tokens": 8160}]
        )
        claim = left_open.beats_random({"03_train_router/trained_perplexity": rows, "03_train_router/router_over_controls": paired})
        assert claim.verdict == expected
        assert claim.measured == "1.50 (1.30 to 1.70) times the dense perplexity at 67 % of the neurons"
        rows["run"] = rows["run"].str.removeprefix("trained, ")
        assert left_open.beats_random_tomoe({"12_tomoe/tomoe_perplexity": rows, "12_tomoe/tomoe_over_random": paired}).verdict == expected

    @pytest.mark.parametrize(("phase", "expected"), [("prefill", HOLDS), ("decode", UNDECIDED)])
    def test_time_is_of_the_trained_router(self, phase, expected):
        from latency_frames import make_ratios

        ratios = make_ratios()
        router = (ratios["routing"] == "router") & (ratios["phase"] == "decode")
        ratios.loc[router, ["time_ratio", "time_ratio_low", "time_ratio_high"]] = 0.98, 0.95, 1.01
        claim = left_open.less_time(phase)({"09_latency/realised_vs_ideal": ratios})
        assert claim.verdict == expected
        assert "66 % of the neurons" in claim.measured
        bare = ratios[ratios["routing"] != "router"]
        with pytest.raises(KeyError):
            left_open.less_time(phase)({"09_latency/realised_vs_ideal": bare})

    @pytest.mark.parametrize(
        ("active", "value", "expected"),
        [(0.6, 1.1, HOLDS), (0.6, 1.5, UNDECIDED), (0.6, 2.4, UNDECIDED), (0.9, 1.1, UNDECIDED), (0.9, 2.4, FAILS)],
    )
    def test_another_label_must_not_cost_more(self, active, value, expected):
        table = pd.DataFrame({"dynamoe.label": ["cosine", "residual_error"], "mode": "router", "metric": "perplexity_ratio"})
        table = table.assign(value=[1.5, value], n=25, train_tokens=20_480, active_mlp_fraction=[0.66, active])
        table = table.assign(low=table["value"] - 0.1, high=table["value"] + 0.1)
        assert left_open.other_label({"20_ablation/ablation": table}).verdict == expected

    @pytest.mark.parametrize(
        ("low", "high", "active", "expected"),
        [
            (1.4, 1.6, 95e6, FAILS),  # a cheaper router is better
            (1.4, 1.6, 110e6, UNDECIDED),  # it is better, but dearer
            (0.6, 0.8, 110e6, HOLDS),
            (0.6, 0.8, 95e6, UNDECIDED),
            (0.9, 1.1, 100e6, UNDECIDED),
        ],
    )
    def test_head_to_head_at_no_more_compute(self, low, high, active, expected):
        row = {"method": "tomoe p = 0.7", "active_params": 100e6, "router_active_params": active, "theta": 0.8, "seed": 0, "n": 25}
        row |= {
            "tokens": 8160,
            "train_tokens": 204_800,
            "router_train_tokens": 102_400,
            "ratio": (low + high) / 2,
            "low": low,
            "high": high,
        }
        claim = left_open.head_to_head({"06_pareto/tomoe_against_routers": pd.DataFrame([row])})
        assert claim.verdict == expected
        assert f"{active / 1e6:.3g} M" in claim.measured


class TestToMoE:
    def tables(self, **change) -> dict[str, pd.DataFrame]:
        steps = pd.DataFrame({"run": "seed 0", "step": range(20), "tokens": np.arange(1, 21) * 256, "open_ratio": [NAN] * 19 + [0.58]})
        steps = steps.assign(active_ratio_max=change.get("reached", 0.703))
        rows = pd.DataFrame({"run": ["router", "all masks open"], "ratio": [change.get("ratio", 6.8), 1.0], "n": 25, "tokens": 8160})
        params = pd.DataFrame(
            [{"layer": "all", "active_mlp_fraction": 0.6, "router": 2.4e6, "dense_params": 134e6, "p": change.get("p", 0.7)}]
        )
        usage = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "share": [0.5, 0.5, *change.get("second", (0.4, 0.6))]})
        union = pd.DataFrame(
            {"layer": "all", "count": [0, 1, 2], "share": change.get("counts", (0.3, 0.1, 0.6)), "chance": (0.1, 0.4, 0.5)}
        )
        return {
            "12_tomoe/tomoe_training": steps,
            "12_tomoe/tomoe_perplexity": rows.assign(low=rows["ratio"] - 0.1, high=rows["ratio"] + 0.1),
            "12_tomoe/tomoe_params": params,
            "12_tomoe/tomoe_usage": usage.assign(tokens=100),
            "12_tomoe/tomoe_union": union.assign(neurons=46_080),
        }

    @pytest.mark.parametrize(
        ("claim", "change", "expected"),
        [
            (of_tomoe.target_reached, {}, HOLDS),
            (of_tomoe.target_reached, {"reached": 0.75}, FAILS),
            (of_tomoe.perplexity, {}, FAILS),
            (of_tomoe.perplexity, {"ratio": 1.3}, UNDECIDED),
            (of_tomoe.perplexity, {"ratio": 1.1}, HOLDS),
            (of_tomoe.extra_parameters, {}, FAILS),
            (of_tomoe.no_collapse, {}, HOLDS),
            (of_tomoe.no_collapse, {"second": (0.0, 1.0)}, FAILS),
            (of_tomoe.union, {}, FAILS),
            (of_tomoe.union, {"counts": (0.1, 0.1, 0.8)}, HOLDS),
        ],
    )
    def test_verdicts(self, claim, change, expected):
        assert claim(self.tables(**change)).verdict == expected

    def test_the_target_is_that_of_the_notebook(self):
        tables = self.tables(p=0.55)
        assert "p = 0.55" in of_tomoe.target_reached(tables).claim
        with pytest.raises(KeyError, match=r"perplexity at p = 0\.55"):  # the paper has none
            of_tomoe.perplexity(tables)

    @pytest.mark.parametrize(
        ("after", "p", "expected"), [(0.5, 0.002, HOLDS), (0.5, 0.4, UNDECIDED), (0.3, 0.002, UNDECIDED), (0.1, 0.002, FAILS)]
    )
    def test_specialising_is_more_than_before_training(self, after, p, expected):
        rows = pd.DataFrame({"run": ["router", "before training"], "factor": "domain", "layer": "all", "association": [after, 0.28]})
        rows = rows.assign(low=rows["association"] - 0.05, high=rows["association"] + 0.05, control=0.1, p=[p, 0.002], confidence=0.95)
        claim = of_tomoe.specialisation({"12_tomoe/tomoe_specialisation": rows.assign(tokens=900, documents=26)})
        assert claim.verdict == expected
        assert "before training, 0.10 with labels shuffled" in claim.control


class TestAll:
    def test_what_is_not_there_is_left_out(self):
        assert measured_claims({}) == []
        claims = measured_claims({"04_router_confusion/router_chance": chance_frame(), "04_router_confusion/router_confusion": CONFUSION})
        assert {claim.source for claim in claims} == {"04_router_confusion/router_chance", ""}
        assert {claim.verdict for claim in claims if not claim.source} == {UNDECIDED}
        assert [claim.origin for claim in claims] == sorted((claim.origin for claim in claims), key=["DynaMoE", "open", "ToMoE"].index)
        frame = claims_frame(claims)
        assert list(frame) == ["claim", "origin", "paper", "measured", "control", "n", "verdict", "source"]

    @pytest.mark.parametrize("broken", [pd.DataFrame(), pd.DataFrame({"layer": ["all"]}), chance_frame().drop(columns="errors")])
    def test_a_table_that_is_none_is_left_out(self, broken):
        """A report may come from elsewhere."""
        good = pd.DataFrame([{"max_abs": 1e-4, "logit_scale": 7.0, "agreement": 1.0, "tokens": 1024}])
        tables = {
            "04_router_confusion/router_confusion": CONFUSION,
            "04_router_confusion/router_chance": broken,
            "07_collapse/collapse": broken,
            "06_pareto/pareto": broken,
        }
        claims = measured_claims({**tables, "01_convert/logit_change": good})
        kept = {claim.claim for claim in claims if claim.source == "04_router_confusion/router_chance"}
        assert kept == ({"A small router learns which expert a token needs"} if "accuracy" in broken else set())
        assert [claim.verdict for claim in claims if claim.source == "01_convert/logit_change"] == [HOLDS]


class TestSettings:
    def rows(self) -> pd.DataFrame:
        router = {"theta": 0.9, "value": 1.37, "low": 1.28, "high": 1.46, "active_params": 113e6, "active_mlp_fraction": 0.67}
        return pareto_rows(
            router | {"time_ratio": 0.85, "time_low": 0.83, "time_high": 0.88},
            router | {"theta": 0.8, "active_params": 95e6, "value": 2.0},
            {"theta": 0.9, "method": "static", "active_mlp_fraction": 0.73},
            {"theta": 0.9, "method": "random"},
            {"theta": 0.7, "method": "label", "train_tokens": 0},
            {"method": "tomoe p = 0.7", "train_tokens": 204_800},
            DENSE_ACCURACY,
            accuracy(0.9, 0.46, 0.02),
        )

    def test_rows_are_the_trained_models_dearest_first(self):
        table = settings_table(self.rows())
        assert list(table["method"]) == ["dense", "router", "router", "static", "tomoe p = 0.7"]
        assert list(table["theta"])[1:3] == [0.9, 0.8]
        assert table["params_share"].iloc[1] == pytest.approx(113 / 134)
        assert table["accuracy_change"].iloc[1] == pytest.approx(-0.04)
        assert table["accuracy_low"].iloc[1] == pytest.approx(-0.06)
        assert np.isnan(table["accuracy_change"].iloc[2])

    def test_texts(self):
        table = settings_table(self.rows())
        rows = settings_rows(table)
        assert {len(row) for row in rows} == {len(SETTINGS_HEADER)}
        name, *values = rows[1]
        assert name == "router, θ = 0.9"
        assert values[:2] == ["1.37 (1.28 to 1.46)", "-4.0 points (-6.0 to -2.0)"]
        assert values[3:] == ["67 %", "113 M (84 %)", "100,000"]
        assert rows[2][2:4] == ["", ""]  # neither scored nor timed
        assert rows[-1][0] == "ToMoE, p = 0.7"
        assert "25 held-out documents" in settings_note(table)
        assert "1,400 documents" in settings_note(table)
