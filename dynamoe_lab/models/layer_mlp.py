"""Nested experts where a decoder layer has no MLP module: it holds the projections itself and calls them in turn (OPT).

The layer and its forward stay the family's. Its up projection hands the input on, its activation does nothing, and its down projection
computes the nested experts from the weights of both; so residual sums, norms, dropout and shapes are the family's own, and all weights keep
their names. The router is `fc2.router`.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from .configuration_dynamoe import DynaMoEConfig
from .families import Family
from .nested_mlp import NestedMLP
from .routed import Routing

__all__ = ["LayerNestedMLP", "PassedOn", "nest_experts"]


class PassedOn(nn.Linear):
    """A linear map that keeps its weights and name in the layer and hands its input on: `LayerNestedMLP` multiplies the weights."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class LayerNestedMLP(NestedMLP, nn.Linear):
    """The layer's down projection that has become its whole MLP; `up` stays a child of the layer, but belongs to this MLP's parameters."""

    def __init__(self, layer_module: nn.Module, family: Family, config: DynaMoEConfig, layer: int, routing: Routing):
        if family.gate is not None:
            raise ValueError(f"{family.causal_lm.__name__}: a layer that holds its own projections has to have a plain MLP, without a gate")
        super().__init__(layer_module, family, config, layer, routing)

    def _adopt(self, dense: nn.Module) -> None:
        down = getattr(dense, self._family.down)
        self.in_features, self.out_features = down.in_features, down.out_features
        self.weight, self.bias = down.weight, down.bias
        self._up = (getattr(dense, self._family.up),)  # in a tuple, so that it is no child of this module

    @property
    def up(self) -> nn.Linear:
        """The up projection, [H, D]."""
        return self._up[0]

    @property
    def down(self) -> nn.Linear:
        """The down projection, [D, H]: this module itself."""
        return self

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the whole MLP, those of `up` under the name they have in the layer."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if recurse:
            above = prefix.rpartition(".")[0]
            yield from self.up.named_parameters(f"{above}.{self._family.up}" if above else self._family.up)


def nest_experts(layer_module: nn.Module, family: Family, config: DynaMoEConfig, layer: int, routing: Routing) -> None:
    """Turn the MLP of one decoder layer into nested experts, in place."""
    if family.mlp is not None:
        setattr(layer_module, family.mlp, NestedMLP(getattr(layer_module, family.mlp), family, config, layer, routing))
        return
    setattr(layer_module, family.up, PassedOn(getattr(layer_module, family.up)))
    setattr(layer_module, family.down, LayerNestedMLP(layer_module, family, config, layer, routing))
    setattr(layer_module, family.activation, nn.Identity())  # the nested MLP holds the real one by now
