"""Intervals against independent computations: scipy's own bootstrap, closed forms, and how often they cover the truth."""

import numpy as np
import pytest
from scipy import stats

from dynamoe_lab.analysis.statistics import Interval, bootstrap_sums, paired_difference, ratio_of_sums
from dynamoe_lab.errors import InputError


@pytest.fixture
def documents():
    """Correct tokens and tokens of 60 documents of very unequal length."""
    rng = np.random.default_rng(1)
    tokens = np.ceil(rng.lognormal(5, 1, 60))
    return rng.binomial(tokens.astype(int), rng.beta(8, 2, 60)).astype(float), tokens


def test_value_is_the_ratio_of_the_sums(documents):
    right, tokens = documents
    interval = ratio_of_sums(right, tokens)
    assert interval.value == pytest.approx(right.sum() / tokens.sum())
    assert interval.low < interval.value < interval.high
    assert interval.n == 60
    assert all(isinstance(number, float) for number in interval[:3])


def test_agrees_with_scipy_up_to_the_widening_for_few_documents(documents):
    right, tokens = documents
    ours = ratio_of_sums(right, tokens, resamples=20_000)

    def ratio(index, axis=-1):
        return right[index].sum(axis=axis) / tokens[index].sum(axis=axis)

    index = (np.arange(60),)
    theirs = stats.bootstrap(index, ratio, n_resamples=20_000, method="percentile", vectorized=True, rng=0).confidence_interval
    plain = theirs.high - theirs.low
    assert ours.high - ours.low == pytest.approx(plain * np.sqrt(60 / 59) * stats.t.ppf(0.975, 59) / 1.96, rel=0.03)
    assert (ours.low + ours.high) / 2 == pytest.approx((theirs.low + theirs.high) / 2, abs=0.03 * plain)


def test_few_documents_get_the_width_of_students_t():
    values = stats.norm.ppf((np.arange(8) + 0.5) / 8)
    interval = ratio_of_sums(values, np.ones(8), resamples=20_000)
    width = 2 * stats.t.ppf(0.975, 7) * values.std(ddof=1) / np.sqrt(8)
    assert interval.high - interval.low == pytest.approx(width, rel=0.07)  # a plain percentile interval: 23 % less


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(400):
        tokens = np.ceil(rng.lognormal(5, 0.7, 25))
        interval = ratio_of_sums(rng.binomial(tokens.astype(int), rng.beta(8, 2, 25)), tokens, resamples=400, seed=trial)
        covered += interval.low <= 0.8 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98  # plain percentile intervals: 0.90


def test_tokens_are_summed_within_their_document_before_resampling():
    rng = np.random.default_rng(3)
    document = np.repeat(["a", "b", "c", "d", "e", "f"], 50)
    right = np.repeat(rng.random(6), 50)  # the tokens of a document are all alike: six independent numbers, not 300
    clustered = ratio_of_sums(right, np.ones(300), clusters=document)
    summed = ratio_of_sums(right.reshape(6, 50).sum(axis=1), np.full(6, 50.0))
    assert clustered == pytest.approx(summed)
    assert clustered.n == 6
    naive = ratio_of_sums(right, np.ones(300))
    assert naive.high - naive.low < 0.4 * (clustered.high - clustered.low)


def test_pairing_removes_what_two_models_share():
    rng = np.random.default_rng(4)
    dense = rng.normal(3, 1, 40)
    ours = dense + 0.2 + rng.normal(0, 0.05, 40)
    interval = paired_difference(ours, dense)
    assert interval.value == pytest.approx((ours - dense).mean())
    half = stats.t.ppf(0.975, 39) * (ours - dense).std(ddof=1) / np.sqrt(40)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)


def test_paired_difference_weights_by_tokens():
    interval = paired_difference([1.0, 3.0], [0.0, 0.0], weights=[3, 1])
    assert interval.value == pytest.approx(1.5)


def test_same_seed_same_interval_another_seed_another(documents):
    assert ratio_of_sums(*documents, seed=5) == ratio_of_sums(*documents, seed=5)
    assert ratio_of_sums(*documents, seed=5) != ratio_of_sums(*documents, seed=6)


def test_a_table_of_statistics_shares_one_set_of_resamples(documents):
    sums = np.stack([np.stack(documents, axis=1)] * 3, axis=1)  # (60, 3, 2): three identical layers
    table = bootstrap_sums(sums, lambda totals: totals[..., 0] / totals[..., 1])
    assert table.value.shape == table.low.shape == (3,)
    assert (table.low == table.low[0]).all()
    assert tuple(one[0] for one in table[:3]) == pytest.approx(ratio_of_sums(*documents)[:3])


def test_memory_chunks_do_not_change_the_result(documents, monkeypatch):
    whole = ratio_of_sums(*documents, resamples=500)
    monkeypatch.setattr("dynamoe_lab.analysis.statistics.CHUNK", 60 * 500 // 4)
    assert ratio_of_sums(*documents, resamples=500) == pytest.approx(whole)


def test_one_document_has_a_value_but_no_interval():
    interval = ratio_of_sums([3.0], [4.0])
    assert interval.value == 0.75
    assert np.isnan([interval.low, interval.high]).all()


def test_documents_without_any_denominator_do_not_spoil_the_interval():
    interval = ratio_of_sums([0.0, 0.0, 1.0], [0.0, 0.0, 2.0])  # some resamples hold only the empty documents
    assert interval[:3] == pytest.approx((0.5, 0.5, 0.5))


def test_nothing_to_divide_by_is_nan_and_not_an_error():
    assert np.isnan(ratio_of_sums([0.0, 0.0], [0.0, 0.0])[:3]).all()
    table = bootstrap_sums(np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]), lambda totals: totals / totals)
    assert table.low == pytest.approx([1, np.nan], nan_ok=True)


def test_two_clusters_give_no_interval():
    """Their resamples are the two and their mean: the interval would be their range at any confidence."""
    two = ratio_of_sums([1.0, 3.0], [1.0, 1.0])
    assert (two.value, two.n) == (2.0, 2)
    assert np.isnan([two.low, two.high]).all()
    assert ratio_of_sums([1.0, 3.0, 2.0], [1.0, 1.0, 1.0]).low < 2


def test_map_carries_all_three_numbers():
    assert Interval(0.0, -1.0, 1.0, 9).map(np.exp) == pytest.approx((1, np.exp(-1), np.e, 9))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ratio_of_sums([], []), "no clusters"),
        (lambda: ratio_of_sums([1.0, 2.0], [1.0]), "numerator 2, denominator 1"),
        (lambda: ratio_of_sums([1.0, np.nan], [1.0, 1.0]), "numerator has 1 values that are not finite"),
        (lambda: ratio_of_sums([1.0], [1.0], clusters=[1, 2]), "2 clusters for 1 rows"),
        (lambda: ratio_of_sums([1.0, 2.0], [1.0, 1.0], confidence=95), "confidence = 95"),
        (lambda: ratio_of_sums([1.0, 2.0], [1.0, 1.0], resamples=0), "resamples = 0"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "first 2, second 1"),
    ],
)
def test_impossible_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call()
