"""Boxes, flips and sizes. Boxes and flips are drawn by key (see `draws`), never by a generator.

Shape letters: C channels, H and W pixels down and across, N images, T tries, W words of one try.
"""

from __future__ import annotations

from typing import Any, assert_never

import numpy as np
import torch
from torch.nn import functional as F

from maskray import draws
from maskray.config.schema import Crop, RandomResizedCrop, WholeImage

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

_TRIES = 10
_WORDS_PER_TRY = 4


def crop_resize(image_CHW: torch.Tensor, box: Ints, size_HW: tuple[int, int], flip: bool) -> torch.Tensor:
    """The box (top, left, height, width) of an image at a size: bicubic, antialiased, uint8; no copy if equal.

    The call that torchvision's `resized_crop` ends in, without torchvision: its import takes longer than torch's, in
    every process that decodes.
    """
    top, left, height, width = (int(v) for v in box)
    out = image_CHW[:, top : top + height, left : left + width]
    if (height, width) != size_HW:
        out = F.interpolate(out[None], size=size_HW, mode="bicubic", antialias=True, align_corners=False)[0]
    return out.flip(-1) if flip else out


def draw_boxes(crop: Crop, sizes_N2: Ints, *, seed: int, pass_: int, rows: Ints, views: Ints) -> Ints:
    """A box (top, left, height, width) for each image and view: (N, 4) int64.

    Args:
        crop: how.
        sizes_N2: height and width of each image.
        seed: the run's seed.
        pass_: the pass over the data.
        rows: (N,) row numbers in the dataset.
        views: (N,) which view of the image.
    """
    match crop:
        case WholeImage():
            return np.concatenate([np.zeros_like(sizes_N2), sizes_N2], axis=1)
        case RandomResizedCrop():
            num = _TRIES * _WORDS_PER_TRY
            uniform = draws.uniform(
                seed=seed, stream=draws.Stream.CROP, pass_=pass_, row=rows, view=views, num=num
            ).reshape(-1, _TRIES, _WORDS_PER_TRY)
            return _random_resized_boxes(crop, sizes_N2, uniform)
        case _:
            assert_never(crop)


def _random_resized_boxes(crop: RandomResizedCrop, sizes_N2: Ints, uniform_NTW: np.ndarray[Any, Any]) -> Ints:
    """RandomResizedCrop.get_params of torchvision for all images at once: the first try that fits, or a centre crop."""
    heights_N1, widths_N1 = sizes_N2[:, :1], sizes_N2[:, 1:]
    (scale_low, scale_high), (aspect_low, aspect_high) = crop.scale, crop.aspect
    area_NT = heights_N1 * widths_N1 * (scale_low + (scale_high - scale_low) * uniform_NTW[..., 0])
    log_low, log_high = np.log(aspect_low), np.log(aspect_high)
    aspect_NT = np.exp(log_low + (log_high - log_low) * uniform_NTW[..., 1])
    box_w_NT = np.rint(np.sqrt(area_NT * aspect_NT)).astype(np.int64)
    box_h_NT = np.rint(np.sqrt(area_NT / aspect_NT)).astype(np.int64)
    fits_NT = (box_w_NT > 0) & (box_w_NT <= widths_N1) & (box_h_NT > 0) & (box_h_NT <= heights_N1)

    first_N = fits_NT.argmax(axis=1)
    each = np.arange(len(sizes_N2))
    box_h, box_w = box_h_NT[each, first_N], box_w_NT[each, first_N]
    u_top, u_left = uniform_NTW[each, first_N, 2], uniform_NTW[each, first_N, 3]
    heights, widths = sizes_N2[:, 0], sizes_N2[:, 1]
    top = (u_top * (heights - box_h + 1)).astype(np.int64)
    left = (u_left * (widths - box_w + 1)).astype(np.int64)

    # No try fitted: the largest box in the middle whose aspect is allowed.
    ratio = widths / heights
    whole_w = np.where(ratio > aspect_high, np.rint(heights * aspect_high), widths).astype(np.int64)
    whole_h = np.where(ratio < aspect_low, np.rint(widths / aspect_low), heights).astype(np.int64)
    whole_w, whole_h = np.clip(whole_w, 1, widths), np.clip(whole_h, 1, heights)
    fallback = np.stack([(heights - whole_h) // 2, (widths - whole_w) // 2, whole_h, whole_w], axis=1)
    return np.where(fits_NT.any(axis=1)[:, None], np.stack([top, left, box_h, box_w], axis=1), fallback)


def draw_flips(probability: float, *, seed: int, pass_: int, rows: Ints, views: Ints) -> Bools:
    """Whether each image and view is flipped: (N,) bool."""
    uniform_N1 = draws.uniform(seed=seed, stream=draws.Stream.FLIP, pass_=pass_, row=rows, view=views, num=1)
    return np.asarray(uniform_N1[:, 0] < probability)
