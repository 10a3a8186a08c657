"""One short name for what a step is given: `fingerprint(value)` is equal exactly when the values that matter are equal.

It covers numbers, texts, containers, paths (their content), dataclasses, frames, arrays, tensors, transformers models (weights, config and
run-time switches such as the routing mode) and tokenizers, and any object with a method `fingerprint() -> str`. Unknown types are refused:
a wrong match would hand out someone else's result. Libraries are recognised by name, so that importing this module imports none of them.
"""

import dataclasses
import enum
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import xxhash

from dynamoe_lab.digests import file_digest

__all__ = ["describe", "fingerprint", "is_module"]

# Entries of a model's config that say where it came from or how it was loaded, not what it computes.
VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "_commit_hash"}
# Attributes that transformers sets on every model and that do not change its function.
VOLATILE_ATTRIBUTES = {"training", "name_or_path", "warnings_issued", "config", "generation_config", "loss_type"}


def fingerprint(value: Any) -> str:
    """32 hexadecimal digits (xxh3_128) that stand for a value.

    Lists and tuples are alike, dicts know no order, a path stands for the content of its file or folder, a device counts for nothing, a
    dtype does. A field of a dataclass with the metadata "later" counts where it has not its default. Raises TypeError naming the type of
    anything that has no fingerprint.
    """
    digest = xxhash.xxh3_128()
    _feed(digest, value)
    return digest.hexdigest()


def _mark(digest: Any, kind: str, payload: Any = b"") -> None:
    digest.update(f"{kind}:{memoryview(payload).nbytes}:".encode())  # kind and length keep neighbours apart
    digest.update(payload)


def _feed(digest: Any, value: Any) -> None:
    if value is None or isinstance(value, bool):
        _mark(digest, str(value))
    elif isinstance(value, enum.Enum):
        _mark(digest, "enum", f"{_qualified(type(value))}.{value.name}".encode())
    elif isinstance(value, int):
        _mark(digest, "int", str(int(value)).encode())
    elif isinstance(value, float):
        _mark(digest, "float", struct.pack("<d", value))
    elif isinstance(value, str):
        _mark(digest, "str", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes):
        _mark(digest, "bytes", value)
    elif not isinstance(value, type) and callable(getattr(value, "fingerprint", None)):
        _mark(digest, f"object {_qualified(type(value))}", str(value.fingerprint()).encode())
    elif isinstance(value, Path):
        _feed_path(digest, value)
    elif (feed := _library_feed(value)) is not None:
        feed(digest, value)
    elif isinstance(value, (type, FunctionType, BuiltinFunctionType)) and "<" not in value.__qualname__:
        _mark(digest, "name", _qualified(value).encode())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _mark(digest, f"dataclass {_qualified(type(value))}")
        _feed(digest, {item.name: getattr(value, item.name) for item in dataclasses.fields(value) if not _absent(value, item)})
    elif isinstance(value, Mapping):
        _mark(digest, f"dict {len(value)}")
        for key, item in sorted(((fingerprint(key), item) for key, item in value.items()), key=lambda pair: pair[0]):
            _mark(digest, "key", key.encode())
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        _mark(digest, f"list {len(value)}")
        for item in value:
            _feed(digest, item)
    elif isinstance(value, (set, frozenset)):
        _mark(digest, "set", "".join(sorted(fingerprint(item) for item in value)).encode())
    else:
        raise TypeError(
            f"{_qualified(type(value))} has no fingerprint: pass numbers, texts, paths, dataclasses, frames, arrays, tensors, models or "
            "tokenizers, or give the class a method fingerprint() -> str"
        )


def _absent(value: Any, item: dataclasses.Field) -> bool:
    """Whether a field came later (`metadata={"later": True}`) and has its default: what was kept before there was one is still good."""
    return bool(item.metadata.get("later")) and getattr(value, item.name) == item.default


