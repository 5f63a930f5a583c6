"""Numbers as people read them."""

from __future__ import annotations

from maskray.errors import ConfigError

_SLOWEST = 1e6
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(number: float) -> str:
    """`1.5 G`, with a space before the unit that follows."""
    size, prefix = next((pair for pair in _PREFIXES if number >= pair[0]), (1.0, ""))
    return f"{number / size:.3g} {prefix}"


def time_of(hours: float) -> str:
    """`2.5 h`, or in a unit below."""
    units = ((1, "h"), (60, "min"), (3600, "s"))
    per_hour, unit = next((pair for pair in units if hours * pair[0] >= 1), units[-1])
    return f"{hours * per_hour:,.3g} {unit}"


def rate_of(given: float | None) -> float | None:
    """What `--rate` gives.

    Raises:
        ConfigError: no rate of floating-point operations.
    """
    if given is not None and not _SLOWEST <= given < float("inf"):
        raise ConfigError(
            "a rate is in operations a second, not in images",
            key="--rate",
            found=given,
            allowed=f"at least {_SLOWEST:.0e}, such as 4e14 of a GPU",
        )
    return given
