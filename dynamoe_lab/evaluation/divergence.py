"""How far a pruned model's predictions are from the dense model's: the measure that ToMoE trains on, document by document."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamoe_lab.data import Blocks, require_blocks
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.perplexity import in_eval_mode
from dynamoe_lab.evaluation.routing import evaluating

__all__ = ["document_divergences"]


@torch.no_grad()
def document_divergences(
    model: PreTrainedModel, blocks: Blocks | Tensor, *, reference: PreTrainedModel | None = None, batch_size: int = 4
) -> pd.DataFrame:
    """KL(dense || model) of the next token, in nats, summed over the positions of every document.

    The last position of a block counts, too, though the token that it predicts is not there: no token is needed. The mean over tokens of a
    masked model is the `kl_loss` of its forward in eval mode.

    Args:
        model: a converted model, under its current routing, which is left as it was.
        blocks: held-out blocks [n, T].
        reference: the dense model; None: a masked ToMoE model with all masks open, which is its dense parent.
        batch_size: blocks of a forward.

    Returns:
        document, domain, kl (nats), tokens.

    Raises:
        InputError: the model is not converted, no reference where the model does not hold its dense parent, or no blocks.

    Example:
        >>> dense, model = lab.random_pair(64, 128)
        >>> model.set_routing("full")  # the dense function
        >>> found = lab.document_divergences(model, torch.arange(16).view(2, 8), reference=dense)
        >>> found.assign(kl=found["kl"].abs().round(3))
           document domain   kl  tokens
        0         0   text  0.0       8
        1         1   text  0.0       8
    """
    blocks = require_blocks(blocks, "document_divergences", model=model, batch_size=batch_size)
    with evaluating(model, "document_divergences"):
        if reference is None and not hasattr(model, "layer_masks"):
            raise InputError(f"document_divergences: {type(model).__name__} does not hold its dense parent; give it as reference=")
        divergences = np.empty(blocks.ids.shape)
        for start in range(0, len(blocks), batch_size):
            ids = blocks.ids[start : start + batch_size]
            teacher = _dense_logits(model, ids) if reference is None else _reference_logits(reference, ids)
            student = model(input_ids=ids.to(model.device), use_cache=False).logits
            for row, (wanted, given) in enumerate(zip(teacher.to(student.device), student, strict=True), start):
                wanted, given = wanted.float().log_softmax(-1), given.float().log_softmax(-1)  # one block at a time: [T, V]
                divergences[row] = (wanted.exp() * (wanted - given)).sum(-1).double().cpu().numpy()
    domains = np.repeat(np.asarray(blocks.domain, dtype=object), blocks.ids.shape[1])
    columns = {"document": blocks.document.flatten().numpy(), "domain": domains, "kl": divergences.ravel(), "tokens": 1}
    return pd.DataFrame(columns).groupby(["document", "domain"], as_index=False)[["kl", "tokens"]].sum()


def _dense_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Those of a masked model with everything open, [B, T, V]."""
    with evaluating(model, "document_divergences", "full"):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def _reference_logits(reference: PreTrainedModel, ids: Tensor) -> Tensor:
    with in_eval_mode(reference):
        return reference(input_ids=ids.to(reference.device), use_cache=False).logits
