"""Where a process stands that makes no step: asked by a signal, answered on its standard error."""

from __future__ import annotations

import faulthandler
import signal

SIGNAL = signal.SIGUSR1
"""Neither Ray's workers nor torch use it. Without `write_on_signal` it ends a process."""
_STANDARD_ERROR = 2  # not `sys.stderr`: what stands there now may be another file, or none


def write_on_signal() -> None:
    """From now on `kill -USR1` has this process write where each of its threads stands, by lines of Python, and go on.

    It is written from C, within the signal: also while all threads wait in a collective, and with no right to trace
    processes, which other tools need.
    """
    faulthandler.register(SIGNAL, file=_STANDARD_ERROR, all_threads=True)
