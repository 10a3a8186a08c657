"""Frame in, picture out. Every plot draws one message, computed from its frame, into its title.

The frame comes first, everything else by keyword. A plot of one panel takes `ax` and returns the Axes; a plot
of several takes `figure` (a Figure or SubFigure) and returns it; without them a new figure as wide as a page
is made. Nothing is shown or saved here: hand the result to `run.figure`, or save it inside
`style.style_context()`. Experts are called by their share of the MLP when `fractions` is given.
"""

from dynamoe_lab.analysis.plots.ablation import plot_ablation
from dynamoe_lab.analysis.plots.benchmarks import plot_benchmark_deltas, plot_benchmarks, plot_relative_to_base
from dynamoe_lab.analysis.plots.collapse import plot_collapse, plot_collapse_entropy, plot_collapse_training
from dynamoe_lab.analysis.plots.conversion import plot_expert_similarity, plot_importance_curves
from dynamoe_lab.analysis.plots.difficulty import plot_difficulty_by_domain, plot_difficulty_vs_surprisal, plot_label_share
from dynamoe_lab.analysis.plots.latency import plot_latency, plot_realised_vs_ideal
from dynamoe_lab.analysis.plots.pareto import plot_pareto
from dynamoe_lab.analysis.plots.router import (
    plot_error_distance,
    plot_router_confusion,
    plot_router_confusion_by_layer,
)
from dynamoe_lab.analysis.plots.specialisation import plot_specialisation
from dynamoe_lab.analysis.plots.time_costs import plot_cost_growth, plot_time_parts
from dynamoe_lab.analysis.plots.tomoe import plot_mask_stability, plot_tomoe_training, plot_tomoe_union, plot_tomoe_usage
from dynamoe_lab.analysis.plots.training import plot_training_curves
from dynamoe_lab.analysis.plots.usage import plot_expert_usage, plot_expert_usage_by_domain

__all__ = [
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
]
