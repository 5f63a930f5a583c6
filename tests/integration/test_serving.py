"""`mlflow models serve` on a registered encoder answers over HTTP with the embedding of this process."""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from maskray.config.schema import TrackingConfig
from maskray.models.encoder import load_encoder, resize
from maskray.publish.registry import ModelCard, register_encoder
from maskray.tracking.mlflow_runs import DatasetCard, RunCard, ensure_run
from maskray.tracking.mlflow_store import DATABASE, open_store

START_SECONDS = 120
ARRAYS = [np.random.default_rng(i).integers(0, 256, (40 + 9 * i, 70 - 7 * i, 1), dtype=np.uint8) for i in range(3)]


@pytest.fixture(scope="module")
def server(digits_encoder: Path, mlflow_tables: Path, tmp_path_factory):
    """The URL of a server that was started as its user would."""
    folder = tmp_path_factory.mktemp("serving")
    shutil.copy(mlflow_tables, folder / DATABASE)
    store = open_store(TrackingConfig(), str(folder))
    card = RunCard("digits-f00d", "f00d", {"seed": 0}, {}, "name: x\n", DatasetCard("digits", "/d", "d16e57", 1))
    version = register_encoder(store.uri, ensure_run(store, card), digits_encoder, "digits", ModelCard(step=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/digits/{version}"]
    # As in an activated environment: MLflow calls uvicorn by its name. The model brings its own code along.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One thread, as in the tests' own process: by another number sums are rounded elsewhere.
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": store.uri,
        "PYTHONPATH": "",
        "PATH": path,
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
            env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/ping", process, folder / "server.log")
        yield url
    finally:
        _stop(process)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                assert response.status == 200
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no answer: {log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen) -> None:
    """The server's processes are a group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)


def ask(server: str, body: bytes, kind: str = "application/json") -> np.ndarray:
    request = urllib.request.Request(f"{server}/invocations", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as response:
        return np.array(json.load(response)["predictions"], np.float32)


@pytest.fixture(scope="module")
def expected(digits_encoder):
    tensors = [resize(torch.from_numpy(a).permute(2, 0, 1)[None], (8, 8)) for a in ARRAYS]
    return load_encoder(digits_encoder)(torch.cat(tensors)).numpy()


def _files() -> list[bytes]:
    out = []
    for array in ARRAYS:
        buffer = io.BytesIO()
        Image.fromarray(array[..., 0]).save(buffer, "PNG")
        out.append(buffer.getvalue())
    return out


def _base64() -> list[str]:
    return [base64.b64encode(data).decode() for data in _files()]


def test_base64_and_arrays_as_json(server, expected):
    for images in (_base64(), [{"image": e} for e in _base64()], [a.tolist() for a in ARRAYS]):
        assert np.array_equal(ask(server, json.dumps({"inputs": images}).encode()), expected)


def test_paths_of_files_on_the_server(server, expected, tmp_path):
    for i, data in enumerate(_files()):
        (tmp_path / f"{i}.png").write_bytes(data)
    paths = [str(tmp_path / f"{i}.png") for i in range(len(ARRAYS))]
    assert np.array_equal(ask(server, json.dumps({"inputs": paths}).encode()), expected)


def test_bytes_in_a_parquet_table(server, expected):
    buffer = io.BytesIO()
    pd.DataFrame({"image": _files()}).to_parquet(buffer)
    assert np.array_equal(ask(server, buffer.getvalue(), "application/vnd.apache.parquet"), expected)


def test_an_image_that_is_none_is_the_clients_mistake(server):
    bad = json.dumps({"inputs": [_base64()[0], base64.b64encode(b"no image").decode()]}).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, bad)
    with caught.value as error:
        assert error.code == 400
        assert "Image 1 cannot be used" in error.read().decode()
