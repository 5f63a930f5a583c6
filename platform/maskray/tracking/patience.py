"""Patience with MLflow: a server that is away, because it is started anew or moved, costs time and nobody's work.

What training tells waits in a tracker's spool (`mlflow_tracker.py`), and training goes on. All that must be told, or
asked, before anything else is done waits here.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from maskray.errors import AwayError
from maskray.tracking.mlflow_store import check_answers, is_away, reason, shown
from maskray.tracking.mlflow_tracker import MlflowTracker, pause_after

log = logging.getLogger(__name__)

AWAY_SECONDS = 600.0
"""MLflow may be away for so long at a stretch.

A server that is started anew, or moves to another node, is back within a few minutes; and a request that its end caught
may take MLflow's client four minutes more to notice, or six where nothing answers any more.
"""
TRY_SECONDS = 15.0
"""What a try is given at least, whatever patience is left."""
LONGEST_PAUSE = 5.0
_POLL_SECONDS = 0.2
T = TypeVar("T")


class Patience:
    """With an MLflow that may be away now and then; what was waited for one call is not waited again for the next.

    Args:
        uri: MLflow's tracking URI.
        seconds: it may be away for so long at a stretch; 0: everything is tried once.
        alive: called several times a second while it is waited for, in the thread that waits. What it raises ends that.
    """

    def __init__(self, uri: str, seconds: float = AWAY_SECONDS, alive: Callable[[], object] = lambda: None) -> None:
        self._uri, self._seconds, self._alive = uri, seconds, alive
        self._since: float | None = None
        """When what it has not answered yet was first asked, by `time.monotonic`."""
        self._has_said_so = False

    def call(self, act: Callable[[], T]) -> T:
        """What a call to MLflow returns. It is made in another thread, and again until MLflow has answered.

        Args:
            act: the call. It must not mind to be made twice: its answer may be lost, or come too late.

        Raises:
            AwayError: MLflow is away for too long.
            TrackingError: it refuses.
        """
        for attempt in itertools.count():
            start = self._asks()
            try:
                found = self._tried(act, start)
            except Exception as error:
                if not is_away(error):
                    self._has_answered()
                    raise
                if not self._may_wait():
                    raise self._no_answer(reason(error)) from error
                self._say(reason(error))
                self._pause(min(pause_after(attempt), LONGEST_PAUSE))
            else:
                self._has_answered()
                return found
        raise AssertionError("unreachable")

    def close(self, tracker: MlflowTracker) -> bool:
        """Close a tracker, once it has stored all that it was told; whether it has: MLflow may refuse.

        Raises:
            AwayError: MLflow is away for too long. What it was not told is the tracker's `pending`.
        """
        start = self._asks()
        try:
            while not tracker.flush(_POLL_SECONDS):
                if tracker.has_given_up:
                    break
                if not self._may_wait(start):
                    raise self._no_answer("metrics or figures are not taken")
                if time.monotonic() - start > TRY_SECONDS:
                    self._say("metrics or figures are not taken")
                self._alive()
            else:
                self._has_answered()
        finally:
            has_stored_all = tracker.close(0.0)
        return has_stored_all

    def _tried(self, act: Callable[[], T], start: float) -> T:
        """The answer to one try."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                check_answers(self._uri)
                future.set_result(act())
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                future.set_exception(error)

        # Nobody waits for it when the process ends: it may hang in a request.
        threading.Thread(target=run, name="maskray-patience", daemon=True).start()
        while not wait([future], _POLL_SECONDS).done:
            if not self._may_wait(start):
                raise self._no_answer("a request is not answered")
            if time.monotonic() - start > TRY_SECONDS:
                self._say("a request is not answered")
            self._alive()
        return future.result()

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
            self._alive()

    def _asks(self) -> float:
        """It is asked something: when, which is now."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return now

    def _may_wait(self, start: float = -math.inf) -> bool:
        """Whether there is patience left, or a try that began at `start` is young."""
        now = time.monotonic()
        return now - (now if self._since is None else self._since) < self._seconds or now - start < TRY_SECONDS

    def _has_answered(self) -> None:
        if self._has_said_so:
            log.warning("MLflow at %s is back", shown(self._uri))
        self._since, self._has_said_so = None, False

    def _say(self, why: str) -> None:
        """That it is waited for, once each time."""
        if not self._has_said_so:
            log.warning("Waiting for MLflow at %s, %g s at most: %s", shown(self._uri), self._seconds, why)
        self._has_said_so = True

    def _no_answer(self, why: str) -> AwayError:
        waited = time.monotonic() - (self._since or 0.0)
        return AwayError(
            "MLflow does not answer",
            key="tracking.uri",
            found=f"{shown(self._uri)} ({why}), after {waited:.0f} s",
            fix="see to it that it runs; with --resume the same command goes on where it stopped",
        )
