"""What a forward pass costs, counted from shapes: parameters held and touched, multiply-adds, bytes moved; dense or converted.

Works on the meta device, so a model's cost is known before its weights are. Counted are matrix products (linear maps, attention's scores
and values) and the weights and cached keys and values that they read; norms, activations and sums are free, as they nearly are.
"""

from typing import Literal

import pandas as pd
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.cost import expert_tokens
from dynamoe_lab.evaluation.layer_cost import Cost, attention_cost, linear_maps, routed_mlp_cost, weights
from dynamoe_lab.models import RoutedMixin, decoder_layers, family_of

__all__ = ["PARTS", "ideal_share", "model_cost"]

PARTS = ("mlp", "router", "attention", "norms", "embedding", "head")
_NUMBERS = ["params", "active_params", "flops", "bytes"]


def model_cost(
    model: PreTrainedModel,
    routing: pd.DataFrame | None = None,
    *,
    phase: Literal["prefill", "decode"] = "prefill",
    batch: int = 1,
    tokens: int = 1_024,
    run: str = "",
) -> pd.DataFrame:
    """The cost of a token, by layer and part, under the model's current routing mode.

    Args:
        model: dense or converted, of a supported family; the meta device will do, but for ToMoE's experts, whose widths are weights.
        routing: which experts the tokens take: table `routing` (layer, expert; one row per token and layer) or table `expert_usage`
            (layer, expert, share; one domain). None: a dense model, or a converted one whose tokens all do the same.
        phase: "prefill": `batch` sequences of `tokens` tokens fill an empty cache; "decode": each of `batch` sequences adds one token
            to `tokens` cached ones. Either computes the head for the last token of each sequence alone, as `generate` does.

    Returns:
        One row per layer ("0", ...; "model": what belongs to no layer) and part of `PARTS`, and the sums as rows of their own: layer
        "all", part "all", and both. Columns: run, phase, layer, part; params (weights held; a tied embedding once, under embedding);
        active_params (touched by an average token; those of `count_active_params`); flops (per token, 2 x multiply-adds; attention
        over the causal context or its sliding window); bytes (moved per token, in the weights' dtype: weights that the forward reads,
        divided by the tokens that share it, the embedding's rows, the cache's entries read and written). A block of neurons (DynaMoE), or
        an expert (ToMoE), is read if any of these tokens uses it, each using it with the layer's share. Routing "label" computes the full
        MLP (with frozen labels two) and the router; "random" counts the router that it is the control for as active, but does not run it.

        Of ToMoE, experts are counted one by one, though a few tokens of several experts run what is left of the MLP at once where that
        takes less time; attention holds what masks it token by token; masked values and outputs are computed all the same. Scores are
        counted at the kept pairs' width, to which fused kernels add zeros again. A masked model computes every MLP and router whole,
        whatever the expert; what makes its masks, once for all tokens, is held under router, and free.

    Raises:
        InputError: an unsupported model, a routing of another model, missing, or given for a dense one; an unknown phase; no tokens.

    Example:
        >>> dense, _ = lab.random_pair(64, 128, layers=2)
        >>> cost = lab.model_cost(dense, tokens=16)
        >>> cost.loc[(cost["layer"] == "all") & (cost["part"] == "mlp"), ["params", "flops"]]  # 2 * 3 * 64 * 128, twice that
            params    flops
        14   49152  98304.0
    """
    layers, config = _layers(model), model.config
    if phase not in ("prefill", "decode"):
        raise InputError(f"model_cost: phase {phase!r} is not known; choose prefill or decode")
    if batch < 1 or tokens < 1:
        raise InputError(f"model_cost: batch = {batch}, tokens = {tokens}; give at least 1 of each")
    if not isinstance(model, RoutedMixin) and routing is not None:
        raise InputError(f"model_cost: {type(model).__name__} has no experts; convert it first with lab.convert, or give no routing")
    sharing = batch * (tokens if phase == "prefill" else 1)  # tokens of one forward, which read the weights together
    shares = _expert_shares(model, routing)
    setting = {"phase": phase, "tokens": tokens, "sharing": sharing, "itemsize": model.dtype.itemsize, "masking": _is_masking(model)}
    rows = []
    for index, (layer, window) in enumerate(zip(layers, _windows(config, len(layers)), strict=True)):
        if isinstance(model, RoutedMixin):
            mlp, router = routed_mlp_cost(model.routed_mlps()[index], shares[index], sharing)
        else:
            mlp, router = linear_maps([_mlp_of(layer, model)], sharing), Cost()
        attention = getattr(layer, family_of(config.model_type).attention)
        attended = attention_cost(attention, config, window=window, **setting)
        taken = {id(parameter) for part in (_mlp_of(layer, model), attention) for parameter in part.parameters()}
        norms = weights((parameter for parameter in layer.parameters() if id(parameter) not in taken), sharing)
        parts = {"mlp": mlp, "router": router, "attention": attended, "norms": norms}
        rows += [_row(run, phase, str(index), part, cost) for part, cost in parts.items()]
    rows += [_row(run, phase, "model", part, cost) for part, cost in _around_layers(model, layers, sharing, batch).items()]
    return _with_sums(pd.DataFrame(rows))


