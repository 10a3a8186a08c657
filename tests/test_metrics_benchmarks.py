"""Statistics of benchmark scores against closed forms, scipy and simulation."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from benchmark_frames import PARAMS, TASKS, make_documents, make_scores
from scipy import stats

from dynamoe_lab.analysis import benchmark_deltas, benchmark_points, benchmark_table, paper_table, relative_table, split_note, told_apart
from dynamoe_lab.analysis.metrics.benchmarks import benchmark_task
from dynamoe_lab.analysis.pairing import TaskMeans, detectable_change, detectable_mean, holm, mcnemar, stratified_means
from dynamoe_lab.errors import InputError


def of(documents: pd.DataFrame, run: str) -> pd.DataFrame:
    return documents[documents["run"] == run]


def values(documents: pd.DataFrame, run: str, task: str, metric: str = "acc") -> np.ndarray:
    return documents.query("run == @run and task == @task and metric == @metric").sort_values("doc_id")["value"].to_numpy()


class TestMcNemar:
    @pytest.mark.parametrize(("b", "c"), [(0, 0), (3, 3), (0, 5), (9, 2), (1, 14)])
    def test_closed_form(self, b, c):
        tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
        assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * tail))

    def test_holm_by_hand(self):
        # 0.01 * 3, 0.03 * 2, 0.04 * 1 but not below the one before it; nan is no test
        assert holm([0.04, 0.01, np.nan, 0.03]) == pytest.approx([0.06, 0.03, np.nan, 0.06], nan_ok=True)
        assert holm([0.9, 0.8]) == pytest.approx([1, 1])

    def test_holm_keeps_the_familywise_error(self):
        p = np.random.default_rng(0).random((4000, 7))
        assert np.mean([(holm(row) < 0.05).any() for row in p]) == pytest.approx(0.05, abs=0.012)


class TestDetectable:
    @pytest.mark.parametrize(("n", "discordant"), [(40, 0.3), (200, 0.1), (200, 0.02), (1000, 0.15)])
    def test_power_by_simulation(self, n, discordant):
        """Documents are drawn, tested with scipy's own binomial test: four in five samples find the difference."""
        difference = detectable_change(n, discordant)
        share = max(discordant, difference)
        rng = np.random.default_rng(1)
        counts = rng.multinomial(n, [(share + difference) / 2, (share - difference) / 2, 1 - share], size=4000)
        pairs, times = np.unique(counts[:, :2], axis=0, return_counts=True)
        found = [b + c > 0 and stats.binomtest(int(b), int(b + c)).pvalue <= 0.05 for b, c in pairs]
        assert times[found].sum() / 4000 == pytest.approx(0.8, abs=0.025)

    def test_large_samples_are_the_textbook_formula(self):
        """Connor 1987: sqrt(n) d = 1.96 sqrt(s) + 0.84 sqrt(s - d^2); the exact test needs a little more."""
        n, share = 20_000, 0.1
        d = detectable_change(n, share)
        normal = (stats.norm.ppf(0.975) * math.sqrt(share) + stats.norm.ppf(0.8) * math.sqrt(share - d * d)) / math.sqrt(n)
        assert normal <= d <= 1.03 * normal

    def test_five_discordant_documents_are_never_enough(self):
        """Two-sided, five of five gives p = 1/16."""
        assert np.isnan(detectable_change(5, 0.5))
        assert detectable_change(6, 0.0) == pytest.approx(0.8 ** (1 / 6), abs=1e-4)  # all six must be discordant
        assert detectable_change(100, 0.05) > detectable_change(400, 0.05) > detectable_change(400, 0.01)
        with pytest.raises(InputError, match="give documents and a share"):
            detectable_change(10, 1.5)

    def test_means_by_simulation(self):
        rng, n, spread = np.random.default_rng(2), 30, 0.7
        true = detectable_mean(spread / math.sqrt(n), n)
        drawn = rng.normal(true, spread, (6000, n))
        assert (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.02)
        assert np.isnan(detectable_mean(0.0, 30))
        assert np.isnan(detectable_mean(0.1, 2))


