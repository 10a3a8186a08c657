"""`convert`: one door for all methods; the config says which, see `CONVERTERS`."""

from collections.abc import Callable
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from dynamoe_lab.conversion.dynamoe import convert_dynamoe
from dynamoe_lab.conversion.tomoe import convert_tomoe
from dynamoe_lab.data import Blocks
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import DynaMoEConfig, ToMoEConfig

__all__ = ["CONVERTERS", "convert"]

# A method's config -> its conversion: (dense, config, *, calibration=None, statistics=None) -> model
CONVERTERS: dict[type, Callable[..., PreTrainedModel]] = {DynaMoEConfig: convert_dynamoe, ToMoEConfig: convert_tomoe}


def convert(
    dense: PreTrainedModel,
    config: Any = None,
    *,
    calibration: Blocks | Tensor | None = None,
    statistics: pd.DataFrame | None = None,
) -> PreTrainedModel:
    """Convert a dense causal language model; returns a new model in eval mode, the dense one stays as it is.

    DynaMoE (arXiv 2502.12325): neurons are sorted by importance, prefixes become experts, each layer gets a router. ToMoE (arXiv
    2501.15316): hypernetwork, routers and mask decoders are put beside weights that stay as they are.

    Args:
        dense: a model of a family in `dynamoe_lab.models.FAMILIES`.
        config: the method and its settings: `DynaMoEConfig` or `ToMoEConfig` (its trainable form); None: `DynaMoEConfig()`.
        calibration: blocks [n, T] for the calibration pass (the paper: 0.004 % of the training tokens), or
        statistics: the frame of `calibrate` on this model, so that several settings share one pass. ToMoE needs neither.

    Raises:
        InputError: not a transformers model, an unsupported family, a model that is converted already, sizes that collapse, no
            calibration; ToMoE: attention pruning of a family whose heads cannot be pruned.

    Example:
        >>> dense, _ = lab.random_pair(64, 128)  # hidden and MLP size
        >>> ids = torch.arange(64).view(2, 32)
        >>> model = lab.convert(dense, lab.DynaMoEConfig(theta=0.8), calibration=ids)
        >>> model.routed_mlps()[0].sizes  # neurons of each expert
        (32, 64, 96, 128)
        >>> model.set_routing("full")  # every token at full width: still the dense function
        >>> bool(lab.logit_change(model, dense, ids)["max_abs"][0] < 1e-3)
        True
    """
    config = DynaMoEConfig() if config is None else config
    for kind, converter in CONVERTERS.items():
        if isinstance(config, kind):
            return converter(dense, config, calibration=calibration, statistics=statistics)
    known = " or a ".join(kind.__name__ for kind in CONVERTERS)
    raise InputError(f"convert: {type(config).__name__} is not a method's config; give a {known}")
