"""What training means for DynaMoE: MLPs and routers learn, the rest is frozen (arXiv 2502.12325, loss and training)."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamoe_lab.config import TrainConfig
from dynamoe_lab.models import token_mask
from dynamoe_lab.training.trainer import MethodTrainer

__all__ = ["DynaMoETrainer", "freeze", "routing_metrics"]


def freeze(model: PreTrainedModel) -> None:
    """Leave gradients only to MLP projections and routers."""
    model.requires_grad_(False)
    for nested in model.nested_mlps():
        nested.requires_grad_(True)


def routing_metrics(model: PreTrainedModel, outputs, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Router accuracy (argmax against the labels) and active MLP fraction of the experts used, means over layers and tokens but pads."""
    counted = token_mask(attention_mask, len(outputs.labels[0]))
    keep = slice(None) if counted is None else counted
    sizes = torch.tensor(model.nested_mlps()[0].sizes, dtype=torch.float32, device=outputs.experts[0].device)
    right = [
        (logits.argmax(-1) == labels)[keep].float().mean() for logits, labels in zip(outputs.router_logits, outputs.labels, strict=True)
    ]
    active = [(sizes[experts[keep]] / sizes[-1]).mean() for experts in outputs.experts]
    return {"router_accuracy": torch.stack(right).mean(), "active_mlp_fraction": torch.stack(active).mean()}


class DynaMoETrainer(MethodTrainer):
    """Two parameter groups, and the routing metrics of every step."""

    config_class = TrainConfig
    metrics = ("lm_loss", "router_loss", "router_accuracy", "active_mlp_fraction")
    heldout_metrics = ("heldout_loss",)
    shown: ClassVar = {"lm_loss": "LM loss", "router_loss": "router loss", "router_accuracy": "accuracy", "active_mlp_fraction": "active"}
    rates = ("mlp_lr", "router_lr")

    @staticmethod
    def prepare(model):
        freeze(model)
        model.lay_out(columns=False)  # as wrappers such as FSDP ask for

    @staticmethod
    def restore(model):
        model.lay_out()

    def parameter_groups(self):
        groups = {"mlp": [], "router": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["router" if ".router." in name else "mlp"].append(parameter)
        return [
            {"params": groups["mlp"], "lr": self.lab_config.mlp_lr},
            {"params": groups["router"], "lr": self.lab_config.router_lr},
        ]

    def batch_metrics(self, inputs, outputs):
        model = self.accelerator.unwrap_model(self.model)
        return {
            "lm_loss": outputs.lm_loss,
            "router_loss": outputs.router_loss,
            **routing_metrics(model, outputs, inputs.get("attention_mask")),
        }

    def heldout_values(self, model, ids):
        model.set_routing(model.moe.train_route)  # a static control goes the way it learns
        return {"heldout_loss": model(input_ids=ids, labels=ids, use_cache=False).lm_loss}
