"""One launch at a time, and no launch that was killed stands in the way."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from maskray.data import lease
from maskray.data.lease import LEASE, Holder, hold, holder_of
from maskray.data.storage import Storage
from maskray.errors import RunConflictError, StorageError

PACKAGE = str(Path(__file__).parents[3] / "platform")


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.1)


@pytest.fixture
def run(tmp_path):
    return Storage(tmp_path / "runs" / "digits-0123")


def leave(run, holder):
    """A lease as a launch that was killed leaves it."""
    run.write_bytes(LEASE, json.dumps(asdict(holder)).encode())
    return holder


@pytest.fixture
def elsewhere():
    """A holder on another host that was heard of just now."""
    return replace(Holder.this_process(), host="another-host", pid=1)


def test_a_lease_is_held_and_given_back(run):
    assert holder_of(run) is None
    with hold(run, "digits"):
        holder = holder_of(run)
        assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
        assert holder.is_alive()
    assert holder_of(run) is None
    assert run.list_names() == []
    with hold(run, "digits"):
        pass


def test_a_lease_is_given_back_after_an_error_and_its_thread_ends(run):
    with pytest.raises(KeyboardInterrupt), hold(run, "digits"):
        raise KeyboardInterrupt
    assert holder_of(run) is None
    assert not [t for t in threading.enumerate() if t.name == "maskray-lease"]


def test_a_second_launch_is_refused_and_told_who_has_it(run):
    with hold(run, "digits"), pytest.raises(RunConflictError) as caught, hold(run, "digits"):
        pass
    assert str(caught.value) == (
        f"name: the run digits is running already. Found: process {os.getpid()} on {socket.gethostname()}, last heard "
        "of 0 s ago. What to do: wait for it, stop it, or give this run another name or seed."
    )


def test_a_refused_launch_leaves_the_lease_alone(run):
    with hold(run, "digits"):
        mine = holder_of(run)
        with pytest.raises(RunConflictError), hold(run, "digits"):
            pass
        assert holder_of(run) == mine


def test_other_runs_are_not_in_the_way(run, tmp_path):
    with hold(run, "digits"), hold(Storage(tmp_path / "other"), "other"):
        pass


# ---------------------------------------------------------------------------------------------------------- taking over


def test_a_fresh_heartbeat_of_another_host_is_respected(run, elsewhere):
    leave(run, replace(elsewhere, heartbeat=time.time() - lease.STALE_SECONDS + 20))
    with pytest.raises(RunConflictError, match=r"Found: process 1 on another-host, last heard of 10\d s ago\."):
        hold(run, "digits").__enter__()


def test_a_stale_heartbeat_of_another_host_is_taken_over(run, elsewhere, caplog):
    leave(run, replace(elsewhere, heartbeat=time.time() - lease.STALE_SECONDS - 1))
    with hold(run, "digits"):
        assert holder_of(run).pid == os.getpid()
    assert "Taking over the run digits: its last launch ended without a word" in caplog.text


def test_a_number_that_another_process_has_now_is_not_the_holder(run):
    mine = Holder.this_process()
    leave(run, replace(mine, token="old", process_started=mine.process_started - 50))
    with hold(run, "digits"):
        assert holder_of(run).token != "old"


def test_a_number_of_another_container_means_nothing_here(run):
    """Containers may share a host name: its process 1 is not ours, alive or not."""
    there = replace(Holder.this_process(), pid_namespace="pid:[1]")
    leave(run, replace(there, pid=1, process_started=0.0))
    with pytest.raises(RunConflictError):
        hold(run, "digits").__enter__()
    leave(run, replace(there, heartbeat=time.time() - lease.STALE_SECONDS - 1))
    with hold(run, "digits"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"token": "x"}'])
def test_a_lease_that_cannot_be_read_holds_nothing(run, content):
    run.write_bytes(LEASE, content)
    assert holder_of(run) is None
    with hold(run, "digits"):
        pass


def test_storage_that_cannot_be_read_is_no_free_run(tmp_path):
    (tmp_path / "digits" / LEASE).mkdir(parents=True)  # a folder where the file should be
    with pytest.raises(StorageError):
        holder_of(Storage(tmp_path / "digits"))


HOLDER = """
import sys, time
from maskray.data.lease import hold
from maskray.data.storage import Storage
with hold(Storage(sys.argv[1]), "digits"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_process_that_was_killed_is_taken_over_at_once(run, caplog):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run.uri], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PACKAGE}
    )
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(RunConflictError, match=f"Found: process {child.pid} on {socket.gethostname()}"):
            hold(run, "digits").__enter__()
    finally:
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while holder_of(run).is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    # Not waited for yet: a zombie, as it stays in a container without an init.
    with hold(run, "digits"):
        assert holder_of(run).pid == os.getpid()
    child.wait()
    child.stdout.close()
    assert "Taking over the run digits" in caplog.text


