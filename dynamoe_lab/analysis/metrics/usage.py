"""Who does the work: the share of tokens each expert takes, how evenly, and how much of the MLP that runs."""

import math

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.fractions import Fractions, expert_count, row_fractions
from dynamoe_lab.analysis.frames import ALL, require
from dynamoe_lab.analysis.metrics.tally import layer_names, tallies, with_all
from dynamoe_lab.analysis.statistics import bootstrap_sums

__all__ = ["active_fraction", "expert_usage", "usage_summary"]


def _labelled(routing: pd.DataFrame) -> pd.DataFrame:
    """Tallies count by label, too; of a method without labels (ToMoE) all have one, and sums over labels say what they always say."""
    unlabelled = isinstance(routing, pd.DataFrame) and "label" not in routing
    return routing.assign(label=0) if unlabelled else routing


def expert_usage(routing: pd.DataFrame, *, theta: float = math.nan, by_domain: bool = False, experts: int | None = None) -> pd.DataFrame:
    """The share of each layer's tokens that each expert took.

    Args:
        routing: the frame `routing`: run, domain, document, layer, expert; a row per token and layer.
        theta: threshold it was made with; copied into the result. NaN where the method has none.
        by_domain: a set of rows per domain; else all domains together, domain "all".
        experts: number of experts; None: the highest label or expert in the frame.

    Returns:
        run, theta, domain, layer, expert, share, tokens: one row per layer and expert, unused experts
            included with 0.

    Raises:
        InputError: a column is missing, or an expert is not below `experts`.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": [0, 0, 1, 1], "expert": [0, 0, 0, 1]})
        >>> lab.expert_usage(routing)[["layer", "expert", "share", "tokens"]]
           layer  expert  share  tokens
        0      0       0    1.0       2
        1      0       1    0.0       0
        2      1       0    0.5       1
        3      1       1    0.5       1
    """
    parts = []
    for tally in tallies(_labelled(routing), experts, "expert_usage", by_domain=by_domain):
        tokens = tally.joint.sum(axis=(0, 2))  # (L, E)
        index = pd.MultiIndex.from_product([tally.layers, range(tokens.shape[1])], names=["layer", "expert"])
        columns = {"run": tally.run, "theta": theta, "domain": tally.domain}
        frame = pd.DataFrame(columns, index=index).reset_index()
        frame["share"] = (tokens / tokens.sum(axis=1, keepdims=True)).ravel()
        frame["tokens"] = tokens.ravel()
        parts.append(frame[["run", "theta", "domain", "layer", "expert", "share", "tokens"]])
    return pd.concat(parts, ignore_index=True)


def usage_summary(usage: pd.DataFrame, *, fractions: Fractions) -> pd.DataFrame:
    """How evenly and how much each layer works, from shares of experts.

    Args:
        usage: layer, expert, share and any columns that name the case (run, theta, domain; or lambda_router,
            seed); tokens if known.
        fractions: share of the MLP that each expert runs: [E], [L, E], or the frame of `lab.expert_fractions`.

    Returns:
        The case's columns, layer, entropy_bits (of the shares, 0 to log2 E), active_fraction (share of the
        layer's MLP run, mean over tokens), tokens if known. Layer "all": the mean over layers.
    """
    require(usage, ("layer", "expert", "share"), "usage_summary")
    width = row_fractions(fractions, usage["layer"], usage["expert"], "usage_summary")
    case = [column for column in usage.columns if column not in ("layer", "expert", "share", "tokens")]
    share = usage["share"].to_numpy(dtype=np.float64)
    work = usage[[*case, "layer"]].copy()
    work["entropy_bits"] = -share * np.log2(np.where(share > 0, share, 1.0))
    work["active_fraction"] = share * width
    if "tokens" in usage.columns:
        work["tokens"] = usage["tokens"]
    single = work.groupby([*case, "layer"], sort=False, observed=True, dropna=False).sum().reset_index()
    single["entropy_bits"] = single["entropy_bits"].abs()  # -0.0 -> 0.0
    how = {"entropy_bits": "mean", "active_fraction": "mean", **({"tokens": "sum"} if "tokens" in single else {})}
    groups = single.groupby(case, sort=False, observed=True, dropna=False) if case else [((), single)]
    parts = []
    for _, part in groups:
        pooled = {**part.iloc[0][case].to_dict(), "layer": ALL, **part.agg(how).to_dict()}
        parts.append(pd.concat([part.astype({"layer": object}), pd.DataFrame([pooled])]))
    result = pd.concat(parts, ignore_index=True)
    return result.astype({"tokens": np.int64}) if "tokens" in result else result


def active_fraction(
    routing: pd.DataFrame,
    *,
    theta: float = math.nan,
    fractions: Fractions,
    by_domain: bool = False,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean share of the MLP that a token runs, per layer and for all layers ("all"), with a document
    bootstrap.

    Args:
        routing: the frame `routing`: run, domain, document, layer, expert; a row per token and layer.
        theta: threshold it was made with; copied into the result. NaN where the method has none.
        fractions: share of the MLP that each expert runs: [E], [L, E], or the frame of `lab.expert_fractions`.
        by_domain: rows per domain; else all domains together, domain "all".
        confidence, resamples, seed: of the document bootstrap.

    Returns:
        run, theta, domain, layer, active_fraction, low, high, tokens, documents, confidence.

    Raises:
        InputError: a column is missing, or `fractions` says nothing about a layer or expert of the frame.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "domain": "web", "document": 0, "layer": [0, 0, 1, 1], "expert": [0, 0, 0, 1]})
        >>> lab.active_fraction(routing, fractions=(0.5, 1.0))[["layer", "active_fraction", "tokens"]]
          layer  active_fraction  tokens
        0     0            0.500       2
        1     1            0.750       2
        2   all            0.625       4
    """
    parts = []
    experts = expert_count(fractions, "active_fraction")
    for tally in tallies(_labelled(routing), experts, "active_fraction", by_domain=by_domain):
        tokens = tally.joint.sum(axis=2)  # (documents, L, E)
        cells = pd.DataFrame(np.argwhere(tokens.any(axis=0)), columns=["layer", "expert"])  # those that a token took
        sizes = np.zeros(tokens.shape[1:])
        sizes[tuple(cells.to_numpy().T)] = row_fractions(
            fractions, pd.Series(tally.layers[cells["layer"]], name="layer"), cells["expert"], "active_fraction"
        )
        work = np.stack([(tokens * sizes).sum(axis=-1), tokens.sum(axis=-1)], axis=-1)  # (documents, L, 2): MLPs run, and tokens
        settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
        interval = bootstrap_sums(with_all(work, -2), lambda totals: totals[..., 0] / totals[..., 1], **settings)
        columns = {"run": tally.run, "theta": theta, "domain": tally.domain, "layer": layer_names(tally.layers)}
        values = {"active_fraction": interval.value, "low": interval.low, "high": interval.high}
        sample = {"tokens": with_all(tokens.sum(axis=(0, 2)), 0), "documents": interval.n, "confidence": confidence}
        parts.append(pd.DataFrame({**columns, **values, **sample}))
    return pd.concat(parts, ignore_index=True)
