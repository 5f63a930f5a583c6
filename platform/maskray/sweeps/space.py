"""Points of a sweep, and the trials that they make: each with its config, length and cost, before anything starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from maskray import masking
from maskray.config.load import dotted_keys, fingerprint, merge, parse
from maskray.config.resolve import RunPlan, resolve
from maskray.config.schema import RunConfig
from maskray.config.space import AnyAxis, Choice, Grid, LogUniform, RandInt, Uniform, identity, is_there
from maskray.config.sweep import LOSS, SCORES, GridSearch, OptunaSearch, RandomSearch, SweepConfig
from maskray.data.places import with_absolute_paths
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.errors import ConfigError, DataError, MaskrayError
from maskray.models.build import build_normalize, weightless_model
from maskray.models.cost import Cost, cost
from maskray.models.foreign import weights_digest
from maskray.sweeps.record import Trial, shown

Point = Mapping[str, Any]
"""Dotted keys of the run's config and their values; a key whose condition does not hold is absent."""

_OF_TRIALS = {
    # Ray Data within a trial would wait, without a word, for CPUs that the trials hold.
    "data.stream": "local",
    # Trials are judged at rungs, and at their ends.
    "training.probe_steps": None,
    # One that diverges is to end at once.
    "training.rewinds": 0,
    "storage.keep_checkpoints": 1,
    # What Tune holds for a trial does not change.
    "cluster.min_workers": None,
}
_SAID_ELSEWHERE = {
    "name": "trials have the sweep's",
    "seed": "list seeds",
    "training.probe_at": "rungs are those of stopping",
}
SAMPLE = 64
"""Points of a search that has no list of them that are looked at before it starts."""
_TRIES = 1000
"""Draws in a row that bring nothing new, after which the space is taken to have no more. The last of a hundred points
that are alike in chance is missed once in 20,000 times."""


