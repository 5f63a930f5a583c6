"""What the decoder must paint, and how a miss is counted: over the target cells, in fp32.

Shape letters: B images, C channels, H and W down and across (pixels of an image, cells of a visibility), L = cells of
an image in raster order, P pixel values of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskray.cells import patchify, unpatchify
from maskray.config.models import ObjectiveConfig
from maskray.errors import ConfigError

NORM_PIX_EPS = 1e-6


@dataclass(frozen=True)
class Painted:
    """Predictions as pixels, for looking at."""

    images_BCHW: Tensor
    """In the units of the model's input."""
    uses_target_statistics: bool
    """True: each cell's mean and std were taken from the original, so brightness and contrast are not the model's."""


@dataclass(frozen=True)
class Objective:
    """The reconstruction loss of a config, for cells of `cell_HW` pixels."""

    config: ObjectiveConfig
    cell_HW: tuple[int, int]

    def __call__(self, images_BCHW: Tensor, pred_BLP: Tensor, target_BHW: Tensor) -> Tensor:
        """Loss (B,) of each image: mean over a cell's pixel values, then over its target cells (True = it counts).

        fp32 whatever the prediction's type is (under bf16 the difference of near values has no digits left); float64
        stays float64.
        """
        target_BLP = self._target(_wide(images_BCHW))
        error_BLP = pred_BLP.to(target_BLP.dtype) - target_BLP
        loss_BL = (error_BLP.abs() if self.config.loss == "l1" else error_BLP.square()).mean(dim=2)
        counts_BL = target_BHW.flatten(1).to(loss_BL.dtype)
        return (loss_BL * counts_BL).sum(dim=1) / counts_BL.sum(dim=1)

    def paint(self, images_BCHW: Tensor, pred_BLP: Tensor) -> Painted:
        """Predictions turned into pixels of all cells.

        Under `norm_pix` the model predicts no cell's mean or std. They are borrowed from the original, which flatters
        the picture: whoever shows it must say so.
        """
        images_BCHW = _wide(images_BCHW)
        cells_BLP = pred_BLP.to(images_BCHW.dtype)
        if self.config.norm_pix:
            mean_BL1, std_BL1 = self._statistics(patchify(images_BCHW, self.cell_HW))
            cells_BLP = cells_BLP * std_BL1 + mean_BL1
        H, W = images_BCHW.shape[2:]
        grid_HW = (H // self.cell_HW[0], W // self.cell_HW[1])
        return Painted(unpatchify(cells_BLP, self.cell_HW, grid_HW), self.config.norm_pix)

    def _target(self, images_BCHW: Tensor) -> Tensor:
        cells_BLP = patchify(images_BCHW, self.cell_HW)
        if not self.config.norm_pix:
            return cells_BLP
        mean_BL1, std_BL1 = self._statistics(cells_BLP)
        return cells_BLP.sub_(mean_BL1).div_(std_BL1)

    def _statistics(self, cells_BLP: Tensor) -> tuple[Tensor, Tensor]:
        if cells_BLP.shape[2] < 2:
            raise ConfigError(
                "a cell of one value has no spread to divide by",
                key="objective.norm_pix",
                found=True,
                allowed="false with model.patch 1 on gray images",
            )
        # Over all P values, unbiased, eps inside the root: the authors' target to the last digit. On a CPU torch's own
        # `var` takes float64 too, value after value: so the bits are the same, in a sixth of its time.
        mean_BL1 = cells_BLP.mean(dim=2, keepdim=True)
        wide_BLP = cells_BLP.to(torch.float64, copy=True)
        wide_BLP -= wide_BLP.mean(dim=2, keepdim=True)
        variance_BL1 = torch.linalg.vector_norm(wide_BLP, dim=2, keepdim=True).square() / (cells_BLP.shape[2] - 1)
        return mean_BL1, (variance_BL1.to(cells_BLP.dtype) + NORM_PIX_EPS).sqrt()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
