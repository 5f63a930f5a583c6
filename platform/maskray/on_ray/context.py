"""Training's seam to Ray Train: what a worker is told, and what it gives back."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import ray.train
from ray.train.torch import get_device
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context

from maskray.config.schema import DataConfig
from maskray.data import local
from maskray.data.cache import unheard
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.data.stream import Unit
from maskray.data.temporary import Held
from maskray.errors import UnreachableError
from maskray.on_ray import stream
from maskray.training import checkpoint, fetched, folders
from maskray.training.context import Snapshot

log = logging.getLogger(__name__)

_TRIES = 3
"""Of an upload to an object store that does not answer, each as long as `Storage` is patient."""


class Upload:
    """A checkpoint's way to where it is kept, on a thread of Train's.

    Args:
        snapshot: what it holds.
        target: its folder.
    """

    def __init__(self, snapshot: Snapshot, target: Storage) -> None:
        self._snapshot: Snapshot | None = snapshot
        self._target = target
        self._ended = threading.Event()
        self._failure: Exception | None = None

    def __call__(self, local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """As Train has it.

        Raises:
            StorageError: it could not be kept. Train calls again after some errors, which whoever waits cannot foresee:
                so the end is settled here, and another call finds the same.
        """
        if not self._ended.is_set():
            try:
                self._keep(Path(local.path))
            except Exception as error:  # noqa: BLE001 - whatever it is, somebody may wait
                self._failure = error
                shutil.rmtree(local.path, ignore_errors=True)  # Train does so only after an upload
            finally:
                self._snapshot = None  # Train keeps this object until the controller has the report
                self._ended.set()
        self.wait()
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)

    def wait(self) -> None:
        """Until the checkpoint is there.

        Raises:
            StorageError: it could not be kept.
        """
        self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def _keep(self, local: Path) -> None:
        assert self._snapshot is not None, "it has not ended"
        checkpoint.fill(local, self._snapshot, "TMPDIR")
        for left in reversed(range(_TRIES)):
            try:
                checkpoint.send(local, self._target)
                break
            except UnreachableError as error:
                if left == 0:
                    raise
                log.warning("%s It is tried again", error)


class RayWorkerContext:
    """A Ray Train worker's `WorkerContext`.

    Args:
        run: the run's folder, Train's own.
    """

    def __init__(self, run: Storage) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        self._run = run
        # Every start of the workers writes folders of its own: no two ever write into one.
        self._attempt = uuid.uuid4().hex[:8]
        self._upload: Upload | None = None
        self._held = list[Held]()
        self._newest: str | None = None

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The checkpoint that Train has on record."""
        found = ray.train.get_checkpoint()
        if found is None:
            yield None
            return
        self._newest = Path(found.path).name
        # Not Ray's own copy: one request that is throttled ends it, and what there is of it passes for a checkpoint
        # with the other workers of the machine.
        with fetched.shared(self._run.child(self._newest)) as folder:
            yield folder

    def report(self, step: int, snapshot: Snapshot | None, *, probed: bool) -> float:
        """Hand the snapshot to Train's upload thread; at most one is on its way, a second waits for it.

        Raises:
            StorageError: the one before could not be kept, or there is no room for the folder of this one.
        """
        start = time.perf_counter()
        self._wait()
        waited = time.perf_counter() - start
        reported, name = None, folders.folder_name(step, self._attempt)
        if snapshot is not None:
            target = self._run.child(name)
            # An empty folder stands for the checkpoint until it is filled for the upload; Train deletes it afterwards.
            reported = ray.train.Checkpoint.from_directory(self._new_folder(target.uri))
            self._newest, self._upload = name, Upload(snapshot, target)
        ray.train.report(
            {"step": step, folders.SCORE: folders.NO_SCORE},
            checkpoint=reported,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=True,
            validation=probed and reported is not None,
        )
        return waited

    def _new_folder(self, what: str) -> Path:
        """Held until it is seen to be gone: it is deleted a moment after the upload has ended, on Train's thread."""
        for each in [held for held in self._held if not held.path.exists()]:
            each.release()
            self._held.remove(each)
        self._held.append(Held(what))
        return self._held[-1].path

    def newest_checkpoint(self) -> Storage:
        """The folder of what this worker reported last, once all of it is there, or else of what it went on from.

        Raises:
            StorageError: it could not be kept.
        """
        assert self._newest is not None, "the first worker's, once it has reported or went on"
        self._wait()
        return self._run.child(self._newest)

    def _wait(self) -> None:
        if self._upload is not None:
            self._upload.wait()


class RayContext(RayWorkerContext):
    """A Ray Train worker's `RunContext`.

    Args:
        data: how the stream reaches the workers.
        run: the run's folder, Train's own.
        share: of the stream, where Ray Data decodes; None: this worker's threads decode.
        beat: see `local.open_units`.
    """

    def __init__(
        self, data: DataConfig, run: Storage, share: stream.Share | None, beat: Callable[[], None] = unheard
    ) -> None:
        super().__init__(run)
        self._data, self._share, self._beat = data, share, beat

    @contextmanager
    def units(self, spec: StreamSpec, start_step: int) -> Iterator[Iterator[Unit]]:
        """This worker's share of the plan."""
        if self._share is not None:
            assert start_step == self._share.start_step, "it goes on from what Train has on record"
            with closing(self._share.units()) as units:
                yield units
            return
        place = {"rank": self.rank, "world_size": self.world_size, "start_step": start_step}
        with local.open_units(spec, self._data, self.device, **place, beat=self._beat) as units:
            yield units

    def leaving(self) -> int:
        """As Train's watcher has told this worker, without asking: Train's own function waits for all workers."""
        if self.rank:
            return 0
        told = get_internal_train_context().preemption_context.preemption_info
        return 0 if told is None else len(told.preempted_node_ids)
