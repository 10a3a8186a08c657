"""The README.md inside a deployed ToMoE checkpoint: what it is, what it saves and what not, how to load it; made from its config alone."""

import json
from typing import Any

from .families import family_of

__all__ = ["deployed_card"]

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, dynamoe, tomoe]
---
# {name}

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

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)  # or, with dynamoe-lab: import dynamoe_lab.models
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)  # it reads the config, too
model.set_routing("router")  # or "full" (all that is left, no masks), an expert's index, "random"
```

The resolved configuration (`moe` in config.json, its longest list left out):

```json
{resolved}
```
"""

_PAIRS = {
    "hybrid": "{kept} of {all} rotary pairs per layer on average, the others cut out: saves weights, time and cache",
    "dynamic": "masked per token, computed in full: fewer active parameters, no time saved",
    "none": "whole",
}
_VALUES = "masked per token, computed in full: fewer active parameters, no time saved"


def deployed_card(name: str, config: Any) -> str:
    """Markdown text for a deployed model's `README.md`."""
    moe = dict(config.moe)
    neurons = getattr(config, family_of(config.model_type).intermediate_size)
    unions, pairs = moe["union_sizes"], moe.pop("qk_pairs", None) or [[]]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    trained_tokens = moe.get("trained_tokens", 0)
    return _CARD.format(
        name=name,
        base=moe.get("base") or "an unnamed dense model",
        experts=moe["num_experts"],
        p=moe["p"],
        union=f"{sum(unions) / len(unions):.0f} of {neurons} per layer on average",
        pairs=_PAIRS[moe["attention"]].format(kept=f"{sum(map(len, pairs)) / len(pairs):.1f}", all=width // 2),
        values="whole" if moe["attention"] == "none" else _VALUES,
        trained=f"on {trained_tokens:,} tokens" if trained_tokens else "no: converted only, nearly everything is open",
        resolved=json.dumps(moe, indent=2, sort_keys=True),
    )
