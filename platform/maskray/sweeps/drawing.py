"""The figures of a sweep's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from maskray import wording
from maskray.config.schema import RunConfig
from maskray.config.space import identity
from maskray.config.sweep import SweepConfig
from maskray.figures import charts
from maskray.figures.axis import Line
from maskray.figures.charts import Placed, Reached
from maskray.figures.curves import Across, Measured, Up, curves
from maskray.figures.heat_map import Cell, Side, heat_map
from maskray.figures.paintings import Painted, paintings
from maskray.sweeps import paper
from maskray.sweeps.axes import Axis, View, axes_of, main_axes, view
from maskray.sweeps.measure import Measure, Names, flops
from maskray.sweeps.ranking import PointSummary, Verdict, front, is_known
from maskray.sweeps.record import shown

Look = Callable[[str], Mapping[str, Any] | None]
"""What is kept of a trial's painting, by its key."""
_MOST_PAINTED = 8
"""Points in a list."""
_OTHERS = "The paper's curves are of another model, other data and another scale: compare shapes, not heights."
_SAME = 1.02
"""Times the cheapest finished trial is the dearest, up to which all have spent the same."""


class Drawing(NamedTuple):
    """One figure."""

    name: str
    """Of its file."""
    heading: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Scene:
    """A sweep of which something has run to its end, as all figures need it."""

    config: SweepConfig
    base: RunConfig
    points: Sequence[PointSummary]
    """In the order of their rank."""
    verdict: Verdict
    measure: Measure
    names: Names

    @cached_property
    def axes(self) -> list[Axis]:
        """Of which there is more than one value."""
        return axes_of(self.config, self.points)

    @cached_property
    def close(self) -> set[str]:
        """Identities of the points that are not told apart from the best."""
        return {identity(each.summary.point) for each in self.verdict.others if each.is_noise}

    def is_best(self, one: PointSummary) -> bool:
        """Whether it is."""
        return one is self.verdict.best

    @property
    def band(self) -> tuple[float, float] | None:
        """From the best to what is not told apart from it, as values are written; None: not known."""
        best, margin, factor = self.verdict.best.reached, self.verdict.margin, self.measure.factor
        if margin is None:
            return None
        other = best + margin if self.measure.less_is_better else best - margin
        return factor * min(best, other), factor * max(best, other)

    @property
    def interval(self) -> str:
        """In words."""
        return f"{100 * self.config.confidence:g} % interval"


def draw(scene: Scene, look: Look) -> list[Drawing]:
    """All that there is to be seen."""
    main = main_axes(scene.axes)
    drawings = [_over_two(scene, *main)] if main is not None else []
    drawings += [found for axis in scene.axes if (found := _along(scene, axis)) is not None]
    drawings += _costs(scene)
    painted = _paintings(scene, look)
    return drawings if painted is None else [*drawings, painted]


# ------------------------------------------------------------------------------------------------------- over two axes


def _over_two(scene: Scene, first: Axis, second: Axis) -> Drawing:
    seen = view(scene.axes, scene.points, [first.key, second.key])
    names, measure = scene.names, scene.measure
    heading = f"{first.key} and {second.key}"
    title = f"{measure.title} by {names.of(first.key)} and {names.of(second.key)}"
    if not (first.is_listed and second.is_listed):
        return Drawing("over_two", heading, _held(scene, seen), _field(scene, first, second, seen, title))
    cells, conditional = seen.cells(), bool(scene.config.space[first.key].when or scene.config.space[second.key].when)
    absent = "no such point" if conditional else "not run"
    table = [[_cell(scene, cells.get((identity(a), identity(b))), absent) for a in first.values] for b in second.values]
    is_sure = any(one.half is not None for one in seen.points)
    note = f"Means over seeds, and half of their {scene.interval}s. ★ best" if is_sure else "One seed each. ★ best"
    if scene.close:
        note += ", ≈ not told apart from it"
    if any(0 < len(one.values) < len(scene.verdict.best.values) for one in seen.points):
        note += "; points with fewer seeds than the best come after it"
    png = heat_map(
        table,
        title=title + (f", {measure.unit}" if measure.unit else ""),
        across=Side(first.key, [shown(value) for value in first.values]),
        down=Side(second.key, [shown(value) for value in second.values]),
        say=measure.number,
        note=f"{note}. {_held(scene, seen)}".strip(),
        less_is_better=measure.less_is_better,
    )
    return Drawing("over_two", heading, _held(scene, seen), png)


def _cell(scene: Scene, one: PointSummary | None, absent: str) -> Cell:
    if one is None:
        return Cell(None, [absent])
    if one.mean is None:
        stopped = any(result.status == "pruned" for result in one.results)
        failed = all(result.status == "failed" for result in one.results)
        return Cell(None, ["stopped early" if stopped else "failed" if failed else "no value"])
    lines, asked = [scene.measure.number(one.mean)], len(scene.config.seeds)
    if one.half is not None:
        lines.append(f"± {scene.measure.number(one.half)}")
    if len(one.values) < asked:
        lines.append(f"{len(one.values)} of {asked} seeds")
    return Cell(one.mean, lines, scene.is_best(one), identity(one.point) in scene.close)


