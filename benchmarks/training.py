"""Router training beside plain fine-tuning of the same MLP weights: the same batch, the same Trainer, steps in turn."""

import time
from pathlib import Path
from typing import Any

import torch
from results import GOALS, result
from torch import Tensor
from transformers import PreTrainedModel

from dynamoe_lab.config import TrainConfig
from dynamoe_lab.data import as_blocks
from dynamoe_lab.models import DynaMoEMixin, decoder_layers, family_of
from dynamoe_lab.training.dynamoe import DynaMoETrainer, freeze
from dynamoe_lab.training.trainer import MethodTrainer

__all__ = ["FineTuning", "OneStep", "make_trainer", "train_rate"]


class FineTuning(MethodTrainer):
    """Plain fine-tuning of a dense model's MLPs, with the loop, batches and optimizer of router training."""

    def parameter_groups(self):
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad], "lr": self.lab_config.mlp_lr}]

    def batch_metrics(self, inputs, outputs):
        return {"lm_loss": outputs.loss}


def make_trainer(model: PreTrainedModel, ids: Tensor, folder: Path, *, steps: int) -> MethodTrainer:
    """A trainer of a dense or converted model on blocks [n, T], all in one batch; gradients only for MLPs and routers."""
    config = TrainConfig(steps=steps, batch_size=len(ids), save_steps=steps, warmup_steps=0)
    model.config.use_cache = False  # as `lab.train` does
    if isinstance(model, DynaMoEMixin):
        freeze(model)
        model.lay_out(columns=False)
    else:
        family = family_of(model.config.model_type)
        model.requires_grad_(False)
        for layer in decoder_layers(model):
            for name in family.projections:
                getattr(family.holder(layer), name).requires_grad_(True)
    kind = DynaMoETrainer if isinstance(model, DynaMoEMixin) else FineTuning
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
    plain, routed = (OneStep(make_trainer(each, ids, folder, steps=pairs + 1), ids) for each in (dense, model))
    ratios, rates = [], []
    for pair in range(-1, pairs):  # the first one warms up and makes AdamW's moments
        took = {step: step() for step in ((plain, routed) if pair % 2 else (routed, plain))}
        ratios.append(took[plain] / took[routed])
        rates.append(ids.numel() / took[routed])
    setting = f"batch of {ids.shape[0]} x {ids.shape[1]}, AdamW steps"
    return [
        result("train_rate", f"router training over fine-tuning, {setting}", ratios[1:], goal=GOALS["train_rate"]),
        result("train_rate", f"router training, {setting}", rates[1:], unit="tokens/s"),
    ]