class TestStratified:
    def test_interval_is_that_of_the_standard_error(self):
        """Large tasks: the bootstrap of a mean over tasks is normal, with variance sum(var / n) / tasks^2."""
        rng = np.random.default_rng(3)
        pairs = [((rng.random(n) < p).astype(float), (rng.random(n) < q).astype(float)) for n, p, q in ((900, 0.5, 0.6), (400, 0.3, 0.35))]
        found = stratified_means(pairs, resamples=40_000)
        assert isinstance(found, TaskMeans)
        value = np.mean([a.mean() - b.mean() for a, b in pairs])
        error = math.sqrt(sum(np.var(a - b) / len(a) for a, b in pairs)) / 2
        assert found.difference == pytest.approx((value, value - 1.966 * error, value + 1.966 * error), abs=0.06 * error)
        assert found.n == 1300
        means = [np.mean([pair[side].mean() for pair in pairs]) for side in (0, 1)]
        assert found.relative[0] == pytest.approx(means[0] / means[1] - 1)

    def test_agrees_with_scipys_bootstrap(self):
        rng = np.random.default_rng(4)
        one, other = rng.gamma(2, 1, 300), rng.gamma(2, 1, 300)
        own = stratified_means([(one, other)], resamples=8000)
        draws = {"paired": True, "vectorized": True, "n_resamples": 8000, "method": "percentile", "rng": 5}
        for (value, low, high), statistic in (
            (own.difference, lambda a, b, axis: a.mean(axis) - b.mean(axis)),
            (own.relative, lambda a, b, axis: a.mean(axis) / b.mean(axis) - 1),
        ):
            theirs = stats.bootstrap((one, other), statistic, **draws).confidence_interval
            assert value == pytest.approx(statistic(one, other, 0))
            assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.06 * (high - low))

    def test_coverage_of_the_average(self):
        """Seven tasks of 60 documents: the interval covers the true difference about 95 times in 100."""
        rng, covered, wanted = np.random.default_rng(6), 0, np.linspace(-0.02, -0.08, 7)
        for _ in range(400):
            pairs = []
            for change in wanted:
                kind = rng.choice(3, size=60, p=[(0.2 + change) / 2, (0.2 - change) / 2, 0.8])  # better, worse, alike
                pairs.append(((kind == 0).astype(float), (kind == 1).astype(float)))
            _, low, high = stratified_means(pairs, resamples=500).difference
            covered += low <= wanted.mean() <= high
        assert covered / 400 == pytest.approx(0.95, abs=0.03)

    def test_an_end_at_zero_is_zero(self):
        """Means of tasks of 30 documents add up to float dust around 0, which would be called a difference."""
        ends = []
        for seed in range(300):
            rng = np.random.default_rng(seed)
            pairs = [((rng.random(30) < 0.45).astype(float), (rng.random(30) < 0.55).astype(float)) for _ in range(3)]
            ends += stratified_means(pairs, resamples=200, seed=seed).difference[1:]
        assert any(end == 0 for end in ends), "some interval ends at 0"
        assert not any(0 < abs(end) < 1e-9 for end in ends)

    def test_nothing_that_varies_has_no_interval(self):
        same = np.array([1.0, 0.0, 1.0])
        assert np.isnan(stratified_means([(same, same)]).difference[1:]).all()
        assert np.isnan(stratified_means([(same[:2], 1 - same[:2])]).difference[1:]).all()
        assert np.isnan(stratified_means([(same, 0 * same)]).relative).all()


