"""Sentences of the studies: every number is the frame's, and nothing is called better that its interval does not show."""

import numpy as np
import pandas as pd
import pytest
from test_metrics_difficulty import make_similarity
from test_metrics_studies import make_pareto, make_routing, make_sweep

from dynamoe_lab.analysis.findings import (
    ablation_finding,
    collapse_finding,
    collapse_verdict,
    difficulty_domain_finding,
    difficulty_finding,
    label_share_finding,
    pareto_finding,
    static_finding,
)
from dynamoe_lab.analysis.metrics import difficulty_by_domain, expert_usage, label_shares, labels_at, stack_runs, usage_information
from dynamoe_lab.errors import InputError

FRACTIONS = (0.25, 0.5, 0.75, 1.0)


class TestDifficulty:
    @staticmethod
    def correlations(**values) -> pd.DataFrame:
        rows = [{"covariate": name, "spearman": at, "low": at - 0.05, "high": at + 0.05} for name, at in values.items()]
        return pd.DataFrame(rows).assign(run="a", theta=0.9, layer="all", n=25, tokens=8160, confidence=0.95)

    def test_rises_falls_or_neither_by_the_interval(self):
        sentence = difficulty_finding(self.correlations(surprisal=0.36, log_frequency=-0.2, next_surprisal=0.02, position=0.1))
        assert sentence == (
            "At θ = 0.9 a token's difficulty, the mean share of the MLP that its labels ask for, rises with its surprisal (+0.36, +0.31 to "
            "+0.41) and its position in the block (+0.10, +0.05 to +0.15), falls with its id's frequency in training text (-0.20, -0.25 to "
            "-0.15) and has no relation beyond its interval to the next token's surprisal (+0.02, -0.03 to +0.07) (Spearman, 95 % "
            "intervals over documents; n = 25 documents, 8,160 tokens, position 0 left out)."
        )

    def test_without_an_interval_nothing_rises(self):
        sentence = difficulty_finding(self.correlations(surprisal=0.9).assign(low=np.nan, high=np.nan))
        assert "rises" not in sentence
        assert "has no relation beyond its interval to its surprisal (+0.90, no interval)" in sentence

    def test_label_shares(self):
        similarity = make_similarity()
        shares = label_shares(similarity, [0.4, 0.6, 0.8], fractions=FRACTIONS)
        sentence = label_share_finding(shares, 0.61)  # the nearest in the frame is told
        work = pd.Series(np.array(FRACTIONS)[labels_at(similarity, 0.6)])
        later = (similarity["position"] > 0).to_numpy()
        by_layer = work[later].groupby(similarity["layer"][later]).mean()
        assert sentence.startswith(f"At θ = 0.6 labels ask for {100 * work[later].mean():.1f} % of the MLP on average, from ")
        assert (
            f"{100 * by_layer.min():.1f} % in layer {by_layer.idxmin()} to {100 * by_layer.max():.1f} % in layer {by_layer.idxmax()}"
            in sentence
        )
        ends = [np.array(FRACTIONS)[labels_at(similarity, theta)][later].mean() for theta in (0.4, 0.8)]
        assert f"from {100 * ends[0]:.0f} % at θ = 0.4 to {100 * ends[1]:.0f} % at θ = 0.8" in sentence
        assert f"the first token of a block, counted apart, asks for {100 * work[~later].mean():.1f} %" in sentence
        assert "one label covers 99 % or more of the tokens in 0 of 3 layers" in sentence
        assert sentence.endswith(f"(n = {later.sum() // 3:,} tokens in each layer).")
        with pytest.raises(InputError, match="several domains"):
            label_share_finding(label_shares(similarity, [0.6], fractions=FRACTIONS, by_domain=True), 0.6)

    def test_domains_differ_or_do_not(self):
        similarity = make_similarity(n=1200)
        sentence = difficulty_domain_finding(difficulty_by_domain(similarity, 0.6, fractions=FRACTIONS))
        assert sentence.startswith("Mean share of the MLP that labels ask for at θ = 0.6 by domain, with 95 % intervals over n documents: ")
        assert "are not distinguishable" in sentence
        easy = similarity.assign(similarity_0=np.where(similarity["domain"] == "code", 1.0, similarity["similarity_0"]))
        assert "the extremes, code and c4, differ" in difficulty_domain_finding(difficulty_by_domain(easy, 0.6, fractions=FRACTIONS))
        alone = difficulty_by_domain(similarity[similarity["domain"] == "c4"], 0.6, fractions=FRACTIONS)
        assert difficulty_domain_finding(alone).endswith("; with one domain there is nothing to compare.")


