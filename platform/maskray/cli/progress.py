"""How far a command is."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 5.0


class Bar:
    """How far a command is: a live bar a phase, or a plain line now and then where nobody watches.

    Args:
        unit: what is counted, but in the phase `verify`, where it is shards.
    """

    def __init__(self, unit: str = "images") -> None:
        self._unit = unit
        self._console = Console(stderr=True, highlight=False)
        counted = TextColumn("{task.fields[unit]}  {task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), counted, TimeRemainingColumn())
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._began: tuple[int, float] = (0, 0.0)
        self._said = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, done: int, total: int, phase: str) -> None:
        """What was done before the first word of a phase has no part in its rate."""
        now, unit = time.monotonic(), "shards" if phase == "verify" else self._unit
        if phase not in self._tasks:
            self._began, self._said = (done, now), now
            self._tasks[phase] = self._live.add_task(phase, total=total, completed=done, unit=unit, rate="")
        first, start = self._began
        rate = f"{(done - first) / (now - start):,.0f} {unit}/s" if done > first else ""
        self._live.update(self._tasks[phase], completed=done, rate=rate)
        if self._live.disable and (now - self._said >= PLAIN_SECONDS or (done == total and done > first)):
            self._said = now
            self._console.print(f"{phase}: {done:,} of {total:,} {unit}  {rate}".rstrip(), soft_wrap=True)
