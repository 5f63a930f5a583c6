"""Where the first worker posts how far it is, for the driver to show. A process of its own: it imports nothing."""

from __future__ import annotations

from collections.abc import Mapping


class Board:
    """A Ray actor that holds the newest line."""

    def __init__(self) -> None:
        self._step, self._metrics = 0, dict[str, float]()

    def post(self, step: int, metrics: Mapping[str, float]) -> None:
        """From the first worker."""
        self._step, self._metrics = step, dict(metrics)

    def read(self) -> tuple[int, dict[str, float]]:
        """From the driver."""
        return self._step, self._metrics
