"""What do experts specialise in? Association of the chosen expert with a token's domain and with its class, beside shuffled controls.

Tokens are no independent sample. Tokens of one document are alike, and a frequent token takes the same expert again and again: any labels
laid over documents, or over token ids, would seem to matter. The controls are therefore shuffled where the labels live: domains among
documents, classes among token ids. What shuffled labels give is what clusters alone give; an association means something beyond that.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from dynamoe_lab.analysis.frames import ALL, one_run, require, split_layers, whole_numbers
from dynamoe_lab.analysis.statistics import FEWEST
from dynamoe_lab.errors import InputError

__all__ = ["FACTORS", "above_control", "cramers_v", "expert_choice", "specialisation"]

FACTORS = {"domain": "document", "token class": "token id"}  # factor -> what carries its labels, and what they are shuffled among
_ROUTING = ("run", "domain", "document", "position", "token_id", "layer", "expert")


def cramers_v(table: np.ndarray) -> np.ndarray:
    """Bias-corrected Cramér's V (Bergsma 2013, doi 10.1016/j.jkss.2012.10.002) of contingency tables [..., R, C] -> [...].

    0: independent, 1: one decides the other. Rows and columns without counts do not take part; 0 where fewer than two are left. The
    correction takes counts for independent draws, so that clusters leave a bias.
    """
    table = np.asarray(table, dtype=np.float64)
    rows, columns, n = table.sum(-1, keepdims=True), table.sum(-2, keepdims=True), table.sum((-1, -2))
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = rows * columns / n[..., None, None]
        squares = np.where(expected > 0, (table - expected) ** 2 / expected, 0.0).sum((-1, -2)) / n  # chi squared over n
        r, c = (rows > 0).sum((-1, -2)), (columns > 0).sum((-1, -2))
        corrected = np.maximum(0.0, squares - (r - 1) * (c - 1) / (n - 1))
        least = np.minimum(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
        return np.where((np.minimum(r, c) > 1) & (least > 0), np.sqrt(np.minimum(1.0, corrected / least)), 0.0)


def specialisation(
    routing: pd.DataFrame,
    classes: pd.DataFrame,
    *,
    experts: int,
    permutations: int = 400,
    resamples: int = 400,
    confidence: float = 0.95,
    least: int = 20,
    without: Sequence[str] = ("special",),
    seed: int = 0,
) -> pd.DataFrame:
    """By layer, how much the chosen expert goes with the token's domain and with its class, beside labels shuffled over clusters.

    Position 0 of a block, an attention sink in many models, is left out.

    The interval is the value plus and minus Student's t times its bootstrap error over documents. In simulations of clustered tokens it
    held the mean over repeated samples 95 to 100 % of the time; percentiles of the resamples, which add the bias of clusters a second time,
    held it 34 to 99 %. The bias that clusters give to the value is in the control, too: compare the two, not the value with 0.

    Args:
        routing: run, domain, document, position, token_id, layer, expert, one run (the frame of `lab.trace_routing`).
        classes: token_id, token_class (the frame of `lab.token_classes`); it has every id of `routing`.
        experts: number of experts E.
        permutations: shuffled copies of the labels; all layers share them.
        resamples: bootstrap samples of documents.
        confidence: of the interval and of the control's band.
        least: domains and classes with fewer tokens are left out.
        without: classes whose tokens are left out: separators between documents are no text.
        seed: of shuffles and resamples.

    Returns:
        run, factor ("domain", "token class"), layer (also "all": the mean over layers), association (bias-corrected Cramér's V, 0 to 1),
        low, high, control (mean over shuffles), control_low, control_high (the band that holds `confidence` of them), p (share of shuffles
        that reach the association, the sample itself counted among them), tokens, levels (domains or classes), clusters (documents or
        token ids that are shuffled), documents, permutations, confidence. A factor with fewer than two levels is left out.

    Raises:
        InputError: a token id without a class, or no factor with two levels.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "document": np.repeat(range(6), 10), "position": 1, "layer": 0, "token_id": [1, 2] * 30})
        >>> routing = routing.assign(domain=np.where(routing["document"] < 3, "code", "web"), expert=(routing["document"] < 3).astype(int))
        >>> classes = pd.DataFrame({"token_id": [1, 2], "token_class": ["word", "digits"]})
        >>> found = lab.specialisation(routing, classes, experts=2, permutations=100)
        >>> found.loc[found["layer"] == "all", ["factor", "association", "levels", "clusters"]].round(2)  # the domain decides
                factor  association  levels  clusters
        1       domain          1.0       2         6
        3  token class          0.0       2         2
    """
    for name, value in (("permutations", permutations), ("resamples", resamples)):
        if value < 2:
            raise InputError(f"specialisation: {name} = {value}, give a whole number of at least 2")
    rows = _rows(routing, classes, "specialisation", experts, without)
    layers = int(rows["layer"].max()) + 1
    names = [*map(int, np.sort(routing["layer"].unique())), ALL]
    parts = []
    for factor, cluster in (("domain", "document"), ("token class", "token_id")):
        kept = _kept(rows, factor, layers, least)
        if kept["level"].nunique() < 2:
            continue
        kept = kept.assign(**{name: pd.factorize(kept[name])[0] for name in ("level", cluster, "document")})
        rng = np.random.default_rng(seed)
        levels, clusters = int(kept["level"].max()) + 1, int(kept[cluster].max()) + 1
        # a cluster has one label: its tokens by layer and expert move together
        counts = _counts(kept, (cluster, "layer", "expert"), (clusters, layers, experts)).reshape(clusters, -1)
        label = np.zeros(clusters, dtype=np.int64)
        label[kept[cluster]] = kept["level"]

        def association(labels: np.ndarray, counts: np.ndarray = counts, levels: int = levels) -> np.ndarray:
            table = (np.arange(levels)[:, None] == labels).astype(np.float64) @ counts
            return _with_mean(cramers_v(table.reshape(levels, layers, experts).swapaxes(0, 1)))  # (L + 1,)

        value = association(label)
        shuffled = np.stack([association(rng.permutation(label)) for _ in range(permutations)])  # (permutations, L + 1)
        band = np.quantile(shuffled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        documents = int(kept["document"].max()) + 1
        by_document = _counts(kept, ("document", "layer", "level", "expert"), (documents, layers, levels, experts))
        error = _bootstrap_error(by_document, resamples, confidence, rng)
        columns = {"run": str(routing["run"].iloc[0]), "factor": factor, "layer": names, "association": value}
        columns |= {"low": np.maximum(0, value - error), "high": np.minimum(1, value + error)}
        columns |= {"control": shuffled.mean(axis=0), "control_low": band[0], "control_high": band[1]}
        columns |= {"p": (1 + (shuffled >= value - 1e-12).sum(axis=0)) / (1 + permutations), "tokens": len(kept) // layers}
        sample = {"levels": levels, "clusters": clusters, "documents": documents, "permutations": permutations, "confidence": confidence}
        parts.append(pd.DataFrame({**columns, **sample}))
    if not parts:
        raise InputError(f"specialisation: fewer than two domains and classes with {least} tokens each; trace more text")
    return pd.concat(parts, ignore_index=True)


def expert_choice(
    routing: pd.DataFrame, classes: pd.DataFrame, *, experts: int, least: int = 20, without: Sequence[str] = ("special",)
) -> pd.DataFrame:
    """The share of each domain's and each token class's tokens that every expert takes, by layer; position 0 of a block is left out.

    Args:
        routing, classes, experts, least, without: as in `specialisation`.

    Returns:
        run, factor, level (the domain or class; "all": all tokens), layer, expert, share, tokens: unused experts included with 0. A factor
        none of whose levels has `least` tokens is left out.

    Raises:
        InputError: a column or a token's class is missing, an expert is not below `experts`, or no factor is left.

    Example:
        >>> routing = pd.DataFrame({"run": "a", "document": 0, "position": 1, "layer": 0, "token_id": [1, 1, 2, 2], "expert": [0, 1, 1, 1]})
        >>> classes = pd.DataFrame({"token_id": [1, 2], "token_class": ["word", "digits"]})
        >>> choice = lab.expert_choice(routing.assign(domain="web"), classes, experts=2, least=1)
        >>> choice.loc[(choice["factor"] == "token class") & (choice["expert"] == 1), ["level", "share", "tokens"]]
            level  share  tokens
        5  digits   1.00       2
        7    word   0.50       1
        9     all   0.75       3
    """
    rows = _rows(routing, classes, "expert_choice", experts, without)
    layers = np.sort(routing["layer"].unique()).astype(np.int64)
    parts = []
    for factor in FACTORS:
        kept = _kept(rows, factor, len(layers), least)
        if kept.empty:
            continue
        code, names = pd.factorize(kept["level"], sort=True)
        counts = _counts(kept.assign(level=code), ("level", "layer", "expert"), (len(names), len(layers), experts))
        for level, tokens in [*zip(names, counts, strict=True), (ALL, counts.sum(axis=0))]:
            index = pd.MultiIndex.from_product([layers, range(experts)], names=["layer", "expert"])
            frame = pd.DataFrame({"run": str(routing["run"].iloc[0]), "factor": factor, "level": level}, index=index).reset_index()
            parts.append(frame.assign(share=(tokens / tokens.sum(axis=1, keepdims=True)).ravel(), tokens=tokens.ravel().astype(np.int64)))
    if not parts:
        raise InputError(f"expert_choice: no domain and no class with {least} tokens; trace more text")
    return pd.concat(parts, ignore_index=True)[["run", "factor", "level", "layer", "expert", "share", "tokens"]]


def above_control(specialisation: pd.DataFrame, factor: str) -> int:
    """In how many single layers of the frame of `specialisation` the association with `factor` is above the control's band."""
    rows = split_layers(specialisation[specialisation["factor"] == factor])[0]
    return int((rows["association"] > rows["control_high"]).sum())


