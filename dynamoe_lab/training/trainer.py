"""`transformers.Trainer` with the few things every method here needs: block data, named metrics per step, a guard, and honest resuming.

A method is a subclass that says what learns, at which rates, what to tell of a batch, and what to measure on held-out text.
The metrics of every step go into Trainer's own log history, which its checkpoints hold, so the `steps` frame of a run that was killed and
resumed is whole. Trainer's resume files (optimizer, random state) stay below `output_dir/trainer` and are removed when training has ended.
"""

import dataclasses
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dynamoe_lab.config import TrainSettings
from dynamoe_lab.data import Blocks
from dynamoe_lab.training.resume import complete_checkpoint

__all__ = ["BlockDataset", "MethodTrainer", "TrainingDiverged", "steps_frame", "training_arguments"]


# Of two checkpoints within a second transformers says that the file system's times may be wrong; it then goes by the step, as it should.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not be reliable" not in record.getMessage())


class TrainingDiverged(RuntimeError):
    """The loss became infinite, not a number, or several times what it was; the last good checkpoint is kept."""


class BlockDataset(torch.utils.data.Dataset):
    """Blocks as language-modelling examples: labels are the ids themselves, the model shifts them."""

    def __init__(self, blocks: Blocks):
        self.ids = blocks.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def training_arguments(config: TrainSettings, folder: Path, device: str, *, blocks: int, lr: float, seed: int) -> TrainingArguments:
    """Trainer's arguments for these settings and that many blocks; checkpoints go below `folder`, `seed` is the global generators'.

    Parameter groups have rates of their own; `lr` is that of the first one, for trackers.
    """
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=lr,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter hides a loss that is not finite; we stop on it
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,  # the older one goes only when the newer one is whole
        seed=seed,
        data_seed=config.seed,
        report_to=list(config.report_to) or "none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        # A smaller last batch would weigh as much as a whole one when batches are accumulated; too few blocks for one batch are all used.
        dataloader_drop_last=blocks >= config.batch_size,
        remove_unused_columns=False,
    )


