"""What all figures are drawn on and with: no window, no pyplot, no state; colours; lines of text."""

from __future__ import annotations

import io
import textwrap
import warnings

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 100
"""Pixels of a figure that stand for an inch, by which letters are measured in points."""
INK, SOFT_INK = "#1f2430", "#5b6375"
CLASS_COLORS = matplotlib.color_sequences["tab20"][::2] + matplotlib.color_sequences["tab20"][1::2]


def blank(width: float, height: float) -> Figure:
    """An empty white figure.

    Args:
        width: in pixels.
        height: the same.
    """
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def png(figure: Figure) -> bytes:
    """It as a file. Letters that the font lacks are boxes: a key may have any."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def wrapped(words: str, width: float) -> list[str]:
    """Lines of a note of 8 points, at about 5.6 pixels a letter."""
    return [part for line in words.splitlines() for part in textwrap.wrap(line, max(20, int(width / 5.6)))]
