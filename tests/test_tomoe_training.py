"""Training of ToMoE: what learns and what never does, the steps frame, held-out KL, resuming to the same weights, one step from parts."""

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_blocks, make_converted, make_dense, make_tomoe, weights

from dynamoe_lab.config import ToMoETrainConfig, TrainConfig
from dynamoe_lab.errors import InputError
from dynamoe_lab.training import TrainingDiverged, train
from dynamoe_lab.training.tomoe import ToMoETrainer
from dynamoe_lab.workbench.steps import run_step

CONFIG = ToMoETrainConfig(steps=6, batch_size=2, save_steps=2, lr=1e-2)
COLUMNS = ["run", "step", "tokens", "loss", "lm_loss", "kl_loss", "ratio_loss", "union_loss", "balance_loss"]
COLUMNS += ["active_ratio_max", "active_ratio_mean", "union_coverage", "heldout_kl", "open_ratio", "open_union", "lr", "seconds"]


def make_closing(**changes):
    """A masked model with about a third of everything closed, so that every loss has something to say from the first step on."""
    return make_tomoe(mask_offset=0.2, **changes)


def assert_equal_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "opt"])
def test_no_weight_of_the_dense_model_changes(family, tmp_path):
    """Bit for bit; all that ToMoE adds learns, z alone stays as it was drawn."""
    model, dense = make_closing(family=family), make_dense(family)
    before = weights(model)
    train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in dense.state_dict().items())
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert changed == before.keys() - dense.state_dict().keys() - {"hypernetwork.z"}
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == changed, "what is frozen stays frozen after training"
    assert not model.training
    assert model.config.use_cache
    assert all(parameter.grad is None for parameter in model.parameters())


def test_z_learns_only_if_it_is_told(tmp_path):
    model = make_closing(train_z=True)
    before = model.hypernetwork.z.clone()
    train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    assert not torch.equal(before, model.hypernetwork.z)


def test_steps_frame(tmp_path):
    model = make_closing()
    steps = train(model, make_blocks(16), CONFIG, output_dir=tmp_path, run="here", progress=False)
    assert list(steps.columns) == COLUMNS
    assert steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert steps["tokens"].tolist() == [2 * 24 * step for step in range(1, 7)]
    assert steps["run"].unique().tolist() == ["here"]
    assert (steps["lr"] == 1e-2).all(), "no schedule"
    heldout = ["heldout_kl", "open_ratio", "open_union"]
    assert steps[heldout].isna().all(axis=None)
    assert steps.drop(columns=["run", *heldout]).notna().all(axis=None)
    assert steps["active_ratio_mean"].between(0, steps["active_ratio_max"]).all()
    assert steps["union_coverage"].between(0, 1).all()
    terms = {"kl_loss": model.moe.lambda_kl, "ratio_loss": model.moe.lambda_ratio}
    terms |= {"union_loss": model.moe.lambda_union, "balance_loss": model.moe.lambda_balance}
    whole = sum(weight * steps[name] for name, weight in terms.items())
    assert (steps["loss"] - whole).abs().max() < 1e-3


def test_the_ratio_falls_towards_p(tmp_path):
    """And the LM loss may rise by nats meanwhile: nothing stops it."""
    config = ToMoETrainConfig(steps=60, batch_size=4, save_steps=100, lr=2e-2)
    model = make_tomoe(p=0.5)
    steps = train(model, make_blocks(16), config, output_dir=tmp_path, progress=False)
    assert steps["active_ratio_max"].iloc[0] > 0.98
    assert abs(steps["active_ratio_max"].iloc[-5:].mean() - 0.5) < 0.1
    open_share = torch.stack([layer.experts.float().mean() for layer in model.layer_masks()]).mean()
    assert open_share < 0.8, "what was learnt holds without noise"


# --- held-out text ------------------------------------------------------------------------------------------------------------------


