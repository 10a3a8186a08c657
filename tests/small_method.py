"""A whole method in one file, the smallest that goes through every door: `split`, which docs/extending.md builds on.

The MLP's neurons are cut into E equal parts in their order, a linear router sends every token to one of them, and the LM loss trains both
through the probability of the part. In the package the parts of this file would stand in `models/configuration_split.py`,
`models/modeling_split.py`, `conversion/split.py`, `config.py` and `training/split.py`.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from dynamoe_lab.config import Experiment, TrainSettings
from dynamoe_lab.conversion.common import check_dense, with_weights_of
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import FAMILIES, RoutedMixin, Routing, decoder_layers, family_of
from dynamoe_lab.models.converted_class import converted_classes
from dynamoe_lab.models.converted_config import converted_configs
from dynamoe_lab.training.trainer import MethodTrainer

# --- models/configuration_split.py ----------------------------------------------------------------------------------------------------


@dataclass
class SplitConfig:
    """The method's settings: they travel in `config.json` as `moe`."""

    num_experts: int = 4
    seed: int = 0  # of the fresh routers

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"split.num_experts = {self.num_experts}: give a whole number of at least 1")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "method": "split"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SplitConfig":
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})


SPLIT_FAMILIES = [name for name, family in FAMILIES.items() if family.mlp is not None]  # not OPT, whose layers hold the projections
SPLIT_CONFIGS = converted_configs(SplitConfig, "Split", "split_", SPLIT_FAMILIES)
globals().update({cls.__name__: cls for cls in SPLIT_CONFIGS.values()})

# --- models/modeling_split.py ---------------------------------------------------------------------------------------------------------


class SplitMLP(nn.Module):
    """The dense MLP under its own names, with a router over equal parts of its neurons."""

    def __init__(self, dense: nn.Module, family, moe: SplitConfig, layer: int, routing: Routing):
        super().__init__()
        self._family, self.moe, self.layer, self.routing = family, moe, layer, routing
        for name in family.projections:
            setattr(self, name, getattr(dense, name))
        self.act_fn = getattr(dense, family.activation)
        *_, down = self.projections().values()
        self.router = nn.Linear(down.out_features, moe.num_experts, bias=False)
        self.sizes = [len(part) for part in torch.arange(down.in_features).tensor_split(moe.num_experts)]
        self.trace = None

    def projections(self) -> dict[str, nn.Linear]:
        """Gate (of a gated MLP), up and down, by the family's names for them."""
        return {name: getattr(self, name) for name in self._family.projections}

    def expert_params(self) -> list[int]:
        *inputs, down = self.projections().values()
        neuron = sum(linear.in_features + (linear.bias is not None) for linear in inputs) + down.out_features
        return [size * neuron + (0 if down.bias is None else down.bias.numel()) for size in self.sizes]

    def full_params(self) -> int:
        return sum(parameter.numel() for linear in self.projections().values() for parameter in linear.parameters())

    dense_params = full_params

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, D]
        logits = self.router(x)
        mode, routing = ("router" if self.training else self.routing.mode), self.routing
        first, *second, down = self.projections().values()
        hidden = self.act_fn(first(x)) * second[0](x) if second else self.act_fn(first(x))  # [N, H]
        if mode == "full":
            experts = torch.full((len(x),), -1, device=x.device)
        elif mode == "random":
            experts = routing.draw(self.layer, len(x), x.device)
        else:
            experts = logits.argmax(-1) if mode == "router" else torch.full((len(x),), routing.expert, device=x.device)
        if mode != "full":
            owner = torch.arange(len(self.sizes), device=x.device).repeat_interleave(torch.tensor(self.sizes, device=x.device))
            hidden = hidden * (experts[:, None] == owner)
        output = down(hidden)
        if mode == "router" and torch.is_grad_enabled():
            probability = logits.softmax(-1).gather(1, experts[:, None])
            output = output * (probability / probability.detach())
        if routing.collect:
            self.trace = (logits, experts)
        return output.view_as(hidden_states)


