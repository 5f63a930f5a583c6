"""Where workers post how far they are and what they warn of, for the driver and Prometheus: an actor.

It imports little.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from maskray.on_ray.gauges import Gauges

MOST_OF_A_KIND, KIND_SECONDS = 10, 600.0
"""Warnings of one kind that are shown in so many seconds; what is left out is counted, and that is said."""
_MOST_UNREAD = 1000


@dataclass
class _Kind:
    """Warnings of a kind, since a time."""

    since: float
    texts: set[str] = field(default_factory=set)
    num_left_out: int = 0
    last: str = ""
    """Of those that were left out."""


class Warnings:
    """What there is to show: all workers may say the same, and one of them the same in a thousand ways.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds = dict[str, _Kind]()
        self._lines = list[str]()
        self._heard = 0

    def add(self, text: str, kind: str | None = None) -> None:
        """Say it, if it was not said a moment ago. `kind`: says which others are like it; None: none."""
        self.settle()
        said = self._kinds.setdefault(kind or text, _Kind(self._clock()))
        if text in said.texts:
            return
        if len(said.texts) < MOST_OF_A_KIND:
            said.texts.add(text)
            self._say(text)
        else:
            said.num_left_out, said.last = said.num_left_out + 1, text

    def settle(self, *, all_of_them: bool = False) -> None:
        """Say how many were left out, where their time is over: then they may come again."""
        now = self._clock()
        over = [kind for kind, said in self._kinds.items() if all_of_them or now - said.since >= KIND_SECONDS]
        for kind in over:
            said = self._kinds.pop(kind)
            if said.num_left_out:
                self._say(
                    f"{said.num_left_out} more like it were left out (see the logs of Ray's workers): {said.last}"
                )

    def after(self, num: int) -> tuple[list[str], int]:
        """What came after the first `num`, which are dropped here, and how many there were in all."""
        self._drop(num - self._heard)
        return list(self._lines), self._heard + len(self._lines)

    def _say(self, line: str) -> None:
        self._lines.append(line)
        self._drop(len(self._lines) - _MOST_UNREAD)

    def _drop(self, num: int) -> None:
        num = min(max(num, 0), len(self._lines))
        del self._lines[:num]
        self._heard += num


class Seen(NamedTuple):
    """How much of a board was read."""

    board: str = ""
    """Which: one that was lost and started again is another."""
    warnings: int = 0


class News(NamedTuple):
    """What is new on a board."""

    step: int
    metrics: dict[str, float]
    warnings: list[str]
    seen: Seen
    totals: Any
    """For the board that takes its place, if it is lost: see `Board.take_up`."""


class Board:
    """A Ray actor that holds the newest line, and what workers warn of.

    It is started again where its process is lost, and is empty then. Who reads it knows the rest.

    Args:
        run: name of the run that Prometheus is shown, if any. The board outlives workers, so its totals are those of
            all their starts.
    """

    def __init__(self, run: str | None = None) -> None:
        self._gauges = None if run is None else Gauges(run)
        self._step, self._metrics = 0, dict[str, float]()
        self._name, self._warnings = uuid.uuid4().hex, Warnings()

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

    def warn(self, text: str, kind: str | None = None) -> None:
        """From any worker; `kind` as in `Warnings`."""
        self._warnings.add(text, kind)

    def read(self, seen: Seen, *, is_last: bool = False) -> News:
        """From the driver, which has seen so much. `is_last`: what was left out until now is said at once."""
        self._warnings.settle(all_of_them=is_last)
        warnings, num = self._warnings.after(seen.warnings if seen.board == self._name else 0)
        totals = None if self._gauges is None else self._gauges.totals()
        return News(self._step, self._metrics, warnings, Seen(self._name, num), totals)

    def take_up(self, totals: Any) -> None:
        """From the driver: what it was last told of by a board of the run that was lost."""
        if self._gauges is not None and totals is not None:
            self._gauges.take_up(totals)


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

    def read_found(self, seen: Container[int]) -> list[tuple[int, dict[str, float]]]:
        """From the trial's process: what it has not seen yet, by its step."""
        return [(step, metrics) for step, metrics in self._found.items() if step not in seen]
