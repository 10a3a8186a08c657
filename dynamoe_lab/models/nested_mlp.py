"""The MLP as nested experts: expert e is the first `sizes[e]` neurons; a router picks one expert per token.

Two paths compute the same function. *Blocks* (training, labels): the products of all E blocks of neurons are computed once, their running
sums are the outputs of all E experts, so labels cost no second MLP. *Prefixes* (inference): tokens sorted by expert, block b is one dense
product over the first n_b of them; absent experts cost nothing. Weights stay where the family keeps them; prefixes are views. The down
projection, whose prefixes are columns, is laid out column by column in memory, so that they are one piece, too.

Labels compare outputs of the MLP as it is now, or (`label_target="frozen"`) of a copy from conversion that is saved beside the weights and
never learns; the copy costs a second MLP wherever labels are computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .configuration_dynamoe import DynaMoEConfig
from .families import Family
from .labels import labels_from_similarity, nested_similarity
from .routed import Routing

__all__ = ["FrozenLinear", "NestedMLP", "Router", "RoutingTrace"]


@dataclass
class RoutingTrace:
    """What one layer did in one forward; N = batch * sequence tokens, in that order."""

    router_logits: Tensor  # [N, E], with gradient in training
    experts: Tensor  # [N] int64: the expert whose output was used
    labels: Tensor  # [N] int64: the smallest expert within theta of the full output
    similarities: Tensor  # [N, E] float32: of every expert's output to the full output, as the config's `label` says; the last is 1


class Router(nn.Module):
    """D -> hidden -> E, two linear maps without bias (33.6 M parameters on Mistral-7B fit none), SiLU between."""

    def __init__(self, hidden_size: int, config: DynaMoEConfig):
        super().__init__()
        self.add_module("0", nn.Linear(hidden_size, config.router_hidden_size, bias=False))
        self.add_module("2", nn.Linear(config.router_hidden_size, config.num_experts, bias=False))  # 1 was the activation: names in files

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the experts: [N, D] -> [N, E]."""
        first, last = self._modules.values()
        return last(F.silu(first(x)))


