"""Training: what learns and what does not, the steps frame, resuming to the same weights, stopping when numbers break."""

import dataclasses
import os
import re
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import make_blocks, make_converted, make_dense, weights

from dynamoe_lab.config import TrainConfig
from dynamoe_lab.errors import InputError
from dynamoe_lab.training import TrainingDiverged, train

CONFIG = TrainConfig(steps=6, batch_size=2, save_steps=2, warmup_steps=1, mlp_lr=1e-3, router_lr=1e-2)
COLUMNS = ["run", "step", "tokens", "loss", "lm_loss", "router_loss", "router_accuracy", "active_mlp_fraction", "lr", "seconds"]


def test_only_mlps_and_routers_learn(family, tmp_path):
    model = make_converted(family)
    before = weights(model)
    train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    learnable = {name for name in before if ".mlp." in name or ".fc1." in name or ".fc2." in name}
    assert changed == learnable
    assert all(p.requires_grad for p in model.parameters()), "training gives back the flags it found"
    assert not model.training
    assert model.config.use_cache


def test_steps_frame(tmp_path):
    steps = train(make_converted(), make_blocks(16), CONFIG, output_dir=tmp_path, run="here", progress=False)
    assert list(steps.columns) == COLUMNS
    assert steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert steps["tokens"].tolist() == [2 * 24 * step for step in range(1, 7)]
    assert steps["run"].unique().tolist() == ["here"]
    assert steps["router_accuracy"].between(0, 1).all()
    assert steps["active_mlp_fraction"].between(0.25, 1).all()
    assert steps["seconds"].is_monotonic_increasing
    assert (steps["loss"] - (0.2 * steps["lm_loss"] + steps["router_loss"])).abs().max() < 1e-4


def test_the_router_learns_its_labels(tmp_path):
    config = TrainConfig(steps=60, batch_size=8, save_steps=100, warmup_steps=2, mlp_lr=0.0, router_lr=2e-2)
    model = make_converted(lambda_lm=0.0)
    steps = train(model, make_blocks(8), config, output_dir=tmp_path, progress=False)
    first, last = steps["router_accuracy"].iloc[:5].mean(), steps["router_accuracy"].iloc[-5:].mean()
    assert last > first + 0.2


def test_rates_are_separate(tmp_path):
    model = make_converted()
    before = weights(model)
    config = TrainConfig(steps=2, batch_size=2, warmup_steps=0, mlp_lr=0.0, router_lr=1e-2)
    train(model, make_blocks(8), config, output_dir=tmp_path, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed
    assert all(".router." in name for name in changed)


def test_accumulated_steps_equal_one_batch_through_trainer(tmp_path):
    """4 x 2 accumulated and 1 x 8 give the same step: loss and weights."""
    results = []
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        model = make_converted()
        config = TrainConfig(steps=1, batch_size=batch, accumulation=accumulation, warmup_steps=0, mlp_lr=1e-3, router_lr=1e-3)
        steps = train(model, make_blocks(8), config, output_dir=tmp_path / name, progress=False)
        results.append((steps.drop(columns="seconds"), weights(model)))
    (whole_steps, whole), (parts_steps, parts) = results
    pd.testing.assert_frame_equal(whole_steps, parts_steps, rtol=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-4, rtol=1e-3)


def test_finished_folder_is_read_back(tmp_path):
    model = make_converted()
    steps = train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    again = make_converted()
    pd.testing.assert_frame_equal(train(again, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False), steps)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights(model).items())
    assert again.config.moe == model.config.moe
    assert again.config.moe["trained_tokens"] == 6 * 2 * 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "steps.parquet", "train.json"]


def test_no_steps_leave_the_model_as_it_was_converted(tmp_path):
    model = make_converted()
    before = weights(model)
    for _ in range(2):  # the second call reads the folder back
        steps = train(model, make_blocks(), TrainConfig(steps=0), output_dir=tmp_path, progress=False)
        assert list(steps.columns) == COLUMNS
        assert len(steps) == 0
        assert steps["tokens"].sum() == 0
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    loaded = type(model).from_pretrained(tmp_path / "checkpoint")
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    assert loaded.config.moe["trained_tokens"] == 0


