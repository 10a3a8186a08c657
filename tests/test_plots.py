"""What is drawn is what the frame says: heatmap cells, line ends, labels and titles are read back from the figures.

`DYNAMOE_LAB_FIGURES=folder pytest tests/test_plots.py` keeps every figure for the eye.
"""

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from benchmark_frames import make_deltas, make_relative, make_scores
from latency_frames import make_growth, make_parts, make_ratios
from matplotlib.figure import Figure
from tomoe_frames import make_classes, make_masks, make_pairs, make_steps, make_trace

from dynamoe_lab.analysis import metrics, plots, style
from dynamoe_lab.errors import InputError

FRACTIONS = (0.25, 0.5, 0.75, 1.0)


@pytest.fixture(autouse=True)
def close_figures(request):
    yield
    folder = os.environ.get("DYNAMOE_LAB_FIGURES")
    for number in plt.get_fignums():
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with style.style_context():
                plt.figure(number).savefig(Path(folder) / f"{request.node.name}_{number}.png".replace("/", "_"))
        plt.close(number)


@pytest.fixture(scope="module")
def routing() -> pd.DataFrame:
    """Six layers, four experts, two domains; accuracy near 0.8, errors mostly by one."""
    rng = np.random.default_rng(0)
    n, parts = 1200, []
    for layer in range(6):
        label = rng.choice(4, n, p=[0.1, 0.2, 0.3, 0.4])
        expert = np.clip(label + rng.choice([-1, 0, 1, 2], n, p=[0.08, 0.8, 0.1, 0.02]), 0, 3)
        columns = {"run": "a", "domain": np.where(np.arange(n) < 600, "c4", "code"), "document": np.arange(n) // 50}
        part = pd.DataFrame({**columns, "position": np.arange(n) % 50, "token_id": rng.integers(40, size=n), "layer": layer})
        parts.append(part.assign(label=label.astype(np.int8), expert=expert.astype(np.int8)))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def frames(routing) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(1)
    similarity = pd.DataFrame([{"layer": k, "expert": e, "fraction": FRACTIONS[e]} for k in range(6) for e in range(4)])
    middle = 0.4 + 0.15 * similarity["expert"] + 0.02 * similarity["layer"]
    similarity = similarity.assign(run="a", mean=middle, q10=middle - 0.1, q50=middle, q90=middle + 0.05, n=999, sink_mean=0.3)
    step = np.arange(1, 41)
    steps = pd.DataFrame({"run": "a", "step": step, "tokens": step * 1024, "loss": 5.0, "lm_loss": 4 + 1 / step + rng.normal(0, 0.05, 40)})
    steps = steps.assign(router_loss=1 / step, router_accuracy=0.8 - 0.5 / step, active_mlp_fraction=0.7, lr=1e-3, seconds=1.0)
    importance = pd.DataFrame({"formula": np.repeat(["l2_down", "abs"], 80), "layer": np.tile(np.repeat([0, 1], 40), 2)})
    importance = importance.assign(rank=np.tile(np.arange(40), 4), value=np.tile(np.arange(40, 0, -1.0), 4))
    return {
        "confusion": metrics.router_confusion(routing, theta=0.9),
        "chance": metrics.router_chance(routing, theta=0.9, resamples=200),
        "errors": metrics.error_distance(routing, resamples=200),
        "usage": metrics.expert_usage(routing, theta=0.9),
        "usage_by_domain": metrics.expert_usage(routing, theta=0.9, by_domain=True),
        "curves": metrics.importance_curves(importance),
        "similarity": similarity,
        "steps": steps,
        **study_frames(),
    }


def study_frames() -> dict[str, pd.DataFrame]:
    """Small frames of the studies: difficulty, Pareto, collapse, a sweep."""
    rng = np.random.default_rng(2)
    n = 600
    token_id, following, parts = rng.integers(40, size=n), rng.gamma(2, 2, n), []
    for layer in range(5):
        columns = {
            "run": "a",
            "domain": np.where(np.arange(n) < 300, "c4", "code"),
            "document": np.arange(n) // 30,
            "position": np.arange(n) % 60,
        }
        part = pd.DataFrame({**columns, "token_id": token_id, "layer": layer, "surprisal": np.arange(n) % 60 / 10 + 0.1})
        part["next_surprisal"] = following
        for expert in range(3):
            part[f"similarity_{expert}"] = (0.55 + 0.13 * expert - 0.02 * part["surprisal"] + rng.normal(0.1, 0.05, n)).astype(np.float32)
        parts.append(part)
    similarity = pd.concat(parts, ignore_index=True)
    counts = pd.DataFrame({"token_id": range(35), "tokens": range(1, 36)})
    tokens = metrics.difficulty_by_token(similarity, 0.8, fractions=FRACTIONS, counts=counts)
    cases = {(weight, gradient, seed): weight for weight in (0.0, 1.0) for gradient in ("straight_through", "none") for seed in (0, 1)}
    usage, information, steps = {}, {}, {}
    for case, weight in cases.items():
        expert = rng.integers(4, size=n * 5) if weight else np.where(rng.random(n * 5) < 0.995, 3, 2)
        routing = similarity[["run", "domain", "document", "token_id", "layer"]].assign(label=3, expert=expert)
        usage[case] = metrics.expert_usage(routing, theta=0.9, experts=4)
        information[case] = metrics.usage_information(routing, experts=4, fractions=FRACTIONS, shuffles=3)
        step = np.arange(1, 21)
        columns = {"run": "a", "step": step, "tokens": step * 1024, "lm_loss": 4 + 1 / step}
        steps[case] = pd.DataFrame({**columns, "active_mlp_fraction": 0.7 if weight else 1 - 0.3 / step})
    return {
        "shares": metrics.label_shares(similarity, np.linspace(0.5, 0.95, 10), fractions=FRACTIONS),
        "bins": metrics.difficulty_bins(tokens, resamples=100),
        "correlations": metrics.difficulty_correlations(tokens, resamples=100),
        "means": metrics.difficulty_by_domain(similarity, 0.8, fractions=FRACTIONS, resamples=100),
        "pareto": make_pareto(),
        "collapse": metrics.stack_runs(usage),
        "information": metrics.stack_runs(information),
        "collapse_steps": metrics.stack_runs(steps),
        "sweep": make_sweep(),
        "ratios": make_ratios(),
        "parts": make_parts(),
        "growth": make_growth(),
        "points": metrics.benchmark_points(make_scores()),
        "deltas": make_deltas(),
        "relative": make_relative(),
        **tomoe_frames(),
    }


def tomoe_frames() -> dict[str, pd.DataFrame]:
    """Small frames of ToMoE."""
    trace = make_trace(domain=0.8, kind=0.5)
    jaccard = [metrics.mask_jaccard(make(), make(seed=1, run="b"), draws=5) for make in (make_masks, make_pairs)]
    return {
        "tomoe_steps": pd.concat([make_steps(), make_steps(run="seed 1", shift=0.1)], ignore_index=True),
        "tomoe_usage": metrics.expert_usage(trace, experts=4),
        "union": metrics.mask_union(make_masks(), experts=4),
        "attention": metrics.attention_open(make_pairs(), trace),
        "specialisation": metrics.specialisation(trace, make_classes(), experts=4, permutations=20, resamples=20),
        "choices": metrics.expert_choice(trace, make_classes(), experts=4),
        "jaccard": pd.concat(jaccard, ignore_index=True),
    }


def make_widths() -> pd.DataFrame:
    """How wide the experts of `make_masks` are."""
    return (make_masks().groupby(["layer", "expert"]).size() / 60).rename("fraction").reset_index()


def make_pareto(seeds: int = 2) -> pd.DataFrame:
    """Two θ and three methods, trained, and two static cuts as converted."""
    rows = []

    def add(method: str, theta: float, seed: int, tokens: int, share: float, value: float) -> None:
        size = {"active_params": 60e6 + 80e6 * share, "active_mlp_fraction": share, "metric": "perplexity_ratio"}
        rows.append({"method": method, "theta": theta, "seed": seed, "train_tokens": tokens, **size, "value": value})

    for seed in range(seeds):
        for theta, share, value in ((0.8, 0.4, 1.9), (0.9, 0.65, 1.4)):
            add("router", theta, seed, 1000, share, value + 0.1 * seed)
            add("label", theta, seed, 1000, share - 0.02, value - 0.2)
            add("random", theta, seed, 1000, share, 2 * value)
    for share in (0.5, 0.75):
        add("static", np.nan, 0, 0, share, 4 - 3 * share)
    add("dense", np.nan, 0, 0, 1.0, 1.0)
    frame = pd.DataFrame(rows)
    return frame.assign(low=0.95 * frame["value"], high=1.06 * frame["value"], n=25)


def make_sweep() -> pd.DataFrame:
    """Three orders of the neurons, untrained, routed by labels and by a fixed prefix."""
    rows = []
    for cell, (name, value) in enumerate({"l2_down": 2.0, "abs": 2.05, "random": 9.0}.items()):
        for mode, factor, share in (("label", 1.0, 0.65), ("1", 2.0, 0.5)):
            row = {"cell": cell, "dynamoe.importance": name, "mode": mode, "metric": "perplexity_ratio", "value": factor * value}
            row |= {"low": 0.95 * factor * value, "high": 1.05 * factor * value, "n": 25, "active_mlp_fraction": share}
            rows.append({**row, "active_params": 1e8, "train_tokens": 0, "status": "ok", "error": ""})
    return pd.DataFrame(rows)


DRAW = {
    "plot_ablation": "sweep",
    "plot_benchmark_deltas": "deltas",
    "plot_benchmarks": "points",
    "plot_collapse": "collapse",
    "plot_collapse_entropy": "information",
    "plot_collapse_training": "collapse_steps",
    "plot_cost_growth": "growth",
    "plot_difficulty_by_domain": "means",
    "plot_difficulty_vs_surprisal": "bins",
    "plot_label_share": "shares",
    "plot_latency": "ratios",
    "plot_mask_stability": "jaccard",
    "plot_pareto": "pareto",
    "plot_realised_vs_ideal": "ratios",
    "plot_specialisation": "specialisation",
    "plot_time_parts": "parts",
    "plot_tomoe_training": "tomoe_steps",
    "plot_tomoe_union": "union",
    "plot_tomoe_usage": "tomoe_usage",
    "plot_importance_curves": "curves",
    "plot_expert_similarity": "similarity",
    "plot_training_curves": "steps",
    "plot_relative_to_base": "relative",
    "plot_router_confusion": "confusion",
    "plot_router_confusion_by_layer": "confusion",
    "plot_error_distance": "errors",
    "plot_expert_usage": "usage",
    "plot_expert_usage_by_domain": "usage_by_domain",
}
ALSO = {
    "plot_ablation": {"axis": "dynamoe.importance"},
    "plot_label_share": {"theta": 0.8},
    "plot_pareto": {"dense_params": 135e6},
    "plot_tomoe_training": {"p": 0.5, "experts": 4},
    "plot_tomoe_usage": {"widths": make_widths()},
}
OPTIONAL = (
    "open_ratio",
    "open_union",
    "run",
    "loss",
    "lr",
    "seconds",
    "chance",
    "active_params",
    "train_tokens",
    "status",
    "error",
    "split",
)


def draw(name: str, frame: pd.DataFrame, **where):
    """A plot from its frame, with what else it cannot do without."""
    return getattr(plots, name)(frame, **ALSO.get(name, {}), **where)


def cells(ax) -> np.ndarray:
    """The numbers behind a heatmap, rows from top to bottom."""
    mesh = ax.collections[0]
    return np.asarray(mesh.get_array()).reshape(mesh.get_coordinates().shape[0] - 1, -1)


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def title(figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def test_every_plot_is_here():
    assert set(DRAW) == set(plots.__all__)


@pytest.mark.parametrize("name", DRAW)
class TestEveryPlot:
    def test_needs_only_its_frame_and_fits_the_page(self, frames, name):
        drawn = draw(name, frames[DRAW[name]])
        figure = drawn if isinstance(drawn, Figure) else drawn.figure
        assert figure.get_figwidth() <= style.PAGE_WIDTH + 1e-9
        assert len(plt.get_fignums()) == 1
        figure.canvas.draw()  # layout and text work out
        message = title(figure) or drawn.get_title(loc="left")
        assert any(character.isdigit() for character in message)
        for ax in figure.axes:
            box = ax.get_tightbbox()
            assert box is None or (box.x0 >= -2 and box.x1 <= figure.bbox.x1 + 2), f"{ax} runs over the edge of the page"

    def test_titles_do_not_overlap(self, frames, name):
        drawn = draw(name, frames[DRAW[name]])
        figure = drawn if isinstance(drawn, Figure) else drawn.figure
        figure.canvas.draw()
        boxes = [ax.title.get_window_extent() if ax.title.get_text() else ax._left_title.get_window_extent() for ax in figure.axes]
        boxes = [box for box in boxes if box.width > 1]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

    def test_draws_where_it_is_told(self, frames, name):
        plot = getattr(plots, name)
        figure = plt.figure(figsize=(9, 7), layout="constrained")
        left, _ = figure.subfigures(1, 2)
        if "ax" in plot.__wrapped__.__annotations__:
            ax = left.add_subplot()
            assert draw(name, frames[DRAW[name]], ax=ax) is ax
        else:
            assert draw(name, frames[DRAW[name]], figure=left) is left
            assert left.axes
        figure.canvas.draw()
        assert len(plt.get_fignums()) == 1

    def test_a_missing_column_and_the_plot_are_named(self, frames, name):
        frame = frames[DRAW[name]]
        column = next(c for c in reversed(frame.columns) if c not in OPTIONAL)
        with pytest.raises(InputError, match=rf"{name}: the frame lacks the column\(s\) {column};"):
            draw(name, frame.drop(columns=column))
        assert not plt.get_fignums()

    def test_accepts_what_a_csv_gives_back(self, frames, name, tmp_path):
        frames[DRAW[name]].to_csv(tmp_path / "frame.csv", index=False)
        draw(name, pd.read_csv(tmp_path / "frame.csv"))

    def test_leaves_the_callers_settings_alone(self, frames, name):
        before = dict(matplotlib.rcParams)
        draw(name, frames[DRAW[name]])
        assert dict(matplotlib.rcParams) == before


class TestConfusion:
    def test_cells_annotations_and_labels(self, frames):
        ax = plots.plot_router_confusion(frames["confusion"], fractions=FRACTIONS)
        expected = metrics.pool_layers(frames["confusion"]).pivot(index="label", columns="expert", values="share").to_numpy()
        assert cells(ax) == pytest.approx(expected)
        marks = iter(texts(ax))
        for share in expected.ravel():
            assert next(marks) == ("<1" if 0 < share < 0.005 else f"{100 * share:.0f}")
        assert [tick.get_text().split("\n")[0] for tick in ax.get_yticklabels()] == ["25 %", "50 %", "75 %", "100 %"]
        total = frames["confusion"].groupby("label")["tokens"].sum() / frames["confusion"]["tokens"].sum()
        assert ax.get_yticklabels()[3].get_text().split("\n")[1] == f"({100 * total[3]:.0f} % of all)"

    def test_title_says_accuracy_and_baselines(self, frames, routing):
        right = f"{100 * (routing['label'] == routing['expert']).mean():.0f} %"
        majority = routing.groupby("layer")["label"].agg(lambda label: label.value_counts().max()).sum() / len(routing)
        alone = plots.plot_router_confusion(frames["confusion"]).get_title(loc="left").replace("\n", " ")
        assert alone == f"The router is right for {right} of tokens; always answering the layer's commonest label: {100 * majority:.0f} %"
        both = plots.plot_router_confusion(frames["confusion"], chance=frames["chance"]).get_title(loc="left").replace("\n", " ")
        token_id = frames["chance"].query("layer == 'all'")["token_id"].item()
        assert both == f"{alone}, answering by the token's id alone: {100 * token_id:.0f} %"
        pooled = plots.plot_router_confusion(metrics.pool_layers(frames["confusion"])).get_title(loc="left")
        assert "commonest" not in pooled  # the pooled frame does not know it

    def test_a_label_that_never_occurs_is_a_dash(self):
        confusion = metrics.pool_layers(
            pd.DataFrame({"run": "a", "theta": 0.9, "layer": 0, "label": [0, 0, 1, 1], "expert": [0, 1] * 2, "tokens": [3, 1, 0, 0]})
        )
        ax = plots.plot_router_confusion(confusion)
        assert texts(ax) == ["75", "25"]  # masked cells stay empty
        ax = plots.plot_router_confusion(confusion, fractions=FRACTIONS)
        assert len(ax.get_xticklabels()) == 4

    def test_by_layer(self, frames, routing):
        figure = plots.plot_router_confusion_by_layer(frames["confusion"], chance=frames["chance"], columns=4)
        strip, *matrices = figure.axes[:7]
        right = (routing["label"] == routing["expert"]).groupby(routing["layer"]).mean()
        lines = {line.get_marker(): line for line in strip.get_lines()}
        assert lines["o"].get_ydata() == pytest.approx(right.to_numpy())
        assert lines["D"].get_ydata() == pytest.approx(frames["chance"]["token_id"].to_numpy()[:-1])
        for layer, ax in enumerate(matrices):
            part = routing[routing["layer"] == layer]
            assert cells(ax) == pytest.approx(pd.crosstab(part["label"], part["expert"]).to_numpy() / len(part))
            assert np.trace(cells(ax)) == pytest.approx(right[layer])
            assert ax.get_title(loc="center").split()[-1] == str(layer)
        assert {ax.collections[0].get_clim() for ax in matrices} == {(0, max(cells(ax).max() for ax in matrices))}
        clear = (frames["chance"]["minus_majority_low"][:-1] > 0).sum()
        assert f"in {clear} of 6 layers" in title(figure)


class TestErrorDistance:
    def test_bars_and_chance(self, frames):
        ax = plots.plot_error_distance(frames["errors"])
        rows = frames["errors"].query("layer == 'all' and distance != 0")
        assert [bar.get_height() for bar in ax.patches] == pytest.approx(rows["error_share"].tolist())
        chance = next(line for line in ax.get_lines() if line.get_marker() == "D")
        assert chance.get_ydata() == pytest.approx(rows["error_chance"].to_numpy())
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["-3", "-2", "-1", "+1", "+2", "+3"]
        near = rows[rows["distance"].abs() == 1]
        message = ax.get_title(loc="left").replace("\n", " ")
        assert f"{100 * near['error_share'].sum():.0f} % of the errors" in message
        assert f"independent, {100 * near['error_chance'].sum():.0f} % would" in message

    def test_a_perfect_router(self, routing):
        perfect = metrics.error_distance(routing.assign(expert=routing["label"]), resamples=50)
        assert plots.plot_error_distance(perfect).get_title(loc="left") == "The router made no error"


class TestUsage:
    def test_heatmap_and_strip(self, frames, routing):
        figure = plots.plot_expert_usage(frames["usage"], fractions=FRACTIONS)
        strip, ax = figure.axes[:2]
        table = frames["usage"].pivot(index="expert", columns="layer", values="share")
        assert cells(ax)[::-1] == pytest.approx(table.to_numpy())  # the largest expert is on top
        assert [tick.get_text() for tick in ax.get_yticklabels()] == ["100 %", "75 %", "50 %", "25 %"]
        mean = pd.Series(np.array(FRACTIONS)[routing["expert"]]).groupby(routing["layer"]).mean()
        assert [bar.get_height() for bar in strip.patches] == pytest.approx(mean.tolist())
        assert f"{100 * mean.min():.0f} % in layer {mean.idxmin()} to {100 * mean.max():.0f} % in layer {mean.idxmax()}" in title(figure)

    def test_by_domain(self, frames, routing):
        figure = plots.plot_expert_usage_by_domain(frames["usage_by_domain"], fractions=FRACTIONS)
        strip, *heatmaps = figure.axes[:3]
        work = pd.Series(np.array(FRACTIONS)[routing["expert"]])
        for ax in heatmaps:
            rows = frames["usage_by_domain"].query("domain == @ax.get_ylabel()")
            assert cells(ax)[::-1] == pytest.approx(rows.pivot(index="expert", columns="layer", values="share").to_numpy())
        for line in strip.get_lines()[:2]:
            inside = routing["domain"] == line.get_label().split()[0]
            assert line.get_ydata() == pytest.approx(work[inside].groupby(routing["layer"]).mean().to_numpy())
            assert line.get_color() == style.domain_colors(["c4", "code"])[line.get_label().split()[0]]

    def test_many_layers_are_drawn_without_numbers(self, frames):
        usage = pd.concat([frames["usage"].query("layer == 0").assign(layer=layer) for layer in range(80)])
        assert not texts(plots.plot_expert_usage(usage).axes[1])

    def test_several_domains_or_runs_are_refused(self, frames):
        with pytest.raises(InputError, match="2 domains"):
            plots.plot_expert_usage(frames["usage_by_domain"])
        both = pd.concat([frames["usage"], frames["usage"].assign(run="b")])
        with pytest.raises(InputError, match=r"2 runs \(a and b\)"):
            plots.plot_expert_usage(both)
        with pytest.raises(InputError, match="2 fractions"):
            plots.plot_expert_usage(frames["usage"], fractions=(0.5, 1.0))

    def test_experts_that_no_token_chose_are_drawn(self, frames):
        few = frames["usage"].query("expert < 2")
        assert cells(plots.plot_expert_usage(few, fractions=FRACTIONS).axes[1])[:2] == pytest.approx(np.zeros((2, 6)))


class TestCurves:
    def test_training(self, frames):
        figure = plots.plot_training_curves(frames["steps"], window=5, dense_loss=3.2, majority=0.61)
        first = figure.axes[0]
        raw, smooth, dense = first.get_lines()
        assert raw.get_ydata() == pytest.approx(frames["steps"]["lm_loss"].to_numpy())
        assert smooth.get_ydata() == pytest.approx(metrics.smooth_steps(frames["steps"], 5)["lm_loss"].to_numpy())
        assert set(dense.get_ydata()) == {3.2}
        assert dense.get_color() == style.DENSE["color"]
        assert texts(first) == ["dense model, held-out 3.20"]
        assert first.get_ylim()[0] < 3.2
        assert texts(figure.axes[2]) == ["commonest label 61 %"]
        end = frames["steps"].tail(5)
        assert title(figure).startswith(
            f"After 41 K tokens the LM loss of training batches is {end['lm_loss'].mean():.2f} (dense, held-out: 3.20)"
        )
        assert f"{100 * end['router_accuracy'].mean():.0f} % of tokens (commonest label: 61 %)" in title(figure)
        above = first.child_axes[0]
        figure.canvas.draw()
        assert above.get_xlim() == pytest.approx(np.array(first.get_xlim()) / 1024)  # the axis on top counts steps

    def test_training_of_two_runs(self, frames):
        figure = plots.plot_training_curves(pd.concat([frames["steps"], frames["steps"].assign(run="b", lm_loss=9.0)]))
        assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["a", "b"]
        last = frames["steps"].tail(10)["lm_loss"].mean()
        assert title(figure).startswith(f"After 41 K tokens in 2 runs the LM loss of training batches is {last:.2f} to 9.00 and")

    def test_importance(self, frames):
        figure = plots.plot_importance_curves(frames["curves"], fractions=FRACTIONS)
        assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["l2_down: √Σh² · ‖W_down‖", "abs: Σ|h|"]  # name and formula
        drawn = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 41]
        assert len(drawn) == 2  # a line per layer
        expected = frames["curves"].query("formula == 'l2_down' and layer == 0")["cumulative_share"]
        assert drawn[0].get_ydata() == pytest.approx(expected.to_numpy())
        held = np.arange(40, 30, -1).sum() / np.arange(1, 41).sum()
        assert f"The first 25 % of the neurons by l2_down hold {100 * held:.0f} %" in title(figure)

    def test_similarity(self, frames):
        figure = plots.plot_expert_similarity(frames["similarity"], theta=0.75)
        panels = figure.axes
        assert [ax.get_title(loc="left") for ax in panels] == [f"first {name} of the neurons" for name in ("25 %", "50 %", "75 %")]
        median, sink = panels[2].get_lines()[:2]
        rows = frames["similarity"].query("expert == 2")
        assert median.get_ydata() == pytest.approx(rows["q50"].to_numpy())
        assert set(sink.get_ydata()) == {0.3}
        assert "it passes θ = 0.75 in 0 of 6 layers" in title(figure)
        assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "θ = 0.75"


class TestStyle:
    def test_an_expert_a_domain_and_a_method_keep_their_colour(self):
        assert style.domain_colors(["wiki", "c4"])["c4"] == style.domain_colors(["c4", "mine"])["c4"]
        assert len(set(style.domain_colors(["c4", "wiki", "code", "technical", "tiny", "x", "y"]).values())) == 7
        assert style.method_color("static_2") == style.method_color("static") != style.method_color("router")
        colors = style.expert_colors(4)
        lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in colors]
        assert lightness == sorted(lightness, reverse=True)  # ordered in grey print too

    def test_heatmap_colours_are_even_in_lightness(self):
        rgb = style.HEATMAP(np.linspace(0, 1, 11))[:, :3]
        steps = np.diff(rgb @ [0.2126, 0.7152, 0.0722])
        assert (steps < 0).all()
        assert rgb[0] == pytest.approx([1, 1, 1], abs=0.03)  # nothing is white

    def test_saved_files_are_the_same_twice_and_embed_their_text(self, frames, tmp_path):
        contents = []
        for _ in range(2):
            ax = plots.plot_error_distance(frames["errors"])
            with style.style_context():
                ax.figure.savefig(tmp_path / "figure.svg", metadata={"Date": None})
            contents.append((tmp_path / "figure.svg").read_bytes())
        assert contents[0] == contents[1]
        assert b"<text" not in contents[0]  # letters are outlines: no font is needed to read them

    def test_a_backend_that_turns_interactive_with_the_first_figure_stays_so(self):
        """A notebook's does; were it reset with the style, the notebook would show its first figure and never another."""
        before = matplotlib.is_interactive()
        try:
            matplotlib.interactive(False)
            with style.style_context():
                matplotlib.interactive(True)
            assert matplotlib.is_interactive()
        finally:
            matplotlib.interactive(before)

    def test_names_with_dollar_signs_are_names(self, frames):
        usage = frames["usage_by_domain"].assign(domain=frames["usage_by_domain"]["domain"].map(lambda name: f"{name} $\\frac$"))
        figure = style.canvas(5, None)
        plots.plot_expert_usage_by_domain(usage, figure=figure)
        figure.canvas.draw()  # a formula that is none would raise
        assert any("$\\frac$" in text.get_text() for text in figure.findobj(matplotlib.text.Text))

    def test_headlines_fit_and_keep_numbers_with_their_units(self):
        figure = style.canvas(5, None)
        style.headline(figure, "word " * 30 + "62 % " * 20)
        lines = figure.get_suptitle().split("\n")
        assert len(lines) > 1
        assert not any(line.startswith("%") for line in lines)
        figure.canvas.draw()
        assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1

    def test_something_else_than_a_figure_is_named(self, frames):
        with pytest.raises(InputError, match="not a list"):
            plots.plot_expert_usage(frames["usage"], figure=[])
