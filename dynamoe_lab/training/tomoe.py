"""What training means for ToMoE: hypernetwork, routers and mask decoders learn, the dense model is frozen (arXiv 2501.15316)."""

from typing import ClassVar

from dynamoe_lab.config import ToMoETrainConfig
from dynamoe_lab.training.trainer import MethodTrainer

__all__ = ["ToMoETrainer"]


class ToMoETrainer(MethodTrainer):
    """One parameter group; the four losses, the active ratios and the union coverage of every step.

    The noise of the masks comes from the global generator, which `tomoe.seed` seeds and a resumed run takes up where it was; the order of
    the blocks is `tomoe_train.seed`'s.
    """

    config_class = ToMoETrainConfig
    metrics = (
        "lm_loss",
        "kl_loss",
        "ratio_loss",
        "union_loss",
        "balance_loss",
        "active_ratio_max",
        "active_ratio_mean",
        "union_coverage",
    )
    heldout_metric, heldout_always = "heldout_kl", True
    shown: ClassVar = {"kl_loss": "KL", "active_ratio_mean": "active", "active_ratio_max": "at most", "union_coverage": "union"}
    rates = ("lr",)

    @staticmethod
    def prepare(model):
        model.freeze_base()

    @staticmethod
    def generator_seed(model, config):
        return model.moe.seed

    def parameter_groups(self):
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad], "lr": self.lab_config.lr}]

    def batch_metrics(self, inputs, outputs):
        return {name: getattr(outputs, name) for name in self.metrics}

    def heldout_value(self, model, ids):
        model.set_routing("router")
        return model(input_ids=ids, output_kl=True, use_cache=False).kl_loss
