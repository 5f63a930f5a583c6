"""What is made of an error that has come through Ray's processes."""

import pickle

import pytest
import ray.cloudpickle
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError

from maskray.errors import DataError, StorageError, TrainingError, UnreachableError
from maskray.on_ray.failures import StopAtMistakes, explained, known, lost_storage

MISTAKE = DataError("a shard is damaged", key="data.path", fix="ingest again")


def through_a_task(error: Exception) -> Exception:
    """As `ray.get` and a worker of Train's pass it on."""
    dual = RayTaskError("load", "Traceback (most recent call last): …", error, "task", 1, "::1").as_instanceof_cause()
    assert isinstance(dual, type(error))
    passed_on = ray.cloudpickle.loads(ray.cloudpickle.dumps(UserExceptionWithTraceback(dual, "Traceback …")))
    assert isinstance(passed_on, Exception)
    return passed_on


def test_a_mistake_is_found_as_it_was_raised():
    failed = WorkerGroupError("", {0: RuntimeError("gloo: peer closed"), 1: through_a_task(MISTAKE)})
    found = explained(failed, 3)
    assert type(found) is DataError
    assert str(found) == str(MISTAKE)


def test_a_mistake_ends_the_run():
    with pytest.raises(DataError) as caught:
        StopAtMistakes().after_exception(None, {0: RuntimeError("gloo"), 1: through_a_task(MISTAKE)})
    ended = pickle.loads(pickle.dumps(ControllerError(caught.value)))
    assert str(known(ended)) == str(MISTAKE)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), StorageError("cannot read"), TrainingError("odd")])
def test_what_may_pass_is_tried_again(error: Exception):
    StopAtMistakes().after_exception(None, {0: through_a_task(error)})


@pytest.mark.parametrize(
    ("failure", "is_storage"),
    [
        (OSError(28, "No space left on device"), True),
        (UnreachableError("cannot read s3://bucket/x"), True),
        (MISTAKE, False),
        (RuntimeError("odd"), False),
    ],
)
def test_a_controller_that_could_not_keep_its_record_is_started_again(failure: Exception, is_storage: bool):
    ended = pickle.loads(pickle.dumps(ControllerError(failure)))
    assert (lost_storage(ended) is not None) == is_storage
    assert lost_storage(WorkerGroupError("", {0: failure})) is None, "Train itself starts workers again"


def test_workers_that_were_lost_are_said_to_be():
    found = explained(WorkerGroupError("killed", {0: RuntimeError("killed")}), 3)
    assert type(found) is TrainingError
    assert "more than 3 times (cluster.max_failures)" in str(found)