def test_heldout_kl_is_that_of_the_dense_model(tmp_path):
    """The last value against an independent computation; the others stand at their steps; the clock does not count them."""
    heldout, dense, model = make_blocks(6, seed=5), make_dense(), make_closing()
    config = ToMoETrainConfig(steps=5, batch_size=4, eval_steps=2, lr=1e-2)
    steps = train(model, make_blocks(16), config, output_dir=tmp_path, heldout=heldout, progress=False)
    assert steps["step"][steps["heldout_kl"].notna()].tolist() == [2, 4, 5]
    with torch.no_grad():
        wanted, given = (each(heldout.ids).logits.double().log_softmax(-1) for each in (dense, model))
    expected = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
    assert steps["heldout_kl"].iloc[-1] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


@pytest.mark.parametrize("attention", ["hybrid", "none"])
def test_what_is_open_without_noise_is_measured_on_held_out_text(tmp_path, attention):
    """From the masks and each token's choices in words; with a last batch that is smaller, and text whose tokens differ."""
    heldout, model = make_blocks(6, seed=5), make_closing(attention=attention)
    config = ToMoETrainConfig(steps=3, batch_size=4, eval_steps=2, lr=1e-2)
    steps = train(model, make_blocks(16), config, output_dir=tmp_path, heldout=heldout, progress=False)
    measured = steps[["open_ratio", "open_union"]].notna().all(axis=1)
    assert steps["step"][measured].tolist() == steps["step"][steps["heldout_kl"].notna()].tolist() == [2, 3]
    masks = model.layer_masks()
    with torch.no_grad():
        output = model(heldout.ids, output_router_logits=True)
    parts, whole = 0.0, 0
    for layer, opened, experts in zip(masks, output.open_values, output.experts, strict=True):
        values, pairs = opened.mean().item() * 16, 16 if layer.pairs is None else 2 * layer.pairs.sum().item()
        parts += 64 * (6 * (values + pairs) + 3 * layer.experts.sum(-1)[experts].float().mean().item())
        whole += 64 * (6 * 32 + 3 * 96)
    assert steps["open_ratio"].iloc[-1] == pytest.approx(parts / whole, rel=1e-5)
    union = torch.stack([layer.experts.any(0).float().mean() for layer in masks]).mean().item()
    assert steps["open_union"].iloc[-1] == pytest.approx(union, rel=1e-6)
    assert parts < 0.95 * whole
    assert steps["open_ratio"].iloc[-1] != steps["active_ratio_mean"].iloc[-1]


def test_measuring_changes_nothing(tmp_path):
    """Noise and weights are those of a run without, whatever routing the model was left with."""
    models = [make_closing() for _ in range(2)]
    models[1].set_routing(1)
    config = ToMoETrainConfig(**{**vars(CONFIG), "eval_steps": 2})
    train(models[0], make_blocks(16), CONFIG, output_dir=tmp_path / "a", progress=False)
    steps = train(models[1], make_blocks(16), config, output_dir=tmp_path / "b", heldout=make_blocks(4, seed=5), progress=False)
    assert_equal_weights(*models)
    assert (models[1].routing.mode, models[1].routing.expert) == ("fixed", 1)
    routed = make_closing()
    again = train(routed, make_blocks(16), config, output_dir=tmp_path / "c", heldout=make_blocks(4, seed=5), progress=False)
    assert again["heldout_kl"].equals(steps["heldout_kl"]), "measured as its routers route it"


def test_some_of_the_heldout_blocks_will_do(tmp_path):
    heldout = make_blocks(6, seed=5)
    some = ToMoETrainConfig(steps=1, eval_blocks=2, lr=1e-2)
    steps = train(make_closing(), make_blocks(16), some, output_dir=tmp_path / "a", heldout=heldout, progress=False)
    every = ToMoETrainConfig(steps=1, lr=1e-2)
    same = train(make_closing(), make_blocks(16), every, output_dir=tmp_path / "b", heldout=heldout[:2].ids, progress=False)
    assert steps["heldout_kl"].equals(same["heldout_kl"])
    assert steps["heldout_kl"].notna().all(), "without eval_steps it is measured after the last step"


