"""What the parts of one decoder layer cost: its MLP, dense or with experts of any method, its router, its attention. See `cost_model`."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedConfig

from dynamoe_lab.models import MaskedAttention, MaskedMLP, NestedMLP

__all__ = ["Cost", "attention_cost", "expert_neurons", "linear_maps", "mask_parts", "routed_mlp_cost", "token_mask_params", "weights"]


@dataclass(frozen=True)
class Cost:
    """What one part of the model costs; the columns of the table."""

    params: int = 0
    active_params: float = 0.0
    flops: float = 0.0  # per token
    bytes: float = 0.0  # per token

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, item.name) + getattr(other, item.name) for item in dataclasses.fields(self)))

    def held(self) -> "Cost":
        """The same weights where they are not used."""
        return Cost(self.params)


def weights(parameters: Iterable[nn.Parameter], sharing: int) -> Cost:
    """Weights that every forward reads, whose arithmetic is free; `sharing` tokens share a forward."""
    held = list(parameters)
    params = sum(parameter.numel() for parameter in held)
    return Cost(params, params, 0.0, sum(parameter.numel() * parameter.element_size() for parameter in held) / sharing)


def linear_maps(modules: Iterable[nn.Module], sharing: int) -> Cost:
    """All weights in the modules, of which every linear map multiplies every token."""
    modules = list(modules)
    maps = [module.weight.numel() for outer in modules for module in outer.modules() if isinstance(module, nn.Linear)]
    return weights((parameter for module in modules for parameter in module.parameters()), sharing) + Cost(flops=2.0 * sum(maps))


# --- MLPs ----------------------------------------------------------------------------------------------------------------------------


def expert_neurons(mlp: nn.Module) -> list[int]:
    """How many neurons each expert of a layer has."""
    if hasattr(mlp, "sizes"):
        return list(mlp.sizes)
    return (mlp.open_neurons() if isinstance(mlp, MaskedMLP) else mlp.membership).sum(dim=1).tolist()


def routed_mlp_cost(mlp: nn.Module, shares: list[float] | None, sharing: int) -> tuple[Cost, Cost]:
    """MLP and router of a layer whose experts take these shares of the tokens; None: under "full"."""
    mode = mlp.routing.mode
    router = linear_maps([mlp.router], sharing)
    counted, asked = mode not in ("full", "fixed"), mode in ("router", "label")
    if isinstance(mlp, MaskedMLP):  # whose router always runs; what makes its masks runs once for all tokens
        makers = weights((*mlp.norm.parameters(), *mlp.decoder.parameters()), sharing).held()
        return _masked_mlp(mlp, shares, sharing), Cost(router.params, router.params * counted, router.flops, router.bytes) + makers
    router = Cost(router.params, router.params * counted, router.flops * asked, router.bytes * asked)
    return (_nested_mlp if isinstance(mlp, NestedMLP) else _separate_mlp)(mlp, shares, sharing), router


def _nested_mlp(mlp: NestedMLP, shares: list[float] | None, sharing: int) -> Cost:
    """Prefixes share weights: a block of neurons is read if any token's expert reaches it. Labels need every block."""
    mode, whole = mlp.routing.mode, mlp.expert_params()
    shares = [0.0] * (len(whole) - 1) + [1.0] if shares is None else shares
    reach = [sum(shares[block:]) for block in range(len(shares))]  # share of tokens that use each block
    active = sum(share * params for share, params in zip(shares, whole, strict=True))
    copies = 1
    if mode == "label":
        reach, copies = [1.0] * len(reach), 1 if mlp.frozen is None else 2
    neuron = sum(linear.weight.numel() for linear in mlp.projections().values()) / mlp.sizes[-1]  # weights of one neuron, biases aside
    widths = [hi - lo for lo, hi in mlp.blocks]
    blocks = [whole[0], *(larger - smaller for smaller, larger in pairwise(whole))]
    read = sum(params * _met(used, sharing) for params, used in zip(blocks, reach, strict=True))
    multiplied = neuron * sum(width * used for width, used in zip(widths, reach, strict=True))
    return Cost(whole[-1], active, 2 * copies * multiplied, copies * read * mlp.down.weight.element_size() / sharing)


def _masked_mlp(mlp: MaskedMLP, shares: list[float] | None, sharing: int) -> Cost:
    """All neurons are computed, whatever the expert; active are those of the experts."""
    return dataclasses.replace(linear_maps(mlp.projections().values(), sharing), active_params=_mean_params(mlp, shares))


