"""MLflow from rank 0: a thread that stores what the training loop tells, in order, each point once.

The loop only ever appends to a spool. Points are sent in batches with the time of their making, so a batch that is sent
again, because its answer was lost, changes nothing: MLflow drops rows that it has. What a killed process had stored is
asked for at the start, and not stored again.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from maskray.tracking.base import Point, points_of
from maskray.tracking.mlflow_runs import FIGURES, add_note
from maskray.tracking.mlflow_store import HOPELESS, check_answers, shown

log = logging.getLogger(__name__)

SYSTEM_PREFIX = "system/"
SERIES = "images"
"""Folder of the image series among the run's artifacts: MLflow's own."""
MAX_BATCH = 1000
MAX_POINTS = 100_000
"""Points held while the server is away: days of a run. Then the oldest go."""
MAX_EXTRAS = 100
"""Figures, events and tags held while the server is away. Then the oldest go."""
MAX_ATTEMPTS = 5
"""At a figure, event or tag that the server answers with an error. Points are tried for as long as the run lives."""
LINGER_SECONDS = 0.5
"""Points are gathered for so long before a batch is sent."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
UNTOLD = "untold.json"
"""Name for a file with what a tracker had not stored at its end: `pending`, which another takes up by `restore`."""


@dataclass
class _Extra:
    """A figure, an event or a tag."""

    what: str
    send: Callable[[], None]
    attempts: int = 0


