"""The seam between training and whoever launched it: rank, device, stream, checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from maskray.config.schema import DataConfig
from maskray.data import local
from maskray.data.spec import StreamSpec
from maskray.data.stream import Unit
from maskray.training import checkpoint, folders

Snapshot = Callable[[Path], None]
"""A checkpoint to be: fills a folder, on any thread. It holds copies, so training goes on."""


class WorkerContext(Protocol):
    """What a launcher gives to each training process, whatever it trains."""

    rank: int
    world_size: int
    device: torch.device

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder of the run's newest valid checkpoint, on this machine while the context lasts."""
        ...

    def report(self, step: int, snapshot: Snapshot | None, *, probed: bool) -> float:
        """A checkpoint, from all ranks together: rank 0 brings the snapshot, the others None.

        Args:
            step: steps done.
            snapshot: what the checkpoint holds.
            probed: whether it is judged.

        Returns:
            Seconds that training waited for an earlier checkpoint to end.
        """
        ...


class RunContext(WorkerContext, Protocol):
    """What it gives to those of a pretraining run."""

    def units(self, spec: StreamSpec, start_step: int) -> AbstractContextManager[Iterator[Unit]]:
        """This worker's row groups from `start_step` on, in the plan's order."""
        ...

    def leaving(self) -> int:
        """Nodes of this run of which it has been told that they will be taken away; 0 but to rank 0.

        Where they become more, a checkpoint is made at the next log step.
        """
        ...


class LocalWorkerContext:
    """Bare torch: one process, or one of torchrun's. Checkpoints are folders below `run_folder`.

    Also the double in tests: it trains, checkpoints and resumes for real.

    Args:
        run_folder: of the run.
        rank: of this process.
        world_size: processes in all.
        device: the CPU if None.
        keep_checkpoints: the best by their probe's score, of the others the newest, and always the newest of all.
        probe: judges the checkpoint in a folder, here: training waits. None: none is judged.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        keep_checkpoints: int = 2,
        probe: Callable[[Path], None] | None = None,
    ) -> None:
        self.run_folder, self.rank, self.world_size = run_folder, rank, world_size
        self.device = device or torch.device("cpu")
        self._keep, self._probe = keep_checkpoints, probe

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The newest folder whose files are all there, as its `state.json` says."""
        yield next((f for f in self._folders() if checkpoint.is_whole(f)), None)

    def report(self, step: int, snapshot: Snapshot | None, *, probed: bool) -> float:
        """Write at once: nothing to wait for."""
        if snapshot is not None:
            folder = self.run_folder / folders.folder_name(step, "local")
            partial = folder.with_suffix(".partial")
            checkpoint.fill(partial, snapshot, "storage.path")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            if probed and self._probe is not None:
                self._probe(folder)
            for old in self._not_worth_keeping(folder):
                shutil.rmtree(old)
        return 0.0

    def _not_worth_keeping(self, newest: Path) -> list[Path]:
        # Those of later steps are damaged: they were passed over when the run was taken up.
        found = self._folders()
        left = found[found.index(newest) :]
        # Stable: among equals the newest come first, as they stand there.
        best = sorted(left, key=lambda f: -folders.score_of(lambda name: (f / name).read_bytes()))
        return [folder for folder in found if folder != newest and folder not in best[: self._keep]]

    def _folders(self) -> list[Path]:
        found = self.run_folder.glob(f"{folders.FOLDER_PREFIX}*")
        return sorted((f for f in found if f.suffix != ".partial"), reverse=True)


class LocalContext(LocalWorkerContext):
    """A `LocalWorkerContext` of a pretraining run.

    Args:
        run_folder: of the run.
        data: how the stream reaches this process.
        options: as `LocalWorkerContext` takes them.
    """

    def __init__(self, run_folder: Path, data: DataConfig, **options: Any) -> None:
        super().__init__(run_folder, **options)
        self._data = data

    def units(self, spec: StreamSpec, start_step: int) -> AbstractContextManager[Iterator[Unit]]:
        """The in-process walk."""
        rank, world_size = self.rank, self.world_size
        return local.open_units(spec, self._data, self.device, rank=rank, world_size=world_size, start_step=start_step)

    def leaving(self) -> int:
        """Nobody tells it."""
        return 0
