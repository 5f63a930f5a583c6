import multiprocessing
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from maskray.config.schema import TrackingConfig
from maskray.errors import TrackingError
from maskray.tracking.mlflow_store import DATABASE, Store, open_store, shown


def _open(folder: str) -> Store:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    return open_store(TrackingConfig(), folder)


def test_embedded_store_lies_beside_the_runs(store: Store, tmp_path: Path) -> None:
    assert store.uri == f"sqlite:///{tmp_path}/{DATABASE}"
    experiment = store.client().get_experiment(store.experiment_id)
    assert (experiment.name, experiment.artifact_location) == ("maskray", (tmp_path / "mlflow-artifacts").as_uri())
    assert open_store(TrackingConfig(), str(tmp_path)) == store


def test_four_drivers_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        stores = list(pool.map(_open, [str(tmp_path / "runs")] * 4))
    assert len(set(stores)) == 1


def test_relative_sqlite_path_becomes_absolute(
    mlflow_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.db").write_bytes(mlflow_tables.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert open_store(TrackingConfig(uri="sqlite:///x.db"), "runs").uri == f"sqlite:///{tmp_path}/x.db"
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize(
    ("uri", "storage", "says"),
    [
        ("sqlite://", "runs", "memory"),
        ("sqlite:///:memory:", "runs", "memory"),
        ("/some/mlruns", "runs", "sqlite:////absolute/path.db"),
        ("file:///some/mlruns", "runs", "sqlite:////absolute/path.db"),
        (None, "s3://bucket/runs", "mlflow server"),
    ],
)
def test_uris_that_cannot_work(uri: str | None, storage: str, says: str) -> None:
    with pytest.raises(TrackingError, match=says) as caught:
        open_store(TrackingConfig(uri=uri), storage)
    assert caught.value.key == "tracking.uri"


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_text("not a database at all, but a text that is long enough to be read")
    with pytest.raises(TrackingError, match="cannot be written"):
        open_store(TrackingConfig(), str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(TrackingError, match="cannot be written"):
        open_store(TrackingConfig(), str(tmp_path / "runs"))


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(TrackingError, match="cannot be written"):
        open_store(TrackingConfig(), str(tmp_path / "runs"))


def test_deleted_experiment_is_named(store: Store, tmp_path: Path) -> None:
    store.client().delete_experiment(store.experiment_id)
    with pytest.raises(TrackingError, match="experiments restore") as caught:
        open_store(TrackingConfig(), str(tmp_path))
    assert caught.value.key == "tracking.experiment"


# ------------------------------------------------------------------------------------------------------------- servers


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_nobody_answers(scheme: str, free_port: int) -> None:
    uri = f"{scheme}://user:secret@127.0.0.1:{free_port}"
    start = time.monotonic()
    with pytest.raises(TrackingError, match="refused") as caught:
        open_store(TrackingConfig(uri=uri), "runs")
    assert time.monotonic() - start < 10
    assert "secret" not in str(caught.value)
    assert f"127.0.0.1:{free_port}" in str(caught.value)


def test_a_port_that_takes_connections_and_says_nothing() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        start = time.monotonic()
        with pytest.raises(TrackingError, match="no MLflow answers"):
            open_store(TrackingConfig(uri=f"http://127.0.0.1:{s.getsockname()[1]}"), "runs")
        assert time.monotonic() - start < 15


@pytest.fixture
def impostor() -> Iterator[HTTPServer]:
    """Answers every request with the status in `server.status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.end_headers()
            self.wfile.write(b"Invalid Host header - possible DNS rebinding attack detected")

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (403, "--allowed-hosts '127.0.0.1"),
        (401, "MLFLOW_TRACKING_USERNAME"),
        (500, "log"),
        (200, "look like"),
        (404, "look like"),
    ],
)
def test_a_server_that_refuses(impostor: HTTPServer, status: int, says: str) -> None:
    impostor.status = status  # type: ignore[attr-defined]
    with pytest.raises(TrackingError, match=says):
        open_store(TrackingConfig(uri=f"http://127.0.0.1:{impostor.server_port}"), "runs")


def test_shown_hides_the_password() -> None:
    assert shown("http://me:secret@host:5000/x") == "http://***@host:5000/x"
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"
