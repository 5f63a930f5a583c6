"""What fits on nodes, without any."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskray.config.schema import ClusterConfig, IngestConfig
from maskray.data.storage import Storage
from maskray.errors import ClusterError
from maskray.on_ray import cluster, growth, room, shared
from maskray.on_ray.sweep import tune


def refuse(monkeypatch, nodes, *, streams: bool = True, beside=(), **settings: float) -> None:
    monkeypatch.setattr(room, "nodes", lambda: [{"Resources": node} for node in nodes])
    config = ClusterConfig(**settings)
    room.refuse_if_scattered(room.bundles(config, list(beside), streams_on_ray=streams), list(beside), config)


def test_a_worker_lies_on_one_node(monkeypatch):
    with pytest.raises(ClusterError, match="room for 2 of 3 workers"):
        refuse(monkeypatch, [{"CPU": 4}, {"CPU": 4}], workers=3, cpus_per_worker=2.5, streams=False)
    refuse(monkeypatch, [{"CPU": 4}, {"CPU": 4}], workers=2, cpus_per_worker=2.5, streams=False)


def test_a_task_of_ray_data_takes_a_whole_cpu_of_one_node(monkeypatch):
    nodes: list[dict[str, float]] = [{"CPU": 2}, {"CPU": 2}]
    with pytest.raises(ClusterError, match="room for 2 of 2 workers and for 0 of Ray Data's 1 CPUs"):
        refuse(monkeypatch, nodes, workers=2, cpus_per_worker=1.5)
    refuse(monkeypatch, nodes, workers=2, cpus_per_worker=1)
    refuse(monkeypatch, nodes, workers=2, cpus_per_worker=1.5, streams=False)


def test_a_probe_has_a_place_of_its_own(monkeypatch):
    aside = [{"CPU": 1.0, "GPU": 0.0}]
    with pytest.raises(ClusterError, match=r"room for 2 of 2 workers and for 0 of 1 probe\..*probe.cpus=0"):
        refuse(monkeypatch, [{"CPU": 2}], workers=2, beside=aside, streams=False)
    refuse(monkeypatch, [{"CPU": 2}, {"CPU": 1}], workers=2, beside=aside, streams=False)


def test_gpus_and_cpus_lie_on_the_same_node(monkeypatch):
    with pytest.raises(ClusterError, match="room for 1 of 2 workers"):
        refuse(monkeypatch, [{"CPU": 1, "GPU": 2}, {"CPU": 8}], workers=2, gpus_per_worker=1)
    refuse(monkeypatch, [{"CPU": 2, "GPU": 2}, {"CPU": 1}], workers=2, gpus_per_worker=1, data_cpus=1)


@pytest.mark.parametrize(
    ("kinds", "grows"),
    [({"a": "node_a", "b": "node_b"}, False), ({"a": "ray.head.default"}, True), ({"a": "node_a", "b": "gpu"}, True)],
    ids=str,
)
def test_an_autoscaler_of_the_first_version_has_kinds_of_nodes_of_its_own(monkeypatch, kinds, grows):
    status = json.dumps({"autoscaler_report": {"node_type_mapping": kinds}}).encode()
    monkeypatch.setattr(growth, "is_autoscaler_v2", lambda **_: False)
    monkeypatch.setattr(growth, "_internal_kv_get", lambda _: status)
    assert growth.may_grow() is grows


@pytest.mark.parametrize("status", [b"", b"{}", b'{"autoscaler_report": null}'])
def test_no_autoscaler_has_said_anything_yet(monkeypatch, status):
    monkeypatch.setattr(growth, "is_autoscaler_v2", lambda **_: False)
    monkeypatch.setattr(growth, "_internal_kv_get", lambda _: status)
    assert not growth.may_grow()


def test_an_ingest_into_a_submitted_jobs_own_folder_is_refused(monkeypatch):
    monkeypatch.setattr(room, "nodes", list)
    config = IngestConfig(source="digits", destination="/tmp/ray/session/runtime_resources/working_dir_files/_1/data")
    with pytest.raises(ClusterError, match=r"destination: a submitted job's own folder"):
        shared.check_ingest(config)


@pytest.mark.parametrize("where", ["config", "environment"])
def test_ray_client_is_refused_by_name(monkeypatch, where: str):
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("it must not be tried"))
    if where == "environment":
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    config = ClusterConfig(address="ray://head:10001" if where == "config" else None)
    with pytest.raises(ClusterError, match=r"cluster.address: Ray Client .* ray://head:10001 .* maskray submit"):
        cluster.connected(config).__enter__()


@pytest.mark.parametrize("submitted", [{}, {"env_vars": {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "7"}}])
def test_a_cluster_that_is_joined_gets_trains_settings_with_the_job(monkeypatch, submitted: dict):
    """Ray takes no variable twice: what a job was submitted with is not sent again."""
    joined = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **options: joined.update(options))
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.setenv("RAY_TRAIN_SECRET_OF_MINE", "planted")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": submitted}))
    with cluster.connected(ClusterConfig(address="10.0.0.1:6379")):
        sent = joined["runtime_env"]["env_vars"]
    assert sent["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "10"
    assert sent.get("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S") == (None if submitted else "7")
    assert "RAY_TRAIN_SECRET_OF_MINE" not in sent


JOIN = """
from maskray.config.schema import ClusterConfig, IngestConfig
from maskray.errors import ClusterError
from maskray.on_ray.cluster import connected
try:
    connected(ClusterConfig(address="127.0.0.1:6379")).__enter__()