def _qualified(item: Any) -> str:
    return f"{item.__module__}.{item.__qualname__}"


def _feed_path(digest: Any, path: Path) -> None:
    if path.is_file():
        _mark(digest, "file", file_digest(path).encode())
    elif path.is_dir():
        _mark(digest, "folder")
        for member in sorted(item for item in path.rglob("*") if item.is_file()):
            _mark(digest, member.relative_to(path).as_posix(), file_digest(member).encode())
    else:
        raise FileNotFoundError(f"{path}: a step was given this path, but nothing is there")


# --- libraries, recognised by the names of a value's classes -----------------------------------------------------------------------


def _library_feed(value: Any) -> Callable[[Any, Any], None] | None:
    for cls in type(value).__mro__:
        feed = _LIBRARIES.get((cls.__module__.partition(".")[0], cls.__name__))
        if feed is not None:
            return feed
    return None


def is_module(value: Any) -> bool:
    """Whether a value is a `torch.nn.Module`, without importing torch."""
    return any(cls.__name__ == "Module" and cls.__module__.startswith("torch.nn") for cls in type(value).__mro__)


def _feed_array(digest: Any, array: Any) -> None:
    if array.dtype.kind == "O":
        _mark(digest, f"objects {array.shape}")
        _feed(digest, array.ravel().tolist())
    else:
        contiguous = array if array.flags.c_contiguous else array.copy(order="C")
        _mark(digest, f"array {array.dtype.str} {array.shape}", contiguous.reshape(-1).view("uint8") if array.size else b"")


def _feed_numpy_scalar(digest: Any, scalar: Any) -> None:
    if scalar.dtype.kind in "biufU":
        _feed(digest, scalar.item())
    else:
        _mark(digest, f"scalar {scalar.dtype.str}", scalar.tobytes())


def _feed_frame(digest: Any, frame: Any) -> None:
    _mark(digest, f"frame {frame.shape}")
    _feed(digest, [str(name) for name in frame.index.names])
    _feed_series_values(digest, frame.index)
    for position, name in enumerate(frame.columns):
        _mark(digest, "column", f"{type(name).__name__} {name}".encode())
        _feed_series_values(digest, frame.iloc[:, position])
    _feed(digest, frame.attrs)


def _feed_series(digest: Any, series: Any) -> None:
    _feed_frame(digest, series.to_frame("" if series.name is None else series.name))


def _feed_series_values(digest: Any, values: Any) -> None:
    from pandas import CategoricalDtype
    from pandas.util import hash_pandas_object

    dtype = getattr(values, "dtype", None)
    described = f"{dtype} {list(dtype.categories)} {dtype.ordered}" if isinstance(dtype, CategoricalDtype) else str(dtype)
    try:
        _mark(digest, described, hash_pandas_object(values, index=False).to_numpy().view("uint8"))
    except TypeError:  # cells that hold lists
        _mark(digest, f"cells {described}")
        _feed(digest, values.tolist())


def _feed_tensor(digest: Any, tensor: Any) -> None:
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"a tensor of layout {tensor.layout} on {tensor.device} has no fingerprint: make it dense and load it first")
    data = tensor.detach().cpu().contiguous().reshape(-1)
    _mark(digest, f"tensor {tensor.dtype} {tuple(tensor.shape)}", data.view(torch.uint8).numpy() if data.numel() else b"")


def _feed_module(digest: Any, module: Any) -> None:
    _mark(digest, f"module {type(module).__qualname__}")
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        _feed(digest, json.dumps(_settled(config.to_dict()), sort_keys=True, default=str))
    else:
        _feed(digest, repr(module))  # the layers and their extra_repr
    if callable(code_mark := getattr(module, "code_mark", None)):  # code of a user's that its class does not stand for
        _mark(digest, "code", code_mark().encode())
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
            _mark(digest, kind, name.encode())
            _feed_tensor(digest, tensor)
    for name, part in module.named_modules():
        _feed_switches(digest, name, part)