@pytest.mark.parametrize("route", ["router", 1])
def test_a_dynamoe_model_measures_its_loss_the_way_it_learns(tmp_path, route):
    from dynamoe_lab.evaluation import document_losses

    heldout, model = make_blocks(5, seed=5), make_converted(train_route=route)
    config = TrainConfig(steps=3, batch_size=2, eval_steps=2)
    steps = train(model, make_blocks(16), config, output_dir=tmp_path, heldout=heldout, progress=False)
    assert list(steps.columns)[-3:] == ["heldout_loss", "lr", "seconds"]
    assert steps["heldout_loss"].notna().tolist() == [False, True, True]
    assert model.routing.mode == "router"
    model.set_routing(route)
    losses = document_losses(model, heldout)
    assert steps["heldout_loss"].iloc[-1] == pytest.approx(losses["nll"].sum() / losses["tokens"].sum(), rel=1e-5)


# --- one step -----------------------------------------------------------------------------------------------------------------------


def test_accumulated_steps_equal_one_batch(tmp_path, monkeypatch):
    """4 x 2 accumulated and 1 x 8 give the same step wherever that can be: for the terms that are means over tokens, or of masks alone.

    Noise is drawn per forward, so four small forwards see other masks than one large one: here it is 0. And two terms are no means over
    tokens: R_L multiplies two means over the batch, and R_P takes the largest width over its tokens where attention is masked per token;
    both see what one forward sees, as batches on several devices do. They are left out here, by lambda_balance = 0 and attention "none".
    """
    results = []
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        model = make_closing(attention="none", lambda_balance=0.0)
        model.noise.gumbel = lambda shape, device: torch.zeros(shape, device=device)
        config = ToMoETrainConfig(steps=1, batch_size=batch, accumulation=accumulation, lr=1e-3)
        steps = train(model, make_blocks(8), config, output_dir=tmp_path / name, progress=False)
        results.append((steps.drop(columns=["seconds", "balance_loss"]), weights(model)))
    (whole_steps, whole), (parts_steps, parts) = results
    assert whole_steps["kl_loss"].item() > 1e-3
    pd.testing.assert_frame_equal(whole_steps, parts_steps, rtol=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("attention", ["hybrid", "dynamic", "none"])
def test_activations_may_be_computed_twice(attention, tmp_path):
    """Gradient checkpointing draws the same noise again: the same weights."""
    results = []
    for checkpointing in (False, True):
        model = make_closing(attention=attention)
        config = ToMoETrainConfig(steps=3, batch_size=3, lr=1e-2, gradient_checkpointing=checkpointing)
        steps = train(model, make_blocks(16), config, output_dir=tmp_path / str(checkpointing), progress=False)
        results.append((steps.drop(columns="seconds"), weights(model)))
        assert not model.is_gradient_checkpointing
    pd.testing.assert_frame_equal(results[0][0], results[1][0], rtol=1e-4)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_seeds_of_the_noise_and_of_the_order_are_apart(tmp_path, monkeypatch):
    seen = []
    original = ToMoETrainer.compute_loss

    def noting(self, model, inputs, *args, **kwargs):
        state = torch.get_rng_state()
        seen.append((inputs["input_ids"].tolist(), torch.rand(1).item()))
        torch.set_rng_state(state)
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ToMoETrainer, "compute_loss", noting)
    runs = {}
    for noise in (0, 1):
        for order in (0, 1):
            seen.clear()
            torch.manual_seed(100 + noise + 2 * order)  # what was drawn before does not matter
            config = ToMoETrainConfig(steps=2, batch_size=2, seed=order)
            train(make_tomoe(seed=noise), make_blocks(16), config, output_dir=tmp_path / f"{noise}{order}", progress=False)
            runs[noise, order] = [list(part) for part in zip(*seen, strict=True)]
    for noise in (0, 1):
        assert runs[noise, 0][0] != runs[noise, 1][0]
        assert runs[noise, 0][1] == runs[noise, 1][1]
    for order in (0, 1):
        assert runs[0, order][0] == runs[1, order][0]
        assert runs[0, order][1] != runs[1, order][1]


