"""The cost model against second counts: torch's own counter of multiply-adds, saved shapes, the paper's numbers, sums by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_blocks, make_converted, make_dense
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dynamoe_lab.analysis import expert_usage
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import count_active_params, ideal_share, model_cost, trace_routing
from dynamoe_lab.evaluation.cost_model import PARTS
from dynamoe_lab.models import CONFIG_CLASSES, MODEL_CLASSES, DynaMoEConfig, family_of

NUMBERS = ["params", "active_params", "flops", "bytes"]


def part(cost: pd.DataFrame, name: str, layer: str = "all") -> pd.Series:
    rows = cost[(cost["layer"] == layer) & (cost["part"] == name)]
    assert len(rows) == 1
    return rows.iloc[0]


@torch.no_grad()
def counted_flops(model, ids, **options) -> dict[str, int]:
    """Multiply-adds x 2 that torch counts in a forward, by the modules' names below the model. Attention is eager: torch counts that."""
    model.set_attn_implementation("eager")
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}  # torch counts addmm alone
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        model(input_ids=ids, logits_to_keep=1, **options)
    counts = counter.get_flop_counts()
    return {name.partition(".")[2]: sum(found.values()) for name, found in counts.items()}


def mlp_flops(model, counts: dict[str, int]) -> int:
    """Those of all MLPs: of the modules that hold the projections, or of the projections themselves where the layer does."""
    family = family_of(model.config.model_type)
    names = [family.mlp] if family.mlp else [family.up, family.down]
    return sum(counts.get(f"{family.layers}.{layer}.{name}", 0) for layer in range(3) for name in names)


def attention_flops(model, counts: dict[str, int], layer: int) -> int:
    path = f"{family_of(model.config.model_type).layers}.{layer}"
    return counts.get(f"{path}.self_attn", 0) + counts.get(f"{path}.attention", 0)


def test_params_are_those_of_the_model(family):
    """A second sorting, by the words in the parameters' names; the head has what is left."""
    words = {"router": ".router.", "attention": "attn.|.attention.", "mlp": ".mlp.|.fc1.|.fc2.", "embedding": "embed_", "norms": "norm"}
    for model in (make_dense(family), make_converted(family)):
        if hasattr(model, "set_routing"):
            model.set_routing(1)
        cost = model_cost(model, run="r")
        assert list(cost.columns) == ["run", "phase", "layer", "part", *NUMBERS]
        assert set(cost["run"]) == {"r"}
        assert part(cost, "all")["params"] == sum(parameter.numel() for parameter in model.parameters())
        sizes = dict.fromkeys(PARTS, 0)
        for name, parameter in model.named_parameters():
            sizes[next((kind for kind in words if any(word in name for word in words[kind].split("|"))), "head")] += parameter.numel()
        assert {name: part(cost, name)["params"] for name in PARTS} == sizes


def test_sums_are_rows(family):
    model = make_converted(family)
    cost = model_cost(model, trace_routing(model, make_blocks()))
    single = cost[(cost["layer"] != "all") & (cost["part"] != "all")]
    assert set(single["layer"]) == {"0", "1", "2", "model"}
    assert not cost.duplicated(["layer", "part"]).any()
    for layer in (*single["layer"].unique(), "all"):
        for name in (*PARTS, "all"):
            rows = single[single["layer"].eq(layer) | (layer == "all")]
            rows = rows[rows["part"].eq(name) | (name == "all")]
            shown = cost[(cost["layer"] == layer) & (cost["part"] == name)]
            assert len(shown) == (0 if rows.empty else 1)
            if len(shown):
                assert np.allclose(shown[NUMBERS].to_numpy(float)[0], rows[NUMBERS].to_numpy(float).sum(0))


def test_flops_of_a_dense_prefill_are_what_torch_counts(family):
    """Linear maps one by one; attention's products torch counts over the full square, which the causal context fills by (T + 1) / 2T."""
    dense, ids = make_dense(family), make_blocks(2, 24).ids
    counts, cost = counted_flops(dense, ids, use_cache=False), model_cost(dense, batch=2, tokens=24)
    assert part(cost, "mlp")["flops"] * ids.numel() == mlp_flops(dense, counts) > 0
    assert part(cost, "head")["flops"] * ids.numel() == 2 * 64 * 128 * 2, "the last token of each of two sequences"
    assert counts["lm_head"] == 2 * 64 * 128 * 2
    for layer in range(3):
        linear = 2 * sum(
            module.weight.numel()
            for name, module in dense.named_modules()
            if isinstance(module, torch.nn.Linear) and f"layers.{layer}." in name and ("attn" in name or ".attention." in name)
        )
        square = 4 * 64 * 24  # scores and values of 4 heads x 16 over all 24 tokens
        assert attention_flops(dense, counts, layer) == (linear + square) * ids.numel()
        window = 8 if family == "gemma3_text" and layer != 1 else 24
        seen = np.mean([min(position + 1, window) for position in range(24)])
        assert part(cost, "attention", str(layer))["flops"] == pytest.approx(linear + 4 * 64 * seen)


