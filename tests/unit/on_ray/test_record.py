"""What a killed launch leaves of Train's record, and what the next makes of it. Train's own reader is the judge."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from maskray.data.storage import Storage
from maskray.errors import CheckpointError, UnreachableError
from maskray.on_ray import record
from maskray.on_ray.stream import SNAPSHOT
from maskray.training import rewinds
from maskray.training.checkpoint import STATE, WEIGHTS, Facts, HostCopy
from maskray.training.folders import FOLDER_PREFIX, NO_SCORE, PROBE, SCORE, step_of

OLD, NEW, UNFINISHED = "step_000000004-a", "step_000000008-b", "step_000000012-c"
SCORES = {OLD: 0.75, NEW: NO_SCORE, UNFINISHED: NO_SCORE}


def train_reads(run: Path) -> CheckpointManager:
    """Train's record, as its controller opens it at a start."""
    config = CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SCORE)
    return CheckpointManager(config, StorageContext(str(run.parent), run.name))


def write(folder: Path, **facts: object) -> None:
    """A checkpoint that is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    model = torch.nn.Linear(2, 2)
    said = Facts(step_of(folder.name), "0123", 1, 1, {}, [], **facts)
    HostCopy(model, torch.optim.AdamW(model.parameters()), said, "name: digits").write(folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints on record, and one whose upload was killed before its last file."""
    run = tmp_path / "runs" / "digits-0123"
    for name in (OLD, NEW, UNFINISHED):
        write(run / name)
    (run / UNFINISHED / STATE).unlink()
    (run / OLD / PROBE).write_text(json.dumps({"score": SCORES[OLD]}))

    async def register() -> None:
        train = train_reads(run)
        for name in (OLD, NEW):
            metrics = {"step": step_of(name), SCORE: SCORES[name]}
            train.register_checkpoint(_TrainingReport(Checkpoint(str(run / name)), metrics, validation=name == NEW))

    asyncio.run(register())
    return run


def folders(run: Path) -> list[str]:
    return sorted(f.name for f in run.glob(f"{FOLDER_PREFIX}*"))


def newest(run: Path) -> str:
    result = train_reads(run).latest_checkpoint_result
    assert result is not None
    name = Path(result.checkpoint.path).name
    assert result.metrics == {"step": step_of(name), SCORE: SCORES[name]}
    return name


def test_what_is_not_on_record_is_removed(run):
    before = (run / SNAPSHOT).read_bytes()
    record.settle(Storage(run))
    assert folders(run) == [OLD, NEW]
    assert (run / SNAPSHOT).read_bytes() == before


def test_a_whole_checkpoint_newer_than_all_on_record_is_gone_on_from(run, caplog):
    """Whoever should have registered it was killed, or could not write. What else is on record stays there."""
    write(run / UNFINISHED)
    write(run / "step_000000006-d")  # older than the newest: workers that were lost before Train knew of it
    (run / OLD / PROBE).unlink()  # only the record knows its score
    caplog.set_level("INFO")
    record.settle(Storage(run))
    assert folders(run) == [OLD, NEW, UNFINISHED]
    assert newest(run) == UNFINISHED
    assert f"{UNFINISHED} is whole, and was not on record: the run goes on from it" in caplog.text
    assert "Removing step_000000006-d, which is not on record" in caplog.text
    train = train_reads(run)
    assert Path(train.best_checkpoint_results[-1].checkpoint.path).name == OLD
    assert [Path(each.path).name for each in train.get_pending_training_results()] == [NEW], "it waits to be judged"
    before = (run / SNAPSHOT).read_bytes()
    record.settle(Storage(run))
    assert (run / SNAPSHOT).read_bytes() == before


@pytest.mark.parametrize("torn", [False, True])
def test_what_comes_on_record_is_judged_if_it_was_to_be(run, torn: bool):
    """Who was lost had not told Train to. What has a note was judged."""
    write(run / UNFINISHED)
    write(run / "step_000000016-e")
    if torn:
        (run / SNAPSHOT).write_bytes(b"")
    record.settle(Storage(run), lambda step: step in (4, 8, 12))
    waiting = [Path(each.path).name for each in train_reads(run).get_pending_training_results()]
    assert waiting == [NEW, UNFINISHED]


