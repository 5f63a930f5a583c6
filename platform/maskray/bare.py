"""Pretraining on bare torch: one process, or torchrun's. No Ray, the same functions."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from maskray.config.schema import RunConfig
from maskray.config.training import FOR_CUBLAS
from maskray.errors import BadStepError, CheckpointError, ClusterError, ConfigError, StorageError
from maskray.evaluation import judgement
from maskray.evaluation.judgement import Verdict
from maskray.launch import Summary, launch, unstored_metrics
from maskray.preparing import Prepared
from maskray.pretrain import pretrain
from maskray.tracking.base import Fanout, Observer, Tracker
from maskray.tracking.console import ProgressLine
from maskray.tracking.mlflow_tracker import MlflowTracker
from maskray.training import rewinds, stacks
from maskray.training.context import LocalContext
from maskray.training.folders import PROBE, step_of

log = logging.getLogger(__name__)


class BareLauncher:
    """Trains in this process, one of `world_size` that torchrun started.

    Args:
        rank: of this process.
        world_size: processes in all.
    """

    name = "torch"

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self._rank, self._world_size = rank, world_size

    def preflight(self, prepared: Prepared) -> None:
        """Only what differs from Ray: checkpoints are local folders, and torchrun says how many workers there are."""
        if not prepared.root.is_local:
            raise StorageError(
                "bare torch writes its checkpoints to a local folder", key="storage.path", found=prepared.root.uri
            )
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) != self._world_size:
            raise ClusterError(
                "bare torch runs on one machine: each process reads checkpoints from its own disk",
                key="--launcher",
                found=f"torch, on {self._world_size} processes of several machines",
                allowed="ray",
            )
        if prepared.config.cluster.workers != self._world_size:
            raise ConfigError(
                "torchrun started another number of processes",
                key="cluster.workers",
                found=prepared.config.cluster.workers,
                allowed=str(self._world_size),
                fix=f"--set cluster.workers={self._world_size}, or torchrun --nproc-per-node",
            )

    def train(self, prepared: Prepared, run_id: str) -> None:
        """Train to the end.

        Raises:
            BadStepError: of a step. The processes behind the first have seen it too, and wait where the run may go on.
        """
        self._meet()
        stored = MlflowTracker(
            prepared.store.uri, run_id, system_metrics_seconds=prepared.config.tracking.system_metrics_seconds
        )
        with closing(ProgressLine(prepared.plan.total_steps)) as line:
            tracker = Fanout(stored, Observer(line.update))
            try:
                self._pretrain(prepared, tracker)
            finally:
                all_stored = tracker.close()
        if not all_stored:
            raise unstored_metrics()

    def follow(self, prepared: Prepared) -> None:
        """What the processes behind the first do: the same, by the record of the run, which the first alone writes.

        Raises:
            BadStepError: of a step, and the run has no way back left.
        """
        while True:
            self._meet()
            known = rewinds.read(prepared.run)
            config = rewinds.in_force(prepared.config, known)
            try:
                return self._pretrain(replace(prepared, config=config), Observer())
            except BadStepError:
                if not rewinds.may_go_back(config, known):
                    raise

    def newest_step(self, prepared: Prepared) -> int:
        """Of the newest whole folder of the run."""
        with self._context(prepared).latest_checkpoint() as folder:
            return 0 if folder is None else step_of(folder.name)

    @contextmanager
    def newest_checkpoint(self, prepared: Prepared) -> Iterator[Path]:
        """The newest whole folder of the run."""
        with self._context(prepared).latest_checkpoint() as folder:
            if folder is None:
                raise CheckpointError("the run has no checkpoint", found=prepared.run.uri)
            yield folder

    def judge(self, prepared: Prepared) -> Verdict:
        """In this process."""
        with self.newest_checkpoint(prepared) as folder:
            return judgement.judge(prepared.config, folder, self._device(prepared.config))

    def _pretrain(self, prepared: Prepared, tracker: Tracker) -> None:
        first = True

        def probe(folder: Path) -> None:
            nonlocal first
            try:
                found = judgement.probe(prepared.config, folder, self._device(prepared.config), first=first)
                (folder / PROBE).write_bytes(judgement.note(prepared.config, found[-1]))
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                log.warning("The probe of %s came to nothing: %r", folder.name, error)
                tracker.event("probe_failed", f"{folder.name}: {error!r}")
                return
            first = False
            for each in found:
                each.tell(tracker)

        pretrain(prepared.config, self._context(prepared, probe), tracker)

    def _meet(self) -> None:
        """Wait for the other processes. What the first wrote is there; it writes no more before all have trained."""
        if self._world_size > 1:
            dist.barrier()

    def _context(self, prepared: Prepared, probe: Callable[[Path], None] | None = None) -> LocalContext:
        return LocalContext(
            Path(prepared.run.uri),
            prepared.config.data,
            rank=self._rank,
            world_size=self._world_size,
            device=self._device(prepared.config),
            keep_checkpoints=prepared.config.storage.keep_checkpoints,
            probe=probe,
        )

    @staticmethod
    def _device(config: RunConfig) -> torch.device:
        if config.cluster.gpus_per_worker == 0:
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def run(prepared: Prepared) -> Summary | None:
    """Launch without Ray; under torchrun, all but the first process return None."""
    stacks.write_on_signal()
    on_gpu = prepared.config.cluster.gpus_per_worker > 0
    if on_gpu:
        for name, value in FOR_CUBLAS.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return launch(prepared, BareLauncher())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        launcher = BareLauncher(dist.get_rank(), world_size)
        if dist.get_rank() == 0:
            return launch(prepared, launcher)
        launcher.follow(prepared)
        return None
    finally:
        dist.destroy_process_group()
