"""What DynaMoE left open, as statements that a measurement can answer: real time, choosing by token at all, other labels, head to head."""

from collections.abc import Callable

import pandas as pd

from dynamoe_lab.analysis.findings.claims.claim import FAILS, HOLDS, UNDECIDED, Claim, Tables, Verdict, by_interval, ratio, share
from dynamoe_lab.analysis.frames import compact, percent
from dynamoe_lab.analysis.metrics.pareto import pareto_points
from dynamoe_lab.analysis.metrics.timing import row_near, setting_name, told_setting
from dynamoe_lab.plural import plural

__all__ = ["CLAIMS", "apart"]

SAME_COMPUTE = 0.015  # shares of the MLP that differ by less are called equal


def apart(row: pd.Series, other: pd.Series) -> Verdict:
    """Whether a perplexity is lower than another's, by intervals that do not overlap: the two were not paired, so this errs on the safe
    side."""
    return HOLDS if row["high"] < other["low"] else FAILS if row["low"] > other["high"] else UNDECIDED


def less_time(phase: str) -> Callable[[Tables], Claim]:
    """Fewer active parameters mean less time (the paper counts parameters only)."""

    def claim(tables: Tables) -> Claim:
        source = "09_latency/realised_vs_ideal"
        row = row_near(told_setting(tables[source], phase), ("router",))
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
    source = "03_train_router/trained_perplexity"
    rows = tables[source]
    return _beside_random("The router's choice beats experts drawn at random at its own shares", rows, source)


def beats_random_tomoe(tables: Tables) -> Claim:
    """The same of ToMoE's router."""
    source = "12_tomoe/tomoe_perplexity"
    return _beside_random("ToMoE's choice beats experts drawn at random at its own shares", tables[source], source)


def _beside_random(claim: str, rows: pd.DataFrame, source: str) -> Claim:
    drawn = rows[rows["run"].str.contains("random")].iloc[0]
    router = rows[rows["run"].str.contains("router") & ~rows["run"].str.contains("random")].iloc[0]
    active = f" at {percent(router['active_mlp_fraction'])} of the neurons" if "active_mlp_fraction" in rows else ""
    return Claim(
        claim,
        "open",
        "",
        f"{ratio(router['ratio'], router['low'], router['high'])} times the dense perplexity{active}",
        f"at random {ratio(drawn['ratio'], drawn['low'], drawn['high'])}",
        f"{plural(router['n'], 'document')}, {plural(router['tokens'], 'token')}",
        apart(router, drawn),
        source,
    )


def other_label(tables: Tables) -> Claim:
    """Another definition of difficulty than the cosine gives a better model at no more compute."""
    source = "20_ablation/ablation"
    table = tables[source]
    rows = table[(table["mode"] == "router") & (table["metric"] == "perplexity_ratio")]
    cosine, others = rows[rows["dynamoe.label"] == "cosine"], rows[rows["dynamoe.label"] != "cosine"]
    if cosine.empty or others.empty:
        raise KeyError(source)
    base = cosine.iloc[0]
    fair = others[others["active_mlp_fraction"] <= base["active_mlp_fraction"] + SAME_COMPUTE]
    found = [apart(row, base) for _, row in fair.iterrows()]
    text = "; ".join(
        f"{row['dynamoe.label'].replace('_', ' ')} {ratio(row['value'], row['low'], row['high'])} at {percent(row['active_mlp_fraction'])}"
        for _, row in others.iterrows()
    )
    return Claim(
        "Another label than the cosine gives a lower perplexity at no more compute",
        "open",
        "",
        f"times the dense perplexity, share of the neurons: {text}",
        f"cosine {ratio(base['value'], base['low'], base['high'])} at {percent(base['active_mlp_fraction'])}",
        f"{plural(base['n'], 'document')}, {plural(base['train_tokens'], 'training token')}",
        HOLDS if HOLDS in found else FAILS if len(fair) == len(others) and set(found) == {FAILS} else UNDECIDED,
        source,
    )


def head_to_head(tables: Tables) -> Claim:
    """ToMoE beside DynaMoE on the same base model: whose perplexity is lower at no more active parameters?"""
    source = "06_pareto/pareto"
    rows = pareto_points(tables[source][tables[source]["metric"] == "perplexity_ratio"])
    rows = rows[rows["train_tokens"] > 0]
    tomoe, routed = rows[rows["method"].str.startswith("tomoe")], rows[rows["method"] == "router"]
    if tomoe.empty or routed.empty:
        raise KeyError(source)
    own = tomoe.iloc[0]
    near = routed.loc[(routed["active_params"] - own["active_params"]).abs().idxmin()]
    cheaper = routed[routed["active_params"] <= own["active_params"]]  # no more compute than ToMoE, and better: it loses
    dearer = routed[routed["active_params"] >= own["active_params"]]
    lost = any(apart(row, own) == HOLDS for _, row in cheaper.iterrows())
    won = any(apart(own, row) == HOLDS for _, row in dearer.iterrows())
    return Claim(
        "ToMoE has a lower perplexity than DynaMoE at no more active parameters",
        "open",
        "",
        f"ToMoE {own['method'].removeprefix('tomoe ')}: {ratio(own['value'], own['low'], own['high'])} times the dense perplexity with "
        f"{compact(own['active_params'])} active, after {compact(own['train_tokens'])} tokens with the dense model frozen",
        f"DynaMoE θ = {near['theta']:g}, the nearest: {ratio(near['value'], near['low'], near['high'])} with "
        f"{compact(near['active_params'])}, after {compact(near['train_tokens'])} tokens that trained the MLPs, too",
        plural(own["n"], "document"),
        UNDECIDED if lost == won else HOLDS if won else FAILS,
        source,
    )


CLAIMS = (
    beats_static,
    beats_random,
    less_time("prefill"),
    less_time("decode"),
    other_label,
    head_to_head,
    beats_random_tomoe,
)
