"""Charts of points in the plane: of classes, of what was reached, of what that cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from maskray.figures.axis import LEGEND, LINE, ROOM_AT_SIDE, Line, dress, explain, name_sides
from maskray.figures.canvas import (
    CLASS_COLORS,
    DPI,
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

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

_MARKS = "osD^vP*X"
_LEGEND_ROWS = 34
BEST, DONE, STOPPED, FRONT = "#ffd24a", "#0072b2", "#8a8f9c", "#b3541e"
_MARGIN, _TITLE_LINE = 16, 20
_WIDTH, _HEIGHT, _KEY_WIDTH, _KEY_ENTRY = 520, 340, 330, 34
_WIDE = 8
"""Times the cheapest is the dearest, from which costs are laid by their logarithm."""
_AROUND = ((-10, 10), (10, -10), (-10, -10), (10, 10), (0, 17), (0, -17), (-17, 0), (17, 0), (-17, 17), (17, -17))
"""Pixels right and up of a point, where its number may stand."""


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


class Reached(NamedTuple):
    """What was reached, and for what."""

    cost: float
    value: float
    half: float | None = None
    """Half of the value's interval."""
    name: str = ""
    said: str = ""
    """Value and cost in words."""
    is_on_front: bool = False
    """Nothing cheaper is as good."""
    is_partial: bool = False
    """There is less behind it than behind the others."""
    is_best: bool = False


def trade_off(
    reached: Sequence[Reached],
    *,
    title: str,
    axis_names: tuple[str, str],
    stopped: Sequence[tuple[float, float]] = (),
    note: str = "",
) -> bytes:
    """PNG of what was reached by what it cost. The points of the front are joined, numbered, and named at the side.

    Args:
        reached: one at least.
        title: stands above all.
        axis_names: of cost and value.
        stopped: cost and value of what did not run to its end.
        note: below all.
    """
    ordered = sorted((one for one in reached if one.is_on_front), key=lambda one: one.cost)
    width = 2 * _MARGIN + ROOM_AT_SIDE + _WIDTH + _KEY_WIDTH
    costs = [*(one.cost for one in reached), *(cost for cost, _ in stopped)]
    line = Line(costs, logarithmic=min(costs) > 0 and max(costs) > _WIDE * min(costs))
    figure, box = _framed(title, note, width, line.height(_WIDTH))
    axes = axes_in(figure, box)
    others = [one for one in reached if not one.is_on_front]
    whole, partial = ([one for one in others if one.is_partial == is_partial] for is_partial in (False, True))
    if whole:
        axes.plot(*_places(whole), "o", color=DONE, markersize=5, alpha=0.75, label="a point", zorder=3)
    if partial:
        axes.plot(
            *_places(partial), "o", color=DONE, markersize=5, fillstyle="none", label="with fewer seeds", zorder=3
        )
    if stopped:
        axes.plot(
            *zip(*stopped, strict=True), "v", color=STOPPED, markersize=4.5, fillstyle="none", zorder=2,
            label="a trial, stopped early",
        )  # fmt: skip
    sure = [(one.cost, one.value, one.half) for one in ordered if one.half is not None]
    if sure:
        xs, ys, halves = zip(*sure, strict=True)
        axes.errorbar(xs, ys, halves, fmt="none", ecolor=FRONT, elinewidth=1, capsize=3, alpha=0.7, zorder=4)
    axes.plot(*_places(ordered), color=FRONT, linestyle="--", linewidth=1.2, drawstyle="steps-post", zorder=2)
    if ordered:
        axes.plot(*_places(ordered), "D", color=FRONT, markersize=6, label="no cheaper one is as good", zorder=5)
    best = [one for one in reached if one.is_best]
    if best:
        axes.plot(
            *_places(best), "*", color=BEST, markeredgecolor=INK, markersize=14, markeredgewidth=0.9, label="best",
            zorder=6,
        )  # fmt: skip
    dress(axes)
    explain(axes)
    axes.margins(y=0.1)
    line.lay(axes, _WIDTH)
    _number(axes, ordered)
    name_sides(figure, box, *axis_names, line.height(_WIDTH))
    _key(figure, ordered, Box(box.left + _WIDTH + 28, box.top, _KEY_WIDTH - 28, _HEIGHT))
    return png(figure)


class Placed(NamedTuple):
    """A point in the plane, with a value."""

    x: float
    y: float
    value: float
    is_best: bool = False


