"""Boxes of many images to one size, in one batch, on any device: what `crop.crop_resize` does to each alone.

torch resizes uint8 on a CPU in integers, one axis after the other, width first: weights of 16 bits (Keys' cubic with
a = -0.5, its support widened by the ratio where the box shrinks, normalised), a sum, a shift that rounds, a clamp to
uint8. Here the weights of a box are the rows of one matrix for each axis, and the sums two batched products in float32.
All their terms are integers, so the sums are exact below 2**24: results are equal where a box is at most half as large
again as the size. Beyond that a sum can miss its last bit, and of a hundred thousand pixels one is off by one.

torch's own resize on CUDA takes neither a batch of boxes nor uint8 through this path.

Shape letters: B boxes, C channels, Y and X pixels of the boxes, padded to the largest, H and W pixels of the result, L
length of an axis before and O after it, T taps of a weight.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

_SUPPORT = 2.0
"""Of the cubic, in pixels to each side."""
_A = -0.5
_WEIGHT_BITS, _MOST_PRECISION = 15, 22


def resize(
    boxes_BYCX: torch.Tensor,
    heights_B: torch.Tensor,
    widths_B: torch.Tensor,
    flips_B: torch.Tensor,
    size_HW: tuple[int, int],
) -> torch.Tensor:
    """The boxes at a size, flipped where it is said: (B, C, H, W) uint8. No host sync.

    Args:
        boxes_BYCX: uint8; box b takes the first heights_B[b] × widths_B[b] pixels, whatever stands in the others.
        heights_B: int64.
        widths_B: int64.
        flips_B: bool, True = mirrored left to right.
        size_HW: of the result.
    """
    num_boxes, box_height, channels, box_width = boxes_BYCX.shape
    height, width = size_HW
    columns = boxes_BYCX.reshape(num_boxes, box_height * channels, box_width).float()
    weights_BWX, shift_B = _weights(widths_B, box_width, width)
    weights_BWX = torch.where(flips_B[:, None, None], weights_BWX.flip(1), weights_BWX)
    narrow = _round(columns @ weights_BWX.mT, shift_B)

    rows = narrow.reshape(num_boxes, box_height, channels * width)
    weights_BHY, shift_B = _weights(heights_B, box_height, height)
    out = _round(weights_BHY @ rows, shift_B)
    return out.reshape(num_boxes, height, channels, width).permute(0, 2, 1, 3).to(torch.uint8, copy=True).contiguous()


def _round(sums_BMN: torch.Tensor, shift_B: torch.Tensor) -> torch.Tensor:
    unit_B11 = (torch.ones_like(shift_B) << shift_B).float()[:, None, None]  # a power of two: the division is exact
    return ((sums_BMN + unit_B11 / 2) / unit_B11).floor_().clamp_(0, 255)


def _weights(lengths_B: torch.Tensor, padded: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole-number weights (B, O, L) float32, and by how many bits the sums of each box are to be shifted, (B,) int64.

    Line by line what torch computes (`HelperInterpBase` in its UpSampleKernel.cpp), in float64 as there.
    """
    device = lengths_B.device
    scale_B1 = (lengths_B.double() / size)[:, None]
    stretch_B1 = scale_B1.clamp(min=1)
    support_B1 = _SUPPORT * stretch_B1
    center_BO = scale_B1 * (torch.arange(size, device=device) + 0.5)
    first_BO = (center_BO - support_B1 + 0.5).long().clamp(min=0)
    num_taps_BO = torch.minimum((center_BO + support_B1 + 0.5).long(), lengths_B[:, None]) - first_BO

    taps_T = torch.arange(2 * math.ceil(_SUPPORT * max(1.0, padded / size)) + 1, device=device)
    at_BOT = (taps_T + first_BO[..., None] - center_BO[..., None] + 0.5) * (1 / stretch_B1)[..., None]
    weights_BOT = torch.where(taps_T < num_taps_BO[..., None], _cubic(at_BOT.abs()), 0.0)
    weights_BOT /= weights_BOT.sum(-1, keepdim=True)

    # The most bits with which the largest weight still fits into a signed 16-bit integer.
    bits = torch.arange(1, _MOST_PRECISION + 1, device=device)
    fits = weights_BOT.amax((1, 2))[:, None] * (1 << bits) + 0.5 < 1 << _WEIGHT_BITS
    shift_B = fits.sum(1)
    scaled_BOT = weights_BOT * (1 << shift_B)[:, None, None]
    whole_BOT = (scaled_BOT + torch.where(scaled_BOT < 0, -0.5, 0.5)).trunc().float()

    # From taps to pixels; a pixel that has no tap takes the zero that is put behind the last.
    tap_BOL = torch.arange(padded, device=device) - first_BO[..., None]
    tap_BOL = torch.where((tap_BOL >= 0) & (tap_BOL < len(taps_T)), tap_BOL, len(taps_T))
    return F.pad(whole_BOT, (0, 1)).gather(2, tap_BOL), shift_B


def _cubic(x: torch.Tensor) -> torch.Tensor:
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return torch.where(x < 1, near, torch.where(x < _SUPPORT, far, 0.0))
