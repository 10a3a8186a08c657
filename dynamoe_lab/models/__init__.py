"""What a converted model is: flat files that travel with a checkpoint (torch, transformers and relative imports only).

Importing this package registers the converted families with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_dynamoe import CONFIG_CLASSES, DynaMoEConfig
from .configuration_tomoe import DEPLOYED_CONFIGS, MASKED_CONFIGS, ToMoEConfig
from .expert_mlp import ExpertMLP, ExpertTrace
from .families import FAMILIES, Family, decoder_layers, dense_type_of, family_of
from .masked_attention import MaskedAttention
from .masked_mlp import MaskedMLP
from .modeling_dynamoe import MODEL_CLASSES, DynaMoECausalLMOutput, DynaMoEMixin
from .modeling_tomoe import MASKED_CLASSES, ToMoEMixin
from .modeling_tomoe_deployed import DEPLOYED_CLASSES, ToMoEDeployedMixin
from .nested_mlp import NestedMLP, Router, RoutingTrace, labels_from_similarity, nested_similarity
from .pruned_attention import PrunedAttention
from .routed import RoutedMixin, Routing, token_mask
from .tomoe_output import LayerMasks, ToMoECausalLMOutput

__all__ = [
    "CONFIG_CLASSES",
    "DEPLOYED_CLASSES",
    "DEPLOYED_CONFIGS",
    "FAMILIES",
    "MASKED_CLASSES",
    "MASKED_CONFIGS",
    "MODEL_CLASSES",
    "DynaMoECausalLMOutput",
    "DynaMoEConfig",
    "DynaMoEMixin",
    "ExpertMLP",
    "ExpertTrace",
    "Family",
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
    "token_mask",
]

for _model in (*MODEL_CLASSES.values(), *MASKED_CLASSES.values(), *DEPLOYED_CLASSES.values()):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
