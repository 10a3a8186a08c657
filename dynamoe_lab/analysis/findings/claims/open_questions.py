"""What DynaMoE left open, as statements that a measurement can answer: real time, choosing by token at all, other labels, head to head."""

from collections.abc import Callable

import pandas as pd

from dynamoe_lab.analysis.findings.claims.claim import FAILS, HOLDS, UNDECIDED, Claim, Tables, Verdict, by_interval, ratio, share, together
from dynamoe_lab.analysis.frames import compact, percent
from dynamoe_lab.analysis.metrics.pareto import pareto_points
from dynamoe_lab.analysis.metrics.timing import row_near, setting_name, told_setting
from dynamoe_lab.plural import plural

__all__ = ["CLAIMS", "apart"]


def apart(row: pd.Series, other: pd.Series) -> Verdict:
    """Whether a perplexity is lower than another's, by intervals that do not overlap: the two were not paired, so this errs on the safe
    side."""
    return HOLDS if row["high"] < other["low"] else FAILS if row["low"] > other["high"] else UNDECIDED


def theta_and_perplexity(tables: Tables) -> Claim:
    """Perplexity falls with every step of θ: the paper's trade, of accuracy, in the measure that this much text can tell."""
    source = "06_pareto/theta_steps"
    table, pareto = tables[source], tables["06_pareto/pareto"]
    steps = table[table["seed"] == table["seed"].min()].sort_values("theta")
    routed = pareto_points(pareto[pareto["metric"] == "perplexity_ratio"])
    routed = routed[(routed["method"] == "router") & (routed["train_tokens"] > 0)].sort_values("theta")
    text = ", ".join(
        f"{ratio(row.value, row.low, row.high)} at θ = {row.theta:g} ({compact(row.active_params)} active)" for row in routed.itertuples()
    )
    told = ", ".join(f"{ratio(row.ratio, row.low, row.high)} at {row.theta:g} over {row.lower_theta:g}" for row in steps.itertuples())
    verdicts = [
        by_interval(row.low, row.high, at=1.0, above=False) if row.active_params > row.lower_active_params else UNDECIDED
        for row in steps.itertuples()
    ]
    return Claim(
        "Every step of θ trades active parameters for perplexity",
        "open",
        "",
        f"times the dense perplexity: {text}",
        f"1 would be no gain from a step of θ: {told}",
        f"{plural(steps['n'].min(), 'document')}, {plural(steps['tokens'].min(), 'token')}",
        together(*verdicts),
        source,
    )


def less_time(phase: str, *, most: bool = False) -> Callable[[Tables], Claim]:
    """Fewer active parameters mean less time (the paper counts parameters only); `most`: of a decode step, that of the largest batch."""

    def claim(tables: Tables) -> Claim:
        source = "09_latency/realised_vs_ideal"
        rows = tables[source]
        rows = rows[rows["batch"] == rows.loc[rows["phase"] == phase, "batch"].max()] if most else told_setting(rows, phase)
        row = row_near(rows[rows["phase"] == phase], ("router",))
        if row is None:
            raise KeyError(f"{source}: no trained router")
        setting = setting_name(phase, int(row["batch"]), int(row["tokens"]))
        name = f"prefill, {setting}" if phase == "prefill" else f"decoding, {setting}"
        return Claim(
            f"Fewer active parameters mean less time: {name}",
            "open",
            "",
            f"{share(row['time_ratio'], row['time_ratio_low'], row['time_ratio_high'])} of the dense model's time "
            f"with {percent(row['active_mlp_fraction'])} of the neurons active",
            f"the dense model, in turn; Amdahl's bound {percent(1 / row['amdahl'], 1)}",
            f"{plural(row['n'], 'round')}, 10 to 90 %",
            by_interval(row["time_ratio_low"], row["time_ratio_high"], at=1.0, above=False),
            source,
        )

    return claim


def beats_static(tables: Tables) -> Claim:
    """Choosing by token beats one fixed prefix for all tokens, at the same active parameters and training."""
    source = "06_pareto/static_comparison"
    rows = tables[source]
    rows = rows[rows["method"] == "router"].sort_values(["theta", "seed"])
    if rows.empty:
        raise KeyError(source)
    verdicts = {by_interval(row.low, row.high, at=1.0, above=False) for row in rows.itertuples()}
    text = "; ".join(
        f"θ = {row.theta:g}: {ratio(row.ratio, row.low, row.high)} times the cut's perplexity at {percent(row.active_mlp_fraction)} of the "
        "neurons"
        for row in rows.itertuples()
    )
    cut = "; ".join(f"{percent(row.static_fraction)} for every token" for row in rows.itertuples())
    return Claim(
        "Choosing by token beats a static cut with as many active parameters, trained alike",
        "open",
        "",
        text,
        f"the cut: {cut}",
        f"{plural(rows['n'].min(), 'document')}, {plural(rows['tokens'].min(), 'token')}",
        verdicts.pop() if len(verdicts) == 1 else UNDECIDED,
        source,
    )


