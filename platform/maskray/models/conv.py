"""The plain convolutional masked autoencoder: convolutions down, transposed convolutions up.

It follows a description that could not run as it was written; the README sets out element by element what was
described, what is done here, and why. The mask is applied at the input and after every layer, so no hidden pixel can
reach what the decoder gets.

Shape letters: B images, C channels, H and W down and across (pixels of an image, cells of a visibility), L = cells of
an image in raster order, D channels of a map, h and w its places, P pixel values of a cell.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.nn import functional as F

from maskray.cells import patchify
from maskray.config.models import ConvConfig
from maskray.models.base import Part
from maskray.models.sparse_layers import ConvolutionalAutoencoder, Seen


class ConvAutoencoder(ConvolutionalAutoencoder):
    """Encoder of 3 × 3 convolutions of stride 2, decoder of as many transposed ones.

    Args:
        config: channels of the layers, depth of the decoder.
        image_size: height and width of the images in pixels; the stride divides them.
        channels: of the images.
        cell_HW: pixels down and across of what is hidden or shown as one: the stride, or 1 for scattered pixels.
    """

    gpu_format = torch.channels_last  # the form of tensor cores; a CPU is as fast in either

    def __init__(
        self, config: ConvConfig, image_size: tuple[int, int], channels: int, cell_HW: tuple[int, int]
    ) -> None:
        super().__init__(image_size, channels, cell_HW, config.widths[-1])
        widths = (channels, *config.widths)
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, kernel_size=3, stride=2, padding=1) for i, o in pairwise(widths))
        self.decoder_blocks = nn.Sequential(
            *(ConvNeXtBlock(widths[-1], ls_init_value=None) for _ in range(config.decoder.depth))
        )
        self.decoder = nn.ModuleList(
            nn.ConvTranspose2d(i, o, kernel_size=3, stride=2, padding=1, output_padding=1)
            for i, o in pairwise(widths[::-1])
        )
        self.apply(_init)
        self.decoder_blocks.apply(_init_small)  # residual branches: as large as the rest they would drown it

    def forward(
        self,
        images_BCHW: Tensor,
        visible_BHW: Tensor,
        num_visible: int,
        target_BHW: Tensor | None = None,
        num_target: int = 0,
        weights_B: Tensor | None = None,
    ) -> Tensor:
        """As `MaskedAutoencoder.forward`."""
        del num_visible, target_BHW, num_target, weights_B  # all places are computed, and no statistics kept
        x = self.decoder_blocks(self.visible_maps(images_BCHW, visible_BHW)[-1])
        *layers, last = self.decoder
        for layer in layers:
            x = F.relu(layer(x))
        return patchify(last(x), self.cell_HW)

    def encode_visible(self, images_BCHW: Tensor, visible_BHW: Tensor, num_visible: int) -> Tensor:
        """(B, D, h, w): the hidden map ⊙ visibility."""
        del num_visible
        return self.visible_maps(images_BCHW, visible_BHW)[-1]

    def layers(self) -> list[list[Part]]:
        """Each convolution."""
        return [[layer] for layer in self.encoder]

    def _maps(self, images_BCHW: Tensor, seen: Seen) -> list[Tensor]:
        x = seen.shown(images_BCHW)
        maps = []
        for i, layer in enumerate(self.encoder):
            x = seen.shown(layer(F.relu(x) if i else x))
            maps.append(x)
        return maps


def _init_small(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
