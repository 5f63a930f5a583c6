"""Which points of a sweep stand beside each other: along one axis or over two, all else being equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskray.config.space import Choice, Grid, LogUniform, identity
from maskray.config.sweep import SweepConfig
from maskray.sweeps.ranking import PointSummary


@dataclass(frozen=True)
class Axis:
    """A key of the space of which there is more than one value."""

    key: str
    values: tuple[Any, ...]
    """In order; all that the config lists, and those that points have."""
    is_listed: bool
    """The config lists the values."""
    is_crossed: bool
    """Every value was taken with each of the other keys' (a grid); else they were drawn together with others."""
    is_logarithmic: bool
    """Values were drawn by their logarithm."""

    @property
    def is_numeric(self) -> bool:
        """Whether values have an order and a distance."""
        return all(_is_number(value) for value in self.values)


@dataclass(frozen=True)
class View:
    """Points along some axes."""

    keys: tuple[str, ...]
    fixed: Mapping[str, Any]
    """Other keys of which there is more than one value, held at what the best point has."""
    free: tuple[str, ...]
    """Others that may be anything: drawn together with these, or under a condition that the best does not meet."""
    points: tuple[PointSummary, ...]
    """In the order of their rank."""

    def cells(self) -> dict[tuple[str, ...], PointSummary]:
        """The point at each place, by the identities of the axes' values; of several the first by rank."""
        found: dict[tuple[str, ...], PointSummary] = {}
        for one in self.points:
            if all(key in one.point for key in self.keys):
                found.setdefault(tuple(identity(one.point[key]) for key in self.keys), one)
        return found


def axes_of(config: SweepConfig, points: Sequence[PointSummary]) -> list[Axis]:
    """The axes of which there is more than one value, in the order of the space."""
    return [axis for key in config.space if len((axis := _axis(config, key, points)).values) > 1]


def main_axes(axes: Sequence[Axis]) -> tuple[Axis, Axis] | None:
    """The two that a sweep is shown over: the first two, listed ones before those that were drawn between two ends."""
    listed = [axis for axis in axes if axis.is_listed]
    first = (listed if len(listed) > 1 else axes)[:2]
    return (first[0], first[1]) if len(first) > 1 else None


def view(axes: Sequence[Axis], points: Sequence[PointSummary], keys: Sequence[str]) -> View:
    """The points that differ from the best by these keys alone.

    Keys that were drawn together have no other point to be compared at: along one of them the others vary freely. A key
    that is there under a condition is compared where both points have it.

    Args:
        axes: of the sweep.
        points: in the order of rank; the first is the best.
        keys: of the axes that vary.
    """
    best, drawn = points[0], {axis.key for axis in axes if not axis.is_crossed}
    free = {axis.key for axis in axes if axis.key not in best.point} | (drawn if drawn & set(keys) else set())
    held = [axis.key for axis in axes if axis.key not in {*keys, *free}]
    alike = tuple(one for one in points if all(_agree(one, best, key) for key in held))
    return View(
        keys=tuple(keys),
        fixed={key: best.point[key] for key in held},
        free=tuple(a.key for a in axes if a.key in free - set(keys) and any(a.key in one.point for one in alike)),
        points=alike,
    )


def _agree(one: PointSummary, best: PointSummary, key: str) -> bool:
    return key not in one.point or identity(one.point[key]) == identity(best.point[key])


def _axis(config: SweepConfig, key: str, points: Sequence[PointSummary]) -> Axis:
    axis = config.space[key]
    is_listed = isinstance(axis, Grid | Choice)
    found = [one.point[key] for one in points if key in one.point]  # more than is listed, if the config was changed
    given = [*axis.values, *found] if isinstance(axis, Grid | Choice) else found
    distinct: tuple[Any, ...] = tuple({identity(value): value for value in given}.values())
    ordered = tuple(sorted(distinct)) if all(_is_number(value) for value in distinct) else distinct
    return Axis(key, ordered, is_listed, isinstance(axis, Grid), isinstance(axis, LogUniform))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
