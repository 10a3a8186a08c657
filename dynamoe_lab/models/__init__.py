"""What a converted model is: flat files that travel with a checkpoint (torch, transformers and relative imports only).

Importing this package registers the converted families with transformers' Auto classes.
"""

from collections.abc import Iterable

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .configuration_dynamoe import CONFIG_CLASSES, DynaMoEConfig
from .configuration_tomoe import DEPLOYED_CONFIGS, MASKED_CONFIGS, ToMoEConfig
from .expert_mlp import ExpertMLP, ExpertTrace
from .families import FAMILIES, Family, decoder_layers, dense_type_of, family_of
from .labels import LABELS, Label, labels_from_similarity, nested_similarity
from .masked_attention import MaskedAttention
from .masked_mlp import MaskedMLP
from .modeling_dynamoe import MODEL_CLASSES, DynaMoECausalLMOutput, DynaMoEMixin
from .modeling_tomoe import MASKED_CLASSES, ToMoEMixin
from .modeling_tomoe_deployed import DEPLOYED_CLASSES, ToMoEDeployedMixin
from .nested_mlp import NestedMLP, Router, RoutingTrace
from .pruned_attention import PrunedAttention
from .routed import RoutedMixin, Routing, token_mask
from .tomoe_output import LayerMasks, ToMoECausalLMOutput

__all__ = [
    "CONFIG_CLASSES",
    "DEPLOYED_CLASSES",
    "DEPLOYED_CONFIGS",
    "FAMILIES",
    "LABELS",
    "MASKED_CLASSES",
    "MASKED_CONFIGS",
    "METHOD_MIXINS",
    "MODEL_CLASSES",
    "DynaMoECausalLMOutput",
    "DynaMoEConfig",
    "DynaMoEMixin",
    "ExpertMLP",
    "ExpertTrace",
    "Family",
    "Label",
    "LayerMasks",
    "MaskedAttention",
    "MaskedMLP",
    "NestedMLP",
    "PrunedAttention",
    "RoutedMixin",
    "Router",
    "Routing",
    "RoutingTrace",
    "ToMoECausalLMOutput",
    "ToMoEConfig",
    "ToMoEDeployedMixin",
    "ToMoEMixin",
    "decoder_layers",
    "dense_type_of",
    "family_of",
    "labels_from_similarity",
    "nested_similarity",
    "register",
    "token_mask",
]

# Method -> the class of the models that it converts to and trains. See docs/extending.md, "A method".
METHOD_MIXINS: dict[str, type[RoutedMixin]] = {"dynamoe": DynaMoEMixin, "tomoe": ToMoEMixin}


def register(models: Iterable[type[PreTrainedModel]]) -> None:
    """Let transformers' Auto classes load these converted models."""
    for model in models:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


for _classes in (MODEL_CLASSES, MASKED_CLASSES, DEPLOYED_CLASSES):
    register(_classes.values())
