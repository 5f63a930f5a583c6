"""One launch at a time: a file in the run's folder that says who has it, renewed while it runs.

A launch that was killed leaves its lease behind. It counts for nothing once its heartbeat is two minutes old, or at
once where its process was on this machine and is gone. A launch that was taken for dead, because its machine slept, and
finds its lease in other hands stops itself.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from maskray.data.storage import Storage
from maskray.errors import RunConflictError, StorageError

log = logging.getLogger(__name__)

LEASE = "lease.json"
STALE_SECONDS = 120.0
BEAT_SECONDS = 20.0
SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """Who has a run."""

    token: str
    host: str
    pid: int
    process_started: float
    """Start of the process, in seconds since 1970: a number of a process is used again, with another start."""
    heartbeat: float
    pid_namespace: str = ""
    """Where the number means this process: containers may share a host name and not their processes."""

    @classmethod
    def this_process(cls) -> Holder:
        """A new holder: this process."""
        started = psutil.Process().create_time()
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), started, time.time(), _pid_namespace())

    def is_alive(self) -> bool:
        """Whether the holder may still be running."""
        if (self.host, self.pid_namespace) == (socket.gethostname(), _pid_namespace()):
            try:
                process = psutil.Process(self.pid)
                # In a container without an init nobody collects the dead: they stay listed for ever.
                running = process.status() != psutil.STATUS_ZOMBIE
                return bool(running and abs(process.create_time() - self.process_started) < 1)
            except psutil.NoSuchProcess:
                return False
        return time.time() - self.heartbeat < STALE_SECONDS


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux
        return ""


class Lease:
    """A held lease."""

    def __init__(self) -> None:
        self.lost_to: Holder | None = None
        """Who has taken the run over: what it holds, its MLflow run too, is theirs now."""


def holder_of(run: Storage) -> Holder | None:
    """Who has the run, alive or not; None where nobody does."""
    try:
        return Holder(**json.loads(run.read_bytes(LEASE)))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return None


def refuse_if_held(run: Storage, name: str) -> None:
    """A look that changes nothing.

    Raises:
        RunConflictError: a living holder has the run.
    """
    other = holder_of(run)
    if other is not None and other.is_alive():
        age = max(0.0, time.time() - other.heartbeat)
        raise RunConflictError(
            f"the run {name} is running already",
            key="name",
            found=f"process {other.pid} on {other.host}, last heard of {age:.0f} s ago",
            fix="wait for it, stop it, or give this run another name or seed",
        )


@contextmanager
def hold(run: Storage, name: str) -> Iterator[Lease]:
    """Hold a run's lease, with a heartbeat from a thread. Where it is lost, the process gets a SIGTERM.

    Raises:
        RunConflictError: somebody else has it, or has taken it over.
    """
    me, held = Holder.this_process(), Lease()
    _take(run, name, me)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(run, me, held, stop), name="maskray-lease", daemon=True)
    beat.start()
    try:
        yield held
    except BaseException as error:
        if held.lost_to is None:
            raise
        raise RunConflictError(
            f"the run {name} was taken over by another launch, which took this one for dead",
            key="name",
            found=f"process {held.lost_to.pid} on {held.lost_to.host}",
            fix="leave the run to that launch, or stop it there; a machine that sleeps for two minutes loses its runs",
        ) from error
    finally:
        stop.set()
        beat.join()
        try:
            found = holder_of(run)
            if found is not None and found.token == me.token:
                run.delete(LEASE)
        except StorageError:  # it grows old by itself; what ended the run is what the user must hear of
            log.warning("The lease could not be given back", exc_info=True)


def _take(run: Storage, name: str, me: Holder) -> None:
    content = json.dumps(asdict(me)).encode()
    if run.create_exclusive(LEASE, content):
        if run.is_local:
            return
    else:
        refuse_if_held(run, name)
        log.warning("Taking over the run %s: its last launch ended without a word", name)
        run.write_bytes(LEASE, content)  # over the old one: were it deleted first, a third launch could slip in
    # Several may take over in the same moment, or create in an object store without conditional writes: the last to
    # write has it, and all look again.
    time.sleep(SETTLE_SECONDS)
    found = holder_of(run)
    if found is None or found.token != me.token:
        raise RunConflictError(f"the run {name} is being started by somebody else", fix="wait for it")


def _beat(run: Storage, me: Holder, held: Lease, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        try:
            found = holder_of(run)
            if found is not None and found.token != me.token:
                held.lost_to = found
                # To the main thread, whatever it waits for. Two launches of a run would write over each other.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return
            renewed = replace(me, heartbeat=time.time())
            run.write_bytes(LEASE, json.dumps(asdict(renewed)).encode())
        except StorageError:
            log.warning("The lease could not be renewed; trying again", exc_info=True)
