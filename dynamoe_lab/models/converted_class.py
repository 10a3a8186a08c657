"""How a converted family's model class is made: the method's mixin before the family's own class, and what transformers asks of both."""

from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .families import FAMILIES, Family

__all__ = ["converted_class", "converted_classes"]


def converted_classes(mixin: type, kind: str, configs: Mapping[str, type[PreTrainedConfig]], doc: str) -> dict[str, type[PreTrainedModel]]:
    """Dense model type -> `<kind><Family>ForCausalLM`, for every family of `configs`; see `converted_class`.

    Args:
        doc: the classes' docstring; `{dense}` in it becomes the name of the dense class.
    """
    return {
        dense_type: converted_class(kind, mixin, FAMILIES[dense_type], config, doc.format(dense=FAMILIES[dense_type].causal_lm.__name__))
        for dense_type, config in configs.items()
    }


def converted_class(prefix: str, mixin: type, family: Family, config_class: type[PreTrainedConfig], doc: str) -> type[PreTrainedModel]:
    """`<prefix><Family>ForCausalLM` in the mixin's module, which has to hold it under that name."""
    name = f"{prefix}{family.causal_lm.__name__}"
    # Some families' files use other names than their modules (GPT-NeoX: embed_out); ours then have to use them, too.
    dense_type = family.causal_lm.config_class.model_type
    renamed = get_checkpoint_conversion_mapping(family.causal_lm.__name__) or get_checkpoint_conversion_mapping(dense_type)
    if renamed:
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    namespace = {
        "__doc__": doc,
        "__module__": mixin.__module__,
        "__annotations__": {"config": config_class},
        "config_class": config_class,
        "_auto_class": "AutoModelForCausalLM",
    }
    config_class._auto_class = "AutoConfig"  # save_pretrained copies these files beside the weights
    return type(name, (mixin, family.causal_lm), namespace)
