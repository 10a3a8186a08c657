"""The MLP of a ToMoE model in training: every token takes one expert, an expert is a mask over the frozen MLP's neurons.

arXiv 2501.15316, the MLP module. In one forward all tokens of an expert share one mask (one noise sample per expert and neuron), so tokens
are sorted by expert, masks multiply whole slices, and the gradient of the router's choice needs only the derivative of E masks along E
embeddings, never a mask per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_tomoe import ToMoEConfig
from .families import Family
from .hypernetwork import embedding_features, feature_tangents
from .masking import Masking
from .routed import Routing
from .straight_through import one_hot_sample, open_sample, open_slope

__all__ = ["MLPTrace", "MaskedMLP"]


@dataclass
class MLPTrace:
    """What one layer's MLP did in one forward over N = batch * sequence tokens."""

    router_logits: Tensor  # [N, E]
    experts: Tensor  # [N] int64; -1: no expert, everything was open
    choice: Tensor | None  # [N, E], one-hot with the straight-through gradient
    masks: Tensor | None  # [E, H], 0 or 1 with the straight-through gradient


class _Reordered(torch.autograd.Function):
    """Rows of x [N, D] in another order; the backward pass gathers by the inverse order, too."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _MaskedNeurons(torch.autograd.Function):
    """Rows of neurons sorted by expert, [N, H], times the masks of their experts [E, H].

    `choice` [N, E], in the same order, is not read: its gradient is that of the mask, which depends on the embedding sum_k choice_k S_k,
    through `tangents` [E, E, S] (features of expert e along S_k), the decoder [H, S] and the slope of the masks [E, H].

    `power` is how often the mask multiplies a neuron's output: 2 in gated MLPs, where it stands on both factors. A mask is its own square,
    but its gradient is 2 s h, which is made of the result, so that there the rows can be masked in place.
    """

    @staticmethod
    def forward(ctx, hidden, masks, choice, tangents, decoder, slopes, counts, power):
        typed = masks.to(hidden.dtype)
        masked = hidden if power == 2 else torch.empty_like(hidden)
        for rows, mask, out in zip(hidden.split(counts), typed, masked.split(counts), strict=True):
            torch.mul(rows, mask, out=out)
        if power == 2:
            ctx.mark_dirty(hidden)
        ctx.save_for_backward(hidden, typed, tangents, decoder, slopes)
        ctx.counts, ctx.power = counts, power
        return masked

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, masks, tangents, decoder, slopes = ctx.saved_tensors
        grad_hidden = torch.empty_like(grad) if ctx.needs_input_grad[0] else None
        grad_masks = torch.zeros_like(slopes) if ctx.needs_input_grad[1] else None
        grad_choice = slopes.new_zeros(len(grad), len(slopes)) if ctx.needs_input_grad[2] else None
        start = 0
        for expert, count in enumerate(ctx.counts):
            if not count:
                continue
            rows = slice(start, start + count)
            start += count
            if grad_masks is not None or grad_choice is not None:
                per_token = (hidden[rows] * grad[rows]).float()  # dL/ds, [n, H]
                if grad_masks is not None:
                    torch.sum(per_token, 0, out=grad_masks[expert])
                if grad_choice is not None:
                    steps = F.linear(tangents[expert], decoder).mul_(slopes[expert])  # of the mask along S_k, [E, H]
                    torch.mm(per_token, steps.t(), out=grad_choice[rows])
            if grad_hidden is not None:
                torch.mul(grad[rows], masks[expert], out=grad_hidden[rows])
        if ctx.power != 1:
            for each in (grad_masks, grad_choice):
                if each is not None:
                    each.mul_(ctx.power)
        return grad_hidden, grad_masks, grad_choice, None, None, None, None, None


class MaskedMLP(nn.Module):
    """A family's MLP, its projections kept under their own names, with a router over masks of its neurons."""

    def __init__(self, dense: nn.Module, family: Family, config: ToMoEConfig, layer: int, row: int, routing: Routing, masking: Masking):
        """Take over a dense MLP; `row` is where the hypernetwork's embeddings [M, E, S] have its own."""
        super().__init__()
        self._family = family
        for name in family.projections:
            setattr(self, name, getattr(dense, name))
        self.act_fn = getattr(dense, family.activation)
        self.moe, self.layer, self.row, self.routing, self.masking = config, layer, row, routing, masking
        down = self.down
        self.router = nn.Linear(down.out_features, config.num_experts, bias=False)
        self.norm = nn.LayerNorm(config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, down.in_features, bias=False)

    # --- the dense pieces -------------------------------------------------------------------------------------------------------

    @property
    def down(self) -> nn.Linear:
        """The down projection, [D, H]."""
        return getattr(self, self._family.down)

    def projections(self) -> dict[str, nn.Linear]:
        """The linear maps by the family's names for them, the down projection last."""
        return {name: getattr(self, name) for name in self._family.projections}

    def _hidden(self, x: Tensor) -> Tensor:
        """Activations of all neurons: [N, D] -> [N, H]."""
        family = self._family
        if family.gate is None:
            return self.act_fn(getattr(self, family.up)(x))
        active, raised = self.act_fn(getattr(self, family.gate)(x)), getattr(self, family.up)(x)
        return active * raised if torch.is_grad_enabled() else active.mul_(raised)  # a forward's own: saves a tensor of its size

    def expert_params(self) -> list[int]:
        """Parameters of each expert, router aside: its neurons' rows of the input projections and columns of down, down's whole bias."""
        *inputs, down = self.projections().values()
        per_neuron = sum(linear.in_features + (linear.bias is not None) for linear in inputs) + down.out_features
        shared = 0 if down.bias is None else down.bias.numel()
        return [int(size) * per_neuron + shared for size in self.open_neurons().sum(dim=1).tolist()]

    def dense_params(self) -> int:
        """Parameters of the dense MLP that this one came from."""
        return sum(parameter.numel() for linear in self.projections().values() for parameter in linear.parameters())

    def full_params(self) -> int:
        """Parameters that routing "full" uses: the dense MLP's."""
        return self.dense_params()

    # --- masks ------------------------------------------------------------------------------------------------------------------

    def mask_logits(self, embeddings: Tensor) -> Tensor:
        """Logits of the neurons, offset included: expert embeddings [E, S] -> [E, H]; open where they are positive."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.decoder(embedding_features(embeddings.to(self.decoder.weight.device), self.norm)) + self.moe.mask_offset

    @torch.no_grad()
    def open_neurons(self, embeddings: Tensor | None = None) -> Tensor:
        """The neurons that each expert has, [E, H] bool; from the hypernetwork's embeddings [M, E, S] if they are known already."""
        embeddings = self.masking.hypernetwork() if embeddings is None else embeddings
        return self.mask_logits(embeddings[self.row]) > 0

    # --- forward ----------------------------------------------------------------------------------------------------------------

    def _choice(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The expert of each token as a one-hot [N, E]: the router's in training, else that of whoever decides."""
        mode = "router" if self.training else self.routing.mode
        if mode == "router":
            return one_hot_sample(logits, noise, self.moe.router_temperature)
        if mode == "random":
            experts = self.routing.draw(self.layer, len(logits), logits.device)
        else:
            experts = torch.full((len(logits),), self.routing.expert, dtype=torch.long, device=logits.device)
        return F.one_hot(experts, self.moe.num_experts).to(logits.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        forward = self.masking.for_layer(self.routing, training=self.training)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, D]
        if forward.embeddings is None:
            if forward.mlps is not None:
                experts = torch.full((len(x),), -1, dtype=torch.long, device=x.device)
                forward.mlps[self.layer] = MLPTrace(self._router_logits(x), experts, None, None)
            return self.down(self._hidden(x)).view_as(hidden_states)

        logits = self._router_logits(x)
        draw = None if forward.noise is None else forward.noise.gumbel
        choice = self._choice(logits, None if draw is None else draw(logits.shape, x.device))
        embeddings = forward.embeddings[self.row].to(x.device)  # [E, S]
        mask_logits = self.mask_logits(embeddings)
        if draw is not None:
            mask_logits = mask_logits + draw(mask_logits.shape, x.device)
        masks = open_sample(mask_logits, self.moe.mask_temperature)
        experts = choice.detach().argmax(dim=-1)
        output = self._masked(x, choice, experts, masks, mask_logits, embeddings)
        if forward.mlps is not None:
            forward.mlps[self.layer] = MLPTrace(logits, experts, choice, masks)
        return output.view_as(hidden_states)

    def _router_logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.router(x.to(self.router.weight.dtype))

    def _masked(self, x: Tensor, choice: Tensor, experts: Tensor, masks: Tensor, mask_logits: Tensor, embeddings: Tensor) -> Tensor:
        """The MLP with each token's mask on its neurons: [N, D] -> [N, D]."""
        counts = torch.bincount(experts, minlength=self.moe.num_experts).tolist()
        order = inverse = None
        if max(counts) < len(x):
            order = experts.argsort(stable=True)
            inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
            x, choice = _Reordered.apply(x, order, inverse), _Reordered.apply(choice, order, inverse)
        hidden = self._hidden(x)
        if torch.is_grad_enabled():
            with torch.no_grad():
                tangents = feature_tangents(embeddings, embeddings, self.norm)
                slopes = open_slope(mask_logits, self.moe.mask_temperature)
            power = 1 if self._family.gate is None else 2
            hidden = _MaskedNeurons.apply(hidden, masks, choice, tangents, self.decoder.weight.detach(), slopes, counts, power)
        else:
            for rows, mask in zip(hidden.split(counts), masks.to(hidden.dtype), strict=True):
                rows.mul_(mask)
        output = self.down(hidden)
        return output if order is None else _Reordered.apply(output, inverse, order)
