"""A sweep's book: who runs, and what came of each. All that Ray Tune is told of a sweep, it is told from here.

What is next and who goes on is decided by `sweeps`, on files of the sweep's own; what came of a trial is on record, and
in MLflow, before Tune gives its place to another.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from maskray.config.load import written
from maskray.credentials import shown
from maskray.errors import AwayError, MaskrayError
from maskray.on_ray.sweep.context import newest_step
from maskray.on_ray.sweep.trial import ASKED, BEATS, ENDED, RUNG, STEP, VALUE, Asked, Sweep
from maskray.publish.release import training_seconds
from maskray.sweeping.preparing import Prepared
from maskray.sweeps import record
from maskray.sweeps.record import Result
from maskray.sweeps.search import Queue
from maskray.sweeps.stopping import Ladder, Rung, rungs
from maskray.tracking import mlflow_runs
from maskray.tracking.patience import Patience
from maskray.training.throughput import IMAGES_PER_SECOND

log = logging.getLogger(__name__)

Show = Callable[[Result, Counter[str]], None]
"""Told of each trial that has ended, and how many have ended how."""
M = TypeVar("M", bound=Callable[..., Any])

START_SECONDS = 60.0
"""What a trial may be silent for beyond its limit, before its first word: its process may be new."""
_STARTS = 3  # of a trial whose process was lost before it began
_OWN_SECONDS = 1.0  # Tune looks at its callbacks several times a second, where nothing holds it up
_GONE_SECONDS = 5.0
_FRAME = '\n  File "'
_ERROR = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*)(?:: |$)", re.MULTILINE)  # after the last frame of a traceback
_AWAY = f"{AwayError.__module__}.{AwayError.__qualname__}"
_MEMORY = re.compile(r"Memory on the node .* was (?P<used>\S+) used / (?P<limit>\S+) limit")
_LOSSES = {
    "its node has died": "its node died",
    "killed by `ray.kill`": "its process was ended by ray.kill",
    "worker process has died": "its process died: killed, out of memory, or ended by itself",
}


class NotKept:
    """What Tune is given it pickles, into snapshots that nobody reads: there is nothing in them."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


@dataclass
class _Out:
    """A trial that was given out, and has not ended."""

    asked: Asked
    heard: float | None = None
    """When it was heard of last, by `time.monotonic`; None: it has no process yet."""
    has_begun: bool = False
    is_hung: bool = False


class Closed(Exception):  # noqa: N818
    """What ends Tune, once the book is closed."""


