"""The `RunContext` of a trial of one process, and where its checkpoints are kept."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from maskray.config.schema import RunConfig
from maskray.data import local
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.data.stream import Unit
from maskray.data.temporary import temporary_folder
from maskray.on_ray.sweep.nested import Tell
from maskray.training import checkpoint, folders
from maskray.training.context import Snapshot


class Newest(NamedTuple):
    """A trial's newest whole checkpoint."""

    name: str
    """Of its folder, below the trial's."""
    weights: Path
    """What is in it, on this machine: under another name where the trial's folder is in a bucket."""


@contextmanager
def newest(folder: Storage) -> Iterator[Newest | None]:
    """Of a trial, while the context lasts."""
    for name in _checkpoints(folder):
        with checkpoint.on_disk(folder.child(name)) as found:
            if checkpoint.is_whole(found):
                yield Newest(name, found)
                return
    yield None


def newest_step(folder: Storage) -> int:
    """Steps done at a trial's newest checkpoint; 0 where there is none."""
    names = _checkpoints(folder)
    return folders.step_of(names[0]) if names else 0


def _checkpoints(folder: Storage) -> list[str]:
    """Names, the newest first."""
    names = folder.list_names() if folder.exists() else []
    return sorted((name for name in names if name.startswith(folders.FOLDER_PREFIX)), reverse=True)


def device_of(config: RunConfig) -> torch.device:
    """What it trains and is judged on."""
    return torch.device("cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu")


class TrialContext:
    """A trial's `RunContext`: one process, whose newest checkpoint is kept at a place that all nodes see.

    Args:
        folder: of the trial.
        config: of its run.
        judge: what is known of the checkpoint in a folder, after so many steps. Training waits.
        tell: of it.
        beat: is called often while images are decoded.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        folder: Storage,
        config: RunConfig,
        judge: Callable[[Path, int], Mapping[str, float]],
        tell: Tell,
        beat: Callable[[], None],
    ) -> None:
        self.device = device_of(config)
        self._folder, self._data, self._judge, self._tell, self._beat = folder, config.data, judge, tell, beat
        self._attempt = uuid.uuid4().hex[:8]  # every start writes folders of its own

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The newest whole one."""
        with newest(self._folder) as found:
            yield None if found is None else found.weights

    def report(self, step: int, snapshot: Snapshot | None, *, probed: bool) -> float:
        """Judge and write at once: nothing to wait for."""
        assert snapshot is not None, "there is one process"
        name, metrics = folders.folder_name(step, self._attempt), dict[str, float]()
        target = self._folder.child(name)
        with temporary_folder(target.uri) as local_folder:
            checkpoint.fill(local_folder, snapshot, "TMPDIR")
            notes = dict[str, bytes]()
            if probed:
                metrics = dict(self._judge(local_folder, step))
                notes[folders.PROBE] = json.dumps({"metrics": metrics}).encode()
            checkpoint.send(local_folder, target, notes)
        for old in _checkpoints(self._folder):
            if old != name:
                self._folder.delete(old)
        if probed:
            self._tell(step, metrics)
        return 0.0

    def units(self, spec: StreamSpec, start_step: int) -> AbstractContextManager[Iterator[Unit]]:
        """The in-process walk. While images are decoded for it, for many minutes maybe, there are signs of life."""
        place = {"rank": 0, "world_size": 1, "start_step": start_step}
        return local.open_units(spec, self._data, self.device, **place, beat=self._beat)

    def leaving(self) -> int:
        """Who leaves takes the trial with it: it goes on elsewhere from the checkpoint before."""
        return 0