@dataclass
class SplitOutput(transformers.modeling_outputs.MoeCausalLMOutputWithPast):
    """With `router_logits` and `experts`, a tuple over layers each, if `output_router_logits=True`."""

    lm_loss: Tensor | None = None
    experts: tuple[Tensor, ...] | None = None


class SplitMixin(RoutedMixin):
    """Stands before the family's class in the bases."""

    method = "split"
    routing_modes: ClassVar = {"router": None, "full": None, "random": None, "label": "split has no difficulty labels"}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.moe, self.routing = SplitConfig.from_dict(config.moe), Routing()
        family = family_of(config.model_type)
        for index, layer in enumerate(decoder_layers(self)):
            setattr(layer, family.mlp, SplitMLP(getattr(layer, family.mlp), family, self.moe, index, self.routing))
        self.post_init()

    def routed_mlps(self) -> list[SplitMLP]:
        return [family_of(self.config.model_type).nested(layer) for layer in decoder_layers(self)]

    def forward(self, input_ids=None, attention_mask=None, labels=None, output_router_logits=None, **kwargs):
        kwargs.pop("return_dict", None)
        self.routing.collect = bool(output_router_logits)
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, return_dict=True, **kwargs)
        self.routing.collect = False
        result = SplitOutput(**{name: value for name, value in output.items() if name != "loss"})
        result.loss = result.lm_loss = output.loss
        if output_router_logits:
            result.router_logits, result.experts = zip(*(mlp.trace for mlp in self.routed_mlps()), strict=True)
        return result

    def card(self) -> str:
        return f"---\ntags: [split]\n---\n# {type(self).__name__}\n\nThe MLPs in {self.moe.num_experts} equal parts, one a token.\n"


SPLIT_CLASSES = converted_classes(SplitMixin, "Split", SPLIT_CONFIGS, "`{dense}` whose MLPs are cut into equal parts.")
globals().update({cls.__name__: cls for cls in SPLIT_CLASSES.values()})

# --- conversion/split.py --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def convert_split(dense, config: SplitConfig, **_: Any):
    """`convert` for a `SplitConfig`; no text is read."""
    check_dense(dense, why_whole="its neurons are cut into parts")
    name = dense.config.model_type
    if name not in SPLIT_CLASSES:
        raise InputError(f"convert: split does not take {name}, whose layers hold the projections of the MLP themselves")
    model = with_weights_of(dense, SPLIT_CLASSES[name], SPLIT_CONFIGS[name], config.to_dict(), (".router.",))
    generator = torch.Generator().manual_seed(config.seed)
    for mlp in model.routed_mlps():
        mlp.router.weight.copy_(torch.randn(mlp.router.weight.shape, generator=generator) * 0.02)
    return model.eval()


# --- config.py ------------------------------------------------------------------------------------------------------------------------


@dataclass
class SplitTrainConfig(TrainSettings):
    """Training of split: MLPs and routers."""

    section: ClassVar[str] = "split_train"
    lr: float = 1e-3


@dataclass
class SplitExperiment(Experiment):
    """In the package: two more fields of `Experiment`, and a row of `METHODS`."""

    method: str = "split"
    split: SplitConfig = field(default_factory=SplitConfig)
    split_train: SplitTrainConfig = field(default_factory=SplitTrainConfig)


# --- training/split.py ----------------------------------------------------------------------------------------------------------------


class SplitTrainer(MethodTrainer):
    """One group of parameters, the LM loss."""

    config_class = SplitTrainConfig
    rates = ("lr",)

    @staticmethod
    def prepare(model):
        model.requires_grad_(False)
        for mlp in model.routed_mlps():
            mlp.requires_grad_(True)

    def parameter_groups(self):
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad], "lr": self.lab_config.lr}]

    def batch_metrics(self, inputs, outputs):
        return {"lm_loss": outputs.lm_loss}

    def heldout_values(self, model, ids):
        return {"heldout_loss": F.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())}
