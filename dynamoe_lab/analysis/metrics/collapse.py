"""Do routers still choose by token? Entropy of their choice, and how much a token's id tells about it, beside what shuffling gives.

A layer whose every token goes to one expert has an entropy of 0; a layer that draws experts at random has a high entropy and no
information.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from dynamoe_lab.analysis.frames import ALL, require, whole_numbers
from dynamoe_lab.errors import InputError

__all__ = ["CASE", "collapsed_layers", "run_name", "stack_runs", "usage_information"]

CASE = ("lambda_router", "router_gradient", "seed")  # what names a run of the collapse study
_NAMES = ("run", "theta", "domain")


def usage_information(
    routing: pd.DataFrame,
    *,
    experts: int,
    fractions: Sequence[float] | None = None,
    shuffles: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Entropy of each layer's choice of expert, and its mutual information with the token's id.

    The plug-in information of a sample is never 0: many ids are rare. Its bias is measured by shuffling the layer's experts over its
    tokens; where ids do matter the bias is smaller than that, so that the difference errs on the low side.

    Args:
        routing: the frame `routing`: run, layer, token_id, expert; a row per token and layer.
        experts: number of experts E.
        fractions: [E] share of the MLP that each expert runs, for active_mlp_fraction.
        shuffles: shuffled copies of each layer.
        seed: of the shuffles.

    Returns:
        run, layer (also "all": the mean over layers), entropy (bits, 0 to log2 E), mutual_information (bits, plug-in), shuffled (bits, mean
        over shuffles), information (bits, mutual_information minus shuffled), active_mlp_fraction (if fractions are given), tokens,
        experts.

    Raises:
        InputError: a column is missing, an expert is not below `experts`, `fractions` are not E, or shuffles < 1.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "layer": 0, "token_id": [3, 3, 8, 8] * 100, "expert": [0, 0, 1, 1] * 100})
        >>> found = lab.usage_information(routing, experts=2)
        >>> found.loc[found["layer"] == "all", ["entropy", "mutual_information", "information"]].round(1)  # the id tells all
           entropy  mutual_information  information
        1      1.0                 1.0          1.0
    """
    require(routing, ("run", "layer", "token_id", "expert"), "usage_information")
    if shuffles < 1:
        raise InputError(f"usage_information: shuffles = {shuffles}, give a whole number of at least 1")
    expert = whole_numbers(routing["expert"], "usage_information")
    if expert.max() >= experts or (fractions is not None and len(fractions) != experts):
        sizes = "" if fractions is None else f" and {len(fractions)} fractions"
        raise InputError(f"usage_information: expert {expert.max()} (counted from 0) in the frame, but experts = {experts}{sizes}")
    rows = pd.DataFrame({"run": routing["run"].to_numpy(), "layer": whole_numbers(routing["layer"], "usage_information")})
    rows = rows.assign(token_id=routing["token_id"].to_numpy(), expert=expert)
    parts = []
    for run, run_rows in rows.groupby("run", sort=False):
        rng = np.random.default_rng(seed)
        found = []
        for layer, part in run_rows.groupby("layer"):
            values = _layer_information(part["token_id"].to_numpy(), part["expert"].to_numpy(), experts, shuffles, rng)
            if fractions is not None:
                values["active_mlp_fraction"] = np.asarray(fractions, dtype=np.float64)[part["expert"]].mean()
            found.append({"run": run, "layer": layer, **values, "tokens": len(part), "experts": experts})
        frame = pd.DataFrame(found)
        numbers = frame.columns.difference(["run", "layer", "tokens", "experts"])
        pooled = {"run": run, "layer": ALL, **frame[numbers].mean(), "tokens": frame["tokens"].sum(), "experts": experts}
        parts.append(pd.concat([frame.astype({"layer": object}), pd.DataFrame([pooled])])[list(frame.columns)])
    return pd.concat(parts, ignore_index=True)


