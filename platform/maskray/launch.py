"""A run that is prepared to its registered encoder, whoever trains it: lease, MLflow run, training, judgement, release.

The launcher does what differs between Ray and bare torch.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from maskray.config.load import dump, written
from maskray.config.schema import RunConfig
from maskray.data import lease
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, MaskrayError, TrackingError
from maskray.evaluation import untold
from maskray.evaluation.judgement import Judgement, Scores, Verdict, first_images
from maskray.evaluation.logistic import Accuracy
from maskray.preparing import DATASET, FINISHED, Prepared
from maskray.publish.release import TrainedRun, release
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_runs import DatasetCard, RunCard
from maskray.tracking.mlflow_store import shown
from maskray.tracking.mlflow_tracker import MlflowTracker
from maskray.training import rewinds
from maskray.training.rewinds import Rewind

log = logging.getLogger(__name__)

LAUNCHER = "launcher"
"""In a run's folder: the name of who trains it."""
HOST_TAG = "maskray.host"
_TELL_SECONDS, _UNTOLD_SECONDS = 10.0, 30.0
_SUMMARY_VERSION = 2


class Launcher(Protocol):
    """Who trains."""

    name: str
    """Kept in the run's folder: the checkpoints of one launcher are not on the other's record."""

    def preflight(self, prepared: Prepared) -> None:
        """Refuse what cannot work here."""
        ...

    def train(self, prepared: Prepared, run_id: str) -> None:
        """Train to the end, through whatever can be survived.

        Raises:
            BadStepError: of a step: the run may go on without it.
        """
        ...

    def newest_step(self, prepared: Prepared) -> int:
        """Steps done at the run's newest checkpoint; 0 where there is none."""
        ...

    def newest_checkpoint(self, prepared: Prepared) -> AbstractContextManager[Path]:
        """The run's newest checkpoint as a folder on this machine."""
        ...

    def judge(self, prepared: Prepared) -> Verdict | None:
        """The last judgement, on the hardware of a worker."""
        ...


@dataclass(frozen=True)
class Summary:
    """What is said at the end, and again when a finished run is launched."""

    run_name: str
    run_id: str
    tracking_uri: str
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    judgement: Judgement | None
    model_name: str
    model_version: str
    already_finished: bool = False

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps({"schema_version": _SUMMARY_VERSION, **asdict(self)}, indent=1).encode()

    @staticmethod
    def load(content: bytes) -> Summary:
        """From JSON, of a run that was finished before.

        Raises:
            ValueError: no JSON, or of another schema version.
            LookupError, TypeError: not as it was written.
        """
        raw = json.loads(content)
        if (version := raw.pop("schema_version")) != _SUMMARY_VERSION:
            raise ValueError(f"schema version {version}, where this version of maskray reads {_SUMMARY_VERSION}")
        judged = raw["judgement"]
        if judged is not None:
            for name in (n for n in ("before", "after", "pixels") if judged[n] is not None):
                judged[name] = Scores(**judged[name] | {"few_labels": Accuracy(*judged[name]["few_labels"])})
            raw["judgement"] = Judgement(**judged)
        return Summary(**(raw | {"already_finished": True}))

    @staticmethod
    def unknown(prepared: Prepared) -> Summary:
        """Of a run that was finished before and whose own summary cannot be read."""
        name, steps, uri = prepared.plan.run_name, prepared.plan.total_steps, shown(prepared.store.uri)
        nan = float("nan")
        return Summary(name, "unknown", uri, steps, nan, nan, nan, None, "unknown", "unknown", already_finished=True)

    @property
    def is_known(self) -> bool:
        """Whether there is more to say than that the run is finished."""
        return not math.isnan(self.seconds)


def finished(prepared: Prepared) -> Summary | None:
    """What a run that has ended said at its end; None where it has not."""
    try:
        return Summary.load(prepared.run.read_bytes(FINISHED))
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        place = prepared.run.join(FINISHED)
        log.warning("The run is finished, but %s cannot be read (see `maskray repair`): %r", place, error)
        return Summary.unknown(prepared)


