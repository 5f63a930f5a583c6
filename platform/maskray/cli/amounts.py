"""Numbers as people read them."""

from __future__ import annotations

from maskray.errors import ConfigError

_SLOWEST = 1e6


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
