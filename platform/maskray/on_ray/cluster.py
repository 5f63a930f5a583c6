"""The cluster: joining one or starting one, and whether it can hold what a run asks for."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state
from ray.autoscaler.sdk import request_resources

import maskray
from maskray.config.embedding import EmbedConfig
from maskray.config.schema import ClusterConfig, IngestConfig, RunConfig
from maskray.data.storage import Storage
from maskray.errors import ClusterError
from maskray.on_ray.parcel import of_this_job, settings_of_mlflow

log = logging.getLogger(__name__)

_SAY_EVERY_SECONDS = 5.0
_MANY_NODES = 1000  # of a kind of which an autoscaler may bring any number
# Set before Ray starts, and only where the user has not: a lost worker is told apart from a slow one sooner.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}


# Where Ray unpacks the working directory of a submitted job: another folder after each change, gone with the session.
_JOB_FOLDER = "/working_dir_files/"
_ADDRESS_OPTION = {"ingest": "--address"}  # of the others it is a key of their config


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """A connection to the cluster that `cluster.address` or RAY_ADDRESS names, or to an embedded one that ends with it.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    variables = settings_of_mlflow(os.environ)
    package = Path(maskray.__file__).parent
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = config.address or os.environ.get("RAY_ADDRESS")
    _refuse_ray_client(address)
    try:
        if address:
            # The package travels with the job: workers of a cluster need not have it installed.
            ray.init(
                address=address,
                logging_level="ERROR",
                runtime_env=of_this_job({"py_modules": [str(package)], "env_vars": variables}, os.environ),
            )
        else:
            context = ray.init(
                # Without `local` Ray joins any cluster that it finds on this machine.
                address="local",
                num_cpus=config.embedded_cpus,
                include_dashboard=config.dashboard,
                dashboard_host="127.0.0.1",
                logging_level="ERROR",
                log_to_driver=False,
                runtime_env={"env_vars": {**variables, "PYTHONPATH": str(package.parent)}},
            )
            if config.dashboard:
                log.warning("Ray's dashboard: http://%s", context.dashboard_url)
    except (
        ConnectionError,
        RuntimeError,
        ValueError,
        ray.exceptions.RayError,
    ) as error:  # the last: no or a wrong token
        raise ClusterError(
            "the Ray cluster cannot be reached or started",
            key="cluster.address",
            found=f"{address or 'embedded'} ({' '.join(str(error).split())})",
            allowed="auto or host:port of a running cluster, with its token; or null, to start one on this machine",
            fix="check the address and the token (RAY_AUTH_TOKEN_PATH), or unset it for an embedded cluster",
        ) from error
    # Ray puts a handler of its own in place, which aborts the process: nothing would be closed.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_ray_client(address: str | None) -> None:
    if address and address.startswith("ray://"):
        raise ClusterError(
            "Ray Client cannot run Ray Train: the driver must be on a node of the cluster",
            key="cluster.address",
            found=f"{address} (from the config or RAY_ADDRESS)",
            allowed="auto or host:port (of the head's GCS, 6379 by default) on a node of the cluster, or null",
            fix="submit the job to the cluster: maskray submit --address http://HEAD:8265 -- pretrain --config …",
        )


def preflight(
    config: RunConfig,
    storage: Storage,
    tracking_uri: str,
    beside: list[dict[str, float]],
    *,
    streams_on_ray: bool,
    least: int | None = None,
) -> None:
    """Refuse in seconds what the cluster could never hold; wait, visibly, for what it can still get.

    Args:
        config: of the run.
        storage: of all runs.
        tracking_uri: of MLflow.
        beside: bundles that are held beside the workers.
        streams_on_ray: whether Ray Data decodes.
        least: workers that the run starts with where there is room for no more after `cluster.wait_seconds`; None: all.

    Raises:
        ClusterError: too few CPUs or GPUs even at the autoscaler's largest; still too few after
            `cluster.wait_seconds`; or a store on one node's disk for a cluster of several nodes.
    """
    _refuse_job_folder(storage, "storage.path")
    _check_shared(storage, tracking_uri)
    cluster = config.cluster
    fewest = cluster if least is None else cluster.model_copy(update={"workers": least})
    bundles, enough = (_bundles(c, beside, streams_on_ray=streams_on_ray) for c in (cluster, fewest))
    _refuse_if_short(_total(enough), _largest(), fewest, beside)
    if not _can_grow():
        _refuse_if_scattered(enough, beside, fewest)
    if _wait_for(bundles, cluster, enough):
        _check_shared(storage, tracking_uri)  # again: nodes may have come


