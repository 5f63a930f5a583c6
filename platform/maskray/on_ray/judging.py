"""What the workers of a sweep's trial run: as those of any run, and the first judges checkpoints by the way.

A module of its own: a worker need not import what the trial's process does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from maskray.config.schema import RunConfig
from maskray.config.sweep import SCORES
from maskray.data.storage import Storage
from maskray.on_ray import worker
from maskray.on_ray.context import RayContext
from maskray.tracking.base import Fanout, Observer
from maskray.training import checkpoint, folders
from maskray.training.context import Snapshot

Judge = Callable[[RunConfig, Path], dict[str, float]]
"""What the checkpoint in a local folder is worth, by name."""
_FLUSH_SECONDS = 10.0
_BEAT_SECONDS = 1.0


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """As `worker.run`; `judge` is a reference to what judges."""
    worker.tell_driver(settings["board"])
    config = RunConfig.model_validate(settings["config"])
    context = JudgingContext(config, settings)
    return worker.train(config, context, Fanout(context.tracker, Observer(context.note)))


class JudgingContext(RayContext):
    """A `RayContext` whose first worker judges the checkpoints that the config names.

    What it finds is told to MLflow and to the trial's process, and left in a note beside the checkpoint.

    Args:
        config: of the trial.
        settings: of the worker.
    """

    def __init__(self, config: RunConfig, settings: dict[str, Any]) -> None:
        super().__init__(config.data, Storage(settings["run"]), on_ray=False, beat=self._sign_of_life)
        self.tracker = worker.tracker_of(settings, config, self.rank)
        self._config, self._settings = config, settings
        self._line: tuple[int, dict[str, float]] = (0, {})
        self._beaten = 0.0

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """What training logged: told with what is found at the same step."""
        self._line = step, dict(metrics)

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """As there. What it is worth is told: nobody may have heard of it, and it may not even have been judged."""
        with super().latest_checkpoint() as folder:
            if folder is not None and self._is_judged(step := checkpoint.read_facts(folder).step):
                metrics = _note(folder) or self._judge(folder)
                self._tell(step, metrics, [key for key in SCORES if key in metrics])
            yield folder

    def report(self, step: int, snapshot: Snapshot | None, *, probed: bool) -> float:  # noqa: ARG002
        """As there, and judge."""
        waited = super().report(step, snapshot, probed=False)
        if self._is_judged(step):
            weights, (at, logged) = self.newest_checkpoint(), self._line
            with checkpoint.on_disk(weights) as folder:
                found = self._judge(folder)
            metrics = {**(logged if at == step else {}), **found}
            weights.write_bytes(folders.PROBE, json.dumps({"metrics": metrics}, indent=1).encode())
            self._tell(step, metrics, found)
        return waited

    def _is_judged(self, step: int) -> bool:
        return self.rank == 0 and step in self._config.training.probe_at

    def _judge(self, folder: Path) -> dict[str, float]:
        # Fetched by the first worker alone, when it is needed: what judges brings imports of seconds.
        judge: Judge = ray.get(self._settings["judge"])
        return judge(self._config, folder)

    def _tell(self, step: int, metrics: Mapping[str, float], found: Iterable[str]) -> None:
        self.tracker.log({key: metrics[key] for key in found}, step)
        self.tracker.flush(_FLUSH_SECONDS)  # a trial that is stopped here has no time to
        # Waited for: what is ended now must not have judged in vain.
        ray.get(self._settings["board"].found.remote(step, dict(metrics)))

    def _sign_of_life(self) -> None:
        """A sign of life of this worker, whose stream is being made ready."""
        if (now := time.monotonic()) - self._beaten > _BEAT_SECONDS:
            self._beaten = now
            self._settings["board"].beat.remote()


def _note(folder: Path) -> dict[str, float] | None:
    """What was found of a checkpoint; None where it was not judged, or the note is torn."""
    try:
        return dict(json.loads((folder / folders.PROBE).read_bytes())["metrics"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
