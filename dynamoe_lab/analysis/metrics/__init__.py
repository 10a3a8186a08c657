"""Frame in, frame out: what the routers did, against what chance would have done, and how the work is shared.

The input of most functions is the frame `routing` (run, domain, document, position, token_id, layer, label,
expert, probability, surprisal): one row per token and layer; label and expert count from 0. Everything is
counted once per document, layer, label and expert; the numbers and their document bootstrap are computed from
those counts, so that 500 K rows take about a second.

A router's accuracy and its share of neighbouring errors mean nothing alone (claims of arXiv 2502.12325): `router_chance` sets
beside them the commonest label of each layer, independence of expert and label, and a router that sees only the token's id.
"""

from dynamoe_lab.analysis.metrics.ablation import ablation_table
from dynamoe_lab.analysis.metrics.benchmark_pairs import benchmark_deltas, told_apart
from dynamoe_lab.analysis.metrics.benchmarks import (
    benchmark_points,
    benchmark_table,
    paper_table,
    relative_table,
    split_note,
)
from dynamoe_lab.analysis.metrics.collapse import collapsed_layers, stack_runs, usage_information
from dynamoe_lab.analysis.metrics.curves import importance_curves, smooth_steps
from dynamoe_lab.analysis.metrics.difficulty import difficulty_bins, difficulty_by_domain, difficulty_by_token, difficulty_correlations
from dynamoe_lab.analysis.metrics.labels import label_shares, labels_at
from dynamoe_lab.analysis.metrics.latency import latency_ratios, latency_table
from dynamoe_lab.analysis.metrics.masks import attention_open, mask_jaccard, mask_union
from dynamoe_lab.analysis.metrics.pareto import accuracy_rows, pareto_front, pareto_points, pareto_row, static_comparison
from dynamoe_lab.analysis.metrics.perplexity import perplexity_ratio, routed_losses
from dynamoe_lab.analysis.metrics.router import error_distance, pool_layers, router_chance, router_confusion
from dynamoe_lab.analysis.metrics.specialisation import expert_choice, specialisation
from dynamoe_lab.analysis.metrics.usage import active_fraction, expert_usage, usage_summary

__all__ = [
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
    "split_note",
    "stack_runs",
    "static_comparison",
    "told_apart",
    "usage_information",
    "usage_summary",
]