def test_flops_of_a_decode_step_are_what_torch_counts(family):
    dense, ids = make_dense(family), make_blocks(2, 24).ids
    cache = DynamicCache(config=dense.config)
    with torch.no_grad():
        dense(input_ids=ids[:, :23], past_key_values=cache, use_cache=True)
    counts = counted_flops(dense, ids[:, 23:], past_key_values=cache, use_cache=True)
    cost = model_cost(dense, phase="decode", batch=2, tokens=23)
    for layer in range(3):
        assert part(cost, "attention", str(layer))["flops"] * 2 == attention_flops(dense, counts, layer)
    assert part(cost, "mlp")["flops"] * 2 == mlp_flops(dense, counts)
    assert part(cost, "head")["flops"] * 2 == counts["lm_head"]


def test_flops_of_a_routed_model_are_what_torch_counts(family):
    model, blocks = make_converted(family), make_blocks(2, 24)
    seen = []
    for mode in (0, 2, "full", "router"):
        model.set_routing(mode)
        routing = trace_routing(model, blocks, batch_size=2)
        counts = counted_flops(model, blocks.ids, use_cache=False)
        cost = model_cost(model, routing if mode == "router" else None, batch=2, tokens=24)
        work = (part(cost, "mlp")["flops"] + part(cost, "router")["flops"]) * 48
        assert work == pytest.approx(mlp_flops(model, counts))
        assert part(cost, "router")["flops"] == (3 * 2 * (64 * 16 + 16 * 4) if mode == "router" else 0)
        if mode == "router":
            assert routing["expert"].nunique() == 4, "tokens differ, or this would test nothing"
            usage = expert_usage(routing, theta=0.7)
            pd.testing.assert_frame_equal(model_cost(model, usage, batch=2, tokens=24), cost)
        seen.append(work)
    assert seen[0] < seen[1] < seen[2]


@pytest.mark.parametrize("target", ["current", "frozen"])
def test_labels_cost_the_full_mlp(target):
    model, blocks = make_converted(label_target=target), make_blocks(2, 24)
    model.set_routing("label")
    cost = model_cost(model, trace_routing(model, blocks), batch=2, tokens=24)
    counts = counted_flops(model, blocks.ids, use_cache=False)
    assert (part(cost, "mlp")["flops"] + part(cost, "router")["flops"]) * 48 == pytest.approx(mlp_flops(model, counts))
    full = 3 * 3 * 64 * 96
    assert part(cost, "mlp")["flops"] == pytest.approx(2 * full * (2 if target == "frozen" else 1))
    assert part(cost, "mlp")["active_params"] < full, "the label's experts, not the work that found them"


