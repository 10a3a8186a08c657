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
        "ablation_table",
        "accuracy_rows",
        "active_fraction",
        "attention_open",
        "benchmark_deltas",
        "benchmark_points",
        "benchmark_table",
        "collapsed_layers",
        "difficulty_bins",
        "difficulty_by_domain",
        "difficulty_by_token",
        "difficulty_correlations",
        "error_distance",
        "expert_choice",
        "expert_usage",
        "importance_curves",
        "label_shares",
        "labels_at",
        "latency_ratios",
        "latency_table",
        "mask_jaccard",
        "mask_union",
        "paper_table",
        "pareto_front",
        "pareto_points",
        "pareto_row",
        "perplexity_ratio",
        "pool_layers",
        "relative_table",
        "routed_losses",
        "router_chance",
        "router_confusion",
        "smooth_steps",
        "specialisation",
        "stack_runs",
        "split_note",
        "static_comparison",
        "told_apart",
        "usage_information",
        "usage_summary",
    ),
    "plots": (
        "plot_ablation",
        "plot_benchmark_deltas",
        "plot_benchmarks",
        "plot_collapse",
        "plot_collapse_entropy",
        "plot_collapse_training",
        "plot_cost_growth",
        "plot_difficulty_by_domain",
        "plot_difficulty_vs_surprisal",
        "plot_error_distance",
        "plot_expert_similarity",
        "plot_expert_usage",
        "plot_expert_usage_by_domain",
        "plot_importance_curves",
        "plot_label_share",
        "plot_latency",
        "plot_mask_stability",
        "plot_pareto",
        "plot_realised_vs_ideal",
        "plot_relative_to_base",
        "plot_router_confusion",
        "plot_router_confusion_by_layer",
        "plot_specialisation",
        "plot_time_parts",
        "plot_tomoe_training",
        "plot_tomoe_union",
        "plot_tomoe_usage",
        "plot_training_curves",
    ),
    "style": ("domain_colors", "expert_colors", "method_color", "style_context"),
    "findings": (
        "ablation_finding",
        "active_params_finding",
        "benchmark_finding",
        "collapse_finding",
        "collapse_verdict",
        "conversion_finding",
        "cost_growth_finding",
        "difficulty_domain_finding",
        "difficulty_finding",
        "domain_finding",
        "label_share_finding",
        "latency_finding",
        "mask_stability_finding",
        "neighbour_finding",
        "pareto_finding",
        "perplexity_finding",
        "pruned_params_finding",
        "router_finding",
        "specialisation_finding",
        "static_finding",
        "time_parts_finding",
        "tomoe_training_finding",
        "training_finding",
        "union_finding",
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
