"""A figure and the frame it draws, as the bytes of files: png, svg and csv; the same figure gives the same bytes."""

import io
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["figure_files", "frame_csv"]

_EXACT = 48  # colours of a picture that its palette keeps as they are
_FILLED, _CLOSE = 60, 24  # pixels of one colour from which on it is no mere edge; levels of a channel by which such a colour may move
CSV_LIMIT = 1_000_000  # bytes; a figure's frame is what it draws, not what it was computed from
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "dynamoe-lab"}  # text stays text; the same figure gives the same bytes


def figure_files(ax: Any, stem: str) -> dict[str, bytes]:
    """`<stem>.png` (150 dpi) and `<stem>.svg` of Axes, an array or list of Axes, a seaborn grid, or a Figure."""
    import matplotlib

    figure, contents = _figure_of(ax), {}
    with matplotlib.rc_context(_SVG):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
            contents[f"{stem}.{kind}"] = _with_palette(buffer) if kind == "png" else buffer.getvalue()
    return contents


def _with_palette(png: io.BytesIO) -> bytes:
    """The picture in 256 colours, a third of the bytes: its commonest ones as they are, shades at edges and in colour bars by median cut.

    Marks and lines keep their colours: where the palette would move one of those, the picture stays as it is.
    """
    import numpy as np
    from PIL import Image  # matplotlib writes its png with it

    pixels = np.asarray(Image.open(png).convert("RGB")).astype(np.uint32)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    codes, place, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colors = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)  # [n, 3]
    order = np.argsort(-counts, kind="stable")
    palette = colors[order[: 256 if len(codes) <= 256 else _EXACT]]
    if len(codes) > 256:
        rest = Image.fromarray(colors[order[_EXACT:]].astype(np.uint8)[None])
        shades = rest.quantize(256 - _EXACT, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).getpalette()
        palette = np.concatenate([palette, np.reshape(shades, (-1, 3))[: 256 - _EXACT]])
    parts = np.array_split(colors.astype(np.float32), len(colors) // 4096 + 1)  # [n, 256, 3] at once would be large
    nearest = np.concatenate([((part[:, None] - palette[None]) ** 2).sum(axis=-1).argmin(axis=-1) for part in parts])
    moved = np.abs(palette[nearest].astype(np.int64) - colors).max(axis=-1)
    if (moved[counts >= _FILLED] > _CLOSE).any():  # too many colours for a palette
        return png.getvalue()
    picture = Image.fromarray(nearest.astype(np.uint8)[place].reshape(packed.shape))
    picture.putpalette(palette.astype(np.uint8).ravel().tolist())
    small = io.BytesIO()
    picture.save(small, "PNG")
    return small.getvalue()


def _figure_of(ax: Any) -> Any:
    """The Figure of Axes, an array or list of Axes, a seaborn grid, or itself."""
    import numpy as np
    from matplotlib.figure import Figure

    if isinstance(ax, (np.ndarray, list, tuple)) and len(ax):
        return _figure_of(ax[0])
    figure = ax
    for _ in range(3):  # Axes of a subfigure stand two levels deep
        if isinstance(figure, Figure):
            return figure
        figure = getattr(figure, "figure", None)
    raise InputError(f"figure: {type(ax).__name__} is neither Axes nor Figure")


def frame_csv(frame: "pd.DataFrame", stem: str) -> bytes:
    """A frame as the bytes of a csv file. Raises `InputError` if it is no frame, empty, or larger than the limit of 1 MB."""
    import pandas as pd

    if not isinstance(frame, pd.DataFrame) or frame.empty:
        raise InputError(f"{stem}: give the frame that is shown, with at least one row")
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index() if any(name is not None for name in frame.index.names) else frame
    content = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode("utf-8")
    if len(content) > CSV_LIMIT:
        raise InputError(f"{stem}.csv would take {len(content) / 1e6:.1f} MB (limit 1 MB): aggregate the frame to what the figure draws")
    return content
