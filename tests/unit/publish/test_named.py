"""An encoder by folder, version or alias: resolved once, and what is not there is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from maskray.config.schema import TrackingConfig
from maskray.errors import CheckpointError, MaskrayError, TrackingError
from maskray.models.encoder import load_encoder
from maskray.publish.named import open_encoder
from maskray.publish.registry import ModelCard, register_encoder, save_pyfunc
from maskray.tracking.mlflow_runs import DatasetCard, RunCard, ensure_run
from maskray.tracking.mlflow_store import Store

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8))


@pytest.fixture
def registered(store: Store, digits_encoder: Path) -> Store:
    """A store with two versions of a model, the first of which is the champion."""
    card = RunCard("digits-f00d", "f00d", {"seed": 0}, {}, "name: x\n", DatasetCard("digits", "/d", "d16e57", 1))
    run_id = ensure_run(store, card)
    for step in (1, 2):
        register_encoder(store.uri, run_id, digits_encoder, "digits", ModelCard(step=step))
    store.client().set_registered_model_alias("digits", "champion", "1")
    return store


def opened(store: Store, text: str):
    return open_encoder(text, TrackingConfig(uri=store.uri), "runs")


@pytest.mark.parametrize(
    ("text", "name"), [("models:/digits/2", "models:/digits/2"), ("models:/digits@champion", "models:/digits/1")]
)
def test_a_version_or_alias_gives_the_registered_encoder(registered, digits_encoder, text, name):
    found = opened(registered, text)
    assert found.name == name, "an alias must be told by the version that it led to"
    assert torch.equal(found.encoder(IMAGES), load_encoder(digits_encoder)(IMAGES))
    assert found.digest == opened(registered, str(digits_encoder)).digest


def test_a_folder_as_mlflow_keeps_it_gives_it_too(store, digits_encoder, tmp_path):
    save_pyfunc(tmp_path / "model", digits_encoder)
    assert torch.equal(opened(store, str(tmp_path / "model")).encoder(IMAGES), load_encoder(digits_encoder)(IMAGES))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models:/digits@best", r"no @best of a model digits\..*versions 2, 1; aliases @champion"),
        ("models:/digits/3", r"no version 3 of a model digits\..*versions 2, 1; aliases @champion"),
        ("models:/digit/1", r"no version 1 of a model digit\..*Allowed: models digits"),
        ("models:/digits/latest", "models:/name@alias or models:/name/version"),
    ],
)
def test_what_the_registry_has_not_is_named_with_what_it_has(registered, text, says):
    with pytest.raises(TrackingError, match=says):
        opened(registered, text)


def test_files_that_are_gone_or_damaged_are_named(registered):
    source = registered.client().get_model_version_download_uri("digits", "1")
    folder = Path(source.removeprefix("file://")) / "artifacts/encoder"
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"the files of models:/digits/1 are gone or cannot be read.*damaged"):
        opened(registered, "models:/digits@champion")
    shutil.rmtree(folder.parents[1])
    with pytest.raises(
        CheckpointError, match=r"the files of models:/digits/1 are gone or cannot be read.*put them back"
    ):
        opened(registered, "models:/digits@champion")


def test_no_store_is_made_of_a_wrong_path(tmp_path, digits_encoder):
    for config, runs in (
        (TrackingConfig(), tmp_path / "runs"),
        (TrackingConfig(uri=f"sqlite:///{tmp_path}/m.db"), "x"),
    ):
        with pytest.raises(MaskrayError, match=r"no MLflow store beside the runs|no such SQLite file"):
            open_encoder("models:/digits/1", config, str(runs))
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_in_a_bucket(bucket, digits_encoder, store):
    from maskray.data.storage import Storage

    place = Storage(f"{bucket}/encoder")
    for path in digits_encoder.iterdir():
        place.write_bytes(path.name, path.read_bytes())
    found = opened(store, place.uri)
    assert torch.equal(found.encoder(IMAGES), load_encoder(digits_encoder)(IMAGES))
