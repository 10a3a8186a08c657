"""How long a forward takes, dense and converted (by any method) side by side.

A machine is never as fast twice, so times are compared within rounds: in each round the dense model and every routing run once, in an order
that rotates, and ratios are formed round by round (`analysis.metrics.latency`). What is timed is the product's own path.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dynamoe_lab.conversion import convert
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.cost import count_active_params
from dynamoe_lab.evaluation.cost_model import ideal_share, model_cost
from dynamoe_lab.evaluation.overrule import RoutingSpec, check_routing, forced_routing, routing_name
from dynamoe_lab.evaluation.perplexity import in_eval_mode
from dynamoe_lab.evaluation.routing import evaluating
from dynamoe_lab.evaluation.stopwatch import Stopwatch, Work, step_ids
from dynamoe_lab.models import DynaMoEConfig, RoutedMixin, decoder_layers, dense_type_of, family_of

__all__ = ["measure_latency", "random_pair", "time_parts"]

# What a config says of shapes that no method changes; MLPs are compared by their parameters.
_SHAPES = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


def measure_latency(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    *,
    phase: str = "prefill",
    batch: int = 1,
    tokens: int = 1024,
    routings: Sequence[RoutingSpec] = ("router",),
    pairs: int = 5,
    steps: int = 8,
    ids: Tensor | None = None,
    seed: int = 0,
    run: str = "",
) -> pd.DataFrame:
    """Time a dense model and its converted form, alternating; both are left as they were found.

    Args:
        dense, model: of one family and size, on one device, in one dtype; a ToMoE model in its deployed form.
        phase: "prefill": `batch` sequences of `tokens` tokens into an empty cache; "decode": `steps` steps that add one token to each of
            `batch` sequences, after `tokens` cached ones (the converted model's cache is filled under the first of `routings`).
        routings: "router"; "label" (DynaMoE; computes the full MLP); "full"; an expert e, as `set_routing(e)`, which asks no router; or a
            tuple of E shares: the routers run but are overruled, every token draws its expert (see `mixed_shares`).
        pairs: rounds; one more before them warms up and is not counted.
        ids: token ids [>= batch, >= tokens], `Blocks`, or one text [>= batch * tokens]; None: random ones. Only "router" and "label"
            depend on them.
        seed: of random ids and of the draws, which are the same in every round.

    Returns:
        Table `latency`, one row per round and routing, "dense" among them: run, phase, routing (as given; an expert: "expert 1"; shares:
        "one expert" or "mixed"), batch, tokens, threads, device, dtype, pair (the round), seconds (of one prefill, or of one decode step,
        mean over `steps`), mlp_seconds (of all MLPs within it, routers and sorting included), active_mlp_fraction (of the experts these
        tokens took), ideal_share (work of these experts and of the routers that ran, in dense MLPs).

    Raises:
        InputError: models that do not belong together, an unknown phase or routing, counts below 1, or too few ids.

    Example:
        >>> dense, model = lab.random_pair(64, 128)
        >>> latency = lab.measure_latency(dense, model, tokens=16, routings=(1,), pairs=1)
        >>> latency[["phase", "routing", "pair", "active_mlp_fraction", "ideal_share"]]
             phase   routing  pair  active_mlp_fraction  ideal_share
        0  prefill  expert 1     0                  0.5          0.5
        1  prefill     dense     0                  1.0          1.0
    """
    function = "measure_latency"
    _check_models(dense, model, function)
    routings = _as_routings(model, routings, function)
    if not isinstance(pairs, Integral) or pairs < 1:
        raise InputError(f"{function}: pairs = {pairs}: give at least 1 round")
    ids = step_ids(model, function, phase=phase, batch=batch, tokens=tokens, steps=steps, ids=ids, seed=seed)
    works = {name: Work(each, phase, ids, tokens) for name, each in (("dense", dense), ("model", model))}
    setting = {"run": run, "phase": phase, "batch": batch, "tokens": tokens}
    setting |= {"threads": torch.get_num_threads(), "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    rows = []
    with torch.inference_mode(), evaluating(model, function), in_eval_mode(dense), Stopwatch(model.device) as watch:
        for each in (dense, model):
            watch.watch_mlps(each, "mlp")
        if phase == "decode":
            works["dense"].prefill()
            with forced_routing(model, routings[0], rows=batch * tokens, seed=seed):
                works["model"].prefill()
        shares = {
            routing: _work_shares(dense, works["model"], routing, seed, phase=phase, batch=batch, tokens=tokens) for routing in routings
        }
        order: list = [None, *routings]
        for pair in range(-1, pairs):
            for routing in [*order[(pair + 1) % len(order) :], *order[: (pair + 1) % len(order)]]:
                work = works["dense" if routing is None else "model"]
                with ExitStack() as stack:
                    if routing is not None:
                        stack.enter_context(forced_routing(model, routing, rows=work.rows, calls=work.calls, seed=seed))
                    seconds, mlp_seconds = _timed(work, watch)
                active, ideal = (1.0, 1.0) if routing is None else shares[routing]
                times = {"pair": pair, "seconds": seconds, "mlp_seconds": mlp_seconds}
                name = "dense" if routing is None else routing_name(routing)
                rows.append({**setting, "routing": name, **times, "active_mlp_fraction": active, "ideal_share": ideal})
    frame = pd.DataFrame(rows)
    names = ["run", "phase", "routing", *list(setting)[2:], "pair", "seconds", "mlp_seconds", "active_mlp_fraction", "ideal_share"]
    return frame.loc[frame["pair"] >= 0, names].reset_index(drop=True)


def _check_models(dense: PreTrainedModel, model: PreTrainedModel, function: str) -> None:
    if not isinstance(model, RoutedMixin):
        raise InputError(f"{function}: {type(model).__name__} has no routers; convert it first with lab.convert")
    if isinstance(dense, RoutedMixin):
        raise InputError(f"{function}: the first model, {type(dense).__name__}, is a converted one; give its dense parent")
    if hasattr(model, "layer_masks"):
        raise InputError(f"{function}: {type(model).__name__} computes what its masks then leave out; export it first with lab.export")
    if dense.config.model_type != dense_type_of(model.config.model_type):
        raise InputError(f"{function}: {dense.config.model_type} is not the family of {model.config.model_type}; give the dense parent")
    ours, theirs = ([getattr(each.config, name, None) for name in _SHAPES] for each in (model, dense))
    if ours != theirs or [mlp.dense_params() for mlp in model.routed_mlps()] != _mlp_params(dense):
        raise InputError(f"{function}: the two models have weights of other shapes; give the converted model's own dense parent")
    for name in ("device", "dtype"):
        if getattr(dense, name) != getattr(model, name):
            raise InputError(
                f"{function}: the dense model has {name} {getattr(dense, name)}, the other {getattr(model, name)}; make them equal"
            )


def _mlp_params(dense: PreTrainedModel) -> list[int]:
    """Parameters of every layer's MLP, biases included."""
    family, found = family_of(dense.config.model_type), []
    for layer in decoder_layers(dense):
        maps = [getattr(family.holder(layer), name) for name in family.projections]
        found.append(sum(parameter.numel() for linear in maps for parameter in linear.parameters()))
    return found


def _as_routings(model: PreTrainedModel, routings: Sequence[RoutingSpec], function: str) -> list[RoutingSpec]:
    if not isinstance(routings, (list, tuple)) or not routings:
        raise InputError(f"{function}: routings = {routings!r}: give a list of routings, e.g. ['router', 1]")
    for routing in routings:
        check_routing(model, routing, function)
    if len(set(routings)) < len(routings):
        raise InputError(f"{function}: routings = {list(routings)}: one is given twice; more rounds are what `pairs` asks for")
    return list(routings)


def _timed(work: Work, watch: Stopwatch) -> tuple[float, float]:
    """Seconds of one forward of this work and of the MLPs within it."""
    watch.reset()
    began = watch.now()
    work.run()
    seconds = watch.now() - began
    work.rewind()
    return seconds / work.calls, watch.seconds["mlp"] / work.calls


def _work_shares(dense: PreTrainedModel, work: Work, routing: RoutingSpec, seed: int, **setting) -> tuple[float, float]:
    """Active fraction of the MLPs and ideal share of the dense MLPs' work, from the experts that this work's tokens take."""
    model = work.model
    with forced_routing(model, routing, rows=work.rows, calls=work.calls, seed=seed) as experts, ExitStack() as hooks:
        seen: list[list[Tensor]] = [[] for _ in model.routed_mlps()]
        if routing == "label":
            for output in work.run(output_router_logits=True):
                for layer, taken in zip(seen, output.experts, strict=True):
                    layer.append(taken)
            work.rewind()
        elif routing == "router":
            for layer, mlp in zip(seen, model.routed_mlps(), strict=True):
                hook = mlp.router.register_forward_hook(lambda _, args, logits, layer=layer: layer.append(logits.argmax(-1)))
                hooks.callback(hook.remove)
            work.run()
            work.rewind()
        if routing in ("label", "router"):
            experts = torch.stack([torch.cat(layer).cpu() for layer in seen])  # [L, N]
        table = None  # all tokens alike
        if experts is not None:
            layers, tokens = experts.shape
            table = pd.DataFrame({"layer": np.repeat(np.arange(layers), tokens), "expert": experts.flatten().numpy()})
        cost = model_cost(model, table, **setting)  # within the routing: it asks the mode what is computed
        active = count_active_params(model, table).set_index("layer").loc["all", "active_mlp_fraction"]
    return float(active), ideal_share(cost, model_cost(dense, **setting))


def time_parts(
    model: PreTrainedModel,
    *,
    phase: str = "prefill",
    batch: int = 1,
    tokens: int = 1024,
    routing: RoutingSpec | None = None,
    repeats: int = 5,
    ids: Tensor | None = None,
    seed: int = 0,
    run: str = "",
) -> pd.DataFrame:
    """Where the time of a forward goes, in one model, which is left as it was found.

    Args:
        model: dense or converted.
        phase, batch, tokens, ids, seed: as in `measure_latency`; a decode forward is one step.
        routing: as in `measure_latency`; None: as the model is routed now, and for a dense model.
        repeats: forwards that are timed, after one that is not.

    Returns:
        One row per part: run, routing ("dense" for a dense model), phase, batch, tokens, part ("MLP" without the next two, "router",
        "sorting" of tokens by expert and back, "attention" with its projections and masks, "head", "other": norms, embeddings, sums, the
        cache's bookkeeping), seconds (median over repeats), share (of the sum of the parts).

    Raises:
        InputError: a routing for a dense model, an unknown phase or routing, counts below 1, or too few ids.

    Example:
        >>> _, model = lab.random_pair(64, 128)
        >>> parts = lab.time_parts(model, tokens=16, routing=1, repeats=1)
        >>> parts["part"].tolist(), round(float(parts["share"].sum()), 6)
        (['MLP', 'router', 'sorting', 'attention', 'head', 'other'], 1.0)
    """
    function, converted = "time_parts", isinstance(model, RoutedMixin)
    if routing is not None:
        if not converted:
            raise InputError(f"{function}: {type(model).__name__} has no experts; convert it first with lab.convert, or give no routing")
        check_routing(model, routing, function)
    if not isinstance(repeats, Integral) or repeats < 1:
        raise InputError(f"{function}: repeats = {repeats}: give a whole number of at least 1")
    work = Work(model, phase, step_ids(model, function, phase=phase, batch=batch, tokens=tokens, steps=1, ids=ids, seed=seed), tokens)
    measured = []
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(evaluating(model, function) if converted else in_eval_mode(model))
        if phase == "decode":
            with nullcontext() if routing is None else forced_routing(model, routing, rows=batch * tokens, seed=seed):
                work.prefill()
        if routing is not None:
            stack.enter_context(forced_routing(model, routing, rows=work.rows, seed=seed))
        watch = stack.enter_context(Stopwatch(model.device))
        _watch_parts(watch, model)
        for _ in range(repeats + 1):
            total, mlp = _timed(work, watch)
            seconds = {part: watch.seconds[part] for part in ("router", "sorting", "attention", "head")}
            seconds = {"MLP": mlp - seconds["router"] - seconds["sorting"], **seconds}
            measured.append({**seconds, "other": total - sum(seconds.values())})
        name = "dense" if not converted else _mode_name(model) if routing is None else routing_name(routing)
    medians = pd.DataFrame(measured[1:]).median()
    frame = pd.DataFrame({"part": medians.index, "seconds": medians.to_numpy(), "share": (medians / medians.sum()).to_numpy()})
    columns = {"run": run, "routing": name, "phase": phase, "batch": batch, "tokens": tokens}
    return frame.assign(**columns)[[*columns, *frame.columns]]


def _mode_name(model: PreTrainedModel) -> str:
    return routing_name(model.routing.expert if model.routing.mode == "fixed" else model.routing.mode)


def _watch_parts(watch: Stopwatch, model: PreTrainedModel) -> None:
    watch.watch_mlps(model, "mlp")
    watch.watch("head", model.get_output_embeddings())
    family = family_of(model.config.model_type)
    for layer in decoder_layers(model):
        watch.watch("attention", getattr(layer, family.attention))
    for mlp in model.routed_mlps() if isinstance(model, RoutedMixin) else ():
        watch.watch("router", mlp.router)
        for name in ("sort_tokens", "restore_order"):
            if hasattr(mlp, name):  # masked MLPs do not sort
                watch.watch_method("sorting", mlp, name)


measure_latency.step_times = time_parts.step_times = True  # kept for the machine and the threads that they were measured with


def random_pair(
    hidden_size: int,
    intermediate_size: int,
    *,
    experts: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    layers: int = 2,
    heads: int | None = None,
    vocab_size: int = 256,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random Llama-shaped model and its converted form, for how times grow with size; their text means nothing.

    Args:
        hidden_size, intermediate_size, layers, vocab_size: of both models.
        experts: [E] shares of the MLP, increasing, the last 1.0.
        heads: of attention; None: as many as divide the hidden size into even widths of at least 64 dimensions.
        dtype, device: of both models.
        seed: of the weights; the global generator is left as it is.

    Returns:
        (dense, converted), in eval mode.

    Raises:
        InputError: sizes that make no model.

    Example:
        >>> dense, model = lab.random_pair(64, 128, layers=3)
        >>> type(model).__name__, len(model.routed_mlps()), model.moe.experts
        ('DynaMoELlamaForCausalLM', 3, (0.25, 0.5, 0.75, 1.0))
    """
    if heads is None:
        heads = next((count for count in range(hidden_size // 64, 1, -1) if hidden_size % (2 * count) == 0), 1)
    if min(hidden_size, intermediate_size, layers, heads, vocab_size) < 1 or hidden_size % (2 * heads):
        raise InputError(f"random_pair: hidden_size {hidden_size} with {heads} heads: give positive sizes, heads of an even width")
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab_size,
        max_position_embeddings=32_768,  # costs nothing with rotary positions
    )
    try:
        method = DynaMoEConfig(experts=tuple(experts), router_seed=seed)
    except ValueError as error:
        raise InputError(f"random_pair: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = LlamaForCausalLM(config).eval().to(device=device, dtype=getattr(torch, dtype))
        text = torch.randint(vocab_size, (1, 16))
    return dense, convert(dense, method, calibration=text)
