"""Where workers post how far they are and what they warn of, for the driver to show. An actor: it imports nothing."""

from __future__ import annotations

from collections.abc import Mapping

MOST_WARNINGS = 100


class Board:
    """A Ray actor that holds the newest line, and each warning once."""

    def __init__(self) -> None:
        self._step, self._metrics = 0, dict[str, float]()
        self._warnings: dict[str, None] = {}

    def post(self, step: int, metrics: Mapping[str, float]) -> None:
        """From the first worker."""
        self._step, self._metrics = step, dict(metrics)

    def warn(self, text: str) -> None:
        """From any worker: all of them may say the same."""
        full = len(self._warnings) >= MOST_WARNINGS
        self._warnings.setdefault("There are more warnings: see the logs of Ray's workers" if full else text)

    def read(self, seen: int) -> tuple[int, dict[str, float], list[str]]:
        """From the driver: the newest step and metrics, and the warnings after the first `seen`."""
        return self._step, self._metrics, list(self._warnings)[seen:]


class TrialBoard(Board):
    """Also what a trial's checkpoints are worth: each is kept, and none but once. And signs of life before any line."""

    def __init__(self) -> None:
        super().__init__()
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
