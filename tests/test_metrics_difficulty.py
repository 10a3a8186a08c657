"""Labels and difficulty against loops over tokens, pandas and scipy; never against the code under test."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dynamoe_lab.analysis.metrics import (
    difficulty_bins,
    difficulty_by_domain,
    difficulty_by_token,
    difficulty_correlations,
    label_shares,
    labels_at,
)
from dynamoe_lab.errors import InputError

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
SIZES = np.array(FRACTIONS)


def make_similarity(n=240, layers=3, context=20, document=17, seed=0) -> pd.DataFrame:
    """A frame `similarity` as it is traced: layer after layer of the same tokens; documents span blocks of `context` tokens."""
    rng = np.random.default_rng(seed)
    position = np.arange(n) % context
    surprisal = np.where(position == 0, np.nan, rng.gamma(2, 2, n)).astype(np.float32)
    token = {
        "run": "a",
        "domain": np.where(np.arange(n) < n // 2, "c4", "code"),
        "document": np.arange(n) // document,
        "position": position,
    }
    token |= {"token_id": rng.integers(30, size=n), "surprisal": surprisal, "next_surprisal": np.append(surprisal[1:], np.nan)}
    parts = []
    for layer in range(layers):
        part = pd.DataFrame(token).assign(layer=np.int16(layer))
        for expert in range(3):  # not always rising with the expert: a longer prefix can be farther away
            values = 0.5 + 0.15 * expert - 0.02 * np.nan_to_num(surprisal, nan=4) + rng.normal(0, 0.15, n)
            part[f"similarity_{expert}"] = values.astype(np.float32)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def slow_label(row, theta: float) -> int:
    return next((e for e in range(3) if np.float32(row[f"similarity_{e}"]) >= np.float32(theta)), 3)


@pytest.fixture(scope="module")
def similarity() -> pd.DataFrame:
    return make_similarity()


class TestLabels:
    @pytest.mark.parametrize("theta", [0.3, 0.6, 0.9])
    def test_the_smallest_expert_within_theta(self, similarity, theta):
        labels = labels_at(similarity, theta)
        assert labels.dtype == np.int8
        assert labels.tolist() == [slow_label(row, theta) for _, row in similarity.iterrows()]

    def test_the_threshold_itself_qualifies_in_the_models_precision(self):
        frame = pd.DataFrame({"similarity_0": np.float32([0.9, 0.8999999]), "similarity_1": np.float32([1, 1])})
        assert labels_at(frame, 0.9).tolist() == [0, 1]  # float32(0.9) < 0.9 in double precision
        assert labels_at(frame, np.float64(0.9)).tolist() == [0, 1]

    def test_what_is_nan_is_not_enough(self):
        frame = pd.DataFrame({"similarity_0": np.float32([np.nan, np.nan]), "similarity_1": np.float32([0.95, np.nan])})
        assert labels_at(frame, 0.9).tolist() == [1, 2]
        shares = label_shares(
            frame.assign(run="a", domain="c4", position=1, layer=0), [-1.0, 0.9], fractions=(0.3, 0.6, 1.0)
        )  # no θ is reached by nan, not even -1
        assert shares.query("layer == 0")["tokens"].tolist() == [0, 1, 1] * 2

    def test_impossible_input_is_named(self, similarity):
        with pytest.raises(InputError, match="from -1 to 1"):
            labels_at(similarity, 90)
        with pytest.raises(InputError, match=r"lacks the column\(s\) similarity_0"):
            labels_at(similarity.drop(columns=["similarity_0", "similarity_1", "similarity_2"]), 0.9)
        with pytest.raises(InputError, match="2 fractions, but similarities of 3 experts"):
            label_shares(similarity, [0.9], fractions=(0.5, 1.0))
        with pytest.raises(InputError, match="2 runs"):
            label_shares(pd.concat([similarity, similarity.assign(run="b")]), [0.9], fractions=FRACTIONS)


class TestShares:
    THETAS = (0.4, 0.55, 0.7, 0.85)

    @pytest.mark.parametrize("by_domain", [False, True])
    def test_agree_with_labels_counted_one_theta_at_a_time(self, similarity, by_domain):
        shares = label_shares(similarity, self.THETAS, fractions=FRACTIONS, by_domain=by_domain)
        columns = ["run", "theta", "domain", "place", "layer", "label", "fraction", "tokens", "share"]
        assert list(shares.columns) == columns
        for theta in self.THETAS:
            place = np.where(similarity["position"] == 0, "first token", "later tokens")
            domain = similarity["domain"] if by_domain else "all"
            counted = similarity.assign(label=labels_at(similarity, theta), place=place, domain=domain)
            for layer in [*range(3), "all"]:
                part = counted if layer == "all" else counted[counted["layer"] == layer]
                expected = part.groupby(["domain", "place", "label"]).size()
                rows = shares[(shares["theta"] == theta) & (shares["layer"] == layer)].set_index(["domain", "place", "label"])
                assert rows["tokens"].to_dict() == {key: expected.get(key, 0) for key in rows.index}
        assert shares.groupby(["theta", "domain", "place", "layer"])["share"].sum().to_numpy() == pytest.approx(1)
        assert (shares["fraction"] == SIZES[shares["label"]]).all()

    def test_a_sample_without_first_tokens_has_no_such_rows(self, similarity):
        shares = label_shares(similarity[similarity["position"] > 0], [0.9], fractions=FRACTIONS)
        assert set(shares["place"]) == {"later tokens"}

    def test_twenty_thetas_of_a_real_trace_take_a_moment(self):
        big = make_similarity(n=10_240, layers=30, context=256, document=400)
        start = time.perf_counter()
        label_shares(big, np.linspace(0.5, 0.99, 20), fractions=FRACTIONS)
        assert time.perf_counter() - start < 2  # 0.1 s here; shared machines are slower


class TestByToken:
    def test_mean_of_the_labels_fractions(self, similarity):
        tokens = difficulty_by_token(similarity, 0.6, fractions=FRACTIONS)
        assert len(tokens) == 240
        for at in (0, 7, 120, 239):
            rows = similarity.iloc[[at, at + 240, at + 480]]  # the same token in the three layers
            assert tokens["difficulty"][at] == pytest.approx(np.mean([FRACTIONS[slow_label(row, 0.6)] for _, row in rows.iterrows()]))
            assert tokens["token_id"][at] == rows["token_id"].iloc[0]
        assert set(tokens["layer"]) == {"all"}
        assert np.isnan(tokens["frequency"]).all()

    def test_batches_of_a_trace_are_put_together(self, similarity):
        """trace_similarity gives layer after layer within each batch; the same tokens come out."""
        first, second = similarity[similarity.index % 240 < 100], similarity[similarity.index % 240 >= 100]
        whole, parts = (
            difficulty_by_token(frame, 0.6, fractions=FRACTIONS) for frame in (similarity, pd.concat([first, second], ignore_index=True))
        )
        pd.testing.assert_frame_equal(whole, parts)

    def test_frequency_and_ids_that_training_never_saw(self, similarity):
        counts = pd.DataFrame({"token_id": range(20), "tokens": range(1, 21), "share": 0.0})
        tokens = difficulty_by_token(similarity, 0.6, fractions=FRACTIONS, counts=counts)
        assert tokens.loc[tokens["token_id"] == 9, "frequency"].unique() == pytest.approx([10 / 210])
        assert tokens.loc[tokens["token_id"] >= 20, "frequency"].unique() == pytest.approx([0.5 / 210])

    def test_by_layer(self, similarity):
        rows = difficulty_by_token(similarity, 0.6, fractions=FRACTIONS, by_layer=True)
        assert len(rows) == 720
        assert rows["difficulty"].to_numpy() == pytest.approx(SIZES[labels_at(similarity, 0.6)])
        mean = rows["difficulty"].to_numpy().reshape(3, 240).mean(axis=0)
        assert mean == pytest.approx(difficulty_by_token(similarity, 0.6, fractions=FRACTIONS)["difficulty"].to_numpy())

    def test_rows_out_of_order_are_refused_and_not_mixed_up(self, similarity):
        with pytest.raises(InputError, match="differs between layers; keep the rows in the order"):
            difficulty_by_token(similarity.sample(frac=1, random_state=0), 0.6, fractions=FRACTIONS)
        with pytest.raises(InputError, match="different numbers of tokens"):
            difficulty_by_token(similarity.iloc[:-1], 0.6, fractions=FRACTIONS)
        with pytest.raises(InputError, match="2 fractions"):
            difficulty_by_token(similarity, 0.6, fractions=(0.5, 1.0))


@pytest.fixture(scope="module")
def tokens() -> pd.DataFrame:
    counts = pd.DataFrame({"token_id": range(25), "tokens": range(1, 26)})
    return difficulty_by_token(make_similarity(n=1800, document=60), 0.6, fractions=FRACTIONS, counts=counts)


class TestCorrelations:
    def test_are_spearmans_without_position_0(self, tokens):
        found = difficulty_correlations(tokens).set_index("covariate")
        assert list(found.index) == ["surprisal", "next_surprisal", "log_frequency", "position"]
        later = tokens[tokens["position"] > 0]
        for name, column in {"surprisal": "surprisal", "next_surprisal": "next_surprisal", "log_frequency": "frequency"}.items():
            known = later[later[column].notna()]
            row = found.loc[name]
            assert row["spearman"] == pytest.approx(stats.spearmanr(known[column], known["difficulty"]).statistic)
            assert row["tokens"] == len(known)
        assert found.loc["surprisal", "low"] > 0.1  # made so
        assert found.loc["position", "low"] < 0 < found.loc["position", "high"]
        assert set(found["n"]) == {30}

    def test_interval_agrees_with_ranking_every_resample_anew(self, tokens):
        row = difficulty_correlations(tokens).set_index("covariate").loc["surprisal"]
        later = tokens[tokens["position"] > 0]
        x, y = later["surprisal"].to_numpy(), later["difficulty"].to_numpy()
        members = [np.flatnonzero(later["document"] == name) for name in later["document"].unique()]
        rng = np.random.default_rng(1)
        drawn = []
        for _ in range(800):
            rows = np.concatenate([members[at] for at in rng.integers(len(members), size=len(members))])
            drawn.append(stats.spearmanr(x[rows], y[rows]).statistic)
        tail = stats.norm.cdf(np.sqrt(30 / 29) * stats.t.ppf(0.025, 29))
        low, high = np.quantile(drawn, [tail, 1 - tail])
        assert row["high"] - row["low"] == pytest.approx(high - low, rel=0.15)
        assert (row["high"] + row["low"]) / 2 == pytest.approx((high + low) / 2, abs=0.15 * (high - low))

    def test_layer_by_layer(self, similarity):
        rows = difficulty_by_token(similarity, 0.6, fractions=FRACTIONS, by_layer=True)
        found = difficulty_correlations(rows, resamples=50)
        assert set(found["covariate"]) == {"surprisal", "next_surprisal", "position"}  # no counts, no frequency
        part = similarity[(similarity["layer"] == 1) & (similarity["position"] > 0)]
        own = SIZES[[slow_label(row, 0.6) for _, row in part.iterrows()]]
        row = found[(found["layer"] == 1) & (found["covariate"] == "surprisal")].iloc[0]
        assert row["spearman"] == pytest.approx(stats.spearmanr(part["surprisal"], own).statistic)

    def test_nothing_that_varies_is_nan_and_one_document_has_no_interval(self, tokens):
        assert difficulty_correlations(tokens.assign(difficulty=0.5), resamples=20)["spearman"].isna().all()
        alone = difficulty_correlations(tokens[tokens["document"] == 3], resamples=20)
        assert alone["spearman"].notna().all()
        assert alone["low"].isna().all()


class TestBins:
    def test_agree_with_qcut(self, tokens):
        bins = difficulty_bins(tokens, resamples=100)
        later = tokens[tokens["position"] > 0]
        cut = pd.qcut(later["surprisal"], 10, labels=False)
        rows = bins[bins["covariate"] == "surprisal"]
        assert rows["difficulty"].to_numpy() == pytest.approx(later.groupby(cut)["difficulty"].mean().to_numpy(), abs=0.01)
        assert rows["center"].to_numpy() == pytest.approx(later.groupby(cut)["surprisal"].mean().to_numpy(), rel=0.05)
        assert rows["tokens"].sum() == len(later)
        assert (rows["low"] <= rows["difficulty"]).all()
        assert (rows["difficulty"] <= rows["high"]).all()
        assert (rows["start"].to_numpy()[1:] == rows["end"].to_numpy()[:-1]).all()

    def test_position_0_stands_alone(self, tokens):
        rows = difficulty_bins(tokens, bins=4, resamples=20).query("covariate == 'position'").set_index("bin")
        first = tokens[tokens["position"] == 0]
        assert rows.loc[0, "difficulty"] == pytest.approx(first["difficulty"].mean())
        assert rows.loc[0, ["tokens", "start", "end", "center"]].tolist() == [len(first), 0, 0, 0]
        assert rows.loc[1, "center"] > 0
        assert rows["tokens"].sum() == len(tokens)

    def test_many_tokens_of_one_value_make_fewer_bins(self, tokens):
        lumpy = tokens.assign(surprisal=np.where(tokens["position"] % 3 == 0, 0.0, 2.0))
        rows = difficulty_bins(lumpy, resamples=20).query("covariate == 'surprisal'")
        assert rows[["bin", "start", "end", "center"]].to_numpy().tolist() == [[1, 0, 0, 0], [2, 2, 2, 2]]
        later = lumpy[lumpy["position"] > 0]
        assert rows["difficulty"].to_numpy() == pytest.approx(later.groupby("surprisal")["difficulty"].mean().to_numpy())
        assert len(difficulty_bins(tokens.assign(surprisal=1.0), resamples=20).query("covariate == 'surprisal'")) == 1

    def test_rows_per_layer_are_refused(self, similarity):
        with pytest.raises(InputError, match="without by_layer"):
            difficulty_bins(difficulty_by_token(similarity, 0.6, fractions=FRACTIONS, by_layer=True))


def test_by_domain_agrees_with_groupby(similarity):
    means = difficulty_by_domain(similarity, 0.6, fractions=FRACTIONS, resamples=100)
    work = similarity.assign(work=SIZES[labels_at(similarity, 0.6)])[similarity["position"] > 0]
    expected = work.groupby(["domain", "layer"])["work"].mean()
    single = means[means["layer"] != "all"].set_index(["domain", "layer"])["mean"]
    assert single.to_dict() == pytest.approx(expected.to_dict())
    pooled = means[means["layer"] == "all"].set_index("domain")
    assert pooled["mean"].to_dict() == pytest.approx(work.groupby("domain")["work"].mean().to_dict())
    assert pooled.loc["c4", "documents"] == work[work["domain"] == "c4"]["document"].nunique()
    assert (pooled["low"] < pooled["mean"]).all()
    with pytest.raises(InputError, match="tokens after position 0"):
        difficulty_by_domain(similarity[similarity["position"] == 0], 0.6, fractions=FRACTIONS)
