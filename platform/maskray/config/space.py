"""The space of a sweep: what each key of the run's config may be, and where it is there at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from maskray.config.section import Section, of_kind
from maskray.errors import ConfigError

Value = bool | int | float | str | list[Any] | dict[str, Any] | None
Values = Annotated[
    tuple[Value, ...],
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value], json_schema_input_type=Value),
]


class Axis(Section):
    """What one key of the run's config may be."""

    when: dict[str, Values] = Field(default_factory=dict)
    """Keys and the values (one, or a list) that each must have at a point for this axis to be there at all; elsewhere
    the key is as in `base`."""


class Grid(Axis):
    """Every one of the values. A bare list says the same."""

    kind: Literal["grid"] = "grid"
    values: tuple[Value, ...]


class Choice(Axis):
    """One of the values, drawn."""

    kind: Literal["choice"] = "choice"
    values: tuple[Value, ...]


class Uniform(Axis):
    """A number between two."""

    kind: Literal["uniform"] = "uniform"
    low: float
    high: float


class LogUniform(Axis):
    """A number whose logarithm lies evenly between those of two."""

    kind: Literal["loguniform"] = "loguniform"
    low: PositiveFloat
    high: PositiveFloat


class RandInt(Axis):
    """A whole number, both ends included."""

    kind: Literal["randint"] = "randint"
    low: int
    high: int


def _as_axis(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return {"kind": "grid", "values": value}
    if not isinstance(value, Mapping | Axis):
        raise ValueError("an axis is a list of values, or a section with a kind and what goes with it")
    return value


_Axes = Grid | Choice | Uniform | LogUniform | RandInt
AnyAxis = Annotated[
    Annotated[_Axes, Field(discriminator="kind"), of_kind("grid")],
    BeforeValidator(_as_axis, json_schema_input_type=_Axes | list[Value]),
]


def in_order(space: Mapping[str, Axis]) -> list[str]:
    """The keys of a space, each after those that its condition is about.

    Raises:
        ConfigError: there is no such order.
    """
    try:
        return list(TopologicalSorter({key: axis.when for key, axis in space.items()}).static_order())
    except CycleError as error:
        raise ConfigError(
            "conditions hang on each other in a circle, so that none of them can be looked at first",
            key="space",
            found=" → ".join(error.args[1]),
            fix="leave one of them out",
        ) from error


def identity(of_config: Any) -> str:
    """A point or a value of one as a text that is equal for equal ones: for Python true is 1, and 1 is 1.0."""
    return json.dumps(of_config, sort_keys=True)


def is_there(axis: Axis, point: Mapping[str, Any]) -> bool:
    """Whether the conditions of an axis hold at a point that has all that they are about."""
    return all(other in point and _is_among(point[other], values) for other, values in axis.when.items())


def takes(axis: AnyAxis, value: Any) -> bool:
    """Whether an axis may have this value."""
    match axis:
        case Grid() | Choice():
            return _is_among(value, axis.values)
        case RandInt():
            return isinstance(value, int) and not isinstance(value, bool) and axis.low <= value <= axis.high
        case Uniform() | LogUniform():
            return isinstance(value, float) and axis.low <= value <= axis.high


def _is_among(value: Any, values: Iterable[Any]) -> bool:
    return identity(value) in map(identity, values)


def conditions_take(axis: AnyAxis, value: Any) -> bool:
    """Whether a condition about an axis may ask for this value: not for one number of all between two."""
    return isinstance(axis, Grid | Choice | RandInt) and takes(axis, value)


def what_conditions_take(axis: AnyAxis) -> str:
    """The same in words."""
    match axis:
        case Grid() | Choice():
            return ", ".join(map(identity, axis.values))
        case RandInt():
            return f"whole numbers from {axis.low} to {axis.high}"
        case Uniform() | LogUniform():
            return f"none: a condition is about a list of values or whole numbers, and that one is {axis.kind}"
