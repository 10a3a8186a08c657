"""Association against scipy and closed forms; its control against clusters that labels know nothing of."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tomoe_frames import KINDS, make_classes, make_trace

from dynamoe_lab.analysis.metrics import expert_choice, specialisation
from dynamoe_lab.analysis.metrics.specialisation import cramers_v
from dynamoe_lab.errors import InputError


def measure(trace: pd.DataFrame, **settings) -> pd.DataFrame:
    return specialisation(trace, make_classes(), experts=4, **{"permutations": 100, "resamples": 50, **settings})


class TestCramersV:
    def test_agrees_with_the_formula_on_scipys_chi_squared(self):
        rng = np.random.default_rng(0)
        tables = rng.integers(1, 60, (5, 3, 4))
        for table, value in zip(tables, cramers_v(tables), strict=True):
            n = table.sum()
            corrected = max(0.0, stats.chi2_contingency(table, correction=False).statistic / n - (3 - 1) * (4 - 1) / (n - 1))
            rows, columns = (k - (k - 1) ** 2 / (n - 1) for k in table.shape)
            assert value == pytest.approx(np.sqrt(corrected / (min(rows, columns) - 1)))
            assert value < stats.contingency.association(table, method="cramer")  # the plain V is biased upwards

    def test_ends_of_the_scale(self):
        assert cramers_v(np.diag([50, 60, 70])) == pytest.approx(1, abs=1e-12)
        assert cramers_v(np.outer([1, 2, 3], [10, 20, 30, 40])) == 0
        assert cramers_v(np.array([[10, 0], [20, 0]])) == 0  # one expert takes all
        assert cramers_v(np.array([[10, 5], [0, 0]])) == 0  # one level has all

    def test_empty_rows_and_columns_take_no_part(self):
        table = np.array([[30, 5], [4, 40]])
        padded = np.zeros((4, 3))
        padded[np.ix_([0, 2], [0, 2])] = table
        assert cramers_v(padded) == pytest.approx(cramers_v(table))

    def test_independent_draws_give_about_nothing(self):
        rng = np.random.default_rng(1)
        tables = rng.multinomial(2000, np.full(28, 1 / 28), size=300).reshape(300, 7, 4)
        assert np.mean(cramers_v(tables) ** 2) < 0.001


class TestSpecialisation:
    def test_value_is_that_of_the_table(self):
        trace = make_trace(domain=0.8)
        found = measure(trace).set_index(["factor", "layer"])
        later = trace[trace["position"] > 0]
        for layer in range(3):
            rows = later[later["layer"] == layer]
            assert found.loc[("domain", layer), "association"] == pytest.approx(
                float(cramers_v(pd.crosstab(rows["domain"], rows["expert"])))
            )
            kinds = np.array(KINDS)[rows["token_id"] % 4]
            assert found.loc[("token class", layer), "association"] == pytest.approx(float(cramers_v(pd.crosstab(kinds, rows["expert"]))))
        for factor, clusters in (("domain", 24), ("token class", 40)):
            rows = found.loc[factor]
            assert rows.loc["all", "association"] == pytest.approx(rows.loc[[0, 1, 2], "association"].mean())
            assert (rows["clusters"] == clusters).all()
            assert (rows["tokens"] == len(later) // 3).all()
            assert ((rows["low"] <= rows["association"]) & (rows["association"] <= rows["high"])).all()

    def test_what_is_there_is_above_the_control_and_nothing_else(self):
        found = measure(make_trace(domain=1.0))
        whole = found[found["layer"] == "all"].set_index("factor")
        assert whole.loc["domain", "association"] > whole.loc["domain", "control_high"]
        assert whole.loc["domain", "p"] == pytest.approx(1 / 101)
        assert whole.loc["token class", "p"] > 0.02
        found = measure(make_trace(kind=1.0)).query("layer == 'all'").set_index("factor")
        assert found.loc["token class", "p"] == pytest.approx(1 / 101)
        assert found.loc["domain", "p"] > 0.02

    @pytest.mark.parametrize(("cluster", "factor"), [("document", "domain"), ("token", "token class")])
    def test_clusters_alone_are_no_specialisation(self, cluster, factor):
        """Documents (or token ids) with tastes of their own and labels laid over them at random: tokens shuffled one by one would call
        that specialisation every time; the control does not."""
        naive, told = 0, 0
        for seed in range(12):
            trace = make_trace(**{cluster: 1.0}, seed=seed)
            whole = measure(trace, resamples=2, seed=seed).query("factor == @factor and layer == 'all'").iloc[0]
            told += whole["p"] <= 0.05
            rng = np.random.default_rng(seed)
            later = trace[(trace["position"] > 0) & (trace["layer"] == 0)]
            labels = later["domain"].to_numpy() if factor == "domain" else np.array(KINDS)[later["token_id"] % 4]
            shuffled = [float(cramers_v(pd.crosstab(rng.permutation(labels), later["expert"]))) for _ in range(20)]
            naive += float(cramers_v(pd.crosstab(labels, later["expert"]))) > max(shuffled)
        assert naive >= 10
        assert told <= 3

    def test_position_0_and_rare_levels_are_left_out(self):
        trace = make_trace()
        odd = trace.assign(expert=np.where(trace["position"] == 0, 3, trace["expert"]))
        pd.testing.assert_frame_equal(measure(trace), measure(odd))
        classes = make_classes()
        classes.loc[0, "token_class"] = "rare"
        levels = specialisation(trace, classes, experts=4, permutations=2, resamples=2, least=200).set_index("factor")["levels"]
        assert levels["token class"].unique().tolist() == [4]

    def test_separators_are_no_text(self):
        trace, classes = make_trace(), make_classes()
        classes.loc[0, "token_class"] = "special"
        without = trace[trace["token_id"] != 0]
        settings = {"experts": 4, "permutations": 10, "resamples": 10}
        pd.testing.assert_frame_equal(specialisation(trace, classes, **settings), specialisation(without, classes, **settings))
        kept = specialisation(trace, classes, **settings, without=()).set_index("factor")["levels"]
        assert kept["token class"].unique().tolist() == [5]

    def test_documents_are_numbered_anew_in_each_domain(self):
        trace = make_trace()
        again = trace.assign(document=trace["document"] // 3)  # 0 to 7 in each of three domains
        pd.testing.assert_frame_equal(
            measure(trace)[["factor", "association", "documents"]], measure(again)[["factor", "association", "documents"]]
        )

    def test_one_domain_leaves_the_classes(self):
        found = measure(make_trace().query("domain == 'c4'"))
        assert set(found["factor"]) == {"token class"}

    def test_two_documents_have_no_interval(self):
        found = measure(make_trace(documents=2))
        assert found[["low", "high"]].isna().all(axis=None)
        assert found["association"].notna().all()

    def test_bad_frames(self):
        trace = make_trace()
        with pytest.raises(InputError, match="classes has no class for token id"):
            specialisation(trace, make_classes(20), experts=4)
        with pytest.raises(InputError, match="expert 3, counted from 0, but experts = 3"):
            specialisation(trace, make_classes(), experts=3)
        with pytest.raises(InputError, match="permutations = 1"):
            measure(trace, permutations=1)
        with pytest.raises(InputError, match="fewer than two domains and classes with 9999 tokens"):
            measure(trace, least=9999)
        with pytest.raises(InputError, match="2 runs"):
            measure(pd.concat([trace, trace.assign(run="b")]))


def test_expert_choice_counts():
    trace = make_trace(kind=1.0)
    choices = expert_choice(trace, make_classes(), experts=5)
    later = trace[trace["position"] > 0]
    for factor, labels in (
        ("domain", later["domain"]),
        ("token class", pd.Series(np.array(KINDS)[later["token_id"] % 4], index=later.index)),
    ):
        counted = later.groupby([labels, "layer", "expert"]).size()
        for row in choices[choices["factor"] == factor].itertuples():
            if row.level != "all":
                assert row.tokens == counted.get((row.level, row.layer, row.expert), 0)
    whole = choices[choices["level"] == "all"].groupby(["factor", "layer", "expert"])["tokens"].sum()
    assert whole["domain"].to_dict() == whole["token class"].to_dict()
    assert choices.groupby(["factor", "level", "layer"])["share"].sum().to_numpy() == pytest.approx(1)
    assert choices["expert"].max() == 4


def test_a_factor_of_rare_levels_has_no_choices():
    """No shares of nothing: few tokens in every domain, all of one class."""
    trace = make_trace(n=300)
    trace["domain"] = trace["domain"] + trace["document"].astype(str)
    most = trace[trace["position"] > 0].groupby(["domain", "layer"]).size().max()
    one = make_classes().assign(token_class="word")
    assert set(expert_choice(trace, one, experts=4, least=most + 1)["factor"]) == {"token class"}
    with pytest.raises(InputError, match="expert_choice: no domain and no class with 9999 tokens"):
        expert_choice(trace, one, experts=4, least=9999)
