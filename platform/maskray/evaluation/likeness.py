"""How near paintings come to their images, by scikit-image's measures.

Apart from `reconstruction`, which training imports: scikit-image takes its time to come.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from skimage.metrics import mean_squared_error, structural_similarity

from maskray.evaluation.reconstruction import Reconstruction

_SSIM_WINDOW = 7
"""Pixels a side, scikit-image's own; fewer where an image has fewer."""
_LEAST_NOISE = 1e-3
"""Of squared bytes: an image that is painted to the bit would have infinite PSNR, and so would a mean with it."""


class Likeness(NamedTuple):
    """How near paintings come to their images, means over the images."""

    ratio: float
    loss: float
    """Of the objective, over hidden cells."""
    psnr: float
    """Peak signal to noise ratio in dB of the hidden pixels alone: the visible ones would flatter it."""
    ssim: float
    """Structural similarity (Wang et al. 2004) of the image with its hidden cells painted."""
    uses_target_statistics: bool
    """True: each painted cell's mean and std were taken from the original, which flatters both."""


def likeness(painted: Reconstruction, ratio: float) -> Likeness:
    """PSNR and SSIM of a reconstruction, by scikit-image, on bytes."""
    size_HW = painted.images_NCHW.shape[2:]
    cells = [size // num for size, num in zip(size_HW, painted.visible_NHW.shape[1:], strict=True)]
    visible_N1HW = painted.visible_NHW.repeat(cells[0], axis=1).repeat(cells[1], axis=2)[:, None]
    filled_NCHW = np.where(visible_N1HW, painted.images_NCHW, painted.painted_NCHW)
    hidden_NCHW = np.broadcast_to(~visible_N1HW, filled_NCHW.shape)
    window = min(_SSIM_WINDOW, *(size - 1 + size % 2 for size in size_HW))
    psnr, ssim = [], []
    for image, filled, hidden in zip(painted.images_NCHW, filled_NCHW, hidden_NCHW, strict=True):
        noise = max(mean_squared_error(image[hidden], filled[hidden]), _LEAST_NOISE)
        psnr.append(10 * np.log10(255**2 / noise))
        ssim.append(structural_similarity(image, filled, channel_axis=0, data_range=255, win_size=window))
    return Likeness(
        ratio, float(painted.loss_N.mean()), float(np.mean(psnr)), float(np.mean(ssim)), painted.uses_target_statistics
    )
