"""One image as many models see and paint it.

Shape letters: R rows, C columns; and as in `pictures.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform

from maskray.figures.canvas import (
    INK,
    SHARP,
    SOFT_INK,
    Box,
    blank,
    cut,
    filled,
    png,
    width_of,
    write,
    write_lines,
)
from maskray.figures.pictures import GAP, HIDDEN_COLOR, MARGIN, Bools, Bytes, rgb, to_pixels

_LEAST_TILE, _MOST_TILE, _TABLE_WIDTH, _ROW_NAME = 44, 96, 900, 150


class Painted(NamedTuple):
    """One image, what a model saw of it, and what it painted."""

    image_CHW: Bytes
    visible_HW: Bools
    """True = the model saw the cell."""
    painted_CHW: Bytes
    """The prediction for every cell, those the model saw included."""
    uses_target_statistics: bool = False
    """Each painted cell's mean and std were taken from the original; a star says so."""
    is_best: bool = False


def paintings(
    painted_RC: Sequence[Sequence[Painted | None]],
    *,
    title: str,
    across: tuple[str, Sequence[str]],
    down: tuple[str, Sequence[str]] | None = None,
    note: str = "",
) -> bytes:
    """PNG of one image as many models saw and painted it, row by row, with the image itself before them.

    Args:
        painted_RC: what each saw, and to its right what it painted into that; None: nothing is known.
        title: stands above all.
        across: name of the columns, and of each.
        down: the same of the rows; None: there is one.
        note: below all.
    """
    known = [one for row in painted_RC for one in row if one is not None]
    num_columns = len(across[1])
    tile = max(_LEAST_TILE, min(_MOST_TILE, int(_TABLE_WIDTH / (2 * num_columns + 1))))
    names = down[1] if down else [""] * len(painted_RC)
    left = MARGIN + tile + 2 * GAP + _widest(names)
    left = max(left, MARGIN + width_of(f"{down[0]} ↓", 8) + 2 * GAP) if down else left
    pair = 2 * tile + 2
    width = max(left + num_columns * (pair + GAP) - GAP + MARGIN, left + width_of(f"{across[0]} →", 8) + MARGIN, 420)
    room = width - 2 * MARGIN
    titles, notes = filled(title, room, 11, bold=True), filled(note, room, 8) if note else []
    top = MARGIN + 20 * len(titles) + 3 * 15 + 4
    foot = top + len(painted_RC) * (tile + GAP) + 4
    figure = blank(width, foot + 15 * len(notes) + (MARGIN if notes else 4), sharpness=SHARP)

    write_lines(figure, titles, Box(MARGIN, MARGIN, room, 20 * len(titles)), 11, weight="bold")
    write_lines(figure, notes, Box(MARGIN, foot, room, 15 * len(notes)), 8, color=SOFT_INK)
    write(figure, left, top - 39, f"{across[0]} →" if across[0] else "", 8, color=SOFT_INK)
    if down is not None:
        write(figure, left - 8, top - 39, f"{down[0]} ↓", 8, ha="right", color=SOFT_INK)
    _show(figure, Box(MARGIN, top, tile, tile), rgb(known[0].image_CHW[None])[0])
    write(figure, MARGIN + tile / 2, top - 9, "input", 7, ha="center", color=SOFT_INK)
    for column, name in enumerate(across[1]):
        x = left + column * (pair + GAP)
        write(figure, x + pair / 2, top - 24, cut(name, pair, 8), 8, ha="center")
        star = " *" if any(one.uses_target_statistics for one in known) else ""
        for half, words in enumerate(("seen", f"painted{star}")):
            write(figure, x + half * (tile + 2) + tile / 2, top - 9, words, 7, ha="center", color=SOFT_INK)
    for row, line in enumerate(painted_RC):
        y = top + row * (tile + GAP)
        lines = filled(names[row], _ROW_NAME, 8)[: tile // 14]
        write(figure, left - 8, y + tile / 2, "\n".join(lines), 8, ha="right", linespacing=1.3)
        for column, one in enumerate(line):
            _pair(figure, one, Box(left + column * (pair + GAP), y, pair, tile))
    return png(figure)


def _pair(figure: Figure, one: Painted | None, box: Box) -> None:
    if one is None:
        for number in range(2):
            _show(figure, _half(box, number), np.full((1, 1, 3), 238, np.uint8))
        write(figure, box.left + box.width / 2, box.top + box.height / 2, "none", 7, ha="center", color=SOFT_INK)
        return
    image, painted = rgb(one.image_CHW[None])[0], rgb(one.painted_CHW[None])[0]
    visible = to_pixels(one.visible_HW[None], image.shape[:2])[0][..., None]
    seen = np.where(visible, image, np.array(HIDDEN_COLOR, dtype=np.uint8))
    for half, picture in enumerate((seen, np.where(visible, image, painted))):
        _show(figure, _half(box, half), picture)
    if one.is_best:
        _frame(figure, Box(box.left - 3, box.top - 3, box.width + 6, box.height + 6))


def _half(pair: Box, number: int) -> Box:
    return Box(pair.left + number * (pair.height + 2), pair.top, pair.height, pair.height)


def _widest(names: Sequence[str]) -> float:
    """Room for what stands left of the rows."""
    lines = [line for name in names for line in filled(name, _ROW_NAME, 8)]
    return max((width_of(line, 8) + 8 for line in lines), default=0)


def _show(figure: Figure, box: Box, image_HWC: Bytes) -> None:
    """A picture as large as has room in a box, in its middle, laid on the figure's own pixels."""
    scale = SHARP * min(box.height / image_HWC.shape[0], box.width / image_HWC.shape[1])
    height, width = (round(side * scale) for side in image_HWC.shape[:2])
    left = SHARP * box.left + (SHARP * box.width - width) / 2
    bottom = figure.bbox.height - SHARP * (box.top + box.height) + (SHARP * box.height - height) / 2
    shown = _resized(_resized(image_HWC, height).swapaxes(0, 1), width).swapaxes(0, 1)
    figure.figimage(shown, round(left), round(bottom), origin="upper")


def _resized(image_HWC: Bytes, height: int) -> Bytes:
    """So many pixels high: each one of the image's, or the mean of those that it stands for."""
    old = image_HWC.shape[0]
    if height >= old:
        larger: Bytes = image_HWC[np.arange(height) * old // height]
        return larger
    edges = np.arange(height + 1) * old // height
    sums = np.add.reduceat(image_HWC, edges[:-1], axis=0, dtype=np.int64)
    smaller: Bytes = (sums / np.diff(edges)[:, None, None]).round().astype(np.uint8)
    return smaller


def _frame(figure: Figure, box: Box) -> None:
    left, bottom = SHARP * box.left, figure.bbox.height - SHARP * (box.top + box.height)
    size = SHARP * box.width, SHARP * box.height
    figure.add_artist(
        Rectangle((left, bottom), *size, transform=IdentityTransform(), fill=False, edgecolor=INK, linewidth=1.6)
    )