class Space:
    """What a sweep's points become.

    Args:
        config: of the sweep.
        seconds_per_step: as measured for each point, by `point_key`: for a budget in seconds.

    Raises:
        MaskrayError: base, dataset and space do not fit together.
    """

    def __init__(self, config: SweepConfig, seconds_per_step: Mapping[str, float] | None = None) -> None:
        self.config = config
        self._overrides = config.overrides | _OF_TRIALS
        self._measured = dict(seconds_per_step or {})
        self._costs: dict[str, Cost] = {}
        self.base = with_absolute_paths(base_of(config))
        self.dataset = Dataset.open(self.base.data.path, self.base.data.version)
        self._digest = weights_digest(self.base.init_from)
        self._refuse_without_objective()

    def points(self) -> list[Point] | None:
        """All of a grid or of a random search, each once; None where they are asked for one after another."""
        match self.config.search:
            case OptunaSearch():
                return None
            case GridSearch():
                found = [conditioned(self.config.space, point) for point in _combinations(self.config.space)]
                return list({point_key(point): point for point in found}.values())
            case RandomSearch():
                return list(itertools.chain.from_iterable(self._draws))

    @property
    def num_drawn(self) -> int:
        """Draws of a random search: fewer than its `points` where the space has no more. 0 of other searches."""
        return len(self._draws)

    @cached_property
    def _draws(self) -> list[list[Point]]:
        search = self.config.search
        return list(_drawn(self.config.space, search.points, search.seed)) if isinstance(search, RandomSearch) else []

    def sample(self) -> list[Point]:
        """What is looked at before the sweep starts: all points, or a sample of those that may be asked for."""
        points = self.points()
        return list(itertools.chain.from_iterable(_drawn(self.config.space, SAMPLE, 0))) if points is None else points

    def trial(self, point: Point, seed: int) -> Trial:
        """A point with a seed, its schedule's length and what it costs.

        Raises:
            MaskrayError: there is no such run, or the budget is not enough for a step of it; it names the point.
        """
        try:
            return self._trial(point, seed)
        except MaskrayError as error:
            raise type(error)(f"at {name_of(point)}: {error}", key="space") from error

    def _trial(self, point: Point, seed: int) -> Trial:
        config = self._base_of(point, seed)
        found = self._cost(config, point)
        per_image = found.training_flops
        per_step = per_image * config.optim.global_batch
        whole = resolve(config, self.dataset.facts(), self._digest)
        steps = self._steps(point, per_step, whole.total_steps)
        config = _as_long_as(config, steps, whole)
        plan = resolve(config, self.dataset.facts(), self._digest)
        StreamSpec.of(config, plan, self.dataset)
        return Trial(
            key=plan.fingerprint,
            point=point,
            seed=seed,
            steps=steps,
            flops_per_image=per_image,
            flops_per_step=per_step,
            encoder_parameters=found.encoder_parameters,
            decoder_parameters=found.decoder_parameters,
        )

    def run_config(self, trial: Trial, probe_at: Sequence[int] = ()) -> RunConfig:
        """What a trial trains, judged on the way after some steps."""
        config = self._base_of(trial.point, trial.seed)
        config = _as_long_as(config, trial.steps, resolve(config, self.dataset.facts(), self._digest))
        training = config.training.model_copy(update={"probe_at": tuple(probe_at)})
        return config.model_copy(update={"training": training})

    def unmeasured(self) -> list[Point]:
        """Points whose steps must be timed before the sweep starts: those of a budget in seconds."""
        if self.config.budget is None or self.config.budget.accelerator_seconds is None:
            return []
        return [point for point in self.points() or [] if point_key(point) not in self._measured]

    def _base_of(self, point: Point, seed: int) -> RunConfig:
        raw = _laid(self.config.base, {**self._overrides, **point}) | {"name": self.config.name, "seed": seed}
        config = with_absolute_paths(parse(RunConfig, raw, "the run"))
        data = config.data.model_copy(update={"version": self.dataset.manifest.fingerprint})
        return config.model_copy(update={"data": data})

    def _cost(self, config: RunConfig, point: Point) -> Cost:
        key = point_key(point)
        if key not in self._costs:
            build_normalize(config, self.dataset.manifest)
            model = weightless_model(config)
            counts = masking.visible_counts(config.mask, config.grid)
            costs = [cost(model, n, masking.num_target(config.objective, config.grid, n)) for n in counts]
            self._costs[key] = _mean(costs)
        return self._costs[key]

    def _steps(self, point: Point, flops_per_step: float, without_budget: int) -> int:
        budget = self.config.budget
        if budget is None:
            return without_budget
        if budget.steps is not None:
            return budget.steps
        if budget.flops is not None:
            amount, per_step, key = budget.flops, flops_per_step, "budget.flops"
        else:
            assert budget.accelerator_seconds is not None
            per_step = self._measured.get(point_key(point), 0.0)
            amount, key = budget.accelerator_seconds, "budget.accelerator_seconds"
            if not per_step:  # not measured yet: as long as one step
                return 1
        if amount < per_step:
            raise ConfigError(
                "not enough for a single step", key=key, found=f"{amount:g}", allowed=f"{per_step:.4g} and more"
            )
        return round(amount / per_step)

    def _refuse_without_objective(self) -> None:
        metric, manifest = self.config.objective.metric, self.dataset.manifest
        if metric == LOSS:
            return
        lacks = [
            *(["class names"] if not manifest.class_names else []),
            *(["held-out rows"] if not self.dataset.num_rows("held_out") else []),
        ]
        if lacks:
            raise DataError(
                f"the probe finds no {metric} there: the dataset has no {' and no '.join(lacks)}",
                key="objective.metric",
                found=self.dataset.storage.uri,
                fix="ingest pictures in class folders, with held_out_fraction above 0",
            )
        if not self.base.probe.enabled:
            raise ConfigError(
                "the run's probe, which finds it, is off",
                key="objective.metric",
                found=f"{metric}, with probe.enabled false in base",
                allowed=f"{', '.join(SCORES)} with probe.enabled true",
            )


def plan_of(config: RunConfig, dataset: Dataset) -> RunPlan:
    """The plan of a trial's run."""
    return resolve(config, dataset.facts(), weights_digest(config.init_from))


def name_of(point: Point) -> str:
    """A point, for people."""
    return " ".join(f"{key}={shown(value)}" for key, value in point.items())


def point_key(point: Point) -> str:
    """Sixteen hexadecimal digits that say which point this is."""
    return fingerprint(dict(point))


def _laid(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested keys and values with dotted ones laid over them: all at once, since a `kind` replaces its section."""
    over: dict[str, Any] = {}
    for key in sorted(values, key=lambda key: key.count(".")):  # a section before what is in it
        nested = values[key]
        for part in reversed(key.split(".")):
            nested = {part: nested}
        over = merge(over, nested)
    return merge(raw, over)


def _as_long_as(config: RunConfig, steps: int, whole: RunPlan) -> RunConfig:
    """A config with so many steps, its warm-up the same share of them as it was."""
    if steps == whole.total_steps:
        return config
    warmup = min(round(steps * whole.warmup_steps / whole.total_steps), steps - 1)
    length = {"steps": steps, "epochs": None, "warmup_steps": warmup, "warmup_epochs": None}
    return config.model_copy(update={"optim": config.optim.model_copy(update=length)})


def base_of(config: SweepConfig) -> RunConfig:
    """What the points have in common, its paths as they are written. A mistake in it says in which section it is.

    Raises:
        ConfigError: there is no such run, or a key of the sweep's cannot be there.
    """
    raw = _laid(config.base, config.overrides | _OF_TRIALS)
    try:
        base = parse(RunConfig, {**raw, "name": config.name}, "the run")
        with_absolute_paths(base)
    except ConfigError as error:
        section = "overrides" if any(key in str(error) for key in config.overrides) else "base"
        raise ConfigError(str(error), key=section) from error
    _refuse_other_keys(config)
    return base


def _refuse_other_keys(config: SweepConfig) -> None:
    known = dict(dotted_keys(RunConfig)) | {"name": True}
    for key, axis in config.space.items():
        if key in ("init_from", "data.path", "data.version"):
            raise ConfigError(
                "a sweep has one dataset and one start: what comes of others does not compare",
                key=f"space.{key}",
                fix="make a sweep of each",
            )
        if known.get(key):
            raise ConfigError(
                "it changes nothing that is learned: all of its points would be one",
                key=f"space.{key}",
                fix="leave it out" if key == "name" else f"set it for all of them, in overrides: {{{key}: …}}",
            )
        if key in config.overrides and not axis.when:
            raise ConfigError(
                "it is an axis of the space, whose values would replace this one",
                key=f"overrides.{key}",
                found=config.overrides[key],
                fix="leave it out, or take the axis out of the space",
            )
    for key, instead in _SAID_ELSEWHERE.items():
        if key in config.overrides:
            raise ConfigError("it is not said here", key=f"overrides.{key}", fix=f"leave it out: {instead}")
    for key, value in _OF_TRIALS.items():
        if config.overrides.get(key, value) != value:
            raise ConfigError(
                "the trials of a sweep cannot have it otherwise",
                key=f"overrides.{key}",
                found=config.overrides[key],
                allowed=shown(value),
                fix="leave it out",
            )


def refuse_equal_points(trials: Sequence[Trial]) -> None:
    """Look whether points that are not the same make the same run, as 1 and 1.0 do.

    Raises:
        ConfigError: two of them do.
    """
    first: dict[str, Point] = {}
    for trial in trials:
        other = first.setdefault(trial.key, trial.point)
        if point_key(other) != point_key(trial.point):
            raise ConfigError(
                "two of its points are the same run",
                key="space",
                found=f"{name_of(other)} and {name_of(trial.point)}",
                fix="leave one of them out",
            )


def _mean(costs: Sequence[Cost]) -> Cost:
    """Of a mask with several ratios, each as often as the others."""
    first = costs[0]
    return Cost(
        encoder_flops=round(fmean(each.encoder_flops for each in costs)),
        decoder_flops=round(fmean(each.decoder_flops for each in costs)),
        first_flops=first.first_flops if len(costs) == 1 else round(fmean(each.first_flops for each in costs)),
        encode_flops=first.encode_flops,
        encoder_parameters=first.encoder_parameters,
        decoder_parameters=first.decoder_parameters,
    )


# -------------------------------------------------------------------------------------------------------------- points


def _combinations(space: Mapping[str, AnyAxis]) -> Iterator[Point]:
    """Of the values of the space's grids."""
    grids = {key: axis.values for key, axis in space.items() if isinstance(axis, Grid)}
    for values in itertools.product(*grids.values()):
        yield dict(zip(grids, values, strict=True))


def _drawn(space: Mapping[str, AnyAxis], num: int, seed: int) -> Iterator[list[Point]]:
    """Draws, each with every combination of the grids' values: of these the points that none before it brought.

    One that brings nothing new is made again, as long as there may be more.
    """
    generator = np.random.default_rng(seed)
    drawn, known = set[str](), set[str]()
    tries = _TRIES
    while num and tries:
        tries -= 1
        values = {key: _draw(axis, generator) for key, axis in space.items() if not isinstance(axis, Grid)}
        if (text := identity(values)) in drawn:
            continue
        drawn.add(text)
        found = {identity(point): point for point in _with_grids(space, values)}
        if new := [point for text, point in found.items() if text not in known]:
            yield new
            known |= found.keys()
            num, tries = num - 1, _TRIES


def _with_grids(space: Mapping[str, AnyAxis], drawn: Point) -> Iterator[Point]:
    for each in _combinations(space):
        values = {**drawn, **each}
        yield conditioned(space, {key: values[key] for key in space})


def _draw(axis: AnyAxis, generator: np.random.Generator) -> Any:
    match axis:
        case Choice():
            return axis.values[int(generator.integers(len(axis.values)))]
        case Uniform():
            return float(generator.uniform(axis.low, axis.high))
        case LogUniform():
            return float(math.exp(generator.uniform(math.log(axis.low), math.log(axis.high))))
        case RandInt():
            return int(generator.integers(axis.low, axis.high, endpoint=True))
    raise AssertionError("a grid is not drawn")


def conditioned(space: Mapping[str, AnyAxis], point: Point) -> Point:
    """A point without the axes whose conditions do not hold at it, nor those that hang on such an axis."""
    left = dict(point)
    while gone := [key for key in left if not is_there(space[key], left)]:
        for key in gone:
            del left[key]
    return left