except ClusterError as error:
    print(error)
"""


def test_a_missing_token_is_the_users_to_mend(tmp_path):
    """In a process of its own: Ray reads its token once."""
    package = str(Path(cluster.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    said = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, check=True)
    assert "cluster.address" in said.stdout
    assert "no authentication token was found" in said.stdout
    assert "RAY_AUTH_TOKEN_PATH" in said.stdout


@pytest.mark.parametrize("home", ["nowhere", "file"])
def test_a_home_that_cannot_be_written_is_the_users_to_mend(tmp_path, monkeypatch, home):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / home))
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH: .*/\.ray'.*export RAY_AUTH_TOKEN_PATH=FILE"):
        cluster._make_token({})
    cluster._make_token({"RAY_AUTH_TOKEN_PATH": "elsewhere"})


def test_a_token_is_made_once_and_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".ray" / "auth_token"
    cluster._make_token({})
    made = file.read_text()
    cluster._make_token({})
    assert (len(made), file.read_text(), file.stat().st_mode & 0o777) == (64, made, 0o600)


# --------------------------------------------------------------------------------------------- what all nodes must see


@pytest.fixture
def two_nodes(monkeypatch):
    """Nodes that see all that this machine does, but for one folder: tasks of theirs run here."""
    hidden = list[Path]()

    def on_all(nodes, look):
        names = [folder.rename(folder.with_name("hidden")) for folder in hidden]
        try:
            return look()
        finally:
            for name, folder in zip(names, hidden, strict=True):
                name.rename(folder)

    monkeypatch.setattr(room, "nodes", lambda: [{"NodeID": name, "Resources": {"CPU": 9}} for name in "ab"])
    monkeypatch.setattr(shared, "_on_all", on_all)
    return hidden


def test_a_folder_that_is_not_there_yet_is_not_made_by_a_look(two_nodes, tmp_path):
    shared.check_runs(Storage(tmp_path / "a" / "runs"), "http://mlflow:5000")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b").mkdir()
    two_nodes.append(tmp_path / "b")
    with pytest.raises(ClusterError, match=r"storage.path: the folder is not the same.*/b/runs"):
        shared.check_runs(Storage(tmp_path / "b" / "runs"), "http://mlflow:5000")
    assert list((tmp_path / "b").iterdir()) == []


def test_images_that_only_the_driver_sees_are_refused_before_a_run_or_a_sweep(two_nodes, tiny, tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    config = tiny(data={"path": str(images)})
    monkeypatch.setattr(room, "refuse", lambda *_: None)
    monkeypatch.setattr(room, "wait_for", lambda *_: False)
    prepared = SimpleNamespace(space=SimpleNamespace(base=config), store=SimpleNamespace(uri="http://mlflow:5000"))

    def preflight():
        cluster.preflight(config, Storage(tmp_path), "http://mlflow:5000", [], streams_on_ray=False)

    preflight()
    tune._check_places(prepared)
    two_nodes.append(images)
    with pytest.raises(ClusterError, match=r"data.path: the pictures are not on all .*2 nodes.*or pretrain on one"):
        preflight()
    with pytest.raises(ClusterError, match=r"data.path: the pictures are not on all .*2 nodes.*or sweep on one"):
        tune._check_places(prepared)
