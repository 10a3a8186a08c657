"""Masked ToMoE models against what they are exported to: one function, with and without a cache, padded or not; and what is cut out."""

import re

import pytest
import torch
from conftest import PICO, close, make_blocks, make_converted, make_dense, make_tomoe
from deployed_models import CASES, PRUNED, make_deployed, make_masked
from transformers import LlamaConfig, LlamaForCausalLM

import dynamoe_lab as lab
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import DEPLOYED_CLASSES, DEPLOYED_CONFIGS, FAMILIES, ToMoEConfig, decoder_layers

E, D, H, HEADS, KV, WIDTH = 4, PICO["hidden_size"], PICO["intermediate_size"], 4, 2, 16
cases = pytest.mark.parametrize(("family", "attention"), CASES)


@torch.no_grad()
@cases
def test_deployed_equals_masked(family, attention, blocks):
    masked = make_masked(family, attention=attention)
    deployed = lab.export(masked)
    assert type(deployed) is DEPLOYED_CLASSES[family]
    assert not deployed.training
    ours, theirs = (each(blocks.ids, labels=blocks.ids) for each in (deployed, masked))
    close(ours.logits, theirs.logits)
    close(ours.loss, theirs.loss)
    close(ours.lm_loss, theirs.lm_loss)
    for name in ("router_logits", "experts", "open_values"):
        for mine, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            close(mine, other)
    assert len(ours.experts) == PICO["num_hidden_layers"]
    assert len(torch.cat(ours.experts).unique()) == E, "a test of experts needs all of them"
    opened = torch.stack(ours.open_values)
    assert bool((opened == 1).all()) == (attention == "none")
    assert opened.dtype == torch.float32
    plain = deployed(blocks.ids)
    close(plain.logits, ours.logits)
    assert plain.router_logits is plain.experts is plain.open_values is plain.loss is None


@torch.no_grad()
@cases
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(family, attention, side, blocks):
    masked = make_masked(family, attention=attention)
    deployed = lab.export(masked)
    mask = torch.ones_like(blocks.ids)
    for row in range(len(mask)):
        mask[row, slice(0, row) if side == "left" else slice(mask.shape[1] - row, None)] = 0
    ids = blocks.ids.where(mask.bool(), PICO["pad_token_id"])
    ours, theirs = (each(ids, attention_mask=mask, labels=ids) for each in (deployed, masked))
    close(ours.logits[mask.bool()], theirs.logits[mask.bool()])
    close(ours.lm_loss, theirs.lm_loss)


@torch.no_grad()
@cases
@pytest.mark.parametrize(("implementation", "batch"), [("sdpa", 3), ("sdpa", 1), ("eager", 3)])
def test_token_by_token_with_a_cache(family, attention, implementation, batch):
    masked = make_masked(family, attention=attention)
    deployed = lab.export(masked)
    deployed.set_attn_implementation(implementation)
    ids = make_blocks(batch, 20).ids
    expected, logits, cache = masked(ids).logits, [], None
    for start, stop in ((0, 7), (7, 9), *((place, place + 1) for place in range(9, 20))):
        output = deployed(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, dim=1), expected)


@torch.no_grad()
@cases
def test_other_routings(family, attention, blocks):
    masked = make_masked(family, attention=attention)
    deployed = lab.export(masked)
    for routing in (0, 3):
        for model in (masked, deployed):
            model.set_routing(routing)
        close(deployed(blocks.ids).logits, masked(blocks.ids).logits)
    for model in (masked, deployed):
        model.set_routing("random", shares=torch.rand(3, E, generator=torch.Generator().manual_seed(0)), seed=5)
    ours, theirs = (model(blocks.ids, output_router_logits=True) for model in (deployed, masked))
    close(ours.logits, theirs.logits)
    assert all(torch.equal(mine, other) for mine, other in zip(ours.experts, theirs.experts, strict=True))
    deployed.set_routing("full")
    whole = deployed(blocks.ids, output_router_logits=True)
    assert all(bool((experts == -1).all()) for experts in whole.experts)
    assert all(bool((opened == 1).all()) for opened in whole.open_values)
    with pytest.raises(ValueError, match="no difficulty labels"):
        deployed.set_routing("label")
    with pytest.raises(ValueError, match="experts 0 to 3"):
        deployed.set_routing(4)


