"""A disk that is full when a checkpoint is written: the last one stays good, and the run goes on when there is room."""

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ray.train import Checkpoint

from maskray import launch
from maskray.bare import BareLauncher
from maskray.cli import USER_MISTAKE
from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from maskray.errors import StorageError
from maskray.on_ray import record
from maskray.on_ray.context import Upload
from maskray.on_ray.stream import SNAPSHOT
from maskray.on_ray.sweep.context import TrialContext
from maskray.preparing import prepare
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_store import DATABASE
from maskray.training import checkpoint
from maskray.training.checkpoint import WEIGHTS
from maskray.training.context import LocalContext, Snapshot
from maskray.training.folders import PROBE, step_of
from outages import seconds_to_train

from .conftest import check_against, note

MEGABYTE = 2**20
FILLER = "filler"


class Disk:
    """A small one, on which something else may take the room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, left_bytes: int) -> None:
        """Until so many bytes are free, or fewer."""
        (self.folder / FILLER).write_bytes(b"")
        free = shutil.disk_usage(self.folder).free
        (self.folder / FILLER).write_bytes(bytes(max(0, free - left_bytes)))
        assert shutil.disk_usage(self.folder).free <= left_bytes

    def make_room(self) -> None:
        (self.folder / FILLER).unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Makes a disk of so many bytes: memory, that only root may mount."""
    mounted: list[Path] = []

    def make(size_bytes: int) -> Disk:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "maskray-test", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return Disk(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class FullAt(BareLauncher):
    """Something takes the room just before the checkpoint of a step."""

    def __init__(self, disk: Disk, step: int) -> None:
        super().__init__()
        self._disk, self._step = disk, step

    def _context(self, *arguments: object) -> LocalContext:
        context = super()._context(*arguments)
        report = context.report

        def filled(step: int, snapshot: Snapshot | None, *, probed: bool) -> float:
            if step == self._step:
                self._disk.fill(left_bytes=8 * 1024)
            return report(step, snapshot, probed=probed)

        context.report = filled
        return context


def digest_of_newest(run: Path) -> tuple[int, str]:
    newest = max(run.glob("step_*"))
    assert checkpoint.is_whole(newest)
    return step_of(newest.name), hashlib.sha256((newest / WEIGHTS).read_bytes()).hexdigest()


def test_a_run_on_bare_torch(tiny: Callable[..., RunConfig], runs: Path, disk: Callable[[int], Disk]):
    config = tiny(probe={"enabled": False})
    quiet = prepare(config)
    BareLauncher().train(quiet, mlflow_runs.ensure_run(quiet.store, launch.card(quiet)))

    small = disk(4 * MEGABYTE)
    kept_there = {"storage": {"path": str(small.folder)}, "tracking": {"uri": f"sqlite:///{runs / DATABASE}"}}
    prepared = prepare(tiny(probe={"enabled": False}, name="full", **kept_there))
    run = Path(prepared.run.uri)
    with pytest.raises(
        StorageError, match=r"^storage.path: a checkpoint could not be written. Found: .*bytes are free there.*go"
    ):
        launch.launch(prepared, FullAt(small, 8))
    assert [step_of(f.name) for f in run.glob("step_*")] == [4], "half a checkpoint takes room"
    assert digest_of_newest(run)[0] == 4
    tracked = prepared.store.client().get_run(mlflow_runs.find_run(prepared.store, prepared.plan.fingerprint))
    assert tracked.info.status == "FAILED"
    assert "storage.path" in tracked.data.tags["maskray.ended"]

    small.make_room()
    assert launch.launch(prepare(prepared.config), BareLauncher()).steps == 12
    assert digest_of_newest(run) == digest_of_newest(Path(quiet.run.uri))


def copy_of(width: int) -> checkpoint.HostCopy:
    model, facts = torch.nn.Linear(width, width), checkpoint.Facts(4, "0" * 16, 1, 1, {}, [])
    return checkpoint.HostCopy(model, torch.optim.AdamW(model.parameters()), facts, "name: x\n")


@pytest.mark.parametrize(("full", "key"), [("kept", "storage.path"), ("temporary", "TMPDIR")])
def test_an_upload_of_a_worker_of_rays(disk: Callable[[int], Disk], tmp_path: Path, full: str, key: str):
    """It leaves nothing: else each try, by whichever worker, would find less room than the one before."""
    small = disk(MEGABYTE)
    folders = {"kept": tmp_path / "kept", "temporary": tmp_path / "temporary"} | {full: small.folder / full}
    for folder in folders.values():
        folder.mkdir()
    upload = Upload(copy_of(200).write, Storage(folders["kept"]).child("step_000000004-0a1b2c3d"))
    small.fill(left_bytes=100 * 1024)
    with pytest.raises(StorageError, match=rf"^{key}: a checkpoint could not be .*[Nn]o space.*last checkpoint"):
        upload(Checkpoint(folders["temporary"]), "step_000000004-0a1b2c3d")
    assert Storage(folders["kept"]).list_names() == []
    assert not folders["temporary"].exists()
    assert shutil.disk_usage(small.folder).free > 90 * 1024


@pytest.mark.parametrize(("full", "key"), [("kept", "storage.path"), ("temporary", "TMPDIR")])
def test_a_trial_of_one_process(
    tiny: Callable[..., RunConfig],
    disk: Callable[[int], Disk],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full: str,
    key: str,
):
    small = disk(MEGABYTE)
    folders = {"kept": tmp_path / "kept", "temporary": tmp_path / "temporary"} | {full: small.folder / full}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders["temporary"]))
    trial = Storage(folders["kept"])
    context = TrialContext(trial, tiny(), lambda *_: {"score": 0.5}, lambda *_: None, lambda: None)
    context.report(4, copy_of(20).write, probed=True)
    (kept,) = trial.list_names()
    assert json.loads(trial.read_bytes(f"{kept}/{PROBE}")) == {"metrics": {"score": 0.5}}
    small.fill(left_bytes=100 * 1024)
    with pytest.raises(StorageError, match=rf"^{key}: a checkpoint could not be .*[Nn]o space.*last checkpoint"):
        context.report(8, copy_of(200).write, probed=False)
    assert trial.list_names() == [kept]
    with context.latest_checkpoint() as newest:
        assert newest is not None
        assert checkpoint.is_whole(newest)
    assert list(folders["temporary"].iterdir()) == []


