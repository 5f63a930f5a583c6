"""What probes have for MLflow and it has not taken: kept with the run, until somebody can tell it.

    <run>/untold/<name>.json      points with the time of their making, figures, and what happened

A probe writes it before anything else says that the checkpoint was judged, and deletes it once MLflow has all of it: a
probe that is killed in between loses nothing, and one that finds MLflow away need not wait for it. The next one tells
what is left, before its own, and so does the launch when training ends. Not beside the checkpoint, which may be
deleted meanwhile.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maskray.data.storage import Storage
from maskray.errors import StorageError
from maskray.tracking.base import Observer, Point, Tracker, points_of

log = logging.getLogger(__name__)

FOLDER = "untold"
_SUFFIX = ".json"
_AT_ONCE = 20


class Untold(Observer):
    """A tracker that only keeps what it is told, as plain data."""

    def __init__(self) -> None:
        super().__init__()
        self._points: list[Point] = []
        self._figures: list[tuple[str, int, str]] = []
        self._events: list[tuple[str, str]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Kept."""
        self._points += points_of(metrics, step)

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Kept."""
        self._figures.append((name, step, base64.b64encode(png).decode()))

    def event(self, name: str, text: str) -> None:
        """Kept."""
        self._events.append((name, text))

    def keep(self, run: Storage, name: str) -> None:
        """Write it into a run's folder, over what has the same name.

        Raises:
            StorageError: it cannot be written.
        """
        points = [point.plain() for point in self._points]
        content = {"points": points, "figures": self._figures, "events": self._events}
        run.write_bytes(_path(name), json.dumps(content).encode())


def names(run: Storage) -> list[str]:
    """Of what is kept, the oldest steps first, as names of checkpoints have it.

    Raises:
        StorageError: the folder cannot be read.
    """
    return [name.removesuffix(_SUFFIX) for name in run.list_names(FOLDER) if name.endswith(_SUFFIX)]


def tell(run: Storage, open_tracker: Callable[[], Tracker], timeout_seconds: float) -> bool:
    """Tell all that is kept, and delete what was taken; whether nothing is left. What was taken before is dropped.

    Args:
        run: its folder.
        open_tracker: called for a few of them at a time, since a tracker holds only so many figures.
        timeout_seconds: for these to be taken.

    Raises:
        StorageError: the folder cannot be read, or what was told not deleted.
    """
    kept = names(run)
    for start in range(0, len(kept), _AT_ONCE):
        if not _tell(run, kept[start : start + _AT_ONCE], open_tracker(), timeout_seconds):
            log.warning("What probes found is kept, to be told to MLflow later: %s", run.join(FOLDER))
            return False
    return True


def _tell(run: Storage, some: Sequence[str], tracker: Tracker, timeout_seconds: float) -> bool:
    found = {name: content for name in some if (content := _read(run, name)) is not None}
    tracker.restore([point for content in found.values() for point in content["points"]])
    for content in found.values():
        for name, step, png in content["figures"]:
            tracker.figure(name, base64.b64decode(png), step)
        for name, text in content["events"]:
            tracker.event(name, text)
    if not tracker.close(timeout_seconds):
        return False
    for name in found:
        run.delete(_path(name))
    return True


def _read(run: Storage, name: str) -> Any:
    """None where it cannot be used, or another has told it meanwhile."""
    try:
        found = json.loads(run.read_bytes(_path(name)))
        return {key: list(found[key]) for key in ("points", "figures", "events")}
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, StorageError):
            raise
        log.warning("%s cannot be read, and is left where it is: %r", run.join(_path(name)), error)
        return None


def _path(name: str) -> str:
    return f"{FOLDER}/{name}{_SUFFIX}"
