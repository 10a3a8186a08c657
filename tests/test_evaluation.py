"""Numbers a reader relies on, each against a second way of computing it."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_blocks, make_converted, make_dense
from torch.nn import functional as F

from dynamoe_lab.analysis import perplexity_ratio, routed_losses
from dynamoe_lab.data import Blocks
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import (
    count_active_params,
    document_losses,
    evaluate_perplexity,
    expert_similarity,
    logit_change,
    trace_routing,
    trace_similarity,
)

ROUTING = ["run", "domain", "document", "position", "token_id", "layer", "label", "expert", "probability", "surprisal"]


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_loss(blocks):
    dense = make_dense()
    row = evaluate_perplexity(dense, blocks, batch_size=3).iloc[0]
    losses = F.cross_entropy(dense(blocks.ids).logits[:, :-1].flatten(0, 1), blocks.ids[:, 1:].flatten())
    assert row["perplexity"] == pytest.approx(math.exp(float(losses)), rel=1e-5)
    assert row["tokens"] == blocks.ids[:, 1:].numel()
    assert row["n"] == len(blocks)
    assert row["low"] < row["perplexity"] < row["high"]


def test_ratio_is_paired(blocks):
    dense, model = make_dense(), make_converted()
    row = evaluate_perplexity(model, blocks, reference=dense).iloc[0]
    assert row["ratio"] == pytest.approx(row["perplexity"] / row["reference_perplexity"], rel=1e-6)
    assert row["low"] < row["ratio"] < row["high"]
    model.set_routing("full")
    same = evaluate_perplexity(model, blocks, reference=document_losses(dense, blocks)).iloc[0]
    assert same["ratio"] == pytest.approx(1, abs=1e-5)
    assert same["high"] - same["low"] < 1e-4, "pairing removes what documents differ by"


def test_documents_are_summed_across_blocks():
    ids = make_blocks(2, 10).ids
    document = torch.tensor([[0] * 4 + [1] * 6, [1] * 3 + [2] * 7])
    losses = document_losses(make_dense(), Blocks(ids, document, ["web", "web"]))
    assert losses["tokens"].tolist() == [3, 8, 7]


def test_another_reference_is_refused(blocks):
    with pytest.raises(InputError, match="same blocks"):
        evaluate_perplexity(make_converted(), blocks, reference=document_losses(make_dense(), blocks[:4]))


@torch.no_grad()
def test_routing_frame(family, blocks):
    model = make_converted(family)
    routing = trace_routing(model, blocks, batch_size=3, run="r")
    assert list(routing.columns) == ROUTING
    assert len(routing) == blocks.ids.numel() * 3
    output = model(blocks.ids, output_router_logits=True)
    surprisal = -output.logits.log_softmax(-1)[:, :-1].gather(2, blocks.ids[:, 1:, None])[..., 0]
    for layer in range(3):
        rows = routing[routing["layer"] == layer].sort_values(["document", "position"])
        assert np.array_equal(rows["expert"], output.experts[layer].numpy())
        assert np.array_equal(rows["label"], output.labels[layer].numpy())
        assert np.array_equal(rows["token_id"], blocks.ids.flatten().numpy())
        assert np.allclose(rows["probability"], output.router_logits[layer].softmax(-1).max(-1).values, atol=1e-5)
        shown = rows["surprisal"].to_numpy().reshape(len(blocks), -1)
        assert np.isnan(shown[:, 0]).all()
        assert np.allclose(shown[:, 1:], surprisal, atol=1e-3)
        assert (rows["domain"].astype(str).to_numpy() == np.repeat(blocks.domain, 24)).all()


def test_label_routing_uses_the_labels(blocks):
    model = make_converted()
    model.set_routing("label")
    routing = trace_routing(model, blocks)
    assert (routing["label"] == routing["expert"]).all()
    assert routing["label"].nunique() > 1


def test_active_params_counted_from_tensor_shapes(family, blocks, tmp_path):
    """A second count: per token, from the shapes of the saved checkpoint, slices named in words."""
    from safetensors import safe_open

    model = make_converted(family, experts=(0.3, 0.6, 1.0))
    routing = trace_routing(model, blocks)
    counted = count_active_params(model, routing, run="r").set_index("layer")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    width = [round(fraction * 96) for fraction in (0.3, 0.6, 1.0)]
    names = [name for name in shapes if any(part in name for part in (".mlp.", ".fc1.", ".fc2.")) and ".router." not in name]
    total = 0
    for layer in range(3):
        mine = [shapes[name] for name in names if f"layers.{layer}." in name]
        neuron = sum(math.prod(shape) // 96 for shape in mine if 96 in shape)  # rows, columns and biases of one neuron
        shared = sum(math.prod(shape) for shape in mine if 96 not in shape)  # the output bias
        experts = routing.loc[routing["layer"] == layer, "expert"].to_numpy()
        tokens = [width[expert] * neuron + shared for expert in experts]
        assert counted.loc[str(layer), "mlp_active"] == pytest.approx(np.mean(tokens))
        total += np.mean(tokens)
    everything = sum(math.prod(shape) for shape in shapes.values())
    mlp = sum(math.prod(shapes[name]) for name in names)
    assert counted.loc["all", "active_params"] == pytest.approx(everything - mlp + total)
    assert counted.loc["all", "total_params"] == everything
    assert counted.loc["all", "router"] == 3 * (64 * 16 + 16 * 3)
    assert counted.loc["all", "active_mlp_fraction"] == pytest.approx(total / mlp)


def test_tied_embeddings_count_once(blocks):
    tied, untied = (make_converted(dense=make_dense(tie_word_embeddings=tie)) for tie in (True, False))
    counts = [count_active_params(model, trace_routing(model, blocks)).iloc[-1]["total_params"] for model in (tied, untied)]
    assert counts[1] - counts[0] == 128 * 64


def test_a_fixed_width_asks_no_router(family, blocks):
    model = make_converted(family)
    dense = sum(parameter.numel() for parameter in make_dense(family).parameters())
    model.set_routing("full")
    assert count_active_params(model).iloc[-1]["active_params"] == dense
    model.set_routing(1)
    fixed, traced = count_active_params(model), count_active_params(model, trace_routing(model, blocks))
    pd.testing.assert_frame_equal(fixed, traced)
    assert fixed.iloc[-1]["active_params"] == dense - sum(mlp.expert_params()[-1] - mlp.expert_params()[1] for mlp in model.nested_mlps())
    model.set_routing("router")
    with pytest.raises(InputError, match="tokens differ"):
        count_active_params(model)


def test_biases_count(blocks):
    model = make_converted(dense=make_dense(mlp_bias=True))
    mlp = model.nested_mlps()[0]
    assert mlp.expert_params()[0] == 24 * (64 + 1) * 2 + 64 * 24 + 64
    model.set_routing("full")
    dense = make_dense(mlp_bias=True)
    with torch.no_grad():
        torch.testing.assert_close(model(blocks.ids).logits, dense(blocks.ids).logits, atol=1e-4, rtol=1e-4)


def test_a_routing_of_another_model_is_refused(blocks):
    routing = trace_routing(make_converted(), blocks)
    with pytest.raises(InputError, match="not of a model"):
        count_active_params(make_converted(experts=(0.5, 1.0)), routing)
    with pytest.raises(InputError, match="no routers"):
        trace_routing(make_dense(), blocks)


def test_expert_similarity(blocks):
    model = make_converted()
    model.set_routing(1)
    frame = expert_similarity(model, blocks, batch_size=3)
    assert model.routing.mode == "fixed"
    assert model.routing.expert == 1
    last = frame[frame["expert"] == 3]
    assert np.allclose(last[["mean", "q10", "q50", "q90", "sink_mean"]], 1)
    assert (frame["q10"] <= frame["q50"]).all()
    assert (frame["q50"] <= frame["q90"]).all()
    assert frame["n"].unique().tolist() == [8 * 23]
    model.set_routing("full")
    with torch.no_grad():
        similarities = model(blocks.ids, output_router_logits=True).similarities[2].view(8, 24, 4)
    row = frame[(frame["layer"] == 2) & (frame["expert"] == 0)].iloc[0]
    assert row["mean"] == pytest.approx(float(similarities[:, 1:, 0].mean()), abs=1e-5)
    assert row["sink_mean"] == pytest.approx(float(similarities[:, 0, 0].mean()), abs=1e-5)


def test_logit_change(blocks):
    dense, model = make_dense(), make_converted()
    model.set_routing("full")
    small = logit_change(model, dense, blocks).iloc[0]
    assert small["max_abs"] < 1e-4
    assert small["agreement"] == 1
    with torch.no_grad():
        assert small["logit_scale"] == pytest.approx(float(dense(blocks.ids).logits.std()), rel=1e-3)
    model.set_routing(0)
    assert logit_change(model, dense, blocks).iloc[0]["max_abs"] > 0.01


def test_a_trace_leaves_the_draws_as_they_were(blocks):
    model = make_converted()
    model.set_routing("random", shares=torch.ones(3, 4), seed=1)
    first, second = trace_routing(model, blocks), trace_routing(model, blocks)
    assert (first["expert"] == second["expert"]).all()
    assert first["expert"].nunique() == 4


def test_losses_of_a_trace_equal_those_of_the_model(family, blocks):
    model = make_converted(family)
    routing = trace_routing(model, blocks, batch_size=3, run="r")
    losses, direct = routed_losses(routing, fractions=(0.25, 0.5, 0.75, 1.0)), document_losses(model, blocks)
    assert np.allclose(losses["nll"], direct["nll"], rtol=1e-4)
    assert losses["tokens"].tolist() == direct["tokens"].tolist()
    assert losses["positions"].tolist() == [24] * len(blocks)
    width = np.array([0.25, 0.5, 0.75, 1.0])[routing["expert"]]
    assert losses["active_mlp_fraction"].mean() == pytest.approx(width.mean())
    assert losses["correct"].mean() == pytest.approx((routing["expert"] == routing["label"]).mean())
    ratio, base = perplexity_ratio(losses, document_losses(make_dense(family), blocks)).iloc[0], make_dense(family)
    assert ratio["ratio"] == pytest.approx(evaluate_perplexity(model, blocks, reference=base).iloc[0]["ratio"], rel=1e-4)
    assert ratio["active_mlp_fraction"] == pytest.approx(width.mean())
    assert ratio["run"] == "r"


def test_text_without_a_predicted_token_has_no_perplexity():
    losses = pd.DataFrame({"document": [0, 1], "nll": 0.0, "tokens": 0})  # of blocks of one token
    with pytest.raises(InputError, match="documents with predicted tokens"):
        perplexity_ratio(losses)


def test_similarities_of_one_pass_give_the_labels_of_every_theta(family, blocks):
    model = make_converted(family)
    similarity = trace_similarity(model, blocks, batch_size=3, run="s")
    assert model.routing.mode == "router"
    model.set_routing("full")
    for theta in (-0.5, 0.3, 0.7, 0.99):
        model.set_theta(theta)
        labels = trace_routing(model, blocks, batch_size=3)["label"]
        columns = similarity[[f"similarity_{expert}" for expert in range(3)]].to_numpy()
        qualifies = np.column_stack([columns >= np.float32(theta), np.ones(len(columns), bool)])
        assert np.array_equal(qualifies.argmax(1), labels)


def test_next_surprisal_is_the_next_tokens(blocks):
    rows = trace_similarity(make_converted(), blocks)
    rows = rows[rows["layer"] == 1]
    own, following = (rows[name].to_numpy().reshape(len(blocks), -1) for name in ("surprisal", "next_surprisal"))
    assert np.array_equal(own[:, 1:], following[:, :-1])
    assert np.isnan(own[:, 0]).all()
    assert np.isnan(following[:, -1]).all()


def test_traces_are_frames_of_plain_types(blocks):
    assert isinstance(trace_routing(make_converted(), blocks), pd.DataFrame)


@pytest.mark.parametrize("function", [trace_routing, document_losses, expert_similarity, evaluate_perplexity])
def test_no_text_is_told(function):
    with pytest.raises(InputError, match=r"no blocks of text"):
        function(make_converted(), torch.zeros(0, 8, dtype=torch.long))


@pytest.mark.parametrize(("bad", "told"), [(-100, "token id -100"), (128, "token id 128: the model has ids 0 to 127")])
@pytest.mark.parametrize("function", [trace_routing, document_losses, expert_similarity, trace_similarity])
def test_ids_that_the_model_does_not_have_are_told(function, bad, told):
    with pytest.raises(InputError, match=told):
        function(make_converted(), torch.tensor([[5, bad, 7]]))


@pytest.mark.parametrize("function", [trace_routing, document_losses, expert_similarity, trace_similarity])
def test_no_batch_is_no_measurement(function):
    with pytest.raises(InputError, match="batch_size = -1"):
        function(make_converted(), make_blocks(2), batch_size=-1)


@pytest.mark.parametrize("function", [document_losses, expert_similarity])
def test_blocks_of_one_token_predict_nothing(function):
    with pytest.raises(InputError, match="context 1: give blocks of at least 2 tokens"):
        function(make_converted(), torch.tensor([[5], [7]]))