def test_a_record_that_a_full_disk_has_torn(disk: Callable[[int], Disk]):
    """It is said where there is no room to make it again, and is made when there is some."""
    small = disk(MEGABYTE)
    run = Storage(small.folder / "x-0123")
    folder = small.folder / "x-0123" / "step_000000004-0a1b2c3d"
    checkpoint.fill(folder, copy_of(20).write, "storage.path")
    (small.folder / "x-0123" / SNAPSHOT).write_bytes(b"")
    small.fill(left_bytes=0)
    with pytest.raises(StorageError, match=r"^storage.path: cannot write .*No space.*free some space"):
        record.settle(run)
    small.make_room()
    record.settle(run)
    assert record.read(run) == record.Record([folder.name], folder.name)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_ray(launches, quiet, disk: Callable[[int], Disk]):
    wanted = quiet(2)
    small = disk(48 * MEGABYTE)
    run = launches("full", 2, storage={"path": str(small.folder)}, cluster={"max_failures": 1})
    run.storage = str(small.folder)
    tracked_elsewhere = "--set", f"tracking.uri=sqlite:///{run.folder}/runs/{DATABASE}"
    process = run.start(*tracked_elsewhere)
    run.wait_for_step(process, 18)
    small.fill(left_bytes=MEGABYTE)
    assert run.finish(process) == USER_MISTAKE, run.output()
    said = " ".join(run.output().split())
    assert "storage.path: " in said
    assert "No space left on device" in said
    assert run.status() == "FAILED"

    small.make_room()
    process = run.start(*tracked_elsewhere)
    seconds = seconds_to_train(run, [])
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    note("disk full while a checkpoint is written", "2", run, wanted, seconds)
