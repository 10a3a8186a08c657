"""The pictures of the studies say what their frames say: marks, lines, cells and titles are read back from the figures."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from matplotlib.text import Text
from test_plots import FRACTIONS, cells, close_figures, frames, make_pareto, make_sweep, routing, texts, title  # noqa: F401

from dynamoe_lab.analysis import plots, style
from dynamoe_lab.analysis.plots.placing import place_labels
from dynamoe_lab.errors import InputError


def single_marks(ax) -> list:
    """Lines that are one mark; not the caps of whiskers."""
    return [line for line in ax.get_lines() if len(line.get_xdata()) == 1 and line.get_marker() not in ("_", "")]


def marks(ax, color) -> list[tuple[float, float]]:
    """Single marks of a colour, in the order drawn."""
    lines = [line for line in single_marks(ax) if same_color(line.get_markeredgecolor(), color)]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]


class TestLabelShare:
    def test_bars_heatmap_and_lines(self, frames):  # noqa: F811
        shares = frames["shares"]
        figure = plots.plot_label_share(shares, theta=0.81)  # the nearest in the frame is 0.8
        bars, areas, grid, lines = figure.axes[:4]
        theta = 0.8
        later = shares[(shares["place"] == "later tokens") & np.isclose(shares["theta"], theta)]
        assert bars.get_title(loc="left") == "labels at θ = 0.8"
        heights = np.array([bar.get_height() for bar in bars.patches]).reshape(4, 5)
        expected = later[later["layer"] != "all"].pivot(index="label", columns="layer", values="share").to_numpy(dtype=float)
        assert heights == pytest.approx(expected)
        assert np.allclose([bar.get_facecolor()[:3] for bar in bars.patches[::5]], style.expert_colors(4))
        mean = shares.assign(work=shares["share"] * shares["fraction"])
        single = mean[(mean["layer"] != "all") & (mean["place"] == "later tokens")]
        table = single.pivot_table(index="theta", columns="layer", values="work", aggfunc="sum").to_numpy()
        assert cells(grid) == pytest.approx(table)
        assert grid.get_ylim() == (0, 10)  # θ upwards
        pooled = mean[mean["layer"] == "all"]
        for line, place in zip(lines.get_lines(), ("later tokens", "first token"), strict=False):
            own = pooled[pooled["place"] == place].groupby("theta")["work"].sum()
            assert line.get_ydata() == pytest.approx(own.to_numpy())
        assert len(areas.collections) == 4
        at = pooled[(pooled["place"] == "later tokens") & np.isclose(pooled["theta"], theta)]["work"].sum()
        assert title(figure).startswith(f"At θ = 0.8 labels ask for {100 * at:.0f} % of the MLP")

    def test_several_domains_are_refused(self, frames):  # noqa: F811
        with pytest.raises(InputError, match="several domains"):
            plots.plot_label_share(pd.concat([frames["shares"], frames["shares"].assign(domain="code")]), theta=0.8)


class TestDifficulty:
    def test_bins_and_correlations(self, frames):  # noqa: F811
        bins = frames["bins"]
        figure = plots.plot_difficulty_vs_surprisal(bins, correlations=frames["correlations"])
        for ax, name in zip(figure.axes, ("surprisal", "next_surprisal", "log_frequency", "position"), strict=True):
            rows = bins[(bins["covariate"] == name) & (bins["bin"] > 0)]
            line = ax.get_lines()[0]
            assert line.get_xdata() == pytest.approx(rows["center"].to_numpy())
            assert line.get_ydata() == pytest.approx(rows["difficulty"].to_numpy())
            rho = frames["correlations"].set_index("covariate").loc[name]
            assert ax.get_title(loc="left").startswith(
                f"Spearman {rho['spearman']:+.2f} (".replace("-0.00", "0.00").replace("+0.00", "0.00")
            )
        first = bins[(bins["covariate"] == "position") & (bins["bin"] == 0)]["difficulty"].item()
        assert texts(figure.axes[3]) == [f"position 0: {100 * first:.0f} %"]
        assert "a token's difficulty goes most with its" in title(figure)  # surprisal and position are made to rise together
        assert "590 tokens, 20 documents" in title(figure)

    def test_no_correlation_beyond_its_interval_is_not_told_as_one(self, frames):  # noqa: F811
        weak = frames["correlations"].assign(low=-0.1, high=0.1)
        assert "none of these beyond its interval" in title(plots.plot_difficulty_vs_surprisal(frames["bins"], correlations=weak))

    def test_by_domain(self, frames):  # noqa: F811
        means = frames["means"]
        figure = plots.plot_difficulty_by_domain(means)
        grid, dots = figure.axes[:2]
        pooled = means[means["layer"] == "all"].sort_values("mean")
        names = [tick.get_text() for tick in grid.get_yticklabels()]
        assert names == pooled["domain"].tolist()  # the easiest on top
        table = means[means["layer"] != "all"].pivot(index="domain", columns="layer", values="mean").loc[names]
        assert cells(grid) == pytest.approx(table.to_numpy(dtype=float))
        drawn = [line for line in dots.get_lines() if line.get_marker() == "o"]
        assert [line.get_xdata()[0] for line in drawn] == pytest.approx(pooled["mean"].tolist())
        assert [line.get_color() for line in drawn] == [style.domain_colors(names)[name] for name in names]
        assert f"{100 * pooled['mean'].iloc[0]:.1f} % of the MLP on {names[0]}" in title(figure)


class TestPareto:
    def test_marks_stand_where_the_seeds_mean_is(self):
        ax = plots.plot_pareto(make_pareto(), dense_params=140e6).axes[0]
        expected = [((60 + 80 * share) / 140, np.sqrt(value * (value + 0.1))) for share, value in ((0.4, 1.9), (0.65, 1.4))]
        assert marks(ax, style.method_color("router")) == [pytest.approx(point) for point in expected]
        assert marks(ax, style.method_color("static")) == [pytest.approx(point) for point in ((100 / 140, 2.5), (120 / 140, 1.75))]
        static, router = (next(line for line in ax.get_lines() if line.get_marker() == mark) for mark in "Do")
        assert same_color(static.get_markerfacecolor(), "white")  # as converted
        assert same_color(router.get_markerfacecolor(), style.method_color("router"))
        random = next(line for line in ax.get_lines() if line.get_marker() == "X")
        assert (random.get_alpha(), router.get_alpha()) == (0.4, 1.0)  # dominated by the router
        assert ax.get_yscale() == "log"
        assert sorted(text for text in texts(ax) if text) == sorted(["0.8", "0.9"] * 3 + ["50 %", "75 %", "dense model"])

    def test_front_ends_at_the_dense_model_and_labels_are_not_on_it(self):
        figure = plots.plot_pareto(make_pareto(seeds=1), dense_params=140e6, x="active_mlp_fraction")
        ax = figure.axes[0]
        front = next(line for line in ax.get_lines() if line.get_drawstyle() == "steps-post")
        assert list(zip(*front.get_data(), strict=True)) == [pytest.approx(p) for p in ((0.4, 1.9), (0.65, 1.4), (1.0, 1.0))]
        assert "θ = 0.8 runs 40 % of the MLP neurons at 1.90 times the dense perplexity" in title(figure)
        assert "0 of 2 are dominated" in title(figure)

    def test_the_title_compares_with_the_static_cut_of_the_same_size(self):
        rows = make_pareto(seeds=1)
        router = rows[(rows["method"] == "router") & (rows["theta"] == 0.9)]
        cut = router.assign(method="static", value=1.3, active_mlp_fraction=0.71)
        figure = plots.plot_pareto(pd.concat([rows, cut]), dense_params=140e6)
        ax, message = figure.axes[0], title(figure)
        assert message.endswith(f"router and static cut of the same active parameters: θ = 0.9: {router['value'].iloc[0]:.2f} and 1.30")
        assert "71 %" in texts(ax), "a cut is known by its width, not by the θ it stands beside"

    def test_the_key_says_where_training_budgets_differ(self):
        rows = make_pareto(seeds=1)
        other = rows[(rows["method"] == "router") & (rows["theta"] == 0.9)].assign(method="tomoe p = 0.7", train_tokens=204_800)

        def names(frame: pd.DataFrame) -> set[str]:
            return {text.get_text() for text in plots.plot_pareto(frame, dense_params=140e6).legends[0].get_texts()}

        assert not any("tokens" in name for name in names(rows))
        named = names(pd.concat([rows, other]))
        assert "ToMoE, p = 0.7 (205 K tokens)" in named
        trained = rows[rows["train_tokens"] > 0]["method"].nunique()
        assert sum("tokens" in name for name in named) == trained + 1, "the others' budget stands beside it, too"

    @staticmethod
    def timed(seeds: int = 1) -> pd.DataFrame:
        """A router that saves half of what its parameters promise, static cuts that save all of it; the rest was not timed."""
        rows = make_pareto(seeds=seeds)
        share = rows["active_params"] / 140e6
        timed = rows["method"].isin(["router", "static", "dense"])
        rows["time_ratio"] = share.where(rows["method"] != "router", (1 + share) / 2).where(timed)
        return rows.assign(time_low=rows["time_ratio"] - 0.01, time_high=rows["time_ratio"] + 0.02)

    def test_measured_time_has_a_panel_of_its_own(self):
        figure = plots.plot_pareto(self.timed(), dense_params=140e6)
        counted, measured = figure.axes
        shares = [(60 + 80 * share) / 140 for share in (0.4, 0.65)]
        times = [(1 + share) / 2 for share in shares]
        assert [x for x, _ in marks(counted, style.method_color("router"))] == pytest.approx(shares)
        drawn = [line for line in single_marks(measured) if line.get_marker() == style.method_marker("router")]
        assert [line.get_xdata()[0] for line in drawn] == pytest.approx(times)
        assert [line.get_ydata()[0] for line in drawn] == pytest.approx([1.9, 1.4])
        ticks = [line for line in single_marks(measured) if line.get_marker() == "|"]
        blue = [line.get_xdata()[0] for line in ticks if same_color(line.get_color(), style.method_color("router"))]
        assert blue == pytest.approx(shares), "the share of the parameters stands beside the time"
        joined = [line.get_xdata() for line in measured.get_lines() if len(line.get_xdata()) == 2 and len(set(line.get_ydata())) == 1]
        for pair in zip(shares, times, strict=True):
            assert any(line == pytest.approx(pair) for line in map(tuple, joined))
        assert {line.get_marker() for line in single_marks(measured)} <= {"o", "D", "*", "|"}, "labels and random draws are not timed"
        ends = [tuple(path[:, 0]) for lines in measured.collections for path in lines.get_segments() if path[0, 1] == path[1, 1]]
        assert (pytest.approx(times[0] - 0.01), pytest.approx(times[0] + 0.02)) in [(low, high) for low, high in ends]
        assert counted.get_ylim() == measured.get_ylim()

    def test_in_each_panel_pale_is_what_its_own_axis_says(self):
        rows = self.timed()
        cut = rows[(rows["method"] == "static") & (rows["active_mlp_fraction"] == 0.5)].index
        rows.loc[cut, ["value", "low", "high"]] = [1.95, 1.9, 2.0]  # worse and dearer in parameters than the router at 0.8, but faster
        counted, measured = plots.plot_pareto(rows, dense_params=140e6).axes
        alpha = [
            next(line.get_alpha() for line in single_marks(ax) if line.get_marker() == "D" and line.get_ydata()[0] == 1.95)
            for ax in (counted, measured)
        ]
        assert alpha == [0.4, 1.0]

    @staticmethod
    def scored(rows: pd.DataFrame) -> pd.DataFrame:
        """With accuracies of the dense model, two routers and a static cut, whose benchmarks' tokens activate a little less."""
        scores = []
        for method, theta, share, value in (
            ("dense", np.nan, 1.0, 0.5),
            ("router", 0.8, 0.38, 0.41),
            ("router", 0.9, 0.6, 0.44),
            ("static", 0.9, 0.66, 0.43),
        ):
            place = {"method": method, "theta": theta, "seed": 0, "train_tokens": 0 if method == "dense" else 1000}
            spread = np.nan if method == "dense" else 0.05
            quality = {"metric": "average_accuracy", "value": value, "low": value - spread, "high": value + spread, "n": 175}
            told = {"tasks": 7, "chance": 2 / 7, "note": "SciQ: validation (stock: test)"}
            scores.append(place | {"active_params": 60e6 + 80e6 * share, "active_mlp_fraction": share} | quality | told)
        return pd.concat([rows, pd.DataFrame(scores)], ignore_index=True)

    def test_accuracy_has_a_panel_below_on_the_same_scale_of_parameters(self):
        figure = plots.plot_pareto(self.scored(self.timed()), dense_params=140e6)
        counted, measured, below, key = figure.axes
        assert below.get_xlim() == counted.get_xlim()
        assert below.get_ylim() != counted.get_ylim() == measured.get_ylim()
        routers = [((60 + 80 * share) / 140, value) for share, value in ((0.38, 0.41), (0.6, 0.44))]
        assert marks(below, style.method_color("router")) == [pytest.approx(point) for point in routers]
        dense = next(line for line in single_marks(below) if line.get_marker() == "*")
        assert (dense.get_xdata()[0], dense.get_ydata()[0]) == (1.0, 0.5)
        levels = [line.get_ydata()[0] for line in below.get_lines() if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2]
        assert {0.5, 2 / 7} <= set(levels), "dense and chance"
        whiskers = {tuple(path[:, 1].round(3)) for lines in below.collections for path in lines.get_segments()}
        assert whiskers == {(0.36, 0.46), (0.39, 0.49), (0.38, 0.48)}
        static = next(line for line in single_marks(below) if line.get_marker() == "D")
        assert static.get_alpha() == 0.4, "less accurate and dearer than the router"
        assert sorted(text for text in texts(below) if text) == ["0.8", "0.9", "66 %", "chance", "dense model"]
        assert below.get_title(loc="left") == "scored: 7 tasks, n = 175 documents †"
        assert texts(key)[-1] == "† SciQ: validation (stock: test)"
        assert key.get_legend() is not None
        assert "times the dense perplexity" in title(figure)

    def test_accuracy_of_one_task_read_back_from_a_csv(self, tmp_path):
        """An empty note comes back as nan."""
        rows = self.scored(make_pareto())
        own = rows["metric"] == "average_accuracy"
        rows.assign(note=rows["note"].where(~own, ""), tasks=rows["tasks"].where(~own, 1)).to_csv(tmp_path / "pareto.csv", index=False)
        figure = plots.plot_pareto(pd.read_csv(tmp_path / "pareto.csv"), dense_params=140e6)
        below = next(ax for ax in figure.axes if ax.get_title(loc="left").startswith("scored"))
        assert below.get_title(loc="left") == "scored: 1 task, n = 175 documents"
        assert not any("nan" in text.get_text() for text in figure.findobj(Text))

    def test_accuracy_without_times_and_times_without_accuracy(self):
        figure = plots.plot_pareto(self.scored(make_pareto()), dense_params=140e6, x="active_mlp_fraction")
        counted, below = figure.axes
        assert marks(below, style.method_color("router")) == [(0.38, 0.41), (0.6, 0.44)]
        assert (counted.get_xlabel(), below.get_xlabel()) == ("", "active MLP neurons (%)")
        assert figure.legends[0].get_title().get_text() == "† SciQ: validation (stock: test)"
        dense_alone = self.scored(make_pareto()).query("metric != 'average_accuracy' or method == 'dense'")
        assert len(plots.plot_pareto(dense_alone, dense_params=140e6).axes) == 1
        alone = plots.plot_pareto(self.scored(make_pareto()), dense_params=140e6, metric="average_accuracy")
        assert [ax.get_ylabel() for ax in alone.axes] == ["average accuracy (%)"]

    def test_without_times_there_is_one_panel(self):
        assert len(plots.plot_pareto(make_pareto(), dense_params=140e6).axes) == 1
        unknown = make_pareto().assign(time_ratio=np.nan, time_low=np.nan, time_high=np.nan)
        assert len(plots.plot_pareto(unknown, dense_params=140e6).axes) == 1

    def test_the_title_says_the_time_of_both(self):
        rows = self.timed()
        router = rows[(rows["method"] == "router") & (rows["theta"] == 0.9)]
        cut = router.assign(method="static", value=1.3, time_ratio=0.77)
        message = title(plots.plot_pareto(pd.concat([rows, cut]), dense_params=140e6))
        assert message.endswith("θ = 0.9: 1.40 and 1.30 at 90 % and 77 % of its time")

    def test_another_metric_is_linear_with_the_dense_models_own_level(self):
        accuracy = make_pareto(seeds=1).assign(metric="acc", value=lambda frame: 0.3 + 0.2 * frame["active_mlp_fraction"])
        ax = plots.plot_pareto(pd.concat([make_pareto(), accuracy]), dense_params=140e6, metric="acc").axes[0]
        assert ax.get_yscale() == "linear"
        assert any(np.allclose(line.get_ydata(), 0.5) for line in ax.get_lines() if line.get_linestyle() == "--")
        with pytest.raises(InputError, match="no rows of metric 'bleu'; the frame has perplexity_ratio"):
            plots.plot_pareto(make_pareto(), dense_params=140e6, metric="bleu")
        with pytest.raises(InputError, match="x = 'seconds'"):
            plots.plot_pareto(make_pareto(), dense_params=140e6, x="seconds")

    def test_labels_cover_neither_marks_nor_each_other(self):
        rows = [make_pareto(seeds=1)]
        for theta, share in ((0.7, 0.39), (0.95, 0.66), (0.99, 0.67)):  # crowded
            near = rows[0].query("method != 'static' and theta == 0.8").assign(theta=theta, active_mlp_fraction=share)
            rows.append(near.assign(active_params=60e6 + 80e6 * share, value=lambda frame: frame["value"] * 1.02))
        ax = plots.plot_pareto(pd.concat(rows), dense_params=140e6).axes[0]
        ax.figure.canvas.draw()
        boxes = [text.get_window_extent() for text in ax.texts if text.get_text() and text.get_text() != "dense model"]
        assert len(boxes) == 17
        overlaps = [(a, b) for at, a in enumerate(boxes) for b in boxes[:at] if a.overlaps(b)]
        assert not overlaps
        points = [ax.transData.transform((line.get_xdata()[0], line.get_ydata()[0])) for line in single_marks(ax)]
        assert not any(box.contains(*point) for box in boxes for point in points)
        assert all(ax.get_window_extent().contains(box.x0, box.y0) and ax.get_window_extent().contains(box.x1, box.y1) for box in boxes)


