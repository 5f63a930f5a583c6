"""Sweeps whose MLflow is away for a while: it costs time, and no trial."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from maskray.config.load import merge, parse
from maskray.config.schema import RunConfig
from maskray.config.sweep import LOSS, SweepConfig
from maskray.errors import AwayError
from maskray.on_ray import background
from maskray.on_ray.sweep import trial
from maskray.on_ray.sweep import tune as on_ray
from maskray.on_ray.sweep.trial import ASKED, Asked, Sweep
from maskray.sweeping import life, preparing
from maskray.sweeping.preparing import Prepared
from maskray.sweeps import record
from maskray.sweeps.record import Result
from maskray.tracking.mlflow_runs import PARENT_TAG, TRIAL_TAG
from maskray.tracking.mlflow_tracker import UNTOLD
from mlflow_server import Server

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore::Warning:mlflow"),
]

RATIO = "mask.ratio"
TRAINING, BEGINNING, ENDED = 0.5, 0.6, 0.9
"""Where a trial is when MLflow goes: in the middle of its steps; before the first; at the end of the last."""
LIMIT_SECONDS = 12.0  # shorter than MLflow is away
PATIENCE_SECONDS = 240
HALF_WAY, AWAY = "half_way", "away"


@pytest.fixture
def server(tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # as the command line has it
    (tmp_path / "server.db").write_bytes(mlflow_tables.read_bytes())
    started = Server(tmp_path, tmp_path / "server.db")
    started.start()
    MlflowClient(started.uri).search_experiments(max_results=1)  # its first answer takes the longest
    yield started
    started.kill()


@pytest.fixture
def prepare(tiny: Callable[..., RunConfig], server: Server) -> Callable[..., Prepared]:
    """A sweep of the tiny run on that server, with keys of its config laid over it."""

    def make(space: Mapping[str, Any], base: Mapping[str, Any] | None = None, **keys: Any) -> Prepared:
        run = tiny(probe={"draws": 2, "figure_images": 1}, tracking={"uri": server.uri}).model_dump(mode="json")
        trials = {"limit_seconds": LIMIT_SECONDS, "concurrency": 2}
        raw = {"name": "swept", "base": merge(run, base or {}), "space": space, "seeds": [0], "trials": trials, **keys}
        return preparing.prepare(parse(SweepConfig, raw), resume=True)

    return make


def wait_for(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def meeting_an_outage(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    """As `trial.run`; each trial goes so far, and on when MLflow is away."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"
    ratio = Asked.load(parameters[ASKED]).trial.point[RATIO]
    report, stops_at = trial.TrialContext.report, {TRAINING: 4, ENDED: 12}.get(ratio)

    def stands_still() -> None:
        sweep.folder.write_bytes(f"{HALF_WAY}/{ratio}", b"")
        wait_for(lambda: sweep.folder.exists(AWAY), AWAY)

    def reported(self: trial.TrialContext, step: int, *arguments: Any, **options: Any) -> float:
        waited = report(self, step, *arguments, **options)
        if step == stops_at:
            stands_still()
        return waited

    trial.TrialContext.report = reported
    try:
        if ratio == BEGINNING:
            stands_still()
        trial.run(parameters, sweep)
    finally:  # another trial may be the next in this process
        trial.TrialContext.report = report


def swept(
    prepared: Prepared, train: Callable[..., None], meanwhile: Callable[[], None], **options: Any
) -> tuple[Prepared, str, list[Result]]:
    """A sweep, and what befalls it; with its run, and what it told of its trials."""
    told: list[Result] = []
    with life.begun(prepared) as run_id:
        befalls = background.call("meanwhile", meanwhile)
        on_ray.run(prepared, run_id, lambda result, _: told.append(result), train)
        befalls.result()
        life.finish(prepared, run_id, **options)
    return prepared, run_id, told


def children(prepared: Prepared, run_id: str) -> dict[str, Run]:
    """By the key of the trial."""
    store = prepared.store
    runs = store.client().search_runs([store.experiment_id], f"tags.`{PARENT_TAG}` = '{run_id}'")
    found = {run.data.tags[TRIAL_TAG]: run for run in runs}
    assert len(found) == len(runs), "a trial has two runs"
    return found


def steps_of(prepared: Prepared, run: Run, key: str) -> list[int]:
    return sorted(point.step for point in prepared.store.client().get_metric_history(run.info.run_id, key))


def outage(prepared: Prepared, goes: Callable[[], None], comes: Callable[[], None], where: list[float], seconds: float):
    for ratio in where:
        wait_for(partial(prepared.folder.exists, f"{HALF_WAY}/{ratio}"), f"{HALF_WAY} {ratio}")
    goes()
    prepared.folder.write_bytes(AWAY, b"")
    time.sleep(seconds)
    comes()


