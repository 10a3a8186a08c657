"""Definitions of difficulty: what all of them promise, each against its formula on separate MLPs, and a model that has one."""

import copy
import dataclasses
import json

import pytest
import torch
from conftest import make_converted, make_dense
from test_models import naive_expert, projections
from transformers import AutoModelForCausalLM

from dynamoe_lab.config import load_experiment
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import LABELS, DynaMoEConfig, decoder_layers, family_of, nested_similarity
from dynamoe_lab.models import labels as definitions
from dynamoe_lab.workbench.fingerprint import fingerprint

every_label = pytest.mark.parametrize("label", LABELS)


# --- what every definition promises --------------------------------------------------------------------------------------------------


@every_label
def test_the_full_output_is_similar_to_itself(label):
    """1 where outputs are the same, never more; zeros are no accident; rows are computed alone, in float32 whatever the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    products = [torch.randn(7, 16, generator=generator, dtype=torch.float64).bfloat16() for _ in range(3)]
    residual = torch.randn(7, 16, generator=generator).bfloat16()
    products[1][2] = 0  # of this token the second expert is the first
    products[1][4], products[2][4] = 0, 0  # and of this one all are the same
    found = nested_similarity(products, label=label, residual=residual)
    assert (found.shape, found.dtype) == ((7, 3), torch.float32), "a definition returns E - 1 tensors [N] in float32, one a nested expert"
    most = found.max().item()
    assert most <= 1 + 1e-6, f"similarity {most:.3g}, above 1: it must be 1 where outputs are the same and never more, as θ is at most 1"
    assert found[:, -1].tolist() == [1.0] * 7
    torch.testing.assert_close(found[4], torch.ones(3), msg=f"{found[4].tolist()} where outputs are the same: similarity must be 1 there")
    assert found[2, 0] == found[2, 1], "two experts with the same output must be equally similar"
    assert bool((found[[0, 1, 3, 5, 6], :2] < 0.999).all()), "1 where outputs differ: a definition that tells nothing apart"
    alone = torch.cat([nested_similarity([p[n : n + 1] for p in products], label=label, residual=residual[n : n + 1]) for n in range(7)])
    torch.testing.assert_close(found, alone, msg="a token's similarity must not depend on the other tokens: reduce over the last dimension")
    nothing = nested_similarity([torch.zeros(2, 16)] * 3, label=label, residual=torch.zeros(2, 16))
    assert bool(torch.isfinite(nothing).all()), "no number where all outputs are zero: clamp what you divide by, as `cosine` does"


@every_label
def test_its_function_is_public(label):
    name = LABELS[label].similarity.__name__
    assert name in definitions.__all__, f"{name} is not in __all__ of models/labels.py, the list of its public names"
    assert getattr(definitions, name) is LABELS[label].similarity
    assert definitions.__all__ == sorted(definitions.__all__), "__all__ of models/labels.py is in order"


def test_another_formula_under_the_same_name_is_another_model(monkeypatch):
    """Who edits a definition gets its numbers, not those that were kept of the one before."""

    def halved(outputs, full, residual):
        return [torch.cosine_similarity(output, full, dim=-1) / 2 for output in outputs]

    model, before = make_converted(), fingerprint(make_converted())
    assert fingerprint(model) == before
    monkeypatch.setitem(LABELS, "cosine", dataclasses.replace(LABELS["cosine"], similarity=halved))
    assert fingerprint(model) != before


@every_label
def test_a_model_trains_routes_and_travels_with_it(label, blocks, tmp_path):
    """Labels reach the router's loss; the path without a trace routes by them, too; saved and loaded they are the same."""
    model = make_converted(label=label, theta=0.5)
    output = model(blocks.ids, labels=blocks.ids)
    assert any(len(layer.unique()) > 1 for layer in output.labels), "at θ = 0.5 all tokens have the same label: nothing to learn"
    output.loss.backward()
    assert all(bool(parameter.grad.any()) for mlp in model.nested_mlps() for parameter in mlp.router.parameters())
    model.set_routing("label")
    with torch.no_grad():
        torch.testing.assert_close(model(blocks.ids).logits, model(blocks.ids, output_router_logits=True).logits, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.moe == model.moe
    with torch.no_grad():
        again = loaded(blocks.ids, output_router_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(output.labels, again.labels, strict=True))
    assert f"`{label}`" in (tmp_path / "README.md").read_text()


# --- each against its formula ---------------------------------------------------------------------------------------------------------


def forward_seen(model, ids):
    """Per layer the MLP's input x, the MLP's output as it is added, and the stream r it is added to, read off the layer's output."""
    row, layers = family_of(model.config.model_type), []
    for layer in decoder_layers(model):
        seen = {}
        layers.append((layer, seen))
        parts = {"mlp": row.nested(layer), "attention": getattr(layer, row.attention), "layer": layer}
        if row.output_norm is not None:
            parts["added"] = getattr(layer, row.output_norm)
        for name, part in parts.items():
            part.register_forward_hook(
                lambda _, args, output, name=name, seen=seen: seen.update(
                    {name: (output[0] if isinstance(output, tuple) else output).reshape(-1, 64), f"{name} input": args[0] if args else None}
                )
            )
    output = model(ids, output_router_logits=True)
    found = []
    for layer, seen in layers:
        added = seen.get("added", seen["mlp"])
        residual = seen["layer"] - added - (seen["attention"] if row.is_parallel(model.config) else 0)
        norm = (lambda value: value) if row.output_norm is None else getattr(layer, row.output_norm)
        found.append((seen["mlp input"].reshape(-1, 64), residual, norm))
    return output, found


@torch.no_grad()
@pytest.mark.parametrize("target", ["current", "frozen"])
@pytest.mark.parametrize("label", ["relative_error", "residual_error"])
def test_errors_equal_separate_mlps(family, label, target, blocks):
    model = make_converted(family, label=label, label_target=target, theta=0.5)
    mlps = model.nested_mlps()
    parts = [[(w.clone(), None if b is None else b.clone()) for w, b in projections(mlp, family)] for mlp in mlps]
    if target == "frozen":
        for mlp in mlps:
            mlp.up.weight.mul_(1.3)
    output, layers = forward_seen(model, blocks.ids)
    for mlp, (x, residual, norm), weights, found, labels in zip(mlps, layers, parts, output.similarities, output.labels, strict=True):
        outputs = [naive_expert(mlp, x, fraction, family, weights) for fraction in mlp.moe.experts]
        if label == "residual_error":
            outputs = [norm(value) for value in outputs]
        scale = outputs[-1] if label == "relative_error" else residual + outputs[-1]
        expected = torch.stack([1 - (value - outputs[-1]).norm(dim=-1) / scale.norm(dim=-1) for value in outputs], dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(labels, (found >= 0.5).int().argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"use_parallel_residual": False}, {"use_parallel_residual": True}])
