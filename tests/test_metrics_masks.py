"""Overlap and union of masks against hand counts, brute force over all matchings, and simulation."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from tomoe_frames import from_tables, make_masks, make_pairs, make_trace

from dynamoe_lab.analysis.metrics import attention_open, mask_jaccard, mask_union
from dynamoe_lab.errors import InputError


def jaccard(one: np.ndarray, two: np.ndarray) -> float:
    one, two = set(np.flatnonzero(one)), set(np.flatnonzero(two))
    return len(one & two) / len(one | two) if one | two else 1.0


class TestUnion:
    def test_counts_by_hand(self):
        first = [[1, 1, 0, 0, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1]]  # neurons are in 3, 1, 1, 0, 3 experts
        second = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]  # an expert without neurons
        union = mask_union(from_tables(first, second), experts=3).set_index(["layer", "count"])
        assert union.loc[0, "share"].tolist() == pytest.approx([0.2, 0.4, 0, 0.4])
        assert union.loc[1, "share"].tolist() == pytest.approx([0, 0, 1, 0])
        assert union.loc["all", "share"].tolist() == pytest.approx([0.1, 0.2, 0.5, 0.2])
        assert union.loc["all", "neurons"].unique().tolist() == [10]

    def test_chance_is_that_of_independent_experts(self):
        masks = make_masks(layers=1, experts=3, neurons=40, seed=3)
        widths = masks.groupby("expert").size().to_numpy() / 40
        rng = np.random.default_rng(0)
        drawn = (rng.random((200_000, 3)) < widths).sum(axis=1)
        chance = mask_union(masks, experts=3).query("layer == 0")["chance"].to_numpy()
        assert chance == pytest.approx(np.bincount(drawn, minlength=4) / 200_000, abs=5e-3)
        assert chance.sum() == pytest.approx(1)
        assert 1 - chance[0] == pytest.approx(1 - np.prod(1 - widths))  # the coverage of the paper's formula

    def test_a_layer_without_neurons_is_lost_whole(self):
        masks = make_masks(layers=3)
        union = mask_union(masks[masks["layer"] != 1], experts=4)
        assert union[(union["layer"] == 1) & (union["count"] == 0)]["share"].item() == 1

    def test_the_last_layer_may_be_the_one_that_is_closed(self):
        union = mask_union(from_tables(np.ones((2, 5)), np.zeros((2, 5))), experts=2)
        assert union[(union["layer"] == 1) & (union["count"] == 0)]["share"].item() == 1
        assert union[(union["layer"] == "all") & (union["count"] == 0)]["share"].item() == pytest.approx(0.5)
        closed = mask_union(from_tables(np.zeros((2, 5))), experts=2)
        assert closed[closed["count"] == 0]["share"].tolist() == [1, 1]

    def test_bad_frames(self):
        masks = make_masks()
        with pytest.raises(InputError, match="column neuron must hold whole numbers from -1"):
            mask_union(masks.assign(neuron=-2), experts=4)
        with pytest.raises(InputError, match="mask_union: the frame has expert 3, counted from 0, but experts = 3"):
            mask_union(masks, experts=3)
        with pytest.raises(InputError, match="2 runs"):
            mask_union(pd.concat([masks, masks.assign(run="b")]), experts=4)
        with pytest.raises(InputError, match="neuron 59, counted from 0, in a layer of 40 neurons"):
            mask_union(masks.assign(neurons=40), experts=4)
        with pytest.raises(InputError, match="lacks the column"):
            mask_union(masks.drop(columns="neuron"), experts=4)


class TestJaccard:
    def test_matching_agrees_with_brute_force(self):
        one, two = make_masks(neurons=12, seed=1), make_masks(neurons=12, seed=2, run="b")
        found = mask_jaccard(one, two, draws=3)
        for layer in range(3):
            tables = np.zeros((2, 4, 12), dtype=bool)
            for table, masks in zip(tables, (one, two), strict=True):
                rows = masks[masks["layer"] == layer]
                table[rows["expert"], rows["neuron"]] = True
            best = max(np.mean([jaccard(tables[0][a], tables[1][b]) for a, b in enumerate(order)]) for order in permutations(range(4)))
            assert found["jaccard"][layer] == pytest.approx(best)
        assert found["jaccard"].iloc[-1] == pytest.approx(found["jaccard"][:3].mean())
        assert found["layer"].tolist() == [0, 1, 2, "all"]

    def test_the_same_masks_under_other_names_are_the_same(self):
        masks = make_masks()
        renamed = masks.assign(run="b", expert=(masks["expert"] + 1) % 4)
        found = mask_jaccard(masks, renamed)
        assert (found["jaccard"] == 1).all()
        assert (found["jaccard"] > found["chance_high"]).all()

    def test_masks_that_know_nothing_of_each_other_are_at_chance(self):
        inside = 0
        for seed in range(20):
            found = mask_jaccard(make_masks(seed=2 * seed), make_masks(seed=2 * seed + 1, run="b"), draws=60, seed=seed)
            whole = found[found["layer"] == "all"].iloc[0]
            inside += whole["chance_low"] <= whole["jaccard"] <= whole["chance_high"]
        assert inside >= 16  # of 20, at 95 %

    def test_wide_masks_overlap_by_chance(self):
        narrow, wide = (
            mask_jaccard(make_masks(width=width), make_masks(width=width, seed=1, run="b"), draws=20)["chance"].iloc[-1]
            for width in (0.3, 0.9)
        )
        assert wide == pytest.approx(0.9 / 1.1, abs=0.05)  # w^2 / (2 w - w^2), a little more for the matching
        assert narrow < 0.35

    def test_closed_layers_and_experts_are_compared(self):
        """The last layer, or the last expert, has nothing open in one of the runs."""
        whole, none = np.ones((2, 5)), np.zeros((2, 5))
        last = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
        found = mask_jaccard(from_tables(whole, none), from_tables(whole, whole, run="b"), draws=3)
        assert found["jaccard"].tolist() == [1, 0, 0.5]
        assert found["width_a"].tolist() == [1, 0, 0.5]
        assert mask_jaccard(from_tables(last), from_tables(last, run="b"), draws=3)["jaccard"].tolist() == [1, 1]
        assert mask_jaccard(from_tables(none), from_tables(none, run="b"), draws=3)["jaccard"].tolist() == [1, 1]

    def test_attention_pairs_have_nothing_to_match(self):
        one, two = make_pairs(), make_pairs(seed=1, run="b")
        found = mask_jaccard(one, two, draws=10)
        for layer in range(3):
            tables = [frame[frame["layer"] == layer]["open"].to_numpy() for frame in (one, two)]
            assert found["jaccard"][layer] == pytest.approx(jaccard(*tables))
        assert set(found["part"]) == {"attention"}
        assert found["elements"].unique().tolist() == [8]

    def test_same_arguments_same_result(self):
        pd.testing.assert_frame_equal(*(mask_jaccard(make_masks(), make_masks(seed=1, run="b"), draws=5, seed=3) for _ in range(2)))

    def test_bad_frames(self):
        with pytest.raises(InputError, match="different models cannot be compared: 3 layers of 60 and 2 layers of 60"):
            mask_jaccard(make_masks(), make_masks(layers=2))
        with pytest.raises(InputError, match="masks_b: the frame lacks the column"):
            mask_jaccard(make_masks(), make_pairs())
        with pytest.raises(InputError, match="draws = 0"):
            mask_jaccard(make_masks(), make_masks(), draws=0)


class TestAttention:
    def test_by_layer_and_whole(self):
        pairs, trace = make_pairs(), make_trace(n=300)
        left = attention_open(pairs, trace).set_index("layer")
        for layer in range(3):
            values = trace[trace["layer"] == layer]["open_values"].astype(float)
            assert left.loc[layer, "values_open"] == pytest.approx(values.mean())
            assert left.loc[layer, "values_low"] == pytest.approx(np.quantile(values, 0.1))
            assert left.loc[layer, "pairs_kept"] == pytest.approx(pairs[pairs["layer"] == layer]["open"].mean())
        assert left.loc["all", "values_open"] == pytest.approx(trace["open_values"].mean(), abs=1e-6)
        assert left.loc["all", "tokens"] == 900

    def test_without_masked_pairs(self):
        trace = make_trace(n=300)
        for none in (None, make_pairs().iloc[:0]):
            assert attention_open(none, trace)["pairs_kept"].isna().all()