def test_labels_move_away_when_there_is_no_room_beside_the_point():
    ax = style.canvas(6, None).add_subplot()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    crowd = [(0.5 + 0.03 * np.cos(turn), 0.5 + 0.05 * np.sin(turn)) for turn in np.linspace(0, 2 * np.pi, 12, endpoint=False)]
    ax.plot(*zip(*crowd, strict=True), "o")
    notes = place_labels(ax, crowd, [f"{at}" for at in range(12)], colors=["k"] * 12)
    ax.figure.canvas.draw()
    boxes = [note.get_window_extent() for note in notes]
    assert sum(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at]) == 0
    assert len(ax.texts) > 12  # lines lead back to points that are farther away


class TestCollapse:
    def test_a_heatmap_per_gradient_and_weight(self, frames):  # noqa: F811
        collapse = frames["collapse"]
        figure = plots.plot_collapse(collapse, fractions=FRACTIONS)
        panels = figure.axes[:4]
        cases = [(gradient, weight) for gradient in ("straight_through", "none") for weight in (0.0, 1.0)]
        for ax, (gradient, weight) in zip(panels, cases, strict=True):
            part = collapse.query("router_gradient == @gradient and lambda_router == @weight")
            table = part.groupby(["layer", "expert"])["share"].mean().unstack().to_numpy()
            assert cells(ax) == pytest.approx(table)
            active = (table @ np.array(FRACTIONS)).mean()
            head = ax.get_title(loc="left").split("\n")
            assert head[:2] == [f"λ_router = {weight:g}", gradient.replace("_", "-")]
            assert head[2] == f"{100 * active:.{0 if weight else 1}f} % active"
        stuck = collapse[collapse["lambda_router"] == 0].groupby(["router_gradient", "seed", "layer"])["share"].max() >= 0.99
        low, high = (stuck.groupby(["router_gradient", "seed"]).sum()["straight_through"].agg(how) for how in ("min", "max"))
        heads = [ax.get_title(loc="left") for ax in panels]
        assert f"{low if low == high else f'{low} to {high}'} of {collapse['layer'].nunique()} layers on one" in heads[0]
        mean = collapse.query("router_gradient == 'straight_through' and lambda_router == 0").groupby("expert")["share"].mean()
        assert mean.idxmax() == 3
        assert "with λ = 0 (straight-through): 100 % of the MLP, by 9" in title(figure)

    def test_entropy(self, frames):  # noqa: F811
        information = frames["information"]
        figure = plots.plot_collapse_entropy(information)
        for ax, name in zip(figure.axes, ("entropy", "information"), strict=True):
            thick = [line for line in ax.get_lines() if line.get_marker() == "o"]
            assert len(thick) == 4
            part = information.query("router_gradient == 'straight_through' and lambda_router == 0 and layer != 'all'")
            assert thick[0].get_ydata() == pytest.approx(part.groupby("layer")[name].mean().to_numpy())
            assert same_color(thick[0].get_color(), style.lambda_colors([0.0])[0.0])
            assert thick[0].get_linestyle() != thick[2].get_linestyle()  # gradients differ by line, λ by colour
        assert any(np.allclose(line.get_ydata(), 2) for line in figure.axes[0].get_lines())  # log2 of four experts

    def test_training(self, frames):  # noqa: F811
        steps = frames["collapse_steps"]
        figure = plots.plot_collapse_training(steps, window=5, dense_perplexity=30.0)
        active, perplexity = figure.axes
        one = steps.query("router_gradient == 'straight_through' and lambda_router == 0 and seed == 0")
        raw, mean = active.get_lines()[:2]
        assert raw.get_ydata() == pytest.approx(one["active_mlp_fraction"].to_numpy())
        assert mean.get_ydata() == pytest.approx(one["active_mlp_fraction"].rolling(5, min_periods=1).mean().to_numpy())
        smooth = np.exp(one["lm_loss"].rolling(5, min_periods=1).mean().to_numpy())
        assert perplexity.get_lines()[1].get_ydata() == pytest.approx(smooth)
        assert texts(perplexity) == ["dense model, held-out 30.0"]
        assert perplexity.get_ylim()[0] < 30
        assert "after 20.5 K training tokens" in title(figure)