def beats_random(tables: Tables) -> Claim:
    """The router's choice of tokens matters: beside experts drawn at random with its own shares."""
    return _beside_random(tables, "03_train_router/trained_perplexity", "03_train_router/router_over_controls", "The router's choice")


def beats_random_tomoe(tables: Tables) -> Claim:
    """The same of ToMoE's router."""
    return _beside_random(tables, "12_tomoe/tomoe_perplexity", "12_tomoe/tomoe_over_random", "ToMoE's choice")


def _beside_random(tables: Tables, source: str, paired: str, who: str) -> Claim:
    rows, pairs = tables[source], tables[paired]
    drawn = rows[rows["run"].str.contains("random")].iloc[0]
    router = rows[rows["run"].str.contains("router") & ~rows["run"].str.contains("random")].iloc[0]
    pair = pairs[pairs["run"].str.contains("random")].iloc[0]
    active = f" at {percent(router['active_mlp_fraction'])} of the neurons" if "active_mlp_fraction" in rows else ""
    return Claim(
        f"{who} beats experts drawn at random at its own shares",
        "open",
        "",
        f"{ratio(router['ratio'], router['low'], router['high'])} times the dense perplexity{active}",
        f"at random {ratio(drawn['ratio'], drawn['low'], drawn['high'])}; paired: {ratio(pair['ratio'], pair['low'], pair['high'])}",
        f"{plural(pair['n'], 'document')}, {plural(pair['tokens'], 'token')}",
        by_interval(pair["low"], pair["high"], at=1.0, above=False),
        paired,
    )


def other_label(tables: Tables) -> Claim:
    """Another definition of difficulty than the cosine gives a better model at no more compute."""
    source = "20_ablation/ablation"
    table = tables[source]
    rows = table[(table["mode"] == "router") & (table["metric"] == "perplexity_ratio")]
    cosine, others = rows[rows["dynamoe.label"] == "cosine"], rows[rows["dynamoe.label"] != "cosine"]
    if cosine.empty or others.empty:
        raise KeyError(source)
    if len(cosine) > 1:
        raise KeyError(f"{source}: one row of the cosine")
    base = cosine.iloc[0]
    better, worse = (
        [
            apart(row, base) == verdict and dearer * (row["active_mlp_fraction"] - base["active_mlp_fraction"]) >= 0
            for _, row in others.iterrows()
        ]
        for verdict, dearer in ((HOLDS, -1), (FAILS, 1))
    )  # no more compute and better; no less compute and worse
    text = "; ".join(
        f"{row['dynamoe.label'].replace('_', ' ')} {ratio(row['value'], row['low'], row['high'])} at {percent(row['active_mlp_fraction'])}"
        for _, row in others.iterrows()
    )
    return Claim(
        "Another label than the cosine gives a lower perplexity at no more compute",
        "open",
        "",
        f"times the dense perplexity, share of the neurons: {text}",
        f"cosine {ratio(base['value'], base['low'], base['high'])} at {percent(base['active_mlp_fraction'])}; not paired",
        f"{plural(base['n'], 'document')}, {plural(base['train_tokens'], 'training token')}",
        HOLDS if any(better) else FAILS if all(worse) else UNDECIDED,
        source,
    )


def head_to_head(tables: Tables) -> Claim:
    """ToMoE beside DynaMoE on the same base model: whose perplexity is lower at no more active parameters?"""
    source = "06_pareto/tomoe_against_routers"
    rows = tables[source]
    if rows["method"].nunique() != 1:
        raise KeyError(f"{source}: one ToMoE model")
    rows = rows[rows["seed"] == rows["seed"].min()].sort_values("router_active_params")
    own = rows.iloc[0]
    cheaper, dearer = (rows[side * (rows["router_active_params"] - own["active_params"]) >= 0] for side in (-1, 1))
    lost, won = bool((cheaper["low"] > 1).any()), bool((dearer["high"] < 1).any())
    text = "; ".join(
        f"{ratio(row.ratio, row.low, row.high)} times that of θ = {row.theta:g} ({compact(row.router_active_params)})"
        for row in rows.itertuples()
    )
    return Claim(
        "ToMoE has a lower perplexity than DynaMoE at no more active parameters",
        "open",
        "",
        f"ToMoE {own['method'].removeprefix('tomoe ')}, {compact(own['active_params'])} active: perplexity {text}",
        f"other budgets: {int(own['train_tokens']):,} tokens with the dense model frozen, {int(own['router_train_tokens']):,} that train "
        "the MLPs; lost to a router with no more active, or better than one with no fewer",
        f"{plural(own['n'], 'document')}, {plural(own['tokens'], 'token')}",
        UNDECIDED if lost == won else HOLDS if won else FAILS,
        source,
    )


CLAIMS = (
    theta_and_perplexity,
    beats_static,
    beats_random,
    less_time("prefill"),
    less_time("decode"),
    less_time("decode", most=True),
    other_label,
    head_to_head,
    beats_random_tomoe,
)