def test_the_stream_of_parallel_layers_is_their_input(changes, blocks):
    model, inputs = make_converted("gpt_neox", label="residual_error", dense=make_dense("gpt_neox", **changes)), []
    layer, mlp = decoder_layers(model)[1], model.nested_mlps()[1]
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 64)))
    _, seen = forward_seen(model, blocks.ids)
    assert torch.allclose(seen[1][1], inputs[0], atol=1e-5) == changes["use_parallel_residual"]
    assert mlp._residual is None, "the stream is not kept"


@torch.no_grad()
def test_layers_that_norm_after_the_sum(blocks):
    """OPT-350m: the stream is what its MLP is given."""
    dense = make_dense("opt", do_layer_norm_before=False)
    model, given = make_converted("opt", label="residual_error", dense=dense, theta=0.5), []
    mlp = model.nested_mlps()[1]
    mlp.register_forward_pre_hook(lambda _, args: given.append(args[0].reshape(-1, 64)))
    found = model(blocks.ids, output_router_logits=True).similarities[1]
    outputs = [naive_expert(mlp, given[0], fraction, "opt") for fraction in mlp.moe.experts]
    scale = (given[0] + outputs[-1]).norm(dim=-1)
    torch.testing.assert_close(found, torch.stack([1 - (o - outputs[-1]).norm(dim=-1) / scale for o in outputs], -1), atol=1e-4, rtol=1e-4)


# --- a model that has one ------------------------------------------------------------------------------------------------------------


def test_reconfiguring_takes_another_definition_and_back(blocks):
    model, other = make_converted("gemma3_text"), make_converted("gemma3_text", label="residual_error", theta=0.5)
    before, plain = model.config.moe, model(blocks.ids, output_router_logits=True).labels
    model.reconfigure(other.moe)
    assert model.config.moe == other.config.moe
    found, expected = (each(blocks.ids, output_router_logits=True) for each in (model, other))
    assert all(torch.equal(a, b) for a, b in zip(found.similarities, expected.similarities, strict=True))
    model.reconfigure(DynaMoEConfig.from_dict(before))
    assert model.config.moe == before
    assert all(torch.equal(a, b) for a, b in zip(model(blocks.ids, output_router_logits=True).labels, plain, strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules()), "a model without need of the stream does not look for it"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_a_copy_sees_its_own_stream(family, blocks):
    model = make_converted(family, label="residual_error")
    expected = model(blocks.ids, output_router_logits=True).similarities
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(twin(blocks.ids, output_router_logits=True).similarities, expected, strict=True))
    twin.set_routing("label")
    with pytest.raises(RuntimeError, match="residual stream"):
        twin.nested_mlps()[0](torch.zeros(1, 64))


def test_checkpointed_layers_see_the_stream_again(blocks):
    model, grads = make_converted(label="residual_error", theta=0.5, train_route="label").train(), []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(blocks.ids, labels=blocks.ids, use_cache=False).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_what_was_before_there_was_a_choice_stays_what_it_was(tmp_path):
    """Checkpoints say nothing of the paper's definition, so those without the field load as they always did, and steps keep their keys."""
    model = make_converted()
    model.save_pretrained(tmp_path)
    assert "label" not in json.loads((tmp_path / "config.json").read_text())["moe"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).moe.label == "cosine"
    assert make_converted(label="relative_error").config.moe["label"] == "relative_error"
    later = dataclasses.field(default="cosine", metadata={"later": True})
    old, new = (dataclasses.make_dataclass("Settings", [("theta", float, 0.9), *extra]) for extra in ([], [("label", str, later)]))
    assert fingerprint(old()) == fingerprint(new()) == fingerprint(new(label="cosine"))
    assert fingerprint(new(label="residual_error")) != fingerprint(new())
    assert fingerprint(DynaMoEConfig(label="residual_error")) != fingerprint(DynaMoEConfig())


def test_an_unknown_definition_is_refused():
    assert load_experiment("smoke", ["dynamoe.label=residual_error"]).dynamoe.label == "residual_error"
    with pytest.raises(InputError, match=r"dynamoe.label = 'euclid': choose one of cosine, relative_error, residual_error"):
        load_experiment("smoke", ["dynamoe.label=euclid"])
