"""The README.md inside a converted checkpoint: what it is, where it came from, how to load it; made from its config alone."""

import json
from typing import Any

__all__ = ["masked_card", "model_card"]

# How a card of ours begins, so that it can be told from one that a person wrote.
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, dynamoe, {tag}]
---
"""

_CARD = """# {name}

A dense language model turned into a token-difficulty-driven mixture of nested experts (DynaMoE, arXiv 2502.12325): in every layer the MLP's
neurons are ordered by importance, expert *e* is a prefix of them, and a router picks one prefix per token. The weights are those of
`{base}`, reordered, plus {extra}; without those the file loads as the plain dense family.

| | |
|---|---|
| experts, share of the MLP | {experts} |
| labels: similarity to the full output, and its threshold theta | `{label}`, {theta} |
| importance that ordered the neurons | `{importance}` over {calibration_tokens} calibration tokens |
| trained | {trained} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)  # or, with dynamoe-lab: import dynamoe_lab.models
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)  # it reads the config, too
model.set_routing("router")  # or "full" (the dense function), "label", an expert's index, "random"
```

The resolved configuration (`moe` in config.json):

```json
{resolved}
```
"""


def model_card(name: str, config: Any) -> str:
    """Markdown text for a converted model's `README.md`."""
    moe = dict(config.moe)
    trained_tokens = moe.get("trained_tokens", 0)
    return (_HEAD + _CARD).format(
        tag="nested-experts",
        name=name,
        base=moe.get("base") or "an unnamed dense model",
        extra="`router.*`" if moe.get("label_target", "current") == "current" else "`router.*` and `frozen.*`, which the labels come from",
        experts=", ".join(f"{fraction:.4g}" for fraction in moe["experts"]),
        label=moe.get("label", "cosine"),
        theta=moe["theta"],
        importance=moe["importance"],
        calibration_tokens=moe.get("calibration_tokens", "?"),
        trained=f"MLPs and routers on {trained_tokens:,} tokens" if trained_tokens else "no: converted only, its routers are fresh",
        resolved=json.dumps(moe, indent=2, sort_keys=True),
    )


_MASKED = """# {name}

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

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)  # or, with dynamoe-lab: import dynamoe_lab.models
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)  # it reads the config, too
model.set_routing("router")  # or "full" (the dense function), an expert's index, "random"
```

The resolved configuration (`moe` in config.json):

```json
{resolved}
```
"""

_ATTENTION = {
    "hybrid": "queries and keys pruned per layer, values and output projection per token",
    "dynamic": "pruned per token",
    "none": "whole",
}


def masked_card(name: str, config: Any) -> str:
    """Markdown text for a masked ToMoE model's `README.md`."""
    moe = dict(config.moe)
    trained_tokens = moe.get("trained_tokens", 0)
    return (_HEAD + _MASKED).format(
        tag="tomoe",
        name=name,
        base=moe.get("base") or "an unnamed dense model",
        extra="`hypernetwork.*`, `*.router.*`, `*.norm.*`, `*.decoder.*`",
        experts=moe["num_experts"],
        p=moe["p"],
        attention=_ATTENTION[moe["attention"]],
        kl=moe["lambda_kl"],
        ratio=moe["lambda_ratio"],
        union=moe["lambda_union"],
        balance=moe["lambda_balance"],
        trained=f"on {trained_tokens:,} tokens" if trained_tokens else "no: converted only, nearly everything is open",
        resolved=json.dumps(moe, indent=2, sort_keys=True),
    )
