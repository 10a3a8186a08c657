"""The pictures of time say what their frames say: marks, bounds, bars and titles are read back from the figures."""

import numpy as np
import pandas as pd
import pytest
from latency_frames import make_growth, make_parts, make_ratios
from matplotlib.colors import same_color
from test_plots import close_figures, texts, title  # noqa: F401

from dynamoe_lab.analysis import plots, style
from dynamoe_lab.analysis.findings import time_parts_finding
from dynamoe_lab.analysis.plots.time_costs import _PARTS
from dynamoe_lab.errors import InputError

PHASES = ("prefill", "decode")


def marks(ax) -> dict[tuple[str, str], np.ndarray]:
    """(colour, marker) -> [n, 2] of every drawn series of marks; whiskers' caps are no marks."""
    lines = [line for line in ax.get_lines() if line.get_marker() in "XDo"]
    return {(line.get_color(), line.get_marker()): np.column_stack(line.get_data()) for line in lines}


def whiskers(ax) -> list[list[tuple[float, float]]]:
    """The ends of every vertical whisker, [(low, high)] per series."""
    return [[(path[0][1], path[1][1]) for path in lines.get_segments()] for lines in ax.collections]


class TestLatency:
    @pytest.mark.parametrize(
        ("plot", "name"), [(plots.plot_latency, "time_ratio"), (plots.plot_realised_vs_ideal, "realised")], ids=["time", "realised"]
    )
    def test_every_row_is_a_mark_with_its_whiskers(self, plot, name):
        ratios = make_ratios()
        figure = plot(ratios)
        for ax, phase in zip(figure.axes, PHASES, strict=True):
            drawn = marks(ax)
            assert len(drawn) == 6  # two settings, three routings
            names = {"mixed": "X", "one expert": "D", "router": "o"}
            colors = [line.get_color() for line in ax.get_legend().get_lines()]
            groups = ratios[ratios["phase"] == phase].groupby("batch")
            for color, (_, part) in zip(colors, groups, strict=True):
                for routing, marker in names.items():
                    rows = part[part["routing"] == routing].sort_values("active_mlp_fraction")
                    found = drawn[color, marker]
                    assert found[:, 1] == pytest.approx(rows[name].to_numpy())
                    assert found[:, 0] == pytest.approx(rows["active_mlp_fraction"].to_numpy(), abs=0.01)  # side by side
                    expected = [pytest.approx(ends) for ends in rows[[f"{name}_low", f"{name}_high"]].itertuples(index=False, name=None)]
                    assert any(ends == expected for ends in whiskers(ax))
            reference = style.DENSE if name == "time_ratio" else style.REFERENCE
            assert any(set(line.get_ydata()) == {1.0} and line.get_color() == reference["color"] for line in ax.get_lines())
            assert ax.get_title(loc="left").startswith(phase)

    def test_the_bound_is_amdahls(self):
        """0.4 + 0.6 * (active share + router): what is left if only active work took time."""
        ax = plots.plot_latency(make_ratios()).axes[0]
        bound = next(line for line in ax.get_lines() if line.get_marker() == "None" and len(line.get_xdata()) == 7)
        assert bound.get_ydata() == pytest.approx(0.4 + 0.6 * (np.array(bound.get_xdata()) + 0.06))
        assert (np.diff(bound.get_xdata()) >= 0).all()

    def test_a_setting_has_one_colour_in_both_phases_and_both_pictures(self):
        colors = {}
        for plot in (plots.plot_latency, plots.plot_realised_vs_ideal):
            for ax in plot(make_ratios()).axes:
                for line, text in zip(ax.get_legend().get_lines(), ax.get_legend().get_texts(), strict=True):
                    setting = tuple(int(word) for word in text.get_text().replace(",", "").split() if word.isdigit())
                    colors.setdefault(setting, set()).add(line.get_color())
        assert set(colors) == {(1, 256), (1, 512), (4, 256)}
        assert all(len(found) == 1 for found in colors.values())
        assert len(set.union(*colors.values())) == 3

    def test_titles(self):
        assert title(plots.plot_latency(make_ratios())) == (
            "At 50 % of the MLP a prefill takes 80 % of the dense model's time (bound 74 %), a decode step takes 83 % (bound 74 %); with "
            "the trained router at 66 % of the MLP a prefill takes 91 % (bound 83 %), a decode step takes 94 % (bound 83 %)"
        )
        assert title(plots.plot_realised_vs_ideal(make_ratios())) == (
            "The MLPs reach, of the ideal speed, 83 % with experts mixed and 92 % with one expert for all (prefill, 50 % active); 78 % "
            "with experts mixed and 87 % with one expert for all (decode, 50 % active)"
        )

    def test_one_phase_and_fixed_widths(self):
        prefill = make_ratios().query("phase == 'prefill'")
        fixed = prefill[prefill["routing"] == "one expert"].assign(routing="expert 1")
        figure = plots.plot_latency(fixed)
        assert len(figure.axes) == 1
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense model", "Amdahl's bound", "expert 1"]
        bound = next(line for line in figure.axes[0].get_lines() if line.get_marker() == "None" and len(line.get_xdata()) == 4)
        assert bound.get_ydata() == pytest.approx(0.4 + 0.6 * np.array([0.31, 0.56, 0.81, 1.06]))

    def test_several_models_or_none_are_refused(self):
        ratios = make_ratios()
        with pytest.raises(InputError, match="plot_latency: several rows of one setting and routing; pass the rows of one run"):
            plots.plot_latency(pd.concat([ratios, ratios.assign(run="b")]))
        with pytest.raises(InputError, match="plot_realised_vs_ideal: the frame has only rows of the dense model"):
            plots.plot_realised_vs_ideal(ratios[ratios["routing"] == "dense"])


