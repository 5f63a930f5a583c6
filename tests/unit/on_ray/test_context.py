"""A checkpoint's way to where it is kept, as Train calls for it, its own retries included; without a cluster."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from ray.train.v2._internal.execution.context import StorageContext, TrainContext, set_train_context
from ray.train.v2._internal.execution.train_fn_utils import DistributedTrainFnUtils, set_train_fn_utils

from maskray.data import patient, s3
from maskray.data import storage as storage_module
from maskray.data.retry import Patience
from maskray.data.storage import Storage
from maskray.errors import UnreachableError
from maskray.on_ray import context as context_module
from maskray.on_ray.context import RayWorkerContext
from maskray.training import checkpoint
from object_store import FaultyProxy

RUN = "digits-0123"
FACTS = checkpoint.Facts(4, "0" * 16, 1, 1, {}, [])


class Train:
    """What a worker has of Train: its context, and the thread that uploads."""

    def __init__(self, root: Storage, pool: ThreadPoolExecutor) -> None:
        self._pool, self.uploads = pool, list[Future[Any]]()
        self._context = object.__new__(TrainContext)
        self._context.execution_context = SimpleNamespace(train_context_callbacks=[])
        where = patient.for_train(root)
        self._context.storage_context = StorageContext(where["storage_path"], RUN, where.get("storage_filesystem"))
        set_train_context(self._context)

    def report(self, metrics: dict[str, Any], **given: Any) -> None:
        """As Train's, where the first worker waits for no other."""
        self.uploads.append(
            self._pool.submit(
                self._context._upload_checkpoint,
                given["checkpoint_dir_name"],
                metrics,
                given["checkpoint"],
                given["delete_local_checkpoint_after_upload"],
                given["checkpoint_upload_fn"],
                given["validation"],
            )
        )


@pytest.fixture
def root(proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Where runs are kept: nothing is patient there but uploads as a whole."""
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(tries=1))
    monkeypatch.setattr(s3, "_STREAM_TRIES", 1)
    return Storage(f"{bucket}/runs")


@pytest.fixture
def train(root: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    with ThreadPoolExecutor(1) as pool:
        train = Train(root, pool)
        set_train_fn_utils(DistributedTrainFnUtils())
        monkeypatch.setattr(ray.train, "report", train.report)
        yield train
    set_train_context(None)
    set_train_fn_utils(None)


@pytest.fixture
def worker(root: Storage) -> RayWorkerContext:
    """Without what it asks of Train when it starts."""
    worker = object.__new__(RayWorkerContext)
    worker._run, worker._attempt, worker._upload, worker._newest = root.child(RUN), "0a1b2c3d", None, None
    worker._held = []
    return worker


@pytest.fixture
def snapshot() -> checkpoint.HostCopy:
    model = torch.nn.Linear(3, 3)
    return checkpoint.HostCopy(model, torch.optim.AdamW(model.parameters()), FACTS, "name: x\n")


class AtWarning(logging.Handler):
    """Does something when this module's first warning is there."""

    def __init__(self, do: Any) -> None:
        super().__init__(logging.WARNING)
        self.emit = lambda _: do()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(storage_module.tempfile, "tempdir", str(folder))
    return folder


def test_an_upload_that_is_tried_again_has_not_ended(
    train: Train, worker: RayWorkerContext, snapshot: checkpoint.HostCopy, proxy: FaultyProxy, temporary: Path
):
    """Whoever judges it would find half of it, or nothing."""
    proxy.shares = {"throttle": 1.0}
    there = AtWarning(proxy.shares.clear)
    context_module.log.addHandler(there)
    try:
        worker.report(4, snapshot.write, probed=False)
        with checkpoint.on_disk(worker.newest_checkpoint()) as folder:
            assert checkpoint.is_whole(folder)
    finally:
        context_module.log.removeHandler(there)
    assert proxy.faults["throttle"] > 0
    kept = train.uploads[0].result().checkpoint
    assert Path(kept.path).name == "step_000000004-0a1b2c3d"
    assert kept.filesystem == train._context.storage_context.storage_filesystem
    assert [f for f in temporary.rglob("*") if f.name != f"maskray-temporary-{os.getuid()}"] == []
    assert worker.report(8, None, probed=False) >= 0


def test_an_upload_that_came_to_nothing_is_said_to_whoever_waits(
    train: Train, worker: RayWorkerContext, snapshot: checkpoint.HostCopy, proxy: FaultyProxy, temporary: Path
):
    """As what it is: a store that does not answer is no mistake of the user's, as a missing checkpoint would be."""
    proxy.shares = {"throttle": 1.0}
    worker.report(4, snapshot.write, probed=False)
    refusal = r"^storage.path: a checkpoint could not be kept: cannot write s3://.*last checkpoint"
    with pytest.raises(UnreachableError, match=refusal):
        worker.newest_checkpoint()
    asked = proxy.requests.total()
    with pytest.raises(UnreachableError, match=refusal):
        worker.report(8, snapshot.write, probed=False)
    with pytest.raises(UnreachableError, match=refusal):
        train.uploads[0].result(timeout=60)  # Train's own retries have ended too, with the same
    assert proxy.requests.total() == asked
    assert len(train.uploads) == 1
    assert [f for f in temporary.rglob("*") if f.name != f"maskray-temporary-{os.getuid()}"] == []


def test_training_waits_for_an_upload_only_at_the_next(
    train: Train, worker: RayWorkerContext, snapshot: checkpoint.HostCopy
):
    go_on = threading.Event()

    def slow(folder: Path) -> None:
        go_on.wait(60)
        snapshot.write(folder)

    assert worker.report(4, slow, probed=False) < 1
    threading.Timer(0.2, go_on.set).start()
    start = time.perf_counter()
    waited = worker.report(8, snapshot.write, probed=False)
    assert 0.1 < waited <= time.perf_counter() - start
    assert worker.newest_checkpoint().uri.endswith(f"/{RUN}/step_000000008-0a1b2c3d")