def coloured(
    placed: Sequence[Placed],
    *,
    title: str,
    lines: tuple[Line, Line],
    axis_names: tuple[str, str],
    say: Callable[[float], str],
    less_is_better: bool = False,
    note: str = "",
) -> bytes:
    """PNG of points in the plane, coloured by their value.

    Args:
        placed: one at least.
        title: stands above all.
        lines: the axes across and up.
        axis_names: of these.
        say: a value as it is written beside the colours.
        less_is_better: dark is little.
        note: below all.
    """
    ramp = Ramp([one.value for one in placed], less_is_better=less_is_better)
    side = 40 + max(width_of(f"≤ {say(end)}", 7.5) for end in ramp.ends)
    across, up = lines
    figure, box = _framed(title, note, 2 * _MARGIN + ROOM_AT_SIDE + _WIDTH + side, across.height(_WIDTH))
    axes = axes_in(figure, box)
    axes.scatter(
        [one.x for one in placed], [one.y for one in placed], s=52, c=[ramp.color(one.value) for one in placed],
        edgecolors=SOFT_INK, linewidths=0.6, zorder=3,
    )  # fmt: skip
    for one in placed:
        if one.is_best:
            axes.plot(
                [one.x], [one.y], "*", color=BEST, markeredgecolor=INK, markersize=15, label="best", zorder=5,
            )  # fmt: skip
    dress(axes)
    explain(axes)
    across.lay(axes, _WIDTH)
    up.lay_up(axes, _HEIGHT)
    name_sides(figure, box, *axis_names, across.height(_WIDTH))
    ramp.draw(figure, Box(box.left + _WIDTH + 20, box.top, 14, _HEIGHT), say)
    return png(figure)


def _framed(title: str, note: str, width: float, below: float) -> tuple[Figure, Box]:
    """A figure with all that is written around the frame, and where that stands."""
    room = width - 2 * _MARGIN
    titles, notes = filled(title, room, 11, bold=True), filled(note, room, 8) if note else []
    top = _MARGIN + _TITLE_LINE * len(titles) + 4 + LEGEND
    foot = top + _HEIGHT + below + LINE + 10
    figure = blank(width, foot + LINE * len(notes) + (_MARGIN if notes else 4), sharpness=SHARP)
    write_lines(figure, titles, Box(_MARGIN, _MARGIN, room, _TITLE_LINE * len(titles)), 11, weight="bold")
    write_lines(figure, notes, Box(_MARGIN, foot, room, LINE * len(notes)), 8, color=SOFT_INK)
    return figure, Box(_MARGIN + ROOM_AT_SIDE, top, _WIDTH, _HEIGHT)


def _places(reached: Sequence[Reached]) -> tuple[list[float], list[float]]:
    return [one.cost for one in reached], [one.value for one in reached]


def _number(axes: Axes, ordered: Sequence[Reached]) -> None:
    """A number beside each point, wherever no other one stands."""
    scale = axes.figure.dpi / DPI
    taken: list[tuple[float, float]] = []
    for number, one in enumerate(reversed(ordered), 1):
        x, y = (each / scale for each in axes.transData.transform((one.cost, one.value)))
        where = [(x + right, y + up) for right, up in _AROUND]
        free = [at for at in where if all(abs(at[0] - a) > 16 or abs(at[1] - b) > 13 for a, b in taken)]
        if not free:
            continue  # it is named at the side all the same
        taken.append(free[0])
        right, up = (scale * (there - here) for there, here in zip(free[0], (x, y), strict=True))
        axes.annotate(
            str(number), (one.cost, one.value), xytext=(right, up), textcoords="offset pixels", fontsize=8, color=INK,
            ha="center", va="center", zorder=7,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def _key(figure: Figure, ordered: Sequence[Reached], box: Box) -> None:
    """Those of the front by their numbers, the dearest first, which is the best of them."""
    room = int(box.height // _KEY_ENTRY)
    shown = list(enumerate(reversed(ordered), 1))
    for row, (number, one) in enumerate(shown[: room if len(shown) <= room else room - 1]):
        y = box.top + row * _KEY_ENTRY + 9
        write(figure, box.left + 16, y, str(number), 8, ha="right", weight="bold", color=FRONT)
        write(figure, box.left + 24, y, cut(one.name, box.width - 24, 8), 8)
        write(figure, box.left + 24, y + 14, cut(one.said, box.width - 24, 7.5), 7.5, color=SOFT_INK)
    if len(shown) > room:
        write(figure, box.left + 24, box.top + (room - 1) * _KEY_ENTRY + 9, f"and {len(shown) - room + 1} more", 8)
