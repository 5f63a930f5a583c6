"""Each family of models learns eight photographs by heart, under fixed masks: then all of it is wired right."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from maskray import masking
from maskray.config.models import (
    BlockDecoder,
    BlockMask,
    ConvConfig,
    ObjectiveConfig,
    PixelMask,
    RandomMask,
    SparseConvConfig,
    TimmVitConfig,
    UNetDecoder,
    VitConfig,
    VitDecoder,
)
from maskray.data.crop import crop_resize
from maskray.evaluation.reconstruction import reconstruct
from maskray.models.build import build_model
from maskray.models.normalize import Normalize
from maskray.models.sparse_layers import group_norms, settle_statistics
from maskray.objective import Objective

pytestmark = pytest.mark.slow

SIDE, SEED, ENOUGH = 64, 0, 0.1
SMALL = VitDecoder(width=128, depth=2, heads=4)
FAMILIES = {
    "vit": (VitConfig(patch=8, width=128, depth=4, heads=4, decoder=SMALL), RandomMask(), 1e-3),
    "vit, cross-attention": (
        VitConfig(
            patch=8, width=128, depth=4, heads=4, decoder=VitDecoder(width=128, depth=2, heads=4, attention="cross")
        ),
        RandomMask(),
        1e-3,
    ),
    "timm_vit": (TimmVitConfig(name="vit_tiny_patch16_224", patch=8, decoder=SMALL), RandomMask(), 1e-3),
    "conv": (ConvConfig(), BlockMask(ratio=0.75, sides=(2, 4)), 1e-3),
    "conv, scattered pixels": (ConvConfig(), PixelMask(), 1e-3),
    "ResNet-18, U-Net": (
        SparseConvConfig(name="resnet18", decoder=UNetDecoder(width=256)),
        RandomMask(ratio=0.5),
        2e-3,
    ),
    "ConvNeXt V2, block": (
        SparseConvConfig(name="convnextv2_atto", decoder=BlockDecoder(width=256)),
        RandomMask(ratio=0.5),
        2e-3,
    ),
}


def photographs():
    """Eight pieces of the two photographs that come with scikit-learn, (8, 3, 64, 64) uint8."""
    pieces = []
    for photograph in load_sample_images().images:
        image_CHW = torch.from_numpy(photograph.transpose(2, 0, 1).copy())
        for top, left in ((0, 0), (0, 300), (200, 0), (200, 300)):
            pieces.append(crop_resize(image_CHW, np.array((top, left, 220, 220)), (SIDE, SIDE), flip=False))
    return torch.stack(pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_eight_photographs_by_heart(family, tmp_path):
    config, mask, lr = FAMILIES[family]
    torch.manual_seed(SEED)
    cell = (1, 1) if isinstance(mask, PixelMask) else config.cell
    model = build_model(config, (SIDE, SIDE), 3, cell, group_images=8)
    objective, normalize = Objective(ObjectiveConfig(norm_pix=False), cell), Normalize.from_kind("symmetric", 3)
    bytes_BCHW = photographs()
    images = normalize(bytes_BCHW)
    # The masks that the figure draws, so that it shows what was learned.
    before = reconstruct(model, normalize, objective, bytes_BCHW.numpy(), mask, SEED)
    visible = torch.from_numpy(before.visible_NHW)
    (num_visible,) = masking.visible_counts(mask, model.grid_HW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=600, pct_start=0.1)
    # Gray for all costs nothing to learn.
    plain = float(objective(images, torch.zeros_like(model(images, visible, num_visible)), ~visible).mean())
    first, last = None, torch.inf
    for _ in range(600):
        optimizer.zero_grad()
        loss = objective(images, model(images, visible, num_visible), ~visible).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        settle_statistics(group_norms(model))
        last = float(loss.detach())
        first = first or last
    after = reconstruct(model, normalize, objective, bytes_BCHW.numpy(), mask, SEED)
    figure = Path(tmp_path) / "overfit.png"
    figure.write_bytes(after.figure(f"{family}: eight photographs, learned by heart"))
    print(f"{family}: {first:.3f} -> {last:.4f}, {last / min(first, plain):.3f} of it; {figure}")
    assert last < ENOUGH * min(first, plain)
    assert after.loss_N.mean() < 2 * ENOUGH * min(first, plain)  # in evaluation, by running statistics
