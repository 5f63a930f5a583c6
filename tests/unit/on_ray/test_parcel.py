"""What a submitted job takes along, and what it does not."""

import inspect
import json
import os
import zipfile
from pathlib import Path

import pytest

from maskray.errors import ClusterError
from maskray.on_ray import parcel
from maskray.tracking.mlflow_tracker import MlflowTracker


def test_the_same_files_make_the_same_bytes(tmp_path: Path):
    """Ray names what was uploaded by its digest, and does not upload it again."""
    file = tmp_path / "configs" / "a.yaml"
    file.parent.mkdir()
    file.write_text("name: a\n")
    for at, archive in enumerate(("one.zip", "two.zip")):
        os.utime(file, (at, at))
        parcel.pack({"configs/a.yaml": file}, tmp_path / archive)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as packed:
        assert packed.namelist() == ["configs/a.yaml"]
        assert packed.read("configs/a.yaml") == b"name: a\n"


def test_too_much_is_refused_and_the_largest_are_named(tmp_path: Path):
    for name, size in {"images/one.bin": 3000, "images/two.bin": 2000, "small.yaml": 10}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(size * 1024))
    files = parcel.files_sent([tmp_path / "small.yaml"], [Path("images")], tmp_path)
    with pytest.raises(ClusterError) as refused:
        parcel.pack(files, tmp_path / "x.zip", limit_bytes=4 * 2**20)
    text = str(refused.value)
    assert "4.9 MiB in 3 files" in text
    assert "images 4.9 MiB, images/one.bin 2.9 MiB, images/two.bin 2.0 MiB" in text
    assert "Allowed: 4.0 MiB, packed" in text
    parcel.pack(files, tmp_path / "x.zip")


def test_what_packs_well_is_judged_by_what_is_sent(tmp_path: Path):
    (tmp_path / "zeros.csv").write_bytes(bytes(8 * 2**20))
    parcel.pack({"zeros.csv": tmp_path / "zeros.csv"}, tmp_path / "x.zip", limit_bytes=2**20)


def test_files_keep_their_places_below_this_folder(tmp_path: Path):
    for name in ("configs/run.yaml", "weights/mae.pth", "weights/__pycache__/x.pyc", "weights/.git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = parcel.files_sent([tmp_path / "configs" / "run.yaml"], [Path("weights")], tmp_path)
    assert list(found) == ["configs/run.yaml", "weights/mae.pth"]


def test_configs_from_elsewhere_lie_to_each_other_as_they_did(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    files = [there / "runs" / "a.yaml", there / "base.yaml"]
    assert list(parcel.files_sent(files, [], here)) == ["config/runs/a.yaml", "config/base.yaml"]


@pytest.mark.parametrize(("path", "why"), [("absent", "no such file"), ("../outside", "not below this folder")])
def test_only_what_is_here_is_taken_along(tmp_path: Path, path: str, why: str):
    (tmp_path / "outside").touch()
    (tmp_path / "here").mkdir()
    with pytest.raises(ClusterError, match=rf"--include: .*{path} \({why}"):
        parcel.files_sent([], [Path(path)], tmp_path / "here")


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path):
    (tmp_path / "secret").write_text("s3cret")
    (tmp_path / "here" / "folder").mkdir(parents=True)
    (tmp_path / "here" / "folder" / "file").touch()
    (tmp_path / "here" / "folder" / "inside").symlink_to(tmp_path / "here" / "folder" / "file")
    assert list(parcel.files_sent([], [Path("folder")], tmp_path / "here")) == ["folder/file", "folder/inside"]
    (tmp_path / "here" / "folder" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ClusterError, match=r"folder/link → .*/secret"):
        parcel.files_sent([], [Path("folder")], tmp_path / "here")


def test_mlflows_settings_go_along_and_no_secret_does():
    here = {
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "pa55word",
        "MLFLOW_TRACKING_TOKEN": "t0ken",
        "MLFLOW_TRACKING_URI": "http://me:pa55word@mlflow:5000",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "MASKRAY_COMMIT": "c0ffee",
        "PATH": "/bin",
    }
    sent, kept = parcel.variables_sent(["OMP_NUM_THREADS=2", "TOKENIZERS_PARALLELISM=false"], here)
    assert sent == {
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MASKRAY_COMMIT": "c0ffee",
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    assert kept == ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_URI"]


def test_the_commit_is_that_of_the_sources_where_nothing_else_is_said():
    sent, _ = parcel.variables_sent([], {})
    assert len(sent["MASKRAY_COMMIT"]) == 40
    metadata = parcel.metadata_of("pretrain", "digits", sent)
    assert metadata["maskray.commit"] == sent["MASKRAY_COMMIT"]
    assert metadata["maskray.config"] == "digits"
    assert metadata["maskray.user"]
    assert metadata["maskray.uncommitted_changes"] in ("yes", "no")


@pytest.mark.parametrize("given", ["AWS_SECRET_ACCESS_KEY=s3cret", "my_password=s3cret", "URI=http://me:s3cret@host"])
def test_a_secret_that_is_given_is_refused_and_not_repeated(given: str):
    with pytest.raises(ClusterError, match="no secret goes along") as refused:
        parcel.variables_sent([given], {})
    assert "s3cret" not in str(refused.value)


def test_a_stopped_job_has_time_for_what_the_tracker_holds():
    """`close` waits for MLflow, and the run is closed after it."""
    seconds = inspect.signature(MlflowTracker.close).parameters["timeout_seconds"].default
    assert 1.5 * seconds <= parcel.STOP_SECONDS


def test_a_variable_without_a_value_is_refused():
    with pytest.raises(ClusterError, match="must read NAME=VALUE"):
        parcel.variables_sent(["NAME"], {})


def test_a_password_in_what_is_sent_is_refused_and_not_repeated():
    with pytest.raises(ClusterError, match=r"a\.yaml: .* no password goes along") as refused:
        parcel.refuse_credentials({"a.yaml": "tracking:\n  uri: http://me:s3cret@host:5000\n"})
    assert "s3cret" not in str(refused.value)
    parcel.refuse_credentials({"a.yaml": "tracking: {uri: 'http://host:5000'} # me@host"})


def test_a_job_gives_its_workers_nothing_that_it_has_itself():
    """Ray refuses a job whose driver asks for what the job was submitted with."""
    submitted = {
        "py_modules": ["gcs://x.zip"],
        "working_dir": "gcs://y.zip",
        "env_vars": {"MLFLOW_TRACKING_USERNAME": "me"},
    }
    wanted = {
        "py_modules": ["/package"],
        "env_vars": {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_LOGGING_LEVEL": "WARNING"},
    }
    here = {parcel.JOB_CONFIG: json.dumps({"runtime_env": submitted})}
    assert parcel.of_this_job(wanted, here) == {"env_vars": {"MLFLOW_LOGGING_LEVEL": "WARNING"}}
    plain = {parcel.JOB_CONFIG: json.dumps({"runtime_env": {"working_dir": "gcs://y.zip"}})}
    assert parcel.of_this_job(wanted, plain) == wanted
    assert parcel.of_this_job(wanted, {}) == wanted
