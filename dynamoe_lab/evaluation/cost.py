"""Active parameters, exactly: what a token's forward pass touches under a measured routing."""

import math

import pandas as pd
from torch import nn
from transformers import PreTrainedModel

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.layer_cost import mask_parts, token_mask_params
from dynamoe_lab.models import RoutedMixin, decoder_layers, family_of

__all__ = ["count_active_params", "expert_tokens"]


def expert_tokens(model: PreTrainedModel, routing: pd.DataFrame | None, function: str) -> pd.DataFrame | None:
    """How the tokens of each layer divide among the experts of a converted model: index layer, a column per expert that is used.

    Args:
        routing: table `routing` (one row per token and layer: tokens are counted) or `expert_usage` (its shares); None: all tokens do
            alike, as `model.set_routing` was told.
        function: in whose name an InputError is raised: a routing of another model, or needed and missing.

    Returns:
        None under "full" without a routing: that is not one of the experts in every method, and `full_params` says what it runs.
    """
    layers, mode = len(model.routed_mlps()), model.routing.mode
    if routing is None:
        if mode == "full":
            return None
        if mode != "fixed":
            raise InputError(f"{function}: under routing {mode!r} tokens differ; give the frame of lab.trace_routing")
        return pd.DataFrame({model.routing.expert: 1}, index=range(layers))
    groups = routing.groupby(["layer", "expert"], observed=True)
    usage = (groups["share"].sum() if "share" in routing else groups.size()).unstack(fill_value=0)
    if list(usage.index) != list(range(layers)) or not 0 <= usage.columns.min() <= usage.columns.max() < model.moe.num_experts:
        raise InputError(f"{function}: this routing is not of a model with {layers} layers and {model.moe.num_experts} experts")
    if "share" in routing and groups.size().max() > 1:
        raise InputError(f"{function}: the shares are those of several runs or domains; pass the rows of one of them")
    return usage


def count_active_params(model: PreTrainedModel, routing: pd.DataFrame | None = None, *, run: str = "") -> pd.DataFrame:
    """Average parameters that a token activates, per layer and for the whole model ("Params" in Table 1 of arXiv 2502.12325).

    Args:
        model: the converted model that `routing` was traced on, under the routing it was traced with.
        routing: table `routing` (columns layer, expert; one row per token and layer) or `expert_usage`; None: every token does the same,
            as `model.set_routing` was told ("full", or an expert).

    Returns:
        One row per layer and one, layer "all", for the model: run, layer, mlp_active (mean over tokens), mlp_total (of the dense MLP),
        active_mlp_fraction, router (MLPs' routers, 0 under a fixed expert, which asks none; and what masks attention token by token),
        other (attention as it is stored, norms, embeddings; tied embeddings once), active_params, total_params (held by the model; what
        ToMoE learns masks with is there alone). For ToMoE also masked_params: parameters of values and outputs of attention that an
        average token masks, which are computed and counted as active all the same (NaN where `routing` does not tell).

        A masked ToMoE model computes all of its MLPs; counted are the experts that it stands for.

    Raises:
        InputError: `routing` has other layers or experts than the model, or is needed and missing.

    Example:
        >>> _, model = lab.random_pair(64, 128, layers=2)
        >>> model.set_routing(1)  # every token at half width
        >>> lab.count_active_params(model)[["layer", "mlp_active", "mlp_total", "active_mlp_fraction"]]  # 3 matrices of 64 * 128 a layer
          layer  mlp_active  mlp_total  active_mlp_fraction
        0     0     12288.0      24576                  0.5
        1     1     12288.0      24576                  0.5
        2   all     24576.0      49152                  0.5
    """
    if not isinstance(model, RoutedMixin):
        raise InputError(f"count_active_params: {type(model).__name__} has no experts; convert it first with lab.convert")
    mlps, layers, mode = model.routed_mlps(), decoder_layers(model), model.routing.mode
    attentions = [getattr(layer, family_of(model.config.model_type).attention) for layer in layers]
    usage = expert_tokens(model, routing, "count_active_params")
    rows = []
    for index, (mlp, layer, attention) in enumerate(zip(mlps, layers, attentions, strict=True)):
        counts = None if usage is None else usage.loc[index]
        active = _mean_params(mlp, counts)
        asked = 0 if mode in ("full", "fixed") else _count(mlp.router)
        router, held = asked + (0 if mode == "full" else token_mask_params(attention)), _count(layer, mlp)
        other, total = held - _count(mlp, *mask_parts(attention)), held - _count(mlp.router) + asked
        rows.append(_row(run, str(index), active, mlp.dense_params(), router, other, total))
        if model.method == "tomoe":
            rows[-1]["masked_params"] = 0.0 if mode == "full" else _masked_params(attention, index, routing)
    whole = pd.DataFrame(rows)
    sums = [float(whole["mlp_active"].sum()), *(int(whole[name].sum()) for name in ("mlp_total", "router", "other", "total_params"))]
    # what belongs to no layer; the hypernetwork makes masks once for all tokens
    around = _count(model) - _count(layers, *mlps)
    sums[3] += around - _count(*([model.hypernetwork] if hasattr(model, "hypernetwork") else []))
    sums[4] += around
    rows.append(_row(run, "all", *sums))
    if "masked_params" in whole:
        rows[-1]["masked_params"] = whole["masked_params"].sum(skipna=False)
    return pd.DataFrame(rows)


def _mean_params(mlp: nn.Module, counts: pd.Series | None) -> float:
    """Parameters of the MLP that an average token runs, router aside."""
    if counts is None:
        return mlp.full_params()
    return sum(counts.get(expert, 0) * size for expert, size in enumerate(mlp.expert_params())) / counts.sum()


def _masked_params(attention: nn.Module, index: int, routing: pd.DataFrame | None) -> float:
    """Parameters of values and outputs of a layer's attention that an average token's mask leaves out."""
    if not mask_parts(attention):
        return 0.0
    if routing is None or "open_values" not in routing:
        return math.nan
    maskable = _count(attention.v_proj) + attention.o_proj.weight.numel()  # the output's bias belongs to no dimension of a head
    return maskable * (1 - float(routing.loc[routing["layer"] == index, "open_values"].mean()))


def _count(*modules: nn.Module) -> int:
    """Parameters in these modules, each once: a tied weight, and those of an MLP that its layer holds, too."""
    return sum({id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}.values())


def _row(run: str, layer: str, active: float, mlp_total: int, router: int, other: int, total: int) -> dict:
    return {
        "run": run,
        "layer": layer,
        "mlp_active": active,
        "mlp_total": mlp_total,
        "active_mlp_fraction": active / mlp_total,
        "router": router,
        "other": other,
        "active_params": active + router + other,
        "total_params": total,
    }