def _kept(method: M) -> M:
    """For what Tune calls, which raises once the book is closed. An error is kept, of which Tune has but a text."""

    @functools.wraps(method)
    def call(self: Book, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            if self.is_closed:
                raise Closed
            try:
                return method(self, *arguments, **options)
            except Exception as error:
                self.error = error
                raise

    return call  # type: ignore[return-value]


class Book(NotKept, tune.Callback):
    """Who runs, and what came of each.

    Args:
        prepared: the sweep.
        sweep: as the trials know it.
        queue: what is next.
        concurrency: trials at once.
        show: told of each trial that ends.
    """

    def __init__(self, prepared: Prepared, sweep: Sweep, queue: Queue, concurrency: int, show: Show) -> None:
        self._prepared, self._sweep, self._queue = prepared, sweep, queue
        self._concurrency, self._show = concurrency, show
        config = prepared.config
        self._ladder = Ladder(config.stopping, config.objective.direction, prepared.folder)
        self._ended = Counter[str](result.status for result in prepared.results.values() if result.status != "failed")
        self._out: dict[str, _Out] = {}  # by Tune's id
        self._again: deque[Asked] = deque()
        self._lost = Counter[str]()
        self._tunes: Sequence[TuneTrial] = ()
        self._looked = time.monotonic()
        self._mlflow = Patience(sweep.store.uri, 0)  # while this thread waits for it, trials wait for this thread
        self.lock, self.is_closed = threading.RLock(), False
        self.error: Exception | None = None
        """That a call of Tune's met, and after which nothing was put on record."""

    # ------------------------------------------------------------------------------------------------ who, and how far

    @_kept
    def ask(self, trial_id: str) -> Asked | None:
        """The trial that is next, under Tune's id; None: none is, now."""
        if len(self._out) >= self._concurrency:
            return None
        asked = self._again.popleft() if self._again else self._next()
        if asked is not None:
            self._out[trial_id] = _Out(asked)
        return asked

    @property
    def is_done(self) -> bool:
        """Whether there will be no more. While trials are out there may be: they come back where they cannot begin."""
        return not self._out and not self._again and self._queue.is_done

    @_kept
    def goes_on(self, asked: Asked, step: int, value: float) -> bool:
        """Whether a trial goes on that has come to a rung."""
        return self._ladder.goes_on(asked.trial.key, self._rung(asked, step).index, value)

    def close(self) -> None:
        """End the processes of trials, and note nothing of it: they have neither failed nor been pruned.

        Those that are starting begin no trial, and end with Tune, which is not waited for.
        """
        with self.lock:
            self.is_closed = True
        running = [each.temporary_state.ray_actor for each in self._tunes if each.trial_id in self._out]
        actors = [actor for actor in running if actor is not None]
        for actor in actors:
            ray.kill(actor)
        for actor in actors:  # while one is there it may tell MLflow that it runs
            with contextlib.suppress(RayError):
                ray.get(actor.get_current_ip_pid.remote(), timeout=_GONE_SECONDS)

    def _next(self) -> Asked | None:
        found = self._queue.next()
        if found is None:
            return None
        if found.key in self._prepared.results:  # it failed: from now on it has not ended
            self._sweep.folder_of(found).delete(record.RESULT)
        probe_at = [rung.step for rung in rungs(self._prepared.config.stopping, found)]
        return Asked(found, written(self._prepared.space.run_config(found, probe_at)))

    def _rung(self, asked: Asked, step: int) -> Rung:
        return next(each for each in rungs(self._prepared.config.stopping, asked.trial) if each.step == step)

    # ------------------------------------------------------------------------------------------------- what Tune calls

    @_kept
    def on_trial_start(self, *, trial: TuneTrial, **_: Any) -> None:
        """It may be silent for so long, and while its process starts."""
        out = self._out[trial.trial_id]
        out.has_begun, out.heard = True, time.monotonic() + START_SECONDS

    @_kept
    def on_trial_result(self, *, trial: TuneTrial, **_: Any) -> None:
        """A sign of life. It takes nothing of what a start may last."""
        out = self._out[trial.trial_id]
        out.heard = max(out.heard or 0.0, time.monotonic())

    @_kept
    def on_step_begin(self, *, trials: Sequence[TuneTrial], **_: Any) -> None:
        """End those that are silent for too long: in sleep, or with the interpreter's lock held.

        Tune looks only at trials that speak. Nor does it say that it gave one up because the process that it was to
        have did not let go of the one before.
        """
        self._tunes, now = trials, time.monotonic()
        # What held up this thread, which hears of trials, was none of their silence.
        deaf, self._looked = max(0.0, now - self._looked - _OWN_SECONDS), now
        # A sign of life may be as old as the time between two, when the silence begins.
        limit = self._sweep.limit_seconds * (1 + 1 / BEATS)
        for each in trials:
            out, actor = self._out.get(each.trial_id), each.temporary_state.ray_actor
            if out is None or out.is_hung:
                continue
            if each.status == TuneTrial.ERROR:
                self._give_back(each.trial_id)
            elif actor is not None:
                out.heard = now if out.heard is None else out.heard + deaf
                if now - out.heard > limit:
                    out.is_hung = True
                    ray.kill(actor)

    @_kept
    def on_trial_complete(self, *, trial: TuneTrial, **_: Any) -> None:
        """It has finished, or was stopped at a rung."""
        asked, last = self._out[trial.trial_id].asked, trial.last_result
        if last.get(ENDED):
            result = self._on_record(asked)
            assert result is not None, "it is written before Tune is told"
        else:
            rung = self._rung(asked, last[STEP])
            reason = f"pruned at rung {rung.index}, step {rung.step} of {asked.trial.steps}"
            result = self._closed(asked, "pruned", rung.step, last[VALUE], reason)
        self._note(trial.trial_id, result)

    @_kept
    def on_trial_error(self, *, trial: TuneTrial, **_: Any) -> None:
        """It has failed, and says why as well as it is known. What is on record counts: it may have finished first."""
        out = self._out[trial.trial_id]
        result = self._on_record(out.asked)
        if result is not None and result.status != "failed":
            finished = result.status == "finished"
            self._tell_mlflow(out.asked, "FINISHED" if finished else "KILLED", result.reason)
        elif (found := _found_in(_error_of(trial))) is not None and found[0] == _AWAY:
            raise AwayError(found[1])  # the next trial would wait as long, and hold what a trial takes
        elif out.has_begun or self._lost[out.asked.trial.key] >= _STARTS - 1:
            result = self._failed(trial, out)
        else:
            self._give_back(trial.trial_id)
            return
        self._note(trial.trial_id, result)

    def _give_back(self, trial_id: str) -> None:
        """A trial that has not begun: it is the next one to be asked for."""
        asked = self._out.pop(trial_id).asked
        log.warning("%s: the process that it was to have was lost; it gets another", asked.trial.name)
        self._lost[asked.trial.key] += 1
        self._again.append(asked)

    # ------------------------------------------------------------------------------------------------ what came of them

    def _failed(self, failed: TuneTrial, out: _Out) -> Result:
        text, limit = _error_of(failed), self._sweep.limit_seconds
        reason = f"hung: silent for more than {limit:g} s (trials.limit_seconds)" if out.is_hung else reason_of(text)
        folder = self._sweep.folder_of(out.asked.trial)
        folder.write_bytes(record.ERROR, text.encode())
        told = failed.last_result.get(STEP, 0) if failed.has_reported_at_least_once else 0
        return self._closed(out.asked, "failed", max(int(told), newest_step(folder)), None, reason, text)

    def _closed(
        self, asked: Asked, status: record.Status, steps: int, value: float | None, reason: str, error: str = ""
    ) -> Result:
        """Of a trial that cannot close its books itself: on record, and in MLflow."""
        run_id, seconds = self._tell_mlflow(asked, "KILLED" if status == "pruned" else "FAILED", reason, error)
        result = Result(asked.trial, status, steps, seconds, value, run_id=run_id, reason=reason)
        self._sweep.folder_of(asked.trial).write_bytes(record.RESULT, result.dump())
        return result

    def _tell_mlflow(
        self, asked: Asked, status: mlflow_runs.Ended, reason: str, error: str = ""
    ) -> tuple[str | None, float]:
        """Id and seconds of the trial's run; None and 0 where MLflow does not answer: the sweep's end tells it."""
        store = self._sweep.store

        def tell() -> tuple[str, float]:
            run_id = mlflow_runs.find_run(store, self._sweep.fingerprint_of(asked.trial)) or self._sweep.run_of(asked)
            mlflow_runs.close_run(store, run_id, status, reason)
            if error:
                mlflow_runs.keep_text(store, run_id, record.ERROR, error)
            rate = mlflow_runs.points(store, run_id, IMAGES_PER_SECOND)
            return run_id, training_seconds(rate, asked.config["optim"]["global_batch"])

        try:
            return self._mlflow.call(tell)
        except MaskrayError as away:
            log.warning("%s, of which MLflow is told at the sweep's end: %s", asked.trial.name, away)
            return None, 0.0

    def _on_record(self, asked: Asked) -> Result | None:
        folder = self._sweep.folder_of(asked.trial)
        try:
            return Result.load(folder.read_bytes(record.RESULT), folder.join(record.RESULT))
        except FileNotFoundError:
            return None

    def _note(self, trial_id: str, result: Result) -> None:
        del self._out[trial_id]
        self._queue.tell(result)
        self._ended[result.status] += 1
        self.error = None  # if there was one, it is over
        self._show(result, self._ended)


class Asking(NotKept, Searcher):
    """Tune's view of what is next."""

    def __init__(self, book: Book) -> None:
        super().__init__()
        self._book = book

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """There is no space but ours."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's config."""
        asked = self._book.ask(trial_id)
        if asked is not None:
            return {ASKED: asked.dump()}
        return Searcher.FINISHED if self._book.is_done else None

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """The book knows."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see `NotKept`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `NotKept`."""


class Deciding(NotKept, FIFOScheduler):
    """Tune's view of who goes on."""

    def __init__(self, book: Book) -> None:
        super().__init__()
        self._book = book

    def on_trial_result(self, _: Any, trial: TuneTrial, result: Mapping[str, Any]) -> str:
        """Stop it, or not."""
        if RUNG not in result or result.get(ENDED):
            return str(TrialScheduler.CONTINUE)
        goes_on = self._book.goes_on(Asked.load(trial.config[ASKED]), result[RUNG], result[VALUE])
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)


