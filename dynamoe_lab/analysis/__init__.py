"""From frames to numbers, pictures and sentences: pandas, numpy, scipy, matplotlib and seaborn; never torch.

`metrics` turns the frames of an evaluation into frames of results, `statistics` puts intervals on them,
`plots` draws them, `findings` says them in one sentence each. Every name below is importable from here; a
module is loaded when one of its names is first used, so that counting a confusion matrix does not import
matplotlib.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "statistics": ("Interval", "bootstrap_sums", "paired_difference", "ratio_of_sums"),
    "metrics": (
        "active_fraction",
        "error_distance",
        "expert_usage",
        "importance_curves",
        "pool_layers",
        "router_chance",
        "router_confusion",
        "smooth_steps",
        "usage_summary",
    ),
    "plots": (
        "plot_error_distance",
        "plot_expert_similarity",
        "plot_expert_usage",
        "plot_expert_usage_by_domain",
        "plot_importance_curves",
        "plot_router_confusion",
        "plot_router_confusion_by_layer",
        "plot_training_curves",
    ),
    "style": ("domain_colors", "expert_colors", "method_color", "style_context"),
    "findings": (
        "active_params_finding",
        "conversion_finding",
        "domain_finding",
        "neighbour_finding",
        "perplexity_finding",
        "router_finding",
        "training_finding",
        "usage_finding",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
