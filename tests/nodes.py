"""A cluster of several nodes, all of them on this machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from ray_head import free_port

_MEMORY = 80 * 2**20
_HEAD = "f" * 51 + "00000"
"""As the autoscaler below calls it."""


@contextmanager
def head(*, brings: int | None = None) -> Iterator[Cluster]:
    """As KubeRay makes it: without CPUs, and where the driver and its files are.

    Args:
        brings: nodes with a CPU each that an autoscaler, of the second version, brings at most; None: there is none.
    """
    with (
        tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as environment,
    ):
        grows = {} if brings is None else _autoscaler(Path(folder), brings, environment)
        nodes = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": _MEMORY,
                "temp_dir": folder,
                **grows,
            },
        )
        environment.undo()  # what is for the head is for no other node
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
            if brings is not None:
                _end_all_of(folder)


def add_node(nodes: Cluster, num_cpus: int) -> None:
    """A worker node."""
    nodes.add_node(num_cpus=num_cpus, object_store_memory=_MEMORY)


def _autoscaler(folder: Path, brings: int, environment: pytest.MonkeyPatch) -> dict[str, object]:
    """What a head takes to have one, whose nodes are on this machine."""
    port = free_port()
    node = {"node_config": {}, "resources": {"CPU": 1, "object_store_memory": _MEMORY}, "max_workers": brings}
    config = {
        "cluster_name": "here",
        "max_workers": brings,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": _HEAD,
            "launch_multiple": True,
            "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"node_config": {}, "resources": {"CPU": 0}, "max_workers": 0},
            "cpu": node,
        },
        "head_node_type": "ray.head.default",
        # All that must be there, and is for no machine of ours.
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")},
        **{key: [] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
        **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands")},
        "file_mounts_sync_continuously": False,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
    }
    (folder / "autoscaler.yaml").write_text(json.dumps(config))
    for name, value in {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }.items():
        environment.setenv(name, value)
    system = {"enable_autoscaler_v2": True}
    return {"autoscaling_config": str(folder / "autoscaler.yaml"), "gcs_server_port": port, "_system_config": system}


def _end_all_of(folder: str) -> None:
    """Nodes that the autoscaler has brought are its children, and outlive it."""
    for process in psutil.process_iter(["cmdline"]):
        if any(folder in part for part in process.info["cmdline"] or []):
            process.kill()
