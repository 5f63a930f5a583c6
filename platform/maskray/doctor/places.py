"""Where runs and their records are kept."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

from maskray.config.schema import RunConfig
from maskray.data.storage import Storage, nearest_folder
from maskray.doctor.asking import date_at, s3_endpoint
from maskray.doctor.finding import Check, Finding, Subject, fail, ok, warning
from maskray.launch import is_abandoned
from maskray.models.build import weightless_model
from maskray.preparing import check_writable
from maskray.tracking import mlflow_runs, mlflow_store
from maskray.wording import short

_WRITES = 3
_SLOW_LOCAL_SECONDS, _SLOW_REMOTE_SECONDS = 0.1, 1.0
_FP32, _COPIES = 4, 3
_SPARE_CHECKPOINTS = 2
"""Beside those that are kept: the newest, and the one that is being written."""
_SKEW_SECONDS = 5.0


def storage(subject: Subject) -> Finding | None:
    """Whether runs can be written, and how fast a small file is: leases and records are such."""
    if subject.config is None or subject.is_away(subject.config.storage.path):
        return None
    asked_for = Storage(subject.config.storage.path)
    # What is not there yet is made by a run, and not by us.
    root = Storage(nearest_folder(Path(asked_for.uri))) if asked_for.is_local else asked_for
    seconds = []
    for _ in range(_WRITES):
        start = time.perf_counter()
        check_writable(root)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    found = f"{asked_for.uri}: a small file is written and deleted in {1000 * median:.3g} ms"
    if median > (_SLOW_LOCAL_SECONDS if root.is_local else _SLOW_REMOTE_SECONDS):
        return warning(found, "take a storage.path that is nearer, or on a faster disk")
    return ok(found)


def checkpoints(subject: Subject) -> Finding | None:
    """Whether the disk has room for the checkpoints that the config keeps."""
    if subject.config is None or subject.is_away(subject.config.storage.path):
        return None
    config, root, one = subject.config, Storage(subject.config.storage.path), _bytes_of_one(subject.config)
    # Each that waits to be judged is kept until it is.
    judged = config.probe.waiting + 1 if config.training.probes and config.probe.enabled else 0
    num = config.storage.keep_checkpoints + _SPARE_CHECKPOINTS + judged
    needed = f"{num} checkpoints of {short(one, 'B')}"
    if not root.is_local:
        return ok(f"{needed}, in an object store")
    free = shutil.disk_usage(nearest_folder(Path(root.uri))).free
    found = f"{needed}; {short(free, 'B')} free for {root.uri}"
    if free < num * one:
        lower = "storage.keep_checkpoints" + " or probe.waiting" * bool(judged)
        return fail(found, f"free some space, take another storage.path, or lower {lower}")
    return ok(found)


def copies(subject: Subject) -> Finding | None:
    """Whether a checkpoint fits where workers write it, whole, before it is kept."""
    config = subject.config
    if config is None or (subject.address is not None and len(subject.nodes or ()) != 1):
        return None  # workers may be on other machines
    folder, one = tempfile.gettempdir(), _bytes_of_one(config)
    free = shutil.disk_usage(folder).free
    found = f"{short(one, 'B')} for one; {short(free, 'B')} free in {folder}"
    if free < one:
        return fail(found, f"free some space in {folder}, or let TMPDIR name a folder on another disk")
    return ok(found)


def _bytes_of_one(config: RunConfig) -> int:
    """Of a checkpoint: weights and the optimiser's two moments."""
    return _FP32 * _COPIES * sum(p.numel() for p in weightless_model(config).parameters())


def mlflow(subject: Subject) -> Finding | None:
    """Whether MLflow answers us, under this host name, and has the tables that this package wants."""
    if subject.config is None:
        return None
    found = mlflow_store.look(subject.config.tracking, subject.config.storage.path)
    subject.store = found.store
    own = metadata.version("mlflow")
    if found.server is not None and found.server.split(".")[:2] != own.split(".")[:2]:
        return warning(f"{found.place}: MLflow {found.server} there, {own} here", f"pip install mlflow=={found.server}")
    return ok(f"{found.place}: {found.words}")


def stale_runs(subject: Subject) -> Finding | None:
    """Whether MLflow has runs as running that nobody runs."""
    if subject.store is None:
        return None
    running = mlflow_runs.running(subject.store)
    stale = [run.info.run_name for run in running if is_abandoned(run.data.tags, own_fingerprint="", at_once=True)]
    if stale:
        return warning(
            f"{', '.join(stale[:3])}{' …' * (len(stale) > 3)} say RUNNING, and nobody runs them",
            "launch them again to go on; the next launch of any other run into this experiment closes them",
        )
    return ok(f"{len(running)} running, none of them abandoned")


def clock(subject: Subject) -> Finding | None:
    """Whether this machine's clock is that of the servers: leases and S3's signatures rest on it."""
    if subject.config is None:
        return None
    config, urls = subject.config, list[str]()
    if subject.store is not None and subject.store.uri.startswith("http"):
        urls.append(f"{subject.store.uri.rstrip('/')}/health")
    if config.storage.path.startswith("s3://") and not subject.object_store_is_away:
        urls.append(s3_endpoint(config.storage.path))
    skews = {}
    for url in urls:
        theirs = date_at(url)
        if theirs is not None:
            skews[url] = time.time() - theirs - 0.5  # a date is cut to the second
    if not skews:
        return None
    url, skew = max(skews.items(), key=lambda item: abs(item[1]))
    found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {url}"
    if abs(skew) > _SKEW_SECONDS:
        return fail(found, "set the clock: timedatectl set-ntp true, here and there")
    return ok(f"within {_SKEW_SECONDS:g} s of {', '.join(skews)}")


CHECKS = [
    Check("storage", storage),
    Check("checkpoints", checkpoints),
    Check("checkpoint copies", copies),
    Check("MLflow", mlflow),
    Check("stale runs", stale_runs),
    Check("clock", clock),
]