class MlflowTracker:
    """Stores into a run that the driver made (`mlflow_runs.ensure_run`). Only `flush` and `close` wait.

    Args:
        uri: MLflow's tracking URI.
        run_id: of the run.
        system_metrics_seconds: how often CPU, memory, disk, network and GPU of this machine are noted; None: never.
    """

    def __init__(self, uri: str, run_id: str, *, system_metrics_seconds: float | None = None) -> None:
        self._uri, self._shown_uri, self._run_id = uri, shown(uri), run_id
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._system_seconds = system_metrics_seconds
        self._changed = threading.Condition()
        self._points: deque[Point] = deque()
        self._sending: list[Point] = []
        self._extras: deque[_Extra] = deque()
        self._stored_steps: dict[str, int] | None = None
        self._stored_figures: set[tuple[str, int]] | None = None
        self._hurry = self._closed = self._given_up = False
        self._dropped = 0
        self._not_finite: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="maskray-mlflow", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------- what the training loop calls

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        try:
            points = points_of(metrics, step)
        except (TypeError, ValueError):
            log.exception("These metrics of step %d are no numbers: %s", step, metrics)
            return
        self._append(points)
        self._note_not_finite(metrics.keys() - {point.key for point in points}, step)

    def figure(self, name: str, png: bytes, step: int) -> None:
        """See `Tracker`."""
        made = time.time_ns() // 1_000_000
        self._append_extra(_Extra(f"figure {name} of step {step}", lambda: self._send_figure(name, png, step, made)))

    def event(self, name: str, text: str) -> None:
        """See `Tracker`. It is added to the run's description."""
        self._append_extra(_Extra(f"event {name}", lambda: add_note(self._client, self._run_id, name, text)))

    def tag(self, name: str, text: str) -> None:
        """See `Tracker`."""
        self._append_extra(_Extra(f"tag {name}", lambda: self._client.set_tag(self._run_id, name, text)))

    def pending(self) -> list[Any]:
        """See `Tracker`."""
        with self._changed:
            points = [*self._sending, *self._points]
        return [p.plain() for p in points if not p.key.startswith(SYSTEM_PREFIX)]

    def restore(self, pending: Sequence[Any]) -> None:
        """See `Tracker`."""
        with self._changed:
            self._points.extendleft(reversed([Point.from_plain(plain) for plain in pending]))
            self._changed.notify_all()

    def flush(self, timeout_seconds: float) -> bool:
        """See `Tracker`."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._is_empty() or self._given_up, timeout_seconds)
            self._hurry = False
            return done and self._is_empty()

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """See `Tracker`."""
        stored = self.flush(timeout_seconds)
        with self._changed:
            self._closed = True
            lost = len(self._sending) + len(self._points)
            extras = [extra.what for extra in self._extras]
            self._changed.notify_all()
        if not stored:
            log.error(
                "MLflow at %s did not take %d points, and %s", self._shown_uri, lost, ", ".join(extras) or "no figures"
            )
        self._thread.join(timeout=1.0)  # it may be in a request: it ends by itself, and is no reason to wait
        return stored and self._dropped == 0

    @property
    def has_given_up(self) -> bool:
        """Whether nothing more will be stored: it was refused for good, or the tracker is closed."""
        return self._given_up

    def _append(self, points: Sequence[Point]) -> None:
        with self._changed:
            if self._closed:
                return
            self._points.extend(points)
            while len(self._points) > MAX_POINTS:
                self._points.popleft()
                self._dropped += 1
            self._changed.notify_all()

    def _append_extra(self, extra: _Extra) -> None:
        with self._changed:
            if self._closed:
                return
            self._extras.append(extra)
            if len(self._extras) > MAX_EXTRAS:
                log.error("MLflow is away for too long; dropped: %s", self._extras.popleft().what)
            self._changed.notify_all()

    def _note_not_finite(self, keys: Set[str], step: int) -> None:
        for key in sorted(keys - self._not_finite):
            self.event("not_finite", f"{key} at step {step}; such values make a gap in its curve")
        self._not_finite |= keys

    def _is_empty(self) -> bool:
        return not (self._points or self._sending or self._extras)

    # ------------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._work()
        except Exception:  # noqa: BLE001 - as `log.exception`, whose words may have a password
            trace = shown(traceback.format_exc())
            log.error("The thread that writes to MLflow ended; the run goes on without it\n%s", trace)
        finally:
            with self._changed:
                self._given_up = True
                self._changed.notify_all()

    def _work(self) -> None:
        if not self._patiently("its history", self._ask_what_is_stored):
            return
        gauges = _Gauges(self._uri, self._system_seconds, self._next_system_step())
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._is_empty(), gauges.wait())
                if self._closed:
                    return
                if not self._hurry:
                    self._changed.wait_for(lambda: self._closed or self._hurry, LINGER_SECONDS)
            self._append(gauges.read())
            if not self._patiently("points", self._send_points):
                return
            self._send_extras()

    def _patiently(self, what: str, act: Callable[[], None]) -> bool:
        """Try until it works; False where the tracker was closed meanwhile, or it never can work."""
        for attempt in itertools.count():
            try:
                check_answers(self._uri)
                act()
            except Exception as error:  # noqa: BLE001 - said in words: a traceback would repeat the URI's password
                text = shown(str(error))
                if getattr(error, "error_code", None) in HOPELESS:
                    log.error("MLflow refuses %s of run %s for good: %s", what, self._run_id, text)
                    return False
                if attempt == 0:
                    log.warning("MLflow at %s does not take %s, trying again: %s", self._shown_uri, what, text)
            else:
                if attempt:
                    log.warning("MLflow at %s is back", self._shown_uri)
                return True
            if self._pauses(pause_after(attempt)):
                return False
        raise AssertionError("unreachable")

    def _pauses(self, seconds: float) -> bool:
        """Wait before another try, shortly where somebody waits for it; whether the tracker was closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._hurry, seconds)
            if self._hurry:
                self._changed.wait_for(lambda: self._closed, FIRST_PAUSE)
            return self._closed

    def _ask_what_is_stored(self) -> None:
        latest = self._client.get_run(self._run_id).data._metric_objs  # the last point of each key: no history is read
        with self._changed:
            self._stored_steps = {metric.key: metric.step for metric in latest}
            self._changed.notify_all()

    def _next_system_step(self) -> int:
        stored = self._stored_steps or {}
        return max((step for key, step in stored.items() if key.startswith(SYSTEM_PREFIX)), default=-1) + 1

    def _send_points(self) -> None:
        while True:
            with self._changed:
                while self._points and len(self._sending) < MAX_BATCH:
                    self._sending.append(self._points.popleft())
                batch = list(self._sending)
            stored = self._stored_steps or {}
            new = [Metric(*point) for point in batch if point.step > stored.get(point.key, -1)]
            if new:
                self._client.log_batch(self._run_id, metrics=new)
            with self._changed:
                self._sending.clear()
                self._changed.notify_all()
                if not self._points or self._closed:
                    return

    def _send_extras(self) -> None:
        while True:
            with self._changed:
                if not self._extras or self._closed:
                    return
                extra = self._extras[0]
            try:
                check_answers(self._uri)
                extra.send()
            except Exception as error:  # noqa: BLE001 - as above
                extra.attempts += 1
                if extra.attempts < MAX_ATTEMPTS:
                    self._pauses(FIRST_PAUSE)
                    return  # points first, then again
                why = shown(str(error))
                log.error("MLflow at %s does not take the %s; given up: %s", self._shown_uri, extra.what, why)
                self._dropped += 1
            with self._changed:
                if self._extras and self._extras[0] is extra:
                    self._extras.popleft()
                self._changed.notify_all()

    def _send_figure(self, name: str, png: bytes, step: int, made: int) -> None:
        """Twice: as a series with a slider over the steps, small until clicked, and as a plain file in full size."""
        if self._stored_figures is None:
            images = self._client.list_artifacts(self._run_id, SERIES)
            self._stored_figures = {found for image in images if (found := _figure_of(image.path))}
        if (name, step) in self._stored_figures:
            return
        with tempfile.TemporaryDirectory(prefix="maskray-") as folder:
            room, _, leaf = f"{FIGURES}/{name}".rpartition("/")
            file = Path(folder) / f"{leaf}-step-{step:06d}.png"
            file.write_bytes(png)
            self._client.log_artifact(self._run_id, str(file), room)
            self._client.log_image(self._run_id, mlflow.Image(str(file)), key=name, step=step, timestamp=made)
        self._stored_figures.add((name, step))


