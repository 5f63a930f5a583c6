"""What all sections of a config are made of, and the kinds of values in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from maskray.credentials import all_shown


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, defaults validated, no NaN; printed, without passwords."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, all_shown(value)

    @model_validator(mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, raw: object) -> object:
        # pydantic would take `clip_norm: yes` for 1.0.
        for key, value in raw.items() if isinstance(raw, Mapping) else ():
            if isinstance(value, bool) and key in cls.model_fields and cls.model_fields[key].annotation is not bool:
                raise ValueError(f"{key} cannot be true or false (found {str(value).lower()})")
        return raw


def operational(default: Any = ..., **limits: Any) -> Any:
    """A field that does not change what is learned: left out of the run's identity."""
    return Field(default, json_schema_extra={"operational": True}, **limits)


def pair(value: object) -> object:
    """`224` means `[224, 224]`."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def of_kind(default: str) -> BeforeValidator:
    """A section that does not say its `kind` is of the default one."""
    return BeforeValidator(lambda value: {"kind": default, **value} if isinstance(value, Mapping) else value)


PositiveInt = Annotated[int, Field(ge=1)]
PairOfInts = tuple[PositiveInt, PositiveInt]
SizeHW = Annotated[PairOfInts, BeforeValidator(pair, json_schema_input_type=PositiveInt | PairOfInts)]
Fraction = Annotated[float, Field(ge=0, le=1)]
