"""dynamoe-lab: how much compute can a language model save on easy tokens?

`import dynamoe_lab as lab` is light; a name brings its room (and torch, if that needs it) with its first use.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it.
_ROOMS = {
    "dynamoe_lab.analysis": (
        "ablation_finding",
        "ablation_table",
        "accuracy_rows",
        "active_fraction",
        "active_params_finding",
        "benchmark_deltas",
        "benchmark_finding",
        "benchmark_points",
        "benchmark_table",
        "collapse_finding",
        "collapse_verdict",
        "collapsed_layers",
        "conversion_finding",
        "cost_growth_finding",
        "difficulty_bins",
        "difficulty_by_domain",
        "difficulty_by_token",
        "difficulty_correlations",
        "difficulty_domain_finding",
        "difficulty_finding",
        "domain_finding",
        "error_distance",
        "expert_usage",
        "importance_curves",
        "label_share_finding",
        "label_shares",
        "labels_at",
        "latency_finding",
        "latency_ratios",
        "latency_table",
        "neighbour_finding",
        "paper_table",
        "pareto_finding",
        "pareto_front",
        "pareto_points",
        "pareto_row",
        "perplexity_finding",
        "perplexity_ratio",
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
        "plot_pareto",
        "plot_realised_vs_ideal",
        "plot_relative_to_base",
        "plot_router_confusion",
        "plot_router_confusion_by_layer",
        "plot_time_parts",
        "plot_training_curves",
        "pool_layers",
        "relative_table",
        "routed_losses",
        "router_chance",
        "router_confusion",
        "router_finding",
        "split_note",
        "stack_runs",
        "static_comparison",
        "static_finding",
        "time_parts_finding",
        "training_finding",
        "usage_finding",
        "usage_information",
    ),
    "dynamoe_lab.analysis.tokens": ("render_tokens",),
    "dynamoe_lab.loading": ("load_model", "load_tokenizer"),
    "dynamoe_lab.config": ("Experiment", "TrainConfig", "load_experiment"),
    "dynamoe_lab.conversion": ("calibrate", "convert", "importance_table"),
    "dynamoe_lab.data": ("Blocks", "load_blocks", "token_counts"),
    "dynamoe_lab.errors": ("InputError",),
    "dynamoe_lab.evaluation": (
        "TASKS",
        "count_active_params",
        "document_losses",
        "evaluate_benchmarks",
        "evaluate_perplexity",
        "evaluate_task",
        "expert_similarity",
        "export_tasks",
        "ideal_share",
        "load_tasks",
        "logit_change",
        "measure_energy",
        "measure_latency",
        "mixed_shares",
        "model_cost",
        "random_pair",
        "time_parts",
        "trace_routing",
        "trace_similarity",
        "trace_text",
    ),
    "dynamoe_lab.models": ("DynaMoEConfig",),
    "dynamoe_lab.training": ("TrainingDiverged", "train"),
    "dynamoe_lab.workbench.allocator": ("keep_freed_memory",),
    "dynamoe_lab.workbench.cell_scores": ("score_cells",),
    "dynamoe_lab.workbench.cells": ("Cell", "run_cell", "static_cut", "time_cells"),
    "dynamoe_lab.workbench.explore": ("continue_text", "explorer"),
    "dynamoe_lab.workbench.session": ("Run", "start"),
    "dynamoe_lab.workbench.sweep": ("Sweep", "SweepFailed", "SweepResult", "load_sweep", "run_sweep"),
    "dynamoe_lab.workbench.sweep_table": ("read_sweep",),
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