@pytest.mark.parametrize("route", [1, "full"])
def test_a_static_route_trains_its_width_and_leaves_routers(route, tmp_path):
    """The static control: neurons beyond the prefix and, with lambda_router = 0, the routers stay bit for bit."""
    model = make_converted(train_route=route, lambda_router=0.0, lambda_lm=1.0)
    model.set_routing("label")
    before, width = weights(model), 48 if route == 1 else 96
    steps = train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    assert (steps["active_mlp_fraction"] - width / 96).abs().max() < 1e-6
    assert model.routing.mode == "label", "training does not touch what was chosen for evaluation"
    for name, value in model.state_dict().items():
        neurons = 1 if "down_proj" in name else 0
        if ".router." in name or ".mlp." not in name:
            assert torch.equal(value, before[name]), name
        else:
            trained, was = value.split([width, 96 - width], dim=neurons), before[name].split([width, 96 - width], dim=neurons)
            assert not torch.equal(trained[0], was[0])
            assert torch.equal(trained[1], was[1])


def test_frozen_copies_survive_training_and_its_checkpoint(family, tmp_path, blocks):
    model = make_converted(family, label_target="frozen")
    before = weights(model)
    train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    frozen = {name for name in before if ".frozen." in name}
    assert frozen
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in frozen)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint").eval()
    with torch.no_grad():
        ours, theirs = (each(blocks.ids, output_router_logits=True).similarities for each in (loaded, model))
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(make_converted(), make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    with pytest.raises(InputError, match=r"other inputs: dynamoe\.theta 0\.7 then, 0\.5 now; choose another output_dir"):
        train(make_converted(theta=0.5), make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    with pytest.raises(InputError, match=r"other inputs: train\.steps 6 then, 9 now"):
        train(make_converted(), make_blocks(16), dataclasses.replace(CONFIG, steps=9), output_dir=tmp_path, progress=False)
    with pytest.raises(InputError, match="other inputs: another training text;"):
        train(make_converted(), make_blocks(16, seed=9), CONFIG, output_dir=tmp_path, progress=False)
    other = make_converted(dense=make_dense(attention_bias=False, initializer_range=0.1))
    before = weights(other)
    with pytest.raises(InputError, match="other inputs"):
        train(other, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_bad_inputs(tmp_path):
    with pytest.raises(InputError, match="no routers"):
        train(make_dense(), make_blocks(), CONFIG, output_dir=tmp_path)
    with pytest.raises(InputError, match="no blocks"):
        train(make_converted(), torch.zeros(0, 8, dtype=torch.long), CONFIG, output_dir=tmp_path)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    from dynamoe_lab.training import dynamoe

    original = dynamoe.DynaMoETrainer.compute_loss

    def breaks_at_step_four(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 3:
            self._metrics["lm_loss"] = [torch.tensor(float("nan"))]
        return loss

    monkeypatch.setattr(dynamoe.DynaMoETrainer, "compute_loss", breaks_at_step_four)
    with pytest.raises(TrainingDiverged, match=r"step 4.*nan.*checkpoint-2 is kept.*lower train.mlp_lr"):
        train(make_converted(), make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    assert [path.name for path in (tmp_path / "trainer").glob("checkpoint-*")] == ["checkpoint-2"]


def test_weights_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    from dynamoe_lab.training import dynamoe

    original = dynamoe.DynaMoETrainer.compute_loss

    def spoils_a_weight(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 3:
            with torch.no_grad():
                model.nested_mlps()[0].router.get_submodule("0").weight[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(dynamoe.DynaMoETrainer, "compute_loss", spoils_a_weight)
    with pytest.raises(TrainingDiverged, match="checkpoint-2 is kept"):
        train(make_converted(), make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)


def test_an_absurd_rate_ends_in_a_message(tmp_path):
    """A rate that overflows float32: no injected number, the real thing."""
    config = TrainConfig(steps=60, batch_size=2, warmup_steps=10, mlp_lr=1e30, router_lr=1e30, max_grad_norm=0.0)
    with pytest.raises(TrainingDiverged, match=r"(finite|loss is (nan|inf)).*lower train.mlp_lr"):
        train(make_converted(), make_blocks(16), config, output_dir=tmp_path, progress=False)


def test_a_loss_that_runs_away_stops(tmp_path, monkeypatch):
    """It falls to 3 nats, then climbs 0.2 a step: stopped when ten steps are on average a nat above the best ten."""
    from dynamoe_lab.training import dynamoe

    original = dynamoe.DynaMoETrainer.compute_loss

    def climbs(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        self._metrics["lm_loss"] = [torch.tensor(3.0 + 0.2 * abs(self.state.global_step - 20))]
        return loss

    monkeypatch.setattr(dynamoe.DynaMoETrainer, "compute_loss", climbs)
    with pytest.raises(TrainingDiverged, match=r"step 34: the LM loss rose from 3.5 to 4.7"):
        train(make_converted(), make_blocks(16), TrainConfig(steps=60, batch_size=2), output_dir=tmp_path, progress=False)


def test_a_noisy_loss_does_not_stop(tmp_path):
    config = TrainConfig(steps=40, batch_size=1, mlp_lr=1e-4)
    assert len(train(make_converted(), make_blocks(64), config, output_dir=tmp_path, progress=False)) == 40


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_killed_between_the_last_step_and_the_result(tmp_path, monkeypatch, schedule):
    """The last checkpoint is there, the result is not: the next call takes no step more."""
    from dynamoe_lab.training import run as running

    config = TrainConfig(steps=6, batch_size=2, save_steps=3, mlp_lr=1e-3, schedule=schedule, warmup_steps=0)
    whole = make_converted()
    expected = train(whole, make_blocks(15), config, output_dir=tmp_path / "whole", progress=False)
    publish = running._publish
    monkeypatch.setattr(running, "_publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(make_converted(), make_blocks(15), config, output_dir=tmp_path / "killed", progress=False)
    monkeypatch.setattr(running, "_publish", publish)
    model = make_converted()
    steps = train(model, make_blocks(15), config, output_dir=tmp_path / "killed", progress=False)
    pd.testing.assert_frame_equal(steps.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights(whole).items())
    assert model.config.moe == whole.config.moe


def test_tokens_are_those_that_were_seen(tmp_path):
    """Five blocks in batches of four: the fifth alone would weigh as much as four, so each epoch leaves one block out."""
    steps = train(make_converted(), make_blocks(5), TrainConfig(steps=3, batch_size=4), output_dir=tmp_path / "a", progress=False)
    assert steps["tokens"].tolist() == [96, 192, 288]
    steps = train(make_converted(), make_blocks(3), TrainConfig(steps=2, batch_size=4), output_dir=tmp_path / "b", progress=False)
    assert steps["tokens"].tolist() == [72, 144]


def test_training_is_routed_by_the_routers_whatever_was_set(tmp_path):
    model = make_converted()
    model.set_routing("full")
    steps = train(model, make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)
    assert (steps["active_mlp_fraction"] < 1).all()
    assert model.routing.mode == "full"


def test_settings_that_trainer_refuses(tmp_path):
    with pytest.raises(InputError, match="schedule = 'cosin': choose one of"):
        TrainConfig(schedule="cosin")
    with pytest.raises(InputError, match="mlp_lr = nan"):
        TrainConfig(mlp_lr=float("nan"))
    with pytest.raises(InputError, match="nosuchtracker"):
        train(make_converted(), make_blocks(), TrainConfig(report_to=["nosuchtracker"]), output_dir=tmp_path)


def test_progress_lines(tmp_path, capsys):
    train(make_converted(), make_blocks(16), TrainConfig(steps=4, batch_size=2, log_steps=2, warmup_steps=0), output_dir=tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert all(word in lines[-1] for word in ("LM loss", "accuracy", "active", "tokens/s"))


def test_text_that_repeats_is_told(tmp_path, capsys):
    """8 blocks of 24 tokens; too few for one batch are one batch."""
    for blocks, steps, expected in ((8, 4, ""), (8, 6, "1.5 passes over 192 tokens"), (1, 3, "3 passes over 24 tokens")):
        config = TrainConfig(steps=steps, batch_size=1, accumulation=2 if blocks > 1 else 1, warmup_steps=0)
        train(make_converted(), make_blocks(blocks), config, output_dir=tmp_path / f"{blocks}-{steps}")
        told = [line for line in capsys.readouterr().out.splitlines() if "passes" in line]
        assert told == ([f"{steps} steps are {expected} of text, which repeats"] if expected else [])


def _stopped_after(folder, monkeypatch) -> None:
    """Train until the result would be published; what is left is the last checkpoint."""
    from dynamoe_lab.training import run as running

    publish = running._publish
    monkeypatch.setattr(running, "_publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(make_converted(), make_blocks(16), CONFIG, output_dir=folder, progress=False)
    monkeypatch.setattr(running, "_publish", publish)
    (last,) = (folder / "trainer").glob("checkpoint-*")
    assert last.name == "checkpoint-6"


DAMAGES = {
    "a state cut off": lambda folder: _cut(folder / "trainer_state.json"),
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "a state that is none": lambda folder: (folder / "trainer_state.json").write_text("[]"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut off": lambda folder: _cut(folder / "model.safetensors"),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "an optimizer cut off": lambda folder: _cut(folder / "optimizer.pt"),
    "no schedule": lambda folder: (folder / "scheduler.pt").unlink(),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_only_a_whole_checkpoint_is_resumed(tmp_path, monkeypatch, capsys):
    """Damaged in any way, a checkpoint goes with one line on stderr, and the older whole one is taken; a whole one stays."""
    from dynamoe_lab.training.resume import complete_checkpoint

    _stopped_after(tmp_path / "run", monkeypatch)
    whole = tmp_path / "run" / "trainer" / "checkpoint-6"
    capsys.readouterr()
    assert complete_checkpoint(whole.parent) == whole
    assert capsys.readouterr().err == ""
    for name, damage in DAMAGES.items():
        place = tmp_path / name
        shutil.copytree(whole, place / "checkpoint-4")
        shutil.copytree(whole, place / "checkpoint-6")
        damage(place / "checkpoint-6")
        assert complete_checkpoint(place) == place / "checkpoint-4", name
        assert re.fullmatch(r"removed the incomplete checkpoint checkpoint-6 \(.+\)\n", capsys.readouterr().err), name
        assert [path.name for path in place.iterdir()] == ["checkpoint-4"]
    damage(place / "checkpoint-4")
    assert complete_checkpoint(place) is None
    assert not list(place.iterdir())


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(tmp_path, monkeypatch):
    """Too many open files, a disk that went away: none of that says that the checkpoint is not whole."""
    from dynamoe_lab.training.resume import complete_checkpoint

    _stopped_after(tmp_path / "run", monkeypatch)
    whole = tmp_path / "run" / "trainer" / "checkpoint-6"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else pytest.skip("no /proc")
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened - 1, limits[1]))
    try:
        with pytest.raises(InputError, match=r"checkpoint-\d: cannot be read \(.*Too many open files"):
            complete_checkpoint(whole.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert complete_checkpoint(whole.parent) == whole


def test_a_damaged_checkpoint_is_trained_again_to_the_same_weights(tmp_path, monkeypatch, capsys):
    whole = make_converted()
    expected = train(whole, make_blocks(16), CONFIG, output_dir=tmp_path / "whole", progress=False)
    _stopped_after(tmp_path / "killed", monkeypatch)
    (tmp_path / "killed" / "trainer" / "checkpoint-6" / "optimizer.pt").unlink()  # Trainer would go on without and say nothing
    model = make_converted()
    steps = train(model, make_blocks(16), CONFIG, output_dir=tmp_path / "killed", progress=False)
    assert "removed the incomplete checkpoint checkpoint-6 (no optimizer.pt)\n" in capsys.readouterr().err
    pd.testing.assert_frame_equal(steps.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights(whole).items())


def test_a_claim_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "train.json").write_text('{"config": ')
    with pytest.raises(InputError, match=r"train\.json cannot be read.*choose another output_dir or remove it"):
        train(make_converted(), make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)


def test_one_call_at_a_time_trains_in_a_folder(tmp_path, capsys):
    """The second one waits, says for what, and reads back what the first one made; a process of one training's many does not wait."""
    models, frames = [make_converted(), make_converted()], {}

    def call(number: int) -> None:
        frames[number] = train(models[number], make_blocks(16), CONFIG, output_dir=tmp_path, progress=False)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, range(2)))
    pd.testing.assert_frame_equal(frames[0], frames[1])  # seconds, too: one of them was read
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in weights(models[0]).items())
    assert f"waiting for the training in {tmp_path.name}/, held by pid {os.getpid()}\n" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "steps.parquet", "train.json"]
