"""Progress on the terminal: one live line, or a plain line now and then where nobody watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LOSS, RATE = "pretrain/loss", "throughput/images_per_second"
PLAIN_SECONDS = 5.0
"""Between two plain lines: a log file of a day stays readable."""


class ProgressLine:
    """Step, loss, images/s and time left, on stderr. May be fed from any thread.

    Args:
        total_steps: where the line ends.
        file: written to instead of stderr.
    """

    def __init__(self, total_steps: int, file: TextIO | None = None) -> None:
        self._total = total_steps
        self._console = Console(file=file, stderr=file is None, highlight=False)
        self._lock = threading.Lock()
        self._first: tuple[int, float] | None = None
        self._said, self._last_line = float("-inf"), ""
        self._live: Progress | None = None
        self._task = TaskID(0)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the run after `step` steps. Metrics that have no place on the line are left out."""
        with self._lock:
            now = time.monotonic()
            if self._first is None:
                self._first = (step, now)
            words = self._words(step, metrics, now)
            if self._console.is_terminal:
                self._show_live(step, words)
                return
            self._last_line = f"step {step}/{self._total}  {words}"
            if now - self._said >= PLAIN_SECONDS:
                self._say(now)

    def close(self) -> None:
        """Leave the last state standing. May be called twice."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
            self._say(time.monotonic())

    def _words(self, step: int, metrics: Mapping[str, float], now: float) -> str:
        words = []
        if LOSS in metrics:
            words.append(f"loss {metrics[LOSS]:.4g}")
        if RATE in metrics:
            words.append(f"{metrics[RATE]:,.0f} images/s")
        assert self._first is not None
        first_step, start = self._first
        if step >= self._total:
            words.append("done")
        elif step > first_step:  # a resumed run has no rate before its second word
            words.append(f"{_clock((self._total - step) * (now - start) / (step - first_step))} left")
        return "  ".join(words)

    def _show_live(self, step: int, words: str) -> None:
        if self._live is None:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            self._live = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._live.add_task(words, total=self._total)
            self._live.start()
        self._live.update(self._task, completed=step, description=words)

    def _say(self, now: float) -> None:
        if self._last_line:
            self._console.print(self._last_line, soft_wrap=True)
            self._said, self._last_line = now, ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