@torch.no_grad()
@cases
def test_full_is_what_is_left_without_masks(family, attention, blocks):
    """The dense model with the neurons that no expert has, and the pairs that no token has, set to zero."""
    dense = make_dense(family)
    masked = make_masked(family, dense=dense, attention=attention)
    deployed = lab.export(masked)
    deployed.set_routing("full")
    kind = FAMILIES[family]
    for layer, masks in zip(decoder_layers(dense), masked.layer_masks(), strict=True):
        getattr(kind.holder(layer), kind.down).weight[:, ~masks.experts.any(0)] = 0
        if masks.pairs is not None:
            closed = (~masks.pairs).repeat(2)
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                for parameter in linear.parameters():
                    parameter.unflatten(0, (-1, WIDTH))[:, closed] = 0
    close(deployed(blocks.ids).logits, dense(blocks.ids).logits)


@torch.no_grad()
@cases
def test_what_the_masks_leave_is_all_that_is_stored(family, attention):
    masked = make_masked(family, attention=attention)
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    deployed = lab.export(masked)
    masks, moe = masked.layer_masks(), deployed.config.moe
    unions = [int(layer.experts.any(0).sum()) for layer in masks]
    assert moe["union_sizes"] == unions
    assert 0 < min(unions) <= max(unions) < H
    assert {**moe, "union_sizes": 0, "qk_pairs": 0} == {**masked.config.moe, "union_sizes": 0, "qk_pairs": 0}
    assert moe["qk_pairs"] == ([layer.pairs.nonzero()[:, 0].tolist() for layer in masks] if attention == "hybrid" else None)
    weights = deployed.state_dict()
    names = {name: value.shape for name, value in make_dense(family).state_dict().items()}
    family_of = FAMILIES[family]
    for index, (layer, union) in enumerate(zip(masks, unions, strict=True)):
        mlp = f"{family_of.layers}.{index}.{family_of.mlp}."
        for name in (family_of.gate, family_of.up):
            if name is not None:
                names[f"{mlp}{name}.weight"] = (union, D)
            if f"{mlp}{name}.bias" in names:
                names[f"{mlp}{name}.bias"] = (union,)
        names[f"{mlp}{family_of.down}.weight"] = (D, union)
        names |= {f"{mlp}router.weight": (E, D), f"{mlp}membership": (E, union)}
        if attention == "none":
            continue
        prefix, width = f"{family_of.layers}.{index}.self_attn.", WIDTH * 3 // 2
        if attention == "hybrid":
            width, pairs = WIDTH, int(layer.pairs.sum())
            assert 0 < pairs < WIDTH // 2
            for name, heads in (("q_proj", HEADS), ("k_proj", KV)):
                names[f"{prefix}{name}.weight"] = (2 * pairs * heads, D)
                if f"{prefix}{name}.bias" in names:
                    names[f"{prefix}{name}.bias"] = (2 * pairs * heads,)
        names |= {f"{prefix}router.weight": (16, D), f"{prefix}router.bias": (16,), f"{prefix}decoder.weight": (width, 16)}
        names |= {f"{prefix}norm.weight": (16,), f"{prefix}norm.bias": (16,)}
    assert {name: tuple(value.shape) for name, value in weights.items()} == {name: tuple(shape) for name, shape in names.items()}
    for mine, other in zip(deployed.routed_mlps(), masked.routed_mlps(), strict=True):
        assert mine.expert_params() == other.expert_params()
        assert mine.dense_params() == other.dense_params() == other.full_params() > mine.full_params()
    assert all(torch.equal(before[name], value) for name, value in masked.state_dict().items()), "the masked model is left as it was"
    ours, theirs = ({value.data_ptr() for value in each.state_dict().values()} for each in (deployed, masked))
    assert not ours & theirs, "and shares no memory"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_layer_without_any_pair(family, blocks):
    """Its scores are all zero; one pair stays, with zeros for weights."""
    masked = make_masked(family)
    attention = masked.masked_attentions()[1]
    features = torch.nn.functional.gelu(attention.norm(masked.hypernetwork()[2].mean(0)))  # logits of -1, and an offset of 0.3
    attention.decoder.weight[attention.head_dim :] = -features / features.square().sum()
    masks = masked.layer_masks()
    assert [int(layer.pairs.sum()) == 0 for layer in masks] == [False, True, False]
    deployed = lab.export(masked)
    assert deployed.config.moe["qk_pairs"][1] == [0]
    kept = decoder_layers(deployed)[1].self_attn.q_proj
    assert kept.weight.shape == (2 * HEADS, D)
    assert all(not parameter.any() for parameter in kept.parameters())
    close(deployed(blocks.ids).logits, masked(blocks.ids).logits)


