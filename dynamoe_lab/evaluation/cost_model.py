"""What a forward pass costs, counted from shapes: parameters held and touched, multiply-adds, bytes moved; dense or converted.

Works on the meta device, so a model's cost is known before its weights are. Counted are matrix products (linear maps, attention's scores
and values) and the weights and cached keys and values that they read; norms, activations and sums are free, as they nearly are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import pandas as pd
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.cost import expert_tokens
from dynamoe_lab.models import DynaMoEMixin, NestedMLP, decoder_layers, family_of

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
        model: dense or converted, of a supported family; the meta device will do.
        routing: which experts the tokens take: table `routing` (layer, expert; one row per token and layer) or table `expert_usage`
            (layer, expert, share; one domain). None: a dense model, or a converted one whose tokens all take one expert.
        phase: "prefill": `batch` sequences of `tokens` tokens fill an empty cache; "decode": each of `batch` sequences adds one token
            to `tokens` cached ones. Either computes the head for the last token of each sequence alone, as `generate` does.

    Returns:
        One row per layer ("0", ...; "model": what belongs to no layer) and part of `PARTS`, and the sums as rows of their own: layer
        "all", part "all", and both. Columns: run, phase, layer, part; params (weights held; a tied embedding once, under embedding);
        active_params (touched by an average token; those of `count_active_params`); flops (per token, 2 x multiply-adds; attention
        over the causal context or its sliding window); bytes (moved per token, in the weights' dtype: weights that the forward reads,
        divided by the tokens that share it, the embedding's rows, the cache's entries read and written). A block of neurons is read if any
        of these tokens uses it, each using it with the layer's share. Routing "label" computes the full MLP (with frozen labels two) and
        the router; "random" counts the router that it is the control for as active, but does not run it.

    Raises:
        InputError: an unsupported model, a routing of another model, missing, or given for a dense one; an unknown phase; no tokens.
    """
    layers, config = _layers(model), model.config
    if phase not in ("prefill", "decode"):
        raise InputError(f"model_cost: phase {phase!r} is not known; choose prefill or decode")
    if batch < 1 or tokens < 1:
        raise InputError(f"model_cost: batch = {batch}, tokens = {tokens}; give at least 1 of each")
    if not isinstance(model, DynaMoEMixin) and routing is not None:
        raise InputError(f"model_cost: {type(model).__name__} has no experts; convert it first with lab.convert, or give no routing")
    sharing = batch * (tokens if phase == "prefill" else 1)  # tokens of one forward, which read the weights together
    usage = expert_tokens(model, routing, "model_cost") if isinstance(model, DynaMoEMixin) else None
    rows = []
    for index, (layer, window) in enumerate(zip(layers, _windows(config, len(layers)), strict=True)):
        if usage is None:
            mlp, router = _linear_maps([_mlp_of(layer, model)], sharing), _Cost()
        else:
            counts = usage.loc[index]
            shares = [counts.get(expert, 0) / counts.sum() for expert in range(model.moe.num_experts)]
            mlp, router = _nested_mlp(model.nested_mlps()[index], shares, sharing)
        attention = next(child for name, child in layer.named_children() if name in ("self_attn", "attention"))
        attended = _linear_maps([attention], sharing) + _cache(config, model.dtype.itemsize, window, phase, tokens)
        taken = {id(parameter) for part in (_mlp_of(layer, model), attention) for parameter in part.parameters()}
        norms = _weights((parameter for parameter in layer.parameters() if id(parameter) not in taken), sharing)
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
    """
    return _flops(cost, ("mlp", "router")) / _flops(dense_cost, ("mlp",))


def _flops(cost: pd.DataFrame, parts: tuple[str, ...]) -> float:
    rows = cost[(cost["layer"] == "all") & cost["part"].isin(parts)]
    if sorted(rows["part"]) != sorted(parts):
        raise InputError(f"ideal_share: one row of layer all is needed for {', '.join(parts)}; give the table of one lab.model_cost")
    return float(rows["flops"].sum())


@dataclass(frozen=True)
class _Cost:
    """What one part of the model costs; the columns of the table."""

    params: int = 0
    active_params: float = 0.0
    flops: float = 0.0  # per token
    bytes: float = 0.0  # per token

    def __add__(self, other: "_Cost") -> "_Cost":
        return _Cost(*(getattr(self, name) + getattr(other, name) for name in _NUMBERS))


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    try:
        return decoder_layers(model)
    except (AttributeError, ValueError) as error:
        raise InputError(f"model_cost: {error}") from error


def _weights(parameters: Iterable[nn.Parameter], sharing: int) -> _Cost:
    """Weights that every forward reads, whose arithmetic is free."""
    held = list(parameters)
    params = sum(parameter.numel() for parameter in held)
    return _Cost(params, params, 0.0, sum(parameter.numel() * parameter.element_size() for parameter in held) / sharing)


def _linear_maps(modules: Iterable[nn.Module], sharing: int) -> _Cost:
    """All weights in the modules, of which every linear map multiplies every token."""
    modules = list(modules)
    maps = [module.weight.numel() for outer in modules for module in outer.modules() if isinstance(module, nn.Linear)]
    return _weights((parameter for module in modules for parameter in module.parameters()), sharing) + _Cost(flops=2.0 * sum(maps))


def _mlp_of(layer: nn.Module, model: PreTrainedModel) -> nn.Module:
    """A module whose parameters are those of the layer's MLP, router included."""
    family = family_of(model.config.model_type)
    if isinstance(model, DynaMoEMixin):
        return family.nested(layer)
    return nn.ModuleList(getattr(family.holder(layer), name) for name in family.projections)


