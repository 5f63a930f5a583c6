"""Trying again, where an object store says "later", or nothing at all."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How often and how long a request is tried: waits double from the first, each cut to a random share of itself."""

    tries: int = 20
    total_seconds: float = 120.0
    """No try begins later than this after the first."""
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 10.0

    def wait_seconds(self, failures: int) -> float:
        """Before the next try, after so many that failed: half of the doubled wait to all of it.

        The random part keeps a thousand readers that were throttled together from coming back together.
        """
        longest = min(self.first_wait_seconds * 2.0 ** (failures - 1), self.longest_wait_seconds)
        return longest * random.uniform(0.5, 1.0)


class Retries:
    """Counts what was tried again in this process, and for it by tasks. Thread-safe."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def add(self, number: int = 1) -> None:
        """So many more."""
        with self._lock:
            self._count += number

    @property
    def count(self) -> int:
        """So far."""
        return self._count


RETRIES = Retries()


def persistently(what: str, attempt: Callable[[], T], is_passing: Callable[[OSError], bool], patience: Patience) -> T:
    """The result of `attempt`, called again while it fails in a way that may pass. Each further try is a warning.

    Args:
        what: for the warning, e.g. "read s3://bucket/name".
        attempt: done anew from its start each time.
        is_passing: whether an error may go away by itself.
        patience: how often and how long.

    Raises:
        OSError: the last one, where it does not pass or patience has run out.
    """
    begun, failures = time.monotonic(), 0
    while True:
        try:
            return attempt()
        except OSError as error:
            failures += 1
            wait = patience.wait_seconds(failures)
            late = time.monotonic() + wait - begun > patience.total_seconds
            if not is_passing(error) or failures >= patience.tries or late:
                raise
            RETRIES.add()
            logger.warning("Cannot %s (%s): try %d of %d in %.1f s", what, error, failures + 1, patience.tries, wait)
            time.sleep(wait)
