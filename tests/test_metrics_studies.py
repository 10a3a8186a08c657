"""Pareto, collapse and sweep metrics against brute force, closed forms and simulation."""

import numpy as np
import pandas as pd
import pytest
from benchmark_frames import make_documents, make_scores

from dynamoe_lab.analysis.metrics import (
    ablation_table,
    accuracy_rows,
    benchmark_deltas,
    collapsed_layers,
    expert_usage,
    pareto_front,
    pareto_points,
    pareto_row,
    stack_runs,
    static_comparison,
    usage_information,
)
from dynamoe_lab.analysis.metrics.ablation import rank_settings, setting_text
from dynamoe_lab.errors import InputError

FRACTIONS = (0.25, 0.5, 0.75, 1.0)


def make_pareto(rows: list[tuple], metric="perplexity_ratio") -> pd.DataFrame:
    """Rows of (method, theta, seed, train_tokens, active share, value)."""
    names = ["method", "theta", "seed", "train_tokens", "active_mlp_fraction", "value"]
    frame = pd.DataFrame(rows, columns=names).assign(metric=metric, n=9)
    frame["active_params"] = 50e6 + 80e6 * frame["active_mlp_fraction"]
    return frame.assign(low=frame["value"] * 0.9, high=frame["value"] * 1.1)


CASES = {
    "dense": ("dense", np.nan, 0, 0),
    "router": ("router", 0.8, 0, 1000),
    "again": ("router", 0.8, 1, 1000),
    "cut": ("static", 0.8, 0, 1000),
}


