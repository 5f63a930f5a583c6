import io
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maskray.config.schema import TrackingConfig
from maskray.tracking import mlflow_tracker
from maskray.tracking.mlflow_runs import DatasetCard, RunCard, close_run, ensure_run
from maskray.tracking.mlflow_store import Store, open_store
from maskray.tracking.mlflow_tracker import MlflowTracker
from mlflow_server import Server

CARD = RunCard("run", "f00d", {"seed": 0}, {}, "name: run\n", DatasetCard("data", "/data", "d16e57", 1))


@pytest.fixture
def run_id(store: Store) -> str:
    return ensure_run(store, CARD)


@pytest.fixture
def nobody() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def png() -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(Figure(figsize=(4, 3))).print_png(out)
    return out.getvalue()


def steps_of(store: Store, run_id: str, key: str = "pretrain/loss") -> list[int]:
    return [m.step for m in store.client().get_metric_history(run_id, key)]


def no_threads_left() -> bool:
    return not any(t.name == "maskray-mlflow" for t in threading.enumerate())


def test_logging_never_waits(nobody: str) -> None:
    start = time.monotonic()
    tracker = MlflowTracker(nobody, "run")
    for step in range(1000):
        tracker.log({"pretrain/loss": 1.0, "pretrain/lr": 1e-3}, step)
    tracker.figure("reconstruction", png(), 0)
    tracker.event("rewind", "steps 1 to 3")
    assert time.monotonic() - start < 1
    assert len(tracker.pending()) == 2000
    assert not tracker.close(0.2)
    assert len(tracker.pending()) == 2000
    assert time.monotonic() - start < 5


def test_the_spool_is_bounded(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracker, "MAX_POINTS", 10)
    monkeypatch.setattr(mlflow_tracker, "MAX_EXTRAS", 2)
    tracker = MlflowTracker(nobody, "run")
    for step in range(100):
        tracker.log({"pretrain/loss": 1.0}, step)
        tracker.event("e", str(step))
    assert [plain[3] for plain in tracker.pending()] == list(range(90, 100))
    tracker.close(0)