# --- the folder ---------------------------------------------------------------------------------------------------------------------


def test_a_trained_model_is_saved_and_read_back(tmp_path, blocks):
    model = make_closing()
    steps = train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    assert model.config.moe["trained_tokens"] == 6 * 2 * 24
    loaded = type(model).from_pretrained(tmp_path / "checkpoint").eval()
    assert loaded.config.moe == model.config.moe
    assert_equal_weights(loaded, model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(blocks.ids).logits, model(blocks.ids).logits)
    for ours, theirs in zip(model.layer_masks(), loaded.layer_masks(), strict=True):
        assert torch.equal(ours.experts, theirs.experts)
        assert torch.equal(ours.pairs, theirs.pairs)
    again = make_closing()
    pd.testing.assert_frame_equal(train(again, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False), steps)
    assert_equal_weights(again, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "steps.parquet", "train.json"]


def test_training_goes_on_from_a_trained_model(tmp_path):
    model = make_closing()
    for part in ("first", "second"):
        train(model, make_blocks(16), CONFIG, output_dir=tmp_path / part, progress=False)
    assert model.config.moe["trained_tokens"] == 2 * 6 * 2 * 24


def test_a_half_precision_model_learns_in_float32(tmp_path):
    model = make_tomoe(dense=make_dense(dtype="bfloat16"), mask_offset=0.2)
    steps = train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    assert steps["loss"].notna().all()
    assert model.dtype == torch.bfloat16
    assert {value.dtype for name, value in model.state_dict().items() if "hypernetwork" in name or "decoder" in name} == {torch.float32}
    again = make_tomoe(dense=make_dense(dtype="bfloat16"), mask_offset=0.2)
    train(again, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    assert_equal_weights(again, model)


def test_no_steps_leave_the_model_as_it_was_converted(tmp_path):
    model = make_closing()
    before = weights(model)
    for _ in range(2):  # the second call reads the folder back
        steps = train(model, make_blocks(), ToMoETrainConfig(steps=0), output_dir=tmp_path, progress=False)
        assert list(steps.columns) == COLUMNS
        assert len(steps) == 0
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model).from_pretrained(tmp_path / "checkpoint").config.moe["trained_tokens"] == 0


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(make_closing(), make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    others = [
        (make_closing(p=0.4), make_blocks(16), CONFIG, {}),
        (make_closing(seed=1), make_blocks(16), CONFIG, {}),
        (make_closing(), make_blocks(16, seed=9), CONFIG, {}),
        (make_closing(), make_blocks(16), ToMoETrainConfig(**{**vars(CONFIG), "lr": 1e-3}), {}),
        (make_closing(), make_blocks(16), CONFIG, {"heldout": make_blocks(2)}),
    ]
    for model, blocks, config, options in others:
        with pytest.raises(InputError, match="other inputs"):
            train(model, blocks, config, output_dir=tmp_path, progress=False, **options)


def test_bad_inputs(tmp_path):
    with pytest.raises(InputError, match=r"ToMoEMaskedLlamaForCausalLM needs a ToMoETrainConfig, not a TrainConfig"):
        train(make_tomoe(), make_blocks(), TrainConfig(steps=1), output_dir=tmp_path)
    with pytest.raises(InputError, match=r"DynaMoELlamaForCausalLM needs a TrainConfig, not a ToMoETrainConfig"):
        train(make_converted(), make_blocks(), CONFIG, output_dir=tmp_path)
    with pytest.raises(InputError, match=r"tomoe_train\.eval_steps = 2, but there is no held-out text"):
        train(make_tomoe(), make_blocks(), ToMoETrainConfig(eval_steps=2), output_dir=tmp_path)
    with pytest.raises(InputError, match=r"train\.eval_steps = 2, but there is no held-out text"):
        train(make_converted(), make_blocks(), TrainConfig(eval_steps=2), output_dir=tmp_path)
    with pytest.raises(InputError, match="heldout: no blocks"):
        train(make_tomoe(), make_blocks(), CONFIG, heldout=torch.zeros(0, 8, dtype=torch.long), output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_deployed_model_has_nothing_to_learn(tmp_path):
    from dynamoe_lab.conversion import export

    with pytest.raises(InputError, match="is deployed, its masks are fixed; train the masked model"):
        train(export(make_closing()), make_blocks(), CONFIG, output_dir=tmp_path)


def test_a_loss_that_is_no_number_stops(tmp_path, monkeypatch):
    original = ToMoETrainer.compute_loss

    def breaks_at_step_three(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(ToMoETrainer, "compute_loss", breaks_at_step_three)
    with pytest.raises(TrainingDiverged, match=r"step 3: the loss is nan.*checkpoint-2 is kept.*lower tomoe_train\.lr and start"):
        train(make_tomoe(), make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)


def test_progress_lines(tmp_path, capsys):
    train(make_tomoe(), make_blocks(16), ToMoETrainConfig(steps=4, batch_size=2, log_steps=2), output_dir=tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert all(word in lines[-1] for word in ("KL", "active", "at most", "union", "tokens/s"))


def test_how_it_is_watched_is_not_in_its_key(tmp_path):
    def step(config, **options):
        return run_step(train, (make_closing(), make_blocks(16), config), options, home=tmp_path)

    assert not step(CONFIG).cached
    watched = ToMoETrainConfig(**{**vars(CONFIG), "log_steps": 1, "report_to": ["none"]})
    assert step(watched, progress=False).cached
    for change in ({"lr": 1e-3}, {"eval_blocks": 2}, {"seed": 1}):
        assert not step(ToMoETrainConfig(**{**vars(CONFIG), **change}), progress=False).cached
    assert not step(CONFIG, heldout=make_blocks(2), progress=False).cached


# --- stopped and killed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["hybrid", "dynamic"])
def test_stopped_training_goes_on_with_the_same_noise(attention, tmp_path, monkeypatch):
    """Stopped within step 4, resumed from step 2: bit for bit the weights and the frame of a run that was not."""
    heldout, config = make_blocks(2, seed=5), ToMoETrainConfig(**{**vars(CONFIG), "eval_steps": 2})
    whole = make_closing(attention=attention)
    expected = train(whole, make_blocks(16), config, output_dir=tmp_path / "whole", heldout=heldout, progress=False)
    original = ToMoETrainer.compute_loss

    def interrupted(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ToMoETrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(make_closing(attention=attention), make_blocks(16), config, output_dir=tmp_path / "b", heldout=heldout, progress=False)
    model = make_closing(attention=attention)
    torch.manual_seed(77)
    steps = train(model, make_blocks(16), config, output_dir=tmp_path / "b", heldout=heldout, progress=False)
    assert_equal_weights(model, whole)
    pd.testing.assert_frame_equal(steps.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert model.config.moe == whole.config.moe


def test_killed_between_the_last_step_and_the_result(tmp_path, monkeypatch):
    from dynamoe_lab.training import run as running

    whole = make_closing()
    expected = train(whole, make_blocks(16), CONFIG, output_dir=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(running, "_publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(make_closing(), make_blocks(16), CONFIG, output_dir=tmp_path / "killed", progress=False)
    model = make_closing()
    steps = train(model, make_blocks(16), CONFIG, output_dir=tmp_path / "killed", progress=False)
    assert_equal_weights(model, whole)
    pd.testing.assert_frame_equal(steps.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert model.config.moe == whole.config.moe
