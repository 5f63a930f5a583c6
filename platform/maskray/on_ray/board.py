"""Where workers post how far they are and what they warn of, for the driver and Prometheus: an actor.

It imports little.
"""

from __future__ import annotations

from collections.abc import Mapping

from maskray.on_ray.gauges import Gauges

MOST_WARNINGS = 100


class Board:
    """A Ray actor that holds the newest line, and each warning once.

    Args:
        run: name of the run that Prometheus is shown, if any. The board outlives workers, so its totals are those of
            all their starts.
    """

    def __init__(self, run: str | None = None) -> None:
        self._gauges = None if run is None else Gauges(run)
        self._step, self._metrics = 0, dict[str, float]()
        self._warnings: dict[str, None] = {}

    def post(self, step: int, metrics: Mapping[str, float]) -> None:
        """From the first worker."""
        self._step, self._metrics = step, dict(metrics)
        if self._gauges is not None:
            self._gauges.log(step, metrics)

    def started(self) -> None:
        """From the first worker, when it starts."""
        if self._gauges is not None:
            self._gauges.started()

    def probed(self, scores: Mapping[str, float]) -> None:
        """From a probe on the way."""
        if self._gauges is not None:
            self._gauges.probed(scores)

    def warn(self, text: str) -> None:
        """From any worker: all of them may say the same."""
        full = len(self._warnings) >= MOST_WARNINGS
        self._warnings.setdefault("There are more warnings: see the logs of Ray's workers" if full else text)

    def read(self, seen: int) -> tuple[int, dict[str, float], list[str]]:
        """From the driver: the newest step and metrics, and the warnings after the first `seen`."""
        return self._step, self._metrics, list(self._warnings)[seen:]


class TrialBoard(Board):
    """Also what a trial's checkpoints are worth: each is kept, and none but once. And signs of life before any line."""

    def __init__(self, run: str | None = None) -> None:
        super().__init__(run)
        self._found: dict[int, dict[str, float]] = {}
        self._beats = 0

    def beat(self) -> None:
        """From any worker that is alive, and has no line to post."""
        self._beats += 1

    def read_beats(self) -> int:
        """From the trial's process: how many there were."""
        return self._beats

    def found(self, step: int, metrics: Mapping[str, float]) -> None:
        """From the first worker. One that was lost and came again may find the same again."""
        self._found.setdefault(step, dict(metrics))

    def read_found(self, seen: int) -> list[tuple[int, dict[str, float]]]:
        """From the trial's process: what came after the first `seen`."""
        return list(self._found.items())[seen:]
