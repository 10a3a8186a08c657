"""How a converted family's config class is made: the family's own config with one more field, `moe`, the method's settings."""

from collections.abc import Iterable

from transformers import PreTrainedConfig

from .families import FAMILIES, PREFIXES

try:  # transformers 5 makes config classes strict dataclasses; a subclass that adds a field has to say so too
    from huggingface_hub.dataclasses import strict
except ImportError:  # pragma: no cover - older hubs
    strict = None

__all__ = ["converted_configs"]


def converted_configs(method: type, kind: str, prefix: str, families: Iterable[str] = tuple(FAMILIES)) -> dict[str, type[PreTrainedConfig]]:
    """Dense model type -> `<kind><Family>Config` of the model type `<prefix><dense type>`, for every family.

    The classes belong to the module of `method`, the method's own config, which has to hold them under their names: transformers looks for
    them there when it loads a checkpoint's own files. The prefix is known to `dense_type_of` from now on.
    """
    PREFIXES.add(prefix)
    classes = {}
    for dense_type in families:
        base = FAMILIES[dense_type].causal_lm.config_class
        namespace = {
            "__doc__": f"`{base.__name__}` plus `moe`, the plain dict of a `{method.__name__}` with where the model came from.",
            "__module__": method.__module__,
            "__annotations__": {"moe": dict | None},
            "model_type": f"{prefix}{dense_type}",
            "moe": None,
        }
        cls = type(f"{kind}{base.__name__.removesuffix('Config')}Config", (base,), namespace)
        classes[dense_type] = strict(cls) if strict is not None else cls
    return classes
