"""Held-out perplexity, and its ratio to the dense model paired on the same documents (see `analysis.metrics.perplexity` for the why)."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from dynamoe_lab.analysis import perplexity_ratio
from dynamoe_lab.data import Blocks, require_blocks

__all__ = ["document_losses", "evaluate_perplexity", "in_eval_mode", "token_surprisal"]


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """A model without dropout; afterwards, also after an error, in the mode that it was found in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def token_surprisal(logits: Tensor, ids: Tensor) -> Tensor:
    """-ln p(token | the tokens before it in its block), in nats: logits [B, T, V], ids [B, T] -> [B, T] with NaN at position 0."""
    rows = zip(logits, ids, strict=True)  # one by one: a flat copy of all but the last logits would double their memory
    losses = torch.stack([F.cross_entropy(row[:-1].float(), target[1:], reduction="none") for row, target in rows])
    return torch.cat([losses.new_full((len(ids), 1), float("nan")), losses], dim=1)


@torch.no_grad()
def document_losses(model: PreTrainedModel, blocks: Blocks | Tensor, *, batch_size: int = 8) -> pd.DataFrame:
    """Summed next-token loss of every document in blocks [n, T]: columns document, domain, nll (nats), tokens (predicted ones).

    Args:
        model: dense or converted, under its current routing; left as it was found.
        batch_size: blocks of a forward.

    Raises:
        InputError: no blocks.

    Example:
        >>> dense, _ = lab.random_pair(64, 128)
        >>> lab.document_losses(dense, torch.arange(16).view(2, 8))[["document", "domain", "tokens"]]  # the first of 8 is not predicted
           document domain  tokens
        0         0   text       7
        1         1   text       7
    """
    blocks = require_blocks(blocks, "document_losses", model=model, batch_size=batch_size, context=2)
    # One array from the start: small results kept between forwards would lie where the next logits have to go, and memory would grow.
    losses = np.empty((len(blocks), blocks.ids.shape[1] - 1))
    with in_eval_mode(model):
        for start in range(0, len(blocks), batch_size):
            ids = blocks.ids[start : start + batch_size].to(model.device)
            surprisal = token_surprisal(model(input_ids=ids, use_cache=False).logits, ids)
            losses[start : start + batch_size] = surprisal[:, 1:].double().cpu().numpy()
    domains = np.repeat(np.asarray(blocks.domain, dtype=object), losses.shape[1])
    columns = {"document": blocks.document[:, 1:].flatten().numpy(), "domain": domains, "nll": losses.ravel(), "tokens": 1}
    return pd.DataFrame(columns).groupby(["document", "domain"], as_index=False)[["nll", "tokens"]].sum()


def evaluate_perplexity(
    model: PreTrainedModel,
    blocks: Blocks | Tensor,
    *,
    reference: PreTrainedModel | pd.DataFrame | None = None,
    batch_size: int = 8,
    bootstrap: int = 2_000,
    confidence: float = 0.95,
    seed: int = 0,
    run: str = "",
) -> pd.DataFrame:
    """Perplexity of a model under its current routing.

    Args:
        model: dense or converted.
        blocks: held-out blocks [n, T].
        reference: a model (usually the dense parent) or its `document_losses` on the same blocks, for the paired ratio.
        batch_size: blocks of a forward.
        bootstrap, confidence, seed: resamples of documents and level of the interval.
        run: name of the row.

    Returns:
        One row: run, n (documents resampled for the interval), tokens, perplexity, reference_perplexity, ratio, low, high (of the
        ratio). Without a reference low and high are those of the perplexity itself (reference_perplexity and ratio NaN).

    Raises:
        InputError: no blocks, or the reference was measured on other documents.

    Example:
        >>> dense, model = lab.random_pair(64, 128)
        >>> model.set_routing("full")  # the dense function
        >>> lab.evaluate_perplexity(model, torch.arange(32).view(4, 8), reference=dense)[["n", "tokens", "ratio", "low", "high"]].round(3)
           n  tokens  ratio  low  high
        0  4      28    1.0  1.0   1.0
    """
    base = document_losses(reference, blocks, batch_size=batch_size) if isinstance(reference, PreTrainedModel) else reference
    losses = document_losses(model, blocks, batch_size=batch_size)
    return perplexity_ratio(losses, base, bootstrap=bootstrap, confidence=confidence, seed=seed, run=run)