@torch.no_grad()
def test_layers_and_experts_without_neurons(blocks, tmp_path):
    masked = make_masked("gpt_neox")
    first, second, _ = masked.routed_mlps()
    for mlp, expert in ((first, None), (second, 2)):
        embeddings = masked.hypernetwork()[mlp.layer]
        features = torch.nn.functional.gelu(mlp.norm(embeddings))  # [E, S]
        aim = torch.full((E,), -2.0) if expert is None else torch.where(torch.arange(E) == expert, -2.0, 2.0)
        mlp.decoder.weight.copy_(torch.linalg.lstsq(features, aim[:, None]).solution.T.expand_as(mlp.decoder.weight))
    assert not masked.layer_masks()[0].experts.any()
    assert masked.layer_masks()[1].experts.any(1).tolist() == [True, True, False, True]
    deployed = lab.export(masked)
    assert deployed.config.moe["union_sizes"][:2] == [0, H]
    close(deployed(blocks.ids).logits, masked(blocks.ids).logits)
    deployed.save_pretrained(tmp_path)
    close(type(deployed).from_pretrained(tmp_path).eval()(blocks.ids).logits, masked(blocks.ids).logits)


@torch.no_grad()
def test_fresh_masks_are_open_and_deployed_is_nearly_dense(blocks):
    dense = make_dense()
    deployed = lab.export(make_tomoe(dense=dense))
    assert deployed.config.moe["union_sizes"] == [H] * 3
    assert (deployed(blocks.ids).logits - dense(blocks.ids).logits).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("attention", ["hybrid", "dynamic", "none"])
def test_half_precision(attention, blocks, tmp_path):
    """What decides stays float32, so that nearly all tokens take the same experts."""
    masked = make_masked(dense=make_dense(dtype="bfloat16"), attention=attention)
    deployed = lab.export(masked)
    kinds = {name: value.dtype for name, value in deployed.state_dict().items()}
    decides = [name for name in kinds if re.search(r"(mlp|self_attn)\.(router|norm|decoder)\.", name)]
    assert {kinds[name] for name in decides} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if name not in decides} == {torch.bfloat16, torch.bool}
    ours, theirs = (each(blocks.ids, output_router_logits=True) for each in (deployed, masked))
    same = torch.stack(ours.experts) == torch.stack(theirs.experts)
    assert same.float().mean() > 0.95
    assert (ours.logits - theirs.logits).float().norm() < 0.1 * theirs.logits.float().norm()
    deployed.save_pretrained(tmp_path)
    loaded = type(deployed).from_pretrained(tmp_path, dtype="auto").eval()
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == kinds
    assert torch.equal(loaded(blocks.ids).logits, ours.logits)
    everything = deployed.to(torch.float32)  # after its copies were laid out in bfloat16
    assert everything(blocks.ids).logits.dtype == torch.float32
    assert torch.isfinite(deployed.bfloat16()(blocks.ids).logits).all(), "also where a user casts what decides"


@pytest.mark.parametrize(("family", "attention"), PRUNED[:3])
def test_fine_tuning(family, attention, blocks):
    """With gradients the whole union runs, masked; the next inference sees what has been learnt."""
    deployed = make_deployed(family, attention=attention)
    with torch.no_grad():
        before = deployed(blocks.ids).logits
    deployed.train()
    learns = [parameter for parameter in deployed.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learns, lr=1e-2)
    losses = []
    for _ in range(4):
        output = deployed(blocks.ids, labels=blocks.ids)
        losses.append(float(output.loss.detach()))
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in learns), "what has no gradient does not ask for one"
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    slow = deployed.eval()(blocks.ids).logits
    with torch.no_grad():
        fast = deployed(blocks.ids).logits
    close(fast, slow.detach())
    assert (fast - before).abs().max() > 0.1
    frozen = {name for name, parameter in deployed.named_parameters() if not parameter.requires_grad}
    assert all(re.search(r"(mlp|self_attn)\.(router|norm|decoder)\.", name) for name in frozen)


