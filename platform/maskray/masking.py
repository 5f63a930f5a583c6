"""Masks: which cells of an image the encoder sees. Drawn outside the model, passed in, used by model and loss alike.

`visible` is bool, True = the encoder sees the cell, shape (B, H, W) in cells of the model. Every image of a batch hides
exactly the same number of cells. Shape letters: B images, H and W cells down and across, L = H·W.
"""

from __future__ import annotations

from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np

from maskray import draws
from maskray.config.schema import Mask
from maskray.errors import ConfigError


def num_visible(mask: Mask, grid_HW: tuple[int, int]) -> int:
    """Cells that stay visible in each image: the whole part of L × (1 - ratio), as the MAE authors' code takes it.

    The ratio is taken as the decimal that was written, so no float error can hide or show a cell too many: 10 cells at
    ratio 0.9 keep 1.

    Raises:
        ConfigError: the ratio would hide nothing or everything on this grid.
    """
    cells = grid_HW[0] * grid_HW[1]
    visible = int(cells * (1 - Fraction(repr(mask.ratio))))
    if not 0 < visible < cells:
        raise ConfigError(
            f"hides {cells - visible} of {cells} cells",
            key="mask.ratio",
            found=mask.ratio,
            allowed=f"{1 / cells:.3g} to {1 - 1 / cells:.3g} on a grid of {grid_HW[0]} × {grid_HW[1]} cells",
        )
    return visible


def draw(
    mask: Mask, grid_HW: tuple[int, int], *, seed: int, pass_: Any, rows: Any, view: Any, xp: ModuleType = np
) -> Any:
    """Visibility of each row's cells, (B, H, W) bool, in numpy or torch (`xp`): equal bits in both.

    Args:
        mask: what to draw.
        grid_HW: cells down and across.
        seed: the run's seed.
        pass_: the pass over the data, a scalar or (B,) int64.
        rows: (B,) int64 row numbers in the dataset.
        view: which view of the image, a scalar or (B,) int64.
        xp: `numpy` or `torch`.

    Raises:
        ConfigError: the ratio hides nothing or everything on this grid.
    """
    keep, cells = num_visible(mask, grid_HW), grid_HW[0] * grid_HW[1]
    noise_BL = draws.words(seed=seed, stream=draws.Stream.MASK, pass_=pass_, row=rows, view=view, num=cells, xp=xp)
    # Rank of each cell's noise; ties (one in 2**32) go to the earlier cell, in numpy as in torch.
    if xp is np:
        rank_BL = np.argsort(np.argsort(noise_BL, axis=1, kind="stable"), axis=1, kind="stable")
    else:
        rank_BL = noise_BL.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (rank_BL < keep).reshape(-1, *grid_HW)