# ------------------------------------------------------------------------------------------------------- why one failed


def _error_of(failed: TuneTrial) -> str:
    """What Tune wrote of an error, on the driver's disk. MLflow's own errors say its whole URI."""
    try:
        return shown(Path(failed.error_file).read_text())
    except (OSError, TypeError):
        return ""


def reason_of(text: str) -> str:
    """What an error of a trial comes to, in a sentence or two, out of all that Ray wraps around it.

    Args:
        text: as Tune writes it: a traceback, or how the process was lost.
    """
    if memory := _MEMORY.search(text):
        return f"out of memory: {memory['used']} of its node's {memory['limit']}, and Ray's memory monitor ended it"
    if (found := _found_in(text)) is not None:
        kind, message = found
        # Ours say all that there is to say.
        return message if kind.startswith("maskray.errors.") else f"{kind.rpartition('.')[2]}: {message}".rstrip(": ")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return next((why for line in lines for sign, why in _LOSSES.items() if sign in line), " ".join(lines) or "unknown")


def _found_in(text: str) -> tuple[str, str] | None:
    """Kind and message of the error below a traceback's last frame."""
    _, _, end = text.rpartition(_FRAME)
    found = _ERROR.search(end)
    return None if found is None else (found["kind"], " ".join(end[found.end() :].split()))


def survive_lost_processes() -> None:
    """Have Tune record a trial that Ray's memory monitor ended, as any other that failed.

    As shipped (2.60) it knows two kinds of errors of a trial's process. An `OutOfMemoryError` is neither, and ends the
    whole sweep with `RuntimeError: Caught unexpected exception`.
    """
    as_shipped = RayActorManager._actor_task_failed
    if getattr(as_shipped, "survives", False):
        return

    def actor_task_failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        as_shipped(self, tracked_actor_task, exception)

    actor_task_failed.survives = True  # type: ignore[attr-defined]
    RayActorManager._actor_task_failed = actor_task_failed
