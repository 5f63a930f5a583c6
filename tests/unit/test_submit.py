"""`maskray submit`: what is made of a command, and what is refused before anything is sent."""

import argparse
import re
import shlex
import socket
from pathlib import Path

import pytest
from rich.console import Console

from maskray import cli
from maskray.cli import submit
from maskray.errors import ClusterError, MaskrayError
from maskray.on_ray.parcel import Parcel, Resources
from maskray.on_ray.submit import DEFAULT_ADDRESS, Ended, Jobs, address_of

ROOT = Path(__file__).parents[2]
PLACES = ("--set", "data.path=/mnt/digits", "--set", "storage.path=s3://bucket/runs")
DEMO = ("pretrain", "--config", "configs/pretrain/digits.yaml")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parcel_of(*typed: str) -> Parcel:
    arguments = cli._parser().parse_args(["submit", *typed])
    job = arguments.job[1:] if arguments.job[:1] == ["--"] else arguments.job
    return submit._parcel(arguments, job)


def refused(*typed: str) -> str:
    with pytest.raises(MaskrayError) as error:
        parcel_of(*typed)
    return str(error.value)


def test_a_command_becomes_an_entry_point_and_its_config_goes_along():
    sent = parcel_of("--entrypoint-cpus", "1", "--entrypoint-resource", "driver=0.5", "--", *DEMO, *PLACES)
    assert shlex.split(sent.entrypoint) == [
        *("python", "-m", "maskray.cli", "pretrain", "--config=configs/pretrain/digits.yaml"),
        *PLACES,
    ]
    assert dict(sent.files) == {"configs/pretrain/digits.yaml": ROOT / "configs" / "pretrain" / "digits.yaml"}
    assert sent.resources == Resources(cpus=1.0, custom={"driver": 0.5})
    assert sent.submission_id.startswith("pretrain-digits-")
    assert sent.metadata["maskray.command"] == "pretrain"


def test_what_a_config_is_laid_over_goes_along(tmp_path: Path):
    (tmp_path / "base.yaml").write_text((ROOT / DEMO[2]).read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text("extends: ../base.yaml\nseed: 1\n")
    sent = parcel_of("pretrain", f"--conf={tmp_path}/mine/run.yaml", *PLACES)
    assert shlex.split(sent.entrypoint)[4] == "--config=config/mine/run.yaml"
    assert set(sent.files) == {"config/mine/run.yaml", "config/base.yaml"}


def test_an_absolute_path_in_a_config_means_nothing_elsewhere(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(f"extends: {ROOT / DEMO[2]}\n")
    assert "extends: an absolute path" in refused("pretrain", "--config", str(tmp_path / "run.yaml"), *PLACES)


def test_a_sweep_takes_its_base_along():
    places = ("--set", "overrides.data.path=/mnt/digits", "--set", "overrides.storage.path=/mnt/runs")
    sent = parcel_of("--", "sweep", "--config", "configs/sweep/mask_ratio_x_depth.yaml", *places, "--resume")
    assert set(sent.files) == {"configs/sweep/mask_ratio_x_depth.yaml", "configs/pretrain/digits.yaml"}
    assert sent.entrypoint.endswith("--resume")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ((*DEMO, *PLACES[2:]), "data.path: a relative path lies in the job's own folder"),
        ((*DEMO, *PLACES[:2]), "storage.path: a submitted job's own folder does not outlast it"),
        ((*DEMO, *PLACES, "--set", "training.ledger=ledger"), "training.ledger: a submitted job's own folder"),
        ((*DEMO, *PLACES, "--set", "init_from=mae.pth"), "init_from: .*--include mae.pth"),
        (("doctor", *DEMO[1:], *PLACES[:2]), "storage.path: a submitted job's own folder"),
        (("ingest", "/mnt/photos", "runs/data"), "destination: a submitted job's own folder"),
        (("ingest", "photos", "s3://bucket/data"), "source: a relative path"),
        (("embed", "--config", "configs/embed/digits.yaml"), "images: a relative path"),
        (("evaluate", "--config", "configs/evaluate/digits.yaml"), "data.path: a relative path"),
        (("repair", "runs/digits-0"), "RUN_FOLDER: a submitted job's own folder"),
        (("repair", *DEMO[1:], *PLACES[:2]), "storage.path: a submitted job's own folder"),
        (("repair",), "say which run. Found: nothing"),
        (("promote", "--config", "configs/promote/digits.yaml"), "data.path: a relative path"),
        (("sweep", "--config", "configs/sweep/mask_ratio_x_depth.yaml"), "base.data.path: a relative path"),
        (("ui",), "submit: no such job. Found: ui. Allowed: pretrain, sweep"),
        ((*DEMO, *PLACES, "--set", "optim.lr=1"), "optim.lr: no such key"),
        ((*DEMO, *PLACES, "--set", "tracking.uri=http://me:s3cret@mlflow"), "no password goes along"),
    ],
)
def test_what_cannot_work_there_is_refused_here(typed: tuple[str, ...], words: str):
    message = refused("--", *typed)
    assert "s3cret" not in message
    assert re.search(words, message)


