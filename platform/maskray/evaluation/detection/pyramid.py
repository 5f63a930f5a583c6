"""An encoder's maps as a pyramid of scales, which detectors want.

A convolutional encoder has several scales: they are joined from the coarsest down (Lin et al., "Feature pyramid
networks for object detection", CVPR 2017; torchvision's). A transformer has one, from which the others are made by
transposed convolutions and pooling (Li et al., "Exploring plain vision transformer backbones for object detection",
ECCV 2022, §3: the simple feature pyramid). All blocks attend to all cells: no windows.

Either way there are five levels, each half as fine as the one before. Levels that the encoder does not reach are its
coarsest one subsampled.

Shape letters: B images, C channels, H and W pixels down and across, D channels of a map, h and w its places.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from maskray.errors import ConfigError
from maskray.models.base import MaskedAutoencoder
from maskray.models.encoder import Encoder, at_size, encoder_only
from maskray.models.vit import LAYER_NORM_EPS, MaskedAutoencoderViT

NUM_LEVELS = 5
FINEST_STRIDE = 4
"""Pixels a place, at least: finer maps cost more than they find."""
_OWN_LEVELS = 4
"""That a transformer's pyramid has without subsampling."""


class Backbone(nn.Module):
    """Normalised images to the levels of a pyramid, by torchvision's contract.

    Args:
        encoder: for square images of `side` pixels; trained with the rest.
        out_channels: of each level.
    """

    def __init__(self, encoder: Encoder, out_channels: int) -> None:
        super().__init__()
        side = encoder.image_size[0]
        assert encoder.image_size == (side, side)
        self.encoder, self.out_channels = encoder.model, out_channels
        self.pyramid: SimplePyramid | JoinedPyramid
        if isinstance(encoder.model, MaskedAutoencoderViT):
            self.pyramid = SimplePyramid(encoder.model.width, _patch(encoder.model), out_channels)
        else:
            self.pyramid = JoinedPyramid(_shapes(encoder, side), side, out_channels)
        strides = self.pyramid.strides
        self.strides = strides + tuple(strides[-1] * 2**i for i in range(1, NUM_LEVELS + 1 - len(strides)))
        """Pixels a place of each level."""

    def forward(self, images_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        """(B, `out_channels`, h, w) of each level, finest first."""
        levels = self.pyramid(self.encoder.feature_maps(images_BCHW))
        while len(levels) < NUM_LEVELS:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


class SimplePyramid(nn.Module):
    """Levels from one map, each by itself; the finest has places of `FINEST_STRIDE` pixels, or the next whole number.

    Args:
        width: D of the map.
        patch: its stride in pixels.
        out_channels: of each level.
    """

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        halvings = _halvings(patch)
        self.strides = tuple(int(patch * 2.0**i) for i in halvings)
        self.levels = nn.ModuleList(self._level(width, i, out_channels) for i in halvings)

    @staticmethod
    def _level(width: int, halvings: int, out_channels: int) -> nn.Sequential:
        layers = list[nn.Module]()
        widths = [max(1, width // 2**i) for i in range(max(0, -halvings) + 1)]
        for fine, finer in pairwise(widths):
            layers += [nn.ConvTranspose2d(fine, finer, kernel_size=2, stride=2), LayerNorm2d(finer), nn.GELU()]
        del layers[-2:]  # none after the last
        layers += [nn.MaxPool2d(kernel_size=2, stride=2) for _ in range(halvings)]
        layers += [nn.Conv2d(widths[-1], out_channels, kernel_size=1, bias=False), LayerNorm2d(out_channels)]
        layers += [nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)]
        return nn.Sequential(*layers, LayerNorm2d(out_channels))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Levels (B, `out_channels`, h, w), finest first, from the one map (B, D, h, w)."""
        (map_BDhw,) = maps
        return [level(map_BDhw) for level in self.levels]


class JoinedPyramid(nn.Module):
    """Levels from as many maps, the coarser ones enlarged and added to the finer.

    Args:
        shapes: (D, h, w) of each map, finest first; those finer than `FINEST_STRIDE` are left out where others are.
        side: of the image in pixels.
        out_channels: of each level.
    """

    def __init__(self, shapes: list[tuple[int, int, int]], side: int, out_channels: int) -> None:
        super().__init__()
        strides = [side // each[1] for each in shapes]
        self._left_out = min(sum(stride < FINEST_STRIDE for stride in strides), len(strides) - 1)
        self._left_out = max(self._left_out, len(strides) - NUM_LEVELS)
        self.strides = tuple(strides[self._left_out :])
        self.network = FeaturePyramidNetwork([each[0] for each in shapes[self._left_out :]], out_channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Levels (B, `out_channels`, h, w), finest first."""
        named = OrderedDict((str(i), each) for i, each in enumerate(maps[self._left_out :]))
        return list(self.network(named).values())


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of each place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w)."""
        return super().forward(x_BDhw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_backbone(encoder: Encoder, side: int, out_channels: int) -> Backbone:
    """The backbone of a copy of an encoder, whose pyramid is drawn from torch's generator.

    Args:
        encoder: stays as it is.
        side: of the square images in pixels.
        out_channels: of each level.

    Raises:
        ConfigError: as `check_side` does.
    """
    check_side(encoder, side)
    return Backbone(at_size(encoder, (side, side)), out_channels)


def check_side(encoder: Encoder, side: int) -> None:
    """Whether the places of all maps of an encoder are squares that divide an image.

    Raises:
        ConfigError: they are not, or do not.
    """
    down, across = encoder.model.cell_HW
    if down != across:
        raise ConfigError(
            "detection wants an encoder with square cells",
            key="model",
            found=f"cells of {down} × {across} pixels",
            fix="take another model",
        )
    if isinstance(encoder.model, MaskedAutoencoderViT):
        coarsest = int(down * 2.0 ** _halvings(down)[-1])
    else:
        size = encoder.image_size[0]
        coarsest = size // _shapes(encoder, size)[-1][1]
    if side % coarsest:
        raise ConfigError(
            "the coarsest map of the encoder's pyramid does not divide the image",
            key="evaluations.image_size",
            found=str(side),
            allowed=f"multiples of {coarsest}",
            fix="take one of them",
        )


def _patch(model: MaskedAutoencoder) -> int:
    return model.cell_HW[0]


def _halvings(patch: int) -> list[int]:
    """How often the map of patches is halved for each level; doubled, where negative."""
    doublings = 0
    while patch % 2 ** (doublings + 1) == 0 and patch // 2 ** (doublings + 1) >= FINEST_STRIDE:
        doublings += 1
    return [i - doublings for i in range(_OWN_LEVELS)]


def _shapes(encoder: Encoder, side: int) -> list[tuple[int, int, int]]:
    """(D, h, w) of the encoder's maps of a square image, without computing any."""
    with torch.device("meta"):
        model = encoder_only(encoder.config, (side, side), encoder.channels).eval()
        maps = model.feature_maps(torch.empty(1, encoder.channels, side, side))
    return [(each.shape[1], each.shape[2], each.shape[3]) for each in maps]
