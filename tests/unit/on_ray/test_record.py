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
from maskray.errors import CheckpointError
from maskray.on_ray import record
from maskray.on_ray.stream import SNAPSHOT
from maskray.training.checkpoint import STATE, WEIGHTS, Facts, HostCopy
from maskray.training.folders import FOLDER_PREFIX, NO_SCORE, PROBE, SCORE, step_of

OLD, NEW, UNFINISHED = "step_000000004-a", "step_000000008-b", "step_000000012-c"
SCORES = {OLD: 0.75, NEW: NO_SCORE}


def train_reads(run: Path) -> CheckpointManager:
    """Train's record, as its controller opens it at a start."""
    config = CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SCORE)
    return CheckpointManager(config, StorageContext(str(run.parent), run.name))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints on record, and one whose upload was killed before its last file."""
    run = tmp_path / "runs" / "digits-0123"
    for name in (OLD, NEW, UNFINISHED):
        (run / name).mkdir(parents=True)
        model = torch.nn.Linear(2, 2)
        facts = Facts(step_of(name), "0123", 1, 1, {}, [])
        HostCopy(model, torch.optim.AdamW(model.parameters()), facts, "name: digits").write(run / name)
    (run / UNFINISHED / STATE).unlink()
    (run / OLD / PROBE).write_text(json.dumps({"score": SCORES[OLD]}))

    async def register() -> None:
        train = train_reads(run)
        for name in (OLD, NEW):
            metrics = {"step": step_of(name), SCORE: SCORES[name]}
            train.register_checkpoint(_TrainingReport(Checkpoint(str(run / name)), metrics, validation=False))

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