def _bundles(cluster: ClusterConfig, beside: list[dict[str, float]], *, streams_on_ray: bool) -> list[dict[str, float]]:
    """What must lie on one node each: workers, and what is beside them."""
    worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return [worker] * cluster.workers + beside_workers(cluster, beside, streams_on_ray=streams_on_ray)


def beside_workers(
    cluster: ClusterConfig, probes: list[dict[str, float]], *, streams_on_ray: bool
) -> list[dict[str, float]]:
    """What must lie on one node each beside the workers: probes, and tasks of Ray Data, which take a whole CPU."""
    return probes + [{"CPU": 1.0}] * (cluster.data_cpus if streams_on_ray else 0)


def _total(bundles: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}


def _wait_for(
    bundles: list[dict[str, float]], cluster: ClusterConfig, enough: list[dict[str, float]] | None = None
) -> bool:
    """Wait until there is a free place for each bundle, and ask an autoscaler for them; whether that took any time.

    Where time is up, those that are `enough` are; None: all.
    """
    needed, waited = _total(bundles), False
    deadline, said = time.monotonic() + cluster.wait_seconds, 0.0
    request_resources(bundles=bundles)
    try:
        while _unplaced(bundles, list(available_resources_per_node().values())):
            waited = True
            if time.monotonic() > deadline:
                if enough is not None and not _unplaced(enough, list(available_resources_per_node().values())):
                    log.warning("Starting with what there is: %s free", _shown(ray.available_resources()))
                    return True
                raise ClusterError(
                    f"the cluster's resources were not free within {cluster.wait_seconds:g} s",
                    key="cluster.wait_seconds",
                    found=_shown(ray.available_resources()) + " free",
                    allowed=f"{_shown(needed)}, each worker and each CPU of Ray Data's on one node",
                    fix="wait longer, free some, or ask for less",
                )
            if time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                log.warning("Waiting for %s; %s free", _shown(needed), _shown(ray.available_resources()))
            time.sleep(0.5)
    finally:
        request_resources(bundles=[])  # a standing request would keep the nodes up for ever
    return waited


def _refuse_if_scattered(
    bundles: list[dict[str, float]], beside: list[dict[str, float]], cluster: ClusterConfig
) -> None:
    """Whether each bundle fits on one node; the sums may be enough where no node is."""
    unplaced = _unplaced(bundles, [n["Resources"] for n in _nodes()])
    if not unplaced:
        return
    lost = {id(bundle): sum(each is bundle for each in unplaced) for bundle in bundles}
    workers, of_data = cluster.workers, len(bundles) - cluster.workers - len(beside)
    room = [f"{workers - lost[id(bundles[0])]} of {workers} workers"]
    room += [f"{1 - lost[id(bundle)]} of 1 probe" for bundle in beside]
    room += [f"{of_data - lost[id(bundles[-1])]} of Ray Data's {of_data} CPUs"] if of_data else []
    raise ClusterError(
        f"the nodes have room for {' and for '.join(room)}",
        key="cluster.cpus_per_worker",
        found=f"{_shown(bundles[0])} for each worker" + "".join(f", {_shown(each)} for a probe" for each in beside),
        allowed="what one node has: a worker lies on one node, and so does each whole CPU of cluster.data_cpus",
        fix="ask for smaller workers, or for fewer" + (", or let probes share: probe.cpus=0" if beside else ""),
    )


