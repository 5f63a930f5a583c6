"""One launch at a time: a file in the folder of a run, or of a dataset, that says who has it, renewed while it runs.

A launch that was killed leaves its lease behind. It counts for nothing once its heartbeat is two minutes old, or at
once where its process was on this machine and is gone. Clocks of two machines may differ, and may be set: a heartbeat
that looks old is watched for a while before it is believed. A launch that was taken for dead, because its machine
slept, and finds its lease in other hands stops itself.
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
from typing import NamedTuple

import psutil

from maskray.data.storage import Storage
from maskray.errors import RunConflictError, StorageError

log = logging.getLogger(__name__)

LEASE = "lease.json"
STALE_SECONDS = 120.0
BEAT_SECONDS = 20.0
WATCH_SECONDS = 25.0
SETTLE_SECONDS = 0.5


class Kind(NamedTuple):
    """What is held, in the words of errors."""

    noun: str
    key: str
    """That they name."""
    fix: str


RUN = Kind("the run", "name", "wait for it, stop it, or give this run another name or seed")
EVALUATION = Kind("the evaluation", "name", "wait for it, or stop it")
INGEST = Kind("the ingest into", "destination", "wait for it, or stop it")


@dataclass(frozen=True)
class Holder:
    """Who has a place."""

    token: str
    host: str
    pid: int
    process_started: float
    """Start of the process, in seconds after the machine's: a number of a process is used again, with another start."""
    heartbeat: float
    """In seconds since 1970, by the holder's clock."""
    pid_namespace: str = ""
    """Where the number means this process: containers may share a host name and not their processes, and so may two
    machines; and a machine that was started anew has others."""

    @classmethod
    def this_process(cls) -> Holder:
        """A new holder: this process."""
        started = _started_after_boot(psutil.Process())
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), started, time.time(), _pid_namespace())

    def words(self) -> str:
        """Who it is, and when it was last heard of."""
        age = max(0.0, time.time() - self.heartbeat)
        return f"process {self.pid} on {self.host}, last heard of {age:.0f} s ago"

    def is_alive(self) -> bool:
        """Whether the holder may still be running, as far as can be said at once."""
        if self._is_here():
            try:
                process = psutil.Process(self.pid)
                # In a container without an init nobody collects the dead: they stay listed for ever.
                running = process.status() != psutil.STATUS_ZOMBIE
                return bool(running and abs(_started_after_boot(process) - self.process_started) < 1)
            except psutil.NoSuchProcess:
                return False
        return abs(time.time() - self.heartbeat) < STALE_SECONDS

    def is_alive_at(self, place: Storage) -> bool:
        """As `is_alive`, but sure of it: a heartbeat of another machine that looks old is seen not to move."""
        if self.is_alive() or self._is_here():
            return self.is_alive()
        until = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < until:
            time.sleep(WATCH_SECONDS / 10)
            now = holder_of(place)
            if now is None or now.token != self.token:
                return False
            if now.heartbeat != self.heartbeat:
                return True
        return False

    def _is_here(self) -> bool:
        return (self.host, self.pid_namespace) == (socket.gethostname(), _pid_namespace())


def _started_after_boot(process: psutil.Process) -> float:
    """Not in seconds since 1970: psutil makes those from the clock as it is now, and it may have been set."""
    return float(process.create_time() - psutil.boot_time())


def _pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return ""


class Lease:
    """A held lease."""

    def __init__(self) -> None:
        self.lost_to: Holder | None = None
        """Who has taken the run over: what it holds, its MLflow run too, is theirs now."""


def holder_of(place: Storage) -> Holder | None:
    """Who has a place, alive or not; None where nobody does."""
    try:
        return Holder(**json.loads(place.read_bytes(LEASE)))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return None


def refuse_if_held(place: Storage, name: str, kind: Kind = RUN, *, at_once: bool = True) -> None:
    """A look that changes nothing; `at_once`: without watching another machine's heartbeat for a while.

    Raises:
        RunConflictError: a living holder has it.
    """
    other = holder_of(place)
    if other is not None and (other.is_alive() if at_once else other.is_alive_at(place)):
        raise _held(other, name, kind)


def _held(other: Holder, name: str, kind: Kind) -> RunConflictError:
    return RunConflictError(
        f"{kind.noun} {name} is running already",
        key=kind.key,
        found=other.words(),
        fix=kind.fix,
    )


@contextmanager
def hold(place: Storage, name: str, kind: Kind = RUN) -> Iterator[Lease]:
    """Hold the lease of a place, with a heartbeat from a thread. Where it is lost, the process gets a SIGTERM.

    Raises:
        RunConflictError: somebody else has it, or has taken it over.
    """
    me, held = Holder.this_process(), Lease()
    _take(place, name, kind, me)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(place, me, held, stop), name="maskray-lease", daemon=True)
    beat.start()
    try:
        yield held
    except BaseException as error:
        if held.lost_to is None:
            raise
        raise RunConflictError(
            f"{kind.noun} {name} was taken over by another launch, which took this one for dead",
            key=kind.key,
            found=f"process {held.lost_to.pid} on {held.lost_to.host}",
            fix="leave it to that launch, or stop it there; a machine that sleeps for two minutes loses what it runs",
        ) from error
    finally:
        stop.set()
        beat.join()
        try:
            found = holder_of(place)
            if found is not None and found.token == me.token:
                place.delete(LEASE)
        except StorageError:  # it grows old by itself; what ended the run is what the user must hear of
            log.warning("The lease could not be given back", exc_info=True)


def _take(place: Storage, name: str, kind: Kind, me: Holder) -> None:
    content = json.dumps(asdict(me)).encode()
    if place.create_exclusive(LEASE, content):
        if place.is_local:
            return
    else:
        other = holder_of(place)
        if other is not None and other.is_alive_at(place):
            raise _held(other, name, kind)
        log.warning("Taking over %s %s: its last launch ended without a word", kind.noun, name)
        place.write_bytes(LEASE, content)  # over the old one: were it deleted first, a third launch could slip in
    # Several may take over in the same moment, or create in an object store without conditional writes: the last to
    # write has it, and all look again.
    time.sleep(SETTLE_SECONDS)
    found = holder_of(place)
    if found is None or found.token != me.token:
        raise RunConflictError(f"{kind.noun} {name} is being started by somebody else", fix="wait for it")


def _beat(place: Storage, me: Holder, held: Lease, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        try:
            found = holder_of(place)
            if found is not None and found.token != me.token:
                held.lost_to = found
                # To the main thread, whatever it waits for. Two launches of a run would write over each other.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return
            renewed = replace(me, heartbeat=time.time())
            place.write_bytes(LEASE, json.dumps(asdict(renewed)).encode())
        except StorageError:
            log.warning("The lease could not be renewed; trying again", exc_info=True)
