"""What the workers of a sweep's trial run: as those of any run, and the first judges checkpoints by the way.

A module of its own: a worker need not import what the trial's process does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from maskray.on_ray import worker
from maskray.on_ray.context import RayContext
from maskray.tracking.base import Observer
from maskray.training import checkpoint, folders
from maskray.training.context import Snapshot

Judge = Callable[[RunConfig, Path], dict[str, float]]
"""What the checkpoint in a local folder is worth, by name."""


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """As `worker.run`; `judge` is a reference to what judges."""
    config = RunConfig.model_validate(settings["config"])
    # Fetched by the first worker alone, when it is needed: what judges brings imports of seconds.
    context = JudgingContext(config, Storage(settings["run"]), lambda: ray.get(settings["judge"]), settings["board"])
    return worker.train(settings, config, context, Observer(context.note))


class JudgingContext(RayContext):
    """A `RayContext` whose first worker judges the checkpoints that the config names, and leaves a note beside each.

    Args:
        config: of the trial.
        run: its folder.
        judge: gives what judges.
        board: where what is found is posted.
    """

    def __init__(self, config: RunConfig, run: Storage, judge: Callable[[], Judge], board: Any) -> None:
        super().__init__(config.data, run, on_ray=False)
        self._config, self._judge, self._board = config, judge, board
        self._line: tuple[int, dict[str, float]] = (0, {})

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """What training logged: told with what is found at the same step."""
        self._line = step, dict(metrics)

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """As there. What it is worth is told: nobody may have heard of it, and it may not even have been judged."""
        with super().latest_checkpoint() as folder:
            if folder is not None and self._is_judged(step := checkpoint.read_facts(folder).step):
                self._tell(step, _note(folder) or self._judge()(self._config, folder))
            yield folder

    def report(self, step: int, snapshot: Snapshot | None, *, probed: bool) -> float:  # noqa: ARG002
        """As there, and judge."""
        waited = super().report(step, snapshot, probed=False)
        if self._is_judged(step):
            weights, (at, logged) = self.newest_checkpoint(), self._line
            with checkpoint.on_disk(weights) as folder:
                found = self._judge()(self._config, folder)
            metrics = {**(logged if at == step else {}), **found}
            weights.write_bytes(folders.PROBE, json.dumps({"metrics": metrics}, indent=1).encode())
            self._tell(step, metrics)
        return waited

    def _is_judged(self, step: int) -> bool:
        return self.rank == 0 and step in self._config.training.probe_at

    def _tell(self, step: int, metrics: Mapping[str, float]) -> None:
        # Waited for: what is ended now must not have judged in vain.
        ray.get(self._board.found.remote(step, dict(metrics)))


def _note(folder: Path) -> dict[str, float] | None:
    """What was found of a checkpoint; None where it was not judged, or the note is torn."""
    try:
        return dict(json.loads((folder / folders.PROBE).read_bytes())["metrics"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
