"""What each of Ray Train's workers runs. A module of its own: a worker need not import what the driver does.

What takes seconds to import is imported by the functions that need it: the stream's splitter takes as long to start,
and starts before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import ray

from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from maskray.errors import BadStepError
from maskray.on_ray import stream
from maskray.tracking.base import Fanout, Observer, Tracker
from maskray.training import stacks

if TYPE_CHECKING:
    from maskray.on_ray.context import RayContext

_BOARD_SECONDS = 5.0


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Pretrain; the return value is the driver's to read."""
    tell_driver(settings["board"])
    config = RunConfig.model_validate(settings["config"])
    spec = settings["stream"]
    share = None if spec is None else stream.Share.of_worker(spec, config.data)
    from maskray.on_ray.context import RayContext

    context = RayContext(config.data, Storage(settings["run"]), share)
    return train(config, context, tracker_of(settings, config, context.rank))


def train(config: RunConfig, context: RayContext, tracker: Tracker) -> dict[str, Any]:
    """As `run`, in a context; the tracker is closed."""
    from maskray.pretrain import pretrain

    stored = False
    try:
        pretrain(config, context, tracker)
    except BadStepError as error:
        # All workers see it, and it would come again: returned, not raised, so that Train does not try again.
        return {"bad_step": error.plain()}
    finally:
        stored = tracker.close()
    return {"stored": stored}


def tracker_of(settings: dict[str, Any], config: RunConfig, rank: int) -> Tracker:
    """MLflow, and the board. Only the first worker has them, and pays for the import of MLflow."""
    if rank != 0:
        return Observer()
    from maskray.tracking.mlflow_tracker import MlflowTracker

    seconds = config.tracking.system_metrics_seconds
    stored = MlflowTracker(settings["tracking_uri"].text, settings["run_id"], system_metrics_seconds=seconds)
    board = settings["board"]
    board.started.remote()
    return Fanout(stored, Observer(lambda step, metrics: board.post.remote(step, dict(metrics))))


def tell_driver(board: Any) -> None:
    """Post this process's warnings of maskray's own to the board: Ray's log, and its noise, are not shown.

    Where it stands, when it is asked by `stacks.SIGNAL`, is in Ray's log.
    """
    stacks.write_on_signal()
    logging.getLogger("maskray").addHandler(_ToBoard(board))


class _ToBoard(logging.Handler):
    def __init__(self, board: Any) -> None:
        super().__init__(logging.WARNING)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        try:
            kind = f"{record.name}:{record.lineno}"  # who says it with other numbers, says one thing
            # Waited for: the last warnings come just before a worker ends.
            ray.get(self._board.warn.remote(record.getMessage(), kind), timeout=_BOARD_SECONDS)
        except Exception:  # noqa: BLE001 - as every handler: what cannot be shown must not end a run
            self.handleError(record)
