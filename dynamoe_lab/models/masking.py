"""How the layers of a masked ToMoE model know which forward they are in: the teacher's, the student's, or that of an inference.

Embeddings and noise belong to a forward of the whole model, layers are called by the family's code; one object that all of them share
brings the two together, also where activation checkpoints run a layer a second time in the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hypernetwork import Hypernetwork
from .routed import Routing
from .straight_through import GumbelNoise

__all__ = ["Checkpointing", "MaskedForward", "Masking"]


@dataclass
class MaskedForward:
    """What all layers need to know of the forward that is running."""

    embeddings: Tensor | None  # S [M, E, S], or None: everything is open
    noise: GumbelNoise | None = None  # of training
    mlps: dict[int, Any] | None = None  # layer -> what its MLP did; None: nobody asks
    attentions: dict[int, Any] | None = None


@dataclass
class Masking:
    """One object that all masked layers of a model share."""

    hypernetwork: Hypernetwork
    current: MaskedForward | None = None

    @contextmanager
    def during(self, forward: MaskedForward | None) -> Iterator[MaskedForward | None]:
        """Layers called in this context belong to that forward."""
        before, self.current = self.current, forward
        try:
            yield forward
        finally:
            self.current = before

    def for_layer(self, routing: Routing, *, training: bool) -> MaskedForward:
        """The forward that a layer is called in; one of its own, without noise, for a layer that is called alone.

        Raises RuntimeError in training, where noise and embeddings have to be those of a forward of the whole model.
        """
        if self.current is not None:
            return self.current
        if training and torch.is_grad_enabled():
            raise RuntimeError(
                "a masked layer was called outside its model's forward: train the whole model, and checkpoint activations with "
                "model.activation_checkpointing_enable()"
            )
        return MaskedForward(None if routing.mode == "full" else self.hypernetwork())


class Checkpointing:
    """An activation checkpointing function whose second run of a layer sees the forward that the first one belonged to."""

    def __init__(self, masking: Masking, function: Callable[..., Any]):
        self.masking, self.function = masking, function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `layer(*args)` as the function does, which calls it again in the backward pass."""
        forward = self.masking.current

        def again(*args):
            with self.masking.during(forward):
                return layer(*args)

        return self.function(again, *args, **kwargs)