def check(prepared: Prepared, run_id: str, told: list[Result]) -> None:
    """All have finished, once, and MLflow has all of it, once."""
    assert [result.status for result in told] == ["finished"] * prepared.num_trials, told
    assert {result.trial.key: result for result in told} == record.results(prepared.folder)
    assert prepared.store.client().get_run(run_id).info.status == "FINISHED"
    found = children(prepared, run_id)
    assert found.keys() == {result.trial.key for result in told}
    for child in found.values():
        assert child.info.status == "FINISHED"
        for key in (LOSS, "pretrain/lr", "throughput/images_per_second"):
            assert steps_of(prepared, child, key) == list(range(2, 13, 2)), "once each"
        assert steps_of(prepared, child, "probe/knn") == [12]
    assert all(result.seconds > 0 for result in told)


def test_a_server_that_is_killed_and_started_again(prepare: Callable[..., Prepared], server: Server):
    prepared = prepare({RATIO: [TRAINING, BEGINNING]})
    goes = partial(outage, prepared, server.kill, server.start, [TRAINING, BEGINNING], 20.0)
    check(*swept(prepared, meeting_an_outage, goes))


@pytest.mark.slow
def test_a_server_that_stands_still_for_a_minute(prepare: Callable[..., Prepared], server: Server):
    prepared = prepare({RATIO: [TRAINING, BEGINNING, ENDED, 0.7, 0.75, 0.8]}, seeds=[0, 1])
    goes = partial(outage, prepared, server.suspend, server.go_on, [TRAINING], 60.0)
    check(*swept(prepared, meeting_an_outage, goes))


@pytest.mark.slow
def test_a_server_that_is_away_for_a_minute(prepare: Callable[..., Prepared], server: Server):
    prepared = prepare({RATIO: [ENDED, TRAINING, BEGINNING, 0.7, 0.75, 0.8]}, seeds=[0, 1])
    goes = partial(outage, prepared, server.kill, server.start, [ENDED], 60.0)
    check(*swept(prepared, meeting_an_outage, goes))


def impatient(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    meeting_an_outage(parameters, replace(sweep, away_seconds=3.0))


def test_a_server_that_does_not_come_back_ends_the_sweep_and_no_trial_is_lost_or_fails(
    prepare: Callable[..., Prepared], server: Server, tmp_path: Path
):
    asked = {
        "space": {RATIO: [ENDED, BEGINNING, TRAINING]},
        "base": {"training": {"ledger": str(tmp_path / "ledger")}},
    }
    prepared = prepare(**asked)
    goes = partial(outage, prepared, server.kill, lambda: None, [ENDED, BEGINNING], 0.0)
    said = rf"^tracking\.uri: MLflow does not answer\. Found: {server.uri} \(.*\), after \d+ s\. What to do: .*--resume"
    with pytest.raises(AwayError, match=said):
        swept(prepared, impatient, goes)
    assert record.results(prepared.folder) == {}, "none has ended, and the third was not begun"

    server.start()
    check(*swept(prepare(**asked), trial.run, lambda: None))
    lines = (tmp_path / "ledger" / "0.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 12, "no step was trained twice"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [12.0, 50.0])  # the stopped trial's own process tells it, or none is left to
def test_a_trial_that_is_stopped_meanwhile_is_told_at_the_sweeps_end(
    prepare: Callable[..., Prepared], server: Server, seconds: float
):
    ladder = {"kind": "asha", "unit": "steps", "first": 4, "reduction": 2}
    alone = {"limit_seconds": LIMIT_SECONDS, "concurrency": 1}
    prepared = prepare({RATIO: [0.75, TRAINING]}, stopping=ladder, trials=alone)
    goes = partial(outage, prepared, server.kill, server.start, [TRAINING], seconds)
    _, run_id, told = swept(prepared, meeting_an_outage, goes)
    first, stopped = (
        record.results(prepared.folder)[told[0].trial.key],
        record.results(prepared.folder)[told[1].trial.key],
    )
    assert (first.status, stopped.status, stopped.steps) == ("finished", "pruned", 8)
    assert stopped.seconds > 0
    child = children(prepared, run_id)[stopped.trial.key]
    assert (child.info.status, child.info.run_id) == ("KILLED", stopped.run_id)
    assert steps_of(prepared, child, LOSS) == [2, 4, 6, 8]
    assert steps_of(prepared, child, "probe/knn") == [4, 8]
    assert not prepared.folder.exists(f"{record.TRIALS}/{stopped.trial.key}/{UNTOLD}")


@pytest.mark.slow
def test_a_trial_of_several_workers(prepare: Callable[..., Prepared], server: Server):
    prepared = prepare({RATIO: [ENDED, BEGINNING]}, {"cluster": {"workers": 2}}, trials={"limit_seconds": 240.0})
    goes = partial(outage, prepared, server.kill, server.start, [BEGINNING], 60.0)
    check(*swept(prepared, meeting_an_outage, goes))
