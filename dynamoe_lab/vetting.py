"""What a checkpoint is asked before anything of it is opened: no pickle, no code, no size that its own weights do not bear out.

`use_safetensors=True` alone does not keep pickles out: an index of shards may name a pickle, and transformers then opens it. Nor does
`trust_remote_code=False` keep code out: a config may name an attention kernel on the Hub. And a number in a config can ask for more memory
than there is, or for a million layers, before the first weight is compared.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["UNTRUSTED", "check_config", "check_finite", "check_folder", "check_index", "check_size"]

UNTRUSTED = "comes with its own Python code; read that code, then set trust_remote_code=true to run it"
INDEX = "model.safetensors.index.json"
_PACKED = 16  # a quantized checkpoint stores up to 8 weights in a number; twice that for tied weights
_SMALL = 10_000_000  # parameters that fit anywhere


def check_folder(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Refuse a folder that cannot be a checkpoint, or holds what must not be opened, in words that say what is wrong.

    Returns:
        The content of its config.json.

    Raises:
        InputError: no config.json, or one that is none; code that is not trusted; pickles, no weights, shards that lead elsewhere.
    """
    from transformers import CONFIG_MAPPING

    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():  # with peft, transformers would load the base model that it names
        raise InputError(f"model {folder}: the folder holds a PEFT adapter: merge it into its base model first")
    if not path.is_file():
        trained = folder / "checkpoint"  # of a run that `train` made
        hint = f"did you mean {trained}?" if (trained / "config.json").is_file() else "give the folder of a checkpoint"
        raise InputError(f"model {folder}: no config.json in this folder; {hint}")
    config = _read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: has no model_type; it is not the config of a transformers model; give the folder of a checkpoint")
    if "auto_map" in config and config["model_type"] not in CONFIG_MAPPING and not trust_remote_code:
        raise InputError(f"model {folder}: model_type {config['model_type']!r} {UNTRUSTED}")
    check_config(config, folder, trust_remote_code)
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in sorted(folder.glob(pattern))]
        if pickles:
            raise InputError(
                f"model {folder}: its weights are a pickle ({pickles[0]}), which can run code when opened and is refused; "
                "convert them to safetensors (model.save_pretrained where you trust the file)"
            )
        raise InputError(f"model {folder}: no *.safetensors file in this folder; the weights are missing")
    if not (folder / "model.safetensors").is_file() and (folder / INDEX).is_file():
        for shard in check_index(folder / INDEX, folder):
            if not (folder / shard).is_file():
                raise InputError(f"model {folder}: cannot be loaded: {INDEX} names {shard}, which is not there; copy it again")
    return config


def check_config(config: dict[str, Any], name: str | Path, trust_remote_code: bool) -> None:
    """Refuse a config that names code or weights elsewhere: kernels of the Hub, a file of weights that is no safetensors here."""
    for key, value in _entries(config):
        if key.endswith("_implementation") and "/" in str(value) and not trust_remote_code:
            raise InputError(
                f"model {name}: {key} = {value!r} in its config.json is code on the Hub; read it, then set trust_remote_code=true"
            )
        if key == "transformers_weights" and value is not None and not _is_plain_shard(value):
            raise InputError(f"model {name}: transformers_weights = {value!r} in its config.json is no *.safetensors beside it; refused")


def check_index(path: Path, name: str | Path) -> list[str]:
    """The shards that an index names. Raises `InputError` if it is no index, or one of them is no safetensors file beside it."""
    index = _read_json(path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"model {name}: {path.name} has no weight_map; copy it again from where the checkpoint came from")
    for shard in shards.values():
        if not _is_plain_shard(shard):
            raise InputError(
                f"model {name}: {path.name} names {shard!r}, which is no *.safetensors beside it (a pickle can run code); refused"
            )
    return sorted(set(shards.values()))


def check_size(folder: Path, config: Any, name: str | Path) -> None:
    """Refuse a config that asks for far more than the weights beside it can fill: memory would be taken, and filled at random.

    Args:
        config: the folder's, as transformers read it.

    Raises:
        InputError: as above.
        SafetensorError: a file that is cut off or damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    shapes = list(_shapes(folder))
    stored, layers = sum(map(math.prod, shapes)), getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(shapes):
        raise InputError(
            f"model {name}: config.json asks for {layers:,} layers, its weights are {len(shapes)} tensors; restore config.json"
        )
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > _PACKED * stored + _SMALL:
        raise InputError(f"model {name}: config.json asks for {needed:,} parameters, the weights have {stored:,}; restore config.json")


def check_finite(model: "PreTrainedModel", name: str | Path) -> None:
    """Refuse weights that are no numbers, or infinite: every result would be. Raises `InputError` naming the first."""
    import torch

    for key, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not parameter.numel():
            continue
        values = parameter.detach()
        # A sum is the fastest pass over them, and neither a nan nor an infinity is lost in it; finite ones might run over.
        if not values.sum(dtype=torch.float32).isfinite() and not all(bound.isfinite() for bound in torch.aminmax(values)):
            raise InputError(f"model {name}: {key} holds numbers that are not finite (nan or inf); give a checkpoint from before that")


def _shapes(folder: Path) -> Iterator[list[int]]:
    """Shapes of all tensors of a folder, from the headers of its files alone."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                yield tensors.get_slice(key).get_shape()


def _is_plain_shard(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, those of configs within it, too."""
    parts = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in parts:
        yield str(key), value
        yield from _entries(value)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({first_line(error)}); restore it from where the checkpoint came from") from error