class TestDeltas:
    documents = make_documents(60)

    def test_every_row_by_hand(self):
        deltas = benchmark_deltas(of(self.documents, "router"), of(self.documents, "dense")).set_index("task")
        assert list(deltas.index) == [*TASKS, "average", "average4"]
        for task in TASKS:
            own, base = values(self.documents, "router", task), values(self.documents, "dense", task)
            row = deltas.loc[task]
            b, c = ((own == 1) & (base == 0)).sum(), ((own == 0) & (base == 1)).sum()
            assert row[["value", "reference_value", "difference"]].tolist() == pytest.approx([own.mean(), base.mean(), (own - base).mean()])
            assert row[["only_run", "only_reference", "n", "seeds"]].tolist() == [b, c, 60, 1]
            assert row["mcnemar_p"] == pytest.approx(stats.binomtest(b, b + c).pvalue if b + c else 1.0)
            assert row["detectable"] == pytest.approx(detectable_change(60, (b + c) / 60, level=0.05 / 7), nan_ok=True)
            assert row["relative"] == pytest.approx(own.mean() / base.mean() - 1)
        assert deltas.loc[list(TASKS), "holm_p"].to_numpy() == pytest.approx(holm(deltas.loc[list(TASKS), "mcnemar_p"]))
        for name, tasks in (("average", TASKS), ("average4", TASKS[:4])):
            assert deltas.loc[name, "difference"] == pytest.approx(deltas.loc[list(tasks), "difference"].mean())
            assert deltas.loc[name, "n"] == 60 * len(tasks)
            assert np.isnan(deltas.loc[name, ["mcnemar_p", "holm_p", "only_run"]].astype(float)).all()
        assert (deltas["low"].dropna() <= deltas["difference"][deltas["low"].notna()]).all()

    def test_what_is_detectable_is_told_apart(self):
        """By simulation: a difference of that size in one of four tasks, the others alike, passes Holm's correction four times in five."""
        n, share = 150, 0.3
        base, same = np.arange(n) % 2.0, np.arange(n) % 2.0
        changed = base.copy()
        changed[: int(share * n)] = 1 - changed[: int(share * n)]
        table = lambda run, columns: pd.concat(  # noqa: E731
            pd.DataFrame({"run": run, "task": task, "doc_id": range(n), "metric": "acc", "value": column})
            for task, column in columns.items()
        )
        names = ("piqa", "sciq", "hellaswag", "winogrande")
        deltas = benchmark_deltas(
            table("router", dict.fromkeys(names, same) | {"piqa": changed}), table("dense", dict.fromkeys(names, base))
        )
        d = deltas.set_index("task").loc["piqa", "detectable"]
        assert d > detectable_change(n, share)
        counts = np.random.default_rng(0).multinomial(n, [(share + d) / 2, (share - d) / 2, 1 - share], size=3000)
        found = [holm([mcnemar(b, c), 1.0, 1.0, 1.0])[0] < 0.05 for b, c, _ in counts]
        assert np.mean(found) == pytest.approx(0.8, abs=0.03)

    def test_an_averaged_reference_is_not_tested(self):
        """Of several seeds a document can be half right, which McNemar's test does not know."""
        reference = of(self.documents, "dense")
        seeds = pd.concat([reference.assign(seed=0), of(make_documents(60, seed=1), "dense").assign(seed=1)])
        deltas = benchmark_deltas(of(self.documents, "router"), seeds)
        assert deltas[["mcnemar_p", "holm_p", "only_run"]].isna().all(axis=None)
        twice = pd.concat([reference.assign(seed=seed) for seed in (0, 1)])
        assert benchmark_deltas(of(self.documents, "router"), twice)["holm_p"].notna().sum() == 7

    def test_other_texts_under_the_same_numbers_are_refused(self):
        documents = self.documents.assign(digest=self.documents["task"] + self.documents["doc_id"].astype(str))
        ours, reference = of(documents, "router"), of(documents, "dense")
        pd.testing.assert_frame_equal(
            benchmark_deltas(ours, reference), benchmark_deltas(of(self.documents, "router"), of(self.documents, "dense"))
        )
        changed = reference.assign(digest=reference["digest"].where((reference["task"] != "sciq") | (reference["doc_id"] > 3), "other"))
        with pytest.raises(
            InputError, match=r"^benchmark_deltas: task sciq: 4 of 60 documents differ in text between run 'router' and the"
        ):
            benchmark_deltas(ours, changed)
        with pytest.raises(InputError, match="task sciq: 4 of 60 documents differ in text"):
            benchmark_deltas(changed.assign(run="router"), reference)
        benchmark_deltas(ours, changed.drop(columns="digest"))  # of earlier tables nothing is known
        benchmark_deltas(ours, changed.assign(digest=changed["digest"].where(changed["digest"] != "other")))

    def test_order_of_rows_does_not_matter(self):
        shuffled = self.documents.sample(frac=1, random_state=0)
        one, other = (benchmark_deltas(of(frame, "router"), of(frame, "dense")) for frame in (self.documents, shuffled))
        pd.testing.assert_frame_equal(one, other)

    def test_numbers_per_document_have_no_mcnemar(self):
        deltas = benchmark_deltas(of(self.documents, "router"), of(self.documents, "dense"), metric="bits_per_byte").set_index("task")
        assert deltas["mcnemar_p"].isna().all()
        own, base = (values(self.documents, run, "piqa", "bits_per_byte") for run in ("router", "dense"))
        test = stats.ttest_rel(own, base).confidence_interval()
        assert deltas.loc["piqa", ["low", "high"]].tolist() == pytest.approx([test.low, test.high], abs=0.15 * (test.high - test.low))
        assert told_apart(deltas).tolist() == ((deltas["low"] > 0) | (deltas["high"] < 0)).tolist()

    def test_the_exact_test_decides_about_tasks(self):
        """Five documents, all the same way: the bootstrap interval leaves 0 out, the exact p is 1/16."""
        base, own = np.ones(40), np.ones(40)
        own[:5] = 0
        frame = lambda run, column: pd.DataFrame({"run": run, "task": "piqa", "doc_id": range(40), "metric": "acc", "value": column})  # noqa: E731
        deltas = benchmark_deltas(frame("router", own), frame("dense", base))
        assert deltas["high"].item() < 0
        assert deltas["mcnemar_p"].item() == pytest.approx(2 / 2**5)
        assert told_apart(deltas).tolist() == [False]

    def test_seeds_are_averaged_by_document(self):
        other = make_documents(60, {"dense": 0.0, "router": 0.1}, seed=0)
        seeds = pd.concat([of(self.documents, "router").assign(seed=0), of(other, "router").assign(seed=1)])
        deltas = benchmark_deltas(seeds, of(self.documents, "dense")).set_index("task")
        each = [(values(docs, "router", "sciq") - values(self.documents, "dense", "sciq")).mean() for docs in (self.documents, other)]
        row = deltas.loc["sciq"]
        assert row[["difference", "seed_low", "seed_high", "seeds"]].tolist() == pytest.approx([np.mean(each), min(each), max(each), 2])
        assert np.isnan(row["mcnemar_p"])

    def test_other_documents_are_refused(self):
        ours, reference = of(self.documents, "router"), of(self.documents, "dense")
        fewer = reference[~((reference["task"] == "sciq") & (reference["doc_id"] >= 50))]
        with pytest.raises(InputError, match=r"task sciq: the documents differ \(60 in run 'router', 50 in the reference, 50 in both\)"):
            benchmark_deltas(ours, fewer)
        with pytest.raises(InputError, match=r"task piqa: .*\(60 in run 'router', 0 in the reference, 0 in both\)"):
            benchmark_deltas(ours, reference[reference["task"] != "piqa"])
        with pytest.raises(InputError, match=r"task piqa: .*\(0 in run 'router', 60 in the reference, 0 in both\)"):
            benchmark_deltas(ours[ours["task"] != "piqa"], reference)
        with pytest.raises(InputError, match="no rows of metric 'acc_norm'; the frame has acc, bits_per_byte"):
            benchmark_deltas(ours, reference, metric="acc_norm")
        with pytest.raises(InputError, match="document 0 twice in run 'router'"):
            benchmark_deltas(pd.concat([ours, ours]), reference)
        with pytest.raises(InputError, match="acc is not finite"):
            benchmark_deltas(ours.assign(value=np.nan), reference)
        with pytest.raises(InputError, match="the frame holds 2 runs"):
            benchmark_deltas(ours, self.documents)


