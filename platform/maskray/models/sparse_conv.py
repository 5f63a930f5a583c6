"""Masked autoencoders with a convolutional encoder: SparK (Tian et al., ICLR 2023) and FCMAE (Woo et al., CVPR 2023).

The encoder is timm's ResNet or ConvNeXt, with timm's parameter names; its layers never see a hidden cell
(`sparse_layers`). The decoder gets the encoder's maps with a learned token where cells are hidden.

Shape letters: B images, C channels, H and W down and across (pixels of an image, cells of a visibility), L = cells of
an image in raster order, D channels of a map, h and w its places, P pixel values of a cell.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from maskray.cells import patchify
from maskray.config.models import SparseConvConfig, UNetDecoder
from maskray.errors import ConfigError
from maskray.models.base import Part
from maskray.models.sparse_layers import ConvolutionalAutoencoder, GroupBatchNorm2d, Seen, through, with_group_norms

INIT_STD = 0.02


class SparseConvAutoencoder(ConvolutionalAutoencoder):
    """Encoder over the visible cells, decoder over all of them.

    Args:
        config: names the encoder and sizes the decoder.
        image_size: height and width of the images in pixels; the stride of 32 divides them.
        channels: of the images.
        group_images: of a row group, over which batch normalisation takes its statistics.

    Raises:
        ConfigError: timm has no plain ResNet or ConvNeXt of that name.
    """

    gpu_format = torch.channels_last  # the form of tensor cores; a CPU is as fast in either

    def __init__(self, config: SparseConvConfig, image_size: tuple[int, int], channels: int, group_images: int) -> None:
        encoder = _encoder(config.name, channels)
        widths = [info["num_chs"] for info in encoder.feature_info][-4:]
        super().__init__(image_size, channels, config.cell, widths[-1])
        self.encoder = with_group_norms(encoder, group_images)
        self.decoder: UNet | Blocks
        if isinstance(config.decoder, UNetDecoder):
            self.decoder = UNet(config.decoder.width, widths, channels, group_images)
        else:
            self.decoder = Blocks(config.decoder.width, config.decoder.depth, widths[-1], self.cell_pixels)
        self.decoder.apply(_init)

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
        del num_visible, target_BHW, num_target  # all places are computed
        seen = Seen(visible_BHW, weights_B)
        painted = self.decoder(self._maps(images_BCHW, seen), seen)
        if isinstance(self.decoder, UNet):
            return patchify(painted, self.cell_HW)
        return painted.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def encode_visible(self, images_BCHW: Tensor, visible_BHW: Tensor, num_visible: int) -> Tensor:
        """(B, all channels of all scales, flat): zero where nothing is visible."""
        del num_visible
        return torch.cat([each.flatten(1) for each in self._maps(images_BCHW, Seen(visible_BHW))], dim=1)

    def layers(self) -> list[list[Part]]:
        """The stem, and each block; with the first of a stage goes what makes its places fewer."""
        net: Any = self.encoder
        if isinstance(net, ResNet):
            blocks = [[block] for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage]
            return [[net.conv1, net.bn1], *blocks]
        stages = [[[block] for block in stage.blocks] for stage in net.stages]
        for stage, layers in zip(net.stages, stages, strict=True):
            layers[0].append(stage.downsample)
        return [[net.stem], *(layer for layers in stages for layer in layers)]

    def _maps(self, images_BCHW: Tensor, seen: Seen) -> list[Tensor]:
        x = seen.shown(images_BCHW)
        return _resnet(self.encoder, x, seen) if isinstance(self.encoder, ResNet) else _convnext(self.encoder, x, seen)


# ------------------------------------------------------------------------------------------------------------- encoder


def _encoder(name: str, channels: int) -> Any:
    allowed = "resnet18 to resnet152, resnext, wide_resnet; convnext_* and convnextv2_*"
    wrong = {"key": "model.name", "found": name, "allowed": allowed, "fix": "timm.list_models('convnext*') lists names"}
    if not timm.is_model(name):
        raise ConfigError("timm knows no such model", **wrong)
    if timm.models.get_arch_name(name) not in timm.list_models(module="resnet") + timm.list_models(module="convnext"):
        raise ConfigError("the model is neither a ResNet nor a ConvNeXt", **wrong)
    try:
        net = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=0, global_pool="")
    except RuntimeError as error:  # a tag that the name has not
        raise ConfigError(f"timm knows no such model ({error})", **wrong) from error
    blocks = [block for block in net.modules() if isinstance(block, BasicBlock | Bottleneck | ConvNeXtBlock)]
    if isinstance(net, ResNet):
        is_plain = all(block.se is None and isinstance(block.aa, nn.Identity) for block in blocks)
        is_plain &= not any(isinstance(module, nn.GroupNorm) for module in net.modules())
    else:
        is_plain = all(block.conv_dw.stride == (1, 1) for block in blocks)
        net.norm_pre, net.head = nn.Identity(), nn.Identity()  # behind the maps: it would never get a gradient
    if not is_plain or net.feature_info[-1]["reduction"] != 32:
        raise ConfigError("the model has layers that are not known to keep hidden cells out", **wrong)
    return net


def _resnet(net: Any, x: Tensor, seen: Seen) -> list[Tensor]:
    x = through([net.conv1, net.bn1, net.act1, net.maxpool], x, seen)
    maps = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            x = _residual(block, x, seen)
        maps.append(x)
    return maps


def _residual(block: Any, x: Tensor, seen: Seen) -> Tensor:
    shortcut = x if block.downsample is None else through([block.downsample], x, seen)
    layers = [block.conv1, block.bn1, block.act1, block.conv2, block.bn2]
    if isinstance(block, Bottleneck):
        layers += [block.act2, block.conv3, block.bn3]
    x = through(layers, x, seen)
    x = x if block.drop_path is None else block.drop_path(x)
    last = block.act3 if isinstance(block, Bottleneck) else block.act2
    return last(x + shortcut)  # type: ignore[no-any-return]


def _convnext(net: Any, x: Tensor, seen: Seen) -> list[Tensor]:
    x = through([net.stem], x, seen)
    maps = []
    for stage in net.stages:
        x = through([stage.downsample], x, seen)
        for block in stage.blocks:
            x = _convnext_block(block, x, seen)
        maps.append(x)
    return maps


def _convnext_block(block: Any, x: Tensor, seen: Seen) -> Tensor:
    visible, mlp = seen.at((x.shape[2], x.shape[3])), block.mlp
    inner = seen.shown(block.conv_dw(x))
    if not block.use_conv_mlp:  # linear layers, channels last
        inner, visible = inner.permute(0, 2, 3, 1), None if visible is None else visible.permute(0, 2, 3, 1)
    inner = mlp.drop1(mlp.act(mlp.fc1(block.norm(inner))))
    if hasattr(mlp, "grn"):
        # Its norms are sums over all places: those of hidden ones must be zero.
        inner = mlp.grn(inner if visible is None else inner * visible)
    inner = mlp.drop2(mlp.fc2(inner))
    inner = inner if block.use_conv_mlp else inner.permute(0, 3, 1, 2)
    if block.gamma is not None:
        inner = inner * block.gamma.reshape(1, -1, 1, 1)
    return block.drop_path(seen.shown(inner)) + block.shortcut(x)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------ decoders


class Blocks(nn.Module):
    """ConvNeXt blocks on the coarsest map, then a linear layer to the pixels of each cell."""

    def __init__(self, width: int, depth: int, encoder_width: int, cell_pixels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(encoder_width, width, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, use_grn=True, ls_init_value=None) for _ in range(depth)))
        self.pred = nn.Conv2d(width, cell_pixels, kernel_size=1)
        nn.init.normal_(self.mask_token, std=INIT_STD)

    def forward(self, maps: list[Tensor], seen: Seen) -> Tensor:
        """(B, P, h, w)."""
        return self.pred(self.blocks(filled(self.proj(maps[-1]), self.mask_token, seen)))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """From the coarsest map to pixels, each scale twice as fine as the one before and joined by the encoder's own."""

    def __init__(self, width: int, encoder_widths: list[int], channels: int, group_images: int) -> None:
        super().__init__()
        widths = [width // 2**i for i in range(6)]
        coarse_first = encoder_widths[::-1]
        self.norms = nn.ModuleList(GroupBatchNorm2d(each, group_images) for each in coarse_first)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, each, 1, 1) for each in coarse_first)
        self.projs = nn.ModuleList(
            nn.Conv2d(each, widths[i], kernel_size=1 if i == 0 else 3, padding=0 if i == 0 else 1)
            for i, each in enumerate(coarse_first)
        )
        self.ups = nn.ModuleList(_Up(*pair, group_images) for pair in pairwise(widths))
        self.pred = nn.Conv2d(widths[-1], channels, kernel_size=1)
        for token in self.mask_tokens:
            nn.init.normal_(token, std=INIT_STD)

    def forward(self, maps: list[Tensor], seen: Seen) -> Tensor:
        """(B, C, H, W) pixels."""
        parts = zip(self.norms, self.mask_tokens, self.projs, maps[::-1], strict=True)
        joined = [proj(filled(norm(each, seen), token, seen)) for norm, token, proj, each in parts]
        x, everything = joined[0], Seen(None, seen.weights_B)
        for i, up in enumerate(self.ups):
            x = up(x + joined[i] if 0 < i < len(joined) else x, everything)
        return self.pred(x)  # type: ignore[no-any-return]


class _Up(nn.Module):
    """Twice as fine."""

    def __init__(self, width: int, out: int, group_images: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1)
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
                GroupBatchNorm2d(width, group_images),
                nn.ReLU6(),
                nn.Conv2d(width, out, kernel_size=3, padding=1, bias=False),
                GroupBatchNorm2d(out, group_images),
            ]
        )

    def forward(self, x_BDhw: Tensor, seen: Seen) -> Tensor:
        """(B, out, 2h, 2w)."""
        return through(self.layers, self.up(x_BDhw), seen)


def filled(x_BDhw: Tensor, token_1D11: Tensor, seen: Seen) -> Tensor:
    """The map with a learned token where nothing is visible."""
    visible = seen.at((x_BDhw.shape[2], x_BDhw.shape[3]))
    return x_BDhw if visible is None else torch.where(visible, x_BDhw, token_1D11.to(x_BDhw.dtype))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
