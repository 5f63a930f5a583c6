"""What was measured along one axis and how sure it is; and beside it, apart, what others measured along theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from maskray.figures.axis import LEGEND, LINE, NAME, ROOM_AT_SIDE, Line, dress, explain, name_sides
from maskray.figures.canvas import INK, SHARP, SOFT_INK, Box, axes_in, blank, cut, filled, png, write, write_lines

OURS, THEIRS = "#0072b2", ("#b3541e", "#5b4b8a", "#3f7f5f")
BEST = "#ffd24a"
_THEIR_FACE = "#f6f2ea"
_THEIR_LINES = (("--", "s"), (":", "^"), ("-.", "v"))
_MARGIN, _TITLE_LINE, _HEAD = 16, 20, 38
_HEIGHT, _WIDTH, _WIDTH_ALONE, _THEIR_WIDTH, _BETWEEN = 280, 440, 640, 300, 36
_CROWD = 24
"""Points beyond which each is small and bare: intervals would hide them."""
_LONGEST_INTERVAL = 2.0
"""Times what all points span: an interval that is longer leaves the panel, where points would become a line."""


class Measured(NamedTuple):
    """At one value of the axis."""

    x: float
    """The value; or its number, where the axis has names."""
    mean: float
    half: float | None = None
    """Half of the mean's interval."""
    parts: Sequence[float] = ()
    """What the mean is of."""
    is_best: bool = False


class Across(NamedTuple):
    """The axis."""

    name: str
    empty: Sequence[float] = ()
    """Numbers on it at which nothing was measured."""
    names: Sequence[str] = ()
    """What stands at 0, 1, 2 …; empty: numbers."""
    is_logarithmic: bool | None = None
    """None: where the closest two numbers are further apart then."""
    is_joined: bool = True
    """A line joins the points."""


class Up(NamedTuple):
    """What is measured."""

    name: str
    mean: str = "mean"
    """What the points are called."""
    interval: str = "interval"
    """What stands for how sure they are."""
    band: tuple[float, float] | None = None
    """Shaded from one value to another."""
    band_name: str = ""


class Beside(NamedTuple):
    """Curves of others, on a scale of their own."""

    title: str
    """Whose."""
    about: str
    """Of what."""
    scale: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def curves(
    measured: Sequence[Measured],
    *,
    title: str,
    across: Across,
    up: Up,
    about: str = "",
    beside: Beside | None = None,
    note: str = "",
) -> bytes:
    """PNG of a curve with intervals, and to its right, in a panel of another colour, those of others.

    Of very many points there are no intervals.

    Args:
        measured: along the axis.
        title: stands above all.
        across: the axis; where it has numbers, both panels have the same piece of it.
        up: what is measured.
        about: of what it is, where others are beside it.
        beside: drawn to the right.
        note: below all.
    """
    plot_w = _WIDTH if beside else _WIDTH_ALONE
    width = 2 * _MARGIN + ROOM_AT_SIDE + plot_w + (_BETWEEN + _THEIR_WIDTH + ROOM_AT_SIDE if beside else 0)
    if len(measured) > _CROWD:
        measured = [one._replace(half=None, parts=()) for one in measured]
    low, high, is_cut = _reach(measured, up.band)
    said = " ".join([note, *(["Intervals that leave the panel are longer than is shown."] if is_cut else [])]).strip()
    room = width - 2 * _MARGIN
    titles, notes = filled(title, room, 11, bold=True), filled(said, room, 8) if said else []
    theirs = [x for curve in (beside.curves.values() if beside else ()) for x, _ in curve]
    xs = [*(one.x for one in measured), *across.empty]
    line = Line(xs if across.names else [*xs, *theirs], across.names, logarithmic=across.is_logarithmic)
    below = line.height(plot_w)
    top = _MARGIN + _TITLE_LINE * len(titles) + (_HEAD if beside else 4) + LEGEND
    foot = top + _HEIGHT + below + LINE + 10

    figure = blank(width, foot + LINE * len(notes) + (_MARGIN if notes else 4), sharpness=SHARP)
    write_lines(figure, titles, Box(_MARGIN, _MARGIN, room, _TITLE_LINE * len(titles)), 11, weight="bold")
    write_lines(figure, notes, Box(_MARGIN, foot, room, LINE * len(notes)), 8, color=SOFT_INK)
    box = Box(_MARGIN + ROOM_AT_SIDE, top, plot_w, _HEIGHT)
    ours = axes_in(figure, box)
    _draw(ours, measured, up, joined=across.is_joined)
    ours.set_ylim(low, high)
    line.lay(ours, plot_w, xs, next((one.x for one in measured if one.is_best), None))
    name_sides(figure, box, across.name, up.name, below)
    if beside is not None:
        _headed(figure, box, "This sweep", about, OURS)
        _beside(
            figure,
            beside,
            Box(box.left + plot_w + _BETWEEN, top, _THEIR_WIDTH, _HEIGHT),
            Line(theirs) if across.names else line,
            across.name,
        )
    return png(figure)


