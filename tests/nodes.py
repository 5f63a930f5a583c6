"""A cluster of several nodes, all of them on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

_MEMORY = 80 * 2**20


@contextmanager
def head() -> Iterator[Cluster]:
    """As KubeRay makes it: without CPUs, and where the driver and its files are."""
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": _MEMORY,
                "temp_dir": folder,
            },
        )
        try:
            ray.init(
                address=nodes.address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1] / "platform")}},
            )
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


def add_node(nodes: Cluster, num_cpus: int) -> None:
    """A worker node."""
    nodes.add_node(num_cpus=num_cpus, object_store_memory=_MEMORY)