class TestParts:
    def test_bars_are_the_times(self):
        parts = make_parts()
        figure = plots.plot_time_parts(parts)
        for ax, phase, unit in zip(figure.axes, PHASES, (1.0, 1e3), strict=True):
            assert ax.get_xlabel().endswith("(s)" if unit == 1 else "(ms)")
            table = parts[parts["phase"] == phase].pivot(index="run", columns="part", values="seconds")
            for name in table:
                widths = [bar.get_width() for bar in ax.patches if same_color(bar.get_facecolor(), _PARTS[name])]
                assert widths == pytest.approx((unit * table.loc[["dense", "100 %", "50 %"], name]).tolist())
            ends = [max(bar.get_x() + bar.get_width() for bar in ax.patches if round(bar.get_y() + 0.34) == place) for place in range(3)]
            assert ends == pytest.approx((unit * table.sum(axis=1)[["dense", "100 %", "50 %"]]).tolist())
        assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["dense", "100 %", "50 %"]
        written = texts(figure.axes[1])
        assert {"18", "9.0", "7.5", "30.0", "23.7"} <= set(written)
        assert "1.3" not in written, "a number that does not fit its segment is not written"

    def test_title_counts_routers_and_sorting(self):
        # 0.04 / 1.04 = 4 % at full width, 0.09 / 0.79 = 11 % at half
        assert title(plots.plot_time_parts(make_parts())).startswith(
            "MLPs take 60 % of the dense model's prefill, routers and sorting 4 % to 11 % of the converted one's; "
        )
        dense = make_parts().query("run == 'dense' and phase == 'prefill'")
        assert title(plots.plot_time_parts(dense)) == "MLPs take 60 % of the dense model's prefill"

    def test_what_cannot_be_stacked_is_refused(self):
        with pytest.raises(InputError, match="several rows of one run, phase and part"):
            plots.plot_time_parts(pd.concat([make_parts(), make_parts()]))
        with pytest.raises(InputError, match="unknown part 'softmax'; parts are MLP, router"):
            plots.plot_time_parts(make_parts().replace({"part": {"head": "softmax"}}))

    @pytest.mark.parametrize("draw", [plots.plot_time_parts, plots.plot_latency, plots.plot_realised_vs_ideal, time_parts_finding])
    def test_phases_that_nobody_knows_are_refused(self, draw):
        frame = make_ratios() if draw in (plots.plot_latency, plots.plot_realised_vs_ideal) else make_parts()
        with pytest.raises(InputError, match=f"{draw.__name__}: no rows of a phase that is known; give prefill or decode"):
            draw(frame[frame["phase"] == "prefill"].assign(phase="warm-up"))


