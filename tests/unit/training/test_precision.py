"""bf16 learns what fp32 learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from maskray.data.shards import Dataset
from maskray.data.stream import walk

STEPS, WINDOW = 200, 20
SIZES = {"width": 64, "depth": 2, "heads": 4, "decoder": {"width": 48, "depth": 1, "heads": 4}}


@pytest.fixture
def loss_curve(rig, digits):
    """loss_curve(precision) -> mean loss of each window of steps, on real images."""
    images = torch.cat([group.images_BCHW for group in walk(Dataset.open(str(digits)), "train", (8, 8), 1, 1024)])

    def run(precision: str) -> np.ndarray:
        r = rig(model=SIZES, training={"precision": precision}, optim={"steps": STEPS})
        means = []
        for number in range(STEPS):
            rows = [(number * 64 + i) % len(images) for i in range(64)]
            r.step(number, [replace(r.batch(number), images_BCHW=images[rows])])
            if (number + 1) % WINDOW == 0:
                means.append(r.step.report().loss)
        return np.array(means)

    return run


def test_loss_curves_of_fp32_and_bf16_are_within_a_hundredth(loss_curve):
    wide, narrow = loss_curve("fp32"), loss_curve("bf16")
    assert wide[-1] < 0.7 * wide[0]
    assert (wide != narrow).any()
    np.testing.assert_allclose(narrow, wide, rtol=0.01)