def test_a_run_that_is_gone_does_not_end_training(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        tracker = MlflowTracker(store.uri, "0" * 32)
        tracker.log({"pretrain/loss": 1.0}, 1)
        assert not tracker.close(5)
    assert "for good" in caplog.text
    assert "did not take 1 points" in caplog.text
    assert no_threads_left()


def test_a_password_in_the_uri_is_not_logged(nobody: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tracker = MlflowTracker(nobody.replace("//", "//me:hidden@"), "run")
        tracker.log({"pretrain/loss": 1.0}, 1)
        assert not tracker.close(2)
    assert "MLflow at http://***@127.0.0.1" in caplog.text
    assert "hidden" not in caplog.text


def test_what_is_no_number_is_said_and_left_out(store: Store, run_id: str, caplog: pytest.LogCaptureFixture) -> None:
    with closing(MlflowTracker(store.uri, run_id)) as tracker:
        tracker.log({"pretrain/loss": "high"}, 1)  # type: ignore[dict-item]
        tracker.log({"pretrain/loss": np.float32(0.5)}, 2)  # type: ignore[dict-item]
    assert "no numbers" in caplog.text
    assert steps_of(store, run_id) == [2]


def test_not_finite_is_said_once_a_key(store: Store, run_id: str) -> None:
    with closing(MlflowTracker(store.uri, run_id)) as tracker:
        for step in range(1, 5):
            tracker.log({"pretrain/loss": math.inf if step > 1 else 1.0, "pretrain/grad_norm": math.nan}, step)
    note = store.client().get_run(run_id).data.tags["mlflow.note.content"]
    assert note.count("not finite") == 2
    assert "pretrain/loss at step 2;" in note
    assert "pretrain/grad_norm at step 1;" in note


def test_events_are_added_to_the_description(store: Store, run_id: str) -> None:
    store.client().set_tag(run_id, "mlflow.note.content", "what a person wrote")
    for _ in range(2):  # a resumed run may say it again
        with closing(MlflowTracker(store.uri, run_id)) as tracker:
            tracker.event("rewind", "steps 120 to 140")
    note = store.client().get_run(run_id).data.tags["mlflow.note.content"]
    assert note.startswith("what a person wrote\n\n**rewind** (20")
    assert note.count("steps 120 to 140") == 1


def test_figure_is_a_series_and_a_plain_file(store: Store, run_id: str, tmp_path: Path) -> None:
    picture = png()
    with closing(MlflowTracker(store.uri, run_id)) as tracker:
        tracker.figure("probe/reconstruction", picture, 20)
    names = [a.path for a in store.client().list_artifacts(run_id, "images")]
    assert [n.rsplit("+", 1)[-1] for n in names if n.endswith(".webp")] == ["compressed.webp"]
    (large,) = [n for n in names if n.endswith(".png")]
    assert large.startswith("images/probe~reconstruction+step+20+")
    plain = store.client().download_artifacts(run_id, "figures/probe/reconstruction-step-000020.png", str(tmp_path))
    assert Path(plain).read_bytes() == picture


def test_a_figure_that_cannot_be_stored_is_given_up(
    store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_tracker, "FIRST_PAUSE", 0.01)
    tracker = MlflowTracker(store.uri, run_id)
    tracker.figure("reconstruction", b"this is no PNG", 20)
    tracker.log({"pretrain/loss": 1.0}, 20)
    assert not tracker.close(20)  # all that can be stored is, and it says that something was not
    assert "figure reconstruction of step 20; given up" in caplog.text
    assert steps_of(store, run_id) == [20]


def test_system_metrics_go_on_where_they_ended(store: Store, run_id: str) -> None:
    for _ in range(2):
        tracker = MlflowTracker(store.uri, run_id, system_metrics_seconds=0.1)
        time.sleep(1.5)
        assert tracker.pending() == []
        assert tracker.close()
    steps = steps_of(store, run_id, "system/cpu_utilization_percentage")
    assert len(steps) > 2
    assert steps == list(range(len(steps)))
    assert no_threads_left()


def test_readings_that_fail_do_not_stop_the_rest(
    store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: object) -> None:
        raise OSError("no such sensor")

    monkeypatch.setattr(mlflow_tracker.SystemMetricsMonitor, "collect_metrics", broken)
    with closing(MlflowTracker(store.uri, run_id, system_metrics_seconds=0.1)) as tracker:
        tracker.log({"pretrain/loss": 1.0}, 1)
    assert steps_of(store, run_id) == [1]
    assert "can no longer be read" in caplog.text


def test_pauses_grow_and_are_bounded_for_ever() -> None:
    pauses = [mlflow_tracker.pause_after(attempt) for attempt in (0, 1, 2, 10, 10**6)]
    assert pauses == [0.5, 1.0, 2.0, 15.0, 15.0]


def test_storing_alone_leaves_the_status(store: Store, run_id: str) -> None:
    close_run(store, run_id, "FINISHED")
    with closing(MlflowTracker(store.uri, run_id)) as tracker:
        tracker.log({"probe/accuracy": 0.5}, 10)
    assert store.client().get_run(run_id).info.status == "FINISHED"
    assert "MLFLOW_RUN_ID" not in os.environ


# ------------------------------------------------------------------------------------------------------------ a server


@pytest.fixture
def server(tmp_path: Path, mlflow_tables: Path) -> Iterator[Server]:
    (tmp_path / "server.db").write_bytes(mlflow_tables.read_bytes())
    started = Server(tmp_path, tmp_path / "server.db")
    started.start()
    yield started
    started.kill()


def test_a_server_killed_in_the_middle_loses_nothing_and_doubles_nothing(server: Server) -> None:
    store = open_store(TrackingConfig(uri=server.uri), "unused")
    run_id = ensure_run(store, CARD)
    tracker = MlflowTracker(server.uri, run_id, system_metrics_seconds=0.5)
    tracker.figure("reconstruction", png(), 0)
    for step in range(1, 301):
        tracker.log({"pretrain/loss": 1 / step, "pretrain/lr": 1e-3}, step)
        time.sleep(0.01)
        if step == 150:  # a batch may be half-way
            server.kill()
            tracker.figure("reconstruction", png(), step)
    assert tracker.pending()
    server.start()
    assert tracker.flush(60)
    assert tracker.close()
    for key in ("pretrain/loss", "pretrain/lr"):
        assert steps_of(store, run_id, key) == list(range(1, 301))
    figures = [a.path for a in store.client().list_artifacts(run_id, "images") if a.path.endswith(".png")]
    assert sorted(int(f.split("+")[2]) for f in figures) == [0, 150]
    close_run(store, run_id, "FINISHED")
    assert store.client().get_run(run_id).info.status == "FINISHED"
    assert open_store(TrackingConfig(uri=server.uri), "unused") == store
