"""A method's training beside plain fine-tuning of the same model's MLP weights: the same batch, the same Trainer, steps in turn."""

import time
from pathlib import Path
from typing import Any

import torch
from results import GOALS, result
from torch import Tensor
from transformers import PreTrainedModel

from dynamoe_lab.config import TrainConfig
from dynamoe_lab.data import as_blocks
from dynamoe_lab.models import decoder_layers, family_of
from dynamoe_lab.training.run import TRAINERS
from dynamoe_lab.training.trainer import MethodTrainer

__all__ = ["FineTuning", "OneStep", "make_trainer", "tomoe_train_rate", "train_rate"]


class FineTuning(MethodTrainer):
    """Plain fine-tuning of a dense model's MLPs, with the loop, batches and optimizer of the methods' training."""

    config_class = TrainConfig
    rates = ("mlp_lr",)

    @staticmethod
    def prepare(model):
        family = family_of(model.config.model_type)
        model.requires_grad_(False)
        for layer in decoder_layers(model):
            for name in family.projections:
                getattr(family.holder(layer), name).requires_grad_(True)

    def parameter_groups(self):
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad], "lr": self.lab_config.mlp_lr}]

    def batch_metrics(self, inputs, outputs):
        return {"lm_loss": outputs.loss}


def make_trainer(model: PreTrainedModel, ids: Tensor, folder: Path, *, steps: int) -> MethodTrainer:
    """A trainer of a dense or converted model on blocks [n, T], all in one batch; gradients only for what its method trains."""
    kind = next((trainer for mixin, trainer in TRAINERS.items() if isinstance(model, mixin)), FineTuning)
    config = kind.config_class(steps=steps, batch_size=len(ids), save_steps=steps, warmup_steps=0)
    model.config.use_cache = False  # as `lab.train` does
    kind.prepare(model)
    trainer = kind(model, as_blocks(ids), config, folder, progress=False)
    trainer.args.save_strategy = "no"
    return trainer


class OneStep:
    """Calling it does one step of a trainer's loop: loss, backward, clipping, AdamW; so that the steps of two trainers can alternate."""

    def __init__(self, trainer: MethodTrainer, ids: Tensor):
        self.trainer, self.batch = trainer, {"input_ids": ids, "labels": ids}
        self.optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1

    def __call__(self) -> float:
        """Seconds that the step took."""
        trainer, model = self.trainer, self.trainer.model
        began = time.perf_counter()
        trainer.training_step(model, dict(self.batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        model.zero_grad()
        return time.perf_counter() - began


def train_rate(dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor, folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Tokens/s of router training over those of fine-tuning, both of which change the weights of the model given."""
    return _rate("train_rate", "router training", dense, model, ids, folder, pairs)


def tomoe_train_rate(dense: PreTrainedModel, masked: PreTrainedModel, ids: Tensor, folder: Path, pairs: int) -> list[dict[str, Any]]:
    """The same of ToMoE training, whose every step is a forward of the teacher and one of the student."""
    return _rate("tomoe_train_rate", "ToMoE training", dense, masked, ids, folder, pairs)


def _rate(
    name: str, what: str, dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor, folder: Path, pairs: int
) -> list[dict[str, Any]]:
    plain, routed = (OneStep(make_trainer(each, ids, folder, steps=pairs + 1), ids) for each in (dense, model))
    ratios, rates = [], []
    for pair in range(-1, pairs):  # the first one warms up and makes AdamW's moments
        took = {step: step() for step in ((plain, routed) if pair % 2 else (routed, plain))}
        ratios.append(took[plain] / took[routed])
        rates.append(ids.numel() / took[routed])
    setting = f"batch of {ids.shape[0]} x {ids.shape[1]}, AdamW steps"
    return [
        result(name, f"{what} over fine-tuning, {setting}", ratios[1:], goal=GOALS[name]),
        result(name, f"{what}, {setting}", rates[1:], unit="tokens/s"),
    ]
