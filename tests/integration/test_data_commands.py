"""`maskray ingest` and `maskray data` as a user types them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from maskray import cli
from maskray.data.manifest import versions
from maskray.data.storage import Storage
from maskray.preparing import DATASET, prepare


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """say(*arguments, code=0): all that a command says, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        assert cli.main([str(argument) for argument in arguments]) == code
        out = capsys.readouterr()
        return " ".join((out.out + out.err).split())

    return run


@pytest.fixture
def pictures(tmp_path):
    def make(name, numbers):
        (tmp_path / name / "all").mkdir(parents=True)
        for i in numbers:
            pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / "all" / f"{i:03d}.png")
        return name

    return make


def fingerprints(path="shards"):
    return list(versions(Storage(Path(path))))


def test_from_pictures_to_a_clean_dataset(say, pictures, tmp_path):
    source = pictures("first", range(80))
    said = say("ingest", source, "shards", "--group-rows", 8, "--resize-short", 16, "--deduplicate")
    assert "check: 80 of 80 images" in said, "plain lines where nobody watches"
    first = fingerprints()[0]
    assert first in said
    assert "0 bad and 0 duplicate ones set aside" in said
    said = say("ingest", pictures("second", range(100, 130)), "shards", "--add")
    assert "(30 of them new, 0 were there)" in said
    first, second = fingerprints()

    said = say("data", "show", "shards")
    for word in ("16 to 31", "added from", first, second, "contact-sheet.png", "held out"):
        assert word in said
    assert (tmp_path / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")
    assert (
        second not in say("data", "show", "shards", "--version", first, "--sheet", "old.png").partition("Versions")[0]
    )

    assert "every checksum is right" in say("data", "check", "shards")
    before = {p: p.stat().st_size for p in (tmp_path / "shards").rglob("*") if p.is_file()}
    said = say("data", "gc", "shards")
    assert "Nothing was removed. With --delete: 1 versions" in said
    assert f"Not asked: runs: no place was named, and there is no {tmp_path}/runs" in said
    assert "Not asked: MLflow" in said
    assert before == {p: p.stat().st_size for p in (tmp_path / "shards").rglob("*") if p.is_file()}
    (tmp_path / f"runs/one/{DATASET}").parent.mkdir(parents=True)
    (tmp_path / f"runs/one/{DATASET}").write_text(first)
    said = say("data", "gc", "shards", "--delete", "--storage", "runs", "--tracking-uri", "none")
    assert "0 versions, 0 files" in said
    assert f"(the newest, or named by the 1 runs in {tmp_path}/runs)" in said
    assert fingerprints() == [first, second]
    say("data", "gc", "shards", "--delete", "--storage", "none", "--tracking-uri", "none")
    assert fingerprints() == [second]
    assert "no such version" in say("data", "show", "shards", "--version", first, code=cli.USER_MISTAKE)
    assert "every checksum is right" in say("data", "check", "shards")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--storage", "rnus"], "Config: --storage: there are no runs: nothing is at that place. Found: {}/rnus."),
        (["--delete", "--storage", "rnus"], "Config: --storage: there are no runs: nothing is at that place."),
        (["--delete"], "Config: --storage: before something is deleted it must be said where the runs are"),
        (
            ["--delete", "--storage", "runs"],
            "Config: --tracking-uri: before something is deleted it must be said which",
        ),
        (["--tracking-uri", "sqlite:///{}/typo.db"], "MLflow: tracking.uri: there is no such SQLite file."),
    ],
)
def test_a_place_that_is_not_there_is_not_taken_for_one_that_names_nothing(say, pictures, tmp_path, arguments, said):
    say("ingest", pictures("first", range(20)), "shards", "--group-rows", 8)
    say("ingest", pictures("second", range(30, 50)), "shards", "--add")
    (tmp_path / "runs").mkdir()
    before = fingerprints()
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert said.format(tmp_path) in say("data", "gc", "shards", *arguments, code=cli.USER_MISTAKE)
    assert fingerprints() == before
    assert not (tmp_path / "typo.db").exists()


def test_damaged_shards_are_named_with_exit_code_2(say, pictures, tmp_path):
    say("ingest", pictures("first", range(40)), "shards", "--group-rows", 8)
    path = tmp_path / "shards/train/00000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    said = say("data", "check", "shards", code=cli.USER_MISTAKE)
    assert "train/00000.parquet" in said
    assert "no such dataset" in say("data", "check", "nowhere", code=cli.USER_MISTAKE)


def test_a_registered_version_keeps_its_data(say, pictures, tmp_path, runs, mlflow_tables):
    from maskray.config.schema import TrackingConfig
    from maskray.tracking.mlflow_store import open_store

    say("ingest", pictures("first", range(20)), "shards", "--group-rows", 8)
    say("ingest", pictures("second", range(30, 50)), "shards", "--add")
    store = open_store(TrackingConfig(), str(runs))
    store.client().create_registered_model("m")
    store.client().create_model_version("m", store.uri, tags={"dataset": fingerprints()[0]})
    assert "0 versions, 0 files" in say("data", "gc", "shards")
    assert "0 versions, 0 files" in say("data", "gc", "shards", "--delete", "--storage", "runs")
    other = f"sqlite:///{tmp_path}/other.db"
    shutil.copy(mlflow_tables, tmp_path / "other.db")
    open_store(TrackingConfig(uri=other), str(runs))
    assert "1 versions" in say("data", "gc", "shards", "--tracking-uri", other)


def test_a_run_that_was_begun_on_an_older_version_is_pointed_out(say, pictures, tiny, tmp_path, runs, caplog):
    say("ingest", pictures("first", range(200)), "shards", "--group-rows", 8)
    config = tiny(data={"path": "shards", "channels": 3}, optim={"global_batch": 16})
    begun = prepare(config)
    begun.run.write_bytes(DATASET, begun.dataset.manifest.fingerprint.encode())  # as `launch` does
    say("ingest", pictures("second", range(300, 330)), "shards", "--add")
    caplog.clear()
    anew = prepare(config)
    assert anew.plan.run_name != begun.plan.run_name
    old = begun.dataset.manifest.fingerprint
    assert f"{begun.plan.run_name} was begun on another version" in caplog.text
    assert f"--set data.version={old}" in caplog.text
    caplog.clear()
    data = config.data.model_copy(update={"version": old})
    again = prepare(config.model_copy(update={"data": data}))
    assert again.plan == begun.plan
    assert "was begun on" not in caplog.text


def test_the_command_of_a_launched_run_leaves_the_datasets_name(say, tiny, tmp_path, digits):
    config = tiny(optim={"steps": 4}, probe={"enabled": False})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    say("pretrain", "--config", "config.yaml", "--launcher", "torch")
    (named,) = (tmp_path / "runs").glob(f"tiny-*/{DATASET}")
    assert named.read_text() == fingerprints(digits)[0]