def _rows(routing: pd.DataFrame, classes: pd.DataFrame, function: str, experts: int, without: Sequence[str]) -> pd.DataFrame:
    """Codes of every row but those of position 0 and of the classes `without`: document (numbered anew in each domain), token_id, layer,
    expert; domain and token class by name."""
    require(routing, _ROUTING, function)
    require(classes, ("token_id", "token_class"), f"{function}: classes")
    one_run(routing, function)
    routing = routing[whole_numbers(routing["position"], function) > 0]
    require(routing, (), f"{function}: tokens past position 0")
    expert = whole_numbers(routing["expert"], function)
    if expert.max() >= experts:
        raise InputError(f"{function}: the frame has expert {expert.max()}, counted from 0, but experts = {experts}")
    token = whole_numbers(routing["token_id"], function)
    kind = classes.drop_duplicates("token_id").set_index("token_id")["token_class"].astype(str).reindex(token).to_numpy()
    if pd.isna(kind).any():
        raise InputError(f"{function}: classes has no class for token id {token[pd.isna(kind)][0]}")
    layer = pd.factorize(whole_numbers(routing["layer"], function), sort=True)[0]
    rows = pd.DataFrame({"layer": layer, "expert": expert, "token_id": token, "domain": routing["domain"].astype(str).to_numpy()})
    rows = rows.assign(**{"token class": kind, "document": routing["document"].to_numpy()})
    rows = rows[~rows["token class"].isin(list(without))]
    require(rows, (), f"{function}: tokens of classes other than {', '.join(without)}")
    return rows.assign(document=rows.groupby(["domain", "document"]).ngroup())


