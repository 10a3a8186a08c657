"""Sentences: every number is the frame's, and the verdict follows the interval of the difference."""

import numpy as np
import pandas as pd
import pytest

from dynamoe_lab.analysis.findings import (
    active_params_finding,
    conversion_finding,
    domain_finding,
    neighbour_finding,
    perplexity_finding,
    router_finding,
    training_finding,
    usage_finding,
)
from dynamoe_lab.analysis.frames import compact, list_names, percent
from dynamoe_lab.analysis.metrics import active_fraction, expert_usage, router_chance
from dynamoe_lab.errors import InputError

FRACTIONS = (0.25, 0.5, 0.75, 1.0)


def make_routing(skill: float, layers: int = 2, n: int = 2_000, **columns) -> pd.DataFrame:
    """Labels 60 % 3, else even; the router knows the label with probability `skill`, else it answers 3."""
    rng = np.random.default_rng(0)
    parts = []
    for layer in range(layers):
        label = np.where(rng.random(n) < 0.6, 3, rng.integers(4, size=n))
        expert = np.where(rng.random(n) < skill, label, 3)
        part = {"run": "a", "domain": "c4", "document": np.arange(n) // 50, "token_id": rng.integers(50, size=n), **columns}
        parts.append(pd.DataFrame({**part, "layer": layer, "label": label, "expert": expert}))
    return pd.concat(parts, ignore_index=True)


class TestRouter:
    def test_numbers_are_those_of_the_frame(self):
        chance = router_chance(make_routing(0.6), theta=0.9)
        row = chance.iloc[-1]
        sentence = router_finding(chance)
        assert sentence.startswith(f"The router is right for {100 * row['accuracy']:.1f} % of tokens (95 % interval ")
        assert f"n = 2,000 tokens in each of 2 layers, {row['documents']} documents" in sentence
        difference = f"{100 * row['minus_majority']:+.1f} points"
        interval = f"{100 * row['minus_majority_low']:+.1f} to {100 * row['minus_majority_high']:+.1f}"
        assert f"above the commonest label of each layer ({100 * row['majority']:.1f} %; difference {difference}, {interval})" in sentence
        assert f"above a router that sees only the token id ({100 * row['token_id']:.1f} %;" in sentence
        assert "above the commonest label in 2 of 2, below it in 0" in sentence
        assert sentence.endswith(".")
        assert sentence.count(". ") == 0  # one sentence

    def test_a_router_that_always_answers_the_majority_is_not_called_better(self):
        sentence = router_finding(router_chance(make_routing(0.0), theta=0.9))
        assert "), not distinguishable from the commonest label of each layer" in sentence
        assert "above" not in sentence.split("layer by layer")[0]

    def test_a_router_worse_than_the_majority_is_called_below(self):
        routing = make_routing(0.0).assign(expert=0)
        sentence = router_finding(router_chance(routing, theta=0.9))
        assert "), below the commonest label of each layer" in sentence
        assert "above the commonest label in 0 of 2, below it in 2" in sentence

    def test_one_document_says_that_it_has_no_interval(self):
        sentence = router_finding(router_chance(make_routing(0.6).assign(document=0), theta=0.9))
        assert "no interval from so few documents" in sentence
        assert "not distinguishable" in sentence
        assert "token id" not in sentence


class TestNeighbours:
    def test_above_below_and_neither(self):
        routing = make_routing(1.0)
        near = routing.assign(expert=np.where(np.arange(len(routing)) % 3, routing["label"], np.maximum(routing["label"] - 1, 0)))
        sentence = neighbour_finding(router_chance(near, theta=0.9))
        assert sentence.startswith("100 % of the router's errors miss by exactly one expert")
        assert "above the" in sentence
        far = routing.assign(expert=np.where(np.arange(len(routing)) % 3, routing["label"], (routing["label"] + 2) % 4))
        assert "below the" in neighbour_finding(router_chance(far, theta=0.9))
        shuffled = routing.assign(expert=routing["label"].sample(frac=1, random_state=0).to_numpy())
        assert "not distinguishable from the" in neighbour_finding(router_chance(shuffled, theta=0.9))

    def test_a_perfect_router_has_nothing_to_say(self):
        assert neighbour_finding(router_chance(make_routing(1.0), theta=0.9)).startswith("The router made no error in 40 documents")


class TestUsage:
    def test_layers(self):
        routing = make_routing(1.0, layers=4)
        routing.loc[routing["layer"] == 1, "expert"] = 0
        active = active_fraction(routing, theta=0.9, fractions=FRACTIONS)
        sentence = usage_finding(active, usage=expert_usage(routing, theta=0.9))
        work = np.array(FRACTIONS)[routing["expert"]]
        assert sentence.startswith(f"Averaged over layers a token runs {100 * work.mean():.1f} % (")
        assert "from 25.0 % (25.0 % to 25.0 %) in layer 1" in sentence
        assert "; least in layers 1 and " in sentence
        assert "n = 2,000 tokens in each of 4 layers, 40 documents" in sentence
        assert "one expert takes 99 % or more of the tokens in 1 of 4 layers" in sentence
        assert "least in layers" not in usage_finding(active[active["layer"].isin([0, 1, "all"])])
        with pytest.raises(InputError, match="several domains"):
            usage_finding(pd.concat([active, active.assign(domain="code")]))

    def test_domains_differ_or_do_not(self):
        same = make_routing(0.5)
        same["domain"] = np.where(same["document"] % 2, "c4", "code")
        sentence = domain_finding(active_fraction(same, theta=0.9, fractions=FRACTIONS, by_domain=True))
        assert "are not distinguishable" in sentence
        assert "n = 20)" in sentence
        routing = same.assign(expert=np.where(same["domain"] == "code", 0, same["expert"]))
        active = active_fraction(routing, theta=0.9, fractions=FRACTIONS, by_domain=True)
        sentence = domain_finding(active)
        c4 = np.array(FRACTIONS)[routing.loc[routing["domain"] == "c4", "expert"]].mean()
        assert f"code 25.0 % (25.0 % to 25.0 %, n = 20) and c4 {100 * c4:.1f} %" in sentence
        assert f"the extremes, code and c4, differ ({100 * (c4 - 0.25):.1f} points)" in sentence
        alone = domain_finding(active[active["domain"] == "c4"])
        assert alone.startswith("Mean active MLP neurons by domain, with 95 % intervals over n documents: c4 ")
        assert alone.endswith("n = 20); with one domain there is nothing to compare.")

    def test_extremes_picked_from_many_domains_need_a_wider_gap(self):
        frame = pd.DataFrame({"run": "a", "layer": "all", "tokens": 100, "documents": 19, "confidence": 0.95, "domain": list("abcde")})
        frame = frame.assign(active_fraction=[0.50, 0.52, 0.53, 0.54, 0.56])
        frame = frame.assign(low=frame["active_fraction"] - 0.04, high=frame["active_fraction"] + 0.04)
        assert "are not distinguishable (6.0 points, allowing for 10 pairs)" in domain_finding(frame)
        assert "too few documents to tell them apart" in domain_finding(frame.assign(documents=9, low=frame["low"] + 0.039))
        assert "a and e, differ (6.0 points)" in domain_finding(frame.iloc[[0, 4]])


class TestTraining:
    @staticmethod
    def steps(loss) -> pd.DataFrame:
        step = np.arange(1, len(loss) + 1)
        columns = {"run": "a", "step": step, "tokens": step * 1024, "lm_loss": loss, "router_loss": 0.5}
        return pd.DataFrame({**columns, "router_accuracy": 0.8, "active_mlp_fraction": 0.66})

    def test_falling_level_and_rising(self):
        noise = np.random.default_rng(0).normal(0, 0.02, 100)
        sentence = training_finding(self.steps(5 - 0.01 * np.arange(100) + noise), dense_loss=3.69)
        assert sentence.startswith("In 100 steps (102,400 tokens) the LM loss went from 4.9")
        assert "(dense model on held-out text: 3.69); it was still falling at the end" in sentence
        assert "router accuracy from 80 % to 80 %, with 66 % of the MLP neurons active (means of 10 steps)." in sentence
        assert "within their noise" in training_finding(self.steps(5 + noise))
        assert "was still rising" in training_finding(self.steps(5 + 0.01 * np.arange(100) + noise))

    def test_few_steps_claim_no_trend(self):
        assert "too few steps" in training_finding(self.steps([5.0, 4.0]))
        with pytest.raises(InputError, match="2 runs"):
            training_finding(pd.concat([self.steps([5.0]), self.steps([5.0]).assign(run="b")]))


class TestModel:
    def test_perplexity(self):
        columns = {"run": "a", "n": 55, "tokens": 16384, "perplexity": 70.8, "reference_perplexity": 40.0}
        frame = pd.DataFrame([{**columns, "ratio": 1.77, "low": 1.72, "high": 1.83}])
        assert perplexity_finding(frame) == (
            "a: perplexity 70.8, above the dense model's 40.0 on the same documents: ratio 1.770 (95 % interval 1.720 to 1.830; "
            "n = 55 documents, 16,384 tokens)."
        )
        both = perplexity_finding(pd.concat([frame, frame.assign(run="b", low=0.98)]))
        assert both.startswith("a: perplexity 70.8, above the dense")
        assert "; b: perplexity 70.8, not distinguishable from the dense" in both
        assert "below the dense" in perplexity_finding(frame.assign(ratio=0.9, low=0.85, high=0.95))
        alone = perplexity_finding(frame.assign(ratio=np.nan, reference_perplexity=np.nan, low=68.0, high=73.5))
        assert alone == "a: perplexity 70.8 (95 % interval 68.0 to 73.5; n = 55 documents, 16,384 tokens)."

    def test_active_params(self):
        layer = {"layer": 0, "mlp_active": 1, "mlp_total": 2, "active_mlp_fraction": 0.5, "router": 1, "other": 1}
        whole = {"layer": "all", "mlp_active": 52e6, "mlp_total": 80e6, "active_mlp_fraction": 0.65, "router": 4e6, "other": 55e6}
        rows = [{**layer, "active_params": 3, "total_params": 4}, {**whole, "active_params": 111e6, "total_params": 139e6}]
        assert active_params_finding(pd.DataFrame(rows)) == (
            "A token uses 111 M of 139 M parameters (79.9 %; 82.2 % of the dense model's 135 M): 65.0 % of the MLPs' 80 M, "
            "plus 4 M of the routers and 55 M that always run."
        )

    def test_conversion(self):
        change = pd.DataFrame([{"max_abs": 3.2e-5, "mean_abs": 1e-6, "agreement": 1.0, "tokens": 2048}])
        assert conversion_finding(change) == (
            "At full width the converted model computes the same function as the dense one: over 2,048 tokens no logit changes "
            "by more than 0.000032, and the most likely next token is the same for 100 % of them."
        )
        assert "differs from the dense one" in conversion_finding(change.assign(max_abs=0.4))
        with pytest.raises(InputError, match="one row is needed, the frame has 2"):
            conversion_finding(pd.concat([change, change]))


@pytest.mark.parametrize(
    ("finding", "column"),
    [
        (router_finding, "minus_majority_low"),
        (neighbour_finding, "neighbour_uniform"),
        (usage_finding, "documents"),
        (domain_finding, "low"),
        (training_finding, "lm_loss"),
        (perplexity_finding, "ratio"),
        (active_params_finding, "other"),
        (conversion_finding, "max_abs"),
    ],
)
def test_a_missing_column_and_the_finding_are_named(finding, column):
    with pytest.raises(InputError, match=rf"^{finding.__name__}: the frame lacks the column\(s\) .*{column}"):
        finding(pd.DataFrame({"run": ["a"], "layer": ["all"]}))


def test_numbers_as_people_read_them():
    assert [percent(value) for value in (0, 0.786, 1, 0.9996, 0.001, 1e-6, np.nan)] == [
        "0 %", "79 %", "100 %", "99.96 %", "0.1 %", "<0.01 %", "no value",
    ]  # fmt: skip
    assert [compact(value) for value in (512, 102_400, 134_515_008, 7.24e9, 999_999)] == ["512", "102 K", "135 M", "7.24 B", "1 M"]
    assert list_names(["a"]) == "a"
    assert list_names("abc") == "a, b and c"
    assert list_names("abcdefg", limit=3) == "a, b, c and 4 more"