def test_annotations_and_images_of_a_detection_must_be_found_there(tmp_path: Path):
    """Each of the shipped config's four relative places is refused, until all are absolute."""
    text, config = (ROOT / "configs/evaluate/detection.yaml").read_text(), tmp_path / "detection.yaml"
    typed = ("evaluate", "--config", str(config), "--set", "storage.path=/mnt/runs")
    for key, place in (
        ("train.annotations", "coco/annotations/instances_train2017.json"),
        ("train.images", "coco/train2017"),
        ("val.annotations", "coco/annotations/instances_val2017.json"),
        ("val.images", "coco/val2017"),
    ):
        config.write_text(text)
        assert re.search(f"evaluations.0.{key}: a relative path.*Found: {place}", refused(*typed))
        assert place in text
        text = text.replace(place, f"/mnt/{place}")
    config.write_text(text)
    parcel_of(*typed)


def test_a_runs_folder_is_mended_from_where_it_is_seen():
    sent = parcel_of("--", "repair", "/mnt/runs/digits-0", "--dry-run")
    assert shlex.split(sent.entrypoint)[3:] == ["repair", "/mnt/runs/digits-0", "--dry-run"]
    assert parcel_of("--", "repair", *DEMO[1:], *PLACES).submission_id.startswith("repair-digits-")


def test_a_relative_path_that_is_taken_along_is_no_mistake():
    sent = parcel_of("--include", "Makefile", "--", *DEMO, *PLACES, "--set", "init_from=Makefile")
    assert "Makefile" in sent.files


def test_digits_and_registered_models_are_no_places():
    assert parcel_of("--", "ingest", "digits", "s3://bucket/data").files == {}
    places = ("--set", "data.path=/mnt/digits", "--set", "model=models:/mine/1", "--set", "storage.path=/mnt/runs")
    parcel_of("--", "evaluate", "--config", "configs/evaluate/digits.yaml", *places)


@pytest.mark.parametrize("typed", [(), ("--stop", "a", "--", *DEMO), ("--stop", "a", "--follow", "b")])
def test_one_thing_at_a_time(typed: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        cli.main(["submit", *typed])
    assert left.value.code == cli.USER_MISTAKE
    assert "usage: maskray submit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (Ended("SUCCEEDED", 0, ""), 0),
        (Ended("FAILED", 2, ""), 2),
        (Ended("FAILED", 1, ""), 1),
        (Ended("FAILED", 3, ""), 3),  # a promotion that is refused
        (Ended("FAILED", -9, ""), 1),
        (Ended("FAILED", None, "runtime_env setup failed"), 1),
        (Ended("STOPPED", None, ""), 143),
    ],
)
def test_the_exit_code_is_the_jobs(ended: Ended, code: int, capsys: pytest.CaptureFixture[str]):
    assert submit._say(Console(), "job", ended) == code
    assert f"job: {ended.status}" in (said := capsys.readouterr().out)
    assert ended.message in said


def test_the_address_is_what_is_given_or_the_environments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert address_of(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of a driver: no dashboard's
    assert address_of(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265/")
    assert address_of(None) == "http://head:8265"
    assert address_of("https://other") == "https://other"
    with pytest.raises(ClusterError, match=r"--address: .*Found: ray://head:10001"):
        address_of("ray://head:10001")


def test_nothing_that_listens_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray would take it instead of the address that is given
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}"
    with pytest.raises(ClusterError, match=f"no Ray dashboard answers there.*{address}.*8265 by default"):
        Jobs(address)


def test_every_command_that_can_be_a_job_has_a_check():
    arguments: argparse.Namespace = cli._parser().parse_args(["submit", "x"])
    assert set(submit._CHECKS) <= set(arguments.parsers)
    assert set(submit._CHECKS) == {path.stem for path in (ROOT / "jobs").glob("*.py")} | {"doctor", "repair"}
