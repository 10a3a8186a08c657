"""The claims of DynaMoE (arXiv 2502.12325), each measured beside its chance level or control."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.findings.claims.claim import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Claim,
    Tables,
    by_interval,
    extremes,
    points,
    share,
    together,
)
from dynamoe_lab.analysis.findings.wording import small_text
from dynamoe_lab.analysis.frames import compact, percent, signed, split_layers
from dynamoe_lab.analysis.metrics.benchmarks import paper_table
from dynamoe_lab.analysis.metrics.collapse import collapsed_layers
from dynamoe_lab.analysis.metrics.pareto import ACCURACY, pareto_points
from dynamoe_lab.plural import plural

__all__ = ["CLAIMS"]

SEVEN = 7  # tasks of the paper's Table 1
SAME_PARAMS = 0.02  # shares of the parameters that differ by less are called equal
ROUNDING = 0.01  # logits; float32 sums in another order give some 1e-4


def function_kept(tables: Tables) -> Claim:
    """Reordering neurons by importance leaves the function unchanged."""
    source = "01_convert/logit_change"
    row = tables[source].iloc[0]
    return Claim(
        "Sorting the neurons of every MLP by importance leaves the model's function unchanged",
        "DynaMoE",
        "the same function",
        f"no logit moves by more than {small_text(row['max_abs'])}; the next token is the same for {percent(row['agreement'], 2)}",
        f"logits of standard deviation {row['logit_scale']:.2g}; up to {ROUNDING:g} is called rounding",
        plural(row["tokens"], "token"),
        HOLDS if row["max_abs"] <= ROUNDING else FAILS,
        source,
    )


def router_learns(tables: Tables) -> Claim:
    """A router of two layers learns the label: above the layer's commonest label and above the token's id."""
    source = "04_router_confusion/router_chance"
    row = _pooled(tables[source])
    known = [("majority", "commonest label of each layer"), ("token_id", "answering by the token's id alone, counted on these documents")]
    known = [(name, told) for name, told in known if np.isfinite(row[name])]
    control = "; ".join(
        f"{told} {percent(row[name], 1)}: {points(row[f'minus_{name}'], row[f'minus_{name}_low'], row[f'minus_{name}_high'])}"
        for name, told in known
    )
    ends = [(row[f"minus_{name}_low"], row[f"minus_{name}_high"]) for name, _ in known]
    return Claim(
        "A small router learns which expert a token needs",
        "DynaMoE",
        "",
        f"right for {share(row['accuracy'], row['accuracy_low'], row['accuracy_high'])} of the choices; of those that need the largest "
        f"expert {percent(_recall(tables), 1)}",
        control,
        _sample(row),
        by_interval(min(low for low, _ in ends), min(high for _, high in ends)),
        source,
    )


def neighbours(tables: Tables) -> Claim:
    """Router errors fall on neighbouring classes, beyond what the marginals alone would give."""
    source = "04_router_confusion/router_chance"
    row, layers = _pooled(tables[source]), split_layers(tables[source])[0]
    above, below = int((layers["neighbour_minus_chance_low"] > 0).sum()), int((layers["neighbour_minus_chance_high"] < 0).sum())
    found, difference = ([row[f"{name}{end}"] for end in ("", "_low", "_high")] for name in ("neighbour_share", "neighbour_minus_chance"))
    return Claim(
        "Router errors fall on neighbouring experts",
        "DynaMoE",
        "",
        f"{share(*found)} of the errors miss by one expert; layer by layer above chance in {above}, below it in {below} of {len(layers)}",
        f"{percent(row['neighbour_chance'], 1)} by chance (same marginals): {points(*difference)}",
        f"{plural(row['errors'], 'error')}, {plural(row['documents'], 'document')}",
        by_interval(*difference[1:]),
        source,
    )


def usage_by_layer(tables: Tables) -> Claim:
    """Expert usage differs by layer."""
    source = "05_expert_usage/active_by_layer"
    layers, pooled = split_layers(tables[source])
    whole = pooled.iloc[0]
    least, most, difference, error = extremes(layers, "active_fraction", confidence=whole["confidence"])
    text = " to ".join(f"{share(row['active_fraction'], row['low'], row['high'])} in layer {int(row['layer'])}" for row in (least, most))
    return Claim(
        "Expert usage differs from layer to layer",
        "DynaMoE",
        "",
        f"neurons that run: {text}",
        f"no difference: {points(difference, difference - error, difference + error)}, allowing for all pairs of layers",
        _sample(whole),
        by_interval(difference - error, difference + error),
        source,
    )


def usage_by_theta(tables: Tables) -> Claim:
    """Expert usage differs by θ."""
    source = "06_pareto/theta_usage"
    rows = _first_seed(split_layers(tables[source])[1], "train.seed").sort_values("theta")
    _, _, difference, error = extremes(rows, "active_fraction", confidence=rows["confidence"].iloc[0])
    text = ", ".join(f"{share(row.active_fraction, row.low, row.high)} at θ = {row.theta:g}" for row in rows.itertuples())
    return Claim(
        "Expert usage differs with θ",
        "DynaMoE",
        "4.6, 5.1 and 6 of 7 B parameters at θ = 0.7, 0.8, 0.9",
        f"neurons that run: {text}",
        f"no difference: {points(difference, difference - error, difference + error)}, allowing for all pairs of θ",
        _sample(rows.iloc[0]),
        by_interval(difference - error, difference + error),
        source,
    )


def collapse(tables: Tables) -> Claim:
    """Without the router loss (λ_router = 0) every layer uses one fixed expert."""
    source = "07_collapse/collapse"
    frame = tables[source]
    strict, loose = (collapsed_layers(frame, threshold=threshold) for threshold in (0.99, 0.95))
    free, layers = strict[strict["lambda_router"] == 0], strict["layer"].nunique()
    if free.empty:
        raise KeyError(f"{source}: λ_router = 0")
    texts, verdicts = [], []
    for gradient, rows in free.groupby("router_gradient"):
        counts, nearly = rows.groupby("seed")["collapsed"].sum(), _same_runs(loose, rows).groupby("seed")["collapsed"].sum()
        most = _same_runs(frame, rows).groupby("expert")["share"].mean()
        texts.append(
            f"{_span(counts)} of {layers} layers give one expert 99 % of the tokens ({_span(nearly)} layers 95 %); expert "
            f"{most.idxmax() + 1} of {len(most)} takes {percent(most.max(), 1)} of all tokens ({gradient.replace('_', '-')} gradient)"
        )
        verdicts.append(HOLDS if (counts == layers).all() else UNDECIDED if (nearly == layers).any() else FAILS)
    full = strict[strict["lambda_router"] == strict["lambda_router"].max()]
    control = "no supervised run"
    if full["lambda_router"].iloc[0] > 0:
        seeds = full.groupby(["router_gradient", "seed"])["collapsed"].sum()
        control = f"with λ = {full['lambda_router'].iloc[0]:g}: {_span(seeds)} of {layers} layers at 99 %"
    trained = int(tables["07_collapse/collapse_training"]["tokens"].max())
    return Claim(
        "Without router supervision (λ = 0) every layer collapses to one fixed expert",
        "DynaMoE",
        "every layer",
        "; ".join(texts),
        f"{control}; holds if all layers of all seeds are at 99 %, does not if in no seed all are at 95 %",
        f"{plural(free['seed'].nunique(), 'seed')} of {trained:,} training tokens, {plural(free['tokens'].max(), 'token')} in each layer",
        verdicts[0] if len(set(verdicts)) == 1 else UNDECIDED,
        source,
    )


def theta_and_accuracy(tables: Tables) -> Claim:
    """θ trades accuracy for active parameters: the higher θ scores better on the benchmarks."""
    source = "06_pareto/theta_accuracy"
    steps = tables[source]
    steps = steps[steps["task"] == "average"]
    scored = _accuracy(tables)
    dense, routed = scored[scored["method"] == "dense"].iloc[0], scored[scored["method"] == "router"].sort_values("theta")
    text = ", ".join(f"{percent(row.value, 1)} at θ = {row.theta:g} ({compact(row.active_params)} active)" for row in routed.itertuples())
    told = ", ".join(f"{points(row.difference, row.low, row.high)} for {row.run}" for row in steps.itertuples())
    chance = tables["06_pareto/pareto"]["chance"].max()
    verdicts = [by_interval(low, high) for low, high in zip(steps["low"], steps["high"], strict=True)]
    return Claim(
        "θ trades benchmark accuracy for active parameters",
        "DynaMoE",
        "64.0, 66.5 and 70.1 % at θ = 0.7, 0.8, 0.9 (dense 74.2 %)",
        f"average accuracy {text}",
        f"dense {percent(dense['value'], 1)}, guessing {percent(chance, 1)}; {told}",
        f"{int(routed['n'].min()):,} documents of 7 tasks",
        together(*verdicts),
        source,
    )


def accuracy_at(theta: float) -> Callable[[Tables], Claim]:
    """Table 1: how much of its base model's accuracy the converted one loses at θ, as a share of it."""

    def claim(tables: Tables) -> Claim:
        paper = paper_table().set_index("model").loc[f"DynaMoE θ={theta:g}"]
        change, active = float(paper["average7_change"]), 1 + float(paper["active_params_change"])
        rows = _accuracy(tables)
        dense = rows[rows["method"] == "dense"].iloc[0]
        row = rows[(rows["method"] == "router") & (rows["theta"] == theta)]
        if row.empty:
            raise KeyError(f"accuracy at θ = {theta:g}")
        row = row.iloc[0]
        value, low, high = (row[name] / dense["value"] - 1 for name in ("value", "low", "high"))
        own = row["active_params"] / dense["active_params"]
        chance = tables["06_pareto/pareto"]["chance"].max()
        floor, theirs = chance / dense["value"] - 1, chance / (paper["average7"] / (1 + change)) - 1
        return Claim(
            f"At θ = {theta:g} no more than the paper's {percent(-change, 1)} of the base model's accuracy is lost",
            "DynaMoE",
            f"{signed(100 * change, 1)} % with {percent(active)} of the parameters active",
            f"{signed(100 * value, 1)} % ({signed(100 * low, 1)} to {signed(100 * high, 1)}) with {percent(own)} active",
            f"guessing would be {signed(100 * floor, 1)} %, of the paper's base {signed(100 * theirs, 1)} %; judged if no more parameters "
            f"are active than there, {100 * SAME_PARAMS:g} points aside",
            f"{int(row['n']):,} documents of 7 tasks",
            by_interval(low, high, at=change) if own <= active + SAME_PARAMS else UNDECIDED,
            "06_pareto/pareto",
        )

    return claim


