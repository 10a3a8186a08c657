"""dynamoe-lab: how much compute can a language model save on easy tokens?

`import dynamoe_lab as lab` is light; a name brings its room (and torch, if that needs it) with its first use.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it.
_ROOMS = {
    "dynamoe_lab.analysis": (
        "active_fraction",
        "active_params_finding",
        "conversion_finding",
        "domain_finding",
        "error_distance",
        "expert_usage",
        "importance_curves",
        "neighbour_finding",
        "perplexity_finding",
        "plot_error_distance",
        "plot_expert_similarity",
        "plot_expert_usage",
        "plot_expert_usage_by_domain",
        "plot_importance_curves",
        "plot_router_confusion",
        "plot_router_confusion_by_layer",
        "plot_training_curves",
        "pool_layers",
        "router_chance",
        "router_confusion",
        "router_finding",
        "training_finding",
        "usage_finding",
    ),
    "dynamoe_lab.analysis.tokens": ("render_tokens",),
    "dynamoe_lab.loading": ("load_model", "load_tokenizer"),
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
        "trace_text",
    ),
    "dynamoe_lab.models": ("DynaMoEConfig",),
    "dynamoe_lab.training": ("TrainingDiverged", "train"),
    "dynamoe_lab.workbench.explore": ("continue_text", "explorer"),
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
