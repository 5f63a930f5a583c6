"""Sweeps on Ray Tune: what befalls their trials, what is on record of it, and what is left behind: nothing."""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run
from ray import tune
from ray._private.state import actors
from ray.util.placement_group import placement_group_table

from maskray.config.load import merge, parse
from maskray.config.schema import RunConfig
from maskray.config.sweep import LOSS, SweepConfig
from maskray.data import cache
from maskray.data.shards import Dataset
from maskray.errors import ClusterError, DataError, StorageError
from maskray.on_ray.sweep import book, trial
from maskray.on_ray.sweep import tune as on_ray
from maskray.on_ray.sweep.trial import ASKED, ENDED, Asked, Sweep
from maskray.sweeping import life, preparing
from maskray.sweeping.preparing import Prepared
from maskray.sweeps import record
from maskray.sweeps.record import Result
from maskray.tracking.mlflow_runs import NOTE_TAG, PARENT_TAG, TRIAL_TAG
from maskray.training import checkpoint
from trials import alone

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

GONE_SECONDS = 60.0  # a process that was not needed any more while it started ends when it has started
RATIO = "mask.ratio"


@dataclass
class Swept:
    """A sweep that has ended."""

    prepared: Prepared
    told: list[Result]
    """In the order of their ends."""
    run_id: str
    results: Mapping[str, Result]

    def by_ratio(self) -> dict[float, Result]:
        return {result.trial.point[RATIO]: result for result in self.results.values()}

    @property
    def client(self) -> MlflowClient:
        return self.prepared.store.client()

    def parent(self) -> Run:
        return self.client.get_run(self.run_id)

    def children(self) -> dict[str, Run]:
        """By the key of the trial."""
        store = self.prepared.store
        runs = self.client.search_runs([store.experiment_id], f"tags.`{PARENT_TAG}` = '{self.run_id}'")
        found = {run.data.tags[TRIAL_TAG]: run for run in runs}
        assert len(found) == len(runs), "a trial has two runs"
        return found

    def file(self, result: Result, name: str) -> Path:
        return Path(self.prepared.folder.join(record.TRIALS, result.trial.key, name))

    def child(self, result: Result) -> Run:
        return self.children()[result.trial.key]


@pytest.fixture
def prepare(tiny: Callable[..., RunConfig], runs: Path) -> Callable[..., Prepared]:
    """A sweep of the tiny run, with keys of its config laid over it."""

    def make(space: Mapping[str, Any], base: Mapping[str, Any] | None = None, **keys: Any) -> Prepared:
        run = tiny(probe={"draws": 2, "figure_images": 1}).model_dump(mode="json")
        raw = {"name": "swept", "base": merge(run, base or {}), "space": space, "seeds": [0], **keys}
        return preparing.prepare(parse(SweepConfig, raw), resume=True)

    return make


def swept(prepared: Prepared, train: Callable[..., None] = trial.run) -> Swept:
    told: list[Result] = []
    with life.begun(prepared) as run_id:
        on_ray.run(prepared, run_id, lambda result, _: told.append(result), train)
        results = life.finish(prepared, run_id)
    return Swept(prepared, told, run_id, results)


def nothing_is_left() -> None:
    """Of trials: of Ray's own processes those stay that the cluster has."""
    deadline = time.monotonic() + GONE_SECONDS
    while found := [*groups(), *living(), *processes()]:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


def groups() -> list[str]:
    return [f"placement group {key}" for key, each in placement_group_table().items() if each["state"] != "REMOVED"]


def living() -> list[str]:
    return [f"actor {each['ActorClassName']}" for each in actors().values() if each["State"] != "DEAD"]


def processes() -> list[str]:
    names = []
    for process in psutil.Process().children(recursive=True):
        try:
            names += process.cmdline()[:1]
        except psutil.Error:  # gone in the meantime
            continue
    return [name for name in names if name.startswith("ray::Implicit")]


# -------------------------------------------------------------------------------------------------- what befalls trials

NO_STEP, KILLED, ASLEEP, COUNTING, NO_RUN, LAST_WORD, QUIET, QUIET_TOO = 0.5, 0.6, 0.7, 0.8, 0.65, 0.85, 0.75, 0.9
FAULTS = {RATIO: [NO_STEP, KILLED, ASLEEP, COUNTING, NO_RUN, LAST_WORD, QUIET, QUIET_TOO]}
# Only there: such a learning rate leaves no loss finite.
FAULTS["optim.base_lr"] = {"kind": "grid", "values": [1e30], "when": {RATIO: NO_STEP}}


