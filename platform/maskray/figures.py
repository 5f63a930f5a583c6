"""Arrays in, PNG out. No window, no pyplot, no state: a figure is made, rendered and dropped.

Shape letters: N images, C channels (of many, the first three are shown), H and W down and across (pixels of an image,
cells of a visibility).
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

DPI = 100
TILE = 160
"""About the side of a picture in pixels: small images are enlarged a whole number of times, so pixels stay square."""
MIN_COLUMN = 136
"""Room for the longest name of a column, in pixels."""
GAP, MARGIN, HEAD, COLUMN_HEAD, FOOT = 8, 12, 34, 24, 26
HIDDEN_COLOR = (128, 134, 150)
"""Gray with a breath of blue: told apart from the gray of a gray image."""
INK, SOFT_INK = "#1f2430", "#5b6375"


def reconstructions(
    images_NCHW: Bytes,
    visible_NHW: Bools,
    painted_NCHW: Bytes,
    *,
    title: str,
    losses: Sequence[float] = (),
    uses_target_statistics: bool = False,
) -> bytes:
    """PNG of reconstructions, an image a row: input, what the model saw, what it painted into that, raw prediction.

    Args:
        images_NCHW: uint8 input.
        visible_NHW: True = the model saw the cell.
        painted_NCHW: uint8 prediction for every cell, those the model saw included.
        title: stands above all.
        losses: of each image, shown beside its row where given.
        uses_target_statistics: each painted cell's mean and std were taken from the original; the figure says so.
    """
    images, painted = _rgb(images_NCHW), _rgb(painted_NCHW)
    visible = _to_pixels(visible_NHW, images.shape[1:3])[..., None]
    share = float(visible_NHW.mean())
    star = " *" if uses_target_statistics else ""
    columns = [
        ("input", images),
        (f"the model saw ({share:.0%})", np.where(visible, images, np.array(HIDDEN_COLOR, dtype=np.uint8))),
        (f"it painted{star}", np.where(visible, images, painted)),
        (f"raw prediction{star}", painted),
    ]
    note = "In the third column the visible cells are the input's own; the fourth is the prediction for every cell."
    if uses_target_statistics:
        note += (
            " * Each predicted cell was given the mean and std of the ORIGINAL cell: only its pattern is the model's."
        )
    return _grid(columns, title=title, note=note, row_names=[f"loss {loss:.3f}" for loss in losses])


def _grid(columns: Sequence[tuple[str, Bytes]], *, title: str, note: str, row_names: Sequence[str]) -> bytes:
    """Pictures placed to the pixel, so that none is resampled by a fraction."""
    num_rows, image_h, image_w = columns[0][1].shape[:3]
    scale = max(1, round(TILE / max(image_h, image_w)))
    tile_h, tile_w = image_h * scale, image_w * scale
    left = MARGIN + (22 if row_names else 0)
    column_w = max(tile_w, MIN_COLUMN)
    width = left + len(columns) * (column_w + GAP) - GAP + MARGIN
    lines = _wrapped(note, width - left - MARGIN)
    foot = FOOT + 15 * (len(lines) - 1)
    height = HEAD + COLUMN_HEAD + num_rows * (tile_h + GAP) - GAP + foot

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def text(x: float, y: float, words: str, size: int, color: str, **options: Any) -> None:
        figure.text(x / width, 1 - y / height, words, fontsize=size, color=color, **options)

    text(left, HEAD / 2 + 4, title, 11, INK, va="center", ha="left", weight="bold")
    text(left, height - foot / 2, "\n".join(lines), 8, SOFT_INK, va="center", ha="left", linespacing=1.35)
    for c, (name, pictures) in enumerate(columns):
        x = left + c * (column_w + GAP) + (column_w - tile_w) // 2
        text(x + tile_w / 2, HEAD + COLUMN_HEAD / 2, name, 9, INK, va="center", ha="center")
        for r in range(num_rows):
            y = HEAD + COLUMN_HEAD + r * (tile_h + GAP)
            axes = figure.add_axes((x / width, 1 - (y + tile_h) / height, tile_w / width, tile_h / height))
            axes.imshow(pictures[r], interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    for r, name in enumerate(row_names):
        y = HEAD + COLUMN_HEAD + r * (tile_h + GAP) + tile_h / 2
        text(left - 10, y, name, 8, SOFT_INK, va="center", ha="center", rotation=90)

    png = io.BytesIO()
    canvas.print_png(png)
    return png.getvalue()


def _rgb(images_NCHW: Bytes) -> Bytes:
    """Gray, or the first three of any number of bands as if they were red, green and blue (of two, the first)."""
    images = images_NCHW.transpose(0, 2, 3, 1)
    return images[..., :3] if images.shape[3] >= 3 else np.repeat(images[..., :1], 3, axis=3)


def _to_pixels(cells_NHW: Bools, size_HW: tuple[int, int]) -> Bools:
    rows, columns = (pixels // cells for pixels, cells in zip(size_HW, cells_NHW.shape[1:], strict=True))
    return cells_NHW.repeat(rows, axis=1).repeat(columns, axis=2)


def _wrapped(words: str, width: float) -> list[str]:
    """Lines of the foot, at about 5.6 pixels a letter of 8 points."""
    return [part for line in words.splitlines() for part in textwrap.wrap(line, max(20, int(width / 5.6)))]
