import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import mlflow.pyfunc
import numpy as np
import pytest
import torch

from maskray.config.load import parse
from maskray.config.schema import RunConfig
from maskray.errors import CheckpointError, TrackingError
from maskray.models.build import build_model
from maskray.models.encoder import load_encoder, save_encoder
from maskray.models.normalize import Normalize
from maskray.publish.registry import ModelCard, register_encoder
from maskray.tracking.mlflow_runs import DatasetCard, RunCard, close_run, ensure_run
from maskray.tracking.mlflow_store import Store

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
CARD = ModelCard(
    step=40,
    tags={"maskray.fingerprint": "f00d"},
    metrics={"probe/accuracy": 0.75},
    description="# digits\n0.75 with 5 labels a class",
    files={"lineage.json": b"{}"},
    example=IMAGES,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    size = {"width": 16, "depth": 1, "heads": 2}
    config = parse(
        RunConfig,
        {
            "name": "tiny",
            "data": {"path": "unused", "image_size": 8, "channels": 1},
            "model": {"patch": 2, "decoder": size, **size},
            "optim": {"steps": 10, "global_batch": 64},
        },
    )
    torch.manual_seed(0)
    save_encoder(tmp_path / "enc", build_model(config.model, (8, 8), 1), Normalize([0.3], [0.37]), config)
    return tmp_path / "enc"


@pytest.fixture
def run_id(store: Store) -> str:
    card = RunCard("digits-f00d", "f00d", {"seed": 0}, {}, "name: x\n", DatasetCard("digits", "/d", "d16e57", 1))
    return ensure_run(store, card)


@pytest.fixture
def loaded_from(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's process: it says where MLflow is, once. Loading puts the model's code on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    return store.uri


def expected(folder: Path, images: np.ndarray) -> np.ndarray:
    return load_encoder(folder)(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def test_registered_encoder_is_loaded_by_its_name(store: Store, run_id: str, folder: Path, loaded_from: str) -> None:
    version = register_encoder(store.uri, run_id, folder, "digits", CARD)
    assert version == "1"
    model = mlflow.pyfunc.load_model("models:/digits/1")
    features = model.predict(IMAGES)
    assert (features.dtype, features.shape) == (np.float32, (3, 16))
    np.testing.assert_array_equal(features, expected(folder, IMAGES))
    large = RNG.integers(0, 256, (2, 20, 31, 1), dtype=np.uint8)
    np.testing.assert_array_equal(model.predict(large), expected(folder, large))
    assert model.predict(IMAGES[:0]).shape == (0, 16)
    many = RNG.integers(0, 256, (600, 8, 8, 1), dtype=np.uint8)
    assert model.predict(many).shape == (600, 16)


def test_signature_refuses_other_images(store: Store, run_id: str, folder: Path, loaded_from: str) -> None:
    register_encoder(store.uri, run_id, folder, "digits", CARD)
    model = mlflow.pyfunc.load_model("models:/digits/1")
    for bad in (IMAGES.astype(np.float32), np.repeat(IMAGES, 3, axis=3)):
        with pytest.raises(mlflow.MlflowException):
            model.predict(bad)


def test_version_says_where_it_comes_from(store: Store, run_id: str, folder: Path) -> None:
    register_encoder(store.uri, run_id, folder, "digits", CARD)
    client = store.client()
    version = client.get_model_version("digits", "1")
    assert (version.run_id, version.description) == (run_id, CARD.description)
    assert version.tags == {"maskray.fingerprint": "f00d", "maskray.step": "40"}
    run = client.get_run(run_id)
    assert run.data.metrics == {"probe/accuracy": 0.75}
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.status, model.source_run_id, model.name) == ("READY", run_id, "digits")
    assert {m.key: m.value for m in model.metrics} == {"probe/accuracy": 0.75}
    assert model.params == {"seed": "0"}


def test_the_run_is_left_alone(store: Store, run_id: str, folder: Path) -> None:
    close_run(store, run_id, "FINISHED")
    register_encoder(store.uri, run_id, folder, "digits", CARD)
    assert store.client().get_run(run_id).info.status == "FINISHED"
    assert mlflow.active_run() is None
    assert not {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI"} & os.environ.keys()


def test_registering_again_gives_the_same_version(store: Store, run_id: str, folder: Path) -> None:
    assert [register_encoder(store.uri, run_id, folder, "digits", CARD) for _ in range(2)] == ["1", "1"]
    assert len(store.client().get_metric_history(run_id, "probe/accuracy")) == 1
    assert register_encoder(store.uri, run_id, folder, "digits", replace(CARD, step=80, example=None)) == "2"
    assert register_encoder(store.uri, run_id, folder, "digits", CARD) == "1"


def test_registration_killed_half_way_is_taken_up(
    store: Store, run_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "create_model_version", killed)
        with pytest.raises(KeyboardInterrupt):
            register_encoder(store.uri, run_id, folder, "digits", CARD)
    assert register_encoder(store.uri, run_id, folder, "digits", CARD) == "1"
    assert len(store.client().search_logged_models([store.experiment_id])) == 1
    assert len(store.client().get_metric_history(run_id, "probe/accuracy")) == 1


def test_a_version_killed_before_its_description_gets_it_later_and_once(
    store: Store, run_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    card = replace(CARD, description="version {version} of {model_id}")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "update_model_version", killed)
        with pytest.raises(KeyboardInterrupt):
            register_encoder(store.uri, run_id, folder, "digits", card)
    assert register_encoder(store.uri, run_id, folder, "digits", card) == "1"
    client = store.client()
    (model,) = client.search_logged_models([store.experiment_id])
    assert client.get_model_version("digits", "1").description == f"version 1 of {model.model_id}"
    client.update_model_version("digits", "1", "edited")
    register_encoder(store.uri, run_id, folder, "digits", card)
    assert client.get_model_version("digits", "1").description == "edited"


def test_nothing_is_pickled_and_requirements_are_pinned(
    store: Store, run_id: str, folder: Path, tmp_path: Path
) -> None:
    register_encoder(store.uri, run_id, folder, "digits", CARD)
    (model,) = store.client().search_logged_models([store.experiment_id])
    root = Path(model.artifact_location.removeprefix("file://"))
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert (root / "lineage.json").read_bytes() == b"{}"
    assert {"predictor.py", "artifacts/encoder/model.safetensors", "artifacts/encoder/encoder.json"} <= files
    assert not [f for f in files if f.endswith((".pkl", ".pickle", ".pt", ".pyc"))]
    requirements = (root / "requirements.txt").read_text().splitlines()
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements
    assert all("==" in line for line in requirements)


USER = """
import sys
sys.path = [p for p in sys.path if not p.endswith("platform")]  # an installed one would not count
import importlib.util
assert importlib.util.find_spec("maskray") is None
import numpy as np, mlflow.pyfunc
images = np.load(sys.argv[1])
np.save(sys.argv[2], mlflow.pyfunc.load_model("models:/digits/1").predict(images))
"""


def test_loads_where_maskray_is_not_installed(store: Store, run_id: str, folder: Path, tmp_path: Path) -> None:
    register_encoder(store.uri, run_id, folder, "digits", CARD)
    np.save(tmp_path / "in.npy", IMAGES)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": store.uri}
    command = [sys.executable, "-c", USER, str(tmp_path / "in.npy"), str(tmp_path / "out.npy")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(folder, IMAGES), rtol=1e-5, atol=1e-6)


def test_names_that_the_registry_does_not_take(store: Store, run_id: str, folder: Path) -> None:
    with pytest.raises(TrackingError, match="may hold no /"):
        register_encoder(store.uri, run_id, folder, "team/digits", CARD)


def test_a_folder_without_encoder_is_refused(store: Store, run_id: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        register_encoder(store.uri, run_id, tmp_path, "digits", CARD)
    (model,) = store.client().search_logged_models([store.experiment_id])
    assert model.status == "FAILED"
