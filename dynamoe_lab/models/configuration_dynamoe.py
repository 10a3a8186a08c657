"""Configurations of DynaMoE models: what the method needs to know, and one config class per model family.

`DynaMoEConfig` holds the decisions of the method (arXiv 2502.12325; open ones are marked [D] in their comments). It travels inside
`config.json` as the plain dict `moe` of `DynaMoE<Family>Config`, which is otherwise the family's own config.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal, get_args

from .converted_config import converted_configs
from .labels import LABELS

__all__ = ["CONFIG_CLASSES", "DynaMoEConfig"]

Importance = Literal["l2_down", "l2_down_tokennorm", "l2", "abs", "random"]
RouterGradient = Literal["straight_through", "probability", "none"]
LabelTarget = Literal["current", "frozen"]
# Of a field that came later: while it has its default it is left out of `config.json` and of the keys of steps, so that models, checkpoints
# and results from before it stay what they were.
LATER = {"later": True}


@dataclass
class DynaMoEConfig:
    """How a dense model becomes a mixture of nested experts, and how its routers are supervised. [D] marks what the paper leaves open.

    Example:
        >>> lab.DynaMoEConfig(experts=(0.5, 1.0)).sizes(1536)
        (768, 1536)
        >>> lab.DynaMoEConfig(theta=90)
        Traceback (most recent call last):
            ...
        ValueError: dynamoe.theta = 90: a similarity, give a number from -1 to 1 (the paper: 0.7 to 0.9)
    """

    experts: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # share of the intermediate size of each prefix; increasing, last 1.0
    theta: float = 0.9  # a token's label is the smallest expert whose output has at least this similarity to the full output
    label_target: LabelTarget = "current"  # [D] whose outputs are compared: the MLP as it is now, or a frozen copy from conversion
    importance: Importance = "l2_down"  # [D] order of the neurons: sqrt(sum h_j^2) * ||W_down[:, j]||
    importance_seed: int = 0  # for importance "random", the control
    router_hidden_size: int = 256  # D -> 256 -> E, no bias, SiLU between [D]
    router_init_std: float = 0.02  # [D] standard deviation of the routers' fresh weights
    router_seed: int = 0  # fresh routers are drawn from a generator of their own, so that a conversion can be repeated
    lambda_lm: float = 0.2  # the paper's weights of the two losses
    lambda_router: float = 1.0
    train_route: str | int = "router"  # [D] whose choice makes the output in training: router, label, full, or an expert's index
    router_gradient: RouterGradient = "straight_through"  # [D] how the LM loss reaches the router
    label: str = field(default="cosine", metadata=LATER)  # which similarity, a name in `labels.LABELS`: cosine is the paper's

    def __post_init__(self) -> None:
        given = self.experts
        if not isinstance(given, (list, tuple)) or not all(isinstance(x, Real) and math.isfinite(x) for x in given):
            raise ValueError(f"dynamoe.experts = {given!r}: give a list of fractions, e.g. [0.25,0.5,1.0]")
        self.experts = tuple(float(fraction) for fraction in given)
        for each in fields(self):
            value, kind = getattr(self, each.name), type(each.default)
            if kind is int and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ValueError(f"dynamoe.{each.name} = {value!r}: give a whole number")
            if kind is float and (isinstance(value, bool) or not isinstance(value, Real)):
                raise ValueError(f"dynamoe.{each.name} = {value!r}: give a number")
        if not self.experts or self.experts[-1] != 1.0:
            raise ValueError(f"dynamoe.experts = {list(self.experts)}: the last expert is the whole MLP, end the list with 1.0")
        if self.experts[0] <= 0 or any(a >= b for a, b in pairwise(self.experts)):
            raise ValueError(f"dynamoe.experts = {list(self.experts)}: give strictly increasing fractions above 0, e.g. [0.25,0.5,1.0]")
        if not -1.0 <= self.theta <= 1.0:
            raise ValueError(f"dynamoe.theta = {self.theta}: a similarity, give a number from -1 to 1 (the paper: 0.7 to 0.9)")
        if self.router_hidden_size < 1:
            raise ValueError(f"dynamoe.router_hidden_size = {self.router_hidden_size}: give a whole number of at least 1")
        for name, what in (("lambda_lm", "a loss weight"), ("lambda_router", "a loss weight"), ("router_init_std", "a deviation")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"dynamoe.{name} = {getattr(self, name)}: {what}, give a finite number of at least 0")
        choices = {
            "label_target": get_args(LabelTarget),
            "importance": get_args(Importance),
            "router_gradient": get_args(RouterGradient),
            "label": tuple(LABELS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"dynamoe.{name} = {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        route = self.train_route  # isinstance would take true for the index 1
        if not (type(route) is int and 0 <= route < len(self.experts)) and route not in ("router", "label", "full"):
            last = len(self.experts) - 1
            raise ValueError(f"dynamoe.train_route = {route!r}: choose router, label, full, or an expert's index from 0 to {last}")

    @property
    def num_experts(self) -> int:
        """Number of nested experts E."""
        return len(self.experts)

    def sizes(self, intermediate_size: int) -> tuple[int, ...]:
        """Widths of the prefixes, `round(fraction * H)`, one per expert, in neurons.

        Raises ValueError if rounding leaves an expert empty or makes two experts the same size.
        """
        sizes = tuple(round(fraction * intermediate_size) for fraction in self.experts)
        if sizes[0] < 1 or len(set(sizes)) < len(sizes):
            raise ValueError(
                f"dynamoe.experts = {list(self.experts)} gives sizes {list(sizes)} on intermediate size {intermediate_size}: "
                "use fewer experts or fractions that lie further apart"
            )
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold; `from_dict` reads it back."""
        later = {item.name for item in fields(self) if item.metadata.get("later") and getattr(self, item.name) == item.default}
        values = {name: value for name, value in asdict(self).items() if name not in later}
        return {**values, "method": "dynamoe", "experts": list(self.experts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DynaMoEConfig":
        """The config from the `moe` dict of a checkpoint; entries that are not fields (where it came from) are left aside."""
        names = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


CONFIG_CLASSES = converted_configs(DynaMoEConfig, "DynaMoE", "dynamoe_")
globals().update({cls.__name__: cls for cls in CONFIG_CLASSES.values()})  # where transformers looks for them: DynaMoELlamaConfig, ...
__all__ += [cls.__name__ for cls in CONFIG_CLASSES.values()]
