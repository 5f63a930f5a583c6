"""The order of a launch: who has the run is settled before anything is asked of a cluster."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from maskray import launch
from maskray.bare import BareLauncher
from maskray.cli.pretrain import show
from maskray.config.schema import RunConfig
from maskray.data import lease
from maskray.errors import ClusterError, ConfigError, TrackingError
from maskray.evaluation import untold
from maskray.launch import Summary
from maskray.preparing import FINISHED, Prepared, prepare


@pytest.fixture
def prepared(tiny: Callable[..., RunConfig], runs: Path) -> Prepared:
    return prepare(tiny())


class Full(BareLauncher):
    """On a cluster that has no room."""

    def preflight(self, prepared: Prepared) -> None:
        holder = lease.holder_of(prepared.run)
        assert holder is not None
        assert holder.pid == os.getpid()
        raise ClusterError("no room")


def test_the_lease_is_held_while_the_cluster_is_waited_for_and_given_back_when_it_has_no_room(prepared: Prepared):
    with pytest.raises(ClusterError, match="no room"):
        launch.launch(prepared, Full())
    assert prepared.run.list_names() == []


def test_a_run_that_another_launch_has_finished_meanwhile_is_not_run_again(prepared: Prepared):
    done = Summary("tiny-0123", "1", "sqlite:///x", 12, 1.0, 1.0, 0.5, None, "tiny", "1")
    prepared.run.write_bytes(FINISHED, done.dump())
    summary = launch.launch(prepared, Full())
    assert summary.already_finished
    assert summary.run_name == "tiny-0123"


def test_a_launch_that_lost_its_run_leaves_the_mlflow_run_to_the_one_that_has_it(prepared: Prepared):
    held, run_ids = lease.Lease(), []

    def train() -> None:
        with launch._tracked(prepared, held) as run_id:
            run_ids.append(run_id)
            held.lost_to = lease.Holder.this_process()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert prepared.store.client().get_run(run_ids[0]).info.status == "RUNNING"


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b'{"schema_version": 99}', b'{"schema_version": 1, "x": 2}'])
def test_a_summary_that_cannot_be_read_is_of_a_finished_run_all_the_same(prepared: Prepared, content: bytes, capsys):
    prepared.run.write_bytes(FINISHED, content)
    summary = launch.finished(prepared)
    assert summary is not None
    assert summary.already_finished
    assert not summary.is_known
    show(summary, prepared.config)
    said = capsys.readouterr().out
    assert prepared.plan.run_name in said
    assert "nothing to do" in said
    assert "nan" not in said


@pytest.mark.parametrize("path", ["s3://AKIA:hidden@bucket/runs", "s3://bucket/runs?access_key=a&secret_key=hidden"])
def test_credentials_in_a_config_are_refused_and_not_repeated(tiny: Callable[..., RunConfig], path: str):
    with pytest.raises(ConfigError, match=r"credentials .*Found: s3://.*AWS_SECRET_ACCESS_KEY") as caught:
        prepare(tiny(storage={"path": path}))
    assert "hidden" not in str(caught.value)


def test_what_probes_have_found_and_nobody_told_is_told_when_training_ends(prepared: Prepared, monkeypatch):
    found = untold.Untold()
    found.log({"probe/knn": 0.5}, 4)
    found.keep(prepared.run, "step_000000004-a")
    run_id = prepared.store.client().create_run(prepared.store.experiment_id).info.run_id
    monkeypatch.setattr(launch, "_UNTOLD_SECONDS", 0.2)
    away = replace(prepared, store=replace(prepared.store, uri="http://127.0.0.1:9"))
    with pytest.raises(TrackingError, match="has not taken all of its metrics"):
        launch._tell_what_probes_found(away, run_id)
    monkeypatch.undo()
    for _ in range(2):
        launch._tell_what_probes_found(prepared, run_id)
        (point,) = prepared.store.client().get_metric_history(run_id, "probe/knn")
        assert (point.step, point.value) == (4, 0.5)
