"""Images to the values of their cells, and back.

Shape letters: B images, C channels, H and W pixels down and across, L = cells of an image in raster order, P pixel
values of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images_BCHW: Tensor, cell_HW: tuple[int, int]) -> Tensor:
    """(B, L, P) values of each cell, in the authors' (row, column, channel) order."""
    B, C, H, W = images_BCHW.shape
    (p, q), grid = cell_HW, (H // cell_HW[0], W // cell_HW[1])
    channels = images_BCHW.reshape(B, C, grid[0], p, grid[1], q).permute(1, 0, 2, 4, 3, 5).unbind(0)
    # One by one: copied all at once, runs are as short as the channels are few.
    return torch.stack(channels, dim=5).reshape(B, grid[0] * grid[1], p * q * C)


def unpatchify(cells_BLP: Tensor, cell_HW: tuple[int, int], grid_HW: tuple[int, int]) -> Tensor:
    """The images (B, C, H, W) whose cells these are."""
    (p, q), (grid_h, grid_w) = cell_HW, grid_HW
    B, channels = len(cells_BLP), cells_BLP.shape[2] // (p * q)
    cells = cells_BLP.reshape(B, grid_h, grid_w, p, q, channels).permute(0, 5, 1, 3, 2, 4)
    return cells.reshape(B, channels, grid_h * p, grid_w * q)
