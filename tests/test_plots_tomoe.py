"""The pictures of ToMoE say what their frames say: lines, bars, cells and titles are read back from the figures."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from test_plots import cells, close_figures, frames, make_widths, routing, title  # noqa: F401
from tomoe_frames import make_masks, make_steps, make_trace

from dynamoe_lab.analysis import metrics, plots, style
from dynamoe_lab.errors import InputError


def line(ax, label: str):
    (found,) = [line for line in ax.get_lines() if line.get_label() == label]
    return found


class TestTraining:
    def test_lines_and_title(self):
        steps = make_steps()
        figure = plots.plot_tomoe_training(steps, p=0.5, experts=4, window=1)
        divergence, ratio, union, balance = figure.axes
        assert line(divergence, "training batches, with noise").get_ydata() == pytest.approx(steps["kl_loss"].to_numpy())
        held = steps.dropna(subset=["heldout_kl"])
        for ax, name in ((divergence, "heldout_kl"), (ratio, "open_ratio"), (union, "open_union")):
            assert line(ax, "held-out, without noise").get_xdata().tolist() == held["tokens"].tolist()
            assert line(ax, "held-out, without noise").get_ydata() == pytest.approx(held[name].to_numpy())
        assert line(ratio, "mean over tokens, with noise").get_ydata() == pytest.approx(steps["active_ratio_mean"].to_numpy())
        assert line(ratio, "widest expert and token, with noise").get_ydata() == pytest.approx(steps["active_ratio_max"].to_numpy())
        assert line(union, "training batches, with noise").get_ydata() == pytest.approx(steps["union_coverage"].to_numpy())
        assert line(balance, "seed 0").get_ydata() == pytest.approx(steps["balance_loss"].to_numpy())
        levels = [{float(one.get_ydata()[0]) for one in ax.get_lines() if len(set(one.get_ydata())) == 1} for ax in figure.axes]
        assert [0.0 in levels[0], {0.5, 1.0} <= levels[1], 1.0 in levels[2], {0.25, 1.0} <= levels[3]] == [True] * 4
        assert title(figure) == (
            "Short training: after 5.12 K tokens the mean active ratio without noise is 60 % (target 50 %) "
            "at a held-out KL of 0.45 nats per token"
        )

    def test_without_held_out_text_and_after_long_training(self):
        steps = make_steps().assign(heldout_kl=np.nan, open_ratio=np.nan).drop(columns="open_union")
        steps["tokens"] *= 1000
        message = title(plots.plot_tomoe_training(steps, p=0.5, experts=4, window=2))
        assert message.startswith("After 5.12 M tokens")
        assert "the mean active ratio under training noise is 80 % (target" in message
        assert f"at a KL of {steps['kl_loss'].tail(2).mean():.3g} nats" in message

    @pytest.mark.parametrize("runs", [1, 3])
    def test_no_key_covers_a_curve(self, runs):
        steps = pd.concat([make_steps(run=f"seed {run}", shift=0.1 * run) for run in range(runs)])
        figure = plots.plot_tomoe_training(steps, p=0.5, experts=4)
        figure.canvas.draw()
        for ax in figure.axes:
            key, inside = ax.get_legend().get_window_extent(), ax.get_window_extent()
            assert key.y0 >= inside.y1 - 0.5
            assert key.x1 <= figure.bbox.x1

    def test_several_runs_are_told_by_their_span(self, frames):  # noqa: F811
        figure = plots.plot_tomoe_training(frames["tomoe_steps"], p=0.5, experts=4)
        assert "held-out KL of 0.45 to 0.55 nats per token" in title(figure)
        assert [text.get_text() for text in figure.axes[3].get_legend().get_texts()] == ["seed 0", "seed 1"]


class TestUsage:
    def test_both_heatmaps(self, frames):  # noqa: F811
        usage, widths = frames["tomoe_usage"], make_widths()
        figure = plots.plot_tomoe_usage(usage, widths)
        above, below = figure.axes[:2]
        share = usage.pivot(index="expert", columns="layer", values="share")
        width = widths.pivot(index="expert", columns="layer", values="fraction")
        assert cells(above) == pytest.approx(share.to_numpy())
        assert cells(below) == pytest.approx(width.to_numpy())
        run = (share * width).sum()
        assert f"takes {100 * share.max().min():.0f} % to {100 * share.max().max():.0f} % of a layer's tokens" in title(figure)
        assert f"runs {100 * run.min():.0f} % to {100 * run.max():.0f} % of a layer's neurons" in title(figure)
        assert "0 of 3 layers are on one expert" in title(figure)

    def test_collapse_is_told(self):
        usage = metrics.expert_usage(make_trace().assign(expert=2), experts=4)
        assert "3 of 3 layers are on one expert" in title(plots.plot_tomoe_usage(usage, make_widths()))


class TestUnion:
    def test_stacks_bars_and_chance(self, frames):  # noqa: F811
        union = frames["union"]
        figure = plots.plot_tomoe_union(union, frames["attention"])
        bars, whole, attention = figure.axes[:3]
        table = union[union["layer"] != "all"].pivot(index="layer", columns="count", values="share")
        heights = np.array([bar.get_height() for bar in bars.patches]).reshape(5, 3)  # in all experts first
        assert heights == pytest.approx(table[[4, 3, 2, 1, 0]].to_numpy(dtype=float).T)
        assert heights.sum(axis=0) == pytest.approx(1)
        pooled = union[union["layer"] == "all"].set_index("count")
        assert [bar.get_width() for bar in whole.patches] == pytest.approx(pooled["share"].tolist())
        assert line(whole, "drawn at random").get_xdata() == pytest.approx(pooled["chance"].to_numpy())
        assert same_color(whole.patches[0].get_facecolor(), bars.patches[-1].get_facecolor())  # neurons in no expert
        kept = frames["attention"][frames["attention"]["layer"] != "all"]
        drawn = [one.get_ydata() for one in attention.get_lines()[1:]]
        assert drawn[0] == pytest.approx(kept["pairs_kept"].to_numpy(dtype=float))
        assert drawn[1] == pytest.approx(kept["values_open"].to_numpy(dtype=float))
        assert title(figure).startswith(f"{100 * (1 - pooled.loc[0, 'share']):.1f} % of the neurons are in some expert (least: ")
        shared = f"{100 * pooled.loc[4, 'share']:.1f} % are in all 4, where experts of these widths drawn at random would share "
        assert shared + f"{100 * pooled.loc[4, 'chance']:.1f} %" in title(figure)

    def test_nothing_closed_is_said_so(self):
        union = metrics.mask_union(make_masks(width=1.1), experts=4)
        assert title(plots.plot_tomoe_union(union)) == "None of the 180 neurons is closed in any of the 4 experts"

    def test_without_masked_pairs_only_values_are_drawn(self, frames):  # noqa: F811
        figure = plots.plot_tomoe_union(frames["union"], frames["attention"].assign(pairs_kept=np.nan))
        assert len(figure.axes[2].get_lines()) == 2  # the dense model, V and O


class TestSpecialisation:
    def test_lines_bands_and_choices(self, frames):  # noqa: F811
        found, choices = frames["specialisation"], frames["choices"]
        figure = plots.plot_specialisation(found, choices)
        above = {}
        for ax, grid, factor in zip(figure.axes[:2], figure.axes[2:4], ("domain", "token class"), strict=True):
            rows = found[(found["factor"] == factor) & (found["layer"] != "all")]
            assert line(ax, "found").get_ydata() == pytest.approx(rows["association"].to_numpy())
            clusters = {"domain": "24 documents", "token class": "40 token ids"}[factor]
            assert line(ax, f"labels shuffled among {clusters}").get_ydata() == pytest.approx(rows["control"].to_numpy())
            band = ax.collections[0].get_paths()[0].get_extents()
            assert (band.y0, band.y1) == pytest.approx((rows["control_low"].min(), rows["control_high"].max()))
            layer = rows.loc[(rows["association"] - rows["control_high"]).astype(float).idxmax(), "layer"]
            table = choices[(choices["factor"] == factor) & (choices["layer"] == layer)].pivot(
                index="level", columns="expert", values="share"
            )
            names = [tick.get_text() for tick in grid.get_yticklabels()]
            assert names[-1] == "all tokens"
            assert cells(grid) == pytest.approx(table.loc[[*names[:-1], "all"]].to_numpy())
            assert grid.get_xlabel() == f"expert of layer {layer}, where it stands out"
            above[factor] = (rows["association"] > rows["control_high"]).sum()
        assert title(figure) == (
            f"Beyond the 95 % band of shuffled labels the choice of expert goes with the domain of the text in {above['domain']} of 3 "
            f"layers and with the class of the token in {above['token class']} of 3 layers"
        )

    def test_fresh_routers_beside_the_trained(self, frames):  # noqa: F811
        found = frames["specialisation"]
        before = found.assign(run="before training", association=0.5 * found["control"])
        figure = plots.plot_specialisation(found, before=before)
        for ax, factor in zip(figure.axes, ("domain", "token class"), strict=True):
            rows = before[(before["factor"] == factor) & (before["layer"] != "all")]
            assert line(ax, "found before training").get_ydata() == pytest.approx(rows["association"].to_numpy())
            assert len(line(ax, "found after training").get_ydata()) == 3
        assert title(figure).count("of 3 layers (before training: 0)") == 2

    def test_one_factor_alone(self, frames):  # noqa: F811
        alone = frames["specialisation"].query("factor == 'token class'")
        assert len(plots.plot_specialisation(alone).axes) == 1

    def test_several_runs_are_refused(self, frames):  # noqa: F811
        both = pd.concat([frames["specialisation"], frames["specialisation"].assign(run="b")])
        with pytest.raises(InputError, match="2 runs"):
            plots.plot_specialisation(both)


class TestStability:
    def test_both_parts_with_chance(self, frames):  # noqa: F811
        jaccard = frames["jaccard"]
        figure = plots.plot_mask_stability(jaccard)
        for ax, part in zip(figure.axes, ("mlp", "attention"), strict=True):
            rows = jaccard[(jaccard["part"] == part) & (jaccard["layer"] != "all")]
            assert line(ax, "between seeds").get_ydata() == pytest.approx(rows["jaccard"].to_numpy())
            assert line(ax, "chance (5 draws)").get_ydata() == pytest.approx(rows["chance"].to_numpy())
        whole = jaccard[jaccard["layer"] == "all"].set_index("part")
        assert f"{whole.loc['mlp', 'jaccard']:.2f} for experts' neurons (chance {whole.loc['mlp', 'chance']:.2f})" in title(figure)

    def test_several_pairs_are_averaged(self):
        masks = [make_masks(seed=seed, run=f"seed {seed}") for seed in range(3)]
        pairs = [metrics.mask_jaccard(masks[a], masks[b], draws=3) for a, b in ((0, 1), (0, 2), (1, 2))]
        figure = plots.plot_mask_stability(pd.concat(pairs, ignore_index=True))
        mean = np.mean([pair["jaccard"][:3] for pair in pairs], axis=0)
        assert line(figure.axes[0], "between seeds").get_ydata() == pytest.approx(mean)
        assert title(figure).endswith("3 pairs of runs")
        assert figure.get_figwidth() == pytest.approx(style.PAGE_WIDTH)
