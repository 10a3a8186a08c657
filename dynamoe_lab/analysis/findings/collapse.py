"""What happens to the choice of experts without supervision of the routers."""

from collections.abc import Sequence

import pandas as pd

from dynamoe_lab.analysis.findings.wording import tokens_text
from dynamoe_lab.analysis.frames import ALL, expert_names, percent, require, split_layers
from dynamoe_lab.analysis.metrics.collapse import CASE, collapsed_layers, run_name
from dynamoe_lab.plural import plural

__all__ = ["collapse_finding", "collapse_verdict"]


def collapse_finding(
    collapse: pd.DataFrame, information: pd.DataFrame, *, fractions: Sequence[float] | None = None, train_tokens: int | None = None
) -> str:
    """Do layers collapse to one fixed expert when λ_router = 0 (a claim of arXiv 2502.12325), and do they not when it is 1?

    A layer is called collapsed when one expert takes 99 % or more of its tokens; the number at 95 % is told, too. A run "collapsed" if
    all its layers did, in every seed.

    Args:
        collapse: lambda_router, router_gradient, seed, layer, expert, share, tokens (from `stack_runs` of `expert_usage` frames).
        information: lambda_router, router_gradient, seed, layer, entropy, information, active_mlp_fraction (from `stack_runs` of
            `usage_information` frames with fractions).
        fractions: [E] share of the MLP of each expert, to call the experts by.
        train_tokens: that every run was trained on; a collapse may come later.

    Raises:
        InputError: a column or the rows of layer "all" are missing.

    Example:
        >>> usage = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "share": [0.5, 0.5, 0.0, 1.0], "tokens": [4, 4, 0, 8]})
        >>> entropy = pd.DataFrame({"layer": [0, 1, "all"], "entropy": [1.0, 0.0, 0.5], "information": [0.2, 0.0, 0.1]})
        >>> frames = [{(0.0, "probability", 0): frame} for frame in (usage, entropy.assign(active_mlp_fraction=[0.75, 1.0, 0.875]))]
        >>> print(lab.collapse_finding(*map(lab.stack_runs, frames), fractions=(0.5, 1.0)))
        With λ the weight of the router loss, and a layer called collapsed when one expert takes 99 % or more of its n = 8 tokens: λ =
        0: 1 of 2 layers collapsed, all of them to expert 100 % (1 at 95 %), 88 % of the MLP neurons active, entropy 0.50 bits, 0.10
        bits told by the token's id, 1 seed; not every layer had collapsed without supervision for the probability gradient.
    """
    require(information, (*CASE, "layer", "entropy", "information", "active_mlp_fraction"), "collapse_finding: information")
    strict, loose = (collapsed_layers(collapse, threshold=threshold) for threshold in (0.99, 0.95))
    names = expert_names(fractions, int(collapse["expert"].max()), "collapse_finding")
    whole = split_layers(information)[1]
    require(whole, (), f"collapse_finding: information of layer '{ALL}'")
    layers = strict["layer"].nunique()
    pairs = strict[["router_gradient", "lambda_router"]].drop_duplicates().itertuples(index=False, name=None)
    cases = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    texts = []
    for gradient, weight in cases:
        rows, nearly, means = (_of(frame, gradient, weight) for frame in (strict, loose, whole))
        counts = rows.groupby("seed")["collapsed"].sum()
        stuck = rows[rows["collapsed"]]
        if (counts == layers).all():
            said = f"all {plural(layers, 'layer')} collapsed"
        elif (counts == 0).all():
            said = f"no layer of {layers} collapsed"
        else:
            said = f"{_span(counts)} of {layers} layers collapsed"
        if len(stuck):
            each = stuck["expert"].value_counts()
            of = "all of them" if len(each) == 1 else f"{percent(each.iloc[0] / len(stuck))} of them"
            said += f", {of} to expert {names[each.index[0]]}"
        said += f" ({_span(nearly.groupby('seed')['collapsed'].sum())} at 95 %)"
        active, seeds = means["active_mlp_fraction"], len(counts)
        spread = f" (seeds {percent(active.min())} to {percent(active.max())})" if percent(active.min()) != percent(active.max()) else ""
        texts.append(
            f"{run_name(weight, gradient, cases)}: {said}, {percent(active.mean())} of the MLP neurons active{spread}, entropy "
            f"{means['entropy'].mean():.2f} bits, {max(means['information'].mean(), 0):.2f} bits told by the token's id, "
            f"{plural(seeds, 'seed')}"
        )
    tokens = tokens_text(strict["tokens"].max())
    return (
        f"With λ the weight of the router loss, and a layer called collapsed when one expert takes 99 % or more of its n = {tokens}: "
        f"{'; '.join(texts)}{_exceptions(strict, layers, train_tokens)}."
    )


