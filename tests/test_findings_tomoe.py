"""Sentences about ToMoE: every number is the frame's, and nothing goes beyond chance that its control does not show."""

import numpy as np
import pandas as pd
import pytest
from tomoe_frames import from_tables, make_classes, make_masks, make_pairs, make_steps, make_trace

from dynamoe_lab.analysis.findings import (
    mask_stability_finding,
    pruned_params_finding,
    specialisation_finding,
    tomoe_training_finding,
    union_finding,
)
from dynamoe_lab.analysis.metrics import attention_open, mask_jaccard, mask_union, specialisation
from dynamoe_lab.analysis.metrics.specialisation import above_control
from dynamoe_lab.errors import InputError


class TestTraining:
    def test_every_number_is_told(self):
        balance = make_steps()["balance_loss"].tail(10).mean()
        assert tomoe_training_finding(make_steps(), p=0.5, experts=4) == (
            "A short training: after 20 steps (5,120 tokens) 60.0 % of the weights of attention and MLPs are active on average on held-out "
            "text, without noise (under training noise 80.0 %, by the widest expert and token 80.5 %; target 50 %), and 98.0 % of the "
            "neurons are in some expert (under training noise 99.0 %); without noise the KL "
            "from the dense model on held-out text is 0.450 nats per token, rising (before: 0.250); balance is "
            f"{balance:.3f} (used alike: 0.250, one expert alone: 1; mean of 10 steps); the paper's runs saw 4,000 times as many tokens."
        )

    def test_noise_is_named_where_nothing_was_measured_without(self):
        steps = make_steps()
        for each in (steps.assign(open_ratio=np.nan, open_union=np.nan), steps.drop(columns=["open_ratio", "open_union"])):
            assert (
                "80.0 % of the weights of attention and MLPs are active on average under training noise (by the widest expert and token "
                "80.5 %; target 50 %), and under that noise 99.0 % of the neurons are in some expert; "
            ) in tomoe_training_finding(each, p=0.5, experts=4)

    def test_held_out_text_falls_or_was_not_measured(self):
        steps = make_steps()
        falling = steps.assign(heldout_kl=np.where(steps["heldout_kl"].notna(), 1 / steps["step"], np.nan))
        assert "is 0.050 nats per token, falling (before: 0.100)" in tomoe_training_finding(falling, p=0.5, experts=4)
        flat = steps.assign(heldout_kl=steps["heldout_kl"].where(steps["heldout_kl"].isna(), 1e-6))
        assert "is 0.000 nats per token, unchanged" in tomoe_training_finding(flat, p=0.5, experts=4)
        assert "was not measured on held-out text" in tomoe_training_finding(steps.assign(heldout_kl=np.nan), p=0.5, experts=4)

    def test_a_long_training_is_not_called_short(self):
        steps = make_steps()
        steps["tokens"] *= 1000
        sentence = tomoe_training_finding(steps, p=0.5, experts=4)
        assert sentence.startswith("After 20 steps (5,120,000 tokens)")
        assert "times as many" not in sentence

    def test_one_run_at_a_time(self):
        with pytest.raises(InputError, match="2 runs"):
            tomoe_training_finding(pd.concat([make_steps(), make_steps(run="b")]), p=0.5, experts=4)


