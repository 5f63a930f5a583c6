"""What the training loop tells of itself: the seam, its double, and two small combiners."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

log = logging.getLogger(__name__)


class Point(NamedTuple):
    """One value of one metric. Its time is that of its making, however often and late it is sent."""

    key: str
    value: float
    timestamp_ms: int
    step: int

    def plain(self) -> list[Any]:
        """As JSON has it."""
        return list(self)

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> Point:
        """The way back."""
        key, value, timestamp_ms, step = plain
        return cls(str(key), float(value), int(timestamp_ms), int(step))


def points_of(metrics: Mapping[str, float], step: int) -> list[Point]:
    """Points of now, of the values that are finite.

    The others make a gap: MLflow's interface hides a curve whose last value is NaN, which is just the one to be looked
    at, and draws an infinity as 1.8e308, which flattens all the rest.
    """
    now = time.time_ns() // 1_000_000
    return [Point(key, float(value), now, step) for key, value in metrics.items() if math.isfinite(value)]


class Tracker(Protocol):
    """What rank 0 tells. All of it is cheap and never raises; only `flush` and `close` wait for anybody.

    A metric is stored once: of each key, steps at or below the highest that was stored when the tracker was opened are
    not stored again. So a resumed run may simply log the steps that it repeats.
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Values after `step` steps. One that is not finite is left out."""
        ...

    def figure(self, name: str, png: bytes, step: int) -> None:
        """A picture after `step` steps; the same name at other steps makes a series."""
        ...

    def event(self, name: str, text: str) -> None:
        """Something that happened, for people: a rewind with its range, a stop with its reason."""
        ...

    def tag(self, name: str, text: str) -> None:
        """A fact about the run, over what the name said before."""
        ...

    def pending(self) -> list[Any]:
        """Points that are not known to be stored, as plain data: they belong into the checkpoint."""
        ...

    def restore(self, pending: Sequence[Any]) -> None:
        """Take up what `pending` gave, before anything is logged."""
        ...

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all is stored; whether it is."""
        ...

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """Flush and stop; whether all is stored. What is told later is dropped."""
        ...


@dataclass
class MemoryStore:
    """What `MemoryTracker`s have stored; it outlives them as a server would."""

    points: list[Point] = field(default_factory=list)
    figures: dict[tuple[str, int], bytes] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    away: bool = False
    """Nothing is stored while this is true."""

    def last_steps(self) -> dict[str, int]:
        """The highest step of each key."""
        out: dict[str, int] = {}
        for point in self.points:
            out[point.key] = max(point.step, out.get(point.key, -1))
        return out


class MemoryTracker:
    """Keeps all in memory, under the rules of a real one: the double in tests."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = store if store is not None else MemoryStore()
        self.closed = False
        self._stored_before = self.store.last_steps()
        self._unsent: list[Point] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        if not self.closed:
            self._unsent += points_of(metrics, step)
            self._send()

    def figure(self, name: str, png: bytes, step: int) -> None:
        """See `Tracker`."""
        if not self.closed:
            self.store.figures.setdefault((name, step), png)

    def event(self, name: str, text: str) -> None:
        """See `Tracker`."""
        if not self.closed:
            self.store.events.append((name, text))

    def tag(self, name: str, text: str) -> None:
        """See `Tracker`."""
        if not self.closed:
            self.store.tags[name] = text

    def pending(self) -> list[Any]:
        """See `Tracker`."""
        return [point.plain() for point in self._unsent]

    def restore(self, pending: Sequence[Any]) -> None:
        """See `Tracker`."""
        self._unsent = [Point.from_plain(plain) for plain in pending] + self._unsent
        self._send()

    def flush(self, timeout_seconds: float) -> bool:  # noqa: ARG002  (nothing takes time here)
        """See `Tracker`."""
        self._send()
        return not self._unsent

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """See `Tracker`."""
        self.closed = True
        return self.flush(timeout_seconds)

    def _send(self) -> None:
        if not self.store.away:
            self.store.points += [p for p in self._unsent if p.step > self._stored_before.get(p.key, -1)]
            self._unsent = []


class Observer:
    """Shows metrics as they come and keeps nothing: a progress line, a queue to the driver, or nothing at all."""

    def __init__(self, show: Callable[[int, Mapping[str, float]], None] | None = None) -> None:
        self._show = show

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Show them."""
        if self._show is None:
            return
        try:
            self._show(step, metrics)
        except Exception:  # a terminal or queue that is gone must not end a run
            log.warning("Progress can no longer be shown", exc_info=True)
            self._show = None

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Dropped."""

    def event(self, name: str, text: str) -> None:
        """Dropped."""

    def tag(self, name: str, text: str) -> None:
        """Dropped."""

    def pending(self) -> list[Any]:
        """None, ever."""
        return []

    def restore(self, pending: Sequence[Any]) -> None:
        """Dropped."""

    def flush(self, timeout_seconds: float) -> bool:  # noqa: ARG002  (nothing takes time here)
        """Nothing waits."""
        return True

    def close(self, timeout_seconds: float = 30.0) -> bool:  # noqa: ARG002
        """Show no more."""
        self._show = None
        return True


class Fanout:
    """Tells several trackers. At most one of them may keep points: `pending` and `restore` do not tell them apart."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.figure(name, png, step)

    def event(self, name: str, text: str) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.event(name, text)

    def tag(self, name: str, text: str) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.tag(name, text)

    def pending(self) -> list[Any]:
        """Of the one that keeps points."""
        return [point for tracker in self._trackers for point in tracker.pending()]

    def restore(self, pending: Sequence[Any]) -> None:
        """To the one that keeps points; the others drop it."""
        for tracker in self._trackers:
            tracker.restore(pending)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait for all, `timeout_seconds` in all."""
        until = time.monotonic() + timeout_seconds
        done = [tracker.flush(max(0.0, until - time.monotonic())) for tracker in self._trackers]
        return all(done)

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """Close all, in `timeout_seconds` in all."""
        until = time.monotonic() + timeout_seconds
        done = [tracker.close(max(0.0, until - time.monotonic())) for tracker in self._trackers]
        return all(done)
