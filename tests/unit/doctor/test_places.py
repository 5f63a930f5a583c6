"""Storage, disks, MLflow and clocks."""

import functools
import json
import shutil
import sqlite3
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import __version__ as mlflow_version

from maskray import launch
from maskray.data import lease
from maskray.doctor import places
from maskray.doctor.finding import Level, Subject
from maskray.preparing import prepare
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_store import DATABASE
from mlflow_server import Server

PROBED = {"log_steps": 4, "checkpoint_steps": 4, "probe_steps": 4}


def test_a_place_that_can_be_written(looked, tiny, tmp_path, place):
    config = tiny(storage={"path": f"{place}/not/yet/there"})
    found = looked(places.storage, Subject(config=config))
    assert found.level is Level.OK
    assert " ms" in found.found
    assert not (tmp_path / "not").exists()


def test_a_file_where_a_folder_is_needed(looked, tiny, tmp_path):
    (tmp_path / "file").touch()
    found = looked(places.storage, Subject(config=tiny(storage={"path": str(tmp_path / "file/runs")})))
    assert found.level is Level.FAIL


def test_a_bucket_that_is_not_there(looked, tiny, bucket):
    found = looked(places.storage, Subject(config=tiny(storage={"path": f"{bucket}-of-others/runs"})))
    assert found.level is Level.FAIL


def test_a_slow_place(looked, tiny, monkeypatch):
    monkeypatch.setattr(places, "_SLOW_LOCAL_SECONDS", 0.0)
    assert looked(places.storage, Subject(config=tiny())).level is Level.WARNING


def test_a_full_disk(looked, tiny, small_disk):
    config = tiny(storage={"path": str(small_disk)})
    assert looked(places.storage, Subject(config=config)).level is Level.OK
    wide = {"width": 256, "decoder": {"width": 64, "depth": 1, "heads": 2}}
    found = looked(places.checkpoints, Subject(config=tiny(storage={"path": str(small_disk)}, model=wide)))
    assert found.level is Level.FAIL
    assert "storage.keep_checkpoints" in found.fix
    (small_disk / "full").write_bytes(bytes(1_048_576))
    found = looked(places.storage, Subject(config=config))
    assert found.level is Level.FAIL
    assert "free some space" in found.fix


def test_room_for_checkpoints_is_weights_and_two_moments_of_each(looked, tiny, place):
    found = looked(places.checkpoints, Subject(config=tiny(storage={"path": place})))
    assert found.level is Level.OK
    assert found.found.startswith("4 checkpoints of ")
    probed = tiny(storage={"path": place}, training=PROBED)
    assert looked(places.checkpoints, Subject(config=probed)).found.startswith(
        "9 checkpoints of "
    )  # 5 wait, or are judged
    unheard = tiny(storage={"path": place}, training=PROBED, probe={"enabled": False})
    assert looked(places.checkpoints, Subject(config=unheard)).found.startswith("4 checkpoints of ")


def test_a_checkpoint_must_fit_where_it_is_written_first(looked, tiny, small_disk, monkeypatch):
    wide = {"width": 256, "decoder": {"width": 64, "depth": 1, "heads": 2}}
    assert looked(places.copies, Subject(config=tiny(model=wide))).level is Level.OK
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    assert looked(places.copies, Subject(config=tiny())).level is Level.OK
    subject = Subject(config=tiny(model=wide))
    found = looked(places.copies, subject)
    assert (found.level, str(small_disk) in found.found, "TMPDIR" in found.fix) == (Level.FAIL, True, True)
    subject.address, subject.nodes = "head:6379", [{}]  # this machine's
    assert looked(places.copies, subject).level is Level.FAIL
    subject.nodes = [{}, {}]
    assert looked(places.copies, subject) is None


@pytest.fixture
def embedded(tiny, mlflow_tables):
    """A config whose embedded store is there, with no experiment of ours."""
    config = tiny()
    Path(config.storage.path).mkdir()
    shutil.copy(mlflow_tables, Path(config.storage.path, DATABASE))
    return config


def test_an_embedded_store_is_not_made(looked, tiny, tmp_path):
    found = looked(places.mlflow, Subject(config=tiny()))
    assert (found.level, list(tmp_path.glob("runs*"))) == (Level.OK, [])