def refuse_if_running(prepared: Prepared) -> None:
    """A look before a cluster is started; `launch` makes sure of it.

    Raises:
        RunConflictError: another launch has the run.
    """
    lease.refuse_if_held(prepared.run, prepared.plan.run_name)


def launch(prepared: Prepared, launcher: Launcher) -> Summary:
    """Run to the end: train (or go on), judge, register.

    Raises:
        MaskrayError: a check failed, before anything was started.
        TrainingError: the run itself went wrong.
    """
    # The lease comes first: what the launcher waits for may be what the run itself holds.
    with lease.hold(prepared.run, prepared.plan.run_name) as held:
        done = finished(prepared)  # by the launch that had the lease until now
        if done is not None:
            return done
        config = rewinds.in_force(prepared.config, rewinds.read(prepared.run))
        prepared = replace(prepared, config=config)
        launcher.preflight(prepared)
        _keep_to(launcher, prepared)
        prepared.run.write_bytes(DATASET, prepared.dataset.manifest.fingerprint.encode())
        with _tracked(prepared, held) as run_id:
            start = time.monotonic()
            prepared = _trained(prepared, launcher, run_id)
            seconds = time.monotonic() - start
            _tell_what_probes_found(prepared, run_id)
            verdict = launcher.judge(prepared) if prepared.config.probe.enabled else None
            if verdict is not None:
                _tell(prepared, run_id, verdict)
            summary = _release(prepared, launcher, run_id, verdict and verdict.judgement, seconds)
        # Last of all: a launch that is killed before it does what is left again, and all of that can be done twice.
        prepared.run.write_bytes(FINISHED, summary.dump())
        return summary


def _trained(prepared: Prepared, launcher: Launcher, run_id: str) -> Prepared:
    """The run, with all steps that it was trained without."""

    def train(config: RunConfig) -> None:
        launcher.train(replace(prepared, config=config), run_id)

    tell, newest_step = partial(_tell_rewinds, prepared, run_id), partial(launcher.newest_step, prepared)
    return replace(prepared, config=rewinds.until_trained(prepared.config, prepared.run, train, newest_step, tell))


def _tell_what_probes_found(prepared: Prepared, run_id: str) -> None:
    """What MLflow had not taken by the way: before the last judgement, since it takes steps in their order.

    Raises:
        TrackingError: it does not take it now.
    """
    if not untold.tell(prepared.run, lambda: MlflowTracker(prepared.store.uri, run_id), _UNTOLD_SECONDS):
        raise unstored_metrics()


def _tell_rewinds(prepared: Prepared, run_id: str, known: Sequence[Rewind]) -> None:
    """To MLflow, which drops what it has; where it is away, it is told again when the run goes back or is taken up."""
    if known:
        tracker = MlflowTracker(prepared.store.uri, run_id)
        for rewind in known:
            tracker.event("rewind", rewind.text())
        skipped = rewinds.in_force(prepared.config, known).training.skip_steps
        tracker.tag("setting.training.skip_steps", json.dumps(skipped))
        tracker.close(_TELL_SECONDS)


def _keep_to(launcher: Launcher, prepared: Prepared) -> None:
    try:
        before = prepared.run.read_bytes(LAUNCHER).decode()
    except FileNotFoundError:
        prepared.run.write_bytes(LAUNCHER, launcher.name.encode())
        return
    if before != launcher.name:
        raise CheckpointError(
            "the run was begun by the other launcher, whose checkpoints this one has no record of",
            key="--launcher",
            found=launcher.name,
            allowed=before,
            fix=f"go on with --launcher {before}, hand it over by `maskray repair {prepared.run.uri} "
            f"--launcher {launcher.name}`, or start a run of another name with init_from",
        )


def unstored_metrics() -> TrackingError:
    """For a run that is trained, and some of whose metrics MLflow has not taken: the run stays open until it has."""
    return TrackingError(
        "the run is trained, but MLflow has not taken all of its metrics",
        key="tracking.uri",
        fix="see to MLflow, and run the same command again: it stores what is missing and goes on",
    )