class TestPareto:
    def test_trained_routers_are_told_with_what_they_save(self):
        rows = make_pareto(
            [
                ("dense", np.nan, 0, 0, 1.0, 1.0),
                ("router", 0.9, 0, 1000, 0.6, 1.5),
                ("router", 0.8, 0, 1000, 0.5, 2.0),
                ("label", 0.8, 0, 0, 0.5, 9.0),
            ]
        )
        assert pareto_finding(rows) == (
            "Routers trained on 1,000 tokens, on n = 9 documents: θ = 0.8: 50 % of the MLP neurons, 90 M of 130 M parameters active "
            "(69 %), 2.00 times the dense perplexity (1.80 to 2.20); θ = 0.9: 60 % of the MLP neurons, 98 M of 130 M parameters "
            "active (75 %), "
            "1.50 times the dense perplexity (1.35 to 1.65)."
        )

    def test_measured_time_stands_beside_the_parameters(self):
        rows = make_pareto([("dense", np.nan, 0, 0, 1.0, 1.0), ("router", 0.9, 0, 1000, 0.6, 1.5)])
        sentence = pareto_finding(rows.assign(time_ratio=[1, 0.85], time_low=[1, 0.83], time_high=[1, 0.88]))
        assert "98 M of 130 M parameters active (75 %), 85 % (83 % to 88 %) of the dense model's time, 1.50 times" in sentence
        assert sentence.endswith(" (time: of a prefill, median and 10 to 90 % quantiles over rounds).")
        assert "time:" not in pareto_finding(rows.assign(time_ratio=np.nan, time_low=np.nan, time_high=np.nan))

    def test_seeds_dominated_points_and_untrained_labels(self):
        rows = make_pareto([("router", 0.9, 0, 1000, 0.6, 1.0), ("router", 0.9, 1, 1000, 0.6, 4.0), ("static", np.nan, 0, 1000, 0.5, 1.5)])
        sentence = pareto_finding(rows)
        assert "no static cut was trained beside it" in sentence
        beside = rows.assign(theta=rows["theta"].fillna(0.9))
        assert "no static cut" not in pareto_finding(beside)
        assert (
            "98 M active parameters, 2.00 times the dense perplexity (0.90 to 4.40, mean and span of 2 seeds; dominated, by point "
            "estimates; no static cut was trained beside it)" in sentence
        )
        labels = pareto_finding(make_pareto([("label", 0.9, 0, 0, 0.6, 2.8)]))
        assert labels.startswith("Routing by the labels, which cost a full MLP to compute, without training, on n = 9 documents: θ = 0.9:")
        with pytest.raises(InputError, match="neither a trained router nor labels"):
            pareto_finding(make_pareto([("static", np.nan, 0, 0, 0.6, 2.8)]))

    def test_accuracy_is_told_where_it_can_be_told_apart(self):
        rows = make_pareto([("dense", np.nan, 0, 0, 1.0, 1.0), ("router", 0.8, 0, 1000, 0.5, 2.0), ("router", 0.9, 0, 1000, 0.6, 1.5)])
        scores = make_pareto(
            [("dense", np.nan, 0, 0, 1.0, 0.5), ("router", 0.8, 0, 1000, 0.48, 0.4), ("router", 0.9, 0, 1000, 0.58, 0.44)],
            metric="average_accuracy",
        )
        scores = scores.assign(low=[np.nan, 0.33, 0.37], high=[np.nan, 0.47, 0.51], n=1175)
        sentence = pareto_finding(pd.concat([rows, scores]))
        assert sentence.count("accuracy") == 1, "the interval at 0.9 holds the dense model's value"
        assert (
            "(1.80 to 2.20), average accuracy 40.0 %, below the dense model's 50.0 % (-17.0 to -3.0 points on the same 1,175 benchmark "
            "documents); θ = 0.9" in sentence
        )
        assert pareto_finding(pd.concat([rows, scores[scores["method"] != "dense"]])) == pareto_finding(rows)

    @pytest.mark.parametrize(("apart", "said"), [(True, "average accuracy 40.0 %, below"), (False, None)])
    def test_of_a_single_task_the_exact_test_decides(self, apart, said):
        """Whatever the interval, as `benchmark_finding` does; an average goes by its interval."""
        rows = make_pareto([("dense", np.nan, 0, 0, 1.0, 1.0), ("router", 0.8, 0, 1000, 0.5, 2.0)])
        scores = make_pareto([("dense", np.nan, 0, 0, 1.0, 0.5), ("router", 0.8, 0, 1000, 0.48, 0.4)], metric="average_accuracy")
        for low, high in ((0.33, 0.47), (0.33, 0.52), (np.nan, np.nan)):
            one = scores.assign(low=[np.nan, low], high=[np.nan, high], n=175, tasks=1, told_apart=[False, apart])
            sentence = pareto_finding(pd.concat([rows, one]))
            assert (said in sentence) if said else ("accuracy" not in sentence)
            assert "nan" not in sentence
            several = pareto_finding(pd.concat([rows, one.assign(tasks=7)]))
            assert ("accuracy" in several) == (high == 0.47)

    @staticmethod
    def comparison(ratio, *, low=None, high=None, static=0.66, **columns) -> pd.DataFrame:
        row = {
            "method": "router",
            "theta": 0.9,
            "seed": 0,
            "train_tokens": 40960,
            "active_mlp_fraction": 0.66,
            "static_fraction": static,
            "ratio": ratio,
        }
        row |= {"active_params": 66e6 + 54e6, "static_params": static * 100e6 + 54e6}  # the router is in the first number
        row |= {"low": 0.95 * ratio if low is None else low, "high": 1.05 * ratio if high is None else high}
        return pd.DataFrame([{**row, "n": 25, "tokens": 8160, "confidence": 0.95, **columns}])

    def test_the_static_verdict_follows_the_interval(self):
        assert static_finding(self.comparison(0.8)) == (
            "Routing beside a static cut trained alike, paired by document (n = 25 documents, 8,160 tokens): θ = 0.9 after 40,960 "
            "tokens of training, 66 % of the MLP neurons against a static 66 % (the same number of active parameters, "
            "the router's included): perplexity below the static cut's, ratio 0.800 "
            "(95 % interval 0.760 to 0.840 over documents, of 1 training seed), choosing by token pays."
        )
        assert "not distinguishable from the static cut's, ratio 0.980" in static_finding(self.comparison(0.98))
        assert "not shown to pay" in static_finding(self.comparison(0.98))
        assert (
            "above the static cut's, ratio 1.200 (95 % interval 1.140 to 1.260 over documents, of 1 training seed), "
            "the static cut is better" in static_finding(self.comparison(1.2))
        )
        assert "not shown to pay" in static_finding(self.comparison(0.5, low=np.nan, high=np.nan))

    def test_more_compute_is_not_called_a_win(self):
        sentence = static_finding(self.comparison(0.8, static=0.5))
        assert "(15 % more active parameters, the router's included)" in sentence
        assert "pays" not in sentence
        assert "but with more active parameters" in sentence
        assert "choosing by token pays" in static_finding(self.comparison(0.8, static=0.75))  # less compute and better
        assert "but with fewer active parameters" in static_finding(self.comparison(1.2, static=0.75))

    def test_tomoe_is_told_by_its_ratio_and_has_seeds_of_its_own(self):
        pruned = {"method": "tomoe p = 0.7", "theta": np.nan, "train_tokens": 7680}
        rows = [self.comparison(0.98), self.comparison(5.0, **pruned), self.comparison(6.0, seed=1, **pruned)]
        sentence = static_finding(pd.concat(rows))
        assert "; ToMoE at p = 0.7 after 7,680 tokens of training, 66 % of the MLP neurons against a static 66 %" in sentence
        assert "perplexity above the static cut's, ratio 5.477 (mean of 2 seeds, 5.000 to 6.000), the static cut is better" in sentence
        assert "nan" not in sentence

    def test_seeds_must_agree(self):
        agree = pd.concat([self.comparison(0.8), self.comparison(0.9, seed=1)])
        assert "below the static cut's, ratio 0.849 (mean of 2 seeds, 0.800 to 0.900), choosing by token pays" in static_finding(agree)
        widths = pd.concat([self.comparison(0.8, static=0.68), self.comparison(0.9, static=0.72, seed=1)])
        assert static_finding(widths).count("θ = 0.9") == 1, "every seed's cut has a width of its own"
        assert "against a static 70 %" in static_finding(widths)
        differ = static_finding(pd.concat([self.comparison(0.8), self.comparison(1.1, seed=1)]))
        assert "below in 1 and above in 1 of the intervals), choosing by token is not shown to pay" in differ


