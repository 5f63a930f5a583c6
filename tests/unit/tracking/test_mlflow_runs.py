import logging
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.entities import Metric

from maskray.errors import TrackingError
from maskray.tracking.mlflow_runs import (
    FINGERPRINT_TAG,
    SOURCES_TAG,
    DatasetCard,
    RunCard,
    close_run,
    curve,
    datasets_in_use,
    ensure_run,
    flatten,
    provenance,
    reconcile,
)
from maskray.tracking.mlflow_store import Store

CARD = RunCard(
    name="digits-abcd1234",
    fingerprint="abcd1234abcd1234",
    params={"seed": 0, "optim": {"base_lr": 1e-3, "betas": [0.9, 0.95], "clip_norm": None}, "name": "digits"},
    tags={"maskray.storage": "/runs/digits-abcd1234", "setting.cluster.workers": "2"},
    config_yaml="name: digits\n",
    dataset=DatasetCard("digits", "/data/digits", "0123456789abcdef", 1500),
    description="**digits**",
)


def test_run_holds_the_card(store: Store, tmp_path: Path) -> None:
    run_id = ensure_run(store, CARD)
    run = store.client().get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("digits-abcd1234", "RUNNING")
    assert run.data.params == {
        "seed": "0",
        "optim.base_lr": "0.001",
        "optim.betas": "[0.9, 0.95]",
        "optim.clip_norm": "null",
        "name": "digits",
    }
    assert run.data.tags["setting.cluster.workers"] == "2"
    place = f"#/experiments/{store.experiment_id}/runs/{run_id}/artifacts/figures"
    assert run.data.tags["mlflow.note.content"] == f"**digits** [Figures]({place})"
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "0123456789abcdef")
    assert dataset.tags[0].value == "training"
    assert Path(store.client().download_artifacts(run_id, "config.yaml", str(tmp_path))).read_text() == "name: digits\n"


