"""What every objective keeps."""

import numpy as np
import pytest
import torch

from maskray import masking
from maskray.cells import patchify, unpatchify
from maskray.config.models import ObjectiveConfig, RandomMask
from maskray.errors import ConfigError
from maskray.objective import Objective

CONFIGS = [ObjectiveConfig(loss=loss, norm_pix=norm_pix) for loss in ("l2", "l1") for norm_pix in (True, False)]
PATCH, GRID = (2, 4), (3, 5)


@pytest.fixture(params=CONFIGS, ids=lambda c: f"{c.loss}{' norm_pix' if c.norm_pix else ''}")
def objective(request):
    return Objective(request.param, PATCH)


@pytest.fixture
def images():
    return torch.randn(4, 3, 6, 20, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2


@pytest.fixture
def visible():
    return torch.from_numpy(masking.draw(RandomMask(ratio=0.6), GRID, 6, seed=0, pass_=0, rows=np.arange(4), view=0))


def target(objective, images):
    cells = patchify(images, PATCH)
    if not objective.config.norm_pix:
        return cells
    return (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, keepdim=True, unbiased=True) + 1e-6) ** 0.5


def test_a_perfect_prediction_costs_nothing(objective, images, visible):
    assert torch.equal(objective(images, target(objective, images), visible), torch.zeros(4))


def test_the_loss_is_the_mean_over_hidden_cells(objective, images, visible):
    pred = torch.randn(4, 15, 24, generator=torch.Generator().manual_seed(1))
    error = pred - target(objective, images)
    per_cell = (error.abs() if objective.config.loss == "l1" else error**2).mean(-1)
    expected = torch.stack([row[hidden].mean() for row, hidden in zip(per_cell, ~visible.flatten(1), strict=True)])
    torch.testing.assert_close(objective(images, pred, ~visible), expected)


def test_visible_cells_have_no_gradient(objective, images, visible):
    pred = torch.randn(4, 15, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    objective(images, pred, ~visible).sum().backward()
    reached = pred.grad.abs().sum(-1) > 0
    assert torch.equal(reached, ~visible.flatten(1))


def test_the_loss_is_fp32_for_low_precision_predictions_and_float64_for_float64(objective, images, visible):
    pred = torch.randn(4, 15, 24, generator=torch.Generator().manual_seed(1))
    assert objective(images, pred.bfloat16(), visible).dtype == torch.float32
    assert objective(images.bfloat16(), pred.bfloat16(), visible).dtype == torch.float32
    assert objective(images.double(), pred.double(), visible).dtype == torch.float64


def test_a_flat_cell_costs_no_infinity(objective, visible):
    flat = torch.full((4, 3, 6, 20), 0.3)
    pred = torch.zeros(4, 15, 24, requires_grad=True)
    loss = objective(flat, pred, ~visible)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert pred.grad.isfinite().all()


def test_painting_a_perfect_prediction_gives_the_image_back_and_says_what_it_borrowed(objective, images):
    painted = objective.paint(images, target(objective, images))
    torch.testing.assert_close(painted.images_BCHW, images)
    assert painted.uses_target_statistics == objective.config.norm_pix


@pytest.mark.parametrize(
    ("channels", "size", "patch"), [(1, (8, 8), (2, 2)), (3, (6, 20), (2, 4)), (5, (9, 4), (3, 1))]
)
def test_patchify_and_back(channels, size, patch):
    images = torch.randn(2, channels, *size)
    cells = patchify(images, patch)
    grid = (size[0] // patch[0], size[1] // patch[1])
    assert cells.shape == (2, grid[0] * grid[1], patch[0] * patch[1] * channels)
    assert torch.equal(unpatchify(cells, patch, grid), images)


def test_values_of_a_cell_stand_in_the_order_row_column_channel():
    images = torch.arange(1 * 3 * 4 * 6).reshape(1, 3, 4, 6)
    cells = patchify(images, (2, 3))
    cell = 1 * 2 + 1  # second row and second column of a grid of 2 × 2
    expected = [images[0, c, 2 + p, 3 + q].item() for p in range(2) for q in range(3) for c in range(3)]
    assert cells[0, cell].tolist() == expected


def test_a_cell_of_one_value_cannot_be_normalised():
    images, visible = torch.randn(1, 1, 2, 2), torch.tensor([[[True, False], [False, False]]])
    with pytest.raises(ConfigError, match=r"objective\.norm_pix"):
        Objective(ObjectiveConfig(norm_pix=True), (1, 1))(images, torch.zeros(1, 4, 1), visible)
