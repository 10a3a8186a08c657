"""Active parameters, exactly: what a token's forward pass touches under a measured routing."""

import pandas as pd
from transformers import PreTrainedModel

from dynamoe_lab.errors import InputError
from dynamoe_lab.models import DynaMoEMixin, decoder_layers

__all__ = ["count_active_params", "expert_tokens"]


def expert_tokens(model: PreTrainedModel, routing: pd.DataFrame | None, function: str) -> pd.DataFrame:
    """How the tokens of each layer divide among the experts of a converted model: index layer, a column per expert that is used.

    Args:
        routing: table `routing` (one row per token and layer: tokens are counted) or `expert_usage` (its shares); None: all tokens take
            the one expert that `model.set_routing` was given.
        function: in whose name an InputError is raised: a routing of another model, or needed and missing.
    """
    layers, mode = len(model.nested_mlps()), model.routing.mode
    if routing is None:
        fixed = {"full": model.moe.num_experts - 1, "fixed": model.routing.expert}.get(mode)
        if fixed is None:
            raise InputError(f"{function}: under routing {mode!r} tokens differ; give the frame of lab.trace_routing")
        return pd.DataFrame({fixed: 1}, index=range(layers))
    groups = routing.groupby(["layer", "expert"], observed=True)
    usage = (groups["share"].sum() if "share" in routing else groups.size()).unstack(fill_value=0)
    if list(usage.index) != list(range(layers)) or usage.columns.max() >= model.moe.num_experts:
        raise InputError(f"{function}: this routing is not of a model with {layers} layers and {model.moe.num_experts} experts")
    if "share" in routing and groups.size().max() > 1:
        raise InputError(f"{function}: the shares are those of several runs or domains; pass the rows of one of them")
    return usage


def count_active_params(model: PreTrainedModel, routing: pd.DataFrame | None = None, *, run: str = "") -> pd.DataFrame:
    """Average parameters that a token activates, per layer and for the whole model.

    Args:
        model: the converted model that `routing` was traced on, under the routing it was traced with.
        routing: table `routing` (columns layer, expert; one row per token and layer); None: every token takes the one expert that
            `model.set_routing` was given.

    Returns:
        One row per layer and one, layer "all", for the model: run, layer, mlp_active (mean over tokens), mlp_total, active_mlp_fraction,
        router (0 under a fixed expert, which asks no router), other (attention, norms, embeddings; tied embeddings once), active_params,
        total_params.

    Raises:
        InputError: `routing` has other layers or experts than the model, or is needed and missing.
    """
    if not isinstance(model, DynaMoEMixin):
        raise InputError(f"count_active_params: {type(model).__name__} has no experts; convert it first with lab.convert")
    mlps, usage = model.nested_mlps(), expert_tokens(model, routing, "count_active_params")
    asked = model.routing.mode not in ("full", "fixed")
    nested = {id(parameter) for mlp in mlps for parameter in mlp.parameters()}
    others = [sum(parameter.numel() for parameter in layer.parameters() if id(parameter) not in nested) for layer in decoder_layers(model)]
    rows = []
    for index, mlp in enumerate(mlps):
        sizes = mlp.expert_params()
        counts = usage.loc[index]
        active = sum(counts.get(expert, 0) * size for expert, size in enumerate(sizes)) / counts.sum()
        router = sum(parameter.numel() for parameter in mlp.router.parameters()) if asked else 0
        rows.append(_row(run, str(index), active, sizes[-1], router, others[index]))
    whole = pd.DataFrame(rows)
    every = sum(parameter.numel() for parameter in model.parameters())  # parameters() yields a tied weight once
    routers = sum(parameter.numel() for mlp in mlps for parameter in mlp.router.parameters())
    mlp_total, router = int(whole["mlp_total"].sum()), int(whole["router"].sum())
    rows.append(_row(run, "all", float(whole["mlp_active"].sum()), mlp_total, router, every - mlp_total - routers))
    return pd.DataFrame(rows)


def _row(run: str, layer: str, active: float, mlp_total: int, router: int, other: int) -> dict:
    return {
        "run": run,
        "layer": layer,
        "mlp_active": active,
        "mlp_total": mlp_total,
        "active_mlp_fraction": active / mlp_total,
        "router": router,
        "other": other,
        "active_params": active + router + other,
        "total_params": mlp_total + router + other,
    }
