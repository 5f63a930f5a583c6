"""Points of a sweep in the order of what they are worth, and which of them may as well be the best."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from maskray.config.space import identity
from maskray.config.sweep import SweepConfig
from maskray.evaluation import seeds
from maskray.evaluation.seeds import Noise
from maskray.sweeps.record import Result


class Cost(NamedTuple):
    """Compared from left to right: what one image costs does not hang on how long a trial is."""

    flops_per_image: float
    """Forward and backward pass."""
    parameters: int
    """Of encoder and decoder."""
    flops: float
    """Of a whole trial."""


@dataclass(frozen=True)
class PointSummary:
    """What is known of one point."""

    point: Mapping[str, Any]
    results: tuple[Result, ...]
    """Of all its trials that have ended, in the order of their seeds."""
    values: Mapping[int, float]
    """The objective, by seed, of those that ran to their end."""
    mean: float | None
    """Over seeds; None: no trial ran to its end."""
    half: float | None
    """Half of the interval of the mean; None: there is one seed, or none."""
    cost: Cost

    @property
    def reached(self) -> float:
        """The mean of a point that has one."""
        assert self.mean is not None
        return self.mean


class Other(NamedTuple):
    """A point beside the best one."""

    summary: PointSummary
    behind: float | None
    """How much worse it is, over the seeds that both have; None: there is none."""
    is_noise: bool | None
    """Whether a difference like this comes about for no reason; None: that is not known."""


@dataclass(frozen=True)
class Verdict:
    """What a sweep says."""

    best: PointSummary
    others: tuple[Other, ...]
    """All other points that have a mean, in order: the first is the runner-up."""
    noise: Noise | None
    """None: one seed, or one point."""
    margin: float | None
    """How far behind the best a point that has all its seeds may be for no reason."""
    cheapest: PointSummary
    """Of the best, and of the points that have as many seeds and are behind it for no reason."""


def ranked(config: SweepConfig, results: Mapping[str, Result]) -> list[PointSummary]:
    """The points, the best one first: where the first has no mean, no trial ran to its end.

    First come those with the most seeds that ran to their end, since one of a few may be lucky; among these goes the
    mean of the objective, and between equal means the cost.
    """
    by_point = defaultdict[str, list[Result]](list)
    for result in results.values():
        by_point[identity(result.trial.point)].append(result)
    sign = -1 if config.objective.direction == "max" else 1

    def place(one: PointSummary) -> tuple[Any, ...]:
        return (-len(one.values), sign * (one.mean or 0), one.cost, identity(one.point))

    return sorted((_summary(config, each) for each in by_point.values()), key=place)


def judged(config: SweepConfig, points: Sequence[PointSummary]) -> Verdict | None:
    """What the sweep says by its points, in the order of `ranked`; None: no trial ran to its end."""
    done = [one for one in points if one.mean is not None]
    if not done:
        return None
    best, *rest = done
    noise = seeds.noise([one.values for one in _steady(done)])
    count = sum(bool(best.values.keys() & one.values.keys()) for one in rest)
    others = tuple(_beside(best, one, noise, count, config) for one in rest)
    as_good = [each.summary for each in others if each.is_noise and len(each.summary.values) == len(best.values)]
    return Verdict(
        best=best,
        others=others,
        noise=noise,
        margin=seeds.margin(noise, len(best.values), count, config.confidence) if noise and count else None,
        cheapest=min([best, *as_good], key=lambda one: one.cost),
    )


def is_of_survivors(points: Sequence[PointSummary]) -> bool:
    """Whether some trials were stopped early, so that intervals and noise are of what looked good on the way alone."""
    return any(each.status == "pruned" for one in points for each in one.results)


def is_known(value: float | None) -> bool:
    """Whether it is a number that can be compared."""
    return value is not None and math.isfinite(value)


def front(costs: Sequence[float], values: Sequence[float], *, less_is_better: bool = False) -> list[int]:
    """Which are such that none cheaper, or as cheap, is as good or better (Pareto), by number, the cheapest first.

    Of those that are equal in both, the first is.
    """
    sign = 1 if less_is_better else -1
    found, best = [], math.inf
    for _, value, number in sorted((c, sign * v, n) for n, (c, v) in enumerate(zip(costs, values, strict=True))):
        if value < best:
            found.append(number)
            best = value
    return found


_STEADY = 4


def _steady(done: Sequence[PointSummary]) -> Sequence[PointSummary]:
    """The points by which noise is known: the better half, of few points more.

    Bad ones may be wild (a learning rate at which one seed of three diverges), and would make noise of every difference
    among the good. A normal point's spread over seeds does not hang on its mean, so choosing by the mean is fair.
    """
    several = [one for one in done if len(one.values) > 1]
    return several[: max(-(-len(several) // 2), _STEADY)]


def _beside(best: PointSummary, one: PointSummary, noise: Noise | None, count: int, config: SweepConfig) -> Other:
    common = sorted(best.values.keys() & one.values.keys())
    if not common:
        return Other(one, None, None)
    sign = 1 if config.objective.direction == "max" else -1
    behind = sign * math.fsum(best.values[seed] - one.values[seed] for seed in common) / len(common)
    if noise is None:
        return Other(one, behind, None)
    margin = seeds.margin(noise, len(common), count, config.confidence)
    return Other(one, behind, abs(behind) <= margin or math.isclose(behind, 0, abs_tol=1e-12))


def _summary(config: SweepConfig, results: Sequence[Result]) -> PointSummary:
    ordered = tuple(sorted(results, key=lambda each: each.trial.seed))
    values = {
        each.trial.seed: each.value
        for each in ordered
        if each.status == "finished" and each.value is not None and is_known(each.value)
    }
    mean = seeds.mean(values, config.confidence) if values else None
    trial = ordered[0].trial
    return PointSummary(
        point=trial.point,
        results=ordered,
        values=values,
        mean=None if mean is None else mean.mean,
        half=None if mean is None else mean.half,
        cost=Cost(
            flops_per_image=trial.flops_per_image,
            parameters=trial.encoder_parameters + trial.decoder_parameters,
            flops=trial.flops,
        ),
    )
