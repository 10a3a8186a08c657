"""Speed of forward passes, dense and converted in turn: labels, prefill, decode, at SmolLM2's size and at D = 2048.

The converted models' routers run, but what they choose is overruled (see `lab.measure_latency`), so that the share of active neurons is
what the setting says.
"""

import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from results import ACTIVE, GOALS, latency_results, mixing_results, result
from torch import Tensor
from transformers import PreTrainedModel

import dynamoe_lab as lab

__all__ = ["decode", "grown", "label_cost", "one_hot", "prefill"]

THETAS = np.linspace(0.5, 0.99, 20)
NAME = "SmolLM2-135M"


@torch.no_grad()
def label_cost(dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor, pairs: int) -> list[dict[str, Any]]:
    """One forward with the labels of every layer at 20 θ, over one dense forward on the same blocks [n, T].

    The labelled forward runs every token at full width: the same function, plus the outputs of the smaller experts, their cosines to the
    full output, and the routers.
    """

    def labelled() -> None:
        similarities = model(input_ids=ids, output_router_logits=True, use_cache=False).similarities
        for theta in THETAS:
            model.labels_at(similarities, float(theta))

    def plain() -> None:
        dense(input_ids=ids, use_cache=False)

    model.set_routing("full")
    ratios = []
    for pair in range(-1, pairs):  # the first one warms up
        took = {function: _seconds(function) for function in ((plain, labelled) if pair % 2 else (labelled, plain))}
        ratios.append(took[labelled] / took[plain])
    model.set_routing("router")
    setting = f"{NAME}, {ids.numel():,} tokens in blocks of {ids.shape[1]}, {model.moe.num_experts} experts, {len(THETAS)} θ"
    return [result("label_cost", setting, ratios[1:], goal=GOALS["label_cost"])]


def _seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def one_hot(model: PreTrainedModel) -> list[tuple[float, ...]]:
    """For each expert the shares that send every token to it, its router running."""
    experts = model.moe.num_experts
    return [tuple(float(expert == chosen) for expert in range(experts)) for chosen in range(experts)]


def prefill(
    dense: PreTrainedModel, model: PreTrainedModel, pairs: int, *, ids: Tensor | None = None, tokens: int = 1_024, run: str = NAME
) -> list[dict[str, Any]]:
    """`prefill_realised` of one sequence at each active share, and mixed at 50 and 75 %; `random_mixing`; of SmolLM2 also `end_to_end`."""
    routings = [*one_hot(model), *(lab.mixed_shares(model.moe.experts, mean) for mean in (0.5, 0.75))]
    latency = lab.measure_latency(dense, model, tokens=tokens, routings=routings, pairs=pairs, ids=ids, run=run)
    return [*latency_results(lab.latency_ratios(latency), whole_model=run == NAME), *(mixing_results(latency) if run == NAME else ())]


def decode(
    dense: PreTrainedModel, model: PreTrainedModel, pairs: int, *, ids: Tensor | None = None, tokens: int = 1_024, run: str = NAME
) -> list[dict[str, Any]]:
    """`decode_realised` of one sequence at each active share; of SmolLM2 also of eight sequences, mixed at 50 and 75 %."""
    setting = {"phase": "decode", "tokens": tokens, "pairs": pairs, "ids": ids, "run": run}
    measured = [lab.measure_latency(dense, model, batch=1, routings=one_hot(model), **setting)]
    if run == NAME:
        mixed = [lab.mixed_shares(model.moe.experts, mean) for mean in (0.5, 0.75)]
        measured.append(lab.measure_latency(dense, model, batch=8, routings=mixed, **setting))
    return latency_results(lab.latency_ratios(pd.concat(measured)), whole_model=run == NAME)


def grown(pairs: int, phase: str, hidden_size: int = 2_048, intermediate_size: int = 8_192, tokens: int = 1_024) -> list[dict[str, Any]]:
    """`prefill` or `decode` of two random layers of a larger model's size."""
    dense, model = lab.random_pair(hidden_size, intermediate_size, experts=ACTIVE, layers=2)
    measure = {"prefill": prefill, "decode": decode}[phase]
    return measure(dense, model, pairs, tokens=tokens, run=f"D = {hidden_size}, H = {intermediate_size}")
