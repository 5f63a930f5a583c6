"""The tables of a sweep's report: points, the best first, and all trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from maskray import wording
from maskray.config.space import identity
from maskray.config.sweep import SweepConfig
from maskray.sweeps.measure import SURVIVORS, Measure, flops
from maskray.sweeps.ranking import Other, PointSummary, Verdict, is_known, is_of_survivors
from maskray.sweeps.record import Result, shown

STATUS = {"finished": "finished", "pruned": "stopped early", "failed": "failed"}


class Entry(NamedTuple):
    """Of a table."""

    words: str
    key: str | None = None
    """By which it is sorted, as a number where it is one; None: by its words."""
    kind: str = ""
    """Class of the page's style."""


class Head(NamedTuple):
    """Of a column."""

    words: str
    is_number: bool = False


class Row(NamedTuple):
    """Of a table."""

    cells: Sequence[Entry]
    is_best: bool = False


class Table(NamedTuple):
    """With what stands above it."""

    heading: str
    words: str
    heads: Sequence[Head]
    rows: Sequence[Row]


def points(config: SweepConfig, ranked: Sequence[PointSummary], verdict: Verdict | None, measure: Measure) -> Table:
    """All points, the best first."""
    keys = list(config.space)
    heads = [Head("rank", is_number=True), *_heads(keys, ranked), Head(measure.scale, is_number=True)]
    heads += [Head(words, is_number=True) for words in ("seeds", measure.behind, "cost of an image", "parameters")]
    others = {identity(each.summary.point): each for each in verdict.others} if verdict else {}
    rows = [
        Row(
            [
                _number("", None) if one.mean is None else _number(str(rank), rank),
                *_values(keys, one.point),
                _number("" if one.mean is None else measure.say(one.mean, one.half), one.mean),
                _number(f"{len(one.values)} of {len(config.seeds)}", len(one.values)),
                _behind(others.get(identity(one.point)), measure),
                _number(flops(one.cost.flops_per_image), one.cost.flops_per_image),
                _number(wording.short(one.cost.parameters), one.cost.parameters),
            ],
            is_best=verdict is not None and one is verdict.best,
        )
        for rank, one in enumerate(ranked, 1)
    ]
    said = "Seeds are those that ran to their end; ≈ is not told apart from the best."
    if is_of_survivors(ranked) and any(one.half is not None for one in ranked):
        said += f" {SURVIVORS}"
    return Table("All points" if verdict is None else "All points, the best first", said, heads, rows)


def trials(config: SweepConfig, ranked: Sequence[PointSummary], measure: Measure) -> Table:
    """All trials that have ended."""
    keys = list(config.space)
    heads = [*_heads(keys, ranked), Head("seed", is_number=True), Head("status"), Head(measure.scale, is_number=True)]
    heads += [Head(words, is_number=True) for words in ("steps", "spent", "time")] + [Head("why")]
    rows = [Row(list(_trial(keys, each, measure))) for one in ranked for each in one.results]
    return Table("All trials", "A click on the head of a column sorts by it.", heads, rows)


def _heads(keys: Sequence[str], ranked: Sequence[PointSummary]) -> list[Head]:
    return [Head(key, is_number=all(_is_number(one.point.get(key, 0)) for one in ranked)) for key in keys]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _trial(keys: Sequence[str], result: Result, measure: Measure) -> Iterator[Entry]:
    yield from _values(keys, result.trial.point)
    yield _number(str(result.trial.seed), result.trial.seed)
    yield Entry(STATUS[result.status], kind=f"status-{result.status}")
    value = result.value
    yield _number("" if value is None else measure.say(value) if is_known(value) else str(value), value)
    yield _number(f"{result.steps:,} of {result.trial.steps:,}", result.steps)
    yield _number(flops(result.flops), result.flops)
    yield _number(wording.time_of(result.seconds / 3600) if result.seconds else "", result.seconds or None)
    yield Entry(result.reason, kind="long" if result.reason else "")


def _values(keys: Sequence[str], point: Any) -> Iterator[Entry]:
    for key in keys:
        if key not in point:
            yield Entry("", "")
        else:
            words = shown(point[key])
            yield _number(words, point[key]) if _is_number(point[key]) else Entry(words)


def _behind(other: Other | None, measure: Measure) -> Entry:
    if other is None or other.behind is None:
        return _number("", None)
    mark = "≈ " if other.is_noise else ""
    return _number(f"{mark}{measure.number(other.behind)}", other.behind)


def _number(words: str, key: float | None) -> Entry:
    return Entry(words, "" if key is None or not is_known(key) else repr(key), "number")
