"""PSNR and SSIM against hand-worked values and scikit-image's own calls."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from maskray.evaluation.likeness import likeness
from maskray.evaluation.reconstruction import Reconstruction


def painted(images, paintings, visible):
    return Reconstruction(images, visible, paintings, np.array([0.5] * len(images), np.float32), False)


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 3, 16, 24), dtype=np.uint8)
    paintings = np.clip(images + rng.normal(0, 20, images.shape), 0, 255).astype(np.uint8)
    visible = rng.random((3, 4, 6)) < 0.5
    return images, paintings, visible


def test_they_are_scikit_images_on_hidden_pixels_and_on_the_filled_image(pictures):
    images, paintings, visible = pictures
    pixels = visible.repeat(4, 1).repeat(4, 2)[:, None]
    psnr, ssim = [], []
    for image, painting, seen in zip(images, paintings, np.broadcast_to(pixels, images.shape), strict=True):
        psnr.append(peak_signal_noise_ratio(image[~seen], painting[~seen], data_range=255))
        filled = np.where(seen, image, painting)
        ssim.append(structural_similarity(image, filled, channel_axis=0, data_range=255))
    found = likeness(painted(*pictures), 0.5)
    assert found.psnr == pytest.approx(np.mean(psnr), abs=1e-6)
    assert found.ssim == pytest.approx(np.mean(ssim), abs=1e-6)
    assert found.loss == 0.5


def test_an_error_of_ten_everywhere_is_28_decibels():
    images = np.full((1, 1, 8, 8), 100, np.uint8)
    found = likeness(painted(images, images + 10, np.zeros((1, 2, 2), bool)), 0.5)
    assert found.psnr == pytest.approx(20 * np.log10(25.5))


def test_visible_cells_do_not_count_for_psnr(pictures):
    images, paintings, visible = pictures
    worse = np.where(visible.repeat(4, 1).repeat(4, 2)[:, None], 255 - paintings, paintings)
    assert likeness(painted(images, worse, visible), 0.5) == likeness(painted(*pictures), 0.5)


def test_a_perfect_painting_is_finite(pictures):
    images, _, visible = pictures
    found = likeness(painted(images, images, visible), 0.5)
    assert found.ssim == pytest.approx(1)
    assert np.isfinite(found.psnr)


def test_images_smaller_than_the_window(pictures):
    images, paintings, visible = (each[:, ..., :4, :4] if each.ndim == 4 else each[:, :1, :1] for each in pictures)
    assert 0 < likeness(painted(images, paintings, ~visible & False), 0.5).ssim < 1
