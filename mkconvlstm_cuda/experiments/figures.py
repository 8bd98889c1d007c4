"""How figures look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .claims import Interval


def panels(columns: int, width: float = 5.0, height: float = 3.6):
    """A figure with panels side by side: (figure, [axes])."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, columns))
    for each in axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def errors(intervals: Sequence[Interval]) -> np.ndarray:
    """[2, n]: how far each interval reaches below and above its mean; 0 where it has no ends."""
    reach = np.array([[i.mean - i.low, i.high - i.mean] for i in intervals]).T
    return np.where(np.isfinite(reach), reach, 0)


def curve(axes, x: Sequence[float], intervals: Sequence[Interval], **options) -> None:
    """Means over seeds, with their 95% intervals."""
    axes.errorbar(x, [i.mean for i in intervals], errors(intervals), marker="o", capsize=3, **options)


def save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=100)
    return path


def tile(maps: np.ndarray, columns: int) -> np.ndarray:
    """[n, H, W] in rows of `columns`, with a seam of NaN, to which `show` gives a colour of its own."""
    n, height, width = maps.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height + 1, width + 1), np.nan)
    cells[:n, :height, :width] = maps
    page = cells.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2)
    return page.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]


def show(axes, image: np.ndarray, title: str, low: float = 0.0, high: float = 1.0) -> None:
    """An image in grey, `low` black and `high` white."""
    from matplotlib import colormaps

    cmap = colormaps["gray"].with_extremes(bad="lightsteelblue")
    axes.imshow(image, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
