"""What a converted model is: flat files that travel with a checkpoint (torch, transformers and relative imports only).

Importing this package registers the converted families with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_dynamoe import CONFIG_CLASSES, DynaMoEConfig
from .families import FAMILIES, Family, decoder_layers, dense_type_of, family_of
from .modeling_dynamoe import MODEL_CLASSES, DynaMoECausalLMOutput, DynaMoEMixin
from .nested_mlp import NestedMLP, Router, RoutingTrace, labels_from_similarity, nested_similarity
from .routed import RoutedMixin, Routing, token_mask

__all__ = [
    "CONFIG_CLASSES",
    "FAMILIES",
    "MODEL_CLASSES",
    "DynaMoECausalLMOutput",
    "DynaMoEConfig",
    "DynaMoEMixin",
    "Family",
    "NestedMLP",
    "RoutedMixin",
    "Router",
    "Routing",
    "RoutingTrace",
    "decoder_layers",
    "dense_type_of",
    "family_of",
    "labels_from_similarity",
    "nested_similarity",
    "token_mask",
]

for _model in MODEL_CLASSES.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
