"""Imports point down, and each outside library has its owners. Read from the source, so nothing is imported."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "maskray"

LAYERS: list[set[str]] = [  # from the ground up; rooms on one line do not import each other
    {"config", "credentials", "errors", "draws", "figures", "wording"},
    {"masking", "cells"},
    {"data", "tracking"},
    {"models", "objective"},
    {"training"},
    {"evaluation"},
    {"pretrain", "preparing", "publish", "estimate", "sweeps"},
    {"launch", "appraisal", "embedding", "calibration", "offering"},
    {"sweeping"},
    {"on_ray", "bare", "in_use"},
    {"doctor", "repair"},
    {"cli"},
]
# Everything may raise, and nothing says a password.
WITHIN_A_LAYER = {("config", "errors"), ("config", "credentials"), ("errors", "credentials")}

OWNERS: dict[str, set[str]] = {
    "pydantic": {"config"},
    "yaml": {"config"},
    "pyarrow": {"data"},
    "s3fs": {"data"},
    "botocore": {"data/s3", "data/sources/files"},
    "torchcodec": {"data"},
    "PIL": {"data"},
    "tifffile": {"data"},
    "timm": {"models", "training/optim", "evaluation/classifier", "evaluation/finetune", "publish/proof"},
    "sklearn": {"data/sources", "evaluation"},
    "skimage": {"evaluation"},
    "scipy": {"evaluation"},
    "matplotlib": {"figures"},
    "rich": {"cli", "tracking/console"},
    "safetensors": {"training/checkpoint", "models/foreign", "models/encoder"},
    "mlflow": {
        "tracking/mlflow_store",
        "tracking/mlflow_runs",
        "tracking/mlflow_tracker",
        "publish/named",
        "publish/registry",
        "publish/predictor",
        "publish/versions",
    },
    "alembic": {"tracking/mlflow_store"},
    "sqlalchemy": {"tracking/mlflow_store"},
    "packaging": {"doctor/environment"},
    "psutil": {"data/lease"},
    "faster_coco_eval": {"evaluation/detection"},
    "optuna": {"sweeps/search"},
    "jinja2": {"sweeps"},
    "ray": {"on_ray", "doctor"},
    "grpc": {"doctor/cluster"},
}
WITHOUT_TORCH = {"config", "cli", "errors", "data/plan", "data/spec", "training/folders"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room(path: Path) -> str:
    return place(path).split("/")[0]


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a thing is from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if name in rooms)


def upward(importer: str, source: str) -> list[str]:
    """Imports of our own rooms that do not point down."""
    wrong = []
    for name in imported(source):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top != "maskray" or not target or target == importer:
            continue
        if layer_of(target) >= layer_of(importer) and (importer, target) not in WITHIN_A_LAYER:
            wrong.append(name)
    return wrong


def trespassing(where: str, source: str) -> list[str]:
    """Outside libraries used by a room that does not own them."""
    wrong = []
    for name in imported(source):
        top = name.split(".")[0]
        owners = OWNERS.get(top)
        if owners is not None and not any(where == o or where.startswith(f"{o}/") for o in owners):
            wrong.append(name)
        if top == "torch" and any(where == w or where.startswith(f"{w}/") for w in WITHOUT_TORCH):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", [p for p in modules() if room(p) != "__init__"], ids=place)
def test_imports_point_down(path: Path):
    assert upward(room(path), path.read_text()) == []


@pytest.mark.parametrize("path", modules(), ids=place)
def test_each_library_stays_with_its_owners(path: Path):
    assert trespassing(place(path), path.read_text()) == []


def test_the_package_itself_imports_nothing():
    assert list(imported((PACKAGE / "__init__.py").read_text())) == []


def test_the_guards_fire():
    assert upward("data", "from maskray.on_ray import train") == ["maskray.on_ray.train"]
    assert upward("models", "from maskray.objective import Objective") == ["maskray.objective.Objective"]
    assert upward("training", "def f():\n    import maskray.pretrain") == ["maskray.pretrain"]
    assert trespassing("training/loop", "import ray.train") == ["ray.train"]
    assert trespassing("data/plan", "import torch") == ["torch"]


def test_a_process_that_only_passes_the_stream_on_does_not_import_torch():
    """Two of them start one after the other before the first batch arrives through Ray Train."""
    code = "import sys, maskray.on_ray.stream; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}, check=True)