CLAIMS = (
    function_kept,
    router_learns,
    neighbours,
    usage_by_layer,
    usage_by_theta,
    collapse,
    theta_and_accuracy,
    accuracy_at(0.9),
    accuracy_at(0.8),
)


# --- rows --------------------------------------------------------------------------------------------------------------------------


def _recall(tables: Tables) -> float:
    """Share of the choices whose label is the largest expert that get it."""
    counts = tables["04_router_confusion/router_confusion"]
    largest = counts["label"].max()
    asked = counts[counts["label"] == largest]
    return float(asked.loc[asked["expert"] == largest, "tokens"].sum() / asked["tokens"].sum())


def _pooled(frame: pd.DataFrame) -> pd.Series:
    return split_layers(frame)[1].iloc[0]


def _first_seed(frame: pd.DataFrame, seed: str) -> pd.DataFrame:
    return frame[frame[seed] == frame[seed].min()]


def _rows(pareto: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = pareto[pareto["metric"] == metric]
    if rows.empty:
        raise KeyError(metric)
    return rows


def _accuracy(tables: Tables) -> pd.DataFrame:
    rows = _rows(tables["06_pareto/pareto"], ACCURACY)
    if (rows["tasks"] != SEVEN).any():
        raise KeyError("accuracy over the paper's seven tasks")
    return pareto_points(rows)


def _same_runs(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    gradient, weight = rows["router_gradient"].iloc[0], rows["lambda_router"].iloc[0]
    return frame[(frame["router_gradient"] == gradient) & (frame["lambda_router"] == weight)]


def _span(counts: pd.Series) -> str:
    """'12', or '12 to 15 (by seed)'."""
    return f"{counts.min()}" if counts.nunique() == 1 else f"{counts.min()} to {counts.max()}"


def _sample(row: pd.Series) -> str:
    return f"{plural(row['tokens'], 'choice')}, {plural(row['documents'], 'document')}"
