"""dynamoe-lab: how much compute can a language model save on easy tokens?

`import dynamoe_lab as lab` is light; a name brings its room (and torch, if that needs it) with its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it.
_ROOMS = {
    "dynamoe_lab.assets": ("load_model", "load_tokenizer"),
    "dynamoe_lab.config": ("Experiment", "TrainConfig", "load_experiment"),
    "dynamoe_lab.conversion": ("calibrate", "convert", "importance_table"),
    "dynamoe_lab.data": ("Blocks", "load_blocks"),
    "dynamoe_lab.errors": ("InputError",),
    "dynamoe_lab.evaluation": (
        "count_active_params",
        "document_losses",
        "evaluate_perplexity",
        "expert_similarity",
        "logit_change",
        "trace_routing",
    ),
    "dynamoe_lab.models": ("DynaMoEConfig",),
    "dynamoe_lab.training": ("TrainingDiverged", "train"),
    "dynamoe_lab.workbench.session": ("Run", "start"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    pass