@contextmanager
def _tracked(prepared: Prepared, held: lease.Lease) -> Iterator[str]:
    """The run's one MLflow run, whose status is true at the end: FINISHED, FAILED or KILLED."""
    store = prepared.store
    mlflow_runs.reconcile(store, lambda tags: is_abandoned(tags, prepared.plan.fingerprint))
    run_id = mlflow_runs.ensure_run(store, card(prepared))
    try:
        yield run_id
    except BaseException as error:
        if held.lost_to is not None:  # the run goes on, in other hands
            raise
        try:
            if isinstance(error, Exception):
                mlflow_runs.close_run(store, run_id, "FAILED", str(error))
            else:
                mlflow_runs.close_run(store, run_id, "KILLED", "interrupted")
        except TrackingError as away:  # what ended the run is what the user must hear of
            log.warning("%s", away)
        raise
    mlflow_runs.close_run(store, run_id, "FINISHED")


def card(prepared: Prepared) -> RunCard:
    """What MLflow is told of a run when it starts."""
    config, plan, manifest = prepared.config, prepared.plan, prepared.dataset.manifest
    place = prepared.dataset.storage.uri
    settings, params = mlflow_runs.flatten(written(config)), mlflow_runs.flatten(plan.identity)
    return RunCard(
        name=plan.run_name,
        fingerprint=plan.fingerprint,
        params=plan.identity,
        tags={
            **{f"setting.{k}": v for k, v in settings.items() if k not in params and v != "null"},
            **prepared.code,
            "maskray.storage": prepared.run.uri,
            HOST_TAG: socket.gethostname(),
        },
        config_yaml=dump(config),
        dataset=DatasetCard(Path(place).name, place, manifest.fingerprint, prepared.dataset.num_rows()),
        description=f"{plan.total_steps} steps of {plan.global_batch} images of `{place}`",
    )


def is_abandoned(tags: Mapping[str, str], own_fingerprint: str, *, at_once: bool = False) -> bool:
    """Whether a RUNNING run has nobody who runs it: its lease is gone or has no living holder.

    Args:
        tags: of the run.
        own_fingerprint: of a run that is not.
        at_once: as far as can be said without watching another machine's heartbeat for a while.
    """
    if tags.get("maskray.fingerprint") == own_fingerprint or "maskray.storage" not in tags:
        return False
    try:
        run = Storage(tags["maskray.storage"])
        # A local folder of another machine, or one that is gone, says nothing.
        if (run.is_local and tags.get(HOST_TAG) != socket.gethostname()) or not run.exists():
            return False
        holder = lease.holder_of(run)
    except MaskrayError:
        return False
    return holder is None or not (holder.is_alive() if at_once else holder.is_alive_at(run))


def _release(
    prepared: Prepared, launcher: Launcher, run_id: str, judgement: Judgement | None, seconds: float
) -> Summary:
    run = TrainedRun(prepared.config, prepared.plan, prepared.dataset, prepared.store, run_id, prepared.code)
    with launcher.newest_checkpoint(prepared) as weights:
        lineage, version = release(run, weights, first_images(prepared.dataset, prepared.config), judgement)
    return Summary(
        run_name=lineage.run,
        run_id=run_id,
        tracking_uri=shown(prepared.store.uri),
        steps=lineage.trained.steps,
        seconds=seconds,
        first_loss=lineage.first_loss,
        last_loss=lineage.last_loss,
        judgement=judgement,
        model_name=lineage.model,
        model_version=version,
    )


def _tell(prepared: Prepared, run_id: str, verdict: Verdict) -> None:
    """The ends of the probe's curves and of the series of figures, and what is read from the pixels."""
    tracker = MlflowTracker(prepared.store.uri, run_id)
    if verdict.judgement is not None and verdict.judgement.pixels is not None:
        tracker.log(verdict.judgement.pixels.metrics("_raw_pixels"), 0)
    before, after = verdict.findings
    before.tell(tracker)
    after._replace(scores=None).tell(tracker)  # its scores are logged with the model
    if not tracker.close():
        raise unstored_metrics()
