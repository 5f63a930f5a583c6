"""An encoder's folder into MLflow: a model of its run, and a version of a registered model. Clients only."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType

from maskray.data import decode
from maskray.errors import TrackingError
from maskray.models.encoder import load_encoder
from maskray.publish.card import MODEL_ID, VERSION
from maskray.tracking.mlflow_store import shown

Images = np.ndarray[Any, np.dtype[np.uint8]]

PREDICTOR = Path(__file__).with_name("predictor.py")
PACKAGE = Path(__file__).parents[1]
ENCODER = "encoder"
"""Name of the folder's artifact, as `predictor.py` asks for it."""
STEP_TAG = "maskray.step"
MAX_DESCRIPTION = 5000
"""Letters that MLflow's tables have room for."""
MAX_EXAMPLE_VALUES, EXAMPLE_QUALITY = 2**16, 95
ABOUT = """Encoder pretrained as a masked autoencoder. Images in, one feature vector each out:

```python
encoder = mlflow.pyfunc.load_model("models:/{name}/1")
features = encoder.predict(["photo.jpg", open("other.png", "rb").read()])  # float32 (2, D)
features = encoder.predict(images)  # uint8 (B, H, W, C), any size -> float32 (B, D)
```

Over HTTP, after `mlflow models serve -m models:/{name}/1 --env-manager local -p 5001`; images as base64, as paths of
files that the server has, or as arrays:

```sh
curl localhost:5001/invocations -H 'Content-Type: application/json' -d '{{"inputs": ["'$(base64 -w0 photo.jpg)'"]}}'
```
"""
MODEL_CONFIG = {"device": "cpu", "paths": True}
"""What `load_model(…, model_config=…)` may say otherwise: MLflow leaves out what was not named here."""
REQUIREMENTS = (
    "mlflow",
    "numpy",
    "pillow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "tifffile",
    "timm",
    "torch",
    "torchcodec",
    "torchvision",
)
"""What loading needs besides the package's own code, which travels with the model."""


@dataclass(frozen=True)
class ModelCard:
    """What the registry is told of an encoder."""

    step: int
    """Of the run, after which the encoder was taken."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the version."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the encoder is worth; shown with the model and its run."""
    description: str = ""
    """Of the version, in Markdown; `card.VERSION` and `card.MODEL_ID` in it become those."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Kept beside the model, by name."""
    example: Images | None = None
    """A few images (B, H, W, C), kept beside the model to be tried out, if they are small."""


