"""A sweep's life without Ray: what is refused before it begins, what it is called, what MLflow is told at its end."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskray import offering
from maskray.config.load import merge, parse
from maskray.config.schema import IngestConfig, RunConfig
from maskray.config.sweep import ObjectiveOfSweep, SweepConfig
from maskray.data import lease
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.errors import CheckpointError, ConfigError, RunConflictError
from maskray.sweeping import life, preparing
from maskray.sweeping.preparing import Prepared
from maskray.sweeps import record
from maskray.sweeps.record import Result, Status
from maskray.tracking import mlflow_runs
from maskray.tracking.base import points_of
from maskray.tracking.mlflow_runs import NOTE_TAG, PARENT_TAG, TRIAL_TAG
from maskray.tracking.mlflow_store import DATABASE
from maskray.tracking.mlflow_tracker import UNTOLD, MlflowTracker
from maskray.training.throughput import IMAGES_PER_SECOND

RATIOS = {"mask.ratio": [0.5, 0.75]}


@pytest.fixture
def prepare(tiny: Callable[..., RunConfig], runs: Path) -> Callable[..., Prepared]:
    """Prepares a sweep of the tiny run: `prepare(seeds=[0])`; what is not of its config is for `preparing.prepare`."""

    def make(*, resume: bool = False, new: bool = False, base: dict | None = None, **keys: Any) -> Prepared:
        run = merge(tiny().model_dump(mode="json"), base or {})
        config = parse(SweepConfig, {"name": "swept", "base": run, "space": RATIOS, "seeds": [0], **keys})
        return preparing.prepare(config, resume=resume, new=new)

    return make


def begin(prepared: Prepared) -> str:
    with life.begun(prepared) as run_id:
        return run_id


def put(prepared: Prepared, *statuses: Status | None) -> None:
    """Results of the first trials."""
    for trial, status in zip(prepared.trials, statuses, strict=False):
        if status is not None:
            result = Result(trial, status, 12, 1.0, 0.5 if status == "finished" else None, reason=f"it {status}")
            prepared.folder.child(record.TRIALS, trial.key).write_bytes(record.RESULT, result.dump())


# ------------------------------------------------------------------------------------------------------- names, resume


def test_nothing_is_there_before_a_sweep_begins(prepare: Callable[..., Prepared]):
    prepared = prepare()
    assert prepared.name == "swept-1"
    assert not prepared.folder.exists()
    assert [trial.point["mask.ratio"] for trial in prepared.trials] == [0.5, 0.75]
    assert prepare().name == "swept-1"
    assert prepare(resume=True).name == "swept-1", "there is none to go on with"


def test_its_page_in_mlflow_leads_to_the_report(prepare: Callable[..., Prepared]):
    prepared = prepare()
    run_id = begin(prepared)
    life.finish(prepared, run_id)
    client, place = prepared.store.client(), f"#/experiments/{prepared.store.experiment_id}/runs/{run_id}/artifacts"
    assert f" [Report]({place}/report/report.html)" in client.get_run(run_id).data.tags[NOTE_TAG]
    assert "report/report.html" in [file.path for file in client.list_artifacts(run_id, "report")]


def test_the_name_of_one_that_was_begun_or_has_ended(prepare: Callable[..., Prepared]):
    first = prepare()
    begin(first)
    begun = r"^name: .*was begun and has not ended\. Found: .*swept-1\. What to do: --resume goes on with it; --new "
    with pytest.raises(ConfigError, match=begun):
        prepare()
    life.finish(first, begin(first))
    with pytest.raises(ConfigError, match=r"^name: .*has ended\. .*--resume tries its failed trials again; --new "):
        prepare()
    assert prepare(resume=True).folder.uri == first.folder.uri
    assert prepare(name="swep").name == "swep-1"

    second = prepare(new=True)
    assert second.name == "swept-2"
    begin(second)
    assert prepare(resume=True).name == "swept-2", "the last one"
    begin(prepare(resume=True))
    with pytest.raises(ConfigError, match="has not ended"):
        prepare()


def test_one_that_goes_on_after_its_end_has_not_ended(prepare: Callable[..., Prepared]):
    prepared = prepare()
    life.finish(prepared, begin(prepared))
    with life.begun(prepare(resume=True)):
        assert not prepared.folder.exists(record.FINISHED)


def test_another_config_is_refused_and_its_keys_named(prepare: Callable[..., Prepared]):
    begin(prepare())
    changed = {
        "space.mask.ratio.values": {"space": {"mask.ratio": [0.5, 0.8]}},
        "space.model.depth.kind": {"space": RATIOS | {"model.depth": [1]}},
        "seeds": {"seeds": [0, 1]},
        "base.optim.base_lr": {"base": {"optim": {"base_lr": 0.5}}},
        "overrides.optim.base_lr": {"overrides": {"optim.base_lr": 0.5}},
        "budget.steps": {"budget": {"steps": 9}},
        "stopping.kind": {"stopping": {"kind": "asha", "first": 4, "unit": "steps"}},
        "objective.metric": {"objective": {"metric": "probe/few_labels"}},
    }
    for key, config in changed.items():
        with pytest.raises(ConfigError) as caught:
            prepare(resume=True, **config)
        message = str(caught.value)
        assert key in message.partition("Found:")[0]
        assert message.endswith("What to do: take those of its sweep.yaml, or begin another with --new.")
    with pytest.raises(ConfigError, match=r"^seeds: .*Found: \[0, 1\]\. Allowed: \[0\]\."):
        prepare(resume=True, seeds=[0, 1])


def test_what_says_nothing_of_what_is_learned_may_change_on_the_way(prepare: Callable[..., Prepared]):
    first = prepare()
    run_id = begin(first)
    changed = prepare(
        resume=True,
        base={"cluster": {"embedded_cpus": 4}, "training": {"log_steps": 1}},
        overrides={"cluster.cpus_per_worker": 0.5, "tracking": {"system_metrics_seconds": 5.0}},
        trials={"concurrency": 2, "limit_seconds": 60},
        confidence=0.9,
        register_best={"name": "tiny"},
    )
    assert [trial.key for trial in changed.trials] == [trial.key for trial in first.trials]
    assert begin(changed) == run_id


@pytest.mark.parametrize("change", [{"probe": {"k": 1}}, {"probe": {"max_rows": 100}}, {"probe": {"draws": 2}}])
def test_what_trials_are_judged_by_may_not_change_on_the_way(prepare: Callable[..., Prepared], change: dict):
    begin(prepare())
    with pytest.raises(ConfigError, match=r"^base\.probe\.\w+: the sweep was begun with other values"):
        prepare(resume=True, base=change)


def test_a_report_is_of_the_sweep_as_it_was_begun(prepare: Callable[..., Prepared]):
    first = prepare(seeds=[0, 1])
    begin(first)
    put(first, "finished", "finished", "failed")
    other = first.config.model_copy(
        update={"objective": ObjectiveOfSweep(metric="probe/few_labels"), "seeds": (0,), "confidence": 0.5}
    )
    page = Path(life.report_of(other)).read_text()
    assert "-NN accuracy" in page
    assert "labels a class" not in page
    with pytest.raises(ConfigError, match=r"^name: there is no sweep of this name"):
        life.report_of(first.config.model_copy(update={"name": "other"}))


def test_images_that_were_added_are_not_mixed_in(prepare: Callable[..., Prepared], digits: Path, tmp_path: Path):
    copied = shutil.copytree(digits, tmp_path / "copied")
    base = {"data": {"path": str(copied)}}
    first = prepare(base=base)
    begin(first)
    (tmp_path / "more" / "0").mkdir(parents=True)
    for i in range(40):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "more" / "0" / f"{i}.png")
    more = {"source": str(tmp_path / "more"), "destination": str(copied), "group_rows": 16, "held_out_fraction": 0.2}
    ingest(IngestConfig(**more, add=True), thread_mapper(1))
    version = first.space.dataset.manifest.fingerprint
    with pytest.raises(ConfigError, match=rf"^data\.version: .*Allowed: {version}\. .*overrides\.data\.version="):
        prepare(base=base, resume=True)
    again = prepare(base=base, resume=True, overrides={"data.version": version})
    assert [trial.key for trial in again.trials] == [trial.key for trial in first.trials]


def test_a_sweep_that_somebody_else_is_at(prepare: Callable[..., Prepared]):
    prepared = prepare()
    with life.begun(prepared):
        with pytest.raises(RunConflictError, match=r"the sweep swept-1 is running already.*wait for it, or stop it"):
            prepare(resume=True)
        with pytest.raises(RunConflictError, match="the sweep swept-1"), life.begun(prepared):
            pass
        assert lease.holder_of(prepared.folder) is not None
    assert lease.holder_of(prepared.folder) is None


def test_results_that_are_on_record_are_not_run_again(prepare: Callable[..., Prepared]):
    first = prepare(seeds=[0, 1])
    begin(first)
    put(first, "finished", "failed", "pruned")
    again = prepare(seeds=[0, 1], resume=True)
    queue, left = again.queue(), []
    while (trial := queue.next()) is not None:
        left.append(trial.key)
    assert set(left) == {first.trials[1].key, first.trials[3].key}
    assert again.num_trials == 4


def test_a_result_that_cannot_be_read_is_named(prepare: Callable[..., Prepared]):
    first = prepare()
    begin(first)
    first.folder.child(record.TRIALS, first.trials[0].key).write_bytes(record.RESULT, b"{")
    with pytest.raises(CheckpointError, match=rf"{first.trials[0].key}/{record.RESULT}"):
        prepare(resume=True)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stopping": {"kind": "asha", "unit": "steps", "first": 12}}, r"^stopping\.first: no trial is ever judged"),
        ({"stopping": {"kind": "median", "first": 10}}, r"^stopping\.first: the first rung is before a trial's first"),
        ({"space": {"optim.base_lr": [1, 1.0]}}, r"^space: two of its points are the same run"),
        (
            {"register_best": {"name": "tiny", "promotion": {"gates": {}}}},
            r"^register_best\.promotion: gates: no such key\. Did you mean gate\?",
        ),
        (
            {"register_best": {"name": "tiny", "promotion": {"gate": {"least": "much"}}}},
            r"^register_best\.promotion: gate\.",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_begins(prepare: Callable[..., Prepared], keys: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        prepare(**keys)


def test_a_promotion_is_about_the_sweeps_own_dataset_and_model(prepare: Callable[..., Prepared], tmp_path: Path):
    config = prepare(register_best={"name": "tiny", "promotion": {}}).config
    base = prepare().space.base
    promotion = offering.promotion_of(base, config.register_best)
    assert (promotion.model, promotion.data.path) == ("tiny", base.data.path)
    assert promotion.storage.path == str(tmp_path / "runs")


# -------------------------------------------------------------------------------------------------------------- seconds


def test_steps_are_timed_once_and_are_the_same_when_it_goes_on(prepare: Callable[..., Prepared]):
    timed: list[float] = []

    def measure(configs: Sequence[RunConfig]) -> list[float]:
        timed.extend(config.mask.ratio[0] for config in configs)
        return [0.1 * (1 + len(timed) + i) for i in range(len(configs))]  # another each time

    budget = {"accelerator_seconds": 6.0}
    first = prepare(budget=budget)
    assert first.space.unmeasured() != []
    with life.begun(first):
        known = preparing.measured(first, measure)
    assert timed == [0.5, 0.75]
    assert [trial.steps for trial in known.trials] == [round(6 / 0.3), round(6 / 0.4)]

    again = prepare(budget=budget, resume=True)
    assert again.trials == known.trials
    assert preparing.measured(again, measure).trials == known.trials
    assert timed == [0.5, 0.75]
    assert prepare(budget=budget, new=True).space.unmeasured() != [], "another day is another measurement"


def test_rungs_are_looked_at_when_steps_are_known(prepare: Callable[..., Prepared]):
    stopping = {"kind": "asha", "unit": "steps", "first": 50}
    prepared = prepare(budget={"accelerator_seconds": 6.0}, stopping=stopping)
    with pytest.raises(ConfigError, match="no trial is ever judged"), life.begun(prepared):
        preparing.measured(prepared, lambda configs: [1.0] * len(configs))


# ----------------------------------------------------------------------------------------------------- what MLflow says


def child_of(prepared: Prepared, run_id: str, number: int) -> str:
    trial = prepared.trials[number]
    card = life._card(prepared)
    tags = {**card.tags, PARENT_TAG: run_id, TRIAL_TAG: trial.key}
    return mlflow_runs.ensure_run(prepared.store, replace(card, name=trial.name, fingerprint=trial.key, tags=tags))


def status_of(prepared: Prepared, run_id: str) -> str:
    return str(prepared.store.client().get_run(run_id).info.status)


@pytest.mark.parametrize(
    ("error", "status", "why"),
    [(KeyboardInterrupt(), "KILLED", "interrupted"), (ConfigError("no room"), "FAILED", "no room")],
)
def test_one_that_is_ended_leaves_no_run_that_says_running(
    prepare: Callable[..., Prepared], error: BaseException, status: str, why: str
):
    prepared = prepare(seeds=[0, 1])
    runs: list[str] = []

    def end() -> None:
        with life.begun(prepared) as run_id:
            runs.extend([run_id, *(child_of(prepared, run_id, i) for i in range(4))])
            put(prepared, "finished", "failed", "pruned")
            raise error

    with pytest.raises(type(error)):
        end()
    client = prepared.store.client()
    assert [status_of(prepared, each) for each in runs] == [status, "FINISHED", "FAILED", "KILLED", "KILLED"]
    notes = [client.get_run(each).data.tags[NOTE_TAG] for each in runs]
    assert why in notes[0]
    assert "it failed" in notes[2]
    assert "it pruned" in notes[3]
    assert "the sweep ended before it" in notes[4]
    assert lease.holder_of(prepared.folder) is None


def test_mlflow_that_is_away_at_the_end_does_not_hide_what_ended_the_sweep(
    prepare: Callable[..., Prepared], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    prepared = prepare()

    def end() -> None:
        with life.begun(prepared):
            (tmp_path / "runs" / DATABASE).write_bytes(b"no database")
            raise ConfigError("no room")

    with pytest.raises(ConfigError, match="no room"), caplog.at_level(logging.WARNING):
        end()
    assert "MLflow" in caplog.text


def test_what_trials_could_not_tell_is_told_at_the_end(prepare: Callable[..., Prepared]):
    """As they leave it when MLflow is away: points in a file, no run's id, no seconds; and some of it was told."""
    prepared, points = prepare(), points_of({"pretrain/loss": 0.5, IMAGES_PER_SECOND: 64.0}, 2)
    run_id = begin(prepared)
    pruned, failed = prepared.trials
    runs = [child_of(prepared, run_id, number) for number in range(2)]
    told = MlflowTracker(prepared.store.uri, runs[0])
    told.restore([point.plain() for point in points])
    assert told.close()
    untold = [*points, *points_of({"pretrain/loss": 0.25, IMAGES_PER_SECOND: 32.0, "probe/knn": 0.9}, 4)]
    for trial, result in (
        (pruned, Result(pruned, "pruned", 4, 0.0, 0.9)),
        (failed, Result(failed, "failed", 0, 0.0, None)),
    ):
        prepared.folder.child(record.TRIALS, trial.key).write_bytes(record.RESULT, result.dump())
    folder = prepared.folder.child(record.TRIALS, pruned.key)
    folder.write_bytes(UNTOLD, json.dumps([point.plain() for point in untold]).encode())
    prepared.folder.child(record.TRIALS, failed.key).write_bytes(record.ERROR, b"its traceback")

    results = life.finish(prepared, run_id)
    assert [status_of(prepared, run) for run in runs] == ["KILLED", "FAILED"]
    for key, values in {"pretrain/loss": [0.5, 0.25], IMAGES_PER_SECOND: [64.0, 32.0], "probe/knn": [0.9]}.items():
        assert [point.value for point in prepared.store.client().get_metric_history(runs[0], key)] == values
    assert not folder.exists(UNTOLD)
    batch = prepared.space.base.optim.global_batch
    assert (results[pruned.key].run_id, results[pruned.key].seconds) == (runs[0], 2 * batch / 64 + 2 * batch / 32)
    assert (results[failed.key].run_id, results[failed.key].seconds) == (runs[1], 0)
    kept = prepared.store.client().download_artifacts(runs[1], record.ERROR)
    assert Path(kept).read_bytes() == b"its traceback"