def _kept(rows: pd.DataFrame, factor: str, layers: int, least: int) -> pd.DataFrame:
    """Rows of levels with at least `least` tokens, the level in a column of that name."""
    tokens = rows[factor].value_counts() // layers
    kept = rows[rows[factor].isin(tokens.index[tokens >= least])]
    return kept.assign(level=kept[factor])


def _counts(rows: pd.DataFrame, columns: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Rows counted by their codes in `columns`, an array of `shape`."""
    cells = np.ravel_multi_index([rows[name].to_numpy() for name in columns], shape)
    return np.bincount(cells, minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)


def _with_mean(values: np.ndarray) -> np.ndarray:
    """Values [..., L] and their mean -> [..., L + 1]."""
    return np.concatenate([values, values.mean(axis=-1, keepdims=True)], axis=-1)


def _bootstrap_error(counts: np.ndarray, resamples: int, confidence: float, rng: np.random.Generator) -> np.ndarray:
    """Half the interval of the association by layer and of its mean, from resampling the documents of `counts` [D, L, R, E] -> [L + 1]."""
    documents = len(counts)
    if documents < FEWEST:
        return np.full(counts.shape[1] + 1, np.nan)
    flat = counts.reshape(documents, -1)
    drawn = []
    for start in range(0, resamples, step := max(1, 20_000_000 // flat.shape[1])):  # tables held at once
        times = rng.multinomial(documents, np.full(documents, 1 / documents), size=min(step, resamples - start))
        drawn.append(_with_mean(cramers_v((times @ flat).reshape(-1, *counts.shape[1:]))))
    return stats.t.ppf((1 + confidence) / 2, documents - 1) * np.concatenate(drawn).std(axis=0, ddof=1)
