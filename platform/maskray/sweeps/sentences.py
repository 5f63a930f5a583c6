"""The sentences of a sweep's report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from maskray import wording
from maskray.config.schema import RunConfig
from maskray.config.space import Grid
from maskray.config.sweep import LOSS, Asha, GridSearch, Median, OptunaSearch, SweepConfig
from maskray.sweeps.drawing import Scene
from maskray.sweeps.measure import SURVIVORS, Measure, Names, flops
from maskray.sweeps.ranking import Other, PointSummary, Verdict, is_of_survivors
from maskray.sweeps.record import Result

_MOST_REASONS = 3


def about(config: SweepConfig, base: RunConfig) -> str:
    """What was tried, on what."""
    height, width = base.data.image_size
    seeds = _count(len(config.seeds), "seed")
    parts = [
        f"{_search(config)} over {', '.join(config.space)}, {seeds} a point",
        *_limits(config),
        f"on {base.name}: {base.model.kind}, images of {height} × {width} × {base.data.channels} at {base.data.path}",
    ]
    return "; ".join(parts) + "."


def _search(config: SweepConfig) -> str:
    if isinstance(config.search, GridSearch):
        return "A grid"
    kind = "asked for by Optuna" if isinstance(config.search, OptunaSearch) else "at random"
    return f"{_count(config.search.points, 'point')} {kind}"


def _limits(config: SweepConfig) -> list[str]:
    budget, stopping, found = config.budget, config.stopping, []
    if budget is not None and budget.flops is not None:
        found.append(f"{flops(budget.flops)} for each trial")
    elif budget is not None and budget.steps is not None:
        found.append(f"{budget.steps:,} steps for each trial")
    elif budget is not None and budget.accelerator_seconds is not None:
        found.append(f"{wording.time_of(budget.accelerator_seconds / 3600)} of all its workers together for each trial")
    if isinstance(stopping, Asha | Median):
        first = flops(stopping.first) if stopping.unit == "flops" else f"{stopping.first:,.0f} steps"
        rule = f"ASHA, the best of every {stopping.reduction:g}" if isinstance(stopping, Asha) else "the median rule"
        found.append(f"stopped early by {rule}, from {first} on")
    return found


def alerts(config: SweepConfig, verdict: Verdict | None) -> list[str]:
    """What must be known before anything else is read."""
    found = []
    if config.objective.metric == LOSS:
        found.append(
            "Points are judged by the loss, which was forced. It says nothing of the representation: another mask "
            "ratio, patch or target is another task, and an easier task has the lower loss. This order means something "
            "only where all points have the same task."
        )
    if verdict is None:
        return found
    asked, have = len(config.seeds), len(verdict.best.values)
    if have == 1:
        why = "one seed was asked for" if asked == 1 else f"one of {asked} seeds ran to its end"
        found.append(
            f"Of each point {why}: there are no intervals, and nothing says which differences are noise. List more "
            "seeds."
        )
    elif have < asked:
        found.append(f"No point has all {asked} seeds: the best ones have {have} that ran to their end.")
    names = Names(config)
    found += [
        f"{names.point(each.summary.point)} has a better mean over fewer seeds, by more than noise. If trials of it "
        "failed, --resume tries them again; if they were stopped early, this may be luck."
        for each in verdict.others
        if each.behind is not None and each.behind < 0 and each.is_noise is False
    ]
    return found


def nothing(points: Sequence[PointSummary]) -> list[str]:
    """Why there is no best point."""
    results = [each for one in points for each in one.results]
    if not results:
        return ["No trial is on record yet."]
    words = [f"On record: {_statuses(results)}."]
    reasons = Counter(each.reason for each in results if each.status == "failed")
    words += [f"{_count(count, 'trial')} failed: {why}" for why, count in reasons.most_common(_MOST_REASONS)]
    return words


def answer(scene: Scene) -> dict[str, Any]:
    """The best point, and what may as well be the best."""
    best, measure = scene.verdict.best, scene.measure
    seeds = f"mean of {len(best.values)} seeds" if len(best.values) > 1 else "one seed"
    interval = f", {scene.interval} over seeds" if best.half is not None else ""
    if not scene.verdict.others:
        facts = [("Others", "none has run to its end: there is nothing to compare it with.")]
    else:
        facts = [("Runner-up", _runner_up(scene, scene.verdict.others[0])), ("Noise", _noise(scene))]
        facts += [("Cheapest of these", _cheapest(scene))] if scene.verdict.margin is not None else []
    return {
        "point": scene.names.point(best.point),
        "value": measure.say(best.reached, best.half),
        "of": f"{measure.name}, {seeds}{interval}; {flops(best.cost.flops)} a trial, "
        f"{flops(best.cost.flops_per_image)} an image, {wording.short(best.cost.parameters)} parameters",
        "facts": facts,
    }


def _runner_up(scene: Scene, other: Other) -> str:
    one, measure = other.summary, scene.measure
    said = f"{scene.names.point(one.point)}: {measure.say(one.reached, one.half)}"
    if other.behind is None:
        return f"{said}; no seed ran to its end at both."
    if math.isclose(other.behind, 0, abs_tol=1e-12):
        return f"{said}; as good, and the best is the cheaper."
    is_noise = {True: " That may be noise.", False: " That is more than noise.", None: ""}[other.is_noise]
    return f"{said}, {measure.difference(other.behind)} behind.{is_noise}"


def _noise(scene: Scene) -> str:
    verdict, others = scene.verdict, scene.verdict.others
    if verdict.margin is None:
        return "not known: it takes two seeds or more of two points."
    alike = [each for each in others if each.is_noise]
    upto = f"up to {scene.measure.difference(verdict.margin)} may be noise"
    few = sum(len(each.summary.values) < len(verdict.best.values) for each in alike)
    lenient = f" ({few} of them with fewer seeds, where noise is more)" if few else ""
    warning = f" {SURVIVORS}" if is_of_survivors(scene.points) else ""
    if not alike:
        return f"{upto}; every other point is further behind.{warning}"
    if len(alike) == len(others):
        return f"{upto}; no other point is told apart from the best{lenient}.{warning}"
    verb = "is" if len(alike) == 1 else "are"
    return f"{upto}; {len(alike)} of {len(others)} other points {verb} not told apart from the best{lenient}.{warning}"


def _cheapest(scene: Scene) -> str:
    best, cheapest, measure = scene.verdict.best, scene.verdict.cheapest, scene.measure
    if cheapest is best:
        return "the best itself."
    share = cheapest.cost.flops_per_image / best.cost.flops_per_image
    return (
        f"{scene.names.point(cheapest.point)}: {measure.say(cheapest.reached, cheapest.half)}, at "
        f"{100 * share:.0f} % of the FLOPs of an image and {wording.short(cheapest.cost.parameters)} parameters."
    )


def tiles(config: SweepConfig, base: RunConfig, points: Sequence[PointSummary]) -> list[tuple[str, str, str]]:
    """What was spent, and what was not."""
    results = [each for one in points for each in one.results]
    spent, seconds = sum(each.flops for each in results), sum(each.seconds for each in results)
    planned = _planned(config)
    of = f"{len(results):,} of {planned:,}" if planned is not None and planned > len(results) else f"{len(results):,}"
    workers = base.cluster.workers
    unknown = sum(not each.seconds for each in results)
    missing = f", {_count(unknown, 'trial')} not counted" if unknown and seconds else ""
    found = [
        ("Trials", of, _statuses(results)),
        ("Points", f"{len(points):,}", _missing(config, points) + _count(len(config.seeds), "seed") + " each"),
        ("Computed", flops(spent), "in training, forward and backward"),
        (
            "Time",
            wording.time_of(seconds / 3600) if seconds else "not known",
            f"of all trials together, on {_count(workers, 'worker')} each{missing}",
        ),
    ]
    stopped = [each for each in results if each.status == "pruned"]
    if stopped:
        saved = sum(each.trial.flops - each.flops for each in stopped)
        whole = sum(each.trial.flops for each in results if each.status != "failed")
        found.append(
            (
                "Saved",
                flops(saved),
                f"by stopping {_count(len(stopped), 'trial')} early, {100 * saved / whole:.0f} % of the whole",
            )
        )
    return found


def _missing(config: SweepConfig, points: Sequence[PointSummary]) -> str:
    """Of a search that draws: a space of few values may have fewer points than were asked for."""
    axes = config.space.values()
    if isinstance(config.search, GridSearch) or any(axis.when for axis in axes):
        return ""
    asked = config.search.points * math.prod(len(axis.values) for axis in axes if isinstance(axis, Grid))
    return f"of {asked:,} asked for, " if len(points) < asked else ""


def _planned(config: SweepConfig) -> int | None:
    """Trials of a grid without conditions."""
    axes = config.space.values()
    if not isinstance(config.search, GridSearch) or any(axis.when for axis in axes):
        return None
    return math.prod(len(axis.values) for axis in axes if isinstance(axis, Grid)) * len(config.seeds)


def method(config: SweepConfig, points: Sequence[PointSummary], verdict: Verdict | None, measure: Measure) -> list[str]:
    """How to read the numbers."""
    better = "least" if measure.less_is_better else "greatest"
    confidence = f"{100 * config.confidence:g} %"
    found = [
        f"A point is worth the {measure.name} at the end of its trials, the mean over its seeds. The best has the "
        f"{better} mean among the points with the most seeds that ran to their end; between equal ones it is the "
        "cheaper: by the FLOPs of an image in training, then by parameters, then by the length of a trial.",
        f"± is half of Student's {confidence} interval over the point's own seeds: where the mean of many seeds may "
        "lie. Two points whose intervals overlap may still differ, since seeds move points together.",
    ]
    if verdict is not None and verdict.noise is not None and verdict.margin is not None:
        noise, others = verdict.noise, _count(len(verdict.others), "comparison")
        found.append(
            f"Noise is what is left of the values without each point's mean, and without what a seed does to all "
            f"points alike (points are compared seed by seed): a standard deviation of "
            f"{measure.difference(noise.std)} for one trial, with {noise.degrees} degrees of freedom, over the better "
            f"half of the points (four or more), since bad ones may be wild. It is taken to be normal and as strong at "
            f"each of them."
        )
        found.append(
            f"A point that is up to {measure.difference(verdict.margin)} behind the best is not told apart from it. "
            f"With a probability of {confidence} or more, the truly best of those that ran to their end is among them: "
            f"this holds for {others} together, and though the best was picked after looking (subset selection, Gupta "
            f"1965, with Bonferroni's bound). It does not say that these points are equal."
        )
    if is_of_survivors(points):
        found.append(
            "A trial that was stopped early has the value that it had then. It counts for no mean: at that step the "
            "learning rate was still high. Where only some seeds of a point were stopped, the mean of the others is "
            "likely to flatter it."
        )
    found.append(
        "FLOPs are those of forward and backward passes, by arithmetic: a multiply-add is two. Probes, data and "
        "recomputed activations are not in them."
    )
    return found


def _statuses(results: Sequence[Result]) -> str:
    counts = Counter[str](each.status for each in results)
    said = {"finished": "ran to the end", "pruned": "stopped early", "failed": "failed"}
    return ", ".join(f"{counts[status]:,} {words}" for status, words in said.items() if counts[status]) or "none yet"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
