"""What fits on nodes, without any."""

import pytest
from ray._private.state import GlobalState

from maskray.config.schema import ClusterConfig
from maskray.data.storage import Storage
from maskray.errors import ClusterError
from maskray.on_ray import cluster


def refuse(monkeypatch, nodes: list[dict[str, float]], *, streams: bool = True, **settings: float) -> None:
    monkeypatch.setattr(cluster, "_nodes", lambda: [{"Resources": node} for node in nodes])
    config = ClusterConfig(**settings)
    cluster._refuse_if_scattered(cluster._bundles(config, streams_on_ray=streams), config)


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
