"""What the workers of a sweep's trial run: as those of any run, and the first judges checkpoints by the way.

A module of its own: a worker need not import what the trial's process does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from maskray.config.schema import RunConfig
from maskray.config.sweep import SCORES
from maskray.data.storage import Storage
from maskray.on_ray import worker
from maskray.on_ray.context import RayContext
from maskray.tracking.base import Fanout, Observer
from maskray.training import checkpoint, folders
from maskray.training.context import Snapshot

if TYPE_CHECKING:  # what judges brings imports of seconds
    from maskray.evaluation.judgement import Finding

Judge = Callable[[RunConfig, Path], "Finding"]
"""What the checkpoint in a local folder is worth, and what its model paints."""
PICTURE = "painted.png"
"""Beside the files of a trial's last checkpoint: what its model paints, for MLflow."""
LINE = "logged.json"
"""Beside those of a checkpoint that is to be judged: what was logged at its step. Who was lost has forgotten it."""
_FLUSH_SECONDS = 10.0
_BEAT_SECONDS = 1.0


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """As `worker.run`; `judge` is a reference to what judges. Also what was found last: a board may be lost."""
    worker.tell_driver(settings["board"])
    config = RunConfig.model_validate(settings["config"])
    context = JudgingContext(config, settings)
    outcome = worker.train(config, context, Fanout(context.tracker, Observer(context.note)))
    return {**outcome, "found": context.found_last}


class JudgingContext(RayContext):
    """A `RayContext` whose first worker judges the checkpoints that the config names, and that of the last step.

    What it finds is left in a note beside the checkpoint, and told to MLflow and to the trial's process. Of the last
    one it also keeps what the model paints: beside the checkpoint, and in the trial's folder for the report.

    Args:
        config: of the trial.
        settings: of the worker.
    """

    def __init__(self, config: RunConfig, settings: dict[str, Any]) -> None:
        super().__init__(config.data, Storage(settings["run"]), None, beat=self._sign_of_life)
        self.tracker = worker.tracker_of(settings, config, self.rank)
        self._config, self._settings = config, settings
        self._line: tuple[int, dict[str, float]] = (0, {})
        self._beaten = 0.0
        self.found_last: dict[str, float] | None = None
        """At the last step, by the first worker."""

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """What training logged: told with what is found at the same step."""
        self._line = step, dict(metrics)

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """As there. What it is worth is told: nobody may have heard of it, and it may not even have been judged."""
        with super().latest_checkpoint() as folder:
            if folder is not None and self._is_judged(step := checkpoint.read_facts(folder).step):
                self._tell(step, _note(folder) or self._judge(step, folder, _line(folder)))
            yield folder

    def report(self, step: int, snapshot: Snapshot | None, *, probed: bool) -> float:  # noqa: ARG002
        """As there, and judge."""
        if not self._is_judged(step):
            return super().report(step, snapshot, probed=False)
        at, logged = self._line
        assert at == step, "a step that is judged is logged before"
        assert snapshot is not None, "the first worker's"
        waited = super().report(step, partial(_with_line, snapshot, logged), probed=False)
        with checkpoint.on_disk(self.newest_checkpoint()) as folder:
            metrics = self._judge(step, folder, logged)
        self._tell(step, metrics)
        return waited

    def _is_judged(self, step: int) -> bool:
        return self.rank == 0 and (step in self._config.training.probe_at or self._is_last(step))

    def _is_last(self, step: int) -> bool:
        return bool(step == self._settings["last_step"])

    def _judge(self, step: int, folder: Path, logged: Mapping[str, float]) -> dict[str, float]:
        """What the newest checkpoint is worth, and what was logged at its step."""
        # Fetched by the first worker alone, when it is needed.
        judge: Judge = ray.get(self._settings["judge"])
        found = judge(self._config, folder)
        scores = {} if found.scores is None else found.scores.metrics()
        metrics, weights = {**logged, **scores}, self.newest_checkpoint()
        if self._is_last(step):
            from maskray.sweeps import record  # here alone: it imports as much as what judges

            record.keep_painted(self._run, found.painted)
            weights.write_bytes(PICTURE, found.painted.figure(found.title))
        # The file that says that the checkpoint was judged goes last.
        weights.write_bytes(folders.PROBE, json.dumps({"metrics": metrics}, indent=1).encode())
        return metrics

    def _tell(self, step: int, metrics: Mapping[str, float]) -> None:
        """MLflow drops what it has: this may have been told before."""
        self.tracker.log({key: metrics[key] for key in SCORES if key in metrics}, step)
        if self._is_last(step):
            from maskray.evaluation.judgement import FIGURE

            self.found_last = dict(metrics)
            self.tracker.figure(FIGURE, self.newest_checkpoint().read_bytes(PICTURE), step)
        if not self.tracker.flush(_FLUSH_SECONDS):
            from maskray.tracking.mlflow_tracker import UNTOLD

            # A trial that is stopped here has no time to: the sweep's end tells it.
            self._run.write_bytes(UNTOLD, json.dumps(self.tracker.pending()).encode())
        # Waited for: what is ended now must not have judged in vain.
        ray.get(self._settings["board"].found.remote(step, dict(metrics)))

    def _sign_of_life(self) -> None:
        """A sign of life of this worker, whose stream is being made ready."""
        if (now := time.monotonic()) - self._beaten > _BEAT_SECONDS:
            self._beaten = now
            self._settings["board"].beat.remote()


def _with_line(snapshot: Snapshot, logged: Mapping[str, float], folder: Path) -> None:
    (folder / LINE).write_text(json.dumps(logged))
    snapshot(folder)


def _line(folder: Path) -> dict[str, float]:
    """What was logged at a checkpoint's step; nothing where an older maskray did not note it."""
    try:
        return dict(json.loads((folder / LINE).read_bytes()))
    except FileNotFoundError:
        return {}


def _note(folder: Path) -> dict[str, float] | None:
    """What was found of a checkpoint; None where it was not judged, or the note is torn."""
    try:
        return dict(json.loads((folder / folders.PROBE).read_bytes())["metrics"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