def test_restart_continues_the_same_run(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    run_id = ensure_run(store, CARD)
    close_run(store, run_id, "FAILED", "lost a worker")
    ended = store.client().get_run(run_id)
    assert (ended.info.status, ended.data.tags["maskray.ended"]) == ("FAILED", "failed: lost a worker")

    moved = replace(CARD, tags={**CARD.tags, "setting.cluster.workers": "4"}, config_yaml="name: digits  # again\n")
    with caplog.at_level(logging.WARNING):
        assert ensure_run(store, moved) == run_id
    assert caplog.records == []
    run = store.client().get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["setting.cluster.workers"] == "4"
    assert "maskray.ended" not in run.data.tags
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**digits** [Figures]")
    assert "\n\n**failed** (20" in note  # what happened stays
    assert note.endswith("lost a worker")
    assert len(run.inputs.dataset_inputs) == 1


def test_of_two_runs_the_oldest_stays(store: Store) -> None:
    """A request to create a run that is tried again may have made two."""
    client = store.client()
    ids = [
        client.create_run(store.experiment_id, start_time=t, tags={FINGERPRINT_TAG: CARD.fingerprint}).info.run_id
        for t in (2000, 1000)
    ]
    assert ensure_run(store, CARD) == ids[1]
    assert client.get_run(ids[0]).info.lifecycle_stage == "deleted"
    assert len(client.search_runs([store.experiment_id])) == 1


def test_a_deleted_run_is_not_continued(store: Store) -> None:
    first = ensure_run(store, CARD)
    store.client().delete_run(first)
    assert ensure_run(store, CARD) != first


def test_another_identity_is_another_run(store: Store) -> None:
    assert ensure_run(store, CARD) != ensure_run(store, replace(CARD, fingerprint="ffff", name="digits-ffff"))


def test_params_never_change(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    run_id = ensure_run(store, CARD)
    with caplog.at_level(logging.WARNING):
        ensure_run(store, replace(CARD, params={"seed": 1, "new": True}))
    assert "first value of seed: 0, not 1" in caplog.text
    params = store.client().get_run(run_id).data.params
    assert (params["seed"], params["new"]) == ("0", "true")


def test_many_and_long_params_and_tags(store: Store) -> None:
    params = {**{f"p{i}": i for i in range(250)}, "long": "x" * 10_000}
    tags = {**{f"t{i}": str(i) for i in range(150)}, "long": "x" * 10_000}
    dataset = replace(CARD.dataset, digest="d" * 64)
    run_id = ensure_run(store, replace(CARD, params=params, tags=tags, dataset=dataset))
    run = store.client().get_run(run_id)
    assert len(run.data.params) == 251
    assert len(run.data.params["long"]) <= 6000
    assert "sha256" in run.data.params["long"]
    assert run.data.tags["t149"] == "149"
    ensure_run(store, replace(CARD, params=params, dataset=dataset))  # the same cut text: nothing changes


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_close_says_how_it_ended(store: Store, status: str) -> None:
    run_id = ensure_run(store, CARD)
    close_run(store, run_id, status)  # type: ignore[arg-type]
    run = store.client().get_run(run_id)
    assert run.info.status == status
    assert run.info.end_time >= run.info.start_time
    assert run.data.tags["maskray.ended"] == status.lower()


def test_reconcile_closes_what_nobody_runs(store: Store) -> None:
    alive = ensure_run(store, CARD)
    stale = ensure_run(store, replace(CARD, fingerprint="ffff", name="digits-ffff"))
    done = ensure_run(store, replace(CARD, fingerprint="eeee", name="digits-eeee"))
    close_run(store, done, "FINISHED")
    foreign = store.client().create_run(store.experiment_id).info.run_id  # somebody else's, in the same experiment
    asked: list[str] = []

    def is_stale(tags: Mapping[str, str]) -> bool:
        asked.append(tags[FINGERPRINT_TAG])
        return tags[FINGERPRINT_TAG] == "ffff"

    assert reconcile(store, is_stale) == ["digits-ffff"]
    assert sorted(asked) == ["abcd1234abcd1234", "ffff"]
    statuses = {r: store.client().get_run(r).info.status for r in (alive, stale, done, foreign)}
    assert list(statuses.values()) == ["RUNNING", "KILLED", "FINISHED", "RUNNING"]
    assert reconcile(store, lambda tags: False) == []


def test_a_curve_is_in_the_order_of_its_steps(store: Store) -> None:
    run_id = ensure_run(store, CARD)
    with pytest.raises(TrackingError, match="no values"):
        curve(store, run_id, "pretrain/loss")
    points = [Metric("pretrain/loss", 1 / step, 1000 - step, step) for step in (30, 10, 20)]
    store.client().log_batch(run_id, metrics=points)
    assert curve(store, run_id, "pretrain/loss") == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]


def test_what_mlflow_refuses_is_a_tracking_error(store: Store) -> None:
    with pytest.raises(TrackingError, match="nowhere"):
        close_run(store, "nowhere", "FINISHED")
    with pytest.raises(TrackingError):
        curve(store, "nowhere", "pretrain/loss")
    with pytest.raises(TrackingError, match="digits-abcd1234"):
        ensure_run(store, replace(CARD, params={"a\nb": 1}))


@pytest.fixture
def git(tmp_path: Path) -> Callable[..., None]:
    """Runs git in a new repository."""

    def run(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    run("init")
    return run


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "platform" / "maskray"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


def test_provenance_names_commit_and_versions(git: Callable[..., None], package: Path) -> None:
    git("add", ".")
    git("commit", "-m", "a")
    tags = provenance(package, "told")
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["git.uncommitted_changes"] == "no"
    assert {"python", "version.torch", "version.mlflow"} <= tags.keys()
    (package / "__init__.py").write_text("changed = True")
    assert provenance(package)["git.uncommitted_changes"] == "yes"


def test_the_commit_of_another_repository_is_not_taken(git: Callable[..., None], package: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a repository of somebody's, with the package installed below it")
    git("add", "notes.txt")
    git("commit", "-m", "a")
    assert "mlflow.source.git.commit" not in provenance(package)
    assert provenance(package, "told")["mlflow.source.git.commit"] == "told"


def test_the_digest_of_sources_follows_the_code_and_not_its_place(package: Path, tmp_path: Path) -> None:
    first = provenance(package)[SOURCES_TAG]
    elsewhere = Path(shutil.copytree(package, tmp_path / "elsewhere"))
    assert provenance(elsewhere)[SOURCES_TAG] == first
    (elsewhere / "new.py").write_text("")
    assert provenance(elsewhere)[SOURCES_TAG] != first


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1.0}, "d": [1, 2]}, "e": "x", "f": None, "g": {}}) == {
        "a.b.c": "1.0",
        "a.d": "[1, 2]",
        "e": "x",
        "f": "null",
        "g": "{}",
    }


def test_datasets_in_use_are_those_of_all_runs_and_models(store: Store) -> None:
    assert datasets_in_use(store) == set()
    ensure_run(store, replace(CARD, params={"dataset": "a" * 16}))
    client = store.client()
    other = client.create_run(client.create_experiment("another")).info.run_id
    client.log_param(other, "dataset", "b" * 16)
    client.create_registered_model("digits")
    client.create_model_version("digits", store.uri, tags={"dataset": "c" * 16})
    client.create_model_version("digits", store.uri)
    deleted = client.create_run(store.experiment_id).info.run_id
    client.log_param(deleted, "dataset", "d" * 16)
    client.delete_run(deleted)
    assert datasets_in_use(store) == {"a" * 16, "b" * 16, "c" * 16}
