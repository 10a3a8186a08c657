"""Perplexity, routing traces, benchmarks, cost, latency: model -> DataFrame."""

from dynamoe_lab.evaluation.benchmarks import check_tasks, evaluate_benchmarks, evaluate_task
from dynamoe_lab.evaluation.cost import count_active_params
from dynamoe_lab.evaluation.cost_model import ideal_share, model_cost
from dynamoe_lab.evaluation.difficulty import trace_similarity
from dynamoe_lab.evaluation.divergence import document_divergences
from dynamoe_lab.evaluation.energy import measure_energy
from dynamoe_lab.evaluation.latency import measure_latency, random_pair, time_parts
from dynamoe_lab.evaluation.masks import attention_masks, expert_fractions, expert_masks
from dynamoe_lab.evaluation.overrule import mixed_shares
from dynamoe_lab.evaluation.perplexity import document_losses, evaluate_perplexity
from dynamoe_lab.evaluation.routing import expert_similarity, logit_change, trace_routing, trace_text
from dynamoe_lab.evaluation.task_files import export_tasks
from dynamoe_lab.evaluation.tasks import TASKS, load_tasks

__all__ = [
    "TASKS",
    "attention_masks",
    "check_tasks",
    "count_active_params",
    "document_divergences",
    "document_losses",
    "evaluate_benchmarks",
    "evaluate_perplexity",
    "evaluate_task",
    "expert_fractions",
    "expert_masks",
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
]
