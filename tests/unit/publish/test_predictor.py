"""A registered encoder takes images as they come, and names the one that is none."""

import base64
import json
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from maskray.models.encoder import load_encoder, resize
from maskray.publish.registry import save_pyfunc

ARRAYS = [np.random.default_rng(i).integers(0, 256, (8 + i, 14 - i, 1), dtype=np.uint8) for i in range(4)]


@pytest.fixture(scope="module")
def model_path(digits_encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    save_pyfunc(path, digits_encoder, example=np.stack([a[:8, :8] for a in ARRAYS]))
    return path


@pytest.fixture(scope="module")
def model(model_path):
    with pytest.MonkeyPatch.context() as patched:
        import sys

        patched.setattr(sys, "path", list(sys.path))
        yield mlflow.pyfunc.load_model(str(model_path))


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, array in enumerate(ARRAYS):
        Image.fromarray(array[..., 0]).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(ARRAYS))]


@pytest.fixture(scope="module")
def expected(digits_encoder):
    tensors = [resize(torch.from_numpy(a).permute(2, 0, 1)[None], (8, 8)) for a in ARRAYS]
    return load_encoder(digits_encoder)(torch.cat(tensors)).numpy()


def _encoded(paths):
    return [base64.b64encode(p.read_bytes()).decode() for p in paths]


KINDS = {
    "bytes": lambda paths: [p.read_bytes() for p in paths],
    "base64": _encoded,
    "base64 in lines": lambda paths: ["\n".join((e[:50], e[50:])) for e in _encoded(paths)],
    "data URIs": lambda paths: [f"data:image/png;base64,{e}" for e in _encoded(paths)],
    "paths": lambda paths: [str(p) for p in paths],
    "arrays": lambda paths: list(ARRAYS),
    "arrays as JSON": lambda paths: [a.tolist() for a in ARRAYS],
    "all at once": lambda paths: [paths[0].read_bytes(), _encoded(paths)[1], str(paths[2]), ARRAYS[3]],
}
HOLDERS = {
    "list": list,
    "tuple": tuple,
    "dict": lambda images: {"image": images},
    "records": lambda images: [{"image": image} for image in images],
    "table": lambda images: pd.DataFrame({"key": range(len(images)), "image": images}),
    "table of one column": lambda images: pd.DataFrame({"picture": images}),
    "array": lambda images: np.array([*images, None], dtype=object)[:-1],
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind_in_everything_that_holds_them(model, paths, expected, kind, holder):
    features = model.predict(HOLDERS[holder](KINDS[kind](paths)))
    assert features.dtype == np.float32
    assert np.array_equal(features, expected)


def test_one_image_alone(model, paths, expected):
    for one in (str(paths[0]), paths[0].read_bytes(), _encoded(paths)[0], ARRAYS[0][None]):
        np.testing.assert_allclose(model.predict(one), expected[:1], rtol=1e-5, atol=1e-6)


def test_none_and_many(model, digits_encoder):
    assert model.predict([]).shape == model.predict(np.empty((0, 8, 8, 1), np.uint8)).shape == (0, 16)
    many = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 1), dtype=np.uint8)
    expected = load_encoder(digits_encoder)(torch.from_numpy(many).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(model.predict(many), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"no image", "Image 1 cannot be used: no image format that is known begins so"),
        (b"", "the file is empty"),
        ("/nowhere/at/all.png", "no file here has that path"),
        ("bm8gaW1hZ2U=", "no file here has that path"),
        ("data:image/png;base64,bm8gaW1hZ2U=", "no image format that is known"),
        ("/" * 5000, "too long for a path"),
        (np.zeros((8, 8, 3), np.uint8), r"ndarray of shape \(8, 8, 3\).*where C is 1"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\)"),
        (np.zeros((8, 8, 1), np.float32), "its values are float32"),
        ([[[300]]], "its values reach from 300 to 300"),
        ([[[1], [2]], [[3]]], "not of equal length"),
        (None, r"NoneType of shape \(\)"),
        (7, r"int of shape \(\)"),
    ],
)
def test_what_is_no_image_is_named(model, bad, says):
    with pytest.raises(MlflowException, match=says) as caught:
        model.predict([ARRAYS[0], bad])
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_a_table_without_the_column_is_refused(model):
    with pytest.raises(MlflowException, match=r"no column 'image'\. Found: a, b"):
        model.predict(pd.DataFrame({"a": [1], "b": [2]}))


def test_paths_may_be_forbidden(model_path, paths, expected):
    closed = mlflow.pyfunc.load_model(str(model_path), model_config={"paths": False})
    assert np.array_equal(closed.predict(_encoded(paths)), expected)
    with pytest.raises(MlflowException, match="paths are not read here"):
        closed.predict([str(paths[0])])


def test_signature_and_example_say_what_goes_in_and_comes_out(model_path, model):
    signature = model.metadata.signature
    assert signature.outputs.inputs[0].shape == (-1, 16)
    assert signature.inputs is not None
    example = model.input_example
    assert model.predict(example).shape == (4, 16)
    serving = json.loads((model_path / "serving_input_example.json").read_text())
    assert model.predict(serving["inputs"]).shape == (4, 16)


def test_it_is_loaded_where_mlflow_may_unpickle_nothing(model_path, paths, expected, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model = mlflow.pyfunc.load_model(str(model_path))
    np.testing.assert_allclose(model.predict([str(path) for path in paths]), expected, rtol=1e-5, atol=1e-6)
    assert [path for path in model_path.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".joblib")] == []