def pause_after(attempt: int) -> float:
    """Seconds before the next try: doubled each time, up to a bound, for days if need be."""
    return min(FIRST_PAUSE * 2.0 ** min(attempt, 16), LONGEST_PAUSE)


def _figure_of(path: str) -> tuple[str, int] | None:
    """Name and step of a figure that MLflow has whole: it writes the small copy last."""
    name, _, rest = path.rpartition("/")[2].partition("+step+")
    return (name.replace("~", "/"), int(rest.partition("+")[0])) if path.endswith("+compressed.webp") else None


class _Gauges:
    """CPU, memory, disk, network and GPU of this machine, by MLflow's own monitors. If they fail, there are none."""

    def __init__(self, uri: str, seconds: float | None, first_step: int) -> None:
        self._seconds, self._step, self._next = seconds, first_step, time.monotonic()
        # It says at each start that there is no GPU.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        if seconds is not None:
            # Never started: only its readings are used. The first is left out, whose CPU use is always 0.
            self._monitor = SystemMetricsMonitor(run_id="", tracking_uri=uri)
            self.read()
            self._step = first_step

    def wait(self) -> float | None:
        """Seconds until the next reading; None where there is none."""
        return None if self._seconds is None else max(0.0, self._next - time.monotonic())

    def read(self) -> list[Point]:
        """A reading, where it is time for one."""
        if self._seconds is None or self.wait():
            return []
        self._next = time.monotonic() + self._seconds
        try:
            self._monitor.collect_metrics()
            metrics = {SYSTEM_PREFIX + key: value for key, value in self._monitor.aggregate_metrics().items()}
            for monitor in self._monitor.monitors:
                monitor.clear_metrics()
        except Exception:
            log.exception("CPU, memory and GPU can no longer be read; the run goes on without")
            self._seconds = None
            return []
        self._step += 1
        return points_of(metrics, self._step - 1)
