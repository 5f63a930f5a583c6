"""Small models of every family, in the shapes that what they cost is counted at."""

from functools import partial

import pytest
import torch

from maskray import masking
from maskray.config.models import (
    BlockDecoder,
    ConvConfig,
    ObjectiveConfig,
    RandomMask,
    SparseConvConfig,
    TimmVitConfig,
    UNetDecoder,
    VitConfig,
    VitDecoder,
)
from maskray.models.build import build_model

SMALL = {"width": 192, "depth": 2, "heads": 3}
DECODER = VitDecoder(width=96, depth=2, heads=3)
CROSS = VitDecoder(width=96, depth=3, heads=3, attention="cross")
UNET, BLOCK = UNetDecoder(width=128), BlockDecoder(width=96)
CASES = {  # model, image size, channels, share of the hidden cells that is painted
    "ViT": (VitConfig(patch=2, **SMALL, decoder=DECODER), (16, 16), 1, 1),
    "ViT, cross": (VitConfig(patch=4, **SMALL, decoder=CROSS), (32, 32), 3, 1),
    "ViT, cross, a quarter painted": (VitConfig(patch=2, **SMALL, decoder=CROSS), (16, 32), 3, 0.25),
    "ViT, registers, no class token": (
        VitConfig(patch=4, **SMALL, registers=4, class_token=False, decoder=DECODER),
        (32, 48),
        3,
        1,
    ),
    "ViT, oblong, learnable": (
        VitConfig(
            patch=(8, 4),
            width=128,
            depth=1,
            heads=2,
            mlp_ratio=2.5,
            positions="learnable",
            decoder=VitDecoder(width=64, depth=3, heads=2, mlp_ratio=3),
        ),
        (64, 64),
        3,
        1,
    ),
    "timm ViT": (TimmVitConfig(name="vit_tiny_patch16_224", patch=8, decoder=DECODER), (64, 64), 3, 1),
    "timm ViT, registers, cross": (
        TimmVitConfig(name="vit_little_patch16_reg4_gap_256", patch=4, decoder=CROSS),
        (32, 32),
        1,
        0.5,
    ),
    "timm ViT, scaled branches": (
        TimmVitConfig(name="deit3_small_patch16_224", patch=8, decoder=DECODER),
        (64, 64),
        3,
        1,
    ),
    "conv": (ConvConfig(), (32, 48), 3, 1),
    "conv, two layers": (ConvConfig(widths=(16, 64)), (32, 32), 1, 1),
    "ResNet-18, U-Net": (SparseConvConfig(name="resnet18", decoder=UNET), (64, 128), 3, 1),
    "ResNet-50, U-Net": (SparseConvConfig(name="resnet50", decoder=UNET), (64, 64), 3, 1),
    "ResNet-50-D, block": (SparseConvConfig(name="resnet50d", decoder=BLOCK), (64, 128), 3, 1),
    "ConvNeXt, U-Net": (SparseConvConfig(name="convnext_atto", decoder=UNET), (64, 128), 1, 1),
    "ConvNeXt, block": (SparseConvConfig(name="convnext_femto", decoder=BLOCK), (64, 128), 3, 1),
    "ConvNeXt V2, U-Net": (SparseConvConfig(name="convnextv2_atto", decoder=UNET), (64, 128), 3, 1),
    "ConvNeXt V2, block": (SparseConvConfig(name="convnextv2_pico", decoder=BLOCK), (64, 128), 3, 1),
}


def built(case, num_images):
    """Model, images, visibility and targets of a case."""
    config, size, channels, fraction = CASES[case]
    torch.manual_seed(0)
    model = build_model(config, size, channels, group_images=num_images)
    (num_visible,) = masking.visible_counts(RandomMask(ratio=0.75), model.grid_HW)
    key = {"seed": 0, "pass_": 0, "rows": torch.arange(num_images), "view": 0, "xp": torch}
    visible = masking.draw(RandomMask(ratio=0.75), model.grid_HW, num_visible, **key)
    num_target = masking.num_target(ObjectiveConfig(predict_fraction=fraction), model.grid_HW, num_visible)
    target = masking.draw_target(visible, num_target, **key)
    return model, torch.randn(num_images, channels, *size), visible, target


@pytest.fixture(params=CASES)
def build(request):
    """`build(num_images)`: see `built`."""
    return partial(built, request.param)
