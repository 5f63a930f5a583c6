"""Charts of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from maskray.figures.canvas import CLASS_COLORS, INK, SOFT_INK, blank, png

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

_MARKS = "osD^vP*X"
_LEGEND_ROWS = 34


def scatter(
    points_N2: Floats,
    classes: Sequence[tuple[str, Bools]],
    *,
    title: str,
    axis_names: tuple[str, str],
    note: str = "",
) -> bytes:
    """PNG of points in the plane, each class in its own colour with its name in a legend.

    Args:
        points_N2: where they lie.
        classes: name, and which points are of it, (N,) bool; empty where there are none. Beyond the number of colours
            those are used again, with other marks.
        title: stands above all.
        axis_names: across and up.
        note: below all.
    """
    shown = classes or [("", np.ones(len(points_N2), dtype=np.bool_))]
    figure = blank(960, 720)
    columns = -(-len(classes) // _LEGEND_ROWS)
    right = 1 - (0.16 * columns if classes else 0.03)
    axes = figure.add_axes((0.08, 0.11, max(0.3, right - 0.09), 0.82))
    size = float(np.clip(20_000 / max(1, len(points_N2)), 4, 28))
    for number, (name, is_of_it) in enumerate(shown):
        color, mark = CLASS_COLORS[number % len(CLASS_COLORS)], _MARKS[number // len(CLASS_COLORS) % len(_MARKS)]
        points = points_N2[is_of_it]
        axes.scatter(points[:, 0], points[:, 1], s=size, c=[color], marker=mark, alpha=0.75, linewidths=0, label=name)
    axes.set_xlabel(axis_names[0], fontsize=9, color=SOFT_INK)
    axes.set_ylabel(axis_names[1], fontsize=9, color=SOFT_INK)
    axes.tick_params(labelsize=8, colors=SOFT_INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.08, 0.965, title, fontsize=11, color=INK, va="center", weight="bold", parse_math=False)
    figure.text(0.08, 0.025, note, fontsize=8, color=SOFT_INK, va="center", parse_math=False)
    if classes:
        legend = axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False, ncols=columns, markerscale=1.6
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return png(figure)
