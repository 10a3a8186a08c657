"""What the routers did: one row per token and layer; and, of nested experts, how close each prefix comes to the full output.

Difficulty labels, where a method has them, need the full MLP beside the chosen expert; the output stays the chosen expert's.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamoe_lab.data import Blocks, require_blocks
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.perplexity import in_eval_mode, token_surprisal
from dynamoe_lab.models import RoutedMixin

__all__ = ["evaluating", "expert_similarity", "logit_change", "trace_routing", "trace_text"]


@contextmanager
def evaluating(model: PreTrainedModel, name: str, mode: str | int | None = None, *, labels: bool = False) -> Iterator[None]:
    """A converted model in eval mode, under routing `mode` if one is given; afterwards as it was found, also the draws of "random".

    Raises InputError, in the name of the function `name`, if the model has no routers, or no difficulty labels where `labels` are needed.
    """
    if not isinstance(model, RoutedMixin):
        raise InputError(f"{name}: {type(model).__name__} has no routers; convert it first with lab.convert")
    if labels and (reason := model.routing_modes.get("label", f"{model.method} has no difficulty labels")) is not None:
        raise InputError(f"{name}: {reason}")
    kept = dataclasses.replace(model.routing)
    draws = [generator.get_state() for generator in kept.generators or ()]
    with in_eval_mode(model):
        try:
            if mode is not None:
                model.set_routing(mode)
            yield
        finally:
            for item in dataclasses.fields(kept):
                setattr(model.routing, item.name, getattr(kept, item.name))
            for generator, state in zip(kept.generators or (), draws, strict=True):
                generator.set_state(state)


def token_columns(batch: Blocks, logits: Tensor) -> dict[str, np.ndarray]:
    """What every trace says of a token, [B * T] each: domain, document, position, token_id, surprisal."""
    context = batch.ids.shape[1]
    return {
        "domain": np.repeat(np.asarray(batch.domain, dtype=object), context),
        "document": batch.document.flatten().numpy().astype(np.int32),
        "position": np.tile(np.arange(context, dtype=np.int32), len(batch)),
        "token_id": batch.ids.flatten().numpy().astype(np.int32),
        "surprisal": token_surprisal(logits, batch.ids.to(logits.device)).flatten().float().cpu().numpy(),
    }


@torch.no_grad()
def trace_routing(model: PreTrainedModel, blocks: Blocks | Tensor, *, batch_size: int = 8, run: str = "") -> pd.DataFrame:
    """Run blocks [n, T] through a converted model under its current routing, which is left as it was (also the draws of "random").

    Args:
        model, blocks: what is traced; a tensor's rows are documents of domain "text".
        batch_size: blocks of a forward.
        run: names the trace.

    Returns:
        Table `routing`, one row per token and layer: run, domain, document, position (in the block), token_id, layer, label (smallest
        expert within theta; DynaMoE alone), expert (used), probability (the router's, of the expert used), open_values (ToMoE alone: share
        of the dimensions of values and outputs of attention that are open for the token), surprisal (-ln p of the token itself, nats;
        NaN at position 0).

    Raises:
        InputError: the model is not converted, there are no blocks, or its routing uses no expert (ToMoE under "full").

    Example:
        >>> _, model = lab.random_pair(64, 128, layers=2)
        >>> model.set_routing(1)
        >>> routing = lab.trace_routing(model, torch.arange(4).view(1, 4))
        >>> routing[["position", "token_id", "layer", "expert"]].tail(3)
           position  token_id  layer  expert
        5         1         1      1       1
        6         2         2      1       1
        7         3         3      1       1
    """
    blocks = require_blocks(blocks, "trace_routing", model=model, batch_size=batch_size)
    categories = sorted(set(blocks.domain))
    parts = []
    with evaluating(model, "trace_routing"):
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size]
            output = model(input_ids=batch.ids.to(model.device), output_router_logits=True, use_cache=False)
            layers, tokens = len(output.experts), batch.ids.numel()
            experts = torch.stack(output.experts)  # [L, N]
            if bool((experts < 0).any()):
                raise InputError(
                    f"trace_routing: routing {model.routing.mode!r} of {type(model).__name__} uses no expert; "
                    'choose another with model.set_routing, e.g. "router"'
                )
            probabilities = torch.stack([logits.float().softmax(-1) for logits in output.router_logits])  # [L, N, E]
            frame = pd.DataFrame({name: np.tile(values, layers) for name, values in token_columns(batch, output.logits).items()})
            frame["domain"] = pd.Categorical(frame["domain"], categories=categories)
            frame["layer"] = np.repeat(np.arange(layers, dtype=np.int16), tokens)
            own = {name: getattr(output, name, None) for name in ("labels", "open_values")}  # what only some methods have
            if own["labels"] is not None:
                frame["label"] = torch.stack(own["labels"]).flatten().cpu().numpy().astype(np.int8)
            if own["open_values"] is not None:
                frame["open_values"] = torch.stack(own["open_values"]).flatten().float().cpu().numpy()
            frame["expert"] = experts.flatten().cpu().numpy().astype(np.int16)
            frame["probability"] = probabilities.gather(2, experts[..., None]).flatten().cpu().numpy()
            parts.append(frame)
    routing = pd.concat(parts, ignore_index=True)
    routing.insert(0, "run", pd.Categorical([run] * len(routing), categories=[run]))
    token, choice = ["run", "domain", "document", "position", "token_id", "layer"], ["label", "expert", "probability", "open_values"]
    return routing[[*token, *(name for name in choice if name in routing), "surprisal"]]


def trace_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int = 2_048, run: str = ""
) -> pd.DataFrame:
    """`trace_routing` of one text of your own, with a column `token`: the piece of the text each token stands for.

    Args:
        model, tokenizer: of one vocabulary; the routing of the model is left as it was.
        run: names the trace.

    Raises:
        InputError: the text is empty or longer than `max_tokens` tokens; as `trace_routing`.

    Example:
        >>> dense, tokenizer = lab.load_model("smollm2-pico")
        >>> model = lab.convert(dense, calibration=torch.arange(64).view(1, 64))
        >>> routing = lab.trace_text(model, tokenizer, "Hello there")
        >>> routing.loc[routing["layer"] == 0, "token"].tolist()
        ['Hello', ' there']
    """
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = encoded["input_ids"]
    if not ids:
        raise InputError("trace_text: the text is empty; write a sentence")
    if len(ids) > max_tokens:
        raise InputError(f"trace_text: the text has {len(ids)} tokens, more than max_tokens = {max_tokens}; shorten it")
    routing = trace_routing(model, torch.tensor([ids]), run=run)
    pieces, told = [], 0  # a character of several bytes may be several tokens with one span: it is shown with the first
    for start, end in encoded["offset_mapping"]:
        pieces.append(text[max(start, told) : end])
        told = max(told, end)
    routing.insert(4, "token", np.asarray(pieces, dtype=object)[routing["position"]])
    return routing


@torch.no_grad()
def expert_similarity(model: PreTrainedModel, blocks: Blocks | Tensor, *, batch_size: int = 8, run: str = "") -> pd.DataFrame:
    """Similarity, as the model's label defines it (the paper: cosine), of every nested expert's output to the full output, by layer.

    Inputs are blocks [n, T] as routing "full" (the dense function) meets them. `batch_size`: blocks of a forward; `run`: names the rows.

    Returns:
        run, layer, expert, fraction (of the MLP), mean, q10, q50, q90, n (tokens but position 0), sink_mean (position 0 alone, which is an
        attention sink in many models).

    Raises:
        InputError: the model is not converted, its experts are not nested (ToMoE), or there are no blocks.

    Example:
        >>> _, model = lab.random_pair(64, 128, experts=(0.5, 1.0), layers=1)
        >>> similarity = lab.expert_similarity(model, torch.arange(16).view(2, 8))
        >>> similarity[["layer", "expert", "fraction", "n"]]
           layer  expert  fraction   n
        0      0       0       0.5  14
        1      0       1       1.0  14
        >>> round(float(similarity["mean"].iloc[-1]), 3)  # the last is the whole MLP
        1.0
    """
    blocks = require_blocks(blocks, "expert_similarity", model=model, batch_size=batch_size, context=2)
    with evaluating(model, "expert_similarity", "full", labels=True):
        collected: list[list[Tensor]] = [[] for _ in model.routed_mlps()]
        for start in range(0, len(blocks), batch_size):
            ids = blocks.ids[start : start + batch_size].to(model.device)
            output = model(input_ids=ids, output_router_logits=True, use_cache=False, logits_to_keep=1)
            for layer, similarities in enumerate(output.similarities):
                collected[layer].append(similarities.view(*ids.shape, -1).cpu())
    rows = []
    for layer, parts in enumerate(collected):
        values = torch.cat(parts)  # [n, T, E]
        usual = values[:, 1:].flatten(0, 1).double().numpy()
        q10, q50, q90 = np.quantile(usual, (0.1, 0.5, 0.9), axis=0)
        for expert, size in enumerate(model.routed_mlps()[layer].sizes):
            rows.append(
                {
                    "run": run,
                    "layer": layer,
                    "expert": expert,
                    "fraction": size / model.routed_mlps()[layer].sizes[-1],
                    "mean": usual[:, expert].mean(),
                    "q10": q10[expert],
                    "q50": q50[expert],
                    "q90": q90[expert],
                    "n": len(usual),
                    "sink_mean": float(values[:, 0, expert].mean()),
                }
            )
    return pd.DataFrame(rows)


@torch.no_grad()
def logit_change(model: PreTrainedModel, reference: PreTrainedModel, blocks: Blocks | Tensor, *, batch_size: int = 4) -> pd.DataFrame:
    """How far a model's logits are from a reference's on the same blocks [n, T], each model under its current routing.

    `batch_size`: blocks of a forward.

    Returns:
        One row: tokens, max_abs, mean_abs (of |model - reference|), logit_scale (standard deviation of the reference's
        logits), agreement (share of tokens with the same most likely next token).

    Raises:
        InputError: no blocks.

    Example:
        >>> dense, model = lab.random_pair(64, 128)
        >>> model.set_routing("full")  # reordered, but the same function
        >>> change = lab.logit_change(model, dense, torch.arange(16).view(2, 8))
        >>> change[["tokens", "agreement"]]
           tokens  agreement
        0      16        1.0
        >>> bool(change["max_abs"][0] < 1e-3)
        True
    """
    blocks = require_blocks(blocks, "logit_change", model=model, batch_size=batch_size)
    largest, total, squares, sums, agree, tokens, entries = 0.0, 0.0, 0.0, 0.0, 0, 0, 0
    with in_eval_mode(model), in_eval_mode(reference):
        for start in range(0, len(blocks), batch_size):
            ids = blocks.ids[start : start + batch_size]
            ours = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
            theirs = reference(input_ids=ids.to(reference.device), use_cache=False).logits.float().cpu()
            difference = (ours - theirs).abs()
            largest = max(largest, float(difference.max()))
            total += float(difference.double().sum())
            squares += float(theirs.double().square().sum())
            sums += float(theirs.double().sum())
            agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            tokens += ids.numel()
            entries += difference.numel()
    scale = max(0.0, squares / entries - (sums / entries) ** 2) ** 0.5  # rounding may leave a constant's variance below 0
    row = {"tokens": tokens, "max_abs": largest, "mean_abs": total / entries, "logit_scale": scale}
    return pd.DataFrame([{**row, "agreement": agree / tokens}])
