"""Nothing is loaded that may hold code: read from the source, so nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "platform").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])

UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
"""Modules that make objects of bytes. Of `pickle`, its errors are no danger: torch's own loader raises them."""
MAY_BE_NAMED = {"UnpicklingError", "PickleError", "PicklingError"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "Loader",
               "UnsafeLoader", "FullLoader"}  # fmt: skip
OF_PANDAS = {"read_pickle", "to_pickle", "read_hdf"}
UNPACKERS = {"extract", "extractall", "unpack_archive"}
MODELS_OF_MLFLOW = {"load_model", "load_context", "_load_pyfunc"}
ALLOWED = {
    # An export is opened once by its reader, in the process that has just written it.
    "maskray/publish/proof.py": {"torch.export.load", "transformers.ViTMAEModel.from_pretrained"},
}
HUBS = {"from_pretrained", "load_state_dict_from_url", "hf_hub_download", "snapshot_download"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression that is one; what is not a name in it is `?`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def aliases(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` is `numpy`, `load` is `torch.load`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call gives a keyword; None where it gives none, or no constant."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def dangers(source: str) -> Iterator[str]:
    """What in a source may run code that was loaded, or write where an archive says."""
    tree = ast.parse(source)
    known = aliases(tree)
    for name in known.values():
        if name not in UNPICKLERS and _unpickles(name):  # `import pickle` alone does nothing yet
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = _resolved(node, known)
            if _unpickles(name) or (name.startswith("yaml.") and name.removeprefix("yaml.") in UNSAFE_YAML):
                yield name
        elif isinstance(node, ast.Call):
            yield from _dangers_of(node, _resolved(node.func, known))


def _unpickles(name: str) -> bool:
    *_, last = parts = name.split(".")
    return not UNPICKLERS.isdisjoint(parts) and last not in MAY_BE_NAMED


def _resolved(node: ast.expr, known: dict[str, str]) -> str:
    first, dot, rest = dotted(node).partition(".")
    return known.get(first, first) + dot + rest


def _dangers_of(call: ast.Call, name: str) -> Iterator[str]:
    last = name.split(".")[-1]
    unsafe = {
        "torch.load": keyword(call, "weights_only") is not True,
        "torch.jit.load": True,
        "torch.hub.load": True,
        "torch.package.PackageImporter": True,
        "torch.export.load": True,
        "numpy.load": keyword(call, "allow_pickle") is not False,
        "numpy.save": keyword(call, "allow_pickle") is not False,
        "yaml.load": True,
    }
    if unsafe.get(name) or name in RUNS_CODE or last in OF_PANDAS | UNPACKERS | HUBS:
        yield name
    # `mlflow.pyfunc.load_model` and its like run the code that is logged with a model, or unpickle it.
    if last in MODELS_OF_MLFLOW and (
        name.startswith("mlflow") or (call.args and "models:/" in ast.unparse(call.args[0]))
    ):
        yield name
    if keyword(call, "shell") is True:
        yield f"{name}(shell=True)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_others_could_have_written_is_run(path: Path):
    where = path.relative_to(ROOT / "platform").as_posix() if path.is_relative_to(ROOT / "platform") else path.name
    assert set(dangers(path.read_text())) == ALLOWED.get(where, set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b)",
        "import pickle as p\np.load(f)",
        "import pickle\nu = pickle.Unpickler",
        "from pickle import loads",
        "from cloudpickle import loads as f",
        "import ray.cloudpickle as pickle\npickle.loads(b)",
        "from ray import cloudpickle",
        "import joblib\njoblib.load(f)",
        "import dill\ndill.loads(b)",
        "import marshal\nmarshal.loads(b)",
        "import shelve\nshelve.open(f)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=w)",
        "from torch import load\nload(f)",
        "import torch as t\nt.load(f)",
        "import torch\ntorch.jit.load(f)",
        "import torch\ntorch.export.load(f)",
        "import torch\ntorch.hub.load('a', 'b')",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(t)",
        "import yaml\nyaml.full_load(t)",
        "from yaml import load\nload(t, L)",
        "import yaml\nclass L(yaml.FullLoader): pass",
        "import pandas as pd\npd.read_pickle(f)",
        "import tarfile\ntarfile.open(f).extractall()",
        "archive.extract(member)",
        "import shutil\nshutil.unpack_archive(f)",
        "import mlflow.pyfunc\nmlflow.pyfunc.load_model(uri)",
        "import mlflow\nmlflow.pytorch.load_model(uri)",
        "from mlflow.pyfunc import load_model\nload_model(uri)",
        "AutoModel.from_pretrained(name)",
        "eval(text)",
        "exec(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_the_guard_fires(source: str):
    assert list(dangers(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\ntry: f()\nexcept pickle.UnpicklingError: pass",
        "import torch\ntorch.load(f, weights_only=True, map_location='cpu')",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.safe_load(t)",
        "model.eval()\nre.compile(x)\ntorch.compile(m)",
        "import json\njson.load(f)",
        "from maskray.models.encoder import load_encoder\nload_encoder(folder)",
    ],
)
def test_the_guard_is_not_fired_by_what_is_safe(source: str):
    assert list(dangers(source)) == []