def ideal_share(cost: pd.DataFrame, dense_cost: pd.DataFrame) -> float:
    """Share of the dense MLPs' time that an ideal implementation takes: multiply-adds of the MLPs used and of routers, over theirs.

    Args:
        cost, dense_cost: tables of `model_cost`, of the routed model and of its dense parent.

    Raises:
        InputError: a table has no sums over layers, or those of several models.

    Example:
        >>> dense, model = lab.random_pair(64, 128)
        >>> model.set_routing(1)  # every token at half width, no router asked
        >>> lab.ideal_share(lab.model_cost(model), lab.model_cost(dense))
        0.5
    """
    return _flops(cost, ("mlp", "router")) / _flops(dense_cost, ("mlp",))


def _flops(cost: pd.DataFrame, parts: tuple[str, ...]) -> float:
    rows = cost[(cost["layer"] == "all") & cost["part"].isin(parts)]
    if sorted(rows["part"]) != sorted(parts):
        raise InputError(f"ideal_share: one row of layer all is needed for {', '.join(parts)}; give the table of one lab.model_cost")
    return float(rows["flops"].sum())


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    try:
        return decoder_layers(model)
    except (AttributeError, ValueError) as error:
        raise InputError(f"model_cost: {error}") from error


def _expert_shares(model: PreTrainedModel, routing: pd.DataFrame | None) -> list[list[float] | None]:
    """The share of each layer's tokens that each expert takes; None where routing is "full", or there are no experts."""
    usage = expert_tokens(model, routing, "model_cost") if isinstance(model, RoutedMixin) else None
    if usage is None:
        return [None] * len(_layers(model))
    usage = usage.div(usage.sum(axis=1), axis=0).reindex(columns=range(model.moe.num_experts), fill_value=0)
    return usage.to_numpy(dtype=float).tolist()


def _is_masking(model: PreTrainedModel) -> bool:
    """Whether what masks attention token by token runs, where there is such a thing."""
    return isinstance(model, RoutedMixin) and model.routing.mode != "full"


def _mlp_of(layer: nn.Module, model: PreTrainedModel) -> nn.Module:
    """A module whose parameters are those of the layer's MLP, router included."""
    family = family_of(model.config.model_type)
    if isinstance(model, RoutedMixin):
        return family.nested(layer)
    return nn.ModuleList(getattr(family.holder(layer), name) for name in family.projections)


def _windows(config: PreTrainedConfig, layers: int) -> list[int | None]:
    """How many tokens each layer's attention reaches back, itself included; None: all. Read as transformers' caches read the config."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return [None if kinds and kinds[layer] != "sliding_attention" else window for layer in range(layers)]


def _around_layers(model: PreTrainedModel, layers: nn.ModuleList, sharing: int, batch: int) -> dict[str, Cost]:
    """Final norm, embedding (with the maps to and from another width that some models have), head, and what makes masks for all layers."""
    costs = {"norms": Cost(), "embedding": Cost(), "head": Cost()}
    head, seen = model.get_output_embeddings(), {id(parameter) for parameter in layers.parameters()}
    if hasattr(model, "hypernetwork"):
        costs["router"] = weights(model.hypernetwork.parameters(), sharing).held()
        seen |= {id(parameter) for parameter in model.hypernetwork.parameters()}
    for module in (*(module for module in model.modules() if module is not head), head):  # the head last: a tied weight is the embedding's
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        if isinstance(module, nn.Embedding):
            table = weights(own, sharing)
            rows = min(sharing, module.num_embeddings)  # a token reads its row; more tokens than rows read the table
            costs["embedding"] += Cost(table.params, table.active_params, 0.0, table.bytes * rows / module.num_embeddings)
        elif module is head:
            read, params = linear_maps([head], sharing), sum(parameter.numel() for parameter in own)
            costs["head"] += Cost(params, params, read.flops * batch / sharing, read.bytes)
        elif own:
            costs["embedding" if isinstance(module, nn.Linear) else "norms"] += linear_maps([module], sharing)
    return costs


def _row(run: str, phase: str, layer: str, part: str, cost: Cost) -> dict:
    return {"run": run, "phase": phase, "layer": layer, "part": part, **{name: getattr(cost, name) for name in _NUMBERS}}


def _with_sums(costs: pd.DataFrame) -> pd.DataFrame:
    names = ["run", "phase"]
    by_layer = costs.groupby([*names, "layer"], sort=False)[_NUMBERS].sum().reset_index().assign(part="all")
    by_part = costs.groupby([*names, "part"], sort=False)[_NUMBERS].sum().reset_index().assign(layer="all")
    whole = costs.groupby(names, sort=False)[_NUMBERS].sum().reset_index().assign(layer="all", part="all")
    every = pd.concat([costs, by_layer, by_part, whole], ignore_index=True)
    place = {layer: index for index, layer in enumerate([*by_layer["layer"], "all"])}
    order = {part: index for index, part in enumerate((*PARTS, "all"))}
    every = every.sort_values(["layer", "part"], key=lambda column: column.map(place if column.name == "layer" else order))
    return every[[*names, "layer", "part", *_NUMBERS]].reset_index(drop=True)