class TestAblation:
    def test_values_shares_and_modes(self):
        figure = plots.plot_ablation(make_sweep(), axis="dynamoe.importance")
        above, below = figure.axes
        drawn = {container.get_label(): container.lines[0] for container in above.containers}
        assert set(drawn) == {"labels", "always expert 1"}
        assert drawn["labels"].get_ydata() == pytest.approx([2.0, 2.05, 9.0])
        assert drawn["labels"].get_xdata() == pytest.approx(drawn["always expert 1"].get_xdata() - 0.16)  # side by side
        assert same_color(drawn["labels"].get_color(), style.method_color("label"))
        assert [tick.get_text() for tick in below.get_xticklabels()] == ["l2_down", "abs", "random"]
        assert below.get_lines()[0].get_ydata() == pytest.approx([0.65] * 3)
        assert any(set(line.get_ydata()) == {1.0} for line in above.get_lines())  # the dense model
        assert title(figure) == (
            "Labels: perplexity ratio is lowest for l2_down (2 at 65 % of the MLP; 1 more not distinguishable) and worst for random "
            "(9 at 65 % of the MLP)"
        )

    def test_numbers_far_apart_are_on_a_log_axis_and_a_second_axis_makes_panels(self):
        sweep = pd.concat([make_sweep().assign(**{"train.mlp_lr": rate}) for rate in (1e-5, 1e-4, 1e-3)])
        figure = plots.plot_ablation(sweep, axis="train.mlp_lr")
        assert len(figure.axes) == 6
        assert figure.axes[3].get_xscale() == "log"
        assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == [
            f"dynamoe.importance = {name}" for name in ("l2_down", "abs", "random")
        ]
        near = pd.concat([make_sweep().query("cell == 0").assign(theta=theta) for theta in (0.8, 0.9)])
        assert plots.plot_ablation(near, axis="theta").axes[0].get_xscale() == "linear"
        with pytest.raises(InputError, match="filter it to one value"):
            plots.plot_ablation(sweep.assign(theta=np.arange(len(sweep))), axis="train.mlp_lr")

    def test_accuracy_stands_beside_the_commonest_label(self):
        accuracy = make_sweep().query("mode == 'label'").assign(mode="router", metric="router_accuracy")
        accuracy["value"] = [0.7, 0.71, 0.6]
        accuracy = accuracy.assign(low=accuracy["value"] - 0.01, high=accuracy["value"] + 0.01)
        majority = accuracy.assign(metric="majority_accuracy", value=0.66)
        figure = plots.plot_ablation(pd.concat([accuracy, majority]), axis="dynamoe.importance", metric="router_accuracy")
        level = next(line for line in figure.axes[0].get_lines() if line.get_label() == "commonest label")
        assert level.get_ydata() == pytest.approx([0.66] * 3)
        assert title(figure).startswith("Router: router accuracy is highest for abs (71.0 % at 65 % of the MLP; 1 more not")

    def test_failed_cells_are_told_and_two_that_overlap_are_no_ranking(self):
        sweep = make_sweep().query("mode == 'label' and cell < 2")
        failed = sweep.iloc[:1].assign(cell=7, **{"dynamoe.importance": "l2"}, value=np.nan, status="failed")
        message = title(plots.plot_ablation(pd.concat([sweep, failed]), axis="dynamoe.importance"))
        assert message == (
            "Labels: no importance is distinguishable by perplexity ratio, l2_down (2 at 65 % of the MLP) to abs (2.05 at 65 % of the MLP)"
            "; cells that failed: 1"
        )