class TestCollapse:
    @staticmethod
    def frames(experts: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(λ, gradient, seed) -> expert of every token, per layer."""
        usage, information = {}, {}
        for case, layers in experts.items():
            routing = pd.concat([make_routing(expert, np.arange(200) % 20, layer) for layer, expert in enumerate(layers)])
            usage[case] = expert_usage(routing, theta=0.9, experts=4)
            information[case] = usage_information(routing, experts=4, fractions=FRACTIONS)
        return stack_runs(usage), stack_runs(information)

    def test_collapsed_and_not(self):
        fixed, nearly, free = np.full(200, 3), np.r_[np.full(6, 0), np.full(194, 3)], np.arange(200) % 20 % 4
        frames = self.frames({(0.0, "straight_through", 0): [fixed, fixed], (1.0, "straight_through", 0): [free, nearly]})
        sentence = collapse_finding(*frames, fractions=FRACTIONS)
        assert (
            "n = 200 tokens: λ = 0: all 2 layers collapsed, all of them to expert 100 % (2 at 95 %), 100 % of the MLP neurons active"
            in sentence
        )
        assert "; λ = 1: no layer of 2 collapsed (1 at 95 %), " in sentence
        assert sentence.endswith("1 seed.")
        assert "not every layer" not in sentence
        assert sentence.count(". ") == 0

    def test_a_caption_says_what_both_gradients_did(self):
        fixed, free = np.full(200, 3), np.arange(200) % 20 % 4
        runs = {(0.0, "straight_through", 0): [fixed, fixed], (0.0, "none", 0): [free, fixed], (1.0, "none", 0): [free, free]}
        assert collapse_verdict(self.frames(runs)[0], fractions=FRACTIONS) == (
            "Without supervision (λ = 0) 1 of 2 layers collapsed to one expert under the none gradient, where expert 100 % takes "
            "62 % of all tokens and 81 % of the MLP neurons run; all 2 layers collapsed to one expert under the straight-through gradient, "
            "where expert 100 % takes 100 % of all tokens and 100 % of the MLP neurons run; with λ = 1 (none) 0 of 2 layers are on "
            "one expert and 62 % of the MLP neurons run."
        )
        assert collapse_verdict(self.frames({(1.0, "none", 0): [free, free]})[0]) == "No run was without supervision (λ = 0)."

    def test_a_gradient_that_does_not_collapse_is_said(self):
        fixed, free = np.full(200, 3), np.arange(200) % 20 % 4
        runs = {(0.0, "straight_through", seed): [fixed, fixed] for seed in (0, 1)} | {(0.0, "none", 0): [free, free]}
        runs[0.0, "none", 1] = [fixed, free]
        sentence = collapse_finding(*self.frames(runs))
        assert "λ = 0 (none): 0 to 1 of 2 layers collapsed, all of them to expert 3" in sentence
        assert "2.00 bits told by the token's id" not in sentence  # the mean over a free and a half-fixed run
        assert "λ = 0 (straight-through): all 2 layers collapsed" in sentence
        assert sentence.endswith("2 seeds; not every layer had collapsed without supervision for the none gradient.")
        dated = collapse_finding(*self.frames(runs), train_tokens=20_480)
        assert "; after 20,480 tokens of training not every layer had collapsed without supervision for the none gradient." in dated


class TestAblation:
    def test_best_only_when_apart_from_all(self):
        sentence = ablation_finding(make_sweep(["a", "b", "c"], [1.0, 2.0, 3.0]), axis="dynamoe.importance")
        assert sentence == (
            "perplexity_ratio by dynamoe.importance (n = 25 documents): router: best is a: 1 (0.9 to 1.1) at 60 % of the MLP, its interval "
            "apart from every other; next b: 2 (1.8 to 2.2) at 60 % of the MLP; highest c: 3 (2.7 to 3.3) at 60 % of the MLP, "
            "apart from it."
        )
        sentence = ablation_finding(make_sweep(["a", "b", "c"], [1.0, 1.1, 3.0]), axis="dynamoe.importance")
        assert "best" not in sentence
        assert (
            "lowest is a: 1 (0.9 to 1.1) at 60 % of the MLP, not distinguishable from b, whose intervals overlap it; highest c" in sentence
        )
        alike = ablation_finding(make_sweep(["a", "b", "c"], [1.0, 1.05, 1.1]), axis="dynamoe.importance")
        assert "not distinguishable from b and c" in alike
        assert "highest" not in alike

    def test_unequal_compute_failed_cells_and_modes_are_told(self):
        sweep = make_sweep(["a", "b", "b"], [1.0, 3.0, np.nan], status=["ok", "ok", "failed"], active_mlp_fraction=[0.8, 0.5, np.nan])
        sentence = ablation_finding(sweep, axis="dynamoe.importance")
        assert "settings differ by up to 30 points in the MLP they run, so perplexity_ratio alone does not rank them" in sentence
        assert sentence.endswith("cells that failed and are not told: 1.")
        both = pd.concat([make_sweep(["a", "b"], [2.0, 1.0], mode="label"), make_sweep(["a", "b"], [1.0, 2.0])])
        sentence = ablation_finding(both, axis="dynamoe.importance")
        assert sentence.index("router: best is a") < sentence.index("labels: best is b")

    def test_accuracies_are_told_in_percent_and_the_highest_is_best(self):
        sentence = ablation_finding(
            make_sweep(["a", "b"], [0.5, 0.7], metric="router_accuracy"), axis="dynamoe.importance", metric="router_accuracy"
        )
        assert "best is b: 70.0 % (63.0 % to 77.0 %)" in sentence


@pytest.mark.parametrize(
    ("finding", "column"),
    [
        (difficulty_finding, "spearman"),
        (difficulty_domain_finding, "mean"),
        (lambda frame: label_share_finding(frame, 0.9), "fraction"),
        (pareto_finding, "value"),
        (static_finding, "static_fraction"),
        (lambda frame: collapse_finding(frame, frame), "router_gradient"),
    ],
)
def test_a_missing_column_and_the_finding_are_named(finding, column):
    with pytest.raises(InputError, match=rf"^\w+_finding.*: the frame lacks the column\(s\) .*{column}"):
        finding(pd.DataFrame({"run": ["a"], "layer": ["all"]}))
