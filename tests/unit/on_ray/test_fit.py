"""How many losses a run survives. Trainers are doubles here: what each is lost to, and how far it had got."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2.api.exceptions import ControllerError

from maskray.data.storage import Storage
from maskray.errors import DataError, StorageError, TrainingError
from maskray.on_ray import fit, record
from maskray.training.checkpoint import Facts, HostCopy

LOST_WORKERS = WorkerGroupError("killed", {0: RuntimeError("killed")})
"""As Train raises it after it has started them again as often as it may."""
LOST_CONTROLLER = ActorDiedError()
OUT_OF_MEMORY = OutOfMemoryError("Task was killed due to the node running low on memory")
UNHEARD = ActorUnavailableError("RpcError", None)
LOST_CONTROLLERS = [LOST_CONTROLLER, OUT_OF_MEMORY, UNHEARD]
LOST_RECORD = ControllerError(OSError(28, "No space left on device"))


class Course(NamedTuple):
    """A trainer's: the step of its last checkpoint, if it gets to one, and how it ends."""

    step: int
    end: Exception | None


@dataclass
class Trainer:
    """As `fitted` knows one of Train's."""

    run: Path
    course: Course
    is_cleared: bool = False

    def clear(self) -> None:
        self.is_cleared = True

    def fit(self) -> Any:
        if self.course.step:
            folder = self.run / f"step_{self.course.step:09d}-a"
            folder.mkdir(exist_ok=True)
            model, facts = torch.nn.Linear(2, 2), Facts(self.course.step, "0123", 1, 1, {}, [])
            HostCopy(model, torch.optim.AdamW(model.parameters()), facts, "name: x").write(folder)
            names = sorted(each.name for each in self.run.glob("step_*"))
            record.make_again(Storage(self.run), names, record.nothing_is_judged)
        if self.course.end is not None:
            raise self.course.end
        return SimpleNamespace(return_value="done")


@pytest.fixture
def fitted(tmp_path: Path) -> Callable[..., Any]:
    run = tmp_path / "x-0123"
    run.mkdir()

    def go(max_failures: int, *courses: Course) -> Any:
        coming: Iterator[Course] = iter(courses)
        result = fit.fitted(lambda: Trainer(run, next(coming)), Storage(run), max_failures)
        assert next(coming, None) is None
        return result

    return go


@pytest.mark.parametrize("loss", [*LOST_CONTROLLERS, LOST_RECORD])
def test_losses_without_progress_are_counted(fitted, loss: Exception):
    assert fitted(2, Course(0, loss), Course(0, loss), Course(0, None)) == "done"
    with pytest.raises((TrainingError, StorageError)):
        fitted(2, *[Course(0, loss)] * 3)


@pytest.mark.parametrize("loss", LOST_CONTROLLERS)
def test_what_is_left_of_a_lost_controller_is_cleared_before_the_next_start(tmp_path: Path, loss: Exception):
    """One that Ray does not hear of may live, and would write the same record."""
    made: list[Trainer] = []

    def make() -> Trainer:
        assert all(each.is_cleared for each in made)
        made.append(Trainer(tmp_path, Course(0, None if made else loss)))
        return made[-1]

    fit.fitted(make, Storage(tmp_path), 1)
    assert [each.is_cleared for each in made] == [True, False]


def test_the_memory_monitor_is_named(fitted):
    with pytest.raises(TrainingError, match=r"memory monitor.*running low on memory"):
        fitted(0, Course(0, OUT_OF_MEMORY))


def test_a_record_that_cannot_be_kept_is_not_laid_on_the_workers(fitted):
    with pytest.raises(StorageError, match="could not keep its record") as caught:
        fitted(0, Course(0, LOST_RECORD))
    assert caught.value.key == "storage.path"
    assert caught.value.fix == "free some space, or take a folder on another disk"
    assert "No space left" in str(caught.value.found)
    assert "worker" not in str(caught.value)


def test_trains_own_count_is_not_added_to(fitted):
    with pytest.raises(TrainingError, match="more than 2 times"):
        fitted(2, Course(0, LOST_WORKERS))


@pytest.mark.parametrize("loss", [LOST_WORKERS, *LOST_CONTROLLERS])
def test_whoever_gets_further_survives_as_many_again(fitted, caplog, loss: Exception):
    assert fitted(1, Course(4, loss), Course(8, loss), Course(12, loss), Course(16, None)) == "done"
    assert sum("starting again" in message for message in caplog.messages) == 3, "each is said"


def test_none_are_survived_where_none_may_be(fitted):
    for loss in (LOST_WORKERS, *LOST_CONTROLLERS):
        with pytest.raises(TrainingError):
            fitted(0, Course(4, loss))


def test_the_same_checkpoint_is_no_progress(fitted):
    with pytest.raises(TrainingError, match="more than 1 times"):
        fitted(1, Course(4, LOST_WORKERS), Course(4, LOST_WORKERS))


def test_a_mistake_ends_it(fitted):
    mistake = DataError("a shard is damaged", key="data.path", fix="ingest again")
    with pytest.raises(DataError, match="a shard is damaged"):
        fitted(3, Course(4, WorkerGroupError("", {0: mistake})))