class TestGrowth:
    def test_a_column_per_axis(self):
        growth = make_growth()
        figure = plots.plot_cost_growth(growth)
        above, below = figure.axes[:4], figure.axes[4:]
        experts = growth.query("hidden_size == 128 and tokens == 256 and batch == 1 and routing == 'mixed'").sort_values("experts")
        for number, phase in enumerate(PHASES):
            rows = experts[experts["phase"] == phase]
            for ax, name in ((above[0], "time_ratio"), (below[0], "realised")):
                assert ax.containers[number].lines[0].get_ydata() == pytest.approx(rows[name].to_numpy())
        assert [[tick.get_text() for tick in ax.get_xticklabels()] for ax in below] == [
            ["2", "4", "8", "16"],
            ["64\n256", "128\n512", "256\n1024", "1024\n4096"],
            ["64", "256", "1024"],
            ["1", "4", "16"],
        ]
        dashed = [line for line in above[0].get_lines() if line.get_marker() == "None" and len(line.get_xdata()) == 4]
        assert any(line.get_ydata() == pytest.approx([0.4 + 0.6 * 0.685] * 4) for line in dashed)

    def test_title(self):
        assert title(plots.plot_cost_growth(make_growth())) == (
            "Share of the ideal speed that the MLPs reach (prefill, about 62 % active): 87 % to 73 % from 2 to 16 experts; 78 % to 90 % "
            "from 64 × 256 to 1024 × 4096 (D × H); 85 % to 85 % from 64 to 1024 tokens; 85 % to 85 % from 1 to 16 sequences"
        )

    def test_one_long_whisker_does_not_flatten_the_rest(self):
        growth = make_growth()
        growth.loc[growth["experts"] == 16, ["time_ratio_high", "realised_high"]] = 40.0
        figure = plots.plot_cost_growth(growth)
        for ax, name in ((figure.axes[0], "time_ratio"), (figure.axes[4], "realised")):
            low, high = ax.get_ylim()
            assert low < min(1, growth[name].min())
            assert max(1, growth[name].max()) < high < 2

    def test_what_does_not_grow_has_no_column(self):
        growth = make_growth().query("hidden_size == 128 and tokens == 256 and batch == 1")
        assert len(plots.plot_cost_growth(growth).axes) == 2
        with pytest.raises(InputError, match="nothing grows"):
            plots.plot_cost_growth(growth.query("experts == 4"))
        with pytest.raises(InputError, match="several rows of one phase and experts; pass the rows of one routing"):
            plots.plot_cost_growth(pd.concat([growth, growth.assign(routing="router")]))


def test_energy_is_told_or_told_to_be_missing():
    def line(**columns) -> str:
        energy = pd.DataFrame({"model": ["dense", "trained router"], **columns})
        return plots.plot_time_parts(make_parts(), energy=energy).legends[0].get_title().get_text()

    measured = {"joules_per_token": [0.2114, 0.18], "note": "RAPL package 0"}
    assert line(**measured) == "energy per token: dense 0.211 J, trained router 0.18 J (RAPL package 0)"
    missing = {"joules_per_token": float("nan"), "note": "not measured: no counter"}
    assert line(**missing) == "energy: not measured (no counter)"
    with pytest.raises(InputError, match="joules_per_token"):
        plots.plot_time_parts(make_parts(), energy=pd.DataFrame({"model": ["dense"]}))
