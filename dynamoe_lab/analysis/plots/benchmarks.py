"""Pictures of benchmark scores: beside chance, beside the dense parent on the same documents, beside the paper's models.

Tasks stand in the paper's order, from the top; a dagger marks those whose documents are not the ones that lm-eval's own definition scores.
"""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from dynamoe_lab.analysis.frames import compact, list_names, percent, require, signed
from dynamoe_lab.analysis.metrics.benchmark_pairs import told_apart
from dynamoe_lab.analysis.metrics.benchmarks import AVERAGE, AVERAGE4, AVERAGE7, SHARES, benchmark_task, split_note
from dynamoe_lab.analysis.plots.placing import place_labels
from dynamoe_lab.analysis.style import DENSE, REFERENCE, canvas, headline, method_color, method_marker, styled
from dynamoe_lab.errors import InputError
from dynamoe_lab.plural import plural

__all__ = ["plot_benchmark_deltas", "plot_benchmarks", "plot_relative_to_base"]

_BAND = "#e6e6e6"  # differences that the sample could not have shown
_TICK = {"color": REFERENCE["color"], "linewidth": 1.6}
_FREE = ("#CC79A7", "#56B4E9", "#009E73", "#D55E00")  # for runs that no method has given its colour
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy, normalised by length", "bits_per_byte": "bits per byte of the right answer"}
_SAYS = {"acc": "Accuracy", "acc_norm": "Length-normalised accuracy", "bits_per_byte": "Bits per byte of the right answer"}
_ROOM = 0.84  # of a task's row, for the marks of all runs
_AVERAGES = (AVERAGE, AVERAGE4, AVERAGE7)


