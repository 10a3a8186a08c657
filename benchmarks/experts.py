"""Speed of separate experts (ToMoE's deployed form), dense and deployed in turn: prefill at p = 0.5, at SmolLM2's size and at D = 2048.

Every expert has a random half of the neurons, every token draws its expert after the router has run (see `lab.measure_latency`); attention
is left whole, so that the models differ in their MLPs alone.
"""

from typing import Any

import torch
from results import expert_results
from torch import Tensor
from transformers import PreTrainedModel

import dynamoe_lab as lab

__all__ = ["half_experts", "tomoe_grown", "tomoe_prefill"]

EXPERTS, ACTIVE = 8, 0.5


def half_experts(dense: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The deployed form of a dense model, each expert of each layer with another random half of the neurons."""
    model = lab.export(lab.convert(dense, lab.ToMoEConfig(num_experts=EXPERTS, attention="none")))
    generator = torch.Generator().manual_seed(seed)
    for mlp in model.routed_mlps():
        order = torch.rand(mlp.membership.shape, generator=generator).argsort(dim=1)
        mlp.membership.copy_(order < round(ACTIVE * mlp.membership.shape[1]))
    model.lay_out()
    return model


def tomoe_prefill(dense: PreTrainedModel, pairs: int, *, ids: Tensor | None = None, tokens: int = 1_024, run: str) -> list[dict[str, Any]]:
    """`tomoe_prefill_realised` of one sequence, the tokens spread evenly over the experts."""
    shares = (1 / EXPERTS,) * EXPERTS
    latency = lab.measure_latency(dense, half_experts(dense), tokens=tokens, routings=[shares], pairs=pairs, ids=ids, run=run)
    return expert_results(lab.latency_ratios(latency), EXPERTS)


def tomoe_grown(pairs: int, hidden_size: int = 2_048, intermediate_size: int = 8_192, tokens: int = 1_024) -> list[dict[str, Any]]:
    """`tomoe_prefill` of two random layers of a larger model's size."""
    dense, _ = lab.random_pair(hidden_size, intermediate_size, layers=2)
    return tomoe_prefill(dense, pairs, tokens=tokens, run=f"D = {hidden_size}, H = {intermediate_size}")