def stack_runs(frames: Mapping[tuple[float, str, int], pd.DataFrame]) -> pd.DataFrame:
    """Frames of several runs of the collapse study one below the other, each row with its run's settings.

    Args:
        frames: (lambda_router, router_gradient, seed) -> frame of that run: of `expert_usage` for the table `collapse`, of
            `usage_information`, or the `steps` of its training.

    Returns:
        lambda_router, router_gradient, seed, then the frames' own columns without run, theta and domain.

    Raises:
        InputError: no frames, an empty one, or a key that is not (lambda_router, router_gradient, seed).

    Example:
        >>> usage = pd.DataFrame({"run": "a", "layer": 0, "expert": [0, 1], "share": [0.0, 1.0], "tokens": [0, 8]})
        >>> lab.stack_runs({(0.0, "probability", 0): usage})
           lambda_router router_gradient  seed  layer  expert  share  tokens
        0            0.0     probability     0      0       0    0.0       0
        1            0.0     probability     0      0       1    1.0       8
    """
    if not frames:
        raise InputError("stack_runs: no frames; give {(lambda_router, router_gradient, seed): frame}")
    parts = []
    for key, frame in frames.items():
        if not (isinstance(key, tuple) and len(key) == len(CASE)):
            raise InputError(f"stack_runs: the key {key!r} must be (lambda_router, router_gradient, seed)")
        require(frame, (), f"stack_runs: the frame of {key}")
        own = frame.drop(columns=[name for name in (*_NAMES, *CASE) if name in frame.columns])
        for place, (name, value) in enumerate(zip(CASE, (float(key[0]), str(key[1]), int(key[2])), strict=True)):
            own.insert(place, name, value)
        parts.append(own)
    return pd.concat(parts, ignore_index=True)


def collapsed_layers(collapse: pd.DataFrame, *, threshold: float = 0.99) -> pd.DataFrame:
    """Which layers have one expert that takes at least `threshold` of their tokens.

    Args:
        collapse: lambda_router, router_gradient, seed, layer, expert, share, tokens (from `stack_runs` of `expert_usage` frames).
        threshold: share of the layer's tokens.

    Returns:
        One row per run and layer: lambda_router, router_gradient, seed, layer, expert (the commonest), share (its), tokens (of the layer),
        collapsed.

    Raises:
        InputError: a column is missing, or threshold is no share.

    Example:
        >>> usage = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "share": [0.5, 0.5, 0.0, 1.0], "tokens": [4, 4, 0, 8]})
        >>> layers = lab.collapsed_layers(lab.stack_runs({(0.0, "probability", 0): usage}))
        >>> layers[["layer", "expert", "share", "tokens", "collapsed"]]
           layer  expert  share  tokens  collapsed
        0      0       0    0.5       8      False
        1      1       1    1.0       8       True
    """
    require(collapse, (*CASE, "layer", "expert", "share", "tokens"), "collapsed_layers")
    if not 0 < threshold <= 1:
        raise InputError(f"collapsed_layers: threshold = {threshold}, give a share of the tokens, e.g. 0.99")
    keys = [*CASE, "layer"]
    tokens = collapse.groupby(keys, sort=False)["tokens"].sum().reset_index(drop=True)
    rows = collapse.loc[collapse.groupby(keys, sort=False)["share"].idxmax(), [*keys, "expert", "share"]].reset_index(drop=True)
    return rows.assign(tokens=tokens, collapsed=rows["share"] >= threshold)


def run_name(weight: float, gradient: str, cases: Collection[tuple[str, float]]) -> str:
    """What a run is called beside the others (router_gradient, lambda_router): 'λ = 0', with its gradient if they differ in it."""
    name = f"λ = {weight:g}"
    return f"{name} ({gradient.replace('_', '-')})" if len({other for other, _ in cases}) > 1 else name


def _layer_information(token: np.ndarray, expert: np.ndarray, experts: int, shuffles: int, rng: np.random.Generator) -> dict[str, float]:
    """Entropy of `expert` [N] and its information with `token` [N], in bits, as found and after shuffling."""
    code, ids = pd.factorize(token)
    code = code * experts
    n = len(expert)
    terms = np.arange(n + 1, dtype=np.float64)
    terms[2:] *= np.log2(terms[2:])  # c log2 c of every count c; 0 for 0 and 1
    terms[:2] = 0

    def entropy(cells: np.ndarray, count: int) -> float:
        return np.log2(n) - terms[np.bincount(cells, minlength=count)].sum() / n

    alone = entropy(expert, experts)
    separate = alone + entropy(code // experts, len(ids))  # of both, were they independent
    found = separate - entropy(code + expert, len(ids) * experts)
    shuffled = np.mean([separate - entropy(code + rng.permutation(expert), len(ids) * experts) for _ in range(shuffles)])
    values = {"entropy": alone, "mutual_information": found, "shuffled": shuffled, "information": found - shuffled}
    return {name: float(value) if abs(value) > 1e-12 else 0.0 for name, value in values.items()}
