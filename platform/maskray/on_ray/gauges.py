"""What Prometheus reads of a run: gauges of Ray's, on the metrics port of the node where the run's board is.

Ray exports a gauge once each time that it is set, and drops it when it was not set again for two of its intervals
(20 s). So a thread sets all of them again, from the last values, for as long as the run lives: between log steps that
are minutes apart, and while the workers hang or are started again, which is when somebody looks. When the run has been
trained they go, and with them what would raise alarms. Even totals are gauges: Ray keeps a counter of a process that
has ended for as long as the cluster runs.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import ray
from ray.util.metrics import Gauge

log = logging.getLogger(__name__)

STEP, RESTARTS, VIEWS, PROBE = (
    "maskray_step",
    "maskray_restarts_total",
    "maskray_views_without_image_total",
    "maskray_probe_accuracy",
)
OF = {
    "pretrain/loss": "maskray_loss",
    "throughput/images_per_second": "maskray_images_per_second",
    "throughput/mfu": "maskray_mfu",
    "throughput/data_wait_fraction": "maskray_data_wait_fraction",
    "throughput/checkpoint_wait_seconds": "maskray_checkpoint_wait_seconds",
}
"""Which gauge shows which metric."""
_VIEWS, _PROBE = "throughput/views_without_image", "probe/"
_LEAST_INTERVAL_SECONDS = 1.0  # of Ray's, whatever is configured


class Totals(NamedTuple):
    """What is shown of a run, as plain data."""

    values: dict[tuple[str, str], float]
    """By gauge, and by what of the probe it shows."""
    counted: int
    """The step up to which views are counted."""
    starts: int


class Gauges:
    """Of one run, in a process of Ray's. What is told to it takes no time and never raises.

    Args:
        run: its name.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._values = dict[tuple[str, str], float]()
        """By gauge, and by what of the probe it shows."""
        self._counted, self._starts = 0, 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._repeat, name="maskray-gauges", daemon=True).start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """What training logged after `step` steps. Of those that are trained again nothing is counted again."""
        with self._lock:
            self._set(STEP, step)
            if _VIEWS in metrics and step > self._counted:
                self._set(VIEWS, self._values.get((VIEWS, ""), 0.0) + metrics[_VIEWS])
                self._counted = step
            for key, gauge in OF.items():
                if key in metrics:
                    self._set(gauge, metrics[key])
        self.probed(metrics)

    def probed(self, metrics: Mapping[str, float]) -> None:
        """What a probe found."""
        with self._lock:
            for key, value in metrics.items():
                if key.startswith(_PROBE):
                    self._set(PROBE, value, key.removeprefix(_PROBE))

    def started(self) -> None:
        """The workers were started; all times but the first, started again."""
        with self._lock:
            self._set(RESTARTS, self._starts)
            self._values.setdefault((STEP, ""), 0.0)  # one that never makes a step stands still, too
            self._starts += 1

    def totals(self) -> Totals:
        """All that is shown now."""
        with self._lock:
            return Totals(dict(self._values), self._counted, self._starts)

    def take_up(self, before: Totals) -> None:
        """Go on from what another process has shown of the run, which was lost; something may be new already."""
        with self._lock:
            self._starts += before.starts
            views = self._values.get((VIEWS, ""), 0.0) + before.values.get((VIEWS, ""), 0.0)
            self._values = {**before.values, **self._values}
            self._counted = max(self._counted, before.counted)
            if (VIEWS, "") in self._values:
                self._set(VIEWS, views)
            if self._starts:
                self._set(RESTARTS, self._starts - 1)

    def close(self) -> None:
        """They are gone after two of Ray's intervals."""
        self._closed.set()

    def _set(self, gauge: str, value: float, metric: str = "") -> None:
        if math.isfinite(value):
            self._values[gauge, metric] = float(value)

    def _repeat(self) -> None:
        try:
            while not self._closed.wait(_interval_seconds() / 2):
                with self._lock:
                    values = dict(self._values)
                for (gauge, metric), value in values.items():
                    _gauge(gauge).set(value, {"run": self._run, **({"metric": metric} if metric else {})})
        except Exception:  # Ray may be going; whatever it is, nobody waits for this thread
            log.warning("The run's figures no longer reach Prometheus", exc_info=True)


def _interval_seconds() -> float:
    """Between two exports."""
    return max(float(ray._config.metrics_report_interval_ms()) / 1000, _LEAST_INTERVAL_SECONDS)


@cache
def _gauge(name: str) -> Gauge:
    """One in each process: runs share it, and differ by tag."""
    return Gauge(name, "See maskray/on_ray/gauges.py", tag_keys=("run", "metric") if name == PROBE else ("run",))
