"""How axes of charts look, and how numbers or names are laid along one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from maskray.figures.canvas import SOFT_INK, Box, cut, width_of, write

LINE, NAME, TICK, LEGEND = 16, 9, 8, 24
ROOM_AT_SIDE = 64
"""Pixels beside the frame for numbers and a name."""
_TICK_GAP = 6
_MOST_LABELLED = 12
"""Values that are written one by one; of more, round numbers are."""
_LONGEST_NAME = 150
_CLEARLY = 1.1
_RIM = 0.06


class Line:
    """Places of values on an axis.

    Args:
        numbers: that are on it; one at least.
        names: what stands at 0, 1, 2 …; empty: the numbers themselves.
        logarithmic: equal ratios are equally far apart; None: where the closest two are further apart then.
    """

    def __init__(self, numbers: Sequence[float], names: Sequence[str] = (), *, logarithmic: bool | None = None) -> None:
        self._names = [cut(name, _LONGEST_NAME, TICK) for name in names]
        distinct = np.unique(np.array(numbers, dtype=float))
        self._is_log = not names and bool(distinct[0] > 0)
        if self._is_log:
            self._is_log = _is_wider(distinct) if logarithmic is None else logarithmic
        low, high = self._to(distinct[0]), self._to(distinct[-1])
        rim = _RIM * (high - low) or 0.5
        self._ends = (-0.5, len(names) - 0.5) if names else (low - rim, high + rim)

    @property
    def ends(self) -> tuple[float, float]:
        """Of the axis, a little beyond the numbers that are on it."""
        low, high = self._ends
        return (math.exp(low), math.exp(high)) if self._is_log else (low, high)

    def is_turned(self, width: float) -> bool:
        """Whether names need to stand upright to have room in so many pixels."""
        return any(width_of(name, TICK) + _TICK_GAP > width / len(self._names) for name in self._names)

    def height(self, width: float) -> float:
        """Pixels that what is written takes below the axis."""
        return 10 + (max(width_of(name, TICK) for name in self._names) if self.is_turned(width) else 12)

    def lay(self, axes: Axes, width: float, marked: Sequence[float] = (), first: float | None = None) -> None:
        """Give it to axes that are so many pixels wide, with what is written as far as there is room.

        Args:
            axes: that get it across.
            width: of the axes in pixels.
            marked: numbers that are written; round ones are, where these are many or none.
            first: the one that is written before all others.
        """
        axes.set_xscale("log" if self._is_log else "linear")
        axes.set_xlim(*self.ends)
        labels = dict(enumerate(self._names)) if self._names else self._labels(width, _width, marked, first)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(list(labels), list(labels.values()), rotation=90 if self.is_turned(width) else 0)
        if not self._names and len(set(marked)) <= _MOST_LABELLED:
            axes.set_xticks(sorted(set(marked) - set(labels)), minor=True)
            axes.xaxis.set_minor_formatter(NullFormatter())
        for text in axes.get_xticklabels():
            text.set_parse_math(False)

    def lay_up(self, axes: Axes, height: float) -> None:
        """Give its numbers to axes that are so many pixels high, upwards, with round ones written."""
        axes.set_yscale("log" if self._is_log else "linear")
        axes.set_ylim(*self.ends)
        labels = self._labels(height, lambda _: 2 * TICK, (), None)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_yticks(list(labels), list(labels.values()))

    def _labels(
        self, length: float, size: Callable[[float], float], marked: Sequence[float], first: float | None
    ) -> dict[float, str]:
        """What is written where: no two closer than their sizes."""
        distinct = sorted(set(marked))
        if not 0 < len(distinct) <= _MOST_LABELLED:
            distinct = self._round_numbers()
        wanted = [*([first] if first in distinct else []), distinct[0], distinct[-1], *distinct]
        kept: dict[float, str] = {}
        taken: list[tuple[float, float]] = []
        for number in dict.fromkeys(each for each in wanted if each is not None):
            middle = (self._to(number) - self._ends[0]) / (self._ends[1] - self._ends[0]) * length
            half = size(number) / 2
            if all(middle + half <= left or middle - half >= right for left, right in taken):
                kept[number] = f"{number:g}"
                taken.append((middle - half, middle + half))
        return dict(sorted(kept.items()))

    def _round_numbers(self) -> list[float]:
        low, high = self.ends
        if self._is_log and high / low > 4:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            found = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        else:
            found = [float(each) for each in MaxNLocator(nbins=8, steps=[1, 2, 5, 10]).tick_values(low, high)]
        return [float(f"{each:.12g}") for each in found if low <= each <= high]

    def _to(self, number: float) -> float:
        return math.log(number) if self._is_log else float(number)


def _width(number: float) -> float:
    return width_of(f"{number:g}", TICK) + _TICK_GAP


def _is_wider(distinct: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    """Whether the closest two lie further apart, as a share of all, on a logarithmic axis."""
    if len(distinct) < 3:
        return False
    plain, logarithmic = (np.diff(each).min() / (each[-1] - each[0]) for each in (distinct, np.log(distinct)))
    return bool(logarithmic > _CLEARLY * plain)


def dress(axes: Axes) -> None:
    """Quiet frame and letters, lines at round numbers up the side."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, min_n_ticks=3, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    axes.tick_params(labelsize=TICK, colors=SOFT_INK, which="both")
    axes.grid(axis="y", color="#e3e3e0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_color("#b9bdc6")


def explain(axes: Axes) -> None:
    """What is drawn, in a row above the frame: that which has a label."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(-0.005, 1.0), ncols=len(handles), frameon=False,
            fontsize=7.5, columnspacing=1.1, handletextpad=0.4, handlelength=1.9, borderaxespad=0.2,
        )  # fmt: skip


def name_sides(figure: Figure, box: Box, across: str, up: str, below: float, *, right: bool = False) -> None:
    """The names of both sides of axes, clear of what is written at them.

    Args:
        figure: that they are on.
        box: of the axes' frame.
        across: name of the lower side.
        up: name of the left side.
        below: pixels that what is written below the frame takes.
        right: the second is the name of the right side.
    """
    middle, foot = box.left + box.width / 2, box.top + box.height + below + LINE / 2
    write(figure, middle, foot, cut(across, box.width, NAME), NAME, ha="center", color=SOFT_INK)
    side = box.left + box.width + ROOM_AT_SIDE - 10 if right else box.left - ROOM_AT_SIDE + 10
    shown = cut(up, box.height, NAME)
    write(figure, side, box.top + box.height / 2, shown, NAME, ha="center", color=SOFT_INK, rotation=90)
