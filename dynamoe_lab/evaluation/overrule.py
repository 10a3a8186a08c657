"""Routings whose widths are known beforehand, for measuring time: the routers run, but what they say is replaced.

An untrained router sends every token the same way, a trained one only gives its own mixture. To time any mixture of experts on the code
that users run, a hook on `mlp.router` returns one-hot logits in the place of the router's, after the router has done its work.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dynamoe_lab.errors import InputError

__all__ = ["RoutingSpec", "check_routing", "forced_routing", "mixed_shares", "routing_name"]

RoutingSpec = str | int | tuple[float, ...]  # "router", "label", "full"; an expert for all tokens; shares of the experts


def mixed_shares(fractions: Sequence[float], mean: float) -> tuple[float, ...]:
    """The shares of greatest entropy over experts of these widths, of all whose mean width is `mean`: shares ~ exp(λ * width).

    Args:
        fractions: [E] strictly increasing shares of the MLP, the last 1 (`DynaMoEConfig.experts`).
        mean: from the narrowest width to 1; at both ends one expert takes all tokens.

    Raises:
        InputError: widths that do not increase to 1, or a mean outside of them.

    Example:
        >>> [round(share, 3) for share in lab.mixed_shares((0.25, 0.5, 0.75, 1.0), 0.625)]
        [0.25, 0.25, 0.25, 0.25]
        >>> lab.mixed_shares((0.5, 1.0), 0.5)
        (1.0, 0.0)
    """
    widths = np.asarray(fractions, dtype=np.float64)
    if widths.ndim != 1 or not len(widths) or widths[0] <= 0 or widths[-1] != 1 or (np.diff(widths) <= 0).any():
        raise InputError(f"mixed_shares: fractions = {list(fractions)}: give increasing widths above 0, the last 1.0")
    if not widths[0] <= mean <= 1:
        raise InputError(f"mixed_shares: mean = {mean}: experts of these widths average between {widths[0]:g} and 1")
    if mean in (widths[0], 1):
        return tuple((widths == mean).astype(float).tolist())

    def shares(slope: float) -> np.ndarray:
        weights = np.exp(slope * widths - max(slope * widths[0], slope))  # the largest is 1, so nothing overflows
        return weights / weights.sum()

    def error(slope: float) -> float:
        return float(shares(slope) @ widths) - mean

    reach = 1.0
    while not error(-reach) <= 0 <= error(reach):
        reach *= 2
    return tuple(shares(brentq(error, -reach, reach, xtol=1e-13)).tolist())


def check_routing(model: PreTrainedModel, routing: RoutingSpec, function: str) -> None:
    """Raise InputError, naming `function`, unless `routing` is one that `forced_routing` can force on this model."""
    experts = model.moe.num_experts
    reasons = {mode: reason for mode, reason in model.routing_modes.items() if mode != "random"}  # its draws are what shares are for
    if isinstance(routing, str) and reasons.get(routing) is not None:
        raise InputError(f"{function}: routing {routing!r}: {reasons[routing]}")
    if isinstance(routing, tuple):
        if len(routing) != experts:
            raise InputError(f"{function}: routing {routing} has {len(routing)} shares, the model {experts} experts; give one share each")
        if not all(isinstance(share, (int, float)) and share >= 0 for share in routing) or not math.isclose(sum(routing), 1, abs_tol=1e-6):
            raise InputError(f"{function}: routing {routing}: shares are at least 0 and sum to 1; lab.mixed_shares makes them")
    elif not (routing in reasons if isinstance(routing, str) else type(routing) is int and 0 <= routing < experts):
        modes = ", ".join(mode for mode, reason in reasons.items() if reason is None)
        choices = f"{modes}, an expert from 0 to {experts - 1}, or a tuple of {experts} shares"
        raise InputError(f"{function}: routing {routing!r}: choose {choices}")


def routing_name(routing: RoutingSpec) -> str:
    """What tables call a routing: its mode, 'expert 1', 'one expert' (overruled, all tokens alike), or 'mixed' (overruled)."""
    if isinstance(routing, tuple):
        return "one expert" if max(routing) == 1 else "mixed"
    return routing if isinstance(routing, str) else f"expert {routing}"


@contextmanager
def forced_routing(model: PreTrainedModel, routing: RoutingSpec, *, rows: int, calls: int = 1, seed: int = 0) -> Iterator[Tensor | None]:
    """A converted model under a routing, which stays set afterwards (see `evaluating`); hooks are removed.

    Args:
        routing: see `RoutingSpec`. Under shares every token draws its expert, in each layer for itself; all draws are made here, so that
            none is made within the time that is measured.
        rows, calls: tokens of one forward, and the forwards to come; after `calls` of them the same draws come again.
        seed: of the draws, the same for the same arguments.

    Yields:
        The expert drawn for every token and layer, [L, calls * rows] int64; None where there are no shares to draw with.
    """
    if not isinstance(routing, tuple):
        model.set_routing(routing)
        yield None
        return
    mlps, experts = model.routed_mlps(), model.moe.num_experts
    model.set_routing("router")
    shares = torch.tensor(routing, dtype=torch.float64)
    drawn = []
    with ExitStack() as hooks:
        for layer, mlp in enumerate(mlps):
            generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
            drawn.append(torch.multinomial(shares, calls * rows, replacement=True, generator=generator))
            logits = F.one_hot(drawn[-1], experts).to(next(mlp.router.parameters())).split(rows)  # calls x [N, E]
            hooks.callback(mlp.router.register_forward_hook(_overrule(logits)).remove)
        yield torch.stack(drawn)


def _overrule(logits: Sequence[Tensor]):
    """A forward hook that returns the next of `logits` whatever the router said."""
    turns = itertools.cycle(logits)

    def hook(router: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return next(turns)

    return hook