def _unplaced(bundles: list[dict[str, float]], nodes: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Bundles without a place on any one node, the others having theirs."""
    left = [dict(node) for node in nodes]
    return [bundle for bundle in bundles if not place(bundle, left)]


def place(bundle: Mapping[str, float], left: Sequence[dict[str, float]]) -> bool:
    """Take a bundle from the first of the nodes that has room for it, in what is left of each; whether one had."""
    amounts = {name: amount for name, amount in bundle.items() if amount}
    node = next((node for node in left if not _shortage(amounts, node)), None)
    if node is None:
        return False
    for name, amount in amounts.items():
        node[name] -= amount
    return True


def _largest() -> dict[str, float]:
    """What the cluster can grow to: its autoscaler's word where there is one, else what it has."""
    has, limit = ray.cluster_resources(), ray_state.get_max_resources_from_cluster_config() or {}
    return {name: max(has.get(name, 0.0), float(limit.get(name) or 0.0)) for name in ("CPU", "GPU")}


def _can_grow() -> bool:
    """Whether an autoscaler may add nodes."""
    return bool(_shortage(_largest(), ray.cluster_resources()))


def largest_nodes() -> list[dict[str, float]]:
    """What each node has, of those that are there and of those that an autoscaler may still bring."""
    nodes = [_amounts(node["Resources"]) for node in _nodes()]
    config = ray_state.get_cluster_config()
    there = Counter(tuple(node.items()) for node in nodes)
    for kind in config.node_group_configs if config is not None else ():
        node = _amounts(kind.resources)
        number = _MANY_NODES if kind.max_count < 0 else kind.max_count
        # Nodes do not say of which kind they are; those that have as much are.
        known = min(there[tuple(node.items())], number)
        there[tuple(node.items())] -= known
        nodes += [dict(node) for _ in range(number - known)]
    return nodes


def _amounts(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}


def _nodes() -> list[dict[str, Any]]:
    """All that are alive. The driver's is one of them, whether or not it has CPUs to give."""
    return [node for node in ray.nodes() if node["Alive"]]


def _refuse_if_short(
    needed: Mapping[str, float],
    largest: Mapping[str, float],
    cluster: ClusterConfig,
    beside: Sequence[Mapping[str, float]] = (),
) -> None:
    short = _shortage(needed, largest)
    if not short:
        return
    parts = f"{cluster.workers} workers with {cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker:g} GPUs each"
    parts += "".join(f", {_shown(each)} for a probe" for each in beside)
    raise ClusterError(
        f"the cluster can never hold this run: {_shown(short)} short",
        key="cluster.workers",
        found=f"{_shown(needed)} asked for ({parts}; the rest of the CPUs is for Ray Data)",
        allowed=f"{_shown(largest)} at most",
        fix="lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker, or take a larger cluster"
        + (", or let probes share what there is: probe.cpus=0" if beside else ""),
    )


def _shortage(needed: Mapping[str, float], has: Mapping[str, float]) -> dict[str, float]:
    return {name: n - has.get(name, 0.0) for name, n in needed.items() if n > has.get(name, 0.0) + 1e-6}


def _shown(resources: Mapping[str, float]) -> str:
    amounts = {n: resources[n] for n in ("CPU", "GPU") if resources.get(n)}
    return ", ".join(f"{amount:g} {n}{'' if amount == 1 else 's'}" for n, amount in amounts.items()) or "nothing"


def _check_shared(storage: Storage, tracking_uri: str) -> None:
    nodes = [node["NodeID"] for node in _nodes()]
    if len(nodes) < 2 and not _can_grow():
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


def check_embed(config: EmbedConfig) -> None:
    """Refuse what the cluster could never hold or not all nodes see; wait, visibly, for what it can still get.

    Raises:
        ClusterError: too few CPUs or GPUs, now and at the autoscaler's largest; images or a destination that not all
            nodes see.
    """
    _refuse_job_folder(Storage(config.destination), "destination")
    check_workers(config.cluster, config.images, "images", "embed")


def check_workers(cluster: ClusterConfig, images: str, key: str, command: str) -> None:
    """As `check_embed`, of workers that read what `images`, the value of `key`, names. Raises as it does."""
    bundles = _bundles(cluster, [], streams_on_ray=False)
    _refuse_if_short(_total(bundles), _largest(), cluster)
    if not _can_grow():
        _refuse_if_scattered(bundles, [], cluster)
    _wait_for(bundles, cluster)
    _refuse_if_not_everywhere(images, key, command)


def check_shared(storage: Storage) -> None:
    """Refuse a place below `storage.path` that not all nodes see, or that goes with the job.

    Raises:
        ClusterError: it is such a one.
    """
    _refuse_job_folder(storage, "storage.path")
    _refuse_if_not_shared(storage, "storage.path", [node["NodeID"] for node in _nodes()])


def check_sweep(storage: Storage, tracking_uri: str) -> None:
    """Refuse places of a sweep's trials that not all nodes reach, or that go with the job.

    Raises:
        ClusterError: there is such a one.
    """
    _refuse_job_folder(storage, "storage.path")
    _check_shared(storage, tracking_uri)


def wait_for_trial(cluster: ClusterConfig) -> bool:
    """Wait, visibly, until there is a free place for a sweep's trial; whether that took any time.

    Raises:
        ClusterError: there is more in it than the cluster can grow to, or no place after `cluster.wait_seconds`.
    """
    bundles = _bundles(cluster, [], streams_on_ray=False)
    _refuse_if_short(_total(bundles), _largest(), cluster)
    return _wait_for(bundles, cluster)


def check_room(
    config: RunConfig,
    beside: list[dict[str, float]],
    *,
    streams_on_ray: bool,
    machine: Mapping[str, float] | None = None,
) -> None:
    """As `preflight` of what no waiting brings, and without a word to an autoscaler.

    Args:
        config: of the run.
        beside: bundles that are held beside the workers.
        streams_on_ray: whether Ray Data decodes.
        machine: what this machine would have for an embedded cluster; None: the connected one is looked at.

    Raises:
        ClusterError: too few CPUs or GPUs.
    """
    bundles = _bundles(config.cluster, beside, streams_on_ray=streams_on_ray)
    _refuse_if_short(_total(bundles), _largest() if machine is None else machine, config.cluster, beside)
    if machine is None and not _can_grow():
        _refuse_if_scattered(bundles, beside, config.cluster)


def check_ingest(config: IngestConfig) -> None:
    """Refuse, before tasks on all nodes read and write, folders that only some of them see.

    Raises:
        ClusterError: a source or destination that is not the same on all nodes, or goes with the job.
    """
    destination, nodes = Storage(config.destination), [node["NodeID"] for node in _nodes()]
    _refuse_job_folder(destination, "destination")
    _refuse_if_not_shared(destination, "destination", nodes)
    _refuse_if_not_everywhere(config.source, "source", "ingest")


def _refuse_if_not_everywhere(place: str, key: str, command: str) -> None:
    """Pictures that are read by tasks on all nodes."""
    nodes, folder = [node["NodeID"] for node in _nodes()], Path(place).expanduser().absolute()
    option = _ADDRESS_OPTION.get(command, "cluster.address")
    if len(nodes) > 1 and folder.exists() and not _on_all(nodes, lambda: folder.exists()):
        raise ClusterError(
            f"the pictures are not on all of the cluster's {len(nodes)} nodes",
            key=key,
            found=folder,
            allowed="s3://bucket/prefix, or a folder on a file system that all nodes mount",
            fix=f"take such a place, or {command} on one machine, without {option}",
        )


def _refuse_job_folder(storage: Storage, key: str) -> None:
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
    marker = f".maskray-{uuid.uuid4().hex}"
    storage.write_bytes(marker, b"")
    try:
        return _on_all(nodes, lambda: Storage(storage.uri).exists(marker))
    finally:
        storage.delete(marker)


def _on_all(nodes: list[str], look: Callable[[], bool]) -> bool:
    """Whether a look finds something on each of the nodes."""
    task, on = ray.remote(num_cpus=0)(look), ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    return all(ray.get([task.options(scheduling_strategy=on(n, soft=False)).remote() for n in nodes]))