class MethodTrainer(Trainer):
    """Trainer for converted models: a subclass says what learns, its parameter groups, and its metrics of a batch and of held-out text."""

    config_class: ClassVar[type[TrainSettings]]
    metrics: ClassVar[tuple[str, ...]] = ("lm_loss",)  # of a step, in the order of the steps frame
    heldout_metrics: ClassVar[tuple[str, ...]] = ("heldout_loss",)  # their columns of the steps frame
    heldout_always: ClassVar[bool] = False  # whether those columns are there, too, where nothing was measured
    shown: ClassVar[dict[str, str]] = {"lm_loss": "LM loss"}  # metric -> its name in a progress line
    rates: ClassVar[tuple[str, ...]]  # the learning rates among the settings, the first parameter group's first

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Blocks,
        config: TrainSettings,
        folder: Path,
        *,
        heldout: Blocks | None = None,
        progress: bool = True,
    ):
        self.lab_config = config
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._step_tokens = 0  # of this process, in this optimizer step
        device, chosen = (
            next(model.parameters()).device.type,
            {"lr": getattr(config, self.rates[0]), "seed": self.generator_seed(model, config)},
        )
        super().__init__(
            model=model,
            args=training_arguments(config, folder, device, blocks=len(blocks), **chosen),
            train_dataset=BlockDataset(blocks),
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Clock(self))
        self.add_callback(_Guard(config.divergence, [f"{config.section}.{name}" for name in self.rates]))
        if heldout is not None:
            self.add_callback(_HeldOut(self, heldout))  # after the clock, which it must not keep
        if progress:
            self.add_callback(_Progress(config.log_steps, self.shown, blocks))

    @classmethod
    def step_columns(cls, *, heldout: bool) -> list[str]:
        """Columns of the steps frame, `run` aside; `heldout`: whether held-out text is measured."""
        measured = cls.heldout_metrics if heldout or cls.heldout_always else ()
        return ["step", "tokens", "loss", *cls.metrics, *measured, "lr", "seconds"]

    @staticmethod
    def prepare(model: PreTrainedModel) -> None:
        """Freeze what does not learn, and whatever else a model needs before it is trained."""
        raise NotImplementedError

    @staticmethod
    def restore(model: PreTrainedModel) -> None:
        """Undo what `prepare` did beside freezing."""

    @staticmethod
    def generator_seed(model: PreTrainedModel, config: TrainSettings) -> int:
        """Seed of the global generators, from which dropout and noise are drawn."""
        return config.seed

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: dicts with `params` and `lr`. The first group's rate is the `lr` of the steps frame."""
        raise NotImplementedError

    def batch_metrics(self, inputs: dict[str, torch.Tensor], outputs: Any) -> dict[str, torch.Tensor]:
        """Scalars of one batch, which the steps frame shows as means over the step."""
        raise NotImplementedError

    def heldout_values(self, model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The method's measures of held-out ids [B, T], means per token; the model is in eval mode, its routing may be set."""
        raise NotImplementedError

    @torch.no_grad()
    def measure_heldout(self, blocks: Blocks) -> dict[str, torch.Tensor]:
        """`heldout_values` of all blocks, a batch of training at a time; the model is left as it was found. Nothing random is drawn."""
        model = self.accelerator.unwrap_model(self.model)
        was_training, routing = model.training, dataclasses.replace(model.routing)
        model.eval()
        try:
            parts = blocks.ids.to(self.args.device).split(self.args.per_device_train_batch_size)
            values = [{name: value.double() * len(ids) for name, value in self.heldout_values(model, ids).items()} for ids in parts]
        finally:
            for item in dataclasses.fields(routing):  # in place: all layers hold this object
                setattr(model.routing, item.name, getattr(routing, item.name))
            model.train(was_training)
        return {name: torch.stack([part[name] for part in values]).sum() / len(blocks) for name in self.heldout_metrics}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer over the method's parameter groups, each with a learning rate of its own."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            groups = [{"weight_decay": self.args.weight_decay, **group} for group in self.parameter_groups()]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss; keeps the batch's metrics."""
        outputs = model(**inputs)
        self._step_tokens += inputs["input_ids"].numel()
        with torch.no_grad():
            for name, value in self.batch_metrics(inputs, outputs).items():
                self._metrics[name].append(value.detach().float())
        # A per-batch mean: Trainer divides it by the accumulation steps, so that lambda does not change with them.
        self.loss_is_scaled_for_ga = False
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the step's metrics to Trainer's log entry."""
        if self._metrics:
            for name, values in self._metrics.items():
                mean = torch.stack(values).mean()
                if self.args.world_size > 1:
                    mean = self.accelerator.gather(mean.to(self.args.device)).mean()
                logs[name] = mean.item()
            tokens = torch.tensor(self._step_tokens, device=self.args.device)
            logs["step_tokens"] = int(self.accelerator.gather(tokens).sum() if self.args.world_size > 1 else tokens)
            self._metrics.clear()
            self._step_tokens = 0
        super().log(logs, start_time)


def steps_frame(log_history: list[dict[str, float]], run: str, columns: Sequence[str]) -> pd.DataFrame:
    """Table `steps` from Trainer's log history: one row per optimizer step, NaN where nothing was logged; seconds, tokens are cumulative.

    Args:
        columns: see `MethodTrainer.step_columns`.
    """
    rows = [entry for entry in log_history if "step_seconds" in entry]
    frame = pd.DataFrame(rows).rename(columns={"learning_rate": "lr"})
    frame["tokens"] = frame["step_tokens"].cumsum().round().astype("int64")
    frame["seconds"] = frame["step_seconds"].cumsum()
    frame = frame.reindex(columns=list(columns)).reset_index(drop=True)
    frame.insert(0, "run", run)
    return frame


class _Clock(TrainerCallback):
    """Seconds of each optimizer step, saving aside."""

    def __init__(self, trainer: MethodTrainer):
        self._metrics = trainer._metrics
        self._began = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._metrics["step_seconds"] = [torch.tensor(time.perf_counter() - self._began, dtype=torch.float64)]


class _HeldOut(TrainerCallback):
    """Measures held-out text after every so many steps, and after the last."""

    def __init__(self, trainer: MethodTrainer, blocks: Blocks):
        self.trainer, self.blocks = trainer, blocks

    def on_step_end(self, args, state, control, **kwargs):
        every = self.trainer.lab_config.eval_steps
        if state.global_step == state.max_steps or (every and state.global_step % every == 0):
            for name, value in self.trainer.measure_heldout(self.blocks).items():
                self.trainer._metrics[name] = [value]


class _Guard(TrainerCallback):
    """Stops a run whose numbers are no longer numbers, or whose LM loss runs away, before a checkpoint could hold them."""

    def __init__(self, margin: float, rates: Sequence[str], window: int = 10):
        self.margin, self.rates, self.window = margin, rates, window

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_save and not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
            self._stop(state.global_step, "a trained weight is no longer finite", args.output_dir)

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = [entry["lm_loss"] for entry in state.log_history if "lm_loss" in entry]
        latest = [logs[name] for name in ("lm_loss", "loss") if name in (logs or {})]
        if broken := [loss for loss in latest if not math.isfinite(loss)]:
            self._stop(state.global_step, f"the loss is {broken[0]}", args.output_dir)
        if self.margin and len(losses) > self.window:
            means = pd.Series(losses).rolling(self.window).mean().dropna()
            if means.iloc[-1] > means.min() + self.margin:
                self._stop(state.global_step, f"the LM loss rose from {means.min():.3g} to {means.iloc[-1]:.3g} nats", args.output_dir)

    def _stop(self, step: int, reason: str, folder: str) -> None:
        last = complete_checkpoint(Path(folder))
        kept = f"{last.name} is kept" if last is not None else "there is no checkpoint yet"
        lower = " or ".join(self.rates)
        raise TrainingDiverged(f"training stopped at step {step}: {reason}; {kept}; lower {lower} and start again")


class _Progress(TrainerCallback):
    """One line every so many steps: where it is, how fast, how well; and one before them if the text is seen more than once."""

    def __init__(self, every: int, shown: dict[str, str], blocks: Blocks):
        self.every, self.shown, self.blocks = every, shown, blocks

    def on_train_begin(self, args, state, control, **kwargs):
        whole = len(self.blocks)
        batch = min(args.train_batch_size, whole)  # too few blocks for one batch are all used
        passes = state.max_steps * args.gradient_accumulation_steps * args.world_size * batch / whole
        if passes > 1:
            tokens = self.blocks.ids.numel()
            print(f"{state.max_steps} steps are {passes:.3g} passes over {tokens:,} tokens of text, which repeats", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "step_seconds" not in logs or (state.global_step % self.every and state.global_step != state.max_steps):
            return
        recent = [entry for entry in state.log_history[-self.every :] if "step_seconds" in entry]
        seconds = sum(entry["step_seconds"] for entry in recent)
        rate = sum(entry["step_tokens"] for entry in recent) / max(seconds, 1e-9)
        remaining = (state.max_steps - state.global_step) * seconds / len(recent)
        metrics = "  ".join(f"{label} {logs[name]:.3f}" for name, label in self.shown.items() if name in logs)
        print(
            f"step {state.global_step}/{state.max_steps}  {metrics}  {rate:,.0f} tokens/s  {remaining:.0f} s left",
            flush=True,
        )
