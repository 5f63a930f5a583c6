"""A number at each place of a table, in a colour that says it too.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from maskray.figures.canvas import (
    INK,
    SHARP,
    SOFT_INK,
    Box,
    Ramp,
    axes_in,
    blank,
    cut,
    filled,
    png,
    width_of,
    write,
    write_lines,
)

MARGIN, BAR, TITLE_LINE, LINE, CELL_LINE = 16, 14, 20, 16, 15
LARGE, SMALL, NAME = 10, 7.5, 9
_NARROWEST_CELL, _WIDEST_CELL, _TABLE, _MARK = 74, 130, 600, 18
"""Few columns are as wide as makes a table of this width."""
_WIDEST_ROW_NAME, _NARROWEST = 190, 460
_EMPTY, _HATCH = "#f2f2f0", "#d9d9d6"


class Cell(NamedTuple):
    """One place."""

    value: float | None
    """By which it is coloured; None: it is hatched."""
    lines: Sequence[str]
    """That stand in it, the first larger."""
    is_best: bool = False
    is_close: bool = False
    """Not told apart from the best."""


class Side(NamedTuple):
    """Rows or columns."""

    name: str
    values: Sequence[str]


def heat_map(
    cells_RC: Sequence[Sequence[Cell]],
    *,
    title: str,
    across: Side,
    down: Side,
    say: Callable[[float], str],
    note: str = "",
    less_is_better: bool = False,
) -> bytes:
    """PNG of a table whose cells are coloured, the best one framed with a ★, those as good as it with a ≈.

    Args:
        cells_RC: row by row; one at least has a value.
        title: stands above all.
        across: the columns.
        down: the rows.
        say: a value as it is written beside the colours.
        note: below all.
        less_is_better: dark is little.
    """
    cells = [cell for row in cells_RC for cell in row]
    ramp = Ramp([cell.value for cell in cells if cell.value is not None], less_is_better=less_is_better)
    cell_w = _cell_width(cells, across)
    cell_h = 14 + CELL_LINE * max(2, *(len(cell.lines) for cell in cells))
    left = MARGIN + min(_WIDEST_ROW_NAME, max(width_of(words, NAME) for words in down.values)) + 10
    table_w, table_h = cell_w * len(across.values), cell_h * len(down.values)
    bar_w = BAR + 8 + max(width_of(f"≤ {say(end)}", SMALL) for end in ramp.ends)
    width = max(left + table_w + MARGIN + bar_w + MARGIN, left + width_of(across.name, NAME) + MARGIN, _NARROWEST)
    room = width - 2 * MARGIN
    titles, notes = filled(title, room, 11, bold=True), filled(note, room, 8) if note else []
    top = MARGIN + TITLE_LINE * len(titles) + LINE + 6
    foot = top + table_h + 2 * LINE + 10
    figure = blank(width, foot + LINE * len(notes) + (MARGIN if notes else 4), sharpness=SHARP)

    write_lines(figure, titles, Box(MARGIN, MARGIN, room, TITLE_LINE * len(titles)), 11, weight="bold")
    write(figure, MARGIN, top - LINE / 2 - 3, cut(down.name, room, NAME), NAME, color=SOFT_INK)
    for row, words in enumerate(down.values):
        shown = cut(words, left - MARGIN - 10, NAME)
        write(figure, left - 10, top + (row + 0.5) * cell_h, shown, NAME, ha="right")
    for column, words in enumerate(across.values):
        shown, middle = cut(words, cell_w - 6, NAME), left + (column + 0.5) * cell_w
        write(figure, middle, top + table_h + LINE / 2 + 3, shown, NAME, ha="center")
    middle = left + max(table_w, width_of(across.name, NAME)) / 2
    write(figure, middle, top + table_h + 1.5 * LINE + 5, across.name, NAME, ha="center", color=SOFT_INK)
    axes = axes_in(figure, Box(left, top, table_w, table_h), xlim=(0, table_w), ylim=(table_h, 0))
    axes.set_axis_off()
    for row, line in enumerate(cells_RC):
        for column, cell in enumerate(line):
            _draw(axes, cell, Box(column * cell_w, row * cell_h, cell_w, cell_h), ramp)
    ramp.draw(figure, Box(left + table_w + MARGIN, top + 1, BAR, table_h - 2), say)
    write_lines(figure, notes, Box(MARGIN, foot, room, LINE * len(notes)), 8, color=SOFT_INK)
    return png(figure)


def _cell_width(cells: Sequence[Cell], across: Side) -> float:
    fair = min(_WIDEST_CELL, max(_NARROWEST_CELL, _TABLE / len(across.values)))
    large = [width_of(cell.lines[0], LARGE, bold=True) + 2 * _MARK + 6 for cell in cells if cell.value is not None]
    small = [width_of(words, SMALL) + 10 for cell in cells for words in cell.lines[cell.value is not None :]]
    names = [min(fair, width_of(words, NAME) + 10) for words in across.values]
    return max(fair, *large, *small, *names)


def _draw(axes: Axes, cell: Cell, box: Box, ramp: Ramp) -> None:
    middle, lines = box.top + box.height / 2, cell.lines
    if cell.value is None:
        ink = SOFT_INK
        first: dict[str, Any] = {"fontsize": SMALL}
        look: dict[str, Any] = {"facecolor": _EMPTY, "edgecolor": _HATCH, "hatch": "////"}
    else:
        ink, first = ramp.ink(cell.value), {"fontsize": LARGE, "weight": "bold"}
        look = {"facecolor": ramp.color(cell.value), "edgecolor": "none"}
    corner = box.left + 1, box.top + 1
    axes.add_patch(Rectangle(corner, box.width - 2, box.height - 2, linewidth=0, **look))
    for number, words in enumerate(lines):
        axes.text(
            box.left + box.width / 2, middle + (number - (len(lines) - 1) / 2) * CELL_LINE, words, color=ink,
            ha="center", va="center_baseline", parse_math=False, **({"fontsize": SMALL} if number else first),
        )  # fmt: skip
    if cell.is_best:
        for inset, color, line in ((2.5, INK, 3.0), (5, "white", 1.0)):
            frame = (box.left + inset, box.top + inset), box.width - 2 * inset, box.height - 2 * inset
            axes.add_patch(Rectangle(*frame, fill=False, edgecolor=color, linewidth=line))
    mark = "★" if cell.is_best else "≈" if cell.is_close else ""
    axes.text(
        box.left + box.width - _MARK / 2 - 4, box.top + 14, mark, fontsize=8.5, color=ink, ha="center", va="center"
    )
