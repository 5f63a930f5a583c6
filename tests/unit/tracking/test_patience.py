"""Patience with MLflow, tried on a real server."""

import errno
import logging
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import RestException

from maskray.config.schema import TrackingConfig
from maskray.errors import AwayError, StorageError, TrackingError
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_runs import DatasetCard, RunCard
from maskray.tracking.mlflow_store import Store, open_store
from maskray.tracking.mlflow_tracker import MlflowTracker
from maskray.tracking.patience import LONGEST_PAUSE, TRY_SECONDS, Patience
from mlflow_server import Server

CARD = RunCard("run", "f00d", {"seed": 0}, {}, "name: run\n", DatasetCard("data", "/data", "d16e57", 1))
OUTAGE_SECONDS = 3.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.db").write_bytes(mlflow_tables.read_bytes())
    started = Server(folder, folder / "server.db")
    started.start()
    MlflowClient(started.uri).search_experiments(max_results=1)  # its first answer takes the longest
    yield started
    started.kill()


@pytest.fixture
def remote(server: Server) -> Store:
    return open_store(TrackingConfig(uri=server.uri), "unused")


def test_what_is_there_is_asked_once(store: Store):
    asked: list[int] = []
    assert Patience(store.uri, 0).call(lambda: asked.append(1) or "answer") == "answer"
    assert asked == [1]


@pytest.mark.parametrize(
    "error",
    [
        StorageError("full"),
        TrackingError("no values"),
        KeyError("x"),
        PermissionError("read-only"),
        FileNotFoundError("no such folder"),
        OSError(errno.ENOSPC, "no space left"),
        RestException({"error_code": "UNAUTHENTICATED", "message": "who are you?"}),
    ],
)
def test_what_is_no_absence_is_raised_at_once(store: Store, error: Exception):
    asked: list[int] = []

    def act() -> None:
        asked.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        Patience(store.uri).call(act)
    assert caught.value is error
    assert asked == [1]


def test_a_refusal_is_raised_at_once(remote: Store):
    start = time.monotonic()
    with pytest.raises(TrackingError, match="4711"):
        Patience(remote.uri).call(partial(mlflow_runs.close_run, remote, "4711", "FINISHED"))
    assert time.monotonic() - start < TRY_SECONDS


def test_a_server_that_stands_still_is_waited_for_with_signs_of_life(server: Server, remote: Store):
    beats = [time.monotonic()]
    server.suspend()
    threading.Timer(OUTAGE_SECONDS, server.go_on).start()
    mlflow = Patience(server.uri, alive=lambda: beats.append(time.monotonic()))
    assert mlflow.call(partial(mlflow_runs.find_run, remote, "none")) is None
    assert time.monotonic() - beats[0] >= OUTAGE_SECONDS
    assert max(after - before for before, after in pairwise(beats)) < OUTAGE_SECONDS / 2


def test_a_server_that_is_started_again(server: Server, remote: Store, caplog: pytest.LogCaptureFixture):
    run_id = mlflow_runs.ensure_run(remote, CARD)
    server.kill()
    started = threading.Timer(OUTAGE_SECONDS, server.start)
    started.start()
    mlflow, tracker, start = Patience(server.uri), MlflowTracker(server.uri, run_id), time.monotonic()
    tracker.log({"pretrain/loss": 0.5}, 1)
    with caplog.at_level(logging.WARNING):
        assert mlflow.call(partial(mlflow_runs.find_run, remote, CARD.fingerprint)) == run_id
        assert time.monotonic() - start >= OUTAGE_SECONDS
        started.join()
    assert re.search(rf"Waiting for MLflow at {server.uri}, 600 s at most: Connection re(fused|set)", caplog.text)
    assert f"MLflow at {server.uri} is back" in caplog.text
    assert mlflow.close(tracker)
    assert mlflow_runs.curve(remote, run_id, "pretrain/loss") == [(1, 0.5)]


def test_patience_ends_and_what_it_was_spent_on_is_not_waited_for_again(server: Server, remote: Store):
    run_id = mlflow_runs.ensure_run(remote, CARD)
    server.suspend()
    mlflow, start = Patience(server.uri, 1.0), time.monotonic()
    try:
        tracker = MlflowTracker(server.uri, run_id)
        tracker.log({"pretrain/loss": 0.25}, 2)
        with pytest.raises(AwayError, match=r"metrics or figures are not taken"):
            mlflow.close(tracker)
        with pytest.raises(AwayError, match=r"^tracking\.uri: MLflow does not answer\. Found: http.* \(timed out\)"):
            mlflow.call(partial(mlflow_runs.find_run, remote, CARD.fingerprint))
        assert time.monotonic() - start < 2 * TRY_SECONDS + LONGEST_PAUSE
        assert tracker.pending()
    finally:
        server.go_on()
    assert mlflow.call(partial(mlflow_runs.find_run, remote, CARD.fingerprint)) == run_id, "and it begins anew"


def test_what_a_sign_of_life_raises_ends_the_wait(server: Server, remote: Store):
    def stopped() -> None:
        raise SystemExit

    server.suspend()
    try:
        tracker = MlflowTracker(server.uri, "run")
        tracker.log({"pretrain/loss": 1.0}, 1)
        for waits in (partial(mlflow_runs.find_run, remote, "none"), None):
            mlflow = Patience(server.uri, alive=stopped)
            with pytest.raises(SystemExit):
                mlflow.call(waits) if waits else mlflow.close(tracker)
    finally:
        server.go_on()
    deadline = time.monotonic() + 2 * TRY_SECONDS
    while not tracker.has_given_up:  # it was closed: nothing goes on in the background
        assert time.monotonic() < deadline
        time.sleep(0.1)
