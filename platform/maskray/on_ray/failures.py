"""What a run died of: the user's mistake that one of its processes met, out of all that Ray wraps around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ray
import ray.train
from ray.train import ControllerError

from maskray.data.storage import Storage
from maskray.errors import MaskrayError, StorageError, TrainingError

# Under these names the errors of Ray keep what they are about.
_WRAPPED = ("__cause__", "__context__", "cause", "controller_failure", "_base_exc")


class StopAtMistakes(ray.train.UserCallback):
    """In Train's controller: a mistake would be met again, so the workers are not started again.

    A `StorageError` may be one of a bad minute, and counts among the failures.
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:  # noqa: ARG002
        """Raise it here, which ends the run."""
        for error in worker_exceptions.values():
            found = known(error)
            if isinstance(found, MaskrayError) and not isinstance(found, StorageError):
                raise found


def known(error: BaseException) -> MaskrayError | TrainingError | None:
    """The first error of ours below an error, as it was raised."""
    for cause in _causes(error, set()):
        # Ray raises a class made of its own and ours, whose text is a traceback; ours is its `cause`.
        if isinstance(cause, MaskrayError | TrainingError) and not isinstance(cause, ray.exceptions.RayTaskError):
            return cause
    return None


def lost_storage(error: BaseException) -> OSError | StorageError | None:
    """What ended Train's controller, where that is a request to the place of its record: its own are not tried again.

    None where it is something else.
    """
    if not any(isinstance(cause, ControllerError) for cause in _causes(error, set())):
        return None
    mistake = known(error)
    if mistake is not None:
        return mistake if isinstance(mistake, StorageError) else None
    return next((cause for cause in _causes(error, set()) if isinstance(cause, OSError)), None)


def of_record(lost: OSError | StorageError, run: Storage) -> StorageError:
    """What to tell of a record of Train's that could not be kept.

    Args:
        lost: as `lost_storage` finds it.
        run: folder of the run.
    """
    if isinstance(lost, StorageError):
        return lost
    return run.error("Ray Train could not keep its record of the checkpoints", lost, key="storage.path")


def how_lost(error: BaseException) -> str:
    """What became of an actor, in words."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "was ended by Ray's memory monitor, since its node is short of memory"
    unheard = isinstance(error, ray.exceptions.ActorUnavailableError)
    return "did not answer any more, and was ended" if unheard else "died"


def explained(error: BaseException, max_failures: int) -> Exception:
    """The user's mistake that a worker met, or what is known of how the workers were lost."""
    return known(error) or TrainingError(
        f"The workers failed more than {max_failures} times (cluster.max_failures), at last: {error}"
    )


def _causes(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    if id(error) in seen:
        return
    seen.add(id(error))
    yield error
    below = [getattr(error, name, None) for name in _WRAPPED]
    below += list(getattr(error, "worker_failures", {}).values())
    for cause in below:
        if isinstance(cause, BaseException):
            yield from _causes(cause, seen)