class TestScores:
    scores = make_scores(make_documents(50))

    def test_points_have_wilsons_intervals_and_chance(self):
        points = benchmark_points(self.scores).set_index(["run", "task"])
        row, z = points.loc[("dense", "piqa")], stats.norm.ppf(0.975)
        p = row["value"]
        middle, half = (p + z * z / 100) / (1 + z * z / 50), z * math.sqrt(p * (1 - p) / 50 + z * z / 10_000) / (1 + z * z / 50)
        assert row[["low", "high"]].tolist() == pytest.approx([middle - half, middle + half])
        assert points.loc["dense", "chance"].tolist() == pytest.approx([0.25, 0, 0.5, 0.5, 0.25, 0.25, 0.25, 2 / 7])
        mean, own = points.loc[("router", "average")], points.loc["router"].drop("average")["value"]
        error = z * math.sqrt((own * (1 - own) / 50).sum()) / 7
        assert mean[["value", "low", "high", "n"]].tolist() == pytest.approx([own.mean(), own.mean() - error, own.mean() + error, 350])

    def test_other_metrics_use_their_error(self):
        points = benchmark_points(self.scores, metric="bits_per_byte")
        rows = self.scores[self.scores["metric"] == "bits_per_byte"].merge(points, on=["run", "task"])
        assert len(rows) == 14
        assert (rows["high"] - rows["low"]).to_numpy() == pytest.approx(2 * stats.norm.ppf(0.975) * rows["stderr"].to_numpy())
        assert points["chance"].isna().all()

    def test_table_in_the_papers_order(self):
        table = benchmark_table(self.scores).set_index("run")
        names = ["arc_easy", "lambada_openai", "piqa", "winogrande", "average4", "sciq", "hellaswag", "arc_challenge", "average7"]
        assert list(table.columns) == ["metric", "active_params", *names, "n", "note"]
        acc = self.scores.query("metric == 'acc' and run == 'router'").set_index("task")["value"]
        assert table.loc["router", list(TASKS)].tolist() == pytest.approx(acc[list(TASKS)].tolist())
        assert table.loc["router", "average4"] == pytest.approx(acc[list(TASKS[:4])].mean())
        assert table.loc["router", "average7"] == pytest.approx(acc.mean())
        assert table.loc["router", "active_params"] == pytest.approx(PARAMS["router"] + 3e5)  # 0 to 6 times 1e5
        assert "ARC-easy, SciQ and ARC-challenge: validation (stock: test)" in table.loc["dense", "note"]
        few = benchmark_table(self.scores[self.scores["task"].isin(TASKS[:4])]).iloc[0]
        assert np.isfinite(few["average4"])
        assert np.isnan(few["average7"])

    def test_two_rows_of_one_run_and_task_are_refused(self):
        with pytest.raises(InputError, match="several rows of run 'dense' and task arc_easy"):
            benchmark_table(pd.concat([self.scores, self.scores]))

    def test_split_note(self):
        assert split_note(self.scores) == (
            "ARC-easy, SciQ and ARC-challenge: validation (stock: test); LAMBADA: test (line breaks are spaces)"
        )
        assert split_note(self.scores[self.scores["task"] == "piqa"]) == ""
        assert split_note(pd.DataFrame({"task": ["piqa"]})) == ""
        assert benchmark_task("gsm8k").label == "gsm8k"
        assert np.isnan(benchmark_task("gsm8k").chance)


