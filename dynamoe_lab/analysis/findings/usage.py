"""Who does the work: usage of the experts by layer and by domain."""

import pandas as pd

from dynamoe_lab.analysis.findings.wording import domains_text, mean_text, one_row, sample_text
from dynamoe_lab.analysis.frames import ALL, list_names, one_run, percent, require, split_layers
from dynamoe_lab.errors import InputError

__all__ = ["domain_finding", "usage_finding"]

_ACTIVE = ("run", "layer", "tokens", "documents", "confidence", "domain", "active_fraction", "low", "high")


def usage_finding(active: pd.DataFrame, *, usage: pd.DataFrame | None = None) -> str:
    """How much does expert usage differ between layers (a claim of arXiv 2502.12325)?

    Args:
        active: the frame of `active_fraction`, one run and one domain (or "all").
        usage: the frame of `expert_usage` of the same routing; adds in how many layers one expert takes nearly all.

    Raises:
        InputError: a column or the row "all" is missing, or the frame holds several runs or domains.

    Example:
        >>> active = pd.DataFrame({"layer": [0, 1, "all"], "active_fraction": [0.5, 0.9, 0.7], "documents": 25, "confidence": 0.95})
        >>> active = active.assign(low=active["active_fraction"] - 0.1, high=active["active_fraction"] + 0.1)
        >>> active = active.assign(run="a", domain="all", tokens=256)
        >>> print(lab.usage_finding(active))
        Averaged over layers a token runs 70.0 % (60.0 % to 80.0 %) of the MLP neurons, from 50.0 % (40.0 % to 60.0 %) in layer 0 to
        90.0 % (80.0 % to 100 %) in layer 1 (95 % intervals; n = 256 tokens in each of 2 layers, 25 documents).
    """
    require(active, _ACTIVE, "usage_finding")
    one_run(active, "usage_finding")
    if active["domain"].nunique() > 1:
        raise InputError("usage_finding: several domains in the frame; pass the rows of one, or use domain_finding")
    layers, pooled = split_layers(active)
    whole = one_row(pooled, _ACTIVE, f"usage_finding: the row of layer '{ALL}'")
    layers = layers.set_index("layer").sort_values("active_fraction", kind="stable")
    ends = [f"{mean_text(layers.iloc[at])} in layer {layers.index[at]}" for at in (0, -1)]
    across, few = f", from {ends[0]} to {ends[1]}", min(3, len(layers) // 2)
    extremes = f"; least in layers {list_names(layers.index[:few])}, most in layers {list_names(layers.index[: -few - 1 : -1])}"
    sentence = (
        f"Averaged over layers a token runs {mean_text(whole)} of the MLP neurons{across if len(layers) > 1 else ''}"
        f"{extremes if few > 1 else ''} ({percent(whole['confidence'])} intervals; {sample_text(layers, whole)})"
    )
    if usage is None:
        return f"{sentence}."
    require(usage, ("layer", "expert", "share"), "usage_finding")
    alone = int((usage.groupby("layer", observed=True)["share"].max() >= 0.99).sum())
    return f"{sentence}; one expert takes 99 % or more of the tokens in {alone} of {len(layers)} layers."


def domain_finding(active: pd.DataFrame) -> str:
    """Which domains run more of the MLP?

    The two extreme domains are compared; as they are picked from all pairs, the interval is widened (Bonferroni).

    Args:
        active: the frame of `active_fraction(..., by_domain=True)`, one run.

    Raises:
        InputError: a column is missing, or the frame holds several runs.

    Example:
        >>> active = pd.DataFrame({"run": "a", "domain": ["code", "web"], "layer": "all", "active_fraction": [0.5, 0.8], "tokens": 256})
        >>> active = active.assign(low=active["active_fraction"] - 0.1, high=active["active_fraction"] + 0.1, documents=25, confidence=0.95)
        >>> print(lab.domain_finding(active))
        Mean active MLP neurons by domain, with 95 % intervals over n documents: code 50.0 % (40.0 % to 60.0 %, n = 25) and web 80.0 %
        (70.0 % to 90.0 %, n = 25); the extremes, code and web, differ (30.0 points).
    """
    require(active, _ACTIVE, "domain_finding")
    one_run(active, "domain_finding")
    return f"Mean active MLP neurons by domain, {domains_text(split_layers(active)[1], 'active_fraction', 'domain_finding')}."