def test_a_trial_of_which_mlflow_has_nothing_or_something_else_than_its_result(prepare: Callable[..., Prepared]):
    prepared = prepare()
    run_id = begin(prepared)
    finished, failed = prepared.trials
    mlflow_runs.close_run(prepared.store, child_of(prepared, run_id, 0), "KILLED", "its launch ended without a word")
    for trial, result in (
        (finished, Result(finished, "finished", 4, 1.0, 0.9, run_id="r")),
        (failed, Result(failed, "failed", 0, 0.0, None, reason="out of memory")),
    ):
        prepared.folder.child(record.TRIALS, trial.key).write_bytes(record.RESULT, result.dump())
    prepared.folder.child(record.TRIALS, failed.key).write_bytes(record.ERROR, b"its traceback")

    results = life.finish(prepared, run_id)
    children = {each.trial: each for each in mlflow_runs.children(prepared.store, run_id)}
    assert {key: child.status for key, child in children.items()} == {finished.key: "FINISHED", failed.key: "FAILED"}
    made = children[failed.key].run_id
    assert results[failed.key].run_id == made
    run = prepared.store.client().get_run(made)
    assert (run.info.run_name, run.data.params["seed"]) == (failed.name, str(failed.seed))
    assert "out of memory" in run.data.tags[NOTE_TAG]
    assert Path(prepared.store.client().download_artifacts(made, record.ERROR)).read_bytes() == b"its traceback"


@pytest.mark.parametrize(
    ("statuses", "fail_if", "failed"),
    [
        (["finished", "failed"], "none_finished", False),
        (["finished", "pruned"], "any_failed", False),
        (["finished", "failed"], "any_failed", True),
        (["pruned", "failed"], "none_finished", True),
        ([], "none_finished", True),
    ],
)
def test_when_a_sweep_has_failed(prepare: Callable[..., Prepared], statuses: list, fail_if: str, failed: bool):
    prepared = prepare(trials={"fail_if": fail_if})
    put(prepared, *statuses)
    run_id = begin(prepared)
    assert life.has_failed(prepared.config, life.finish(prepared, run_id)) is failed
    assert status_of(prepared, run_id) == ("FINISHED" if "finished" in statuses else "FAILED")