def _nested_mlp(mlp: NestedMLP, shares: list[float], sharing: int) -> tuple[_Cost, _Cost]:
    """MLP and router of a layer whose experts take these shares of the tokens."""
    mode, whole = mlp.routing.mode, mlp.expert_params()
    reach = [sum(shares[block:]) for block in range(len(shares))]  # share of tokens that use each block
    active = sum(share * params for share, params in zip(shares, whole, strict=True))
    copies = 1
    if mode == "label":
        reach, copies = [1.0] * len(reach), 1 if mlp.frozen is None else 2
    neuron = sum(linear.weight.numel() for linear in mlp.projections().values()) / mlp.sizes[-1]  # weights of one neuron, biases aside
    widths = [hi - lo for lo, hi in mlp.blocks]
    blocks = [whole[0], *(larger - smaller for smaller, larger in pairwise(whole))]
    read = sum(params * (1 - (1 - min(used, 1.0)) ** sharing) for params, used in zip(blocks, reach, strict=True))
    multiplied = neuron * sum(width * used for width, used in zip(widths, reach, strict=True))
    size = mlp.down.weight.element_size()
    router = _linear_maps([mlp.router], sharing)
    counted, asked = mode not in ("full", "fixed"), mode in ("router", "label")
    router = _Cost(router.params, router.params * counted, router.flops * asked, router.bytes * asked)
    return _Cost(whole[-1], active, 2 * copies * multiplied, copies * read * size / sharing), router


def _windows(config: PreTrainedConfig, layers: int) -> list[int | None]:
    """How many tokens each layer's attention reaches back, itself included; None: all. Read as transformers' caches read the config."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return [None if kinds and kinds[layer] != "sliding_attention" else window for layer in range(layers)]


def _cache(config: PreTrainedConfig, itemsize: int, window: int | None, phase: str, tokens: int) -> _Cost:
    """Scores and values of one layer over the causal context, and the cache's entries read (those of earlier forwards) and written."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    stored = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_size * itemsize  # a token's key and value
    reach = tokens + 1 if window is None else window
    if phase == "decode":
        context = min(tokens + 1, reach)
        return _Cost(flops=4.0 * heads * head_size * context, bytes=float(stored * context))  # context - 1 are read, one is written
    short = min(tokens, reach)  # the first `short` tokens see 1, 2, ... tokens, the others all that a window holds
    mean_context = (short * (short + 1) / 2 + (tokens - short) * reach) / tokens
    return _Cost(flops=4.0 * heads * head_size * mean_context, bytes=float(stored))


def _around_layers(model: PreTrainedModel, layers: nn.ModuleList, sharing: int, batch: int) -> dict[str, _Cost]:
    """Final norm, embedding (with the maps to and from another width that some models have) and head."""
    costs = {"norms": _Cost(), "embedding": _Cost(), "head": _Cost()}
    head, seen = model.get_output_embeddings(), {id(parameter) for parameter in layers.parameters()}
    for module in (*(module for module in model.modules() if module is not head), head):  # the head last: a tied weight is the embedding's
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        if isinstance(module, nn.Embedding):
            table = _weights(own, sharing)
            rows = min(sharing, module.num_embeddings)  # a token reads its row; more tokens than rows read the table
            costs["embedding"] += _Cost(table.params, table.active_params, 0.0, table.bytes * rows / module.num_embeddings)
        elif module is head:
            read, params = _linear_maps([head], sharing), sum(parameter.numel() for parameter in own)
            costs["head"] += _Cost(params, params, read.flops * batch / sharing, read.bytes)
        elif own:
            costs["embedding" if isinstance(module, nn.Linear) else "norms"] += _linear_maps([module], sharing)
    return costs


def _row(run: str, phase: str, layer: str, part: str, cost: _Cost) -> dict:
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
