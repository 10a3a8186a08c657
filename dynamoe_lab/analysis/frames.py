"""What every analysis function does with a frame first: check its columns, turn names into codes, tell layers
from the pooled row.

Layers are whole numbers; a row that pools all of them has layer "all". A frame read back from csv has both as
text, so the helpers here accept either.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from dynamoe_lab.errors import InputError

__all__ = [
    "ALL",
    "compact",
    "expert_names",
    "label_mark",
    "label_note",
    "list_names",
    "one_run",
    "percent",
    "require",
    "signed",
    "split_layers",
    "whole_numbers",
]

ALL = "all"  # the layer (or domain) of a row that pools them


def require(frame: pd.DataFrame, columns: Iterable[str], function: str) -> None:
    """Raise InputError, naming `function` and what is missing, unless `frame` has rows and all `columns`."""
    if not isinstance(frame, pd.DataFrame):
        raise InputError(f"{function}: give a pandas DataFrame, not a {type(frame).__name__}")
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        have = ", ".join(map(str, frame.columns)) or "none"
        raise InputError(f"{function}: the frame lacks the column(s) {', '.join(missing)}; it has {have}")
    if frame.empty:
        raise InputError(f"{function}: the frame has no rows")


def one_run(frame: pd.DataFrame, function: str) -> None:
    """Raise InputError if `frame` holds rows of several runs, which `function` would mix."""
    runs = frame["run"].unique() if "run" in frame.columns else ()
    if len(runs) > 1:
        raise InputError(f"{function}: the frame holds {len(runs)} runs ({list_names(runs)}); pass the rows of one of them")


def whole_numbers(column: pd.Series, function: str, *, least: int = 0) -> np.ndarray:
    """The column as int64, however it was stored (categorical, int8, float): arithmetic must not overflow."""
    try:
        values = np.asarray(column, dtype=np.float64)
        if not (np.isfinite(values).all() and (values == np.rint(values)).all() and (values >= least).all()):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise InputError(f"{function}: column {column.name} must hold whole numbers from {least}, without gaps in the data") from error
    return values.astype(np.int64)


def split_layers(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of single layers (layer as int, sorted by layer) and the rows that pool all layers."""
    pooled = frame["layer"].astype(str).to_numpy() == ALL
    single = frame[~pooled]
    single = single.assign(layer=pd.to_numeric(single["layer"]).astype(np.int64)).sort_values("layer", kind="stable")
    return single, frame[pooled]


def percent(value: float, digits: int = 0) -> str:
    """A share as people read it: 0.786 -> '79 %'. What is not 0 or 1 is never called 0 % or 100 %."""
    if not np.isfinite(value):
        return "no value"
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    text = f"{100 * value:.{digits}f}"
    if float(text) in (0, 100):
        if digits < 2:
            return percent(value, digits + 1)
        return "<0.01 %" if value < 0.5 else ">99.99 %"
    return f"{text} %"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, 0 without: 0.364 -> '+0.36', -0.001 -> '0.00'."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def compact(count: float) -> str:
    """A large count in three digits: 102400 -> '102 K'."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}" if count != int(count) else f"{int(count)}"


def expert_names(fractions: Sequence[float] | None, highest: int, function: str) -> list[str]:
    """What experts 0 to `highest` are called: their share of the MLP ('25 %') if `fractions` is given, else their number.

    With `fractions` there are as many experts as fractions, also when the last of them never occur in a
    frame.
    """
    if fractions is None:
        return [str(expert) for expert in range(highest + 1)]
    if highest >= len(fractions):
        raise InputError(f"{function}: the frame has expert {highest}, counted from 0, but {len(fractions)} fractions")
    return [f"{100 * fraction:.3g} %" for fraction in fractions]


def label_mark(label: str) -> str:
    """What stands behind a θ: nothing for the paper's cosine, ' (residual_error)' for another definition of difficulty."""
    return "" if label == "cosine" else f" ({label})"


def label_note(label: str) -> str:
    """What ends a sentence about labels: nothing for the paper's cosine, '; labels by residual_error' for another definition."""
    return "" if label == "cosine" else f"; labels by {label}"


def list_names(names: Iterable, limit: int = 4) -> str:
    """'a, b and c'; a longer list is cut after `limit` names."""
    texts = [str(name) for name in names]
    if len(texts) > limit:
        texts = [*texts[:limit], f"{len(texts) - limit} more"]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
