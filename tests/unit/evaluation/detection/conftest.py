"""A small set of cut-outs, and encoders for it."""

from pathlib import Path

import pytest
import torch

import cutouts
from maskray.config.evaluation import CocoData, DetectionEvaluation
from maskray.config.models import ConvConfig, SparseConvConfig, TimmVitConfig, VitConfig
from maskray.evaluation.detection import coco
from maskray.models.encoder import Encoder, encoder_only
from maskray.models.normalize import Normalize

SIDE = 64
MODELS = {
    "vit": VitConfig(patch=(8, 8), width=32, depth=2, heads=2),
    "vit, learnable positions": VitConfig(patch=(16, 16), width=32, depth=1, heads=2, positions="learnable"),
    "vit of patch 14": VitConfig(patch=(14, 14), width=32, depth=1, heads=2, registers=2),
    "timm_vit": TimmVitConfig(name="vit_tiny_patch16_224", patch=(16, 16)),
    "conv": ConvConfig(widths=(8, 16, 32)),
    "ResNet": SparseConvConfig(name="resnet18"),
    "ConvNeXt": SparseConvConfig(name="convnextv2_atto"),
}


@pytest.fixture(scope="session")
def cutouts_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `val` of a few canvases."""
    folder = tmp_path_factory.mktemp("cutouts")
    for part, (name, num) in enumerate({"train": 10, "val": 7}.items()):
        cutouts.write(folder / name, num, seed=0, side=SIDE, part=part)
    return folder


def data_of(folder: Path) -> CocoData:
    return CocoData(annotations=str(folder / "annotations.json"), images=str(folder / "images"))


@pytest.fixture
def small(cutouts_set):
    """small(**values) -> DetectionEvaluation of a detector that computes fast."""

    def build(**values):
        plain = {
            "train": data_of(cutouts_set / "train"),
            "val": data_of(cutouts_set / "val"),
            "image_size": SIDE,
            "batch": 4,
            "base_lr": 3e-2,
            "pyramid_width": 16,
            "head_width": 32,
            "proposals": 32,
            "sampled_boxes": 16,
        }
        return DetectionEvaluation(**(plain | values))

    return build


@pytest.fixture
def read(small):
    """read(config) -> the two sets."""

    def both(config):
        return [
            coco.read(each.annotations, each.images, key=f"evaluations.{name}", masks=config.masks)
            for name, each in (("train", config.train), ("val", config.val))
        ]

    return both


def encoder_of(kind: str, side: int = SIDE, channels: int = 3) -> Encoder:
    """An encoder as it begins."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = encoder_only(MODELS[kind], (side, side), channels)
    normalize = Normalize([0.4] * channels, [0.25] * channels)
    return Encoder(model, normalize, (side, side), MODELS[kind]).eval().requires_grad_(requires_grad=False)