def _feed_switches(digest: Any, name: str, part: Any) -> None:
    """Public attributes of modules that are neither torch's nor transformers': run-time choices that no weight and no config shows."""
    if type(part).__module__.partition(".")[0] in ("torch", "transformers"):
        return
    for attribute, value in sorted(vars(part).items()):
        if attribute.startswith("_") or attribute in VOLATILE_ATTRIBUTES or callable(value):
            continue
        try:
            mark = fingerprint(value)
        except TypeError:
            continue  # a helper object; switches are numbers, texts, dataclasses, tensors
        _mark(digest, f"switch {name}.{attribute}", mark.encode())


def _settled(config: Any) -> Any:
    """A config dict without the entries that change when a model is saved, loaded or moved."""
    if isinstance(config, dict):
        return {str(key): _settled(value) for key, value in config.items() if key not in VOLATILE_CONFIG}
    return [_settled(value) for value in config] if isinstance(config, (list, tuple)) else config


def _feed_config(digest: Any, config: Any) -> None:
    _mark(digest, f"config {type(config).__qualname__}", json.dumps(_settled(config.to_dict()), sort_keys=True, default=str).encode())


def _feed_tokenizer(digest: Any, tokenizer: Any) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # set by the last call, not by the vocabulary
        state.pop("padding", None)
    else:
        state = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = {"state": state, "special": special, "template": getattr(tokenizer, "chat_template", None)}
    _mark(digest, "tokenizer", json.dumps(content, sort_keys=True, default=str).encode())


def _text(kind: str) -> Callable[[Any, Any], None]:
    return lambda digest, value: _mark(digest, kind, str(value).encode())


_LIBRARIES: dict[tuple[str, str], Callable[[Any, Any], None]] = {
    ("numpy", "ndarray"): _feed_array,
    ("numpy", "generic"): _feed_numpy_scalar,
    ("numpy", "dtype"): _text("dtype"),
    ("pandas", "DataFrame"): _feed_frame,
    ("pandas", "Series"): _feed_series,
    ("pandas", "Index"): _feed_series_values,
    ("torch", "Tensor"): _feed_tensor,
    ("torch", "dtype"): _text("dtype"),
    ("torch", "device"): lambda digest, value: _mark(digest, "device"),
    ("torch", "Generator"): lambda digest, value: _mark(digest, "generator", value.get_state().numpy().tobytes()),
    ("torch", "Module"): _feed_module,
    ("transformers", "PreTrainedConfig"): _feed_config,
    ("transformers", "PreTrainedTokenizerBase"): _feed_tokenizer,
}


# --- for people --------------------------------------------------------------------------------------------------------------------


def describe(value: Any) -> Any:
    """What a step was given, in a form that JSON holds and people read; long things become a phrase, paths their last part."""
    if value is None or isinstance(value, (bool, int, float)):
        return value if not isinstance(value, float) or value - value == 0 else str(value)  # nan and inf are no JSON
    if isinstance(value, str):
        return value if len(value) <= 200 else f"{value[:200]}... ({len(value)} characters)"
    if isinstance(value, Path):
        return f"path {value.name}"
    if is_module(value):
        return f"{type(value).__name__}, {sum(parameter.numel() for parameter in value.parameters()):,} parameters"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    if hasattr(value, "columns") and hasattr(value, "shape"):
        return f"{type(value).__name__} of {value.shape[0]:,} rows, columns {', '.join(map(str, value.columns))}"
    if callable(getattr(value, "fingerprint", None)) or "Tokenizer" in type(value).__name__:
        return f"{type(value).__name__}{f' of {len(value):,}' if hasattr(value, '__len__') else ''}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: describe(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in list(value.items())[:50]}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value[:50]] + ([f"... {len(value)} in all"] if len(value) > 50 else [])
    return getattr(value, "__qualname__", type(value).__name__)
