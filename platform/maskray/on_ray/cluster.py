"""The cluster: joining one or starting one, and whether it can hold what a run asks for."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray

import maskray
from maskray.config.embedding import EmbedConfig
from maskray.config.schema import ClusterConfig, RunConfig
from maskray.data.storage import Storage
from maskray.errors import ClusterError
from maskray.on_ray import room, shared
from maskray.on_ray.parcel import of_this_job, settings_of_mlflow
from maskray.on_ray.room import Bundle

log = logging.getLogger(__name__)

# Set before Ray starts, and only where the user has not.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # a lost worker is told apart from a slow one sooner
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Train's controller blocks by design, and is silenced by Train, too
}
# An embedded cluster's one node is never announced to go: a process that listens for it would be idle.
_EMBEDDED = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """A connection to the cluster that `cluster.address` or RAY_ADDRESS names, or to an embedded one that ends with it.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    package = Path(maskray.__file__).parent
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = address_of(config)
    _refuse_ray_client(address)
    try:
        if address:
            # The package travels with the job: workers of a cluster need not have it installed.
            variables = {**_settings_of_train(), **settings_of_mlflow(os.environ)}
            ray.init(
                address=address,
                logging_level="ERROR",
                runtime_env=of_this_job({"py_modules": [str(package)], "env_vars": variables}, os.environ),
            )
        else:
            _make_token(os.environ)
            mine = {name: os.environ.get(name, value) for name, value in _EMBEDDED.items()}
            with _inherited({"PYTHONPATH": _with_package(package.parent), **mine}):
                context = ray.init(
                    # Without `local` Ray joins any cluster that it finds on this machine.
                    address="local",
                    num_cpus=config.embedded_cpus,
                    include_dashboard=config.dashboard,
                    dashboard_host="127.0.0.1",
                    logging_level="ERROR",
                    log_to_driver=False,
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


def address_of(config: ClusterConfig) -> str | None:
    """Of the cluster to join; None: an embedded one is started."""
    return config.address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of the processes that are started while the block runs.

    An embedded cluster gets its variables so. By a runtime environment each of its processes would wait for an agent,
    and those that Ray starts before they are asked for, which have none, would be of no use.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _with_package(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def _settings_of_train() -> dict[str, str]:
    """What Ray Train's controller and its workers read, wherever they are: of this process, as Train would send it."""
    from ray.train.v2._internal.constants import (
        get_env_vars_to_propagate,  # seconds, which an embedded one need not wait
    )

    return dict(get_env_vars_to_propagate())


def _make_token(environment: Mapping[str, str]) -> None:
    """The token that Ray would make, where there is none: others on this machine could read Ray's.

    Raises:
        ClusterError: it cannot be kept.
    """
    mode = environment.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token" or "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment:
        return
    file = Path.home() / ".ray" / "auth_token"
    try:
        file.parent.mkdir(exist_ok=True)
        with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as token:
            token.write(secrets.token_hex(32))
    except OSError as error:
        if isinstance(error, FileExistsError) and file.is_file():
            return
        raise ClusterError(
            "the token of a cluster on this machine cannot be kept",
            key="RAY_AUTH_TOKEN_PATH",
            found=f"not set, and {error}",
            allowed="a file with a token that this user alone may read",
            fix="(umask 077; printf %s $(openssl rand -hex 32) > FILE), and export RAY_AUTH_TOKEN_PATH=FILE; "
            "or let HOME name a folder that can be written",
        ) from error


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
    beside: list[Bundle],
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
        ClusterError: too few CPUs or GPUs, or none that an autoscaler could bring; still too few after
            `cluster.wait_seconds`; or images, runs or a store on one node's disk for a cluster of several nodes.
    """
    _check_places(config, storage, tracking_uri)
    cluster, fewest = config.cluster, _with_workers(config.cluster, least)
    wanted, enough = (room.bundles(c, beside, streams_on_ray=streams_on_ray) for c in (cluster, fewest))
    room.refuse(enough, beside, fewest)
    if room.wait_for(wanted, cluster, enough):
        _check_places(config, storage, tracking_uri)  # again: nodes may have come


def _check_places(config: RunConfig, storage: Storage, tracking_uri: str) -> None:
    shared.check_runs(storage, tracking_uri)
    shared.refuse_if_not_everywhere(config.data.path, "data.path", "pretrain")


def check_room(
    config: RunConfig,
    beside: list[Bundle],
    *,
    streams_on_ray: bool,
    least: int | None = None,
    machine: Mapping[str, float] | None = None,
) -> None:
    """As `preflight` of what there is now, and without a word to an autoscaler.

    Args:
        config: of the run.
        beside: bundles that are held beside the workers.
        streams_on_ray: whether Ray Data decodes.
        least: as there.
        machine: what this machine would have for an embedded cluster; None: the connected one is looked at.

    Raises:
        ClusterError: too few CPUs or GPUs.
    """
    fewest = _with_workers(config.cluster, least)
    needed = room.bundles(fewest, beside, streams_on_ray=streams_on_ray)
    room.refuse_if_short(needed, ray.cluster_resources() if machine is None else machine, beside, fewest)
    if machine is None:
        room.refuse_if_scattered(needed, beside, fewest)


def _with_workers(cluster: ClusterConfig, number: int | None) -> ClusterConfig:
    return cluster if number is None else cluster.model_copy(update={"workers": number})


def check_embed(config: EmbedConfig) -> None:
    """Refuse what the cluster could never hold or not all nodes see; wait, visibly, for what it can still get.

    Raises:
        ClusterError: too few CPUs or GPUs, now and for an autoscaler; images or a destination that not all nodes see.
    """
    shared.refuse_job_folder(Storage(config.destination), "destination")
    check_workers(config.cluster, config.images, "images", "embed")


def check_workers(cluster: ClusterConfig, images: str, key: str, command: str) -> None:
    """As `check_embed`, of workers that read what `images`, the value of `key`, names. Raises as it does."""
    needed = room.bundles(cluster, [], streams_on_ray=False)
    room.refuse(needed, [], cluster)
    room.wait_for(needed, cluster)
    shared.refuse_if_not_everywhere(images, key, command)


def wait_for_trial(cluster: ClusterConfig) -> bool:
    """Wait, visibly, until there is a free place for a sweep's trial; whether that took any time.

    Raises:
        ClusterError: there is none that an autoscaler could bring, or none after `cluster.wait_seconds`.
    """
    return room.wait_for(room.bundles(cluster, [], streams_on_ray=False), cluster)
