"""The pictures of benchmark scores say what their frames say: marks, bands and titles are read back from the figures."""

import numpy as np
import pandas as pd
import pytest
from benchmark_frames import TASKS, make_deltas, make_documents, make_relative, make_scores
from matplotlib.colors import same_color
from matplotlib.patches import Rectangle
from test_plots import close_figures, texts, title  # noqa: F401

from dynamoe_lab.analysis import benchmark_points, plots, style, told_apart
from dynamoe_lab.errors import InputError


def names(ax) -> list[str]:
    return [tick.get_text() for tick in ax.get_yticklabels()]


ROWS = ["ARC-easy †", "LAMBADA †", "PIQA", "WinoGrande", "SciQ †", "HellaSwag", "ARC-challenge †", "average"]


class TestBenchmarks:
    def test_every_score_is_a_mark_in_its_tasks_row(self):
        points = benchmark_points(make_scores())
        figure = plots.plot_benchmarks(points)
        (ax,) = figure.axes
        assert names(ax) == ROWS
        assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first task is on top"
        drawn = {line.get_color(): line for line in ax.get_lines() if line.get_marker() in "o*"}
        for run in ("dense", "router"):
            rows = points[points["run"] == run]
            line = drawn[style.method_color(run)]
            assert line.get_xdata() == pytest.approx(100 * rows["value"].to_numpy())
            assert np.rint(line.get_ydata()).tolist() == list(range(8))
        whiskers = [np.array(path)[:, 0].tolist() for group in ax.collections for path in group.get_segments()]
        for low, high in points[["low", "high"]].to_numpy():
            assert any(ends == pytest.approx([100 * low, 100 * high]) for ends in whiskers)
        chance = [line.get_xdata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 2 and np.ptp(line.get_xdata()) == 0]
        assert [value for value in chance if value is not None][:8] == pytest.approx([25, 0, 50, 50, 25, 25, 25, 200 / 7])

    def test_title_and_key(self):
        points = benchmark_points(make_scores())
        figure = plots.plot_benchmarks(points)
        mean = points[points["task"] == "average"].set_index("run")["value"]
        router = points[(points["run"] == "router") & (points["task"] != "average")]
        above = int((router["low"] > router["chance"]).sum())
        assert title(figure) == (
            f"Accuracy on average over 7 tasks: dense {100 * mean['dense']:.1f} %, router {100 * mean['router']:.1f} %; router is above "
            f"chance in {above} of 7 (n = 40 documents a task)"
        )
        (key,) = figure.legends
        assert [text.get_text() for text in key.get_texts()] == ["dense, 135 M active", "router, 113 M active", "chance"]
        assert key.get_title().get_text() == (
            "† ARC-easy, SciQ and ARC-challenge: validation (stock: test); LAMBADA: test (line breaks are spaces)"
        )

    def test_without_what_is_not_known(self):
        points = benchmark_points(make_scores(), metric="bits_per_byte")
        figure = plots.plot_benchmarks(points)
        assert figure.axes[0].get_xlabel() == "bits per byte of the right answer"
        assert "chance" not in title(figure)
        one = benchmark_points(make_scores(make_documents(tasks=("piqa",))))
        assert names(plots.plot_benchmarks(one).axes[0]) == ["PIQA"]

    def test_mixed_frames_are_refused(self):
        points = benchmark_points(make_scores())
        with pytest.raises(InputError, match="plot_benchmarks: the frame has acc and acc_norm; pass the rows of one metric"):
            plots.plot_benchmarks(pd.concat([points, points.assign(metric="acc_norm")]))
        with pytest.raises(InputError, match="several rows of one run and task"):
            plots.plot_benchmarks(pd.concat([points, points]))


