"""The real model, SmolLM2-135M in float32: equalities that a random model could pass by luck, and a short training."""

import subprocess
import sys

import pytest
import torch
from test_models import captured_inputs, naive_expert, naive_labels

from dynamoe_lab.config import TrainConfig
from dynamoe_lab.conversion import convert
from dynamoe_lab.data import load_blocks
from dynamoe_lab.evaluation import count_active_params, document_losses, evaluate_perplexity, logit_change, trace_routing
from dynamoe_lab.loading import load_model
from dynamoe_lab.models import DynaMoEConfig
from dynamoe_lab.training import train

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smol():
    """Dense model, tokenizer, converted model, held-out blocks."""
    dense, tokenizer = load_model("smollm2-135m")
    calibration = load_blocks("c4+wiki", tokenizer, context=256, tokens=4096, split="calibration")
    heldout = load_blocks("c4+wiki", tokenizer, context=256, tokens=4096, split="heldout")
    return dense, tokenizer, convert(dense, DynaMoEConfig(lambda_lm=1.0), calibration=calibration), heldout


def test_full_routing_moves_no_logit_by_a_thousandth(smol):
    dense, _, model, heldout = smol
    model.set_routing("full")
    change = logit_change(model, dense, heldout[:6]).iloc[0]
    model.set_routing("router")
    assert change["max_abs"] < 1e-3
    assert change["agreement"] == 1


@torch.no_grad()
def test_prefixes_and_labels_equal_separate_mlps(smol):
    _, _, model, heldout = smol
    inputs, output = captured_inputs(model, heldout.ids[:1], output_router_logits=True)
    assert len(inputs) == 30
    for mlp, x, labels in zip(model.nested_mlps(), inputs, output.labels, strict=True):
        for expert, fraction in enumerate(mlp.moe.experts):
            expected = naive_expert(mlp, x[1:], fraction)  # position 0 is an attention sink of norm in the thousands: see below
            torch.testing.assert_close(mlp.expert_output(x[1:], expert), expected, atol=1e-5, rtol=1e-5)
            sink = naive_expert(mlp, x[:1], fraction)
            assert float((mlp.expert_output(x[:1], expert) - sink).norm() / sink.norm()) < 1e-5
        naive = naive_labels(mlp, x, model.moe.theta)
        for token in (labels != naive).nonzero().flatten().tolist():  # float32 against float64 at the very threshold
            outputs = [naive_expert(mlp, x[token : token + 1], fraction).double() for fraction in mlp.moe.experts]
            cosines = [float(torch.cosine_similarity(part, outputs[-1])) for part in outputs[:-1]]
            assert min(abs(cosine - model.moe.theta) for cosine in cosines) < 1e-5
        assert float((labels == naive).float().mean()) > 0.98


@torch.no_grad()
def test_cache_padding_and_future_change_nothing(smol):
    _, _, model, heldout = smol
    ids = heldout.ids[:2, :48]
    whole = model(ids).logits
    torch.testing.assert_close(model(ids[:, :20]).logits, whole[:, :20], atol=2e-3, rtol=1e-3)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 7, dtype=torch.long)], 1)
    padded = model(torch.cat([ids, torch.zeros(2, 7, dtype=torch.long)], 1), attention_mask=mask).logits
    torch.testing.assert_close(padded[:, :48], whole, atol=2e-3, rtol=1e-3)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 20, dtype=torch.long), "pad_token_id": 0}
    assert torch.equal(model.generate(ids[:1, :20], use_cache=True, **options), model.generate(ids[:1, :20], use_cache=False, **options))


def test_a_short_training_helps_and_its_checkpoint_loads_quickly(smol, tmp_path):
    dense, tokenizer, model, heldout = smol
    reference = document_losses(dense, heldout)
    before = evaluate_perplexity(model, heldout, reference=reference).iloc[0]
    blocks = load_blocks("c4+wiki", tokenizer, context=256, tokens=12 * 1024, split="train")
    steps = train(model, blocks, TrainConfig(steps=12, warmup_steps=2), output_dir=tmp_path, tokenizer=tokenizer)
    after = evaluate_perplexity(model, heldout, reference=reference).iloc[0]
    assert after["ratio"] < before["ratio"]
    assert steps["router_accuracy"].tail(3).mean() > steps["router_accuracy"].head(3).mean() + 0.1

    routing = trace_routing(model, heldout)
    majority = routing.groupby("layer")["label"].agg(lambda labels: labels.value_counts(normalize=True).iloc[0]).mean()
    assert 0.25 < majority < 1
    params = count_active_params(model, routing).set_index("layer").loc["all"]
    assert params["total_params"] == 134_515_008 + 30 * (576 * 256 + 256 * 4)
    assert params["active_params"] < params["total_params"]

    program = f"""
import time, torch, transformers.models.llama.modeling_llama
import dynamoe_lab.models
from dynamoe_lab.loading import load_model
began = time.perf_counter()
model, tokenizer = load_model({str(tmp_path / "checkpoint")!r})
print(time.perf_counter() - began)
"""
    seconds = [float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(seconds) < 2, f"loading a converted checkpoint took {min(seconds):.1f} s"