def faulty(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    """As `trial.run`, and what the trial's ratio says befalls it: at its first checkpoint, most of them."""
    ratio = Asked.load(parameters[ASKED]).trial.point[RATIO]
    report, told = trial.TrialContext.report, tune.report

    def reported(self: trial.TrialContext, *arguments: Any, **options: Any) -> float:
        waited = report(self, *arguments, **options)
        match ratio:
            case 0.6:
                os.kill(os.getpid(), signal.SIGKILL)
            case 0.7:
                time.sleep(10**6)
            case 0.8:
                sum(range(10**13))  # holds the interpreter's lock for days
        return waited

    def last_word(metrics: Mapping[str, Any]) -> None:
        if ratio == 0.85 and metrics.get(ENDED):
            os.kill(os.getpid(), signal.SIGKILL)
        told(metrics)

    if ratio == 0.65:
        sweep = replace(sweep, store=replace(sweep.store, experiment_id="4711"))  # there is none
    trial.TrialContext.report, tune.report = reported, last_word
    try:
        trial.run(parameters, sweep)
    finally:  # another trial may be the next in this process
        trial.TrialContext.report, tune.report = report, told


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_a_trial_that_raises_dies_or_hangs_is_recorded_and_the_others_finish(prepare: Callable[..., Prepared]):
    prepared = prepare(FAULTS, trials={"limit_seconds": 15.0, "concurrency": 3})
    ended = swept(prepared, faulty)
    results = ended.by_ratio()

    reasons = {
        NO_STEP: "Loss or gradient norm was not finite at step 2",
        KILLED: "its process died",
        ASLEEP: "hung: silent for more than 15 s (trials.limit_seconds)",
        COUNTING: "hung: silent for more than 15 s (trials.limit_seconds)",
        NO_RUN: "MLflow",
    }
    for ratio, reason in reasons.items():
        result = results[ratio]
        assert (result.status, result.value) == ("failed", None), result
        assert reason in result.reason
        assert "Traceback" not in result.reason
        child = ended.child(result)
        assert child.info.status == "FAILED"
        assert reason in child.data.tags[NOTE_TAG]
        kept = ended.client.download_artifacts(child.info.run_id, record.ERROR)
        assert Path(kept).read_bytes() == ended.file(result, record.ERROR).read_bytes()
    for ratio in (LAST_WORD, QUIET, QUIET_TOO):
        assert results[ratio].status == "finished", results[ratio]
        assert 0.1 < results[ratio].value < 1
        assert ended.child(results[ratio]).info.status == "FINISHED"
    # As far as is known: its last word, or its newest checkpoint.
    assert [results[ratio].steps for ratio in (NO_STEP, KILLED, ASLEEP, COUNTING, NO_RUN)] == [2, 4, 4, 4, 0]

    assert sorted(map(id, ended.told)) == sorted({id(result) for result in ended.told}), "told twice"
    assert {result.trial.key: result for result in ended.told} == ended.results
    assert ended.parent().info.status == "FINISHED"
    assert not life.has_failed(prepared.config, ended.results)
    strict = prepared.config.trials.model_copy(update={"fail_if": "any_failed"})
    assert life.has_failed(prepared.config.model_copy(update={"trials": strict}), ended.results)
    nothing_is_left()


# -------------------------------------------------------------------------------------------------- who is stopped

ASHA = {"kind": "asha", "unit": "steps", "first": 4, "reduction": 2}


def noting(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    """As `trial.run`, with a note of whose process it was. The first that is stopped does not let go of it."""
    key = Asked.load(parameters[ASKED]).trial.key
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "2"
    sweep.folder.write_bytes(f"processes/{key}", str(os.getpid()).encode())
    try:
        trial.run(parameters, sweep)
    except SystemExit:
        if sweep.folder.create_exclusive("stuck", b""):
            time.sleep(10**6)
        raise


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_trials_that_are_stopped_leave_nothing_and_those_that_share_a_process_have_the_bits_of_those_that_do_not(
    prepare: Callable[..., Prepared], tmp_path: Path
):
    prepared = prepare({RATIO: [0.75, 0.5, 0.9, 0.25, 0.6]}, stopping=ASHA, trials={"concurrency": 1})
    ended, whole = swept(prepared, noting), ("finished", 12)
    ends = [(result.trial.point[RATIO], result.status, result.steps) for result in ended.told]
    assert ends == [(0.75, *whole), (0.5, "pruned", 8), (0.9, *whole), (0.25, "pruned", 4), (0.6, "pruned", 4)]
    assert {result.trial.key: result for result in ended.told} == ended.results

    pids = Counter(file.read_text() for file in Path(prepared.folder.join("processes")).iterdir())
    assert len(pids) == 2, "one until the first was stopped, another for the rest"

    for result in ended.results.values():
        child = ended.child(result)
        history = ended.client.get_metric_history(child.info.run_id, "probe/knn")
        judged = {point.step: point.value for point in history}
        assert len(judged) == len(history)
        assert judged[result.steps] == result.value
        if result.status == "pruned":
            rung = {4: 0, 8: 1}[result.steps]
            assert result.reason == f"pruned at rung {rung}, step {result.steps} of 12"
            assert child.info.status == "KILLED"
            assert result.reason in child.data.tags[NOTE_TAG]
            assert sorted(judged) == [4, 8][: rung + 1]
            assert result.seconds > 0
        else:
            assert child.info.status == "FINISHED"
            assert sorted(judged) == [4, 8, 12]
    assert ended.parent().info.status == "FINISHED"
    nothing_is_left()

    finished = [result for result in ended.told if result.status == "finished"]
    for result in reversed(finished):
        assert alone(prepared.space, result.trial, tmp_path / result.trial.key) == result.metrics


def counting(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    """As `trial.run`. The first that is stopped holds the interpreter's lock for days."""
    try:
        trial.run(parameters, sweep)
    except SystemExit:
        if sweep.folder.create_exclusive("stuck", b""):
            sum(range(10**13))
        raise


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_a_trial_that_hangs_when_it_is_stopped_costs_the_next_one_nothing_but_time(prepare: Callable[..., Prepared]):
    trials = {"concurrency": 1, "limit_seconds": 12.0}
    ended = swept(prepare({RATIO: [0.75, 0.5, 0.9]}, stopping=ASHA, trials=trials), counting)
    assert [result.status for result in ended.told] == ["finished", "pruned", "finished"]
    nothing_is_left()


# ----------------------------------------------------------------------------------------------------- tried again


def dying(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    """As `trial.run`, killed at its first checkpoint; the second trial's is damaged by that."""
    asked = Asked.load(parameters[ASKED])
    report = trial.TrialContext.report

    def reported(self: trial.TrialContext, *arguments: Any, **options: Any) -> float:
        report(self, *arguments, **options)
        if asked.trial.point[RATIO] == 0.75:
            (weights,) = Path(sweep.folder_of(asked.trial).uri).glob(f"step_*/{checkpoint.WEIGHTS}")
            weights.write_bytes(weights.read_bytes()[:-1])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    trial.TrialContext.report = reported
    trial.run(parameters, sweep)


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_trials_that_failed_are_tried_again_from_their_newest_whole_checkpoints(
    prepare: Callable[..., Prepared], tmp_path: Path
):
    asked = {"space": {RATIO: [0.6, 0.75]}, "trials": {"concurrency": 1}}
    asked["base"] = {"training": {"ledger": str(tmp_path / "ledger")}}
    before = swept(prepare(**asked), dying)
    assert [result.status for result in before.told] == ["failed", "failed"]
    assert life.has_failed(before.prepared.config, before.results)
    assert before.parent().info.status == "FAILED"
    nothing_is_left()

    after = swept(prepare(**asked))
    assert after.run_id == before.run_id
    assert [result.status for result in after.told] == ["finished", "finished"]
    assert after.parent().info.status == "FINISHED"
    lines = (tmp_path / "ledger" / "0.jsonl").read_text().splitlines()
    trained = [json.loads(line)["step"] for line in lines]
    assert trained == [*range(4), *range(4), *range(4, 12), *range(12)]
    for result in after.told:
        assert after.child(result).info.status == "FINISHED"
        assert alone(after.prepared.space, result.trial, tmp_path / result.trial.key) == result.metrics
        history = after.client.get_metric_history(after.child(result).info.run_id, LOSS)
        assert sorted(point.step for point in history) == list(range(2, 13, 2)), "once each"


# ------------------------------------------------------------------------------------- images that are long in decoding

DECODING_SECONDS, LIMIT_SECONDS, START_SECONDS = 24.0, 8.0, 5.0


def slowly(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    """As `trial.run`, where the images of a sweep are long in decoding; with a note of each row group."""
    decode, notes = cache._decode, Path(sweep.folder.join("decoded"))

    def decoded(dataset: Dataset, channels: int, number: int) -> Any:
        threads = min(os.cpu_count() or 1, cache._MOST_THREADS)
        time.sleep(DECODING_SECONDS * threads / dataset.num_row_groups())
        with notes.open("a") as file:
            file.write(f"{number}\n")
        return decode(dataset, channels, number)

    cache._decode = decoded
    try:
        trial.run(parameters, sweep)
    finally:
        cache._decode = decode


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_images_are_decoded_once_for_all_trials_however_long_it_takes(
    prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
):
    """Longer than a trial may be silent, where one decodes and another waits for it."""
    assert DECODING_SECONDS > START_SECONDS + LIMIT_SECONDS * (1 + 1 / trial.BEATS)
    monkeypatch.setattr(book, "START_SECONDS", START_SECONDS)
    trials = {"limit_seconds": LIMIT_SECONDS, "concurrency": 2}
    prepared = prepare({RATIO: [0.75, 0.5, 0.9]}, {"data": {"cache": "host"}}, trials=trials)
    ended = swept(prepared, slowly)
    assert [(result.status, result.reason) for result in ended.told] == [("finished", "")] * 3
    decoded = Path(prepared.folder.join("decoded")).read_text().split()
    assert sorted(map(int, decoded)) == list(range(prepared.space.dataset.num_row_groups())), "once each"


# ----------------------------------------------------------------------------------------------- what cannot be run


def unwritable(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    """A trial whose result cannot be written: a folder has its name."""
    folder = sweep.folder_of(Asked.load(parameters[ASKED]).trial)
    folder.child(record.RESULT).write_bytes("in_the_way", b"")
    raise ValueError("planted")


def test_what_cannot_be_put_on_record_ends_the_sweep_in_our_words(prepare: Callable[..., Prepared]):
    prepared = prepare({RATIO: [0.75, 0.5]}, trials={"concurrency": 1})
    runs: list[str] = []

    def run() -> None:
        with life.begun(prepared) as run_id:
            runs.append(run_id)
            on_ray.run(prepared, run_id, lambda *_: None, unwritable)

    with pytest.raises(StorageError, match=rf"cannot (read|write) .*/{record.RESULT}"):
        run()
    parent = prepared.store.client().get_run(runs[0])
    assert parent.info.status == "FAILED"
    assert record.RESULT in parent.data.tags[NOTE_TAG]
    nothing_is_left()


def test_a_damaged_shard_fails_a_trial_by_its_name(prepare: Callable[..., Prepared], digits: Path, tmp_path: Path):
    copied = Path(shutil.copytree(digits, tmp_path / "copied"))
    prepared = prepare({RATIO: [0.75]}, {"data": {"path": str(copied)}})
    shard = copied / "train" / "00000.parquet"
    shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    with life.begun(prepared) as run_id:
        found = prepared.queue().next()
        asked = Asked(found, prepared.space.run_config(found).model_dump(mode="json"))
        sweep = Sweep(prepared.folder, prepared.store, run_id, "probe/knn", 600.0, prepared.code)
        with pytest.raises(DataError, match=re.escape(str(shard))):
            trial.run({ASKED: asked.dump()}, sweep)


def test_more_trials_at_once_than_the_cluster_holds(prepare: Callable[..., Prepared]):
    many = prepare({RATIO: [0.75]}, trials={"concurrency": 7})
    with pytest.raises(ClusterError, match=r"^trials\.concurrency: .*room for 6 .*Found: 7 of 1 CPU each.*at most 6"):
        on_ray.concurrency_of(many)
    large = prepare({RATIO: [0.5]}, {"cluster": {"cpus_per_worker": 7}}, name="large")
    with pytest.raises(
        ClusterError,
        match=r"cluster\.cpus_per_worker: .*no room for a trial.*Found: 7 CPUs for a trial.*one node has: 6 CPUs",
    ):
        on_ray.concurrency_of(large)
    two = prepare({RATIO: [0.5]}, {"cluster": {"cpus_per_worker": 2.5}}, name="two")
    assert on_ray.concurrency_of(two) == 2
    pairs = prepare({RATIO: [0.5]}, {"cluster": {"workers": 2, "cpus_per_worker": 1.5}}, name="pairs")
    assert on_ray.concurrency_of(pairs) == 2
    wide = prepare({RATIO: [0.5]}, {"cluster": {"workers": 4, "cpus_per_worker": 2}}, name="wide")
    with pytest.raises(
        ClusterError, match=r"cluster\.workers: .*no room.*Found: 4 workers with 2 CPUs for a trial.*nodes have 6 CPUs"
    ):
        on_ray.concurrency_of(wide)
