"""The MLP of a deployed ToMoE model (arXiv 2501.15316): a router picks one expert per token, an expert runs on its own neurons only.

The weights hold the neurons that some expert has (the union), under the family's names; `membership` says who has which. Two paths compute
the same function. *Grouped* (inference): tokens sorted by expert, each expert one small dense MLP on a copy of its weights that lies in one
piece. *Masked* (gradients, adapters, a few tokens at once): the whole union for every token, neurons of other experts set to zero.

The copies are made with the first inference forward, or by `lay_out`; they are neither saved nor parameters, and made anew where weights
have changed. They take the memory of all experts' widths together: with 8 experts of half the width that of four dense MLPs, besides the
union. Neurons that all experts share are copied, too: computing them once for all tokens saved at most a tenth of the time in a trial where
they were half of each expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_tomoe import ToMoEConfig
from .families import Family
from .routed import Routing

__all__ = ["ExpertMLP", "ExpertTrace", "narrow"]

READING = 18  # tokens whose arithmetic takes as long as reading the weights, on the CPUs that this was measured on

Pieces = tuple[Tensor | None, ...]  # of n neurons: weight [n, D] and bias [n] of gate (if there is one), the same of up, down [n, D]


@dataclass
class ExpertTrace:
    """What one layer did in one forward; N = batch * sequence tokens, in that order."""

    router_logits: Tensor  # [N, E]
    experts: Tensor  # [N] int64: the expert that ran; -1: all neurons


def narrow(linear: nn.Linear, *, inputs: int | None = None, outputs: int | None = None) -> None:
    """Cut a linear map to its first inputs and outputs, in place; which ones it really keeps, a checkpoint says."""
    inputs = linear.in_features if inputs is None else inputs
    outputs = linear.out_features if outputs is None else outputs
    linear.weight = nn.Parameter(linear.weight.detach()[:outputs, :inputs].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:outputs].clone())
    linear.in_features, linear.out_features = inputs, outputs


class ExpertMLP(nn.Module):
    """A family's MLP cut to `union` neurons, its projections kept under their own names, with a router over experts.

    Choices are hard and have no gradient: fine-tuning changes the projections, not the router nor which neurons an expert has.
    """

    membership: Tensor  # [E, U] bool: which neurons an expert has

    def __init__(self, dense: nn.Module, family: Family, config: ToMoEConfig, union: int, layer: int, routing: Routing):
        super().__init__()
        self._family = family
        for name in family.projections:
            setattr(self, name, getattr(dense, name))
        self.act_fn = getattr(dense, family.activation)
        self.layer = layer
        self.routing = routing
        self.num_experts = config.num_experts
        self.dense_size = self.down.in_features
        for linear in (self.gate, self.up):
            if linear is not None:
                narrow(linear, outputs=union)
        narrow(self.down, inputs=union)
        self.router = nn.Linear(self.down.out_features, config.num_experts, bias=False, dtype=torch.float32)
        self.freeze_choices()
        self.register_buffer("membership", torch.ones(config.num_experts, union, dtype=torch.bool))
        self.trace: ExpertTrace | None = None
        self._laid_out: tuple[tuple, tuple[Pieces, ...]] | None = None  # the weights' state, and every expert's copy of them

    def freeze_choices(self) -> None:
        """Leave no gradient to the router."""
        self.router.requires_grad_(False)

    # --- the pieces -------------------------------------------------------------------------------------------------------------

    @property
    def up(self) -> nn.Linear:
        """The up projection, [U, D]."""
        return self._modules[self._family.up]

    @property
    def gate(self) -> nn.Linear | None:
        """The gate projection, [U, D], or None for a plain MLP."""
        return None if self._family.gate is None else self._modules[self._family.gate]

    @property
    def down(self) -> nn.Linear:
        """The down projection, [D, U]."""
        return self._modules[self._family.down]

    def projections(self) -> dict[str, nn.Linear]:
        """The linear maps by the family's names for them, the down projection last."""
        return {name: self._modules[name] for name in self._family.projections}

    def _params(self, neurons: int) -> int:
        inputs = [linear for linear in (self.gate, self.up) if linear is not None]
        per_neuron = sum(linear.in_features + (linear.bias is not None) for linear in inputs) + self.down.out_features
        return neurons * per_neuron + (0 if self.down.bias is None else self.down.bias.numel())

    def expert_params(self) -> list[int]:
        """Parameters of each expert, router aside: its neurons' rows and columns, down's whole bias."""
        return [self._params(neurons) for neurons in self.membership.sum(dim=1).tolist()]

    def full_params(self) -> int:
        """Parameters that routing "full" uses: the union's."""
        return self._params(self.membership.shape[1])

    def dense_params(self) -> int:
        """Parameters of the dense MLP that this one was cut from."""
        return self._params(self.dense_size)

    # --- forward ----------------------------------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, D]
        routing = self.routing
        mode = routing.mode
        logits = self._router_logits(x) if mode == "router" or routing.collect else None
        if mode == "router":
            experts = logits.argmax(dim=-1)
        elif mode == "random":
            experts = routing.draw(self.layer, len(x), x.device)
        else:
            experts = None if mode == "full" else routing.expert
        if routing.collect:
            same = -1 if experts is None else experts
            each = experts if isinstance(experts, Tensor) else torch.full((len(x),), same, dtype=torch.long, device=x.device)
            self.trace = ExpertTrace(logits, each)
        may_group = self._may_group()
        if not may_group:
            self._laid_out = None  # what learns, or is wrapped, may be written to in ways that no version counts
        grouped = may_group and experts is not None and self._pays(experts)
        output = self._forward_grouped(x, experts) if grouped else self._forward_masked(x, experts)
        return output.view_as(hidden_states)

    def _router_logits(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, E] in the router's own dtype, float32, since a choice that is close would turn over in a coarser one."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.router(x.to(self.router.weight.dtype))
        return self.router(x.to(self.router.weight.dtype))

    def _may_group(self) -> bool:
        """Whether copies may stand for the projections: not where these learn, nor where something wraps them (adapters, quantizers)."""
        if self.training or torch.is_grad_enabled():
            return False
        modules = self._modules
        return all(type(modules[name]) is nn.Linear for name in self._family.projections)

    def _forward_masked(self, x: Tensor, experts: Tensor | int | None) -> Tensor:
        """The whole union, [N, D] -> [N, D]; `experts` of each token, of all, or None: no mask."""
        hidden = self.act_fn(self.up(x)) if self.gate is None else self.act_fn(self.gate(x)) * self.up(x)
        if experts is not None:
            hidden = hidden.masked_fill(~self.membership[experts], 0)
        return self.down(hidden)

    # --- inference --------------------------------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        """Copy each expert's weights into pieces of their own, anew if there are such copies.

        The first inference forward does it, too, and the next one after changes in place, replaced tensors or modules, forwards with
        gradients or through adapters. Writing to `weight.data` between two inference forwards is not seen: call `lay_out()` after it.
        """
        self._laid_out = None  # free the old ones first
        with torch.inference_mode(False), torch.no_grad():
            pieces = tuple(self._copied(members.nonzero()[:, 0]) for members in self.membership)
        self._laid_out = (self._state(), pieces)

    def _copies(self) -> tuple[Pieces, ...]:
        """The copies of all experts, of the weights as they are now."""
        if self._laid_out is None or self._laid_out[0] != self._state():
            self.lay_out()
        return self._laid_out[1]

    def _copied(self, neurons: Tensor) -> Pieces:
        """The weights of these neurons; gate and up apart, for one matrix of both was slower at D = 2048 and no faster at 576."""
        pieces: list[Tensor | None] = []
        for linear in (linear for linear in (self.gate, self.up) if linear is not None):
            bias = None if linear.bias is None else linear.bias.index_select(0, neurons)
            pieces += [linear.weight.index_select(0, neurons), bias]
        return *pieces, self.down.weight.index_select(1, neurons).t().contiguous()

    def _state(self) -> tuple:
        """What changes when a tensor does that copies are made of: its place and its version."""
        found = []
        for name in self._family.projections:
            found += self._modules[name]._parameters.values()
        found.append(self._buffers["membership"])
        return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in found if each is not None)

    def sort_tokens(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor | None, list[int]]:
        """Rows of x [N, D] ordered by expert, their places [N] in x, and the number of tokens of each expert.

        Rows and places are x and None if all tokens share one expert.
        """
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        if max(counts) == len(x):
            return x, None, counts
        order = experts.argsort(stable=True)
        return x.index_select(0, order), order, counts

    def restore_order(self, output: Tensor, order: Tensor) -> Tensor:
        """Sorted rows [N, D] back in the order of the tokens; gathering by the inverse is faster than scattering."""
        places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return output.index_select(0, places)

    def _pays(self, experts: Tensor | int) -> bool:
        """Whether the experts one by one take less time than the union at once: each has weights of its own to read, which the few tokens
        of a decoded batch do not repay."""
        if isinstance(experts, int) or len(experts) == 1 or len(experts) >= 64 * self.num_experts:
            return True
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        widths = (len(pieces[-1]) for pieces in self._copies())
        apart = sum(width * (count + READING) for width, count in zip(widths, counts, strict=True) if count)
        return apart <= self.membership.shape[1] * (len(experts) + READING)

    def _forward_grouped(self, x: Tensor, experts: Tensor | int) -> Tensor:
        """Every token through the neurons of its expert, [N, D] -> [N, D]."""
        pieces = self._copies()
        if isinstance(experts, int) or len(x) == 1:  # decoding: as little as possible around the products
            return self._run(x, pieces[int(experts)])
        rows, order, counts = self.sort_tokens(x, experts)
        if order is None:
            return self._run(x, pieces[counts.index(max(counts))])
        output, lo = torch.empty_like(rows), 0
        for piece, count in zip(pieces, counts, strict=True):
            if count:
                self._run(rows[lo : lo + count], piece, output[lo : lo + count])
                lo += count
        return self.restore_order(output, order)

    def _run(self, x: Tensor, pieces: Pieces, output: Tensor | None = None) -> Tensor:
        """One expert, [n, D] -> [n, D], written to `output` if that is given."""
        *inputs, down = pieces
        hidden = self.act_fn(F.linear(x, *inputs[:2]))
        if len(inputs) > 2:  # that was the gate
            hidden.mul_(F.linear(x, *inputs[2:]))
        bias = self._modules[self._family.down].bias
        if output is None or not output.dtype == hidden.dtype == down.dtype:  # autocast casts what is not written in place
            result = torch.mm(hidden, down) if bias is None else torch.addmm(bias, hidden, down)
            return result if output is None else output.copy_(result)
        return torch.mm(hidden, down, out=output) if bias is None else torch.addmm(bias, hidden, down, out=output)

    # --- when the copies go -----------------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: object) -> None:
        """As in torch; copies are dropped where a module, a parameter or a buffer is put, e.g. as adapters are wrapped and merged."""
        super().__setattr__(name, value)
        if isinstance(value, (nn.Module, Tensor)):
            self.__dict__["_laid_out"] = None

    def _apply(self, fn, recurse: bool = True):
        """As in torch: another device or dtype; copies are dropped."""
        self._laid_out = None
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True):
        """As in torch; what is trained needs no copies."""
        if mode:
            self._laid_out = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        """What copying and pickling take: no laid out copies."""
        return {**self.__dict__, "_laid_out": None}
