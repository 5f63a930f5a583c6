"""The hook that waits for a probe, without a cluster: what it leaves out. The rest is in `integration`."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from maskray.credentials import Hidden
from maskray.data.storage import Storage
from maskray.evaluation import untold
from maskray.on_ray import probe
from maskray.on_ray.probe import Hook, Told, waiting_after
from maskray.training.folders import NO_SCORE, PROBE, SCORE, folder_name

STEPS = (4, 8, 12, 16)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which the checkpoints of all `STEPS` wait to be judged, by Train's own record."""
    run = tmp_path / "runs" / "digits-0123"

    async def register() -> None:
        config = CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE)
        train = CheckpointManager(config, StorageContext(str(run.parent), run.name))
        for step in STEPS:
            (run / name(step)).mkdir(parents=True)
            metrics = {"step": step, SCORE: NO_SCORE}
            train.register_checkpoint(_TrainingReport(Checkpoint(str(run / name(step))), metrics, validation=True))

    asyncio.run(register())
    return run


def name(step: int) -> str:
    return folder_name(step, "a")


class Board:
    """What an actor is to whoever calls it."""

    def __init__(self):
        self.warnings = []
        self.warn = self
        self.remote = self.warnings.append


def hook(run: Path, store, config) -> tuple[Hook, Board, str]:
    run_id = store.client().create_run(store.experiment_id).info.run_id
    board = Board()
    told = Told(Hidden(store.uri), run_id, board, Storage(run))
    return Hook(config.model_dump(mode="json"), told, None, pytest.fail), board, run_id


def test_train_keeps_all_that_wait(run: Path):
    assert [waiting_after(Storage(run), name(step)) for step in STEPS] == [3, 2, 1, 0]
    assert all((run / name(step)).exists() for step in STEPS)


def test_no_record_is_nothing_that_waits(tmp_path: Path):
    assert waiting_after(Storage(tmp_path), name(4)) == 0


def test_a_probe_is_left_out_and_noted_where_too_many_newer_ones_wait(run: Path, store, tiny):
    config = tiny(training={"checkpoint_steps": 4, "probe_steps": 4}, probe={"waiting": 2})
    left_out, board, run_id = hook(run, store, config)
    assert left_out(Checkpoint(str(run / name(4)))) == {}
    said = "The probe at step 4 came to nothing: left out, since 3 newer ones were waiting (probe.waiting)"
    assert board.warnings == [said]
    assert said in store.client().get_run(run_id).data.tags["mlflow.note.content"]


def test_what_mlflow_does_not_take_is_told_after_the_next_one(run: Path, store, tiny, monkeypatch):
    monkeypatch.setattr(probe, "_STORE_SECONDS", 0.2)
    noting, board, run_id = hook(run, store, tiny())
    away = replace(noting.told, tracking=Hidden("http://127.0.0.1:9"))
    replace(noting, told=away)._note(name(4), "one reason")
    (run / name(8) / PROBE).write_text('{"score": 0.5}')
    assert untold.names(Storage(run)) == [f"{name(4)}-note"]
    monkeypatch.undo()
    noting._note(name(8), "another reason")
    said = ["The probe at step 4 came to nothing: one reason"]
    said += ["The probe at step 8 has its scores, but did not end well: another reason"]
    assert board.warnings == said
    note = store.client().get_run(run_id).data.tags["mlflow.note.content"]
    assert all(note.count(each) == 1 for each in said)
    assert untold.names(Storage(run)) == []


@pytest.mark.parametrize("off", [{"training": {"probe_steps": None}}, {"probe": {"enabled": False}}])
def test_what_waits_from_a_launch_with_probes_is_dropped_by_one_without(run: Path, store, tiny, off: dict):
    dropped, board, _ = hook(run, store, tiny(**off))
    assert dropped(Checkpoint(str(run / name(16)))) == {}
    assert board.warnings == []