class FrozenLinear(nn.Module):
    """A projection's weights as they were at conversion: buffers, so they are saved, but neither learn nor count as parameters."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._linear = (linear,)  # in a tuple, so that it is no child of this module
        self.register_buffer("weight", torch.empty_like(linear.weight, requires_grad=False))
        self.register_buffer("bias", None if linear.bias is None else torch.empty_like(linear.bias, requires_grad=False))

    @torch.no_grad()
    def remember(self, *, missing_only: bool = False) -> None:
        """Copy the projection as it is now; with `missing_only` only what a checkpoint has not filled (transformers marks what it has)."""
        for name, buffer in self.named_buffers():
            if not (missing_only and getattr(buffer, "_is_hf_initialized", False)):
                buffer.copy_(getattr(self._linear[0], name))


def _rows_of(linear: nn.Module, x: Tensor, lo: int, hi: int) -> Tensor:
    """Outputs [lo, hi) of a linear map; attributes of modules are looked up once, which a decoded token would notice."""
    weight, bias = linear.weight, linear.bias
    return F.linear(x, weight[lo:hi], bias if bias is None else bias[lo:hi])


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
        nn.Module.__init__(self)
        self._family = family
        self._adopt(dense)
        self.act_fn = getattr(dense, family.activation)
        self.moe = config
        self.layer = layer
        self.routing = routing
        down = self.down
        self.sizes = config.sizes(down.in_features)
        self.blocks = tuple(zip((0, *self.sizes[:-1]), self.sizes, strict=True))  # neurons [lo, hi) of each block
        self.router = Router(down.out_features, config)
        self.frozen: nn.ModuleDict | None = None
        if config.label_target == "frozen":
            self.frozen = nn.ModuleDict({name: FrozenLinear(linear) for name, linear in self.projections().items()})
        self.trace: RoutingTrace | None = None
        self._residual: Tensor | None = None  # [N, D], between the module whose input it is and the labels
        self._watch: RemovableHandle | None = None
        self._output_norm: tuple[nn.Module | None] = (None,)  # in a tuple, so that it is no child of this module

    def _adopt(self, dense: nn.Module) -> None:
        """Take the projections over from the dense MLP, under their names."""
        for name in self._family.projections:
            setattr(self, name, getattr(dense, name))

    def lay_out(self, *, columns: bool = True) -> None:
        """Order the down projection's memory by columns, or by rows as in files; values and shape stay, training keeps the order.

        By columns a prefix of neurons is one piece of memory, as it is in gate and up: reading it alone costs its share (decoding). Loading
        and converting do it. Sharding (`fully_shard`) and bare `safetensors.save_file` take weights by rows only.
        """
        weight = self.down.weight
        if weight.stride(0 if columns else 1) != 1:
            with torch.inference_mode(False):  # inference tensors could not be trained later
                weight.data = weight.data.t().contiguous().t() if columns else weight.data.contiguous()

    def watch_residual(self, source: nn.Module | None, output_norm: nn.Module | None = None) -> None:
        """Give labels the residual stream r, the input of `source`, and the norm that is between this MLP and the sum; None: no longer."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None if source is None else source.register_forward_pre_hook(self._see_residual)
        self._output_norm = (output_norm,)

    def _see_residual(self, source: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.routing.collect or self._decider()[0] == "label":  # a bound method: a copy of the model has hooks of its own
            self._residual = args[0].detach().reshape(-1, args[0].shape[-1])

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

    def projections(self) -> dict[str, nn.Linear]:
        """The linear maps by the family's names for them, the down projection last."""
        pieces = {self._family.gate: self.gate, self._family.up: self.up, self._family.down: self.down}
        return {name: linear for name, linear in pieces.items() if name is not None}

    def _hidden(self, x: Tensor, lo: int, hi: int, *, frozen: bool = False) -> Tensor:
        """Activations of neurons [lo, hi): [N, D] -> [N, hi - lo]; with `frozen` those of the MLP as it was at conversion."""
        gate, up = self.gate, self.up
        if frozen:
            gate, up = None if gate is None else self.frozen[self._family.gate], self.frozen[self._family.up]
        raised = _rows_of(up, x, lo, hi)
        if gate is None:
            return self.act_fn(raised)
        active = self.act_fn(_rows_of(gate, x, lo, hi))
        return active * raised if torch.is_grad_enabled() else active.mul_(raised)  # a forward's own: saves a tensor of its size

    def _block_products(self, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        """Each block's share of the output, output bias aside: [N, H] -> E x [N, D]."""
        return [F.linear(hidden[:, lo:hi], weight[:, lo:hi]) for lo, hi in self.blocks]

    def expert_params(self) -> list[int]:
        """Parameters of each nested expert, router aside: rows of the input projections, columns of down, down's whole bias."""
        inputs = [linear for linear in (self.gate, self.up) if linear is not None]
        per_neuron = sum(linear.in_features + (linear.bias is not None) for linear in inputs) + self.down.out_features
        shared = 0 if self.down.bias is None else self.down.bias.numel()
        return [size * per_neuron + shared for size in self.sizes]

    def full_params(self) -> int:
        """Parameters that routing "full" uses: the dense MLP's."""
        return self.expert_params()[-1]

    def dense_params(self) -> int:
        """Parameters of the dense MLP that this one came from: all of them are here."""
        return self.full_params()

    def expert_output(self, x: Tensor, expert: int) -> Tensor:
        """Output of one nested expert for every token: [..., D] -> [..., D], work proportional to the prefix."""
        size = self.sizes[expert]
        return F.linear(self._hidden(x, 0, size), self.down.weight[:, :size], self.down.bias)

    # --- routing ----------------------------------------------------------------------------------------------------------------

    def _decider(self) -> tuple[str, int]:
        """Who decides now, and the expert that "full" and "fixed" mean: in training the config's `train_route`, else `set_routing`."""
        route = self.moe.train_route if self.training else self.routing.mode
        if isinstance(route, int):
            return "fixed", route
        return route, self.routing.expert if route == "fixed" else self.moe.num_experts - 1

    def _chosen(self, logits: Tensor | None, labels: Tensor | None, tokens: int, device: torch.device) -> Tensor:
        """The expert of each token, [N] int64, by whoever decides."""
        mode, expert = self._decider()
        if mode == "router":
            return logits.argmax(dim=-1)
        if mode == "label":
            return labels
        if mode == "random":
            return self.routing.draw(self.layer, tokens, device)
        return torch.full((tokens,), expert, dtype=torch.long, device=device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, D]
        mode, expert = self._decider()
        if self.routing.collect or torch.is_grad_enabled() or mode == "label":
            output = self._forward_blocks(x)
        elif mode in ("full", "fixed"):
            output = self.expert_output(x, expert)
        else:
            logits = self.router(x) if mode == "router" else None
            output = self._forward_prefixes(x, self._chosen(logits, None, len(x), x.device))
        return output.view_as(hidden_states)

    def _forward_blocks(self, x: Tensor) -> Tensor:
        logits = self.router(x)  # [N, E]
        hidden = self._hidden(x, 0, self.sizes[-1])  # [N, H]
        weight = self.down.weight.to(hidden.dtype)
        mode, _ = self._decider()
        similarities = labels = None
        with torch.no_grad():
            products = self._block_products(hidden, weight)
            if self.routing.collect or mode == "label":
                similarities = self._similarities(x, products)
                labels = labels_from_similarity(similarities, self.moe.theta)
        experts = self._chosen(logits.detach(), labels, len(x), x.device)
        block_weights = self._block_weights(logits, experts, trained=mode == "router").to(hidden.dtype)
        output = _WeightedBlocks.apply(hidden, weight, block_weights, products, self.blocks)
        if self.down.bias is not None:
            output = output + self.down.bias
        if self.routing.collect:
            self.trace = RoutingTrace(logits, experts, labels, similarities)
        return output

    def _similarities(self, x: Tensor, products: list[Tensor]) -> Tensor:
        """Similarity of every expert's output to the full one, [N, E], from the weights that the labels are defined by."""
        down = self.down
        if self.frozen is not None:
            down = self.frozen[self._family.down]
            hidden = self._hidden(x, 0, self.sizes[-1], frozen=True)
            products = self._block_products(hidden, down.weight.to(hidden.dtype))
        residual, self._residual = self._residual, None
        return nested_similarity(products, down.bias, label=self.moe.label, residual=residual, output_norm=self._output_norm[0])

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

    # --- inference --------------------------------------------------------------------------------------------------------------

    def sort_tokens(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor | None, list[int]]:
        """Rows of x [N, D] with the largest experts first, their places [N] in x, and the number of tokens of each expert.

        Rows and places are x and None if all tokens share one expert, as a single token always does.
        """
        if len(x) == 1:  # decoding: as little as possible around the products
            chosen = int(experts)
            return x, None, [int(expert == chosen) for expert in range(self.moe.num_experts)]
        counts = torch.bincount(experts, minlength=self.moe.num_experts).tolist()
        if max(counts) == len(x):
            return x, None, counts
        order = experts.argsort(descending=True, stable=True)
        return x.index_select(0, order), order, counts

    def restore_order(self, output: Tensor, order: Tensor) -> Tensor:
        """Sorted rows [N, D] back in the order of the tokens; gathering by the inverse is faster than scattering."""
        places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return output.index_select(0, places)

    def _forward_prefixes(self, x: Tensor, experts: Tensor) -> Tensor:
        rows, order, counts = self.sort_tokens(x, experts)
        output, lo, remaining = None, 0, len(rows)
        for size, count in zip(self.sizes, counts, strict=True):
            if not count:  # its block concerns the same rows as the next one: one product for both
                continue
            hidden, weight = self._hidden(rows[:remaining], lo, size), self.down.weight[:, lo:size]
            if output is None:  # every token has the first block, and with it the bias
                output = F.linear(hidden, weight, self.down.bias)
            elif output.dtype == hidden.dtype == weight.dtype:
                output[:remaining].addmm_(hidden, weight.t())
            else:  # autocast, which casts what F.linear multiplies
                output[:remaining] += F.linear(hidden, weight)
            lo, remaining = size, remaining - count
        if output is None:  # no token at all
            return self.expert_output(x, 0)
        return output if order is None else self.restore_order(output, order)