class TestPaper:
    def test_averages_are_those_of_the_tasks(self):
        """As printed, to a digit: the paper rounds down here and there."""
        table = paper_table()
        for name, tasks in (("average4", TASKS[:4]), ("average7", TASKS)):
            rows = table[table[name].notna()]
            assert (rows[list(tasks)].mean(axis=1) - rows[name]).abs().max() < 0.0011
        assert table["average7"].notna().sum() == 4

    def test_changes_by_hand(self):
        table = paper_table().set_index("model")
        assert table.loc["DynaMoE θ=0.9", "arc_easy_change"] == pytest.approx(75.0 / 80.2 - 1)
        assert table.loc["DynaMoE θ=0.7", "average7_change"] == pytest.approx(64.0 / 74.2 - 1)
        assert table.loc["DynaMoE θ=0.8", "active_params_change"] == pytest.approx(5.1 / 7 - 1)
        assert table.loc["Flextron", "piqa_change"] == pytest.approx(76.1 / 77.5 - 1)
        assert table.loc["Flextron", "active_params_change"] == pytest.approx(4.1 / 6.5 - 1)
        assert (table.loc[["Mistral-7B", "Llama2-7B"], "average4_change"] == 0).all()

    def test_ours_beside_the_papers(self):
        documents = make_documents(60)
        deltas = benchmark_deltas(of(documents, "router"), of(documents, "dense"))
        relative = relative_table(deltas, paper_table(), active=benchmark_table(make_scores(documents)))
        ours = relative[relative["source"] == "ours"].set_index("task")
        assert set(ours.index) == {*TASKS, "average4", "average7"}
        by_task = deltas.set_index("task")
        assert (
            ours.loc["sciq", ["change", "low", "high"]].tolist()
            == by_task.loc["sciq", ["relative", "relative_low", "relative_high"]].tolist()
        )
        assert ours.loc["average7", "change"] == by_task.loc["average", "relative"]
        assert ours["params_share"].to_numpy() == pytest.approx(113.3e6 / 135e6)
        assert ours.loc["piqa", "floor"] == pytest.approx(0.5 / by_task.loc["piqa", "reference_value"] - 1)
        paper = relative[relative["source"] == "paper"].set_index(["model", "task"])
        assert set(paper.index.get_level_values(0)) == {"DynaMoE θ=0.9", "DynaMoE θ=0.8", "DynaMoE θ=0.7", "Flextron"}
        assert paper.loc[("DynaMoE θ=0.9", "hellaswag"), "change"] == pytest.approx(57.9 / 61.4 - 1)
        assert paper.loc[("DynaMoE θ=0.9", "hellaswag"), "floor"] == pytest.approx(25 / 61.4 - 1)
        assert ("Flextron", "average7") not in paper.index

    def test_relative_to_a_base_that_has_nothing_right_there_is_no_change(self):
        documents = make_documents(20)
        documents.loc[(documents["task"] == "piqa") & (documents["run"] == "dense") & (documents["metric"] == "acc"), "value"] = 0.0
        deltas = benchmark_deltas(of(documents, "router"), of(documents, "dense"))
        relative = relative_table(deltas, paper_table(), active=benchmark_table(make_scores(documents)))
        row = relative[(relative["source"] == "ours") & (relative["task"] == "piqa")].iloc[0]
        assert np.isnan(row[["change", "low", "high", "floor"]].astype(float)).all()

    def test_the_base_must_be_there(self):
        documents = make_documents(20)
        deltas = benchmark_deltas(of(documents, "router"), of(documents, "dense"))
        active = benchmark_table(of(make_scores(documents), "router"))
        with pytest.raises(InputError, match="active has no row of dense; it has router"):
            relative_table(deltas, paper_table(), active=active)

    def test_an_average_of_other_tasks_is_not_called_the_papers(self):
        for tasks, name in ((TASKS[:4], "average4"), (TASKS[:3], "average"), (TASKS, "average7")):
            documents = make_documents(20, tasks=tasks)
            deltas = benchmark_deltas(of(documents, "router"), of(documents, "dense"))
            relative = relative_table(deltas, paper_table(), active=benchmark_table(make_scores(documents)))
            assert name in set(relative.loc[relative["source"] == "ours", "task"])


def test_missing_columns_are_named():
    for function, frame in itertools.product((benchmark_points, benchmark_table), (pd.DataFrame({"run": ["a"]}),)):
        with pytest.raises(InputError, match=rf"{function.__name__}: the frame lacks the column\(s\) task"):
            function(frame)