def make_scored(n: int = 60, tasks=("piqa", "sciq", "lambada_openai")) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables as of `score_cells`: two seeds of a router, the second worse, and a static cut; runs are called by their method."""
    documents = make_documents(n, {"dense": 0.0, "router": 0.06, "again": 0.3, "cut": 0.1}, tasks=tasks)
    scores = make_scores(documents)
    shares = scores[scores["metric"] == "active_params"].assign(metric="active_mlp_fraction", value=lambda rows: rows["value"] / 200e6)
    names, frames = ["method", "theta", "seed", "train_tokens"], []
    for frame in (pd.concat([scores, shares], ignore_index=True), documents):
        cases = pd.DataFrame([CASES[run] for run in frame["run"]], columns=names)
        frames.append(pd.concat([frame.assign(run=cases["method"]), cases], axis=1))
    return tuple(frames)


class TestAccuracyRows:
    def test_means_over_tasks_with_the_interval_of_the_difference_to_the_dense_model(self):
        scores, documents = make_scored()
        rows = accuracy_rows(scores, documents)
        assert list(rows.columns[:11]) == list(make_row().columns[:11]), "rows of the table pareto"
        assert [tuple(row) for row in rows[["method", "theta", "seed", "train_tokens"]].to_numpy()[1:]] == list(CASES.values())[1:]
        right = documents[documents["metric"] == "acc"].assign(theta=lambda frame: frame["theta"].fillna(0))
        tables = {place: part.pivot(index="doc_id", columns="task", values="value") for place, part in right.groupby(["method", "seed"])}
        dense, rng = tables["dense", 0], np.random.default_rng(0)
        for row in rows.itertuples():
            own = tables[row.method, row.seed]
            assert row.value == pytest.approx(own.mean().mean())
            assert (row.metric, row.n, row.tasks, row.chance) == ("average_accuracy", 180, 3, pytest.approx(0.25))
            cost = scores[(scores["method"] == row.method) & (scores["seed"] == row.seed)].groupby("metric")["value"].mean()
            assert [row.active_params, row.active_mlp_fraction] == pytest.approx([cost["active_params"], cost["active_mlp_fraction"]])
            if row.method == "dense":
                assert np.isnan([row.low, row.high]).all(), "the reference has no interval"
            else:  # against documents drawn by hand; a document is 1/180
                drawn = rng.integers(60, size=(4_000, 60, 3))
                change = np.take_along_axis((own - dense).to_numpy()[None], drawn, axis=1).mean(axis=(1, 2))
                expected = dense.mean().mean() + np.quantile(change, [0.025, 0.975])
                assert [row.low, row.high] == pytest.approx(expected, abs=1.5 / 180)
        assert rows["note"].unique().tolist() == ["SciQ: validation (stock: test); LAMBADA: test (line breaks are spaces)"]
        assert rows[["time_ratio", "time_low", "time_high"]].isna().all(axis=None)

    def test_more_is_better(self):
        points = pareto_points(accuracy_rows(*make_scored())).set_index("method")
        assert points.loc["router", "seeds"] == 2
        assert points.loc["static", "value"] > points.loc["router", "value"]
        assert points["dominated"].to_dict() == {"dense": False, "router": False, "static": points.loc["static", "active_params"] > 135e6}

    def test_a_single_task_is_its_own_average(self):
        scores, documents = make_scored(tasks=("piqa",))
        right = documents[(documents["metric"] == "acc") & (documents["method"] == "static")]["value"]
        row = accuracy_rows(scores, documents).set_index("method").loc["static"]
        assert (row["value"], row["n"], row["tasks"], row["chance"]) == (pytest.approx(right.mean()), 60, 1, 0.5)
        assert row["low"] < row["value"] < row["high"]
        deltas = benchmark_deltas(
            documents[documents["method"] == "static"], documents[documents["method"] == "dense"].drop(columns="seed")
        )
        assert row["told_apart"] == (deltas["mcnemar_p"].item() < 0.05)

    def test_without_a_reference_or_with_other_documents(self):
        scores, documents = make_scored()
        routed = documents["method"] == "router"
        with pytest.raises(InputError, match="accuracy_rows: documents of method 'dense': the frame has no rows"):
            accuracy_rows(scores, documents[documents["method"] != "dense"])
        with pytest.raises(InputError, match="task piqa: the documents differ"):
            accuracy_rows(scores, documents[~(routed & (documents["task"] == "piqa") & (documents["doc_id"] == 3))])
        with pytest.raises(InputError, match=r"accuracy_rows: scores: the frame lacks the column\(s\) theta"):
            accuracy_rows(scores.drop(columns="theta"), documents)


def make_row() -> pd.DataFrame:
    quality = {"ratio": 1.0, "low": 1.0, "high": 1.0, "n": 25}
    return pareto_row(quality, {"active_params": 1e6, "active_mlp_fraction": 1.0}, method="dense")


class TestPareto:
    def test_row(self):
        quality = pd.DataFrame([{"run": "router", "n": 25, "tokens": 8160, "perplexity": 58.0, "ratio": 1.6, "low": 1.5, "high": 1.8}])
        cost = pd.DataFrame({"layer": ["0", "all"], "active_params": [1e6, 113e6], "active_mlp_fraction": [0.5, 0.67]})
        expected = ["router", 0.9, 2, 40960, 113e6, 0.67, "perplexity_ratio", 1.6, 1.5, 1.8, 25]
        for active in (cost, cost.iloc[1], cost.iloc[1].to_dict()):
            row = pareto_row(quality, active, method="router", theta=0.9, seed=2, train_tokens=40960)
            assert row.iloc[0, :11].tolist() == expected
            assert row.iloc[0, 11:].isna().all(), "time was not measured"
        time = {"time_ratio": 0.8, "time_ratio_low": 0.78, "time_ratio_high": 0.85, "realised": 0.9}
        timed = pareto_row(quality, cost, method="router", time_row=pd.Series(time))
        assert timed.iloc[0, 11:].to_dict() == {"time_ratio": 0.8, "time_low": 0.78, "time_high": 0.85}
        assert np.isnan(pareto_row(quality.iloc[0], cost, method="static")["theta"].item())
        with pytest.raises(InputError, match="one row is needed, the frame has 2"):
            pareto_row(pd.concat([quality, quality]), cost, method="router")

    def test_front_agrees_with_brute_force(self):
        rng = np.random.default_rng(0)
        rows = [("router" if k % 3 else "static", float(k), 0, 1, round(rng.random(), 1), round(1 + rng.random(), 1)) for k in range(60)]
        front = pareto_front(make_pareto(rows))
        for row in front.itertuples():
            beaten = False
            for other in front.itertuples():
                cheaper, better = other.active_params <= row.active_params, other.value <= row.value
                strictly = other.active_params < row.active_params or other.value < row.value
                beaten |= cheaper and better and strictly
            assert row.dominated == beaten
        assert 0 < front["dominated"].sum() < 60

    def test_equal_points_do_not_dominate_each_other(self):
        rows = make_pareto([("router", 0.8, 0, 1, 0.5, 1.5), ("random", 0.8, 0, 1, 0.5, 1.5)])
        assert not pareto_front(rows)["dominated"].any()

    def test_labels_cannot_dominate_but_can_be_dominated(self):
        rows = make_pareto([("label", 0.8, 0, 1, 0.4, 1.2), ("router", 0.8, 0, 1, 0.5, 1.5), ("label", 0.9, 0, 1, 0.6, 1.6)])
        assert pareto_front(rows)["dominated"].tolist() == [False, False, True]

    def test_the_dense_model_takes_part(self):
        rows = make_pareto([("dense", np.nan, 0, 0, 1.0, 1.0), ("router", 0.99, 0, 1, 1.05, 1.01), ("router", 0.9, 0, 1, 0.9, 1.1)])
        assert pareto_front(rows)["dominated"].tolist() == [False, True, False]

    def test_seeds_are_judged_together_and_static_cuts_apart(self):
        rows = make_pareto(
            [
                ("router", 0.9, 0, 1, 0.60, 1.0),  # lucky
                ("router", 0.9, 1, 1, 0.62, 4.0),
                ("static", np.nan, 0, 1, 0.50, 1.9),
                ("static", np.nan, 0, 1, 0.75, 1.8),
                ("router", 0.9, 0, 0, 0.61, 2.5),  # as converted: another setting
            ]
        )
        points = pareto_points(rows)
        assert len(points) == 4
        router = points.iloc[0]
        assert router["value"] == pytest.approx(2.0)  # geometric mean
        assert router["active_mlp_fraction"] == pytest.approx(0.61)
        assert (router["low"], router["high"], router["seeds"]) == pytest.approx((0.9, 4.4, 2))
        assert pareto_front(rows)["dominated"].tolist() == [True, True, False, False, True]

    def test_time_is_a_cost_of_its_own(self):
        rows = make_pareto([("router", 0.9, 0, 1, 0.6, 1.5), ("static", np.nan, 0, 1, 0.7, 1.6), ("label", 0.9, 0, 1, 0.5, 9.0)])
        rows["time_ratio"] = [0.9, 0.8, np.nan]
        by_params, by_time = (pareto_points(rows, cost=cost).set_index("method") for cost in ("active_params", "time_ratio"))
        assert by_params["dominated"].to_dict() == {"router": False, "static": True, "label": False}
        assert by_time["dominated"].to_dict() == {"router": False, "static": False, "label": False}
        slow = rows.assign(time_ratio=[0.9, 0.95, np.nan])
        assert pareto_points(slow, cost="time_ratio").set_index("method")["dominated"].to_dict() == {
            "router": False, "static": True, "label": False,
        }  # fmt: skip
        with pytest.raises(InputError, match="cost = 'seconds', give active_params, active_mlp_fraction or time_ratio"):
            pareto_points(rows, cost="seconds")

    def test_times_of_seeds_are_put_together(self):
        rows = make_pareto([("router", 0.9, seed, 1, 0.6, 1.5) for seed in (0, 1)])
        rows = rows.assign(time_ratio=[0.8, 0.9], time_low=[0.78, 0.85], time_high=[0.82, 0.93])
        assert pareto_points(rows)[["time_ratio", "time_low", "time_high"]].iloc[0].tolist() == pytest.approx([0.85, 0.78, 0.93])
        assert pareto_points(rows.drop(columns=["time_ratio", "time_low", "time_high"]))["time_ratio"].isna().all()

    def test_higher_is_better_for_accuracies_and_metrics_stay_apart(self):
        accuracy = make_pareto([("router", 0.9, 0, 1, 0.6, 0.5), ("static", np.nan, 0, 1, 0.7, 0.4)], metric="acc")
        ratio = make_pareto([("router", 0.9, 0, 1, 0.6, 0.5), ("static", np.nan, 0, 1, 0.7, 0.4)])
        assert pareto_front(pd.concat([accuracy, ratio]))["dominated"].tolist() == [False, True, False, False]

    def test_what_is_missing_is_named(self):
        with pytest.raises(InputError, match=r"^pareto_front: the frame lacks the column\(s\) train_tokens"):
            pareto_front(make_pareto([("router", 0.9, 0, 1, 0.6, 0.5)]).drop(columns="train_tokens"))


class TestStatic:
    @staticmethod
    def losses(nll, share) -> pd.DataFrame:
        columns = {"run": "x", "document": range(len(nll)), "domain": "c4", "tokens": 100, "positions": 101, "correct": 0.5}
        return pd.DataFrame(columns).assign(nll=np.asarray(nll), active_mlp_fraction=share)

    def test_ratio_is_paired_by_document(self):
        rng = np.random.default_rng(0)
        static = 350 + 60 * rng.normal(size=30)
        router = static - 5 + rng.normal(size=30)
        row = static_comparison(
            self.losses(router, 0.66), self.losses(static, 0.7), active_params=120, static_params=121, theta=0.9, seed=3, train_tokens=500
        ).iloc[0]
        assert row["ratio"] == pytest.approx(np.exp((router.sum() - static.sum()) / 3000))
        assert row["low"] < row["ratio"] < row["high"] < 1  # unpaired, the documents' spread would hide it
        assert row[["method", "theta", "seed", "train_tokens", "n", "tokens"]].tolist() == ["router", 0.9, 3, 500, 30, 3000]
        assert (row["active_mlp_fraction"], row["static_fraction"]) == pytest.approx((0.66, 0.7))
        assert row[["active_params", "static_params"]].tolist() == [120, 121]
        assert row["static_perplexity"] == pytest.approx(np.exp(static.sum() / 3000))

    def test_other_documents_are_refused(self):
        with pytest.raises(InputError, match="other documents"):
            static_comparison(self.losses([1.0, 2.0], 0.5), self.losses([1.0], 0.5), active_params=1, static_params=1, theta=0.9)


def make_routing(expert, token_id, layer=0) -> pd.DataFrame:
    return pd.DataFrame({"run": "a", "domain": "c4", "document": 0, "token_id": token_id, "layer": layer, "label": 0, "expert": expert})


class TestInformation:
    def test_by_hand(self):
        """Two ids, each always with its own expert: one bit of entropy, all of it told by the id."""
        row = usage_information(make_routing([0, 0, 3, 3] * 50, [7, 7, 9, 9] * 50), experts=4, fractions=FRACTIONS).iloc[0]
        assert row[["entropy", "mutual_information", "active_mlp_fraction"]].tolist() == pytest.approx([1, 1, 0.625])
        assert row["shuffled"] == pytest.approx(1 / (2 * 200 * np.log(2)), abs=0.005)  # the bias of one degree of freedom
        assert (row["tokens"], row["experts"]) == (200, 4)

    def test_agrees_with_a_loop_over_pairs(self):
        rng = np.random.default_rng(0)
        token = rng.integers(12, size=500)
        expert = np.where(rng.random(500) < 0.5, token % 4, rng.integers(4, size=500))
        found = usage_information(make_routing(expert, token), experts=4).iloc[0]
        value = 0.0
        for t in range(12):
            for e in range(4):
                joint = np.mean((token == t) & (expert == e))
                value += joint * np.log2(joint / (np.mean(token == t) * np.mean(expert == e))) if joint else 0.0
        assert found["mutual_information"] == pytest.approx(value)
        assert found["information"] == pytest.approx(value - found["shuffled"])

    def test_random_experts_have_entropy_but_no_information(self):
        rng = np.random.default_rng(1)
        token = rng.zipf(1.3, 6000) % 2000  # many rare ids: the plug-in value is far from 0
        row = usage_information(make_routing(rng.integers(4, size=6000), token), experts=4).iloc[0]
        assert row["entropy"] == pytest.approx(2, abs=0.01)
        assert row["mutual_information"] > 0.1
        assert row["information"] == pytest.approx(0, abs=0.01)

    def test_a_collapsed_layer_and_the_mean_over_layers(self):
        routing = pd.concat([make_routing([3] * 40, range(40)), make_routing([0, 3] * 20, [1, 2] * 20, layer=5)])
        frame = usage_information(routing, experts=4).set_index("layer")
        assert frame.loc[0, ["entropy", "mutual_information", "information"]].tolist() == [0, 0, 0]
        assert frame.loc["all", "entropy"] == pytest.approx(0.5)
        assert frame.loc["all", "tokens"] == 80

    def test_impossible_input_is_named(self):
        with pytest.raises(InputError, match=r"expert 3 .* experts = 2"):
            usage_information(make_routing([3], [0]), experts=2)
        with pytest.raises(InputError, match="shuffles = 0"):
            usage_information(make_routing([1], [0]), experts=2, shuffles=0)


class TestCollapse:
    def test_runs_are_stacked_under_their_settings(self):
        usage = expert_usage(make_routing([0, 3, 3, 3], [0] * 4), theta=0.9, experts=4)
        table = stack_runs({(0, "none", 1): usage, (1.0, "straight_through", 0): usage.assign(share=0.25)})
        assert list(table.columns) == ["lambda_router", "router_gradient", "seed", "layer", "expert", "share", "tokens"]
        assert table.iloc[3].tolist() == [0.0, "none", 1, 0, 3, 0.75, 3]
        assert table.iloc[4, :3].tolist() == [1.0, "straight_through", 0]
        with pytest.raises(InputError, match="must be"):
            stack_runs({"none": usage})
        with pytest.raises(InputError, match="no frames"):
            stack_runs({})

    def test_the_rule(self):
        counts = {0: (0, 0, 1, 99), 1: (0, 0, 2, 98), 2: (100, 0, 0, 0)}
        parts = [make_routing(np.repeat(range(4), count), [0] * 100, layer) for layer, count in counts.items()]
        table = stack_runs({(0, "none", 0): expert_usage(pd.concat(parts), theta=0.9, experts=4)})
        strict = collapsed_layers(table)
        assert strict["collapsed"].tolist() == [True, False, True]
        assert strict["expert"].tolist() == [3, 3, 0]
        assert strict["tokens"].tolist() == [100] * 3
        assert collapsed_layers(table, threshold=0.95)["collapsed"].all()
        with pytest.raises(InputError, match="threshold = 99"):
            collapsed_layers(table, threshold=99)


def make_sweep(settings, values, *, axis="dynamoe.importance", **columns) -> pd.DataFrame:
    frame = pd.DataFrame({"cell": range(len(values)), axis: settings, "value": values, **columns})
    base = {"mode": "router", "metric": "perplexity_ratio", "n": 25, "active_mlp_fraction": 0.6, "status": "ok"}
    frame = frame.assign(**{name: value for name, value in base.items() if name not in columns})
    return frame.assign(low=frame["value"] * 0.9, high=frame["value"] * 1.1)


class TestAblation:
    def test_numbers_are_sorted_and_names_keep_their_order(self):
        table = ablation_table(make_sweep([1.0, 0.05, 0.2], [1.0, 2.0, 3.0], axis="lambda"), axis="lambda")
        assert table["number"].tolist() == [0.05, 0.2, 1]
        assert table["value"].tolist() == pytest.approx([2, 3, 1])
        table = ablation_table(make_sweep(["random", "abs"], [1.0, 2.0]), axis="dynamoe.importance")
        assert table["setting"].tolist() == ["random", "abs"]
        assert table["number"].isna().all()
        assert set(table["facet"]) == {""}

    def test_what_goes_with_the_axis_is_no_axis_of_its_own(self):
        sweep = make_sweep(["router", "0", "1"], [1.0, 2.0, 3.0], axis="dynamoe.train_route")
        sweep["dynamoe.lambda_router"] = [1.0, 0.0, 0.0]
        table = ablation_table(sweep, axis="dynamoe.train_route")
        assert len(table) == 3
        assert set(table["facet"]) == {""}
        assert set(ablation_table(sweep, axis="dynamoe.lambda_router")["facet"]) == {"router", "0", "1"}

    def test_an_axis_that_is_none_is_refused(self):
        with pytest.raises(InputError, match=r"axis 'mode' is no field that the sweep varies; it has dynamoe\.importance"):
            ablation_table(make_sweep(["a", "b"], [1.0, 2.0]), axis="mode")

    def test_numbers_that_agree_in_six_digits_stay_apart(self):
        table = ablation_table(
            make_sweep([1_048_576, 1_048_580], [2.0, 1.5], axis="data.calibration_tokens"), axis="data.calibration_tokens"
        )
        assert table["setting"].tolist() == ["1048576", "1048580"]
        assert table["seeds"].tolist() == [1, 1]

    def test_less_compute_is_the_better_compute(self):
        table = ablation_table(
            make_sweep([0.8, 0.9], [0.4, 0.7], axis="dynamoe.theta", metric="active_mlp_fraction"),
            axis="dynamoe.theta",
            metric="active_mlp_fraction",
        )
        assert rank_settings(table).best["setting"] == "0.8"

    def test_lists_read_the_same_from_memory_and_from_csv(self, tmp_path):
        sweep = make_sweep([[0.5, 1.0], [0.25, 0.5, 1.0]], [1.0, 2.0], axis="dynamoe.experts")
        sweep.to_csv(tmp_path / "sweep.csv", index=False)
        texts = [
            ablation_table(frame, axis="dynamoe.experts")["setting"].tolist() for frame in (sweep, pd.read_csv(tmp_path / "sweep.csv"))
        ]
        assert texts[0] == texts[1] == ["[0.5, 1]", "[0.25, 0.5, 1]"]
        assert [setting_text(value) for value in (1e-5, 4, True, None, "0.10", "label", (1, 2))] == [
            "1e-05", "4", "true", "none", "0.1", "label", "[1, 2]",
        ]  # fmt: skip

    def test_seeds_are_replicates(self):
        sweep = make_sweep(["a", "a", "b"], [1.0, 4.0, 3.0], **{"train.seed": [0, 1, 0]})
        table = ablation_table(sweep, axis="dynamoe.importance").set_index("setting")
        assert table.loc["a", ["value", "low", "high", "seeds"]].tolist() == pytest.approx([2.0, 0.9, 4.4, 2])
        assert table.loc["b", "seeds"] == 1

    def test_a_second_axis_is_a_facet_and_a_third_is_refused(self):
        sweep = make_sweep(["a", "b", "a", "b"], [1.0, 2.0, 3.0, 4.0], **{"theta": [0.8, 0.8, 0.9, 0.9]})
        table = ablation_table(sweep, axis="dynamoe.importance")
        assert table.groupby("facet")["value"].first().to_dict() == pytest.approx({"0.8": 1, "0.9": 3})
        assert set(table["facet_axis"]) == {"theta"}
        with pytest.raises(InputError, match=r"besides dynamoe.importance the sweep varies theta, width; filter it"):
            ablation_table(sweep.assign(width=[1, 2, 3, 4]), axis="dynamoe.importance")

    def test_failed_cells_are_left_out(self):
        sweep = make_sweep(["a", "b"], [1.0, np.nan], status=["ok", "failed"])
        assert ablation_table(sweep.assign(mode=[1.0, np.nan]), axis="dynamoe.importance")["mode"].tolist() == ["1"]
        assert ablation_table(sweep, axis="dynamoe.importance")["setting"].tolist() == ["a"]
        with pytest.raises(InputError, match="every cell failed"):
            ablation_table(sweep.assign(status="failed"), axis="dynamoe.importance")
        with pytest.raises(InputError, match="no values of metric 'acc'; the sweep has perplexity_ratio"):
            ablation_table(sweep, axis="dynamoe.importance", metric="acc")

    def test_ranking_follows_the_intervals(self):
        ranking = rank_settings(ablation_table(make_sweep(["a", "b", "c"], [1.0, 1.1, 3.0]), axis="dynamoe.importance"))
        assert (ranking.best["setting"], ranking.worst["setting"], ranking.apart) == ("a", "c", True)
        assert ranking.near["setting"].tolist() == ["b"]
        accuracy = make_sweep(["a", "b"], [0.5, 0.7], metric="router_accuracy")
        assert rank_settings(ablation_table(accuracy, axis="dynamoe.importance", metric="router_accuracy")).best["setting"] == "b"
        unknown = make_sweep(["a", "b"], [1.0, 9.0]).assign(low=np.nan, high=np.nan)
        assert not rank_settings(ablation_table(unknown, axis="dynamoe.importance")).apart