def register_encoder(uri: str, run_id: str, folder: Path, name: str, card: ModelCard) -> str:
    """A version of the registered model `name` that holds an encoder; the one there is, where it was registered before.

    Args:
        uri: of MLflow, tracking and registry.
        run_id: the run that the encoder comes from. Its status is left alone.
        folder: what `save_encoder` wrote.
        name: of the registered model; made where there is none.
        card: what is told of it.

    Raises:
        TrackingError: MLflow refuses.
        CheckpointError: the folder holds no encoder.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        model_id = _model_of(client, run_id, card.step)
        version = _version_of(client, name, run_id, card.step)
        if version is None:
            model_id = model_id or _log_model(client, run_id, folder, name, card)
            _log_metrics(client, run_id, model_id, card)
            version = _create_version(client, uri, run_id, model_id, name, card)
        _describe(client, name, version, model_id, card)
        return version
    except MlflowException as error:
        raise TrackingError(
            "MLflow does not take the encoder",
            key="tracking.register_as",
            found=f"{name}: {shown(str(error))}",
            fix="a name may hold no / and no :" if set("/:") & set(name) else None,
        ) from error


def _version_of(client: MlflowClient, name: str, run_id: str, step: int) -> str | None:
    quoted = name.replace("'", "''")
    versions = client.search_model_versions(f"name = '{quoted}' AND run_id = '{run_id}'")
    return next((str(v.version) for v in versions if v.tags.get(STEP_TAG) == str(step)), None)


def _model_of(client: MlflowClient, run_id: str, step: int) -> str | None:
    """A model that was logged whole before; its registration may have been killed."""
    experiment = client.get_run(run_id).info.experiment_id
    query = f"source_run_id = '{run_id}' AND tags.`{STEP_TAG}` = '{step}'"
    models = client.search_logged_models([experiment], query)
    return next((m.model_id for m in models if m.status == LoggedModelStatus.READY), None)


def _log_model(client: MlflowClient, run_id: str, folder: Path, name: str, card: ModelCard) -> str:
    """As `mlflow.pyfunc.log_model` does, which needs an active run and closes it."""
    run = client.get_run(run_id)
    model = client.create_logged_model(
        run.info.experiment_id, name, run_id, {STEP_TAG: str(card.step)}, dict(run.data.params), "mae-encoder"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="maskray-") as temporary:
            path = Path(temporary) / "model"
            save_pyfunc(path, folder, model_id=model.model_id, run_id=run_id, example=card.example)
            for file, content in card.files.items():
                (path / file).write_bytes(content)
            client.log_model_artifacts(model.model_id, str(path))
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, card.step)])
    except BaseException:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def save_pyfunc(
    path: Path, folder: Path, *, model_id: str | None = None, run_id: str | None = None, example: Images | None = None
) -> None:
    """Write an encoder's folder as an MLflow model: files only, with the code that reads them.

    Raises:
        CheckpointError: the folder holds no encoder.
    """
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it tells what it does, step by step
    encoder = load_encoder(folder)
    signature = ModelSignature(
        inputs=Schema([ColSpec(AnyType())]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, encoder.width))]),
    )
    # The predictor looks at its input itself: of files, base64, paths and arrays MLflow can state no common type, and
    # it would make tables of lists and of arrays, as far as it can.
    signature._is_signature_from_type_hint = True
    with tempfile.TemporaryDirectory(prefix="maskray-") as temporary:
        # MLflow keeps the folder under its own name, whatever the artifact is called.
        artifact = shutil.copytree(folder, Path(temporary) / ENCODER)
        mlflow.pyfunc.save_model(
            path,
            python_model=str(PREDICTOR),
            artifacts={ENCODER: str(artifact)},
            # All of the package: a part of it would hide an installed one from whoever imports more of it later.
            code_paths=[str(PACKAGE)],
            signature=signature,
            input_example=_small(example, encoder.channels),
            model_config=MODEL_CONFIG,
            pip_requirements=[f"{package}=={metadata.version(package)}" for package in REQUIREMENTS],
            mlflow_model=Model(model_uuid=model_id, model_id=model_id, run_id=run_id),
        )


def _small(example: Images | None, channels: int) -> list[str]:
    """The example's files as base64, or a gray image's where it is large: it is kept as JSON, twice."""
    if example is None or example.size > MAX_EXAMPLE_VALUES:
        example = np.full((1, 16, 16, channels), 128, dtype=np.uint8)
    pictures_NCHW = torch.from_numpy(np.ascontiguousarray(example.transpose(0, 3, 1, 2)))
    return [base64.b64encode(decode.encode(picture_CHW, EXAMPLE_QUALITY)).decode() for picture_CHW in pictures_NCHW]


def _log_metrics(client: MlflowClient, run_id: str, model_id: str, card: ModelCard) -> None:
    """With the model and, by that, with its run. Once, though a launch may have been killed after it."""
    stored = {m.key: m.step for m in client.get_run(run_id).data._metric_objs}
    now = time.time_ns() // 1_000_000
    new = [
        Metric(key, float(value), now, card.step, model_id=model_id, run_id=run_id)
        for key, value in card.metrics.items()
        if stored.get(key, -1) < card.step
    ]
    if new:
        client.log_batch(run_id, metrics=new)


def _create_version(client: MlflowClient, uri: str, run_id: str, model_id: str, name: str, card: ModelCard) -> str:
    try:
        client.create_registered_model(name, description=ABOUT.format(name=name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A database that is opened directly looks a `models:/` source up in MLflow's global store, which is another one.
    through_server = uri.startswith(("http://", "https://"))
    source = f"models:/{model_id}" if through_server else client.get_logged_model(model_id).artifact_location
    version = client.create_model_version(
        name,
        source,
        run_id,
        {**card.tags, STEP_TAG: str(card.step)},
        model_id=model_id,
        await_creation_for=0,
    )
    if not through_server:  # a server does it
        versions = json.dumps([{"name": name, "version": version.version}])
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": versions})
    return str(version.version)


def _describe(client: MlflowClient, name: str, version: str, model_id: str | None, card: ModelCard) -> None:
    """Once: people may have edited it. Not when the version is made, as it says the number."""
    if card.description and not client.get_model_version(name, version).description:
        text = card.description.replace(VERSION, version).replace(MODEL_ID, model_id or "")
        client.update_model_version(name, version, text[:MAX_DESCRIPTION])