def test_active_params_are_those_of_count_active_params(family, blocks):
    model = make_converted(family)
    for mode in ("router", "label", "random", 1, "full"):
        model.set_routing(mode, shares=torch.ones(3, 4)) if mode == "random" else model.set_routing(mode)
        routing = trace_routing(model, blocks)
        counted = count_active_params(model, routing).set_index("layer")
        for phase in ("prefill", "decode"):
            cost = model_cost(model, routing, phase=phase)
            assert part(cost, "all")["active_params"] == pytest.approx(counted.loc["all", "active_params"])
            assert part(cost, "mlp", "1")["active_params"] == pytest.approx(counted.loc["1", "mlp_active"])
            assert part(cost, "all", "1")["active_params"] == pytest.approx(counted.loc["1", "active_params"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_step_moves_the_active_weights_and_the_cache(family, blocks, dtype):
    """One sequence: each active weight once, of the embedding its rows alone; a head that is tied reads the table all the same."""
    size = {"float32": 4, "bfloat16": 2}[dtype]
    model = make_converted(family).to(getattr(torch, dtype))
    cost = model_cost(model, trace_routing(model, blocks), phase="decode", tokens=23)
    config = model.config
    stored = 2 * (getattr(config, "num_key_value_heads", None) or 4) * 16 * size  # a token's key and value, heads of 16
    contexts = [8 if family == "gemma3_text" and layer != 1 else 24 for layer in range(3)]
    for name in ("mlp", "router", "norms"):
        assert part(cost, name)["bytes"] == pytest.approx(part(cost, name)["active_params"] * size)
    assert part(cost, "attention")["bytes"] == part(cost, "attention")["active_params"] * size + stored * sum(contexts)
    assert part(cost, "embedding")["bytes"] == (2 if family == "opt" else 1) * 64 * size, "OPT learns positions, too"
    assert part(cost, "head")["bytes"] == sum(parameter.numel() for parameter in model.get_output_embeddings().parameters()) * size


def test_all_weights_of_a_tied_model_at_batch_1():
    model = make_converted(dense=make_dense(tie_word_embeddings=True))
    routing = trace_routing(model, make_blocks())
    whole = part(model_cost(model, routing, phase="decode", tokens=10), "all")
    cache, row = 3 * 2 * 2 * 16 * 4 * 11, 64 * 4
    assert whole["bytes"] - cache - row == pytest.approx(whole["active_params"] * 4)


def test_tokens_of_a_pass_share_weights():
    """A block is read if any of the tokens needs it: simulated here, token by token."""
    model = make_converted()
    shares = np.array([0.7, 0.2, 0.06, 0.04])
    usage = pd.DataFrame({"layer": np.repeat(range(3), 4), "expert": np.tile(range(4), 3), "share": np.tile(shares, 3)})
    neuron, batch, random = 3 * 64 * 4, 8, np.random.default_rng(0)  # bytes of a neuron
    largest = random.choice(4, size=(40_000, batch), p=shares).max(axis=1)
    width = np.array([24, 48, 72, 96])[largest].mean()
    cost = model_cost(model, usage, phase="decode", batch=batch, tokens=10)
    assert part(cost, "mlp", "0")["bytes"] * batch == pytest.approx(width * neuron, rel=0.01)
    assert part(cost, "norms", "0")["bytes"] * batch == 2 * 64 * 4
    crowded = model_cost(model, usage, batch=4, tokens=256)
    assert part(crowded, "mlp", "0")["bytes"] * 1_024 == pytest.approx(96 * neuron)
    assert part(crowded, "embedding")["bytes"] * 1_024 == 128 * 64 * 4, "more tokens than rows: the table once"
    assert part(crowded, "attention", "0")["bytes"] == pytest.approx((2 * 64 * 64 + 2 * 64 * 32) * 4 / 1_024 + 2 * 2 * 16 * 4)


def test_paper_shapes_without_weights():
    """Mistral-7B on the meta device: 7.24 B, 33.6 M of routers, a floor of 3.01 B with every token at the quarter expert."""
    shapes = MistralConfig().to_dict()
    with torch.device("meta"):
        dense = MistralForCausalLM(MistralConfig())
        values = {name: value for name, value in shapes.items() if name not in ("model_type", "transformers_version")}
        model = MODEL_CLASSES["mistral"](CONFIG_CLASSES["mistral"](**values, moe=DynaMoEConfig().to_dict()))
    dense_cost = model_cost(dense)
    assert round(part(dense_cost, "all")["params"] / 1e9, 2) == 7.24
    model.set_routing(0)
    floor = model_cost(model)
    assert round(part(floor, "all")["active_params"] / 1e9, 2) == 3.01
    assert round(part(floor, "router")["params"] / 1e6, 1) == 33.6
    assert ideal_share(floor, dense_cost) == pytest.approx(0.25)


def test_the_routers_share_of_smollm2():
    """DESIGN's 5.6 %, from the shapes of SmolLM2-135M, and what a table of experts then leaves."""
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        dense = LlamaForCausalLM(LlamaConfig(**shapes))
        model = MODEL_CLASSES["llama"](CONFIG_CLASSES["llama"](**shapes, moe=DynaMoEConfig().to_dict()))
    usage = pd.DataFrame({"layer": [0, 0, 1], "expert": [0, 3, 1], "share": [0.5, 0.5, 1.0]})  # 62.5 % and 50 % of the neurons
    share = ideal_share(model_cost(model, usage), model_cost(dense))
    assert share == pytest.approx((0.625 + 0.5) / 2 + (576 * 256 + 256 * 4) / (3 * 576 * 1536))
    assert share - 0.5625 == pytest.approx(0.056, abs=5e-4)


def test_sliding_windows_of_a_model_without_layer_types():
    """Mistral windows every layer; long contexts cost no more than the window."""
    dense = make_dense("mistral", sliding_window=8)
    short, long = (part(model_cost(dense, phase="decode", tokens=tokens), "attention") for tokens in (8, 100))
    assert short["flops"] == long["flops"]
    assert short["bytes"] == long["bytes"]
    wide = part(model_cost(make_dense("mistral", sliding_window=None), phase="decode", tokens=100), "attention")
    assert wide["flops"] - long["flops"] == 3 * 4 * 64 * (101 - 8)


def test_what_cannot_be_counted_is_refused(blocks):
    dense, model = make_dense(), make_converted()
    routing = trace_routing(model, blocks)
    with pytest.raises(InputError, match="phase 'generate' is not known; choose prefill or decode"):
        model_cost(dense, phase="generate")
    with pytest.raises(InputError, match="batch = 0, tokens = 1024; give at least 1 of each"):
        model_cost(dense, batch=0)
    with pytest.raises(InputError, match="LlamaForCausalLM has no experts"):
        model_cost(dense, routing)
    with pytest.raises(InputError, match=r"model_cost: under routing 'router' tokens differ; give the frame of lab\.trace_routing"):
        model_cost(model)
    with pytest.raises(InputError, match="model_cost: this routing is not of a model with 3 layers and 2 experts"):
        model_cost(make_converted(experts=(0.5, 1.0)), routing)
    with pytest.raises(InputError, match="several runs or domains"):
        model_cost(model, expert_usage(routing, theta=0.7, by_domain=True))
    with pytest.raises(InputError, match="model type 'gpt2' is not supported"):
        model_cost(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)))
    two = pd.concat([model_cost(dense, run="a"), model_cost(dense, run="b")])
    with pytest.raises(InputError, match="ideal_share: one row of layer all is needed for mlp"):
        ideal_share(model_cost(model, routing), two)