def test_gradients_equal_those_of_the_masked_weights(blocks):
    """In the last layer, whose weights hand no straight-through gradient on, and under one expert, whose choice has none either."""
    masked = make_masked("qwen2")
    deployed = lab.export(masked)
    masked.requires_grad_(True)
    gradients = []
    for model in (masked, deployed):
        model.set_routing(1)
        model(blocks.ids, labels=blocks.ids).lm_loss.backward()
        last = decoder_layers(model)[-1]
        gradients.append({name: parameter.grad for name, parameter in last.named_parameters() if parameter.grad is not None})
    theirs, ours = gradients
    masks = masked.layer_masks()[-1]
    union, pairs = masks.experts.any(0), masks.pairs.repeat(2)
    for name in ("gate_proj", "up_proj"):
        close(ours[f"mlp.{name}.weight"], theirs[f"mlp.{name}.weight"][union])
    close(ours["mlp.down_proj.weight"], theirs["mlp.down_proj.weight"][:, union])
    for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"):
        close(ours[f"self_attn.{name}"], theirs[f"self_attn.{name}"].unflatten(0, (-1, WIDTH))[:, pairs].flatten(0, 1))
    for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight"):
        close(ours[f"self_attn.{name}"], theirs[f"self_attn.{name}"])
    assert not ours["mlp.up_proj.weight"][~masks.experts[1, union]].any(), "neurons of other experts have none"


def test_bad_inputs():
    masked = make_tomoe()
    for model, form, complaint in (
        (make_dense(), "tomoe", "export: LlamaForCausalLM is not converted; convert a dense model with lab.convert"),
        (make_converted(), "tomoe", "export: DynaMoELlamaForCausalLM has no masks"),
        (lab.export(masked), "tomoe", "export: ToMoELlamaForCausalLM is deployed already; export the masked model"),
        (lab.export(masked), "mixtral", "is deployed already"),
        (masked, "gguf", "export: form = 'gguf': choose one of tomoe, mixtral"),
        ("smollm2-135m", "tomoe", "export: str is not converted"),
    ):
        with pytest.raises(InputError, match=complaint) as refused:
            lab.export(model, form)
        assert "\n" not in str(refused.value)


def test_configs_that_make_no_model():
    values = {**PICO, "moe": ToMoEConfig(num_experts=E, attention="none").to_dict()}
    config = DEPLOYED_CONFIGS["llama"]
    with pytest.raises(ValueError, match="lacks the deployed sizes"):
        DEPLOYED_CLASSES["llama"](config(**values))
    with pytest.raises(ValueError, match="sizes of 2 and 3 layers, the model has 3"):
        DEPLOYED_CLASSES["llama"](config(**{**values, "moe": {**values["moe"], "union_sizes": [3, 3]}}))
    pruned = {**values["moe"], "attention": "hybrid", "union_sizes": [3] * 3, "qk_pairs": [[0]] * 3}
    with pytest.raises(ValueError, match="heads of qwen3 cannot be pruned"):
        DEPLOYED_CLASSES["qwen3"](DEPLOYED_CONFIGS["qwen3"](**{**values, "head_dim": 16, "moe": pruned}))


def test_extra_parameters_on_llama_2_7b():
    """The paper: 0.27 % of the dense model, here on its shapes without its weights, everything kept."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    moe = {**ToMoEConfig().to_dict(), "union_sizes": [11008] * 32, "qk_pairs": [list(range(64))] * 32}
    with torch.device("meta"):
        dense = LlamaForCausalLM(LlamaConfig(**shape))
        deployed = DEPLOYED_CLASSES["llama"](DEPLOYED_CONFIGS["llama"](**shape, moe=moe))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, deployed)]
    assert counts[0] == 6_738_415_616
    layer = 4096 * 8 + (4096 * 128 + 128) + 2 * 128 + 128 * 128  # MLP router; attention: router and mean embedding, norm, decoder
    assert counts[1] - counts[0] == 32 * layer
    assert f"{(counts[1] - counts[0]) / counts[0]:.2%}" == "0.27%"
