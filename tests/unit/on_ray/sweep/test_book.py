"""Why a trial failed, in a sentence, out of what Ray makes of it."""

import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError

from maskray.errors import ConfigError, NonFiniteError
from maskray.on_ray.sweep.book import _error_of, reason_of, survive_lost_processes

HEAD = "Failure # 1 (occurred at 2026-11-26_07-58-30)\n"
DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: wrap_function.<locals>.ImplicitFunc
\tpid: 28856
The actor is dead because """
END_OF_FILE = (
    "its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
    "connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer"
)
OUT_OF_MEMORY = """OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 192.0.2.2, ID: 4c45) was 7.72GB used / 23.54GB limit (0.327957)
OOM kill reason: Memory usage 8239267840B exceeded threshold of 8214862848B (32.5% of 25276502016B limit)
Object store memory usage: [- objects spillable: 0
"""


def as_ray_has_it(error: Exception) -> str:
    """The text of an error that was raised in a task."""
    text = "".join(traceback.format_exception(error))
    return HEAD + str(RayTaskError("train", text, error))


def raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NonFiniteError("Not finite at step 2. What to do: look."), "Not finite at step 2. What to do: look."),
        (ConfigError("no room", key="a.b", found="x"), "a.b: no room. Found: x."),
        (ValueError("planted: on purpose"), "ValueError: planted: on purpose"),
        (ValueError("one line\nkey: another\n  a third"), "ValueError: one line key: another a third"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
    ],
)  # fmt: skip
def test_an_error_that_was_raised(error: Exception, reason: str):
    assert reason_of(as_ray_has_it(raised(error))) == reason


def test_an_error_that_was_raised_for_another():
    def both() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise NonFiniteError("the second") from error

    with pytest.raises(NonFiniteError) as caught:
        both()
    assert reason_of(as_ray_has_it(caught.value)) == "the second"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DIED + END_OF_FILE, "its process died: killed, out of memory, or ended by itself"),
        (DIED + "it was killed by `ray.kill`.", "its process was ended by ray.kill"),
        (DIED + "its node has died. Node Id: 4c45", "its node died"),
        (OUT_OF_MEMORY, "out of memory: 7.72GB of its node's 23.54GB, and Ray's memory monitor ended it"),
        (DIED + OUT_OF_MEMORY, "out of memory: 7.72GB of its node's 23.54GB, and Ray's memory monitor ended it"),
        ("WorkerCrashedError: The worker died unexpectedly.", "WorkerCrashedError: The worker died unexpectedly."),
        ("Something more\n  else.", f"{HEAD.strip()} Something more else."),
    ],
)  # fmt: skip
def test_a_process_that_was_lost(text: str, reason: str):
    assert reason_of(HEAD + text) == reason


def test_nothing_is_known():
    assert reason_of("") == "unknown"


def test_what_tune_does_not_know_is_an_error_of_the_process(monkeypatch: pytest.MonkeyPatch):
    heard: list[Exception] = []
    monkeypatch.setattr(RayActorManager, "_actor_task_failed", lambda _self, _task, error: heard.append(error))
    survive_lost_processes()
    survive_lost_processes()  # once is enough
    for error in (
        OutOfMemoryError("1 worker(s) were killed"),
        ActorDiedError(),
        RayTaskError("f", "text", ValueError()),
    ):
        RayActorManager._actor_task_failed(None, None, error)
    lost, died, raised = heard
    assert type(lost) is RayActorError
    assert str(lost) == "OutOfMemoryError: 1 worker(s) were killed"
    assert isinstance(died, ActorDiedError)
    assert isinstance(raised, RayTaskError)


def test_what_is_kept_of_an_error_has_no_password(tmp_path: Path):
    """MLflow's own say its whole URI, also where they are the cause of one of ours."""

    def both() -> None:
        try:
            raise MlflowException("API request to http://me:s3cret@host:5000/api failed")
        except MlflowException as error:
            raise NonFiniteError("the second") from error

    with pytest.raises(NonFiniteError) as caught:
        both()
    (tmp_path / "error.txt").write_text(as_ray_has_it(caught.value))
    kept = _error_of(SimpleNamespace(error_file=str(tmp_path / "error.txt")))
    assert "API request to http://***@host:5000/api failed" in kept
    assert "s3cret" not in kept
    assert reason_of(kept) == "the second"
