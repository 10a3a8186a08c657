"""Frame in, one plain sentence out: what a notebook found, with its n and interval, and whether it is above chance.

Every number is computed from the frame that is passed; nothing is remembered. A comparison is called "above" or
"below" only when the interval of the *difference* excludes zero, else "not distinguishable from". Report a sentence
with `run.finding(sentence, source=stem)`.
"""

from dynamoe_lab.analysis.findings.ablation import ablation_finding
from dynamoe_lab.analysis.findings.benchmarks import benchmark_finding
from dynamoe_lab.analysis.findings.collapse import collapse_finding, collapse_verdict
from dynamoe_lab.analysis.findings.difficulty import difficulty_domain_finding, difficulty_finding, label_share_finding
from dynamoe_lab.analysis.findings.latency import cost_growth_finding, latency_finding, time_parts_finding
from dynamoe_lab.analysis.findings.model import active_params_finding, conversion_finding, perplexity_finding, training_finding
from dynamoe_lab.analysis.findings.pareto import pareto_finding, static_finding
from dynamoe_lab.analysis.findings.router import neighbour_finding, router_finding
from dynamoe_lab.analysis.findings.tomoe import (
    mask_stability_finding,
    pruned_params_finding,
    specialisation_finding,
    tomoe_training_finding,
    union_finding,
)
from dynamoe_lab.analysis.findings.usage import domain_finding, usage_finding

__all__ = [
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
]