def test_an_embedded_store_that_is_there_gets_no_experiment(looked, embedded, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    database = Path(embedded.storage.path, DATABASE)
    before = database.read_bytes()
    found = looked(places.mlflow, Subject(config=embedded))
    assert (found.level, "the first run makes experiment maskray" in found.found) == (Level.OK, True), found
    assert database.read_bytes() == before
    assert list(database.parent.iterdir()) == [database]
    assert list(tmp_path.glob("mlruns")) == []


@pytest.mark.parametrize(
    ("revision", "fix"), [("older", "mlflow db upgrade 'sqlite:///"), ("ffffffffffff", "--upgrade")]
)
def test_tables_of_another_version_are_not_migrated(looked, embedded, revision, fix):
    from maskray.tracking.mlflow_store import _revisions

    older = list(_revisions())[3].revision if revision == "older" else revision
    database = f"{embedded.storage.path}/{DATABASE}"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (older,))
        connection.commit()
    found = looked(places.mlflow, Subject(config=embedded))
    assert (found.level, fix in found.fix) == (Level.FAIL, True), found
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(older,)]


def test_no_server_answers(looked, tiny):
    found = looked(places.mlflow, Subject(config=tiny(tracking={"uri": "http://127.0.0.1:9"})))
    assert (found.level, "start it" in found.fix) == (Level.FAIL, True)


def test_runs_kept_in_a_bucket_need_a_server(looked, tiny):
    found = looked(places.mlflow, Subject(config=tiny(storage={"path": "s3://bucket/runs"})))
    assert (found.level, "tracking.uri" in found.found) == (Level.FAIL, True)


@pytest.fixture(scope="module")
def server(tmp_path_factory, mlflow_tables):
    """A real one, that knows itself as `localhost` alone."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(mlflow_tables, folder / DATABASE)
    server = Server(folder, folder / DATABASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "localhost:*")
        server.start()
    yield server
    server.kill()


def test_a_server_that_does_not_know_the_name_it_is_asked_by(looked, tiny, server):
    found = looked(places.mlflow, Subject(config=tiny(tracking={"uri": server.uri})))
    assert found.level is Level.FAIL
    assert "403: Invalid Host header" in found.found
    assert "--allowed-hosts '127.0.0.1,127.0.0.1:*" in found.fix


def test_a_server_that_answers(looked, tiny, server, monkeypatch):
    subject = Subject(config=tiny(tracking={"uri": server.uri.replace("127.0.0.1", "localhost")}))
    until = time.monotonic() + 60
    while (found := looked(places.mlflow, subject)).level is Level.FAIL and time.monotonic() < until:
        time.sleep(0.5)  # its first answers take long on a busy machine
    assert found.level is Level.OK, found
    assert f"MLflow {mlflow_version} answers; the first run makes experiment maskray" in found.found
    assert subject.store is None
    monkeypatch.setattr(places.metadata, "version", lambda name: "3.16.0")
    found = looked(places.mlflow, subject)
    assert (found.level, found.fix) == (Level.WARNING, f"pip install mlflow=={mlflow_version}")


def test_runs_that_nobody_runs_are_named_and_left_as_they_are(looked, tiny):
    prepared = prepare(tiny())
    run_id = mlflow_runs.ensure_run(prepared.store, launch.card(prepared))
    holder = replace(lease.Holder.this_process(), host="elsewhere", heartbeat=time.time())
    prepared.run.write_bytes(lease.LEASE, json.dumps(asdict(holder)).encode())
    subject = Subject(config=prepared.config)
    looked(places.mlflow, subject)
    assert looked(places.stale_runs, subject).level is Level.OK
    old = replace(holder, heartbeat=time.time() - lease.STALE_SECONDS - 1)
    prepared.run.write_bytes(lease.LEASE, json.dumps(asdict(old)).encode())
    found = looked(places.stale_runs, subject)
    assert found.level is Level.WARNING
    assert prepared.plan.run_name in found.found
    assert prepared.store.client().get_run(run_id).info.status == "RUNNING"


class Clock(BaseHTTPRequestHandler):
    """Says the time, some seconds off."""

    def __init__(self, seconds, *arguments):
        self.seconds = seconds
        super().__init__(*arguments)

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + self.seconds)

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(("seconds", "level"), [(0, Level.OK), (90, Level.FAIL), (-90, Level.FAIL)])
def test_a_clock_that_is_off(looked, tiny, monkeypatch, seconds, level):
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Clock, seconds)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        found = looked(places.clock, Subject(config=tiny(storage={"path": "s3://bucket/runs"})))
        server.shutdown()
    assert found.level is level
    if seconds:
        assert found.found.startswith(("89", "90", "91"))
        assert ("behind" if seconds > 0 else "ahead of") in found.found
