"""How commands and the report write tables, numbers, sizes and times: plain text, the same everywhere."""

from collections.abc import Sequence
from typing import Any

from dynamoe_lab.errors import printable

__all__ = ["WIDTH", "age_text", "duration_text", "millions_text", "number_text", "seconds_text", "size_text", "table_text"]

WIDTH = 100  # characters of a line


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), width: int | None = None) -> str:
    """Columns of text under their names, those named in `right` aligned to the right; no line ends in spaces.

    What a terminal would obey, an end of a line among it, stands in a cell as its code.
    `width`: the longest line; what the last column has beyond it is left out and says so with dots.
    """
    rows = [[printable(text, keep="\u00a0") for text in row] for row in rows]
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    sides = [str.rjust if name in right else str.ljust for name in header]
    lines = ["  ".join(side(text, width) for side, text, width in zip(sides, row, widths, strict=True)) for row in [header, *rows]]
    lines = [line.rstrip() for line in lines]
    return "\n".join(line if width is None or len(line) <= width else f"{line[: width - 3].rstrip()}..." for line in lines)


def number_text(value: Any) -> str:
    """1234567 -> 1,234,567; 0.123456 -> 0.1235."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value == int(value) if abs(value) < 1e15 else False):
        return f"{int(value):,}" if isinstance(value, int) or abs(value) >= 1e4 else f"{value:.1f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def millions_text(value: float | None) -> str:
    """'113.3 M'; '' of what is not known."""
    return "" if value is None or value != value else f"{value / 1e6:,.1f} M"


def size_text(size: int | None) -> str:
    """Bytes as 640 KB, 12 MB, 1.5 GB."""
    if size is None:
        return ""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB" if size >= 2**20 else f"{size / 2**10:.0f} KB"


def duration_text(seconds: float | None) -> str:
    """4.2 s, 75 s, 12 min, 2.5 h."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seconds_text(seconds: float) -> str:
    """`4s`, `1m20s`, `2h05m`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def age_text(seconds: float | None) -> str:
    """How long ago: 40 s, 5 min, 3 h, 12 d."""
    if seconds is None:
        return ""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return f"{int(max(seconds, 0))} s"
