"""Whether all nodes of a cluster see the same places, and whether these outlast the job."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import ray

from maskray.config.schema import IngestConfig
from maskray.data.storage import Storage, nearest_folder
from maskray.errors import ClusterError
from maskray.on_ray import room
from maskray.on_ray.growth import may_grow

# Where Ray unpacks the working directory of a submitted job: another folder after each change, gone with the session.
_JOB_FOLDER = "/working_dir_files/"
_ADDRESS_OPTION = {"ingest": "--address"}  # of the others it is a key of their config


def check_runs(storage: Storage, tracking_uri: str) -> None:
    """Refuse a folder of runs, or MLflow's store, that not all nodes reach, or that goes with the job.

    Raises:
        ClusterError: there is such a one.
    """
    refuse_job_folder(storage, "storage.path")
    nodes = _node_ids()
    if len(nodes) < 2 and not may_grow():
        return
    if tracking_uri.startswith("sqlite"):
        size = f"{len(nodes)} nodes" if len(nodes) > 1 else "one node that can grow to several"
        raise ClusterError(
            f"an SQLite store cannot serve a cluster of {size}",
            key="tracking.uri",
            found=tracking_uri,
            allowed="http(s)://host:port of an MLflow server that all nodes reach",
            fix="start an MLflow server and give its URI",
        )
    _refuse_if_not_shared(storage, "storage.path", nodes)


def check_folder(storage: Storage) -> None:
    """Refuse a place below `storage.path` that not all nodes see, or that goes with the job.

    Raises:
        ClusterError: it is such a one.
    """
    refuse_job_folder(storage, "storage.path")
    _refuse_if_not_shared(storage, "storage.path", _node_ids())


def check_ingest(config: IngestConfig) -> None:
    """Refuse, before tasks on all nodes read and write, folders that only some of them see.

    Raises:
        ClusterError: a source or destination that is not the same on all nodes, or goes with the job.
    """
    destination = Storage(config.destination)
    refuse_job_folder(destination, "destination")
    _refuse_if_not_shared(destination, "destination", _node_ids())
    refuse_if_not_everywhere(config.source, "source", "ingest")


def refuse_if_not_everywhere(place: str, key: str, command: str) -> None:
    """Refuse pictures that only some nodes see, where tasks on all of them read.

    Args:
        place: of the pictures.
        key: whose value it is.
        command: of the CLI.

    Raises:
        ClusterError: they are such.
    """
    nodes, folder = _node_ids(), Path(place).expanduser().absolute()
    option = _ADDRESS_OPTION.get(command, "cluster.address")
    if len(nodes) > 1 and folder.exists() and not _on_all(nodes, lambda: folder.exists()):
        raise ClusterError(
            f"the pictures are not on all of the cluster's {len(nodes)} nodes",
            key=key,
            found=folder,
            allowed="s3://bucket/prefix, or a folder on a file system that all nodes mount",
            fix=f"take such a place, or {command} on one machine, without {option}",
        )


def refuse_job_folder(storage: Storage, key: str) -> None:
    """Refuse what lies in the folder of a submitted job.

    Raises:
        ClusterError: it does.
    """
    if _JOB_FOLDER in storage.uri:
        raise ClusterError(
            "a submitted job's own folder does not outlast it",
            key=key,
            found=storage.uri,
            allowed="an absolute path that all nodes see, or s3://bucket/prefix",
            fix="give such a path: a relative one lies in that folder",
        )


def _refuse_if_not_shared(storage: Storage, key: str, nodes: list[str]) -> None:
    if storage.is_local and len(nodes) > 1 and not _seen_everywhere(storage, nodes):
        raise ClusterError(
            f"the folder is not the same on all of the cluster's {len(nodes)} nodes",
            key=key,
            found=storage.uri,
            allowed="s3://bucket/prefix, or a folder on a file system that all nodes mount",
            fix="take such a place, or run on one node",
        )


def _seen_everywhere(storage: Storage, nodes: list[str]) -> bool:
    # A folder that is not there yet is made by what is kept in it, and not by whoever only asks.
    there, marker = Storage(nearest_folder(Path(storage.uri))), f".maskray-{uuid.uuid4().hex}"
    there.write_bytes(marker, b"")
    try:
        return _on_all(nodes, lambda: Storage(there.uri).exists(marker))
    finally:
        there.delete(marker)


def _on_all(nodes: list[str], look: Callable[[], bool]) -> bool:
    """Whether a look finds something on each of the nodes."""
    task, on = ray.remote(num_cpus=0)(look), ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    return all(ray.get([task.options(scheduling_strategy=on(n, soft=False)).remote() for n in nodes]))


def _node_ids() -> list[str]:
    return [node["NodeID"] for node in room.nodes()]
