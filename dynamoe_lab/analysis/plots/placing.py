"""Small labels beside points without collisions: the first free place of a few around each point, in the order the labels are given."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation

__all__ = ["place_labels"]

_AROUND = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))  # directions, tried in this order
_AWAY = (1.0, 2.2, 3.6, 5.2)  # times `distance`, tried in this order


def place_labels(
    ax: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    *,
    colors: Sequence,
    avoid: Sequence[tuple[float, float]] = (),
    fontsize: float = 6.5,
    distance: float = 5.0,
) -> list[Annotation]:
    """Write `texts` beside `points`, off each other, all points and the edge of the axes; call it when the limits are final.

    Args:
        points: [n] what each text belongs to, in data units.
        colors: [n] of the texts.
        avoid: further places in data units that a text should not cover, e.g. points along lines.
        fontsize, distance: in points; the distance is from the middle of the marker to the text. A text that only fits farther away gets a
            thin line to its point.

    Returns:
        The annotations, one per text.
    """
    figure = ax.get_figure(root=True)
    figure.draw_without_rendering()  # the layout moves axes, so their place is only known now
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    frame = ax.get_window_extent(renderer).extents
    centres = ax.transData.transform(np.asarray([*points, *avoid], dtype=np.float64))
    half = np.where(np.arange(len(centres)) < len(points), 3.2 * scale, scale)[:, None]  # half a marker, half a line
    taken = np.concatenate([centres - half, centres + half], axis=1)  # boxes: x0, y0, x1, y1 in pixels
    around = np.array([(across, up, far) for far in _AWAY for across, up in _AROUND])
    notes = []
    for point, text, color, centre in zip(points, texts, colors, centres[: len(points)], strict=True):
        note = ax.annotate(text, point, xytext=(0, 0), textcoords="offset points", ha="center", va="center", fontsize=fontsize, color=color)
        note.set_path_effects([withStroke(linewidth=1.6, foreground="white")])  # readable where a line must pass under it
        extent = note.get_window_extent(renderer)
        size = np.array([extent.width, extent.height])
        offsets = around[:, :2] * (size / 2 + around[:, 2:] * distance * scale)  # (places, 2)
        boxes = np.concatenate([centre + offsets - size / 2, centre + offsets + size / 2], axis=1)
        inside = (boxes[:, :2] >= frame[:2]).all(axis=1) & (boxes[:, 2:] <= frame[2:]).all(axis=1)
        covered = _overlaps(boxes, taken) + ~inside * size.prod()  # square pixels
        best = int((covered + 0.01 * np.arange(len(covered))).argmin()) if covered.min() > 0.5 else int((covered <= 0.5).argmax())
        note.set_position(offsets[best] / scale)
        if around[best, 2] > 1:
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": color}
            ax.annotate("", point, xytext=note.get_position(), textcoords="offset points", arrowprops=line)
        taken = np.concatenate([taken, boxes[best : best + 1]])
        notes.append(note)
    return notes


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area that each box [n, 4] shares with all others [m, 4] together, in square pixels -> [n]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=-1).sum(axis=-1)
