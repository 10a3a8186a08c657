"""What a step hands out, on disk and back: frames as parquet, plain values as JSON, models as safetensors, tuples of these entry by entry.

The value handed out is always the one read back, so that a first run and a cached one see the same. Dtypes survive: parquet keeps no
categories but texts, so the categories of a frame stand beside it in the description.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_result", "write_result"]


def write_result(value: Any, folder: Path, *, output: Path | None = None, stem: str = "result") -> dict[str, Any]:
    """Write a step's value into `folder`; returns the description that `read_result` needs.

    Kinds: DataFrame -> `<stem>.parquet`; None, bool, number, text, list, dict -> `<stem>.json`; transformers model -> `model/`
    (`save_pretrained`); a path within `output` -> its place there; a tuple of these -> numbered entries.
    Raises TypeError for anything else, and for frames that parquet would change.
    """
    if isinstance(value, tuple):
        names = [f"{stem}-{position}" for position in range(len(value))]
        return {
            "kind": "tuple",
            "entries": [write_result(v, folder, output=output, stem=name) for v, name in zip(value, names, strict=True)],
        }
    if _is(value, "pandas", "DataFrame"):
        return _write_frame(value, folder, stem)
    if _is(value, "transformers", "PreTrainedModel"):
        name = stem.replace("result", "model")
        with _no_bars():
            value.save_pretrained(folder / name)
        return {"kind": "model", "file": name, "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Path) and output is not None and value.is_relative_to(output):
        return {"kind": "path", "file": value.relative_to(output).as_posix()}
    text = json.dumps(_plain(value), indent=1)
    (folder / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    return {"kind": "json", "file": f"{stem}.json"}


def read_result(folder: Path, description: dict[str, Any], *, device: Any = "cpu") -> Any:
    """The value that `write_result` described; a model goes to `device`."""
    kind = description["kind"]
    if kind == "tuple":
        return tuple(read_result(folder, entry, device=device) for entry in description["entries"])
    path = folder / description.get("file", "")
    if kind == "frame":
        return _read_frame(path, description["categories"])
    if kind == "model":
        return _read_model(path, description["dtype"], device)
    if kind == "path":
        return folder / "output" / description["file"]
    return json.loads(path.read_text(encoding="utf-8"))


def _is(value: Any, package: str, name: str) -> bool:
    return any(cls.__module__.partition(".")[0] == package and cls.__name__ == name for cls in type(value).__mro__)


def _plain(value: Any) -> Any:
    """The value in the types that JSON gives back; TypeError where that would change it."""
    if _is(value, "numpy", "generic"):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"a step returned a dict with the key {odd[0]!r}: JSON has text keys only; use texts or a DataFrame")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(
        f"a step returned {type(value).__module__}.{type(value).__qualname__}: return a DataFrame, numbers, texts, lists, dicts, a model, "
        "a tuple of these, or write files below the parameter output_dir"
    )


def _write_frame(frame: Any, folder: Path, stem: str) -> dict[str, Any]:
    import pandas as pd

    if frame.attrs:
        try:
            json.dumps(frame.attrs)
        except TypeError:  # parquet keeps what JSON can hold
            frame = frame.copy(deep=False)
            frame.attrs = {}
    categories = {}
    for name, dtype in frame.dtypes.items():
        if isinstance(dtype, pd.CategoricalDtype):
            values = [None if isinstance(v, float) and math.isnan(v) else v for v in dtype.categories.tolist()]
            categories[str(name)] = {"values": _plain(values), "dtype": str(dtype.categories.dtype), "ordered": bool(dtype.ordered)}
    path = folder / f"{stem}.parquet"
    frame.to_parquet(path)
    back = _read_frame(path, categories)
    changed = [str(name) for name in frame.columns if name not in back.columns or back[name].dtype != frame[name].dtype]
    if changed:
        raise TypeError(f"a step returned a frame whose columns {', '.join(changed)} change in parquet: give them plain dtypes")
    return {"kind": "frame", "file": path.name, "categories": categories}


def _read_frame(path: Path, categories: dict[str, Any]) -> Any:
    import pandas as pd

    frame = pd.read_parquet(path)
    for name, wanted in categories.items():
        dtype = pd.CategoricalDtype(pd.Index(wanted["values"], dtype=wanted["dtype"]), ordered=wanted["ordered"])
        if frame[name].dtype != dtype:
            frame[name] = frame[name].astype(dtype)
    return frame


def _read_model(folder: Path, dtype: str, device: Any) -> Any:
    """As `load_model` does it, but a step's model stands without a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    import dynamoe_lab.models  # noqa: F401  registers the classes of converted models

    with _no_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), use_safetensors=True, attn_implementation="sdpa")
    return model.to(device).eval()


@contextmanager
def _no_bars() -> Iterator[None]:
    """Transformers without progress bars: a step says what it has to say in lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