def _separate_mlp(mlp: nn.Module, shares: list[float] | None, sharing: int) -> Cost:
    """Every expert runs on weights of its own, which are read if any token takes it; "full" runs all neurons that are left."""
    *inputs, down = mlp.projections().values()
    whole = linear_maps([*inputs, down], sharing)
    if shares is None:
        return whole
    neuron = down.out_features + sum(linear.in_features for linear in inputs)  # weights of one neuron, biases aside
    multiplied = neuron * sum(share * neurons for share, neurons in zip(shares, expert_neurons(mlp), strict=True))
    read = sum(params * _met(share, sharing) for share, params in zip(shares, mlp.expert_params(), strict=True))
    return Cost(whole.params, _mean_params(mlp, shares), 2 * multiplied, read * down.weight.element_size() / sharing)


def _mean_params(mlp: nn.Module, shares: list[float] | None) -> float:
    if shares is None:
        return mlp.full_params()
    return sum(share * params for share, params in zip(shares, mlp.expert_params(), strict=True))


def _met(share: float, sharing: int) -> float:
    """The probability that any of the tokens of a forward needs what this share of tokens needs."""
    return 1 - (1 - min(share, 1.0)) ** sharing


# --- attention -----------------------------------------------------------------------------------------------------------------------


def mask_parts(attention: nn.Module) -> list[nn.Module]:
    """What decides which dimensions of a head are open: router, norm and decoder of ToMoE's attention; of others nothing."""
    return [getattr(attention, name) for name in ("router", "norm", "decoder")] if hasattr(attention, "router") else []


def _layer_rows(attention: nn.Module) -> int:
    """Rows of the decoder that decide once for a layer, not for every token: those of the rotary pairs in a masked model's "hybrid"."""
    static = isinstance(attention, MaskedAttention) and attention.moe.attention == "hybrid"
    return attention.head_dim // 2 if static else 0


def token_mask_params(attention: nn.Module) -> int:
    """Parameters of what decides, token by token, which dimensions of a head are open."""
    parts = mask_parts(attention)
    held = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return held - (_layer_rows(attention) * attention.decoder.in_features if parts else 0)


def _masking_cost(attention: nn.Module, sharing: int) -> Cost:
    """Weights that decide once for a layer are held, but move with no token."""
    parts = mask_parts(attention)
    if not parts:
        return Cost()
    whole, idle = linear_maps(parts, sharing), _layer_rows(attention) * attention.decoder.in_features
    size = attention.decoder.weight.element_size()
    return whole + Cost(0, -idle, -2.0 * idle, -idle * size / sharing)


def attention_cost(
    attention: nn.Module,
    config: PreTrainedConfig,
    *,
    window: int | None,
    phase: str,
    tokens: int,
    sharing: int,
    itemsize: int,
    masking: bool = True,
) -> Cost:
    """Projections, as they are stored; what masks them token by token, if that is on; scores, values and the cache."""
    parts, masks = mask_parts(attention), _masking_cost(attention, sharing)
    cost = linear_maps([module for module in attention.children() if module not in parts], sharing)
    cost += weights(attention.parameters(recurse=False), sharing) + (masks if masking else masks.held())
    return cost + _cache(attention, config, window, phase, tokens, itemsize)


def _cache(attention: nn.Module, config: PreTrainedConfig, window: int | None, phase: str, tokens: int, itemsize: int) -> Cost:
    """Scores and values of one layer over the causal context, and the cache's entries read (those of earlier forwards) and written."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    value_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_size = attention.k_proj.out_features // kv_heads if hasattr(attention, "k_proj") else value_size  # a pruned head's are fewer
    stored = kv_heads * (key_size + value_size) * itemsize  # a token's key and value
    work = 2.0 * heads * (key_size + value_size)  # of a token with one other
    reach = tokens + 1 if window is None else window
    if phase == "decode":
        context = min(tokens + 1, reach)
        return Cost(flops=work * context, bytes=float(stored * context))  # context - 1 are read, one is written
    short = min(tokens, reach)  # the first `short` tokens see 1, 2, ... tokens, the others all that a window holds
    mean_context = (short * (short + 1) / 2 + (tokens - short) * reach) / tokens
    return Cost(flops=work * mean_context, bytes=float(stored))
