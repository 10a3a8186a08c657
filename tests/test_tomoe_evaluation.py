"""Evaluation of ToMoE models, masked and deployed: what it counts is counted again by hand, by torch, or token by token."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PICO, make_blocks, make_converted, make_dense
from deployed_models import CASES, make_deployed, make_masked
from test_cost import attention_flops, counted_flops, mlp_flops, part
from test_latency import state_of

import dynamoe_lab as lab
from dynamoe_lab.analysis import active_fraction, expert_usage, routed_losses
from dynamoe_lab.analysis.metrics import usage_summary
from dynamoe_lab.analysis.tokens import render_tokens
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import (
    attention_masks,
    count_active_params,
    document_divergences,
    document_losses,
    evaluate_perplexity,
    expert_fractions,
    expert_masks,
    expert_similarity,
    ideal_share,
    logit_change,
    measure_latency,
    model_cost,
    time_parts,
    trace_routing,
    trace_similarity,
)
from dynamoe_lab.evaluation.benchmark_lm import BenchmarkLM
from dynamoe_lab.evaluation.overrule import forced_routing
from dynamoe_lab.models.expert_mlp import ExpertMLP

ROUTING = ["run", "domain", "document", "position", "token_id", "layer", "expert", "probability", "open_values", "surprisal"]
E, D, H, L, HEADS, KV, WIDTH, S = 4, 64, 96, 3, 4, 2, 16, 16  # experts; hidden size, neurons, layers, heads of 16; embeddings of 16
IDS = make_blocks(2, 24).ids
cases = pytest.mark.parametrize(("family", "attention"), CASES)
FORMS = {"masked": make_masked, "deployed": make_deployed}
forms = pytest.mark.parametrize("form", FORMS)


# --- traces -------------------------------------------------------------------------------------------------------------------------


@cases
def test_masked_and_deployed_traces_agree(family, attention, blocks):
    masked = make_masked(family, attention=attention)
    ours, theirs = (trace_routing(each, blocks, batch_size=3, run="r") for each in (masked, lab.export(masked)))
    assert list(ours.columns) == ROUTING
    assert len(ours) == L * blocks.ids.numel()
    pd.testing.assert_frame_equal(ours, theirs, atol=1e-3, rtol=1e-3)
    assert ours.groupby("layer")["expert"].nunique().min() > 1
    assert (ours["open_values"] == 1).all() == (attention == "none")


@forms
@torch.no_grad()
def test_the_trace_is_that_of_the_forward(form, blocks):
    model = FORMS[form]()
    routing = trace_routing(model, blocks, batch_size=8)
    output = model(blocks.ids, output_router_logits=True)
    for layer in range(L):
        rows = routing[routing["layer"] == layer]
        assert np.array_equal(rows["expert"], output.experts[layer])
        assert np.allclose(rows["probability"], output.router_logits[layer].softmax(-1).max(-1).values, atol=1e-5)
        assert np.allclose(rows["open_values"], output.open_values[layer], atol=1e-6)
    model.set_routing(2)
    assert set(trace_routing(model, blocks)["expert"]) == {2}
    model.set_routing("random", shares=torch.ones(L, E), seed=1)
    first, second = trace_routing(model, blocks), trace_routing(model, blocks)
    assert (first["expert"] == second["expert"]).all(), "a trace leaves the draws as they were"
    assert first["expert"].nunique() == E


@forms
def test_what_needs_labels_or_experts_is_refused(form, blocks):
    model = FORMS[form]()
    for function in (expert_similarity, trace_similarity):
        with pytest.raises(InputError, match=rf"^{function.__name__}: ToMoE has no difficulty labels") as caught:
            function(model, blocks)
        assert "\n" not in str(caught.value)
    model.set_routing("full")
    with pytest.raises(InputError, match=r"^trace_routing: routing 'full' of ToMoE.* uses no expert; choose another") as caught:
        trace_routing(model, blocks)
    assert "\n" not in str(caught.value)
    assert model.routing.mode == "full"


def test_losses_are_those_of_the_dense_model_with_all_masks_open(blocks):
    dense, model = make_dense(), make_masked()
    model.set_routing("full")
    assert logit_change(model, dense, blocks).iloc[0]["max_abs"] < 1e-4
    assert evaluate_perplexity(model, blocks, reference=dense).iloc[0]["ratio"] == pytest.approx(1, abs=1e-5)
    model.set_routing("router")
    routing = trace_routing(model, blocks, batch_size=3)
    losses = routed_losses(routing, fractions=expert_fractions(model))
    assert np.allclose(losses["nll"], document_losses(model, blocks)["nll"], rtol=1e-4)
    assert "correct" not in losses


# --- masks --------------------------------------------------------------------------------------------------------------------------


@cases
def test_mask_frames(family, attention):
    model = make_masked(family, attention=attention)
    deployed = lab.export(model)
    frame, layers = expert_masks(model, run="r"), model.layer_masks()
    assert list(frame.columns) == ["run", "layer", "expert", "neuron", "neurons"]
    assert set(frame["neurons"]) == {H}
    found = np.zeros((L, E, H), bool)
    found[frame["layer"], frame["expert"], frame["neuron"]] = True
    assert len(frame) == found.sum()
    assert np.array_equal(found, torch.stack([layer.experts for layer in layers]))
    for each in (model, deployed):
        fractions = expert_fractions(each)
        assert list(fractions.columns) == ["layer", "expert", "fraction"]
        assert fractions["fraction"].to_numpy().reshape(L, E) == pytest.approx(found.mean(-1))
        pairs = attention_masks(each, run="r")
        assert list(pairs.columns) == ["run", "layer", "pair", "open"]
        assert len(pairs) == (L * WIDTH // 2 if attention == "hybrid" else 0)
        if len(pairs):
            assert pairs["open"].tolist() == torch.cat([layer.pairs for layer in layers]).tolist()
    with pytest.raises(InputError, match=r"^expert_masks: ToMoE.* give the masked model$"):
        expert_masks(deployed)


@torch.no_grad()
def test_more_experts_than_a_byte_can_count(blocks):
    model = make_masked(num_experts=130)
    model.set_routing(129)
    assert set(trace_routing(model, blocks[:1].ids)["expert"]) == {129}


@torch.no_grad()
def test_experts_without_neurons_are_in_the_frame(tmp_path):
    """Of the last layer none has any, of the first one expert; as a table on disk, too."""
    from dynamoe_lab.analysis.metrics import mask_jaccard, mask_union

    model = make_masked()
    layers = model.layer_masks()
    layers[-1].experts[:] = False
    layers[0].experts[1] = False
    model.layer_masks = lambda: layers
    frame = expert_masks(model)
    assert len(frame) == sum(int(layer.experts.sum()) for layer in layers) + E + 1
    assert frame[frame["neuron"] < 0][["layer", "expert"]].to_numpy().tolist() == [[0, 1], *([L - 1, e] for e in range(E))]
    frame.to_csv(tmp_path / "masks.csv", index=False)
    for each in (frame, pd.read_csv(tmp_path / "masks.csv").assign(run="")):
        union = mask_union(each, experts=E).set_index(["layer", "count"])["share"]
        assert union[L - 1, 0] == 1
        assert 1 - union["all", 0] == pytest.approx(np.mean([float(layer.experts.any(0).float().mean()) for layer in layers]))
        assert (mask_jaccard(each, frame, draws=2)["jaccard"] == 1).all()


def test_a_layer_that_keeps_no_pair():
    model = make_masked()
    with torch.no_grad():
        model.masked_attentions()[1].decoder.weight[WIDTH:] = 0
        model.moe.mask_offset = -1e-9  # every pair of that layer is closed
    kept = [attention_masks(each)["open"].to_numpy().reshape(L, -1)[1] for each in (model, lab.export(model))]
    assert not np.any(kept)


def test_fractions_of_nested_experts():
    frame = expert_fractions(make_converted(experts=(0.25, 0.5, 1.0)))
    assert frame["fraction"].tolist() == [0.25, 0.5, 1.0] * 3
    for function in (expert_masks, attention_masks):
        with pytest.raises(InputError, match=rf"^{function.__name__}: the experts of DynaMoELlamaForCausalLM are not masks"):
            function(make_converted())
        with pytest.raises(InputError, match=rf"^{function.__name__}: LlamaForCausalLM has no experts"):
            function(make_dense())
    with pytest.raises(InputError, match=r"^expert_fractions: LlamaForCausalLM has no experts"):
        expert_fractions(make_dense())


# --- active parameters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["hybrid", "dynamic", "none"])
def test_active_params_by_hand(attention, blocks):
    """From the masks and the sizes in words, without asking any module for its parameters."""
    model = make_masked("llama", attention=attention)
    deployed = lab.export(model)
    masks, routing = model.layer_masks(), trace_routing(deployed, blocks)
    counted = count_active_params(deployed, routing, run="r").set_index("layer")
    neuron, around = 3 * D, (2 if not model.config.tie_word_embeddings else 1) * PICO["vocab_size"] * D + D
    whole = {"active": 0.0, "router": 0, "other": around, "total": around, "masked": 0.0}
    for layer, mask in enumerate(masks):
        rows = routing[routing["layer"] == layer]
        active = np.mean([int(mask.experts[expert].sum()) for expert in rows["expert"]]) * neuron
        pairs = WIDTH if attention != "hybrid" else 2 * int(mask.pairs.sum())
        other = D * (HEADS + KV) * (pairs + WIDTH) + 2 * D  # Q, K, V, O, and two norms
        router, masked = D * E, 0.0
        if attention != "none":
            router += (D + 1) * S + 2 * S + S * (WIDTH if attention == "hybrid" else WIDTH * 3 // 2)
            masked = (1 - rows["open_values"].mean()) * D * (HEADS + KV) * WIDTH
        total = int(mask.experts.any(0).sum()) * neuron + router + other
        row = counted.loc[str(layer)]
        assert row["mlp_active"] == pytest.approx(active)
        assert row["mlp_total"] == H * neuron
        assert row["active_mlp_fraction"] == pytest.approx(active / (H * neuron))
        assert row[["router", "other", "total_params"]].tolist() == [router, other, total]
        assert row["masked_params"] == pytest.approx(masked)
        for name, value in {"active": active, "router": router, "other": other, "total": total, "masked": masked}.items():
            whole[name] += value
    row = counted.loc["all"]
    assert row["active_params"] == pytest.approx(whole["active"] + whole["router"] + whole["other"])
    assert row["total_params"] == whole["total"] == sum(parameter.numel() for parameter in deployed.parameters())
    assert row["masked_params"] == pytest.approx(whole["masked"])
    assert (row["masked_params"] > 0) == (attention != "none")


@cases
def test_the_masked_model_counts_as_what_it_is_exported_to(family, attention, blocks):
    """But for queries and keys, which it holds whole, the bias of the deployed router, and what makes masks."""
    masked = make_masked(family, attention=attention)
    deployed = lab.export(masked)
    routing = trace_routing(masked, blocks)
    ours, theirs = (count_active_params(each, routing).set_index("layer") for each in (masked, deployed))
    same = ["mlp_active", "mlp_total", "active_mlp_fraction", "masked_params"]
    pd.testing.assert_frame_equal(ours[same], theirs[same])
    pruned = attention != "none"
    assert (theirs["router"] - ours["router"]).tolist() == [S * pruned] * L + [L * S * pruned]
    assert ours.loc["all", "total_params"] == sum(parameter.numel() for parameter in masked.parameters())
    dense = sum(parameter.numel() for parameter in make_dense(family).parameters())
    assert ours.loc["all", ["other", "mlp_total"]].sum() == dense
    assert ((ours["other"] > theirs["other"]) == (attention == "hybrid")).all()


@cases
def test_every_routing_is_counted(family, attention, blocks):
    masked = make_masked(family, attention=attention)
    dense = sum(parameter.numel() for parameter in make_dense(family).parameters())
    for model in (masked, lab.export(masked)):
        mlps = model.routed_mlps()
        model.set_routing("full")
        full = count_active_params(model).set_index("layer").loc["all"]
        assert full["router"] == full["masked_params"] == 0
        assert full["mlp_active"] == sum(mlp.full_params() for mlp in mlps)
        assert full["mlp_total"] == sum(mlp.dense_params() for mlp in masked.routed_mlps())
        if model is masked:
            assert full["active_params"] == dense
            assert full["active_mlp_fraction"] == 1
        else:
            assert full["active_mlp_fraction"] < 1, "what no expert has is gone"
        model.set_routing(1)
        fixed, traced = count_active_params(model), count_active_params(model, trace_routing(model, blocks))
        pd.testing.assert_frame_equal(fixed.drop(columns="masked_params"), traced.drop(columns="masked_params"))
        assert fixed["masked_params"].isna().all() == (attention != "none"), "without tokens nobody knows what they mask"
        assert fixed.iloc[-1]["mlp_active"] == sum(mlp.expert_params()[1] for mlp in mlps)
        model.set_routing("random", shares=torch.ones(L, E))
        drawn = count_active_params(model, trace_routing(model, blocks)).iloc[-1]
        model.set_routing("router")
        usage = expert_usage(trace_routing(model, blocks), experts=E)
        routed = count_active_params(model, usage).iloc[-1]
        assert math.isnan(routed["masked_params"]) == (attention != "none")
        assert routed["router"] == drawn["router"] > fixed.iloc[-1]["router"]
        with pytest.raises(InputError, match="count_active_params: under routing 'router' tokens differ"):
            count_active_params(model)


# --- the cost model -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_by_one(monkeypatch):
    """Experts one by one whatever the number of tokens, which is what costs are counted for; so few would run the union at once."""
    monkeypatch.setattr(ExpertMLP, "_pays", lambda mlp, experts: True)


@cases
def test_flops_of_a_deployed_model_are_what_torch_counts(family, attention, one_by_one):
    model = make_deployed(family, attention=attention)
    work = {}
    for mode in (0, 2, "full", "router"):
        model.set_routing(mode)
        routing = None if mode != "router" else trace_routing(model, IDS, batch_size=2)
        with torch.inference_mode():  # the first forward lays the experts out
            model(IDS)
        counts, cost = counted_flops(model, IDS, use_cache=False), model_cost(model, routing, batch=2, tokens=24)
        work[mode] = (part(cost, "mlp")["flops"] + part(cost, "router")["flops"]) * IDS.numel()
        assert work[mode] == pytest.approx(mlp_flops(model, counts))
        assert part(cost, "router")["flops"] == (L * 2 * D * E if mode == "router" else 0)
        for layer in range(L):
            attended, pairs = model.model.layers[layer].self_attn if attention != "none" else None, WIDTH
            if attended is not None:
                pairs = attended.rotary_width
            seen = np.mean([min(position + 1, 8 if family == "gemma3_text" and layer != 1 else 24) for position in range(24)])
            square = (24 - seen) * 2 * HEADS * (pairs + WIDTH)  # torch counts scores of all tokens with all
            assert part(cost, "attention", str(layer))["flops"] + square == pytest.approx(
                attention_flops(model, counts, layer) / IDS.numel()
            )
    assert work[0] != work[2]
    assert work["full"] > max(work[0], work[2])


@pytest.mark.parametrize("attention", ["hybrid", "dynamic", "none"])
def test_flops_and_bytes_of_a_deployed_decode_step(attention):
    """One token a layer: the weights of its expert alone, and narrower keys in the cache."""
    from transformers import DynamicCache

    model = make_deployed("qwen2", attention=attention)
    model.set_routing(1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:1, :23], past_key_values=cache, use_cache=True)
    counts = counted_flops(model, IDS[:1, 23:], past_key_values=cache, use_cache=True)
    cost = model_cost(model, phase="decode", tokens=23)
    assert part(cost, "mlp")["flops"] == mlp_flops(model, counts)
    for layer in range(L):
        assert part(cost, "attention", str(layer))["flops"] == attention_flops(model, counts, layer)
        keys, values = cache.layers[layer].keys, cache.layers[layer].values
        assert keys.shape[2] == values.shape[2] == 24
        moved = part(cost, "attention", str(layer))
        assert moved["bytes"] == moved["active_params"] * 4 + (keys.numel() + values.numel()) * 4
        assert part(cost, "mlp", str(layer))["bytes"] == model.routed_mlps()[layer].expert_params()[1] * 4


@cases
@forms
def test_the_sums_of_the_cost_are_the_models(form, family, attention, blocks):
    model = FORMS[form](family, attention=attention)
    for mode in ("router", 1, "full"):
        model.set_routing(mode)
        routing = trace_routing(model, blocks) if mode == "router" else None
        cost, counted = model_cost(model, routing), count_active_params(model, routing).set_index("layer")
        assert part(cost, "all")["params"] == sum(parameter.numel() for parameter in model.parameters())
        assert part(cost, "all")["active_params"] == pytest.approx(counted.loc["all", "active_params"])
        assert part(cost, "mlp", "1")["active_params"] == pytest.approx(counted.loc["1", "mlp_active"])
        assert part(cost, "all", "1")["active_params"] == pytest.approx(counted.loc["1", "active_params"])


def test_experts_are_read_if_a_token_takes_them():
    """Simulated, forward by forward."""
    model, batch, random = make_deployed(), 6, np.random.default_rng(0)
    shares = np.array([0.7, 0.2, 0.06, 0.04])
    usage = pd.DataFrame({"layer": np.repeat(range(L), E), "expert": np.tile(range(E), L), "share": np.tile(shares, L)})
    sizes = np.array(model.routed_mlps()[0].expert_params()) * 4
    drawn = random.choice(E, size=(40_000, batch), p=shares)
    read = sum(sizes[expert] * (drawn == expert).any(axis=1).mean() for expert in range(E))
    cost = model_cost(model, usage, phase="decode", batch=batch, tokens=10)
    assert part(cost, "mlp", "0")["bytes"] * batch == pytest.approx(read, rel=0.01)


def test_a_masked_model_computes_everything(blocks):
    dense, model = model_cost(make_dense()), make_masked()
    for mode in ("router", 0, "full"):
        model.set_routing(mode)
        cost = model_cost(model, trace_routing(model, blocks) if mode == "router" else None)
        for name in ("flops", "bytes"):
            assert part(cost, "mlp")[name] == part(dense, "mlp")[name]
        assert part(cost, "router")["flops"] == L * 2 * D * E, "its routers run whatever is done with what they say"
        assert part(cost, "mlp")["active_params"] == pytest.approx(
            part(dense, "mlp")["params"]
            if mode == "full"
            else count_active_params(model, None if mode == 0 else trace_routing(model, blocks)).iloc[-1]["mlp_active"]
        )
        moved = part(cost, "attention")["bytes"] - part(dense, "attention")["bytes"]
        decided = (D * S + 2 * S + S * WIDTH) * 4 * L / 1024  # router, norm, and the decoder's rows that tokens need
        assert moved == pytest.approx(0 if mode == "full" else decided)


@forms
def test_a_routing_of_another_model_is_refused(form, blocks):
    model = FORMS[form]()
    for routing in (
        trace_routing(make_converted(experts=tuple(np.arange(1, 9) / 8)), blocks),
        trace_routing(model, blocks).query("layer > 0"),
    ):
        with pytest.raises(InputError, match="model_cost: this routing is not of a model with 3 layers and 4 experts"):
            model_cost(model, routing)


# --- KL to the dense model ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_divergences_are_the_models_kl_loss(blocks):
    model, dense = make_masked(), make_dense()
    frame = document_divergences(model, blocks, batch_size=3)
    assert list(frame.columns) == ["document", "domain", "kl", "tokens"]
    assert frame["tokens"].tolist() == [24] * len(blocks)
    assert frame["kl"].sum() / frame["tokens"].sum() == pytest.approx(float(model(blocks.ids, output_kl=True).kl_loss), rel=1e-4)
    first = torch.nn.functional.kl_div(
        model(blocks.ids[:1]).logits.log_softmax(-1), dense(blocks.ids[:1]).logits.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert frame["kl"][0] == pytest.approx(float(first), rel=1e-3)
    for each in (model, lab.export(model)):
        pd.testing.assert_frame_equal(frame, document_divergences(each, blocks, reference=dense), rtol=1e-3)
    model.set_routing("full")
    assert document_divergences(model, blocks)["kl"].abs().max() < 1e-5
    assert model.routing.mode == "full"
    with pytest.raises(
        InputError, match=r"document_divergences: ToMoELlamaForCausalLM does not hold its dense parent; give it as reference="
    ):
        document_divergences(make_deployed(), blocks)
    with pytest.raises(InputError, match="LlamaForCausalLM has no routers"):
        document_divergences(dense, blocks)
    with pytest.raises(InputError, match="no blocks"):
        document_divergences(model, torch.zeros(0, 8, dtype=torch.long))


def test_divergences_leave_the_model_and_its_draws(blocks):
    model = make_masked().train()
    model.set_routing("random", shares=torch.ones(L, E), seed=3)
    before = state_of(model)
    first, again = document_divergences(model, blocks, batch_size=3), document_divergences(model, blocks, batch_size=3)
    assert first["kl"].tolist() == again["kl"].tolist()
    assert state_of(model) == before


# --- time ---------------------------------------------------------------------------------------------------------------------------

EQUAL = (0.25,) * E
ONE = (0.0, 1.0, 0.0, 0.0)


@cases
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_latency_table(family, attention, phase):
    dense, model = make_dense(family), make_deployed(family, attention=attention)
    before = state_of(dense, model)
    routings = ("router", "full", 1, ONE, EQUAL)
    frame = measure_latency(dense, model, phase=phase, batch=2, tokens=16, routings=routings, pairs=1, steps=2)
    assert sorted(frame["routing"]) == sorted(["dense", "router", "full", "expert 1", "one expert", "mixed"])
    assert ((frame["seconds"] > frame["mlp_seconds"]) & (frame["mlp_seconds"] > 0)).all()
    assert state_of(dense, model) == before
    row, mlps = frame.set_index("routing"), model.routed_mlps()
    neurons = np.array([mlp.membership.sum(1).tolist() for mlp in mlps])  # [L, E]
    union, weights = [mlp.membership.shape[1] for mlp in mlps], 2 if family in ("phi", "gpt_neox") else 3
    router = E / (weights * H)
    assert row.loc["expert 1", "ideal_share"] == pytest.approx(neurons[:, 1].mean() / H)
    assert row.loc["one expert", "ideal_share"] == pytest.approx(neurons[:, 1].mean() / H + router)
    assert row.loc["full", "ideal_share"] == pytest.approx(np.mean(union) / H)
    active = [sum(mlp.expert_params()[1] for mlp in mlps), sum(mlp.full_params() for mlp in mlps)]
    assert row.loc[["expert 1", "full"], "active_mlp_fraction"].tolist() == pytest.approx(
        [each / sum(mlp.dense_params() for mlp in mlps) for each in active]
    )


def test_shares_of_the_routers_own_choice(blocks):
    dense, model = make_dense(), make_deployed()
    row = measure_latency(dense, model, batch=8, tokens=24, ids=blocks, pairs=1).set_index("routing").loc["router"]
    routing = trace_routing(model, blocks)
    assert row["active_mlp_fraction"] == pytest.approx(count_active_params(model, routing).iloc[-1]["active_mlp_fraction"])
    cost = model_cost(model, routing, batch=8, tokens=24)
    assert row["ideal_share"] == pytest.approx(ideal_share(cost, model_cost(dense, batch=8, tokens=24)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": make_masked}, "ToMoEMaskedLlamaForCausalLM computes what its masks then leave out; export it first with lab.export"),
        ({"dense": make_deployed}, "the first model, ToMoELlamaForCausalLM, is a converted one"),
        ({"dense": lambda: make_dense("mistral")}, "mistral is not the family of tomoe_llama"),
        ({"dense": lambda: make_dense(num_hidden_layers=2)}, "weights of other shapes"),
        ({"dense": lambda: make_dense(intermediate_size=48)}, "weights of other shapes"),
        ({"dense": lambda: make_dense(mlp_bias=True)}, "weights of other shapes"),
        ({"routings": ("label",)}, "routing 'label': ToMoE has no difficulty labels"),
        ({"routings": ("random",)}, "routing 'random': choose router, full, an expert from 0 to 3, or a tuple of 4 shares"),
    ],
)
def test_bad_input_in_one_line(change, message):
    models = {name: change.get(name, make)() for name, make in (("dense", make_dense), ("model", make_deployed))}
    with pytest.raises(InputError, match=f"^measure_latency: .*{message}") as caught:
        measure_latency(models["dense"], models["model"], tokens=16, pairs=1, routings=change.get("routings", ("router",)))
    assert "\n" not in str(caught.value)


@forms
def test_parts_table(form, one_by_one):
    model = FORMS[form]()
    before = state_of(model)
    for phase in ("prefill", "decode"):
        parts = time_parts(model, phase=phase, batch=2, tokens=16, routing=EQUAL, repeats=1).set_index("part")
        assert parts.index.tolist() == ["MLP", "router", "sorting", "attention", "head", "other"]
        assert (parts.loc[["MLP", "router", "attention", "head"], "seconds"] > 0).all()
        assert (parts.loc["sorting", "seconds"] > 0) == (form == "deployed")
    assert set(time_parts(model, tokens=8, repeats=1)["routing"]) == {"router"}
    assert state_of(model) == before


@forms
@torch.no_grad()
def test_every_token_takes_the_expert_drawn_for_it(form):
    model = FORMS[form]()
    with forced_routing(model, EQUAL, rows=IDS.numel(), seed=3) as drawn:
        experts = model(IDS, output_router_logits=True, use_cache=False).experts
        assert torch.equal(torch.stack(experts), drawn)
        assert all(layer.unique().numel() == E for layer in drawn)
    with forced_routing(model, ONE, rows=IDS.numel()):
        overruled = model(IDS, use_cache=False).logits
    model.set_routing(1)
    assert torch.allclose(model(IDS, use_cache=False).logits, overruled, atol=1e-4)


# --- benchmarks ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, PICO["vocab_size"]))]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@forms
def test_benchmarks_count_what_a_trace_counts(form, tokenizer):
    """Sequences of many lengths in one batch; a trace of each alone has no pads."""
    model, rng = FORMS[form](), np.random.default_rng(0)
    texts = [rng.integers(3, PICO["vocab_size"], length).tolist() for length in rng.integers(4, 30, 12)]
    requests = [(("", str(index)), ids[:-2], ids[-2:]) for index, ids in enumerate(texts)]
    inputs = [torch.tensor([ids[:-1]]) for ids in texts]
    for mode in ("router", 2, "full"):
        model.set_routing(mode)
        lm = BenchmarkLM(model, tokenizer, batch_size=12)
        answers = lm._loglikelihood_tokens(requests)
        assert lm.tokens == sum(ids.numel() for ids in inputs)
        routing = pd.concat([trace_routing(model, ids) for ids in inputs]) if mode == "router" else None
        row = count_active_params(model, routing).iloc[-1]
        assert lm.active() == pytest.approx((row["active_params"], row["active_mlp_fraction"]), rel=1e-12)
        with torch.no_grad():
            logs = model(inputs[0]).logits[0, -2:].log_softmax(-1)
        assert answers[0][0] == pytest.approx(float(logs[range(2), texts[0][-2:]].sum()), abs=1e-3)
    model.set_routing("random", shares=torch.tensor([[0.5, 0.0, 0.0, 0.5]] * L))
    lm = BenchmarkLM(model, tokenizer, batch_size=12)
    lm._loglikelihood_tokens(requests)
    ends = [count_active_params(model, pd.DataFrame({"layer": range(L), "expert": e, "share": 1.0})).iloc[-1]["mlp_active"] for e in (0, 3)]
    total = sum(mlp.dense_params() for mlp in model.routed_mlps())
    assert lm.active()[1] == pytest.approx(np.mean(ends) / total, abs=4 * np.ptp(ends) / total / 2 / math.sqrt(L * lm.tokens))


@pytest.mark.assets
def test_a_masked_checkpoint_is_scored_in_its_deployed_form(home, project, monkeypatch):
    from test_cli import call

    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(home))
    dense, tokenizer = lab.load_model("smollm2-pico")
    masked = make_masked(dense=dense)
    for name, model in (("masked", masked), ("deployed", lab.export(masked))):
        model.save_pretrained(project / name)
        tokenizer.save_pretrained(project / name)
    scores = {}
    for name in ("masked", "deployed"):
        done = call("eval", name, "--tasks", "piqa", "--limit", "4", "--output", f"scores-{name}")
        assert done.exit_code == 0, done.output
        assert ("scored is its deployed form" in done.stdout) == (name == "masked")
        scores[name] = pd.read_parquet(project / f"scores-{name}" / "scores.parquet").set_index("metric")["value"]
    same = ["acc", "bits_per_byte", "active_params", "active_mlp_fraction"]
    assert scores["masked"][same].to_numpy() == pytest.approx(scores["deployed"][same].to_numpy(), rel=1e-4)
    assert scores["masked"]["active_mlp_fraction"] < 1
    compared = call("compare", "scores-masked", "scores-deployed")
    assert compared.exit_code == 0, compared.output
    wrong = call("eval", "masked", "--tasks", "piqa", "--limit", "4", "--routing", "label", "--output", "label")
    assert (wrong.exit_code, "ToMoE has no difficulty labels" in wrong.stderr, wrong.stderr.count("\n")) == (2, True, 1)


# --- metrics over widths by layer ----------------------------------------------------------------------------------------------------


def test_metrics_take_widths_by_layer_and_expert(blocks):
    model = make_deployed()
    routing, fractions = trace_routing(model, blocks, run="r"), expert_fractions(model)
    table = fractions["fraction"].to_numpy().reshape(L, E)
    width = table[routing["layer"], routing["expert"]]
    for given in (fractions, table, fractions.sample(frac=1, random_state=0)):
        losses = routed_losses(routing, fractions=given)
        for document, rows in routing.assign(width=width).groupby("document"):
            assert losses.set_index("document").loc[document, "active_mlp_fraction"] == pytest.approx(rows["width"].mean())
        active = active_fraction(routing, fractions=given).set_index("layer")
        expected = routing.assign(width=width).groupby("layer")["width"].mean()
        assert active["active_fraction"].to_dict() == pytest.approx({**expected, "all": width.mean()})
        assert (active["low"] < active["active_fraction"]).all()
        assert active["theta"].isna().all()
        summary = usage_summary(expert_usage(routing, experts=E), fractions=given).set_index("layer")
        assert summary["active_fraction"].to_dict() == pytest.approx({**expected, "all": expected.mean()})
    counted = count_active_params(model, routing).iloc[-1]
    assert counted["active_mlp_fraction"] == pytest.approx(width.mean()), "this MLP has no biases, so parameters are neurons"


def test_usage_without_labels_is_the_share_of_tokens(blocks):
    routing = trace_routing(make_deployed(), blocks, run="r")
    usage = expert_usage(routing, experts=E)
    shares = pd.crosstab(routing["layer"], routing["expert"], normalize="index").reindex(columns=range(E), fill_value=0)
    assert usage["share"].to_numpy().reshape(L, E) == pytest.approx(shares.to_numpy())
    nested = trace_routing(make_converted(), blocks)
    pd.testing.assert_frame_equal(
        expert_usage(nested, theta=0.7, experts=E), expert_usage(nested.drop(columns="label"), theta=0.7, experts=E)
    )


def test_widths_of_another_model_are_told(blocks):
    routing, fractions = trace_routing(make_deployed(), blocks), expert_fractions(make_deployed())
    for given, message in [
        (fractions.query("layer < 2"), "the frame has layer 2, counted from 0, but there are fractions of 2 layers"),
        (fractions.query("expert < 2"), "the frame has expert 3, counted from 0, but there are 2 fractions"),
        (fractions.query("layer != 1 or expert != 0"), "no fraction for layer 1, expert 0"),
        (pd.concat([fractions, fractions]), "several rows for one layer and expert"),
        (np.ones((2, 2, 2)), r"fractions of shape \[2, 2, 2\]: give one per expert"),
        (fractions.drop(columns="fraction"), r"fractions: the frame lacks the column\(s\) fraction"),
    ]:
        for function in (routed_losses, active_fraction):
            with pytest.raises(InputError, match=rf"^{function.__name__}: .*{message}|^{function.__name__}: .*experts = 2"):
                function(routing, fractions=given)


def test_a_text_is_coloured_by_the_width_of_its_experts(blocks):
    model = make_deployed()
    routing = trace_routing(model, blocks.ids[:1])
    routing.insert(0, "token", [f"<{token}>" for token in routing["token_id"]])
    page = render_tokens(routing, fractions=expert_fractions(model))
    width = expert_fractions(model)["fraction"].to_numpy().reshape(L, E)[routing["layer"], routing["expert"]]
    assert f"{width.mean():.0%} of the MLP neurons run on average" in page
    assert "the label in" not in page
