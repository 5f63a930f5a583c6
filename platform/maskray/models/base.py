"""What every model is: images and visibility in, predictions or features out.

Shape letters: B images, C channels, H and W down and across (pixels of an image, cells of a visibility), L = cells of
an image in raster order, N visible cells, T cells to be painted, D width of a feature, P pixel values of a cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

Part = nn.Module | nn.Parameter


class MaskedAutoencoder(nn.Module, ABC):
    """A model of a config.

    Args:
        image_size: height and width of the images in pixels; the cell divides them.
        channels: of the images.
        cell_HW: pixels down and across of a cell: what is hidden or shown as one.
        width: D of the features.
    """

    gpu_format = torch.preserve_format
    """Of the weights on a GPU."""
    remembers_activations = True
    """False: blocks are computed again in the backward pass, where the model is one of such blocks."""

    def __init__(self, image_size: tuple[int, int], channels: int, cell_HW: tuple[int, int], width: int) -> None:
        super().__init__()
        self.cell_HW, self.channels, self.width = cell_HW, channels, width
        self.grid_HW = (image_size[0] // cell_HW[0], image_size[1] // cell_HW[1])
        self.cell_pixels = cell_HW[0] * cell_HW[1] * channels
        """P."""

    @abstractmethod
    def forward(
        self,
        images_BCHW: Tensor,
        visible_BHW: Tensor,
        num_visible: int,
        target_BHW: Tensor | None = None,
        num_target: int = 0,
        weights_B: Tensor | None = None,
    ) -> Tensor:
        """Predicted values (B, L, P) of cells, in the (row, column, channel) order of the objective's target.

        Args:
            images_BCHW: normalised pixels.
            visible_BHW: bool, in cells; True = the encoder sees it.
            num_visible: how many cells of each image are visible; given, since counting on the device is a sync.
            target_BHW: bool; True = the prediction is wanted. Others may be anything. None: all hidden cells.
            num_target: how many cells of each image `target_BHW` has.
            weights_B: 0 for images that do not count in statistics over a batch; None: all count.
        """

    @abstractmethod
    def encode_visible(self, images_BCHW: Tensor, visible_BHW: Tensor, num_visible: int) -> Tensor:
        """All that the decoder gets of the images."""

    @abstractmethod
    def feature_maps(self, images_BCHW: Tensor, weights_B: Tensor | None = None) -> list[Tensor]:
        """Features (B, D, h, w) at each scale of the encoder, finest first, for dense tasks. Nothing is masked here.

        Args:
            images_BCHW: normalised pixels.
            weights_B: 0 for images that do not count in statistics over a batch; None: all count.
        """

    @abstractmethod
    def layers(self) -> list[list[Part]]:
        """All parts of the encoder, in layers from the pixels on: for learning rates that fall towards the pixels.

        Each layer but the first is a residual block, where the encoder has such.
        """

    def place(self, device: torch.device) -> Self:
        """Move to a device, in the form in which training is fastest there; the values are the same in any."""
        weights = self.gpu_format if device.type == "cuda" else torch.preserve_format
        return self.to(device, memory_format=weights)  # type: ignore[call-overload, no-any-return]

    def encode(self, images_BCHW: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """Features (B, L, D) of all cells in raster order, at the coarsest scale. Nothing is ever masked here."""
        return self.feature_maps(images_BCHW, weights_B)[-1].flatten(2).transpose(1, 2)

    def pooled(self, images_BCHW: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """One feature vector (B, D) an image: the mean over its cells. Arguments as of `feature_maps`."""
        return self.encode(images_BCHW, weights_B).mean(dim=1)


def indices(chosen_BHW: Tensor, num: int) -> Tensor:
    """Numbers (B, num) of the chosen cells, in raster order. The shape is known to the host: nothing waits."""
    others_BL = (~chosen_BHW).flatten(1).to(torch.uint8)
    return others_BL.argsort(dim=1, stable=True)[:, :num]


def taken(values_BLD: Tensor, index_BN: Tensor) -> Tensor:
    """(B, N, D): rows of each image by number."""
    return values_BLD.gather(1, index_BN[:, :, None].expand(-1, -1, values_BLD.shape[2]))


def put(values_BND: Tensor, index_BN: Tensor, base_BLD: Tensor) -> Tensor:
    """(B, L, D): the base with rows of each image replaced by number."""
    return base_BLD.scatter(1, index_BN[:, :, None].expand(-1, -1, values_BND.shape[2]), values_BND)
