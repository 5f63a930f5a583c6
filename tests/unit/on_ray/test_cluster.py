"""What fits on nodes, without any."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private.state import GlobalState

from maskray.config.load import parse
from maskray.config.schema import ClusterConfig, IngestConfig, RunConfig
from maskray.data.storage import Storage
from maskray.errors import ClusterError
from maskray.on_ray import cluster


def refuse(monkeypatch, nodes, *, streams: bool = True, beside=(), **settings: float) -> None:
    monkeypatch.setattr(cluster, "_nodes", lambda: [{"Resources": node} for node in nodes])
    config = ClusterConfig(**settings)
    bundles = cluster._bundles(config, list(beside), streams_on_ray=streams)
    cluster._refuse_if_scattered(bundles, list(beside), config)


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


def test_a_run_that_may_have_fewer_workers_starts_with_what_there_is(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(cluster, "_nodes", lambda: [{"NodeID": "a", "Resources": {"CPU": 3}}])
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(cluster, "available_resources_per_node", lambda: {"a": {"CPU": 3.0}})
    monkeypatch.setattr(cluster, "request_resources", lambda **_: None)
    monkeypatch.setattr(GlobalState, "get_max_resources_from_cluster_config", lambda _: None)
    settings = {"workers": 4, "wait_seconds": 0, "data_cpus": 1}
    config = parse(RunConfig, {"name": "a", "data": {"path": "x"}, "optim": {"steps": 1}, "cluster": settings})
    for least in (None, 3):
        with pytest.raises(ClusterError, match="can never hold this run"):
            cluster.preflight(config, Storage(tmp_path), "", [], streams_on_ray=True, least=least)
    cluster.preflight(config, Storage(tmp_path), "", [], streams_on_ray=True, least=2)
    assert "Starting with what there is: 3 CPUs free" in caplog.text


def test_gpus_and_cpus_lie_on_the_same_node(monkeypatch):
    with pytest.raises(ClusterError, match="room for 1 of 2 workers"):
        refuse(monkeypatch, [{"CPU": 1, "GPU": 2}, {"CPU": 8}], workers=2, gpus_per_worker=1)
    refuse(monkeypatch, [{"CPU": 2, "GPU": 2}, {"CPU": 1}], workers=2, gpus_per_worker=1, data_cpus=1)


def test_a_cluster_that_can_grow_is_one_of_several_nodes(monkeypatch, tmp_path):
    """KubeRay before its first worker: one node, and an autoscaler that will bring more."""
    monkeypatch.setattr(cluster, "_nodes", lambda: [{"NodeID": "head", "Resources": {}}])
    monkeypatch.setattr(cluster.ray, "cluster_resources", dict)
    monkeypatch.setattr(GlobalState, "get_max_resources_from_cluster_config", lambda _: {"CPU": 8})
    with pytest.raises(ClusterError, match=r"tracking.uri: .* one node that can grow to several"):
        cluster._check_shared(Storage(tmp_path), "sqlite:///x")


def kind(resources: dict[str, float], most: int) -> SimpleNamespace:
    return SimpleNamespace(resources=resources, max_count=most)


def test_nodes_that_an_autoscaler_may_bring_are_counted_once(monkeypatch):
    small, large = {"CPU": 2, "memory": 10**9}, {"CPU": 8, "GPU": 4}
    there = [{"CPU": 2, "node:10.0.0.1": 1.0, "memory": 5.0}, {"CPU": 2}, {}]
    monkeypatch.setattr(cluster, "_nodes", lambda: [{"Resources": node} for node in there])

    def most(*kinds: SimpleNamespace) -> list[tuple[float, float]]:
        config = SimpleNamespace(node_group_configs=kinds)
        monkeypatch.setattr(GlobalState, "get_cluster_config", lambda _: config)
        return sorted((node["CPU"], node["GPU"]) for node in cluster.largest_nodes())

    now = [(0, 0), (2, 0), (2, 0)]
    assert most() == most(kind(small, 2)) == most(kind(small, 1), kind(small, 1)) == now
    assert most(kind(small, 1), kind(small, 2)) == [*now, (2, 0)]
    assert most(kind(small, 3), kind(large, 2)) == [*now, (2, 0), (8, 4), (8, 4)]
    assert most(kind(small, 0), kind(large, 0)) == now
    assert most(kind(large, -1)).count((8, 4)) >= 100, "as many as are asked for"
    monkeypatch.setattr(GlobalState, "get_cluster_config", lambda _: None)
    assert len(cluster.largest_nodes()) == len(now)


def test_an_ingest_into_a_submitted_jobs_own_folder_is_refused(monkeypatch):
    monkeypatch.setattr(cluster, "_nodes", list)
    config = IngestConfig(source="digits", destination="/tmp/ray/session/runtime_resources/working_dir_files/_1/data")
    with pytest.raises(ClusterError, match=r"destination: a submitted job's own folder"):
        cluster.check_ingest(config)


@pytest.mark.parametrize("where", ["config", "environment"])
def test_ray_client_is_refused_by_name(monkeypatch, where: str):
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("it must not be tried"))
    if where == "environment":
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    config = ClusterConfig(address="ray://head:10001" if where == "config" else None)
    with pytest.raises(ClusterError, match=r"cluster.address: Ray Client .* ray://head:10001 .* maskray submit"):
        cluster.connected(config).__enter__()


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