def test_a_damaged_one_that_is_newer_is_removed(run):
    write(run / UNFINISHED)
    (run / UNFINISHED / WEIGHTS).write_bytes(b"damaged")
    record.settle(Storage(run))
    assert (folders(run), newest(run)) == ([OLD, NEW], NEW)


def test_an_empty_record_deletes_no_more_than_a_missing_one(run):
    (run / SNAPSHOT).unlink()
    record.make_again(Storage(run), [])
    assert not (run / SNAPSHOT).exists()
    (run / SNAPSHOT).write_bytes(b"")
    record.make_again(Storage(run), [])
    assert record.read(Storage(run)) == record.Record([], None)
    record.settle(Storage(run))
    assert (folders(run), newest(run)) == ([OLD, NEW], NEW)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize(("skipped", "wanted"), [([], NEW), ([9], UNFINISHED)])
def test_a_checkpoint_that_has_trained_on_a_bad_step_does_not_come_back(run, skipped, wanted, torn: bool):
    """Workers wrote it and were lost before Train knew; those after them met the bad step, and the run went back."""
    write(run / UNFINISHED, skipped=skipped)
    rewinds._write(Storage(run), [rewinds.Rewind(9, "non_finite", "", 10, 8, "")])
    if torn:
        (run / SNAPSHOT).write_bytes(b"")
    record.settle(Storage(run))
    assert newest(run) == wanted
    assert (UNFINISHED in folders(run)) == (wanted == UNFINISHED)


@pytest.mark.parametrize("name", [SNAPSHOT, rewinds.REWINDS])
def test_a_record_that_a_store_does_not_give_is_not_torn(run, name: str):
    before = (run / SNAPSHOT).read_bytes()

    class Away(Storage):
        def read_bytes(self, asked: str) -> bytes:
            if asked == name:
                raise UnreachableError("cannot read", found=asked)
            return super().read_bytes(asked)

    with pytest.raises(UnreachableError):
        record.settle(Away(run))
    assert (run / SNAPSHOT).read_bytes() == before
    assert folders(run) == [OLD, NEW, UNFINISHED]


def test_a_run_that_never_had_a_whole_checkpoint_begins_anew(run):
    for name in (SNAPSHOT, f"{OLD}/{STATE}", f"{NEW}/{STATE}"):
        (run / name).unlink()
    record.settle(Storage(run))
    assert folders(run) == []
    assert train_reads(run).latest_checkpoint_result is None


def test_whole_checkpoints_without_a_record_are_gone_on_from(run, caplog):
    """Those of bare torch, or of a launch that was killed before Train had registered the first."""
    (run / SNAPSHOT).unlink()
    record.settle(Storage(run))
    assert folders(run) == [OLD, NEW]
    assert newest(run) == NEW
    assert f"goes on from its newest whole checkpoint, {NEW}" in caplog.text


@pytest.mark.parametrize("kept", [0, 1, 40, 200])
def test_a_record_that_was_cut_short_is_made_again(run, kept: int, caplog):
    (run / SNAPSHOT).write_bytes((run / SNAPSHOT).read_bytes()[:kept])
    record.settle(Storage(run))
    assert folders(run) == [OLD, NEW]
    assert newest(run) == NEW
    assert f"goes on from its newest whole checkpoint, {NEW}" in caplog.text
    assert Path(train_reads(run).best_checkpoint_results[-1].checkpoint.path).name == OLD


def test_a_damaged_checkpoint_is_not_gone_on_from(run):
    (run / SNAPSHOT).write_bytes(b"")
    (run / NEW / WEIGHTS).write_bytes(b"damaged")
    record.settle(Storage(run))
    assert newest(run) == OLD


def test_a_record_of_folders_that_are_gone_is_made_again(run):
    Storage(run).delete(NEW)
    record.settle(Storage(run))
    assert newest(run) == OLD


def test_nothing_is_deleted_where_no_checkpoint_is_whole(run):
    (run / SNAPSHOT).write_bytes(b"{")
    for name in folders(run):
        (run / name / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole. Found: .*Allowed: .*maskray repair .*; restore"
    ):
        record.settle(Storage(run))
    assert folders(run) == [OLD, NEW, UNFINISHED]