def _draw(axes: Axes, measured: Sequence[Measured], up: Up, *, joined: bool) -> None:
    ordered = sorted(measured, key=lambda one: one.x)
    xs, means = [one.x for one in ordered], [one.mean for one in ordered]
    sure = [(one.x, one.mean, one.half) for one in ordered if one.half is not None]
    size = 6.5 if len(ordered) <= _CROWD else 4
    axes.plot(
        xs, means, "o", color=OURS, markersize=size, label=f"{up.mean}, {up.interval}" if sure else up.mean, zorder=4
    )
    if joined:
        axes.plot(xs, means, color=OURS, linewidth=1.6, zorder=2)
    parts = [(one.x, part) for one in ordered if len(one.parts) > 1 for part in one.parts]
    if parts:
        apart = ScaledTranslation(6 / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot(
            *zip(*parts, strict=True), "o", color=OURS, markersize=3.4, fillstyle="none", markeredgewidth=0.8,
            alpha=0.8, transform=axes.transData + apart, label="one seed", zorder=2.5,
        )  # fmt: skip
    if sure:
        at, middles, halves = zip(*sure, strict=True)
        axes.errorbar(at, middles, halves, fmt="none", ecolor=OURS, elinewidth=1.3, capsize=3.5, zorder=3)
    best = [(one.x, one.mean) for one in ordered if one.is_best]
    if best:
        axes.plot(
            *zip(*best, strict=True), "*", color=BEST, markeredgecolor=INK, markersize=14, markeredgewidth=0.9,
            label="best", zorder=5,
        )  # fmt: skip
    if up.band is not None:
        axes.axhspan(*up.band, color=OURS, alpha=0.13, linewidth=0, label=up.band_name or None)
    dress(axes)
    explain(axes)


def _reach(measured: Sequence[Measured], band: tuple[float, float] | None) -> tuple[float, float, bool]:
    """Ends of the panel up and down, and whether an interval leaves it."""
    points = [value for one in measured for value in (one.mean, *one.parts)] + list(band or ())
    ends = [one.mean + sign * one.half for one in measured if one.half is not None for sign in (-1, 1)]
    low, high = min(points), max(points)
    most = _LONGEST_INTERVAL * (high - low) or abs(high) + 1
    least_end, most_end = max(min(low, *ends, low), low - most), min(max(high, *ends, high), high + most)
    rim = 0.07 * (most_end - least_end) or 0.05 * abs(high) or 0.5
    is_cut = bool(ends) and (min(ends) < least_end - rim or max(ends) > most_end + rim)
    return least_end - rim, most_end + rim, is_cut


def _beside(figure: Figure, beside: Beside, box: Box, line: Line, across: str) -> None:
    axes = axes_in(figure, box, facecolor=_THEIR_FACE)
    for number, (name, curve) in enumerate(beside.curves.items()):
        style, mark = _THEIR_LINES[number % len(_THEIR_LINES)]
        axes.plot(
            *zip(*curve, strict=True), linestyle=style, marker=mark, color=THEIRS[number % len(THEIRS)], markersize=4.5,
            linewidth=1.4, markerfacecolor="white", label=name,
        )  # fmt: skip
    xs = [x for curve in beside.curves.values() for x, _ in curve]
    line.lay(axes, box.width, xs)
    axes.yaxis.tick_right()
    axes.margins(y=0.08)
    dress(axes)
    explain(axes)
    name_sides(figure, box, across, beside.scale, line.height(box.width), right=True)
    _headed(figure, box, beside.title, beside.about, THEIRS[0])


def _headed(figure: Figure, box: Box, title: str, about: str, color: str) -> None:
    at = box.top - LEGEND - _HEAD / 2
    write(figure, box.left, at - 6, cut(title, box.width, NAME, bold=True), NAME, color=color, weight="bold")
    write(figure, box.left, at + 8, cut(about, box.width, 8), 8, color=SOFT_INK)