def _of(frame: pd.DataFrame, gradient: str, weight: float) -> pd.DataFrame:
    """Rows of one setting, all seeds."""
    return frame[(frame["router_gradient"] == gradient) & (frame["lambda_router"] == weight)]


def _span(counts: pd.Series) -> str:
    """One number if the seeds agree, else the least and the most."""
    return " to ".join(dict.fromkeys((str(counts.min()), str(counts.max()))))


def collapse_verdict(collapse: pd.DataFrame, *, fractions: Sequence[float] | None = None, train_tokens: int | None = None) -> str:
    """One sentence for a caption: did every layer of the unsupervised runs (λ_router = 0) collapse to one expert, gradient by gradient?

    Args:
        collapse: lambda_router, router_gradient, seed, layer, expert, share, tokens; a layer is collapsed at 99 % of its tokens.
        fractions: [E] share of the MLP of each expert, to call the experts by.
        train_tokens: that every run was trained on.

    Raises:
        InputError: a column is missing.

    Example:
        >>> usage = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "share": [0.5, 0.5, 0.0, 1.0], "tokens": [4, 4, 0, 8]})
        >>> print(lab.collapse_verdict(lab.stack_runs({(0.0, "probability", 0): usage}), fractions=(0.5, 1.0)))
        Without supervision (λ = 0) 1 of 2 layers collapsed to one expert under the probability gradient, where expert 100 % takes 75
        % of all tokens and 88 % of the MLP neurons run.
    """
    strict = collapsed_layers(collapse, threshold=0.99)
    free = strict[strict["lambda_router"] == 0]
    if free.empty:
        return "No run was without supervision (λ = 0)."
    layers, names = strict["layer"].nunique(), expert_names(fractions, int(collapse["expert"].max()), "collapse_verdict")
    counts = free.groupby(["router_gradient", "seed"])["collapsed"].sum()
    texts = []
    for gradient, found in counts.groupby("router_gradient"):
        how = (
            f"all {plural(layers, 'layer')}"
            if (found == layers).all()
            else f"no layer of {layers}"
            if not found.any()
            else f"{_span(found)} of {layers} layers"
        )
        shares = _of(collapse, gradient, 0.0).groupby("expert")["share"].mean()
        most = f"expert {names[shares.idxmax()]} takes {percent(shares.max() / shares.sum())} of all tokens{_run_share(shares, fractions)}"
        texts.append(f"{how} collapsed to one expert under the {gradient.replace('_', '-')} gradient, where {most}")
    for gradient, weight in sorted(set(zip(collapse["router_gradient"], collapse["lambda_router"], strict=True))):
        if weight == collapse["lambda_router"].max() > 0 and fractions is not None:
            shares = _of(collapse, gradient, weight).groupby("expert")["share"].mean()
            stuck = _span(_of(strict, gradient, weight).groupby("seed")["collapsed"].sum())
            run = _run_share(shares, fractions).removeprefix(" and")
            texts.append(f"with λ = {weight:g} ({gradient.replace('_', '-')}) {stuck} of {layers} layers are on one expert and{run}")
    return f"Without supervision (λ = 0) {_when(train_tokens)}{'; '.join(texts)}."


def _run_share(shares: pd.Series, fractions: Sequence[float] | None) -> str:
    """Mean share of the MLP that runs at these shares of the experts, as the end of a sentence."""
    if fractions is None:
        return ""
    return f" and {percent(sum(share * fractions[expert] for expert, share in shares.items()) / shares.sum())} of the MLP neurons run"


def _exceptions(strict: pd.DataFrame, layers: int, train_tokens: int | None) -> str:
    """Gradients of which an unsupervised run did not collapse everywhere."""
    free = strict[strict["lambda_router"] == 0]
    worst = free.groupby(["router_gradient", "seed"])["collapsed"].sum().groupby("router_gradient").min()
    held = [name.replace("_", "-") for name, count in worst.items() if count < layers]
    if worst.empty or not held:
        return ""
    return f"; {_when(train_tokens)}not every layer had collapsed without supervision for the {' and the '.join(held)} gradient"


def _when(train_tokens: int | None) -> str:
    return "" if train_tokens is None else f"after {tokens_text(train_tokens)} of training "