def _field(scene: Scene, first: Axis, second: Axis, seen: View, title: str) -> bytes:
    across, up = (first, second) if second.is_numeric else (second, first)
    there = [one for one in seen.points if one.mean is not None and {across.key, up.key} <= one.point.keys()]
    xs, ys = ([_place(axis, one.point[axis.key]) for one in there] for axis in (across, up))
    return charts.coloured(
        [Placed(x, y, one.reached, scene.is_best(one)) for x, y, one in zip(xs, ys, there, strict=True)],
        title=title,
        lines=(_line(across, xs), _line(up, ys)),
        axis_names=(across.key, up.key),
        say=scene.measure.say,
        less_is_better=scene.measure.less_is_better,
        note=_held(scene, seen),
    )


def _place(axis: Axis, value: Any) -> float:
    """Of a value on the axis: itself, or its number among those that are listed."""
    return float(value) if axis.is_numeric else float([identity(each) for each in axis.values].index(identity(value)))


def _line(axis: Axis, places: Sequence[float]) -> Line:
    names = [] if axis.is_numeric else [shown(value) for value in axis.values]
    return Line(places, names, logarithmic=axis.is_logarithmic or (None if axis.is_listed else False))


def _held(scene: Scene, seen: View) -> str:
    """What the other axes have in a figure."""
    words = []
    if seen.fixed:
        words.append(f"The other keys as at the best point: {scene.names.point(seen.fixed)}.")
    if seen.free:
        others = ", ".join(map(scene.names.of, seen.free))
        words.append(f"Points differ in {others} too; where several fall on one place, the best of them is shown.")
    return " ".join(words)


# ------------------------------------------------------------------------------------------------------ along one axis


def _along(scene: Scene, axis: Axis) -> Drawing | None:
    seen, measure = view(scene.axes, scene.points, [axis.key]), scene.measure
    cells = {place: one for (place,), one in seen.cells().items()}
    there = cells.values() if axis.is_listed else [one for one in seen.points if axis.key in one.point]
    measured = [_measured(scene, axis, one) for one in there if one.mean is not None]
    if len(measured) < 2:
        return None
    known = {place for place, one in cells.items() if one.mean is not None}
    absent = [value for value in axis.values if identity(value) not in known] if axis.is_listed else []
    held = _held(scene, seen)
    beside = None if measure.less_is_better else paper.BY_KEY.get(axis.key)  # theirs are accuracies
    data, cost = scene.base.data, flops(scene.verdict.best.cost.flops)
    png = curves(
        measured,
        title=f"{measure.title} by {scene.names.of(axis.key)}",
        across=Across(
            axis.key,
            [_place(axis, value) for value in absent],
            [] if axis.is_numeric else [shown(value) for value in axis.values],
            axis.is_logarithmic or (None if axis.is_listed else False),
            axis.is_listed and axis.is_numeric,
        ),
        up=Up(
            measure.scale,
            interval=scene.interval,
            band=scene.band,
            band_name="noise above the best" if measure.less_is_better else "noise below the best",
        ),
        about=f"{scene.base.model.kind}, images of {data.image_size[0]} × {data.image_size[1]}, {cost} a trial",
        beside=beside,
        note=" ".join([*([_OTHERS] if beside else []), held, *_unknown(absent)]).strip(),
    )
    return Drawing(f"along_{axis.key}", f"Along {axis.key}", held, png)


def _unknown(absent: Sequence[Any]) -> list[str]:
    listed = ", ".join(map(shown, absent))
    return [f"Nothing has run to its end at {listed}."] if absent else []


def _measured(scene: Scene, axis: Axis, one: PointSummary) -> Measured:
    factor = scene.measure.factor
    return Measured(
        x=_place(axis, one.point[axis.key]),
        mean=factor * (one.reached),
        half=None if one.half is None else factor * one.half,
        parts=[factor * value for value in one.values.values()],
        is_best=scene.is_best(one),
    )


# ---------------------------------------------------------------------------------------------------------------- cost


def _costs(scene: Scene) -> list[Drawing]:
    """By what trials spent; and by what an image costs, where all that ran to their end have spent the same."""
    done = [one for one in scene.points if one.mean is not None]
    spent = {identity(one.point): _spent(one) for one in done}
    stopped = [
        (each.flops, each.value)
        for one in scene.points
        for each in one.results
        if each.status == "pruned" and each.value is not None and is_known(each.value)
    ]
    drawings = []
    is_same = max(spent.values()) <= _SAME * min(spent.values())
    if is_same:  # to within a step: what they differ by is no choice of anybody's
        spent = dict.fromkeys(spent, max(spent.values()))
    if not is_same or stopped:
        drawings.append(_cost(scene, done, "cost", "a trial", lambda one: spent[identity(one.point)], stopped))
    if is_same and len(done) > 1:
        drawings.append(_cost(scene, done, "cost_of_an_image", "an image", lambda o: o.cost.flops_per_image, []))
    return drawings


