"""Perplexity, routing traces, cost: model -> DataFrame."""

from dynamoe_lab.evaluation.cost import count_active_params, expert_params
from dynamoe_lab.evaluation.difficulty import trace_similarity
from dynamoe_lab.evaluation.perplexity import document_losses, evaluate_perplexity
from dynamoe_lab.evaluation.routing import expert_similarity, logit_change, trace_routing, trace_text

__all__ = [
    "count_active_params",
    "document_losses",
    "evaluate_perplexity",
    "expert_params",
    "expert_similarity",
    "logit_change",
    "trace_routing",
    "trace_similarity",
    "trace_text",
]