@styled
def plot_benchmarks(points: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Accuracy of every run on every task with its interval, the level of chance as a grey bar, and the mean over tasks below a line.

    The intervals are those of each score alone; whether two runs differ is for `plot_benchmark_deltas` to say.

    Args:
        points: run, task, split, metric, value, low, high, n, chance, active_params (from `benchmark_points`), one metric.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, several metrics, or several rows of one run and task.

    Example:
        >>> scores = pd.DataFrame({"run": ["dense", "router"], "task": "sciq", "split": "test", "metric": "acc", "value": [0.8, 0.7]})
        >>> figure = lab.plot_benchmarks(lab.benchmark_points(scores.assign(stderr=0.04, n=100)))
        >>> print(figure.get_suptitle())
        Accuracy on 1 task; router is above chance in 1 of 1 (n = 100 documents a task)
    """
    require(points, ("run", "task", "split", "metric", "value", "low", "high", "n", "chance", "active_params"), "plot_benchmarks")
    metric, tasks, runs = _one_metric(points, "plot_benchmarks"), _tasks(points), list(dict.fromkeys(points["run"]))
    if points.duplicated(["run", "task"]).any():
        raise InputError("plot_benchmarks: several rows of one run and task; give each run a name of its own")
    unit, looks = (100 if metric in SHARES else 1), _looks(runs)
    figure = canvas(3.0 + (0.42 + 0.3 * len(runs)) * len(tasks), figure)
    ax = figure.subplots()
    for number, run in enumerate(runs):
        rows = points[points["run"] == run]
        at = _places(rows["task"], tasks) + _shift(number, len(runs))
        spread = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None) * unit
        ax.errorbar(rows["value"] * unit, at, xerr=np.nan_to_num(spread), fmt="none", ecolor=looks[run]["color"], elinewidth=1.0, capsize=2)
        ax.plot(rows["value"] * unit, at, linestyle="none", markersize=5.5 if looks[run]["marker"] != "*" else 8, zorder=3, **looks[run])
    for place, task in enumerate(tasks):
        chance = points.loc[points["task"] == task, "chance"].iloc[0]
        if np.isfinite(chance):
            ax.plot([chance * unit] * 2, [place - 0.36, place + 0.36], solid_capstyle="butt", zorder=1, **_TICK)
    _rows(ax, tasks, points)
    ax.set_xlabel(f"{_METRICS.get(metric, metric)}{' (%)' if unit == 100 else ''}")
    left, right = ax.get_xlim()
    ax.set_xlim(max(left, 0) if unit == 100 and points["chance"].min() > 0.03 else left, min(right, 101) if unit == 100 else right)
    handles = [Line2D([], [], linestyle="none", markersize=5.5, label=_run_name(points, run), **looks[run]) for run in runs]
    if points["chance"].notna().any():
        handles.append(Line2D([], [], label="chance", **_TICK))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), columnspacing=1.6, **_dagger(points))
    headline(figure, _score_message(points, runs, metric))
    return figure


@styled
def plot_benchmark_deltas(deltas: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Difference to the dense parent on the same documents, task by task and on average; full marks are differences (`told_apart`).

    The grey band reaches as far as a true difference that this sample would miss more than one time in five (a task's own test at 5 %
    over the number of tasks, which is the most that Holm's correction asks for), so a hollow mark within a wide band says little. On the
    right: documents, and McNemar's exact p adjusted for all tasks of the run (Holm).

    Args:
        deltas: run, task, metric, difference, low, high, holm_p, detectable, n, confidence (from `benchmark_deltas`), one metric; `split`
            if known. Rows "average4" are left out.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, several metrics, or several rows of one run and task.

    Example:
        >>> dense = pd.DataFrame({"run": "dense", "task": "sciq", "doc_id": range(10), "metric": "acc", "value": 1.0})
        >>> router = dense.assign(run="router", value=[0.0] * 6 + [1.0] * 4)  # six documents are lost, none is gained
        >>> figure = lab.plot_benchmark_deltas(lab.benchmark_deltas(router, dense))
        >>> print(figure.get_suptitle())
        Accuracy minus the dense model's on the same documents: router -60.0 points
        in SciQ (..., 1 of 1 tasks told apart) (n = 10 documents a task)
    """
    needed = ("run", "task", "metric", "reference_value", "difference", "low", "high", "holm_p", "detectable", "n", "confidence")
    require(deltas, needed, "plot_benchmark_deltas")
    metric = _one_metric(deltas, "plot_benchmark_deltas")
    deltas = deltas[deltas["task"] != AVERAGE4]
    if deltas.duplicated(["run", "task"]).any():
        raise InputError("plot_benchmark_deltas: several rows of one run and task; give each run a name of its own")
    tasks, runs = _tasks(deltas), list(dict.fromkeys(deltas["run"]))
    unit, looks, height = (100 if metric in SHARES else 1), _looks(runs), _ROOM / len(runs)
    figure = canvas(3.0 + (0.42 + 0.3 * len(runs)) * len(tasks), figure)
    ax, told = figure.subplots(1, 2, sharey=True, width_ratios=[5, 1.15])
    for number, run in enumerate(runs):
        rows, color = deltas[deltas["run"] == run], looks[run]["color"]
        rows = rows.assign(apart=told_apart(rows).to_numpy(dtype=bool))
        at = _places(rows["task"], tasks) + _shift(number, len(runs))
        for place, reach in zip(at, rows["detectable"] * unit, strict=True):
            if np.isfinite(reach):
                ax.add_patch(Rectangle((-reach, place - height / 2), 2 * reach, height, facecolor=_BAND, linewidth=0, zorder=0.5))
        spread = np.clip([rows["difference"] - rows["low"], rows["high"] - rows["difference"]], 0, None) * unit
        ax.errorbar(rows["difference"] * unit, at, xerr=np.nan_to_num(spread), fmt="none", ecolor=color, elinewidth=1.1, capsize=2.5)
        for row, place in zip(rows.itertuples(), at, strict=True):
            face = color if row.apart else "white"
            size = 6.5 if row.task in _AVERAGES else 5.5
            ax.plot([row.difference * unit], [place], looks[run]["marker"], color=color, mfc=face, mew=1.2, markersize=size, zorder=3)
            p = "" if not np.isfinite(row.holm_p) else "<0.001" if row.holm_p < 0.001 else f"{row.holm_p:.2g}"
            for text, across, side in ((f"{int(row.n):,}", 0.38, "right"), (p, 0.95, "right")):
                told.text(across, place, text, ha=side, va="center", fontsize=6.5, color="#444444", transform=told.get_yaxis_transform())
    ax.axvline(0, **DENSE, zorder=1)
    _rows(ax, tasks, deltas)
    reach = np.nanmax(np.abs(deltas[["difference", "low", "high"]].to_numpy(dtype=float))) * unit
    bands = (deltas["detectable"] * unit).dropna()
    widest = min(bands.max(), 2 * bands.median()) if len(bands) else 0  # one task of few documents must not flatten the rest
    ax.set_xlim(-max(1.12 * reach, 1.06 * widest), max(1.12 * reach, 1.06 * widest))
    ax.set_xlabel(f"{_METRICS.get(metric, metric)}, difference to the dense model{' (points)' if unit == 100 else ''}")
    told.set_axis_off()
    for text, across in (("n", 0.38), ("p (Holm)", 0.95)):
        told.text(across, 1.01, text, ha="right", va="bottom", fontsize=6.5, color="#444444", transform=told.transAxes)
    level = percent(float(deltas["confidence"].iloc[0]))
    corrected = " (5 % over the number of tasks)" if deltas.groupby("run")["holm_p"].count().max() > 1 else ""
    grey = {"marker": "o", "linestyle": "none", "markersize": 5.5, "mec": "#444444", "mew": 1.2}
    handles = [] if len(runs) == 1 else [Line2D([], [], linestyle="none", markersize=5.5, label=run, **looks[run]) for run in runs]
    handles += [Line2D([], [], mfc="#444444", label=f"told apart (p < 0.05; average: {level} interval)", **grey)]
    handles += [
        Line2D([], [], mfc="white", label="not told apart", **grey),
        Patch(facecolor=_BAND, label=f"too small for n to show{corrected}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), columnspacing=1.4, **_dagger(deltas))
    headline(figure, _delta_message(deltas, runs, metric))
    return figure


@styled
def plot_relative_to_base(relative: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Accuracy relative to each model's own base, ours beside the paper's: on average over compute (left), task by task (right).

    Bars of grey are where a model would only guess: a small base model hardly above chance cannot lose much there, whatever the method.

    Args:
        relative: source, model, base, task, change, low, high, floor, params_share, n (from `relative_table`); split if known.
        figure: where to draw; None: a new figure.

    Raises:
        InputError: a column is missing, or no average of ours.

    Example:
        >>> relative = pd.DataFrame({"source": ["ours", "paper"], "model": ["router", "DynaMoE θ=0.9"], "base": "dense"})
        >>> relative = relative.assign(task="average7", change=[-0.2, -0.1], params_share=[0.8, 0.9], floor=-0.5)
        >>> figure = lab.plot_relative_to_base(relative.assign(low=np.nan, high=np.nan, n=100))
        >>> print(figure.get_suptitle())
        Accuracy over seven tasks relative to each model's own dense base: router
        -20 % at 80 % of its active parameters; the paper's θ=0.9 -10 % at 90 %
    """
    needed = ("source", "model", "base", "task", "change", "low", "high", "floor", "params_share", "n")
    require(relative, needed, "plot_relative_to_base")
    models = list(dict.fromkeys(relative["model"]))
    whole = next((name for name in (AVERAGE7, AVERAGE4, AVERAGE) if _has(relative, name, "ours")), None)
    if whole is None:
        raise InputError("plot_relative_to_base: no average of ours; pass `relative_table` of two tasks or more")
    looks, figure = _model_looks(relative), canvas(9.5 + 0.45 * len(models), figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
    points = relative[relative["task"] == whole]
    for row in points.itertuples():
        look = looks[row.model]
        spread = np.clip([[row.change - row.low], [row.high - row.change]], 0, None) * 100
        if np.isfinite(spread).all():
            left.errorbar([100 * row.params_share], [100 * row.change], spread, fmt="none", ecolor=look["color"], elinewidth=1.0, capsize=2)
        left.plot([100 * row.params_share], [100 * row.change], linestyle="none", markersize=6, zorder=3, **look)
    left.axhline(0, **DENSE, zorder=1)
    left.plot([100], [0], method_marker("dense"), color=DENSE["color"], markersize=9, zorder=4)
    left.grid(color="#eeeeee")
    left.set_axisbelow(True)
    left.margins(x=0.16, y=0.14)
    left.set(xlabel="active parameters (% of the base model's)", ylabel="accuracy, change relative to the base model (%)")
    left.set_title(f"{benchmark_task(whole).label}", loc="left")
    tasks = [task for task in _tasks(relative) if task not in _AVERAGES and _has(relative, task, "ours")]
    for number, model in enumerate(models):
        rows = relative[(relative["model"] == model) & relative["task"].isin(tasks)]
        at = _places(rows["task"], tasks) + _shift(number, len(models))
        ours = rows["source"].iloc[0] == "ours" if len(rows) else False
        spread = np.clip([rows["change"] - rows["low"], rows["high"] - rows["change"]], 0, None) * 100
        if ours:
            right.errorbar(
                100 * rows["change"], at, xerr=np.nan_to_num(spread), fmt="none", ecolor=looks[model]["color"], elinewidth=0.9, capsize=2
            )
        right.plot(100 * rows["change"], at, linestyle="none", markersize=4.6, zorder=3, **looks[model])
        for floor, place in zip(rows["floor"], at, strict=True):
            if -0.999 < floor < 0:
                right.plot([100 * floor], [place], "|", color=looks[model]["color"], markersize=4.5, mew=1.1, alpha=0.75, zorder=2)
    right.axvline(0, **DENSE, zorder=1)
    shown = 100 * relative.loc[relative["task"].isin(tasks), ["change", "floor"]].replace([np.inf, -np.inf], np.nan)
    least = np.nanmin([*shown["change"], *shown["floor"].where(shown["floor"] > -99.9), -10])
    right.set_xlim(least - 8, max(15, shown["change"].max() + 15))  # whiskers of a few documents would flatten the rest
    _rows(right, tasks, relative, line=False)
    right.set_xlabel("change relative to the base model (%)")
    right.set_title("task by task", loc="left")
    handles = [Line2D([], [], linestyle="none", markersize=5.5, label=_model_name(relative, model), **looks[model]) for model in models]
    handles.append(Line2D([], [], color="#666666", marker="|", linestyle="none", markersize=6, mew=1.1, label="only guessing"))
    handles.append(Line2D([], [], label="base model", **DENSE))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.4, **_dagger(relative))
    headline(figure, _relative_message(points, whole))
    names = [(100 * row.params_share, 100 * row.change) for row in points.itertuples()]
    labels = [_short(row.model) for row in points.itertuples()]
    colors = [tuple(0.7 * np.array(to_rgb(looks[row.model]["color"]))) for row in points.itertuples()]  # thin letters need more contrast
    place_labels(left, names, labels, colors=colors, avoid=[(100, 0)])
    return figure


def _one_metric(frame: pd.DataFrame, function: str) -> str:
    metrics = list(dict.fromkeys(frame["metric"]))
    if len(metrics) > 1:
        raise InputError(f"{function}: the frame has {list_names(metrics)}; pass the rows of one metric")
    return metrics[0]


def _tasks(frame: pd.DataFrame) -> list[str]:
    """Tasks in the frame's order, averages last."""
    names = dict.fromkeys(frame["task"])
    return [name for name in names if name not in _AVERAGES] + [name for name in names if name in _AVERAGES]


def _has(relative: pd.DataFrame, task: str, source: str) -> bool:
    return bool(((relative["task"] == task) & (relative["source"] == source)).any())


def _looks(runs: Sequence[str]) -> dict[str, dict]:
    """Colour and marker of every run: those of its method, free ones where two runs would look alike."""
    looks, used = {}, set()
    for run in runs:
        color = method_color(run)
        if color in used:
            color = next((other for other in _FREE if other not in used), "#7a7a7a")
        used.add(color)
        looks[run] = {"color": color, "marker": method_marker(run) if method_marker(run) != "P" else "o"}
    return looks


def _model_looks(relative: pd.DataFrame) -> dict[str, dict]:
    """Ours in their methods' colours, full; the paper's θ in shades of one, other methods in grey."""
    ours = list(dict.fromkeys(relative.loc[relative["source"] == "ours", "model"]))
    paper = list(dict.fromkeys(relative.loc[relative["source"] == "paper", "model"]))
    own = [model for model in paper if model.startswith("DynaMoE")]
    shades = mpl.colormaps["YlOrBr"](np.linspace(0.78, 0.45, max(len(own), 1)))
    looks = _looks(ours) | {model: {"color": to_hex(shade), "marker": "s"} for model, shade in zip(own, shades, strict=False)}
    return looks | {model: {"color": "#7a7a7a", "marker": "^"} for model in paper if model not in own}


def _places(tasks: pd.Series, order: list[str]) -> np.ndarray:
    return np.array([order.index(task) for task in tasks], dtype=float)


def _shift(number: int, count: int, room: float = _ROOM) -> float:
    """Where the rows of one of several runs stand within a task's, the first above."""
    return room * ((number + 0.5) / count - 0.5) if count > 1 else 0.0


def _rows(ax: Axes, tasks: list[str], frame: pd.DataFrame, *, line: bool = True) -> None:
    """A row per task, the first on top, with a dagger where the split is not lm-eval's; the average below a line, in bold."""
    marked = {task for task in tasks if split_note(frame[frame["task"] == task])}
    labels = [benchmark_task(task).label + (" †" if task in marked else "") for task in tasks]
    ax.set_yticks(range(len(tasks)), labels)
    ax.tick_params(axis="y", length=0, labelsize=7.5)
    for label, task in zip(ax.get_yticklabels(), tasks, strict=True):
        label.set_fontweight("bold" if task in _AVERAGES else "normal")
    ax.set_ylim(len(tasks) - 0.45, -0.55)
    for place, task in enumerate(tasks):
        average = line and task in _AVERAGES
        ax.axhline(place - 0.5, color="#999999" if average else "#eeeeee", linewidth=0.8 if average else 0.6, zorder=0.4)
    ax.grid(axis="x", color="#eeeeee")
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)


def _dagger(frame: pd.DataFrame) -> dict:
    """What the dagger means, for a legend."""
    note = split_note(frame)
    return {"title": f"† {note}", "title_fontsize": 6.5} if note else {}


def _run_name(points: pd.DataFrame, run: str) -> str:
    """'router, 113 M active' where that is known."""
    active = points.loc[(points["run"] == run) & ~points["task"].isin(_AVERAGES), "active_params"].mean()
    return f"{run}, {compact(active)} active" if np.isfinite(active) else run


def _n_text(rows: pd.DataFrame) -> str:
    """'n = 24 documents a task', or the range of n."""
    counts = rows.loc[~rows["task"].isin(_AVERAGES), "n"].astype(int)
    least, most = counts.min(), counts.max()
    return f"n = {plural(least, 'document')} a task" if least == most else f"n = {least:,} to {most:,} documents a task"


def _score_message(points: pd.DataFrame, runs: list[str], metric: str) -> str:
    """The averages, and where the last run is above chance beyond its interval."""
    means = points[points["task"] == AVERAGE].set_index("run")["value"]
    digits = 1 if metric in SHARES else 3
    told = [f"{run} {percent(means[run], digits)}" for run in runs if run in means.index]
    tasks = points[~points["task"].isin(_AVERAGES)]
    last = tasks[tasks["run"] == runs[-1]]
    known = last[last["chance"].notna()]
    above = f"{runs[-1]} is above chance in {int((known['low'] > known['chance']).sum())} of {len(known)}" if len(known) else ""
    count = last["task"].nunique()
    means_text = (
        f"{_SAYS.get(metric, metric)} on average over {count} tasks: {', '.join(told)}"
        if told
        else f"{_SAYS.get(metric, metric)} on {plural(count, 'task')}"
    )
    return "; ".join(part for part in (means_text, above) if part) + f" ({_n_text(tasks)})"


def _delta_message(deltas: pd.DataFrame, runs: list[str], metric: str) -> str:
    """What the average loses, with its interval, and how many tasks are told apart."""
    unit, digits, texts = (100, 1, []) if metric in SHARES else (1, 3, [])
    for number, run in enumerate(runs):
        rows = deltas[deltas["run"] == run]
        tasks, mean = rows[~rows["task"].isin(_AVERAGES)], rows[rows["task"] == AVERAGE]
        row = (mean if len(mean) else tasks).iloc[0]
        value, low, high = (signed(unit * row[name], digits) for name in ("difference", "low", "high"))
        spread = f"{low} to {high}, " if np.isfinite([row["low"], row["high"]]).all() else ""
        points = " points" if unit == 100 and not number else ""
        where = "" if number else " on average" if len(mean) else f" in {benchmark_task(row['task']).label}"
        apart = "" if number else " tasks told apart"
        texts.append(f"{run} {value}{points}{where} ({spread}{int(told_apart(tasks).sum())} of {len(tasks)}{apart})")
    return f"{_SAYS.get(metric, metric)} minus the dense model's on the same documents: {'; '.join(texts)} ({_n_text(deltas)})"


def _model_name(relative: pd.DataFrame, model: str) -> str:
    row = relative[relative["model"] == model].iloc[0]
    return f"{model} ({'ours' if row['source'] == 'ours' else 'paper'}; base {row['base']})"


def _short(model: str) -> str:
    return model.removeprefix("DynaMoE ")


def _relative_message(points: pd.DataFrame, whole: str) -> str:
    """What ours and the paper's nearest in compute lose of their own base's accuracy."""
    ours, paper = points[points["source"] == "ours"], points[points["source"] == "paper"]
    texts = []
    for row in ours.itertuples():
        spread = f" ({signed(100 * row.low, 0)} to {signed(100 * row.high, 0)})" if np.isfinite([row.low, row.high]).all() else ""
        texts.append(f"{row.model} {signed(100 * row.change, 0)} %{spread} at {percent(row.params_share)}")
    texts[0] += " of its active parameters"
    if len(paper):
        near = paper.loc[(paper["params_share"] - ours["params_share"].iloc[-1]).abs().idxmin()]
        texts.append(f"the paper's {_short(near['model'])} {100 * near['change']:+.0f} % at {percent(near['params_share'])}")
    count = {AVERAGE7: "seven tasks", AVERAGE4: "four tasks"}.get(whole, "all tasks")
    return f"Accuracy over {count} relative to each model's own dense base: {'; '.join(texts)}"
