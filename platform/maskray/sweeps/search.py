"""Which trial is next: those of a list of points, or of points that Optuna asks for."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from maskray import draws
from maskray.config.space import (
    AnyAxis,
    Choice,
    Grid,
    LogUniform,
    RandInt,
    Uniform,
    identity,
    in_order,
    is_there,
    takes,
)
from maskray.config.sweep import OptunaSearch, SweepConfig
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, MaskrayError
from maskray.sweeps.record import ASKED, Result, Trial, shown
from maskray.sweeps.space import Point
from maskray.sweeps.stopping import rungs

log = logging.getLogger(__name__)

Make = Callable[[Point, int], Trial]
"""The trial of a point with a seed.

Raises:
    MaskrayError: there is no such run.
"""

_VERSION = 1
_REFUSED_IN_A_ROW = 50
_TRIES = 200
"""At a point that was not asked for before; after that the space is taken to have no more."""
_GUIDED_TRIES = 10
"""Of them are made by what is known, and may come to the same point again and again. The others are random."""


class Queue(Protocol):
    """Trials that are still to be run. For one thread."""

    @property
    def is_done(self) -> bool:
        """Whether all trials were given out."""
        ...

    def next(self) -> Trial | None:
        """The next one; None where there is none now, and for good once `is_done`."""
        ...

    def tell(self, result: Result) -> None:
        """A trial that was given out has ended. Twice is as good as once."""
        ...


def open_queue(
    config: SweepConfig, points: Sequence[Point] | None, make: Make, results: Mapping[str, Result], sweep: Storage
) -> Queue:
    """The trials of a sweep that are not on record as finished or pruned: those that failed are tried again.

    Args:
        config: of the sweep.
        points: all of them; None where Optuna asks for them.
        make: gives the trial of a point with a seed.
        results: on record, by key.
        sweep: folder of the sweep, for the points that Optuna asked for.

    Raises:
        MaskrayError: of `make`, for one of the points.
        CheckpointError: the points on record cannot be read, or are of another space.
    """
    if isinstance(config.search, OptunaSearch):
        return _Asked(config, config.search, make, results, sweep)
    assert points is not None
    return _Listed(config.seeds, points, make, results)


def _has_ended(key: str, results: Mapping[str, Result]) -> bool:
    return key in results and results[key].status != "failed"


class _Listed:
    """Points that are known. Seeds go round last: one seed sees all of the space before the next begins."""

    def __init__(
        self, seeds: Sequence[int], points: Sequence[Point], make: Make, results: Mapping[str, Result]
    ) -> None:
        trials = {trial.key: trial for trial in (make(point, seed) for seed in seeds for point in points)}
        self._waiting = deque(trial for key, trial in trials.items() if not _has_ended(key, results))

    @property
    def is_done(self) -> bool:
        return not self._waiting

    def next(self) -> Trial | None:
        return self._waiting.popleft() if self._waiting else None

    def tell(self, result: Result) -> None:
        """Nothing follows from it."""


@dataclass
class _Begun:
    """A point that was asked for."""

    suggestion: optuna.Trial
    point: Point
    trials: Sequence[Trial]
    """One for each seed."""
    ended: dict[str, Result] = field(default_factory=dict)
    """By key."""


class _Asked:
    """Points that Optuna's TPE sampler asks for, each by what was told of those before it.

    A point follows from the search's seed, its own number and what is known when it is asked for: a resumed search asks
    as one that was never interrupted would.
    """

    def __init__(
        self, config: SweepConfig, search: OptunaSearch, make: Make, results: Mapping[str, Result], sweep: Storage
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of each point
        self._config, self._search, self._make, self._sweep = config, search, make, sweep
        self._space = {key: config.space[key] for key in in_order(config.space)}
        self._study = optuna.create_study(
            direction="maximize" if config.objective.direction == "max" else "minimize",
            sampler=RandomSampler(),  # makes no point: each has a sampler of its own
        )
        self._begun: list[_Begun] = []
        self._by_key: dict[str, _Begun] = {}
        self._waiting: deque[Trial] = deque()
        self._is_exhausted = False
        for point in self._on_record(results):
            self._begin(self._again(point), point, [make(point, seed) for seed in config.seeds])
        for begun in self._begun:
            for trial in begun.trials:
                if _has_ended(trial.key, results):
                    self.tell(results[trial.key])
                else:
                    self._waiting.append(trial)

    @property
    def is_done(self) -> bool:
        return not self._waiting and (self._is_exhausted or len(self._begun) >= self._search.points)

    def next(self) -> Trial | None:
        if not self._waiting and not self.is_done:
            self._ask()
        return self._waiting.popleft() if self._waiting else None

    def tell(self, result: Result) -> None:
        begun = self._by_key[result.trial.key]
        if result.trial.key in begun.ended:
            return
        begun.ended[result.trial.key] = result
        if len(begun.ended) == len(begun.trials):
            self._settle(begun)

    # --------------------------------------------------------------------------------------------------------- asking

    def _ask(self) -> None:
        """Begin a point that was not asked for before; where there is none, the search is at its end."""
        refused = 0
        for number in range(_TRIES):
            self._study.sampler = self._sampler(number)
            suggestion = self._study.ask()
            point = self._suggested(suggestion)
            try:
                trials = [self._make(point, seed) for seed in self._config.seeds]
            except MaskrayError as error:
                self._study.tell(suggestion, state=TrialState.FAIL)
                refused += 1
                log.warning("a point that cannot be run is passed over, the %d. in a row: %s", refused, error)
                if refused == _REFUSED_IN_A_ROW:
                    raise
                continue
            if trials[0].key in self._by_key:
                self._study.tell(suggestion, state=TrialState.FAIL)  # nothing new of it will be known
                continue
            self._keep([*(begun.point for begun in self._begun), point])
            self._begin(suggestion, point, trials)
            self._waiting.extend(trials)
            return
        self._is_exhausted = True
        log.warning(
            "the search ends after %d of %d points: none of %d more was another one",
            len(self._begun),
            self._search.points,
            _TRIES,
        )

    def _sampler(self, number: int) -> BaseSampler:
        """What makes the next point, and no other: a resumed search would not have the state of one that went on."""
        word = draws.word(self._search.seed, draws.Stream.SEARCH, len(self._begun), number)
        seed = word & draws.MASK32  # numpy's old generator, which Optuna uses, takes no more
        if number >= _GUIDED_TRIES:
            return RandomSampler(seed=seed)
        return TPESampler(
            seed=seed,
            n_startup_trials=self._search.startup,
            multivariate=True,  # axes that all points have are drawn together
            constant_liar=True,  # what runs is taken for bad, so that others are tried beside it
        )

    def _suggested(self, suggestion: optuna.Trial) -> Point:
        point: dict[str, Any] = {}
        for key, axis in self._space.items():
            if is_there(axis, point):
                point[key] = _value(suggestion, key, axis)
        return {key: point[key] for key in self._config.space if key in point}

    def _again(self, point: Point) -> optuna.Trial:
        """The suggestion of a point that is on record."""
        self._refuse_of_another_space(point)
        fixed = {key: identity(v) if isinstance(self._space[key], Grid | Choice) else v for key, v in point.items()}
        self._study.enqueue_trial(fixed)
        suggestion = self._study.ask()
        self._suggested(suggestion)
        return suggestion

    def _begin(self, suggestion: optuna.Trial, point: Point, trials: Sequence[Trial]) -> None:
        begun = _Begun(suggestion, point, trials)
        self._begun.append(begun)
        self._by_key |= {trial.key: begun for trial in trials}

    # --------------------------------------------------------------------------------------------------------- telling

    def _settle(self, begun: _Begun) -> None:
        """Tell Optuna of a point whose trials have all ended: the mean of the values that they had.

        One that was pruned counts with its last value, which is no better than what it would have come to. Where all
        were, the point is told as pruned, at the rungs where they were.
        """
        known = [r for r in begun.ended.values() if r.status != "failed" and _is_known(r.value)]
        if not known:
            self._study.tell(begun.suggestion, state=TrialState.FAIL)
        elif all(result.status == "pruned" for result in known):
            for rung, mean in self._by_rung(known):
                begun.suggestion.report(mean, step=rung)
            self._study.tell(begun.suggestion, state=TrialState.PRUNED)
        else:
            self._study.tell(begun.suggestion, fmean(r.value for r in known if r.value is not None))

    def _by_rung(self, pruned: Sequence[Result]) -> Iterator[tuple[int, float]]:
        """Mean value of those that were pruned at each rung. Steps do not compare: they cost more here than there."""
        values: dict[int, list[float]] = defaultdict(list)
        for result in pruned:
            passed = [rung.index for rung in rungs(self._config.stopping, result.trial) if rung.step <= result.steps]
            if result.value is not None:
                values[max(passed, default=0)].append(result.value)
        for rung, found in values.items():
            yield rung, fmean(found)

    # --------------------------------------------------------------------------------------------------------- record

    def _keep(self, points: Sequence[Point]) -> None:
        content = json.dumps({"schema_version": _VERSION, "points": points}, indent=1)
        self._sweep.write_bytes(ASKED, content.encode())

    def _on_record(self, results: Mapping[str, Result]) -> list[Point]:
        """Those that were asked for, in order; then those of results, if the list of the others was lost."""
        known = self._asked()
        for result in sorted(results.values(), key=lambda result: result.trial.key):
            if (point := dict(result.trial.point)) not in known:
                known.append(point)
        return known

    def _asked(self) -> list[Point]:
        try:
            content = self._sweep.read_bytes(ASKED)
        except FileNotFoundError:
            return []
        try:
            raw = json.loads(content)
            if (version := raw["schema_version"]) != _VERSION:
                raise ValueError(f"schema version {version}, where this version of maskray reads {_VERSION}")
            return [dict(point) for point in raw["points"]]
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                "the points that were asked for cannot be read",
                found=f"{self._sweep.join(ASKED)} ({error!r})",
                fix="restore the file, or delete it: points with a result are then known still, the others are not",
            ) from error

    def _refuse_of_another_space(self, point: Point) -> None:
        expected = {key for key, axis in self._space.items() if is_there(axis, point)}
        wrong = [key for key in expected | point.keys() if not self._has(key, expected, point)]
        if wrong:
            raise CheckpointError(
                "a point on record is none of the space",
                key=f"space.{min(wrong)}",
                found=" ".join(f"{key}={shown(value)}" for key, value in point.items()),
                fix=f"give the space that the sweep was begun with, or begin another: {self._sweep.uri} stays as it is",
            )

    def _has(self, key: str, expected: set[str], point: Point) -> bool:
        return key in expected and key in point and takes(self._space[key], point[key])


def _value(suggestion: optuna.Trial, key: str, axis: AnyAxis) -> Any:
    match axis:
        case Grid() | Choice():
            names = list(dict.fromkeys(map(identity, axis.values)))  # Optuna wants categories plain
            return json.loads(suggestion.suggest_categorical(key, names))
        case Uniform():
            return suggestion.suggest_float(key, axis.low, axis.high)
        case LogUniform():
            return suggestion.suggest_float(key, axis.low, axis.high, log=True)
        case RandInt():
            return suggestion.suggest_int(key, axis.low, axis.high)


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
