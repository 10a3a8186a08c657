"""What all converted models share, whatever their method: who decides a token's expert, how that is told, and what a saved model says.

A method's model class stands before the family's in the bases, derives from `RoutedMixin`, and answers `routed_mlps()`: one module a layer
with a `router` ([N, D] -> [N, E]), `sizes` (neurons of each expert), `projections()` (its linear maps, the down projection last),
`expert_params()`, `full_params()` and `dense_params()`. Evaluation asks for nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

__all__ = ["RoutedMixin", "Routing", "token_mask"]


@dataclass
class Routing:
    """How tokens are routed; one object shared by all layers of a model, changed by `model.set_routing`."""

    mode: Literal["router", "label", "full", "fixed", "random"] = "router"
    expert: int = 0  # of mode "fixed"
    shares: Tensor | None = None  # [L, E], of mode "random"
    generators: list[torch.Generator] | None = None  # one a layer, of mode "random"
    collect: bool = False  # set by the model during a forward that returns routing

    def draw(self, layer: int, tokens: int, device: torch.device) -> Tensor:
        """Experts of so many tokens of a layer under mode "random", [N] int64."""
        return torch.multinomial(self.shares[layer], tokens, replacement=True, generator=self.generators[layer]).to(device)


class RoutedMixin:
    """Routing modes of a converted model; its config has the plain dict `moe`, and `self.moe` the method's config with `num_experts`."""

    method: ClassVar[str]  # "dynamoe", "tomoe": the name in `config.moe`
    routing_modes: ClassVar[dict[str, str | None]]  # mode -> None, or why this method has it not
    calibrated: ClassVar[bool] = False  # whether conversion reads statistics of text
    # The loss is a mean per batch, so Trainer has to divide by the accumulation steps itself; otherwise lambda would change with them.
    accepts_loss_kwargs: ClassVar[bool] = False

    routing: Routing

    def routed_mlps(self) -> list[nn.Module]:
        """The MLPs with experts, one a layer, in order."""
        raise NotImplementedError

    def reconfigure(self, config: Any) -> None:
        """Take over the settings that shape no weight. Raises ValueError if `config` needs a conversion; here it always does."""
        raise ValueError(f"reconfigure: settings of {type(self).__name__} shape its weights; convert the dense model again")

    def set_routing(self, mode: str | int = "router", *, shares: Any = None, seed: int = 0) -> None:
        """Choose who decides a token's expert, in every layer, from the next forward on.

        Args:
            mode: `"router"`; `"full"` (DynaMoE: the last expert, the dense function; ToMoE: everything that is there, no masks); an
                expert's index; `"random"` (independent draws); of DynaMoE also `"label"` (the oracle: the difficulty label itself, at
                the cost of the full MLP). In training DynaMoE's `train_route` decides.
            shares: for "random": a frame with columns layer, expert, share (a table `expert_usage`), or a tensor [L, E].
            seed: for "random": draws are taken in the order of the tokens computed since this call, so they depend on the batches.

        Raises:
            ValueError: unknown mode or one that the method does not have, index out of range, shares missing or of the wrong shape.
        """
        experts = self.moe.num_experts
        if isinstance(mode, str) and (reason := self.routing_modes.get(mode)) is not None:
            raise ValueError(f"routing {mode!r}: {reason}")
        known = ", ".join(name for name, reason in self.routing_modes.items() if reason is None)
        if isinstance(mode, bool) or not isinstance(mode, (str, int)):
            raise ValueError(f"routing {mode!r}: give {known}, or an expert's index")
        if isinstance(mode, int):
            if not 0 <= mode < experts:
                raise ValueError(f"routing {mode}: this model has experts 0 to {experts - 1}")
            self._apply_routing("fixed", expert=mode)
        elif mode == "random":
            table = self._share_table(shares)
            generators = [torch.Generator().manual_seed(1_000_003 * seed + layer) for layer in range(len(table))]
            self._apply_routing("random", shares=table, generators=generators)
        elif mode in self.routing_modes:
            self._apply_routing(mode)
        else:
            raise ValueError(f"routing {mode!r}: give {known}, or an expert's index from 0 to {experts - 1}")

    def _apply_routing(self, mode: str, expert: int = 0, shares: Tensor | None = None, generators: list | None = None) -> None:
        routing = self.routing  # one object that all layers hold: change it in place
        routing.mode, routing.expert, routing.shares, routing.generators = mode, expert, shares, generators

    def _share_table(self, shares: Any) -> Tensor:
        layers, experts = len(self.routed_mlps()), self.moe.num_experts
        if shares is None:
            raise ValueError('routing "random" needs shares: a frame with columns layer, expert, share, or a tensor [layers, experts]')
        if isinstance(shares, Tensor):
            table = shares.detach().to("cpu", torch.float32)
        else:
            table = torch.zeros(layers, experts)
            for layer, expert, share in zip(shares["layer"], shares["expert"], shares["share"], strict=True):
                if not (0 <= int(layer) < layers and 0 <= int(expert) < experts):
                    raise ValueError(f"shares: layer {layer}, expert {expert} is not in a model of {layers} layers and {experts} experts")
                table[int(layer), int(expert)] += float(share)
        if table.shape != (layers, experts) or not bool((table >= 0).all()) or not bool((table.sum(1) > 0).all()):
            raise ValueError(f"shares: need non-negative shares for {layers} layers x {experts} experts with a positive sum in each layer")
        return table

    def _gradient_is_lost(self, loss: Tensor) -> bool:
        """Whether routers learn, but this loss does not reach them: reentrant checkpoints run layers without gradient, and so make the
        traces that losses are made of."""
        if not (self.training and torch.is_grad_enabled()) or loss.requires_grad:
            return False
        return any(parameter.requires_grad for mlp in self.routed_mlps() for parameter in mlp.router.parameters())

    # --- saving -----------------------------------------------------------------------------------------------------------------

    def card(self) -> str:
        """The README.md of this model's checkpoints: markdown after a head of metadata, by which it is known as ours."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers, safetensors only, with the code that reads it and a model card (a README.md of your own is kept)."""
        super().save_pretrained(save_directory, **kwargs)
        path, text = Path(save_directory) / "README.md", self.card()
        head = text[: text.index("\n---\n")]
        if not path.exists() or path.read_text(encoding="utf-8", errors="replace").startswith(head):  # ours, of an earlier state
            path.write_text(text, encoding="utf-8")


def token_mask(attention_mask: Tensor | Mapping | None, tokens: int) -> Tensor | None:
    """Which of the N = B * T tokens of this forward are no pads, [N] bool, or None if all count.

    A mask that also covers cached tokens ([B, past + T]) is cut to its last T columns; masks of other ranks say nothing about pads here.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    length = tokens // attention_mask.shape[0]
    return attention_mask[:, -length:].reshape(-1).bool()
