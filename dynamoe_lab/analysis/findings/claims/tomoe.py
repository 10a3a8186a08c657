"""The claims of ToMoE (arXiv 2501.15316), and its paper's signs of failure."""

import pandas as pd

from dynamoe_lab.analysis.findings.claims.claim import FAILS, HOLDS, UNDECIDED, Claim, Tables, by_interval, ratio, together
from dynamoe_lab.analysis.frames import percent, split_layers
from dynamoe_lab.plural import plural

__all__ = ["CLAIMS"]

PAPER_RATIO = {0.7: 6.41 / 5.12, 0.6: 7.17 / 5.12, 0.5: 8.36 / 5.12}  # perplexity over dense, Llama-2-7B on WikiText-2
PAPER_EXTRA = 0.0027  # of the parameters of Llama-2-7B
REACHED = 0.01  # of the ratio that the loss is about
WINDOW = 10  # steps of a mean


def target_reached(tables: Tables) -> Claim:
    """R_P brings the ratio of active weights to the target p."""
    source = "12_tomoe/tomoe_training"
    p, steps = _params(tables)["p"], tables[source]
    steps = steps[steps["run"] == steps["run"].iloc[0]].sort_values("step")
    last = steps.tail(WINDOW)
    reached, open_ratio = last["active_ratio_max"].mean(), steps["open_ratio"].dropna()
    told = f"; without noise, on average over held-out tokens {percent(open_ratio.iloc[-1], 1)}" if len(open_ratio) else ""
    return Claim(
        f"Training brings the active ratio to its target, p = {p:g}",
        "ToMoE",
        percent(p),
        f"{percent(reached, 1)} by the widest expert and token, as the loss counts{told}",
        f"target {percent(p)}; called reached within {100 * REACHED:g} point",
        f"mean of {plural(len(last), 'step')}, 1 seed",
        HOLDS if abs(reached - p) <= REACHED else FAILS,
        source,
    )


def perplexity(tables: Tables) -> Claim:
    """Perplexity at p, of the table of WikiText-2."""
    source = "12_tomoe/tomoe_perplexity"
    whole = _params(tables)
    p = float(whole["p"])
    if p not in PAPER_RATIO:
        raise KeyError(f"the paper's perplexity at p = {p:g}")
    rows = tables[source]
    row = rows[rows["run"] == "router"].iloc[0]
    tokens = int(tables["12_tomoe/tomoe_training"]["tokens"].max())
    return Claim(
        f"With p = {p:g} perplexity is at most {PAPER_RATIO[p]:.2f} times the dense model's",
        "ToMoE",
        f"{PAPER_RATIO[p]:.2f} (Llama-2-7B, WikiText-2)",
        f"{ratio(row['ratio'], row['low'], row['high'])} with {percent(whole['active_mlp_fraction'])} of the MLP neurons active",
        f"the paper trained on 20 M tokens and more, this on {tokens:,}",
        f"{plural(row['n'], 'document')}, {plural(row['tokens'], 'token')}",
        by_interval(row["low"], row["high"], at=PAPER_RATIO[p], above=False),
        source,
    )


def no_collapse(tables: Tables) -> Claim:
    """Failure sign: R_L to 1, all tokens on one expert."""
    source = "12_tomoe/tomoe_usage"
    usage = tables[source]
    most = usage.groupby("layer")["share"].max()
    stuck, experts = int((most >= 0.99).sum()), usage["expert"].nunique()
    return Claim(
        "No layer collapses to one expert",
        "ToMoE",
        "all tokens on one expert is its sign of failure",
        f"{stuck} of {len(most)} layers give one expert 99 % of the tokens; the busiest expert of a layer takes {percent(most.mean())} on "
        "average",
        f"used alike: {percent(1 / experts, 1)}; one layer at 99 % would be a collapse",
        f"{plural(usage.groupby('layer')['tokens'].sum().max(), 'token')} in each layer, 1 seed",
        FAILS if stuck else HOLDS,
        source,
    )


def union(tables: Tables) -> Claim:
    """Failure sign: union coverage below 80 % with a jump of perplexity."""
    source = "12_tomoe/tomoe_union"
    rows = split_layers(tables[source])[1].set_index("count")
    none = rows.loc[0, "share"]
    experts = int(rows.index.max())
    return Claim(
        "80 % of the neurons and more are in some expert",
        "ToMoE",
        "below 80 %, with a jump of perplexity, is a sign of failure",
        f"{percent(1 - none, 1)} are in some expert, {percent(rows.loc[experts, 'share'], 1)} in all {experts}",
        f"experts of these widths drawn at random: {percent(1 - rows.loc[0, 'chance'], 1)} and {percent(rows.loc[experts, 'chance'], 1)}",
        f"all {int(rows['neurons'].iloc[0]):,} neurons, 1 seed",
        HOLDS if 1 - none >= 0.8 else FAILS,
        source,
    )


def extra_parameters(tables: Tables) -> Claim:
    """Routers add little."""
    source = "12_tomoe/tomoe_params"
    whole = _params(tables)
    added = whole["router"] / whole["dense_params"]
    return Claim(
        f"What chooses experts and masks adds {percent(PAPER_EXTRA, 2)} of parameters",
        "ToMoE",
        f"{percent(PAPER_EXTRA, 2)} (Llama-2-7B)",
        percent(added, 2),
        "of the dense model's parameters; a router grows with the width, weights with its square",
        "a count",
        HOLDS if added <= PAPER_EXTRA else FAILS,
        source,
    )


def specialisation(tables: Tables) -> Claim:
    """Experts specialise: their choice goes with domain and token class, more than before training and than labels shuffled."""
    source = "12_tomoe/tomoe_specialisation"
    rows = split_layers(tables[source])[1]
    texts, controls, verdicts = [], [], []
    for factor, part in rows.groupby("factor", sort=False):
        before, after = (part[part["run"].eq("before training") == first].iloc[0] for first in (True, False))
        texts.append(f"{factor} {after['association']:.2f} ({after['low']:.2f} to {after['high']:.2f}; p {after['p']:.2g} of shuffles)")
        controls.append(
            f"{factor} {before['association']:.2f} ({before['low']:.2f} to {before['high']:.2f}) before training, "
            f"{after['control']:.2f} with labels shuffled"
        )
        verdicts.append(_above(after, before))
    row = rows[rows["run"] != "before training"].iloc[0]
    return Claim(
        "Training makes ToMoE's experts specialise in domains and in classes of tokens",
        "open",
        "",
        f"Cramér's V, {'; '.join(texts)}",
        "; ".join(controls),
        f"{plural(row['tokens'], 'token')}, {plural(row['documents'], 'document')}",
        together(*verdicts),
        source,
    )


def _above(after: pd.Series, before: pd.Series) -> str:
    beyond = after["p"] <= (1 - after["confidence"]) / 2
    if beyond and after["low"] > before["high"]:
        return HOLDS
    return FAILS if after["high"] < before["low"] else UNDECIDED


def _params(tables: Tables) -> pd.Series:
    """The row of the whole model: its parameters, p, and how many the dense model has."""
    return split_layers(tables["12_tomoe/tomoe_params"])[1].iloc[0]


CLAIMS = (target_reached, perplexity, extra_parameters, no_collapse, union, specialisation)
