"""Configurations of converted models: what the method needs to know, and one config class per model family.

`DynaMoEConfig` holds the decisions of the method (arXiv 2502.12325; open ones are marked [D] in their comments). It travels inside
`config.json` as the plain dict `moe` of `DynaMoE<Family>Config`, which is otherwise the family's own config.
"""

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from transformers import (
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

try:  # transformers 5 makes config classes strict dataclasses; a subclass that adds a field has to say so too
    from huggingface_hub.dataclasses import strict
except ImportError:  # pragma: no cover - older hubs
    strict = None

__all__ = [
    "CONFIG_CLASSES",
    "DynaMoEConfig",
    "DynaMoEGPTNeoXConfig",
    "DynaMoEGemma3TextConfig",
    "DynaMoELlamaConfig",
    "DynaMoEMistralConfig",
    "DynaMoEOPTConfig",
    "DynaMoEPhiConfig",
    "DynaMoEQwen2Config",
    "DynaMoEQwen3Config",
]

Importance = Literal["l2_down", "l2_down_tokennorm", "l2", "abs", "random"]
RouterGradient = Literal["straight_through", "probability", "none"]
LabelTarget = Literal["current", "frozen"]


@dataclass
class DynaMoEConfig:
    """How a dense model becomes a mixture of nested experts, and how its routers are supervised. [D] marks what the paper leaves open.

    Example:
        >>> lab.DynaMoEConfig(experts=(0.5, 1.0)).sizes(1536)
        (768, 1536)
        >>> lab.DynaMoEConfig(theta=90)
        Traceback (most recent call last):
            ...
        ValueError: dynamoe.theta = 90: a cosine similarity, give a number from -1 to 1 (the paper: 0.7 to 0.9)
    """

    experts: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # share of the intermediate size of each prefix; increasing, last 1.0
    theta: float = 0.9  # a token's label is the smallest expert whose output has at least this cosine to the full output
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

    def __post_init__(self) -> None:
        self.experts = tuple(float(fraction) for fraction in self.experts)
        if not self.experts or self.experts[-1] != 1.0:
            raise ValueError(f"dynamoe.experts = {list(self.experts)}: the last expert is the whole MLP, end the list with 1.0")
        if self.experts[0] <= 0 or any(a >= b for a, b in pairwise(self.experts)):
            raise ValueError(f"dynamoe.experts = {list(self.experts)}: give strictly increasing fractions above 0, e.g. [0.25,0.5,1.0]")
        if not -1.0 <= self.theta <= 1.0:
            raise ValueError(f"dynamoe.theta = {self.theta}: a cosine similarity, give a number from -1 to 1 (the paper: 0.7 to 0.9)")
        if self.router_hidden_size < 1:
            raise ValueError(f"dynamoe.router_hidden_size = {self.router_hidden_size}: give a whole number of at least 1")
        for name in ("lambda_lm", "lambda_router"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"dynamoe.{name} = {getattr(self, name)}: a loss weight, give a number of at least 0")
        choices = {
            "label_target": ("current", "frozen"),
            "importance": ("l2_down", "l2_down_tokennorm", "l2", "abs", "random"),
            "router_gradient": ("straight_through", "probability", "none"),
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
        return {**asdict(self), "method": "dynamoe", "experts": list(self.experts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DynaMoEConfig":
        """The config from the `moe` dict of a checkpoint; entries that are not fields (where it came from) are left aside."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def _moe_config(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The family's config class with one more field, `moe`."""
    family = base.__name__.removesuffix("Config")
    namespace = {
        "__doc__": f"`{base.__name__}` plus `moe`, the plain dict of a `DynaMoEConfig` with where the model came from.",
        "__module__": __name__,
        "__annotations__": {"moe": dict | None},
        "model_type": f"dynamoe_{base.model_type}",
        "moe": None,
    }
    cls = type(f"DynaMoE{family}Config", (base,), namespace)
    return strict(cls) if strict is not None else cls


DynaMoELlamaConfig = _moe_config(LlamaConfig)
DynaMoEMistralConfig = _moe_config(MistralConfig)
DynaMoEQwen2Config = _moe_config(Qwen2Config)
DynaMoEQwen3Config = _moe_config(Qwen3Config)
DynaMoEGemma3TextConfig = _moe_config(Gemma3TextConfig)
DynaMoEGPTNeoXConfig = _moe_config(GPTNeoXConfig)
DynaMoEPhiConfig = _moe_config(PhiConfig)
DynaMoEOPTConfig = _moe_config(OPTConfig)

CONFIG_CLASSES = {
    config.model_type.removeprefix("dynamoe_"): config
    for config in (
        DynaMoELlamaConfig,
        DynaMoEMistralConfig,
        DynaMoEQwen2Config,
        DynaMoEQwen3Config,
        DynaMoEGemma3TextConfig,
        DynaMoEGPTNeoXConfig,
        DynaMoEPhiConfig,
        DynaMoEOPTConfig,
    )
}