class TestDeltas:
    def test_marks_bands_and_numbers(self):
        deltas = make_deltas()
        figure = plots.plot_benchmark_deltas(deltas)
        ax, told = figure.axes
        rows = deltas[deltas["task"] != "average4"]
        assert names(ax) == ROWS
        marks = [line for line in ax.get_lines() if line.get_marker() == "o"]
        assert [line.get_xdata()[0] for line in marks] == pytest.approx((100 * rows["difference"]).tolist())
        full = [same_color(line.get_markerfacecolor(), style.method_color("router")) for line in marks]
        assert full == told_apart(rows).tolist()
        assert 0 < sum(full) < len(full), "the frame shows both"
        bands = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        assert [band.get_width() for band in bands] == pytest.approx((200 * rows["detectable"]).tolist())
        assert [band.get_x() + band.get_width() / 2 for band in bands] == pytest.approx([0] * 8, abs=1e-9)
        assert texts(told).count("150") == 7
        assert "1,050" in texts(told)
        p = rows["holm_p"].dropna()
        assert [text for text in texts(told) if text.startswith(("0.", "1", "<")) and text not in ("150", "1,050")] == [
            "<0.001" if value < 0.001 else f"{value:.2g}" for value in p
        ]
        low, high = ax.get_xlim()
        assert low < 100 * rows["low"].min()
        assert high == pytest.approx(-low)

    def test_title(self):
        deltas = make_deltas()
        mean, tasks = deltas[deltas["task"] == "average"].iloc[0], deltas[deltas["task"].isin(TASKS)]
        low, high = 100 * mean["low"], 100 * mean["high"]
        assert title(plots.plot_benchmark_deltas(deltas)) == (
            f"Accuracy minus the dense model's on the same documents: router {100 * mean['difference']:+.1f} points on average "
            f"({low:+.1f} to {high:+.1f}, {(tasks['holm_p'] < 0.05).sum()} of 7 tasks told apart) (n = 150 documents a task)"
        )

    def test_several_runs_have_their_own_colours_and_places(self):
        deltas = make_deltas(runs=("router", "router, seed 1", "static"))
        ax = plots.plot_benchmark_deltas(deltas).axes[0]
        marks = [line for line in ax.get_lines() if line.get_marker() in "oD" and len(line.get_xdata()) == 1]
        assert len(marks) == 24
        assert len({line.get_color() for line in marks}) == 3
        assert len({round(float(line.get_ydata()[0]), 3) for line in marks}) == 24

    def test_other_metrics_have_no_points(self):
        figure = plots.plot_benchmark_deltas(make_deltas(metric="bits_per_byte"))
        assert "points" not in figure.axes[0].get_xlabel() + title(figure)
        assert title(figure).startswith("Bits per byte of the right answer minus the dense model's on the same documents: router +0.")

    def test_no_interval_and_one_task(self):
        deltas = make_deltas().query("task == 'piqa'").assign(low=np.nan, high=np.nan)
        figure = plots.plot_benchmark_deltas(deltas)
        assert " in PIQA (" in title(figure)
        assert "nan" not in title(figure)


class TestRelative:
    def test_ours_and_theirs(self):
        relative = make_relative()
        left, right = plots.plot_relative_to_base(relative).axes
        whole = relative[relative["task"] == "average7"]
        marks = [line for line in left.get_lines() if line.get_marker() in "os" and len(line.get_xdata()) == 1]
        drawn = np.array(sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in marks))
        assert drawn == pytest.approx(np.array(sorted((100 * row.params_share, 100 * row.change) for row in whole.itertuples())))
        assert {"router", "θ=0.9", "θ=0.8", "θ=0.7"} == {text for text in texts(left) if text}
        assert names(right) == ROWS[:-1]
        for model in ("router", "DynaMoE θ=0.9", "Flextron"):
            rows = relative[(relative["model"] == model) & relative["task"].isin(TASKS)]
            expected = pytest.approx(100 * rows["change"].to_numpy())
            assert any(len(line.get_xdata()) == len(rows) and line.get_xdata() == expected for line in right.get_lines())
        guessing = [line.get_xdata()[0] for line in right.get_lines() if line.get_marker() == "|" and len(line.get_xdata()) == 1]
        floors = relative.loc[relative["task"].isin(TASKS), "floor"]
        assert sorted(guessing) == pytest.approx(sorted(100 * floors[(floors > -0.999) & (floors < 0)]))

    def test_title_names_the_paper_s_nearest_in_compute(self):
        relative = make_relative()
        ours = relative[(relative["source"] == "ours") & (relative["task"] == "average7")].iloc[0]
        assert title(plots.plot_relative_to_base(relative)) == (
            f"Accuracy over seven tasks relative to each model's own dense base: router {100 * ours['change']:+.0f} % "
            f"({100 * ours['low']:+.0f} to {100 * ours['high']:+.0f}) at 84 % of its active parameters; the paper's θ=0.9 -6 % at 86 %"
        )

    def test_a_huge_whisker_does_not_flatten_the_rest(self):
        relative = make_relative()
        relative.loc[relative["source"] == "ours", "high"] = 40.0
        relative.loc[0, ["change", "floor"]] = np.nan  # the base has nothing right
        figure = plots.plot_relative_to_base(relative)
        assert figure.axes[1].get_xlim()[1] < 100

    def test_without_an_average_there_is_nothing_to_draw(self):
        with pytest.raises(InputError, match="no average of ours"):
            plots.plot_relative_to_base(make_relative().query("source == 'paper'"))


@pytest.mark.parametrize("name", ["plot_benchmarks", "plot_benchmark_deltas", "plot_relative_to_base"])
def test_pages_csv_and_columns(name, tmp_path):
    frame = {"plot_benchmarks": lambda: benchmark_points(make_scores()), "plot_benchmark_deltas": make_deltas}.get(name, make_relative)()
    frame.to_csv(tmp_path / "frame.csv", index=False)
    figure = getattr(plots, name)(pd.read_csv(tmp_path / "frame.csv"))
    figure.canvas.draw()
    assert figure.get_figwidth() <= style.PAGE_WIDTH + 1e-9
    for ax in figure.axes:
        box = ax.get_tightbbox()
        assert box is None or (box.x0 >= -2 and box.x1 <= figure.bbox.x1 + 2)
    with pytest.raises(InputError, match=rf"{name}: the frame lacks the column\(s\) task"):
        getattr(plots, name)(frame.drop(columns="task"))
