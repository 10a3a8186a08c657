"""Configurations of ToMoE models (arXiv 2501.15316): the method's settings, and two config classes per model family.

A *masked* model (`tomoe_masked_<family>`) is the frozen dense model with the parts that learn which of it is needed: it is trained. A
*deployed* one (`tomoe_<family>`) is what is left of it: experts that run on their own neurons, sliced queries and keys. Both carry the
method's settings as the plain dict `moe`; a deployed model's has its shapes beside them.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from .converted_config import converted_configs
from .families import FAMILIES

__all__ = ["DEPLOYED_CONFIGS", "MASKED_CONFIGS", "ToMoEConfig"]

Attention = Literal["hybrid", "none", "dynamic"]


@dataclass
class ToMoEConfig:
    """How experts are sought inside a frozen dense model.

    Example:
        >>> lab.ToMoEConfig(p=0.7).num_experts
        8
        >>> lab.ToMoEConfig(p=70)
        Traceback (most recent call last):
            ...
        ValueError: tomoe.p = 70: a share of the weights, give a number above 0, at most 1 (the paper: 0.4 to 0.6)
    """

    num_experts: int = 8
    p: float = 0.5  # target ratio of attention and MLP weights that are active (the paper: 0.4 to 0.6)
    attention: Attention = "hybrid"  # hybrid: Q and K per layer, V and O per token; dynamic: all four per token; none: left whole
    router_temperature: float = 0.4  # of the Gumbel-softmax over experts; robust from 0.3 to 0.5
    mask_temperature: float = 0.4  # of the Gumbel-sigmoid over neurons
    mask_offset: float = 3.0  # added to mask logits, so that training starts with nearly everything open
    lambda_kl: float = 2.0  # weights of the four losses
    lambda_ratio: float = 16.0  # R_P: active ratio against p
    lambda_union: float = 3.0  # R_U, the paper's beta: every neuron in some expert; 3 in its code, it asks about 0 and 2
    lambda_balance: float = 1.0  # R_L: experts used alike
    embedding_size: int = 128  # of expert embeddings; half of it per direction of the GRU
    noise_size: int = 32  # of z, the hypernetwork's fixed input
    train_z: bool = False  # the paper calls z fixed; the released loop in effect trains it
    seed: int = 0  # of z, of fresh weights, and of the noise in training

    method: ClassVar[str] = "tomoe"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"tomoe.{field.name} = {value!r}: give a whole number")
            if kind is float and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
                raise ValueError(f"tomoe.{field.name} = {value!r}: give a finite number")
        if self.num_experts < 1:
            raise ValueError(f"tomoe.num_experts = {self.num_experts}: give a whole number of at least 1 (the paper: 8)")
        if not 0 < self.p <= 1:
            raise ValueError(f"tomoe.p = {self.p}: a share of the weights, give a number above 0, at most 1 (the paper: 0.4 to 0.6)")
        if self.attention not in get_args(Attention):
            raise ValueError(f"tomoe.attention = {self.attention!r}: choose one of {', '.join(get_args(Attention))}")
        for name in ("router_temperature", "mask_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"tomoe.{name} = {getattr(self, name)}: give a number above 0 (the paper: 0.4)")
        for name in ("lambda_kl", "lambda_ratio", "lambda_union", "lambda_balance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"tomoe.{name} = {getattr(self, name)}: a loss weight, give a number of at least 0")
        if self.embedding_size < 2 or self.embedding_size % 2:
            raise ValueError(f"tomoe.embedding_size = {self.embedding_size}: both directions of a GRU share it, give an even number")
        if self.noise_size < 1:
            raise ValueError(f"tomoe.noise_size = {self.noise_size}: give a whole number of at least 1")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold; `from_dict` reads it back."""
        return {**asdict(self), "method": self.method}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ToMoEConfig":
        """The config from the `moe` dict of a checkpoint; entries that are not fields (shapes, where it came from) are left aside."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


# OPT is not among them: its layers hold the projections of the MLP themselves.
_FAMILIES = [name for name, family in FAMILIES.items() if family.mlp is not None]

MASKED_CONFIGS = converted_configs(ToMoEConfig, "ToMoEMasked", "tomoe_masked_", _FAMILIES)
DEPLOYED_CONFIGS = converted_configs(ToMoEConfig, "ToMoE", "tomoe_", _FAMILIES)
for _config in (*MASKED_CONFIGS.values(), *DEPLOYED_CONFIGS.values()):  # where transformers looks for them
    globals()[_config.__name__] = _config
    __all__.append(_config.__name__)
