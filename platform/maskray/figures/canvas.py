"""What all figures are drawn on and with: no window, no pyplot, no state; colours; letters and the room they take."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

DPI = 100
"""Pixels of a figure that stand for an inch, by which letters are measured in points."""
SHARP = 2
"""Of charts: pixels in place of one, for screens that show as many."""
INK, SOFT_INK = "#1f2430", "#5b6375"
CLASS_COLORS = matplotlib.color_sequences["tab20"][::2] + matplotlib.color_sequences["tab20"][1::2]
_RAMP = matplotlib.colormaps["YlGnBu"]
"""Light to dark, so that it can be read in gray and by whoever confuses colours. Dark is good."""
_RAMP_ENDS = 0.03, 0.8
_FAR = 3.0
"""Quartile distances below the lower quartile at which colours end."""


class Box(NamedTuple):
    """A place on a figure, in pixels from its upper left corner."""

    left: float
    top: float
    width: float
    height: float


def blank(width: float, height: float, *, sharpness: int = 1) -> Figure:
    """An empty white figure.

    Args:
        width: in pixels.
        height: the same.
        sharpness: pixels down and across of the file for each of those.
    """
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI * sharpness, facecolor="white")


def png(figure: Figure) -> bytes:
    """It as a file. Letters that the font lacks are boxes: a key may have any."""
    content = io.BytesIO()
    with _lacking_letters():
        FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def axes_in(figure: Figure, box: Box, **options: Any) -> Axes:
    """Axes of a figure whose frame stands there."""
    width, height = figure.get_size_inches() * DPI
    return figure.add_axes(
        (box.left / width, 1 - (box.top + box.height) / height, box.width / width, box.height / height), **options
    )


def write(figure: Figure, left: float, top: float, words: str, size: float = 8, **options: Any) -> None:
    """Words at a place of a figure in pixels, which are no formula, whatever they have in them."""
    width, height = figure.get_size_inches() * DPI
    options = {"color": INK, "va": "center", "ha": "left"} | options
    figure.text(left / width, 1 - top / height, words, fontsize=size, parse_math=False, **options)


# ------------------------------------------------------------------------------------------------------------- colours


class Ramp:
    """A colour for each number, from the worst, light, to the best, dark.

    Numbers far below the others have the worst one's colour: one bad point must not make all others one colour.

    Args:
        numbers: that are to be told apart; one at least.
        less_is_better: the best is the least.
    """

    def __init__(self, numbers: Sequence[float], *, less_is_better: bool = False) -> None:
        self._sign = -1 if less_is_better else 1
        signed = self._sign * np.array(numbers)
        low, high = np.quantile(signed, [0.25, 0.75])
        least, self._best = float(signed.min()), float(signed.max())
        self._worst = max(least, float(low - _FAR * (high - low))) if high > low else least
        self.is_cut = least < self._worst

    @property
    def ends(self) -> tuple[float, float]:
        """The worst and the best number that have a colour of their own."""
        return self._sign * self._worst, self._sign * self._best

    def color(self, number: float) -> tuple[float, float, float, float]:
        """Red, green, blue and opacity."""
        width = self._best - self._worst
        share = min(1.0, max(0.0, (self._sign * number - self._worst) / width)) if width else 1.0
        return self._at(share)

    def ink(self, number: float) -> str:
        """Black or white, whichever is further from the number's colour (contrast as WCAG 2 has it)."""
        return "black" if (_luminance(self.color(number)) + 0.05) ** 2 > 1.05 * 0.05 else "white"

    def draw(self, figure: Figure, box: Box, say: Callable[[float], str]) -> None:
        """The colours as a bar, best on top, with its ends beside it."""
        axes = axes_in(figure, box)
        axes.imshow(np.array([[self._at(share)] for share in np.linspace(1, 0, 256)]), aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        worst, best = map(say, self.ends)
        sign = ("≥ " if self._sign < 0 else "≤ ") if self.is_cut else ""
        write(figure, box.left + box.width + 6, box.top + 5, best, 7.5, color=SOFT_INK)
        if best != worst:
            write(figure, box.left + box.width + 6, box.top + box.height - 5, sign + worst, 7.5, color=SOFT_INK)

    @staticmethod
    def _at(share: float) -> tuple[float, float, float, float]:
        low, high = _RAMP_ENDS
        red, green, blue, opacity = _RAMP(low + (high - low) * share)
        return red, green, blue, opacity


def _luminance(color: tuple[float, float, float, float]) -> float:
    red, green, blue = (math.pow(part, 2.2) for part in color[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# ------------------------------------------------------------------------------------------------------------- letters


@lru_cache(maxsize=4096)
def width_of(words: str, size: float, *, bold: bool = False) -> float:
    """Pixels across that a line takes, of so many points."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    with _lacking_letters():
        width, _, _ = RendererAgg(1, 1, DPI).get_text_width_height_descent(words, font, ismath=False)
    return float(width)


def cut(words: str, width: float, size: float, *, bold: bool = False) -> str:
    """The words, without their end where they take more pixels than there are."""
    if width_of(words, size, bold=bold) <= width:
        return words
    kept = next(
        (n for n in range(len(words) - 1, 0, -1) if width_of(f"{words[:n]}…", size, bold=bold) <= width),
        1,
    )
    return f"{words[:kept]}…"


def filled(words: str, width: float, size: float, *, bold: bool = False) -> list[str]:
    """Lines that take no more pixels than there are, broken between words."""
    lines: list[str] = []
    for paragraph in words.splitlines():
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and width_of(longer, size, bold=bold) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return [cut(line, width, size, bold=bold) for line in lines]


def write_lines(figure: Figure, lines: Sequence[str], box: Box, size: float, **options: Any) -> None:
    """Lines below each other, which share the height of the box, from its left side."""
    for number, words in enumerate(lines):
        write(figure, box.left, box.top + (number + 0.5) * box.height / len(lines), words, size, **options)


def wrapped(words: str, width: float) -> list[str]:
    """Lines of a note of 8 points, at about 5.6 pixels a letter."""
    return [part for line in words.splitlines() for part in textwrap.wrap(line, max(20, int(width / 5.6)))]


@contextmanager
def _lacking_letters() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield
