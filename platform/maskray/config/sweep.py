"""What a sweep is asked for: a run's config, a space laid over it, what judges a point, and what each may cost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, WithJsonSchema, model_validator

from maskray.config.load import parse, read, with_overrides
from maskray.config.section import PositiveInt, Section, of_kind, operational
from maskray.config.space import AnyAxis, Choice, Grid, Value, conditions_take, identity, in_order, what_conditions_take
from maskray.errors import ConfigError

LOSS = "pretrain/loss"
SCORES = ("probe/few_labels", "probe/all_labels", "probe/knn")
"""What the probe of a run finds, as MLflow has it."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
_DOTTED = ("space", "overrides")
LENGTHS = ("optim.steps", "optim.epochs", "optim.warmup_steps", "optim.warmup_epochs")


# ---------------------------------------------------------------------------------------------------- search, stopping


class GridSearch(Section):
    """Every point of the grid."""

    kind: Literal["grid"] = "grid"


class RandomSearch(Section):
    """Points drawn at random, each another one; every value of a grid's axis is taken with each of them."""

    kind: Literal["random"] = "random"
    points: PositiveInt
    seed: Seed = 0


class OptunaSearch(Section):
    """Points that Optuna's TPE sampler asks for, by the mean over seeds of those it was told of."""

    kind: Literal["optuna"] = "optuna"
    points: PositiveInt
    startup: PositiveInt = 10
    """Points that are drawn at random before it goes by what it was told."""
    seed: Seed = 0


class NoStopping(Section):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class Rungs(Section):
    """Places on the way at which trials are judged, and some stopped."""

    unit: Literal["flops", "steps"] = "flops"
    """Of what trials have spent at a rung: compared are those that have spent the same."""
    first: PositiveFloat
    """The first rung, in that unit."""


class Asha(Rungs):
    """Asynchronous successive halving (Li et al. 2020): at each rung the best of every `reduction` go on."""

    kind: Literal["asha"] = "asha"
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """Also what a rung is times the one before."""


class Median(Rungs):
    """A trial stops where its best so far is worse than the median of the others' means (Golovin et al. 2017)."""

    kind: Literal["median"] = "median"
    min_trials: PositiveInt = 3
    """Others that must have reached the rung."""


_NOT_HERE = {
    "pbt": "it copies the weights of one trial into another, which then have no config that made them",
    "pb2": "it copies the weights of one trial into another, which then have no config that made them",
    "hyperband": "it pauses trials until others have come as far, and a paused one holds its place for nothing",
}


def _known(value: Any) -> Any:
    kind = value.get("kind") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind.lower() in _NOT_HERE:
        raise ConfigError(
            f"not on the path that a sweep takes: {_NOT_HERE[kind.lower()]}; over Ray Train, Tune's does nothing",
            key="stopping.kind",
            found=kind,
            allowed="none, asha or median",
        )
    return value


Stopping = Annotated[
    Annotated[NoStopping | Asha | Median, Field(discriminator="kind"), of_kind("none")], BeforeValidator(_known)
]
Search = Annotated[GridSearch | RandomSearch | OptunaSearch, Field(discriminator="kind"), of_kind("grid")]


# -------------------------------------------------------------------------------------------------------------- budget


class Budget(Section):
    """What each trial may spend: one of the three. The length of its schedule follows, in whole steps."""

    steps: PositiveInt | None = None
    flops: PositiveFloat | None = None
    """Floating-point operations of forward and backward passes, by `models/cost.py`."""
    accelerator_seconds: PositiveFloat | None = None
    """Seconds of all of a trial's workers together: measured once for each point, before the first trial."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.steps, self.flops, self.accelerator_seconds)) != 1:
            raise ValueError("give exactly one of steps, flops and accelerator_seconds")
        return self


class ObjectiveOfSweep(Section):
    """What a point is judged by."""

    metric: str = "probe/knn"
    """`probe/few_labels`, `probe/all_labels` or `probe/knn`, as the run's probe finds them."""
    direction: Literal["max", "min"] = "max"
    forced: bool = False
    """Let the loss be the metric all the same."""

    @model_validator(mode="after")
    def _says_what_a_model_is_worth(self) -> Self:
        if self.metric == LOSS and not self.forced:
            raise ConfigError(
                "the loss says nothing of the representation: another mask ratio, patch or target is another task, and "
                "an easier task has the lower loss",
                key="objective.metric",
                found=LOSS,
                allowed=", ".join(SCORES),
                fix="take one of these, or set objective.forced: true where every point has the same task",
            )
        if self.metric not in (*SCORES, LOSS):
            raise ConfigError(
                "no probe finds this", key="objective.metric", found=self.metric, allowed=", ".join(SCORES)
            )
        if self.direction != ("min" if self.metric == LOSS else "max"):
            raise ConfigError(
                f"of {self.metric} {'less' if self.metric == LOSS else 'more'} is better",
                key="objective.direction",
                found=self.direction,
                allowed="min" if self.metric == LOSS else "max",
            )
        return self


class TrialsConfig(Section):
    """How trials are run."""

    concurrency: PositiveInt | None = operational(None)
    """Trials at once, for which an autoscaler is asked; None: as many as the present nodes hold, at least one."""
    limit_seconds: Annotated[float, Field(gt=0)] = operational(600.0)
    """A trial that is silent for longer (it speaks at log steps, and after probes) is ended, and recorded as failed."""
    fail_if: Literal["none_finished", "any_failed"] = operational("none_finished")
    """When the sweep's exit code is 1."""


_OF_THE_SWEEP = {
    "model": "it is register_best.name",
    "challenger": "it is the version that the best point becomes",
    "storage": "it is that of the sweep's runs: base's storage",
    "tracking": "it is the MLflow of the sweep's runs: base's tracking",
}
"""Keys of a promotion that are not said again, and what they are."""


class RegisterConfig(Section):
    """The best point is registered, and offered as challenger."""

    name: Annotated[str, Field(pattern=r"^[^/:.][^/:]*$")]
    """Of the registered model."""
    promotion: dict[str, Any] | None = None
    """A promotion's config, as in `configs/promote/`, without `model`, `challenger`, `storage` and `tracking`, which
    are the sweep's; None: it is only registered."""

    @model_validator(mode="after")
    def _the_rest_is_the_sweeps(self) -> Self:
        for key, what in _OF_THE_SWEEP.items():
            if key in (self.promotion or {}):
                raise ConfigError(
                    "the sweep says it, and would not look at this",
                    key=f"register_best.promotion.{key}",
                    found=(self.promotion or {})[key],
                    fix=f"leave it out: {what}",
                )
        return self


