"""The README.md inside a checkpoint: what it is, where it came from, what it saves and what not, how to load it; from its config alone."""

import json
from typing import Any

from .families import family_of

__all__ = ["deployed_card", "dynamoe_card", "masked_card"]

# How a card of ours begins, so that it can be told from one that a person wrote.
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, dynamoe, {tag}]
---
# {name}

"""

_TAIL = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)  # or, with dynamoe-lab: import dynamoe_lab.models
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)  # it reads the config, too
model.set_routing("router")  # or {routings}
```

The resolved configuration (`moe` in config.json{left_out}):

```json
{resolved}
```
"""


def _card(body: str, name: str, moe: dict[str, Any], *, tag: str, routings: str, left_out: str = "", **facts: Any) -> str:
    """A whole card; `facts` fill the places of `body`, `moe` is shown at its end."""
    resolved, base = json.dumps(moe, indent=2, sort_keys=True), moe.get("base") or "an unnamed dense model"
    every = {"name": name, "tag": tag, "base": base, "routings": routings, "left_out": left_out, "resolved": resolved}
    return (_HEAD + body + _TAIL).format(**every, **facts)


# --- DynaMoE ------------------------------------------------------------------------------------------------------------------------

_DYNAMOE = """\
A dense language model turned into a token-difficulty-driven mixture of nested experts (DynaMoE, arXiv 2502.12325): in every layer the MLP's
neurons are ordered by importance, expert *e* is a prefix of them, and a router picks one prefix per token. The weights are those of
`{base}`, reordered, plus {extra}; without those the file loads as the plain dense family.

| | |
|---|---|
| experts, share of the MLP | {experts} |
| labels: similarity to the full output, and its threshold theta | `{label}`, {theta} |
| importance that ordered the neurons | `{importance}` over {calibration_tokens} calibration tokens |
| trained | {trained} |
"""


def dynamoe_card(name: str, config: Any) -> str:
    """Markdown text for a DynaMoE model's `README.md`."""
    moe = dict(config.moe)
    trained_tokens = moe.get("trained_tokens", 0)
    return _card(
        _DYNAMOE,
        name,
        moe,
        tag="nested-experts",
        routings='"full" (the dense function), "label", an expert\'s index, "random"',
        extra="`router.*`" if moe.get("label_target", "current") == "current" else "`router.*` and `frozen.*`, which the labels come from",
        experts=", ".join(f"{fraction:.4g}" for fraction in moe["experts"]),
        label=moe.get("label", "cosine"),
        theta=moe["theta"],
        importance=moe["importance"],
        calibration_tokens=moe.get("calibration_tokens", "?"),
        trained=f"MLPs and routers on {trained_tokens:,} tokens" if trained_tokens else "no: converted only, its routers are fresh",
    )


# --- ToMoE, masked and deployed -----------------------------------------------------------------------------------------------------

_MASKED = """\
A dense language model in which a mixture of experts is being found by differentiable structural pruning (ToMoE, arXiv 2501.15316): this is
the form that is trained. The weights are those of `{base}`, frozen; beside them stand a hypernetwork and, in every layer, routers and
decoders that say which neurons and head dimensions a token needs ({extra}). Everything is computed in full and multiplied by 0 or 1, so
this form saves nothing; `lab.export(model)` of dynamoe-lab gives the one that does.

| | |
|---|---|
| experts | {experts}, one per token and layer |
| target ratio of active attention and MLP weights | {p} |
| attention | {attention} |
| loss | {kl} KL(dense, this) + {ratio} ratio + {union} union + {balance} balance |
| masks trained | {trained} |
"""
_ATTENTION = {
    "hybrid": "queries and keys pruned per layer, values and output projection per token",
    "dynamic": "pruned per token",
    "none": "whole",
}

_DEPLOYED = """\
A mixture of experts found inside a dense language model by differentiable structural pruning (ToMoE, arXiv 2501.15316): in every layer a
router picks one of {experts} experts per token, and an expert is a part of the MLP's neurons. The weights are those of `{base}`, never
trained themselves; what no expert uses is gone.

| | |
|---|---|
| experts | {experts}, one per token and layer |
| target ratio of active attention and MLP weights | {p} |
| neurons that are left | {union} |
| queries and keys | {pairs} |
| values and output projection | {values} |
| memory | the first forward copies every expert's weights into one piece each, besides the ones below; `model.train()` drops the copies |
| changed weights | are seen, but after writing to `weight.data` call `model.lay_out()` |
| masks trained | {trained} |
"""
_PAIRS = {
    "hybrid": "{kept} of {all} rotary pairs per layer on average, the others cut out: saves weights, time and cache",
    "dynamic": "masked per token, computed in full: fewer active parameters, no time saved",
    "none": "whole",
}


def _masks_trained(moe: dict[str, Any]) -> str:
    tokens = moe.get("trained_tokens", 0)
    return f"on {tokens:,} tokens" if tokens else "no: converted only, nearly everything is open"


def masked_card(name: str, config: Any) -> str:
    """Markdown text for a masked ToMoE model's `README.md`."""
    moe = dict(config.moe)
    return _card(
        _MASKED,
        name,
        moe,
        tag="tomoe",
        routings='"full" (the dense function), an expert\'s index, "random"',
        extra="`hypernetwork.*`, `*.router.*`, `*.norm.*`, `*.decoder.*`",
        experts=moe["num_experts"],
        p=moe["p"],
        attention=_ATTENTION[moe["attention"]],
        kl=moe["lambda_kl"],
        ratio=moe["lambda_ratio"],
        union=moe["lambda_union"],
        balance=moe["lambda_balance"],
        trained=_masks_trained(moe),
    )


def deployed_card(name: str, config: Any) -> str:
    """Markdown text for a deployed ToMoE model's `README.md`."""
    moe = dict(config.moe)
    neurons = getattr(config, family_of(config.model_type).intermediate_size)
    unions, pairs = moe["union_sizes"], moe.pop("qk_pairs", None) or [[]]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _card(
        _DEPLOYED,
        name,
        moe,
        tag="tomoe",
        routings='"full" (all that is left, no masks), an expert\'s index, "random"',
        left_out=", its longest list left out",
        experts=moe["num_experts"],
        p=moe["p"],
        union=f"{sum(unions) / len(unions):.0f} of {neurons} per layer on average",
        pairs=_PAIRS[moe["attention"]].format(kept=f"{sum(map(len, pairs)) / len(pairs):.1f}", all=width // 2),
        values="whole" if moe["attention"] == "none" else _PAIRS["dynamic"],
        trained=_masks_trained(moe),
    )
