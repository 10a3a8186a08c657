"""How difficult each token is in each layer, before any threshold: the similarity of every nested expert's output to the full output.

A label at any θ is read off these similarities (arXiv 2502.12325: the smallest expert within θ), so one forward pass serves all θ.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamoe_lab.data import Blocks, require_blocks
from dynamoe_lab.evaluation.routing import evaluating, token_columns

__all__ = ["trace_similarity"]


@torch.no_grad()
def trace_similarity(model: PreTrainedModel, blocks: Blocks | Tensor, *, batch_size: int = 8, run: str = "") -> pd.DataFrame:
    """Run blocks [n, T] through a converted model with every token at full width (the dense function, while nothing is trained).

    What labels are read off (arXiv 2502.12325: the smallest expert within θ). `batch_size`: blocks of a forward; `run`: names the trace.

    Returns:
        Table `similarity`, one row per token and layer: run, domain, document, position (in the block), token_id, layer, surprisal (-ln p
        of the token itself, nats; NaN at position 0), next_surprisal (of the token that follows; NaN at the last position), similarity_0 to
        similarity_{E-2} (of that expert's output to the full output, as the model's label defines it; the last expert's is 1).

    Raises:
        InputError: the model is not converted, its experts are not nested (ToMoE), or there are no blocks.

    Example:
        >>> _, model = lab.random_pair(64, 128, layers=2)
        >>> similarity = lab.trace_similarity(model, torch.arange(8).view(1, 8))
        >>> len(similarity), [name for name in similarity if name.startswith("similarity")]  # 8 tokens, 2 layers
        (16, ['similarity_0', 'similarity_1', 'similarity_2'])
    """
    blocks = require_blocks(blocks, "trace_similarity", model=model, batch_size=batch_size)
    categories = sorted(set(blocks.domain))
    parts = []
    with evaluating(model, "trace_similarity", "full", labels=True):
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size]
            output = model(input_ids=batch.ids.to(model.device), output_router_logits=True, use_cache=False)
            similarities = torch.stack(output.similarities).float().cpu().numpy()  # [L, N, E]
            layers, tokens, experts = similarities.shape
            columns = token_columns(batch, output.logits)
            surprisal = columns["surprisal"].reshape(batch.ids.shape)
            columns["next_surprisal"] = np.concatenate([surprisal[:, 1:], np.full_like(surprisal[:, :1], np.nan)], axis=1).ravel()
            frame = pd.DataFrame({name: np.tile(values, layers) for name, values in columns.items()})
            frame["domain"] = pd.Categorical(frame["domain"], categories=categories)
            frame["layer"] = np.repeat(np.arange(layers, dtype=np.int16), tokens)
            for expert in range(experts - 1):
                frame[f"similarity_{expert}"] = similarities[..., expert].ravel()
            parts.append(frame)
    similarity = pd.concat(parts, ignore_index=True)
    similarity.insert(0, "run", pd.Categorical([run] * len(similarity), categories=[run]))
    names = ["run", "domain", "document", "position", "token_id", "layer", "surprisal", "next_surprisal"]
    return similarity[[*names, *(name for name in similarity.columns if name.startswith("similarity_"))]]