class SweepConfig(Section):
    """One sweep. `base` and what `extends:` names are files relative to the one that says so."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    base: Annotated[dict[str, Any], WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]
    """The run's config: a file of `configs/pretrain/`, or keys and values."""
    overrides: dict[str, Value] = Field(default_factory=dict)
    """Dotted keys of the run's config, and what they are instead: the same for all points."""
    space: Annotated[dict[str, AnyAxis], Field(min_length=1)]
    """Dotted keys of the run's config, and what each may be."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Each point is trained with each of them: the report's intervals are over seeds."""
    objective: ObjectiveOfSweep = ObjectiveOfSweep()
    search: Search = GridSearch()
    stopping: Stopping = NoStopping()
    budget: Budget | None = None
    """None: each point's own `optim.epochs` or `optim.steps`."""
    trials: TrialsConfig = TrialsConfig()
    register_best: RegisterConfig | None = operational(None)
    confidence: Annotated[float, Field(gt=0, lt=1)] = operational(0.95)
    """Of the report's intervals."""

    @model_validator(mode="after")
    def _axes_have_values(self) -> Self:
        for key, axis in self.space.items():
            if isinstance(axis, Grid | Choice) and not axis.values:
                raise ConfigError("there is nothing to take", key=f"space.{key}.values", found="[]", allowed="values")
            if not isinstance(axis, Grid | Choice) and axis.low >= axis.high:
                raise ConfigError(
                    "low must be below high", key=f"space.{key}", found=f"low {axis.low}, high {axis.high}"
                )
            for other in axis.when:
                if other == key or other not in self.space:
                    raise ConfigError(
                        "a condition is about another key of the space",
                        key=f"space.{key}.when",
                        found=other,
                        allowed=", ".join(k for k in self.space if k != key) or "none: there is no other",
                    )
        return self

    @model_validator(mode="after")
    def _conditions_can_hold(self) -> Self:
        in_order(self.space)
        for key, axis in self.space.items():
            for other, values in axis.when.items():
                if never := [value for value in values if not conditions_take(self.space[other], value)]:
                    raise ConfigError(
                        "it is never so, and the axis would never be there",
                        key=f"space.{key}.when.{other}",
                        found=identity(never[0]),
                        allowed=what_conditions_take(self.space[other]),
                    )
        return self

    @model_validator(mode="after")
    def _seeds_are_none_of_the_axes(self) -> Self:
        if "seed" in self.space:
            raise ConfigError("a seed is no axis: points are compared over seeds", key="space.seed", fix="list seeds")
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError("a seed stands twice", key="seeds", found=list(self.seeds))
        return self

    @model_validator(mode="after")
    def _the_budget_says_how_long(self) -> Self:
        lengths = [key for key in LENGTHS if key in self.space]
        if self.budget is not None and lengths:
            raise ConfigError(
                "the budget says how long a trial is, and its warm-up has the share that it has in base",
                key=f"space.{lengths[0]}",
                fix="leave it out, or set budget: null",
            )
        if isinstance(self.search, OptunaSearch) and self.budget is not None and self.budget.accelerator_seconds:
            raise ConfigError(
                "what a point costs is measured before the first trial, and Optuna's points are not known then",
                key="budget.accelerator_seconds",
                allowed="budget.flops or budget.steps; or search.kind grid or random",
            )
        return self

    @model_validator(mode="after")
    def _the_search_takes_the_axes(self) -> Self:
        grids = [key for key, axis in self.space.items() if isinstance(axis, Grid)]
        drawn = [key for key in self.space if key not in grids]
        if isinstance(self.search, GridSearch) and drawn:
            raise ConfigError(
                "a grid has no end here",
                key=f"space.{drawn[0]}",
                found=self.space[drawn[0]].kind,
                allowed="a list of values, under search.kind grid",
                fix="list values, or take search.kind: random or optuna",
            )
        if isinstance(self.search, OptunaSearch) and grids:
            raise ConfigError(
                "Optuna draws: it does not go through all values of an axis",
                key=f"space.{grids[0]}",
                found="grid",
                allowed="choice, uniform, loguniform or randint",
                fix="take kind: choice with the same values",
            )
        return self


def load_sweep(path: Path, overrides: Iterable[str] = ()) -> SweepConfig:
    """The sweep of a YAML file: a `base` that is a path, relative to the file that says it, is read.

    Raises:
        ConfigError: a file is missing or no YAML mapping, or a value is wrong (all are listed).
    """
    raw = _with_base(read(path, places=["base"]), path.parent)
    for item in overrides:
        section, _, rest = item.partition(".")
        key, equals, _ = rest.partition("=")
        if section in _DOTTED and key and equals:  # what is in these sections are keys with dots in them
            value = with_overrides({}, [f"value={rest.partition('=')[2]}"])["value"]
            raw = raw | {section: {**(raw.get(section) or {}), key: value}}
        else:
            raw = with_overrides(raw, [item])
    return parse(SweepConfig, _with_base(raw, path.parent), str(path))


def _with_base(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A `base` that is a path is read: what overrides say of it is laid over what is there."""
    base = raw.get("base")
    return raw | ({"base": read(folder / base)} if isinstance(base, str) else {})