def _spent(one: PointSummary) -> float:
    """Operations of a trial that ran to its end."""
    done = [each.flops for each in one.results if each.trial.seed in one.values]
    return sum(done) / len(done)


def _cost(
    scene: Scene,
    done: Sequence[PointSummary],
    name: str,
    of: str,
    cost: Callable[[PointSummary], float],
    stopped: Sequence[tuple[float, float]],
) -> Drawing:
    measure = scene.measure
    costs = [cost(one) for one in done]
    most = len(scene.verdict.best.values)
    whole = [number for number, one in enumerate(done) if len(one.values) == most]
    best_of = front(
        [costs[n] for n in whole], [done[n].mean or 0.0 for n in whole], less_is_better=measure.less_is_better
    )
    on_front = {whole[number] for number in best_of}
    size, prefix = wording.prefix(max([*costs, *(cost for cost, _ in stopped)]))
    reached = [
        Reached(
            cost=costs[number] / size,
            value=measure.factor * (one.reached),
            half=None if one.half is None else measure.factor * one.half,
            name=scene.names.point(one.point),
            said=f"{measure.say(one.reached, one.half)}, {flops(costs[number])}",
            is_on_front=number in on_front,
            is_partial=len(one.values) < most,
            is_best=scene.is_best(one),
        )
        for number, one in enumerate(done)
    ]
    note = "Forward and backward passes, by arithmetic."
    if stopped:
        note += " What was stopped early is where it stood then, with a learning rate that was still high."
    png = charts.trade_off(
        reached,
        title=f"{measure.title} by the training FLOPs of {of}",
        axis_names=(f"training {prefix}FLOP of {of}", measure.scale),
        stopped=[(cost / size, measure.factor * value) for cost, value in stopped],
        note=note,
    )
    return Drawing(name, f"What {of} costs", note, png)


# --------------------------------------------------------------------------------------------------------- what it saw


def _paintings(scene: Scene, look: Look) -> Drawing | None:
    listed = [axis for axis in scene.axes if axis.is_listed]
    if len(listed) > 1 or len(scene.axes) == len(listed) == 1:
        return _painted_table(scene, look, listed[0], listed[1] if len(listed) > 1 else None)
    return _painted_list(scene, look)


def _painted_table(scene: Scene, look: Look, across: Axis, down: Axis | None) -> Drawing | None:
    seen = view(scene.axes, scene.points, [across.key, *([down.key] if down else [])])
    cells, rows = seen.cells(), [(identity(value),) for value in down.values] if down else [()]
    table = [[_painted(scene, look, cells.get((identity(value), *row))) for value in across.values] for row in rows]
    if not any(one for line in table for one in line):
        return None
    note = " ".join([_of_whom(table), _held(scene, seen)]).strip()
    png = paintings(
        table,
        title="One image, as each point sees and paints it",
        across=(across.key, [shown(value) for value in across.values]),
        down=(down.key, [shown(value) for value in down.values]) if down else None,
        note=note,
    )
    return Drawing("paintings", "What they paint", note, png)


def _painted_list(scene: Scene, look: Look) -> Drawing | None:
    found = [(one, _painted(scene, look, one)) for one in scene.points[:_MOST_PAINTED] if one.mean is not None]
    known = [(one, painted) for one, painted in found if painted is not None]
    if not known:
        return None
    note = _of_whom([[painted] for _, painted in known])
    png = paintings(
        [[painted] for _, painted in known],
        title=f"One image by the {len(known)} best points" if len(known) > 1 else "One image",
        across=("", [""]),
        down=("point, the best first", [scene.names.point(one.point, "\n") for one, _ in known]),
        note=note,
    )
    return Drawing("paintings", "What they paint", note, png)


def _painted(scene: Scene, look: Look, one: PointSummary | None) -> Painted | None:
    """By the first seed that ran to its end."""
    first = next((each for each in one.results if each.trial.seed in one.values), None) if one else None
    kept = look(first.trial.key) if first else None
    if one is None or kept is None:
        return None
    return Painted(
        kept["image"], kept["visible"], kept["painted"], bool(kept["uses_target_statistics"]), scene.is_best(one)
    )


def _of_whom(table: Sequence[Sequence[Painted | None]]) -> str:
    words = "The first of the fixed images. Painted are the hidden cells alone; what a model saw is as it was."
    if any(one.uses_target_statistics for row in table for one in row if one):
        words += (
            " * Each painted cell was given the mean and std of the ORIGINAL cell: only its pattern is the model's."
        )
    return words