class TestUnion:
    def test_numbers_by_hand(self):
        union = mask_union(from_tables([[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]), experts=2)
        chance = (0.5 * 0.25 + 0.75 * 0.75) / 2
        lost = (0.5 * 0.75 + 0.25 * 0.25) / 2
        assert union_finding(union) == (
            "Of 8 neurons in 2 layers 62.50 % are in at least one of 2 experts (least in layer 0: 50.00 %; experts of the same widths "
            f"drawn at random: {100 * (1 - lost):.2f} %), and 50.0 % in all of them, against {100 * chance:.1f} % at random: more than at "
            "random in 2 of 2 layers."
        )

    def test_attention_is_told_where_it_is_masked(self):
        union, trace = mask_union(make_masks(), experts=4), make_trace(n=300)
        kept = f"attention keeps {100 * make_pairs()['open'].mean():.1f} % of the pairs of queries and keys, and "
        assert kept in union_finding(union, attention_open(make_pairs(), trace))
        assert "pairs of queries" not in union_finding(union, attention_open(None, trace))

    def test_nothing_closed_is_said_so(self):
        union = mask_union(from_tables(np.ones((2, 5)), np.ones((2, 5))), experts=2)
        assert union_finding(union) == "None of 10 neurons in 2 layers is closed in any of 2 experts."


class TestParams:
    def test_against_the_dense_model_not_the_deployed(self):
        row = {
            "mlp_total": 80e6,
            "active_mlp_fraction": 0.5,
            "router": 2e6,
            "active_params": 90e6,
            "total_params": 108e6,
            "masked_params": 3e6,
        }
        params = pd.DataFrame([{"layer": "0", **row}, {"layer": "all", **row}])
        sentence = pruned_params_finding(params, dense_params=120_000_000)
        assert sentence == (
            "A token uses 90 M parameters, 75.0 % of the dense model's 120 M: 50.0 % of the MLPs' 80 M, 2 M that choose experts and masks, "
            "and what is left of the rest; the deployed model holds 108 M (90.0 %); its masks leave out 3 M more in values and outputs of "
            "attention, which are computed all the same."
        )
        for nothing in (0.0, np.nan):
            assert sentence.startswith(pruned_params_finding(params.assign(masked_params=nothing), dense_params=120_000_000)[:-1])


class TestSpecialisation:
    @staticmethod
    def measure(**strengths) -> pd.DataFrame:
        return specialisation(make_trace(**strengths), make_classes(), experts=4, permutations=100, resamples=30)

    def test_beyond_the_control_or_not(self):
        found = self.measure(domain=1.0)
        sentence = specialisation_finding(found)
        whole = found[found["layer"] == "all"].set_index("factor")
        domain, kind = sentence.split("; with the class of the token (4 of them)")
        assert "with the domain of the text (3 of them) it goes beyond shuffled labels (p 0.01)" in domain
        assert f"mean Cramér's V over layers {whole.loc['domain', 'association']:.2f} (" in domain
        assert f"{whole.loc['domain', 'control']:.2f} (" in domain
        assert "when labels are shuffled among 24 documents" in domain
        above = found[(found["layer"] != "all") & (found["association"] > found["control_high"])]["factor"].value_counts()
        assert f"{above['domain']} of 3 layers are above their band, where chance alone would put about 0.1" in domain
        assert "is not distinguishable from shuffled labels (p " in kind
        assert sentence.endswith("n = 2,280 tokens, 24 documents, position 0 left out).")

    def test_fresh_routers_are_told_beside(self):
        found, before = self.measure(domain=1.0), self.measure()
        row = before[(before["factor"] == "domain") & (before["layer"] == "all")].iloc[0]
        sentence = specialisation_finding(found, before=before)
        above = above_control(before, "domain")
        assert f"(before training: mean {row['association']:.2f} ({row['low']:.2f} to {row['high']:.2f}), above in {above})" in sentence
        assert sentence.count("before training") == 2
        assert "before training" not in specialisation_finding(found)

    def test_few_documents_decide_nothing(self):
        found = self.measure(domain=2.0)
        few = found.assign(clusters=np.where(found["factor"] == "domain", 9, found["clusters"]))
        assert "it cannot be told apart from shuffled labels with so few documents" in specialisation_finding(few)

    def test_without_an_interval(self):
        assert "(no interval)" in specialisation_finding(self.measure(domain=1.0).assign(low=np.nan, high=np.nan))


class TestStability:
    def test_the_same_and_unrelated(self):
        masks = make_masks()
        same = mask_jaccard(masks, masks.assign(run="b"), draws=20)
        sentence = mask_stability_finding(same)
        assert "of experts' neurons 1.000, above chance in the one pair of runs (" in sentence
        assert "single layers: 3 of 3 above their band" in sentence
        mixed = pd.concat([same, mask_jaccard(make_pairs(), make_pairs(run="b"), draws=20)], ignore_index=True)
        assert " and of kept pairs of queries and keys 1.000" in mask_stability_finding(mixed)

    def test_chance_is_not_called_stable(self):
        found = mask_jaccard(make_masks(), make_masks(seed=1, run="b"), draws=20)
        inside = found.assign(jaccard=found["chance"])
        assert "not distinguishable from chance (" in mask_stability_finding(inside)
        two = pd.concat([inside, found.assign(run_b="c", jaccard=0.99)], ignore_index=True)
        assert "above chance in 1 of 2 pairs of runs, below it in 0" in mask_stability_finding(two)
        assert mask_stability_finding(two).startswith("Between 3 runs (a, b and c)")
