"""`--rate`: what a worker reaches."""

from __future__ import annotations

from maskray.errors import ConfigError

_SLOWEST = 1e6


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
