"""A call in a thread of its own that nobody waits for when the process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def call(name: str, function: Callable[[], T]) -> Future[T]:
    """Start a call; its future.

    The thread is a daemon, which those of an executor are not: a call into Ray may never come back once the other side
    is gone, and the process must be able to end all the same.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