def test_of_many_that_take_over_at_once_one_has_it(run, elsewhere):
    leave(run, replace(elsewhere, heartbeat=0.0))
    start, results = threading.Barrier(8), []
    done = threading.Event()

    def launch():
        start.wait()
        try:
            with hold(run, "digits"):
                results.append("has it")
                done.wait(10)
        except RunConflictError:
            results.append("refused")

    threads = [threading.Thread(target=launch) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(results) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["has it"] + ["refused"] * 7


# --------------------------------------------------------------------------------------------------------------- clocks


@pytest.fixture
def clock(monkeypatch):
    """Sets this machine's clock forward, or back: what Python and the kernel say."""

    def put(seconds: float) -> None:
        now, boot = time.time, lease.psutil.boot_time
        monkeypatch.setattr(lease.time, "time", lambda: now() + seconds)
        monkeypatch.setattr(lease.psutil, "boot_time", lambda: boot() + seconds)
        created = lease.psutil.Process.create_time
        monkeypatch.setattr(lease.psutil.Process, "create_time", lambda self: created(self) + seconds)

    return put


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_a_launch_of_this_machine_is_known_after_its_clock_was_set(run, clock, seconds: float):
    with hold(run, "digits"):
        clock(seconds)
        with pytest.raises(RunConflictError, match="is running already"):
            hold(run, "digits").__enter__()


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_a_launch_of_another_machine_whose_heart_beats_by_another_clock_is_left_alone(run, elsewhere, seconds: float):
    theirs = leave(run, replace(elsewhere, heartbeat=time.time() + seconds))
    beat = threading.Timer(0.05, lambda: leave(run, replace(theirs, heartbeat=theirs.heartbeat + 20)))
    beat.start()
    with pytest.raises(RunConflictError, match="is running already"):
        hold(run, "digits").__enter__()
    beat.join()


def test_a_launch_that_died_on_a_machine_whose_clock_was_ahead_is_not_in_the_way_for_hours(run, elsewhere):
    leave(run, replace(elsewhere, heartbeat=time.time() + 7200))
    with hold(run, "digits"):
        assert holder_of(run).pid == os.getpid()


def test_a_number_from_before_the_machine_was_started_anew_means_nothing(run, monkeypatch):
    """What starts first has the same number each time, and the same seconds after boot."""
    before = replace(Holder.this_process(), heartbeat=time.time() - lease.STALE_SECONDS - 1)
    monkeypatch.setattr(lease, "_pid_namespace", lambda: "another boot pid:[1]")
    leave(run, before)
    with hold(run, "digits"):
        assert holder_of(run).token != before.token


# ----------------------------------------------------------------------------------------------------------- heartbeat


def wait_until(ready):
    deadline = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_heart_beats(run, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    with hold(run, "digits"):
        first = holder_of(run)
        wait_until(lambda: holder_of(run).heartbeat > first.heartbeat)
        assert replace(holder_of(run), heartbeat=0) == replace(first, heartbeat=0)


class Stopped(BaseException):
    """What a handler of SIGTERM raises, as the command line's does."""


@pytest.fixture
def sigterm_stops():
    def stop(number, frame):
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_launch_that_lost_its_lease_stops_and_does_not_take_it_back(run, elsewhere, monkeypatch, sigterm_stops):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    theirs = replace(elsewhere, token="theirs")

    def launch():
        with hold(run, "digits"):
            leave(run, theirs)
            threading.Event().wait(10)  # as a driver waits for its workers

    with pytest.raises(RunConflictError, match=r"taken over.*Found: process 1 on another-host") as caught:
        launch()
    assert isinstance(caught.value.__cause__, Stopped)
    assert holder_of(run) == theirs  # and not given back for them


def test_a_heartbeat_that_fails_is_tried_again(run, monkeypatch, caplog):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    write, failures = Storage.write_bytes, iter([True, False])

    def flaky(self, name, content):
        if next(failures, False):
            raise StorageError("cannot write")
        write(self, name, content)

    with hold(run, "digits"):
        first = holder_of(run).heartbeat
        monkeypatch.setattr(Storage, "write_bytes", flaky)
        wait_until(lambda: holder_of(run).heartbeat > first)
    assert "The lease could not be renewed; trying again" in caplog.text
