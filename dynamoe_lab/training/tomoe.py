"""What training means for ToMoE: hypernetwork, routers and mask decoders learn, the dense model is frozen (arXiv 2501.15316)."""

from typing import ClassVar

from dynamoe_lab.config import ToMoETrainConfig
from dynamoe_lab.training.trainer import MethodTrainer

__all__ = ["ToMoETrainer"]


class ToMoETrainer(MethodTrainer):
    """One parameter group; the four losses, the active ratios and the union coverage of every step, under the noise of training.

    Of held-out text, without noise: the KL, and as `open_ratio` and `open_union` the mean active ratio and the union coverage.

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
    heldout_metrics, heldout_always = ("heldout_kl", "open_ratio", "open_union"), True
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

    def heldout_values(self, model, ids):
        model.set_routing("router")
        output = model(input_ids=ids, output_kl=True, use_cache=False)
        return {"heldout_kl": output.kl_loss, "open_ratio": output.active_ratio_mean, "open_union": output.union_coverage}
