"""The MLP as nested experts: expert e is the first `sizes[e]` neurons; a router picks one expert per token.

Two paths compute the same function. *Blocks* (training, labels): the products of all E blocks of neurons are computed once, their running
sums are the outputs of all E experts, so labels cost no second MLP. *Prefixes* (inference): tokens sorted by expert, block b is one dense
product over the first n_b of them; absent experts cost nothing. Weights stay where the family keeps them; prefixes are views.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_dynamoe import DynaMoEConfig
from .families import Family

__all__ = ["NestedMLP", "Router", "Routing", "RoutingTrace", "labels_from_similarity", "nested_similarity"]


@dataclass
class Routing:
    """How tokens are routed; one object shared by all layers of a model, changed by `model.set_routing`."""

    mode: Literal["router", "label", "full", "fixed", "random"] = "router"
    expert: int = 0  # of mode "fixed"
    shares: Tensor | None = None  # [L, E], of mode "random"
    generators: list[torch.Generator] | None = None  # one a layer, of mode "random"
    collect: bool = False  # set by the model during a forward that returns routing


@dataclass
class RoutingTrace:
    """What one layer did in one forward; N = batch * sequence tokens, in that order."""

    router_logits: Tensor  # [N, E], with gradient in training
    experts: Tensor  # [N] int64: the expert whose output was used
    labels: Tensor  # [N] int64: the smallest expert within theta of the full output
    similarities: Tensor  # [N, E] float32: cosine of every expert's output to the full output; the last is 1


class Router(nn.Sequential):
    """D -> hidden -> E, two linear maps without bias (33.6 M parameters on Mistral-7B fit none), SiLU between."""

    def __init__(self, hidden_size: int, config: DynaMoEConfig):
        super().__init__(
            nn.Linear(hidden_size, config.router_hidden_size, bias=False),
            nn.SiLU(),
            nn.Linear(config.router_hidden_size, config.num_experts, bias=False),
        )


def nested_similarity(products: list[Tensor], bias: Tensor | None = None) -> Tensor:
    """Cosine between the output of every nested expert and the full output (arXiv 2502.12325, difficulty label), in float32.

    Args:
        products: E block products, each [N, D]; expert e's output is the sum of the first e + 1.
        bias: output bias [D], which belongs to every expert.

    Returns:
        [N, E]; the last column is exactly 1. An all-zero output has cosine 0 to anything.
    """
    running = [products[0].float() if bias is None else products[0].float() + bias.float()]
    for product in products[1:]:
        running.append(running[-1] + product.float())
    full = running[-1]
    full_norm = full.norm(dim=-1)
    columns = [
        (output * full).sum(-1) / (output.norm(dim=-1) * full_norm).clamp_min(torch.finfo(torch.float32).tiny) for output in running[:-1]
    ]
    return torch.stack([*columns, torch.ones_like(full_norm)], dim=-1)


def labels_from_similarity(similarities: Tensor, theta: float) -> Tensor:
    """The smallest expert with similarity >= theta; the last always qualifies. [..., E] -> [...] int64."""
    qualifies = similarities >= theta
    qualifies[..., -1] = True
    return qualifies.int().argmax(dim=-1)


class _WeightedBlocks(torch.autograd.Function):
    """sum_b w_b * P_b with P_b = h_b W_b^T given, keeping h, W and w for backward: one product each for dh and dW, as in a dense MLP."""

    @staticmethod
    def forward(ctx, hidden, weight, block_weights, products, sizes):
        ctx.save_for_backward(hidden, weight, block_weights)
        ctx.sizes = sizes
        output = products[0] * block_weights[:, :1]
        for b, product in enumerate(products[1:], start=1):
            output.addcmul_(product, block_weights[:, b : b + 1])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        hidden, weight, block_weights = ctx.saved_tensors
        widths = torch.tensor([hi - lo for lo, hi in ctx.sizes], device=hidden.device)
        spread = block_weights.repeat_interleave(widths, dim=1, output_size=hidden.shape[1])  # [N, H]
        grad_hidden = grad_weight = grad_blocks = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            pulled = grad_output @ weight  # [N, H]
            if ctx.needs_input_grad[2]:
                shares = pulled * hidden
                grad_blocks = torch.stack([shares[:, lo:hi].sum(-1) for lo, hi in ctx.sizes], dim=-1)
            if ctx.needs_input_grad[0]:
                grad_hidden = pulled.mul_(spread)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_output.t() @ spread.mul_(hidden)
        return grad_hidden, grad_weight, grad_blocks, None, None


class NestedMLP(nn.Module):
    """A family's MLP, its projections kept under their own names, with a router over its prefixes."""

    def __init__(self, dense: nn.Module, family: Family, config: DynaMoEConfig, layer: int, routing: Routing):
        super().__init__()
        for name in family.projections:
            setattr(self, name, getattr(dense, name))
        self._family = family
        self.act_fn = getattr(dense, family.activation)
        self.moe = config
        self.layer = layer
        self.routing = routing
        down = getattr(self, family.down)
        self.sizes = config.sizes(down.in_features)
        self.blocks = tuple(zip((0, *self.sizes[:-1]), self.sizes, strict=True))  # neurons [lo, hi) of each block
        self.router = Router(down.out_features, config)
        self.trace: RoutingTrace | None = None

    # --- the dense pieces -------------------------------------------------------------------------------------------------------

    @property
    def up(self) -> nn.Linear:
        """The up projection, [H, D]."""
        return getattr(self, self._family.up)

    @property
    def gate(self) -> nn.Linear | None:
        """The gate projection, [H, D], or None for a plain MLP."""
        return None if self._family.gate is None else getattr(self, self._family.gate)

    @property
    def down(self) -> nn.Linear:
        """The down projection, [D, H]."""
        return getattr(self, self._family.down)

    def _hidden(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Activations of neurons [lo, hi): [N, D] -> [N, hi - lo]."""
        up = F.linear(x, self.up.weight[lo:hi], None if self.up.bias is None else self.up.bias[lo:hi])
        if self.gate is None:
            return self.act_fn(up)
        return self.act_fn(F.linear(x, self.gate.weight[lo:hi], None if self.gate.bias is None else self.gate.bias[lo:hi])) * up

    def expert_output(self, x: Tensor, expert: int) -> Tensor:
        """Output of one nested expert for every token: [..., D] -> [..., D], work proportional to the prefix."""
        size = self.sizes[expert]
        return F.linear(self._hidden(x, 0, size), self.down.weight[:, :size], self.down.bias)

    # --- routing ----------------------------------------------------------------------------------------------------------------

    def _chosen(self, logits: Tensor | None, labels: Tensor | None, tokens: int, device: torch.device) -> Tensor:
        """The expert of each token, [N] int64, by the current routing mode."""
        routing = self.routing
        if routing.mode == "router":
            return logits.argmax(dim=-1)
        if routing.mode == "label":
            return labels
        if routing.mode == "random":
            shares, generator = routing.shares[self.layer], routing.generators[self.layer]
            return torch.multinomial(shares, tokens, replacement=True, generator=generator).to(device)
        expert = self.moe.num_experts - 1 if routing.mode == "full" else routing.expert
        return torch.full((tokens,), expert, dtype=torch.long, device=device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, D]
        if self.routing.collect or torch.is_grad_enabled() or self.routing.mode == "label":
            output = self._forward_blocks(x)
        elif self.routing.mode == "full" or self.routing.mode == "fixed":
            output = self.expert_output(x, -1 if self.routing.mode == "full" else self.routing.expert)
        else:
            logits = self.router(x) if self.routing.mode == "router" else None
            output = self._forward_prefixes(x, self._chosen(logits, None, len(x), x.device))
        return output.view_as(hidden_states)

    def _forward_blocks(self, x: Tensor) -> Tensor:
        logits = self.router(x)  # [N, E]
        hidden = self._hidden(x, 0, self.sizes[-1])  # [N, H]
        weight = self.down.weight.to(hidden.dtype)
        mode = "label" if self.training and self.moe.train_route == "label" else self.routing.mode
        similarities = labels = None
        with torch.no_grad():
            products = [F.linear(hidden[:, lo:hi], weight[:, lo:hi]) for lo, hi in self.blocks]  # E x [N, D]
            if self.routing.collect or mode == "label":
                similarities = nested_similarity(products, self.down.bias)
                labels = labels_from_similarity(similarities, self.moe.theta)
        experts = labels if mode == "label" else self._chosen(logits.detach(), labels, len(x), x.device)
        block_weights = self._block_weights(logits, experts, trained=mode == "router").to(hidden.dtype)
        output = _WeightedBlocks.apply(hidden, weight, block_weights, products, self.blocks)
        if self.down.bias is not None:
            output = output + self.down.bias
        if self.routing.collect:
            self.trace = RoutingTrace(logits, experts, labels, similarities)
        return output

    def _block_weights(self, logits: Tensor, experts: Tensor, *, trained: bool) -> Tensor:
        """w_b = sum_{e >= b} of the choice, [N, E]: 1 up to the chosen expert, 0 above, exactly; only the gradient differs."""
        gradient = self.moe.router_gradient if trained else "none"
        exact = torch.promote_types(logits.dtype, torch.float32)  # at least float32, also in bfloat16 models
        choice = F.one_hot(experts, self.moe.num_experts).to(exact)
        if gradient == "straight_through":
            probabilities = logits.softmax(dim=-1, dtype=exact)
            choice = choice + (probabilities - probabilities.detach())
        elif gradient == "probability":
            probabilities = logits.softmax(dim=-1, dtype=exact).gather(1, experts[:, None])
            choice = choice * (probabilities / probabilities.detach())
        return choice.flip(-1).cumsum(-1).flip(-1)

    def _forward_prefixes(self, x: Tensor, experts: Tensor) -> Tensor:
        counts = torch.bincount(experts, minlength=self.moe.num_experts).tolist()
        if max(counts) == len(x):  # all tokens share one expert, always so for a single one: a plain prefix
            return self.expert_output(x, counts.index(len(x)))
        order = experts.argsort(descending=True, stable=True)  # largest experts first, so block b concerns the first n_b rows
        rows = x[order]
        output = torch.zeros_like(rows) if self.down.bias is None else self.down.bias.to(rows.dtype).repeat(len(rows), 1)
        remaining = len(rows)
        for (lo, hi), count in zip(self.blocks, counts, strict=True):
            if remaining == 0:
                break
            hidden = self._hidden(rows[:remaining], lo, hi)
            output[:remaining] += F.linear(hidden, self.down.weight[:, lo:hi])
            remaining -= count
        return torch.empty_like(output).index_copy_(0, order, output)
