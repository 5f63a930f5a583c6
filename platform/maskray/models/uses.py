"""Where each layer of a model is applied, and to how much: what operations and memory are counted from.

Sizes are read from the layers themselves. A place is a token, or a pixel of a map. Children of a module are applied in
the order in which they were made, but for those that stand beside a block and read what it reads.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Attention
from torch import nn

from maskray.models.base import MaskedAutoencoder
from maskray.models.conv import ConvAutoencoder
from maskray.models.sparse_conv import SparseConvAutoencoder, UNet
from maskray.models.vit import CrossBlock, MaskedAutoencoderViT


class Use(NamedTuple):
    """A layer at work on one image.

    An `Attention` or a `CrossBlock` stands for its attention alone, a `ConvNeXtBlock` for the scale of its channels.
    """

    layer: nn.Module
    num_in: int
    """Places that it reads; of attention, those that are attended to."""
    num_out: int
    """Places that it writes; of attention, those that attend."""
    channels: int
    """Of a place that it reads."""
    is_beside: bool = False
    """What it reads is read by a block as well."""


class _At(NamedTuple):
    """A map, or tokens one above another, between two layers."""

    height: int
    width: int
    channels: int

    @property
    def num(self) -> int:
        return self.height * self.width


_Uses = Generator[Use, None, _At]


def encoder_uses(model: MaskedAutoencoder, num_visible: int) -> Iterator[Use]:
    """Layers of the encoder over so many visible cells, first to last. A convolution computes hidden places too."""
    match model:
        case MaskedAutoencoderViT():
            yield Use(model.patch_embed, num_visible, num_visible, model.cell_pixels)
            tokens = _At(num_visible + model.num_prefix, 1, model.width)
            yield from _row([model.norm_pre, *model.blocks, model.norm], tokens)
        case ConvAutoencoder() | SparseConvAutoencoder():
            yield from _one(model.encoder, _image(model))
        case _:
            raise AssertionError(type(model))


def decoder_uses(model: MaskedAutoencoder, num_visible: int, num_target: int) -> Iterator[Use]:
    """Layers of the decoder, with the projections into it and onto pixels, first to last.

    Args:
        model: of a config.
        num_visible: cells of an image that the encoder sees.
        num_target: cells of an image that are painted, where the decoder can leave out others.
    """
    match model:
        case MaskedAutoencoderViT():
            yield from _vit_decoder(model, num_visible, num_target)
        case ConvAutoencoder():
            yield from _row([model.decoder_blocks, model.decoder], _coarse(model))
        case SparseConvAutoencoder():
            yield from _sparse_decoder(model)
        case _:
            raise AssertionError(type(model))


# -------------------------------------------------------------------------------------------------------- transformers


def _vit_decoder(model: MaskedAutoencoderViT, num_visible: int, num_target: int) -> Iterator[Use]:
    num_cells, num_seen = model.grid_HW[0] * model.grid_HW[1], num_visible + model.num_prefix
    width = model.decoder_embed.out_features
    yield from _one(model.decoder_embed, _At(num_seen, 1, model.width))
    crossing = any(isinstance(block, CrossBlock) for block in model.decoder_blocks)
    if crossing:
        for block in model.decoder_blocks:
            yield from _cross_block(block, num_seen, num_target, width)
    else:
        *blocks, last = model.decoder_blocks
        tokens = _At(num_cells + model.num_prefix, 1, width)
        yield from _row([*blocks, last.norm1, last.attn], tokens)  # type: ignore[list-item]
        after = tokens if num_target == num_cells else _At(num_target, 1, width)
        yield from _row([last.norm2, last.mlp], after)  # type: ignore[list-item]
    yield from _row([model.decoder_norm, model.decoder_pred], _At(num_target, 1, width))


def _cross_block(block: Any, num_seen: int, num_target: int, width: int) -> Iterator[Use]:
    target, seen = _At(num_target, 1, width), _At(num_seen, 1, width)
    yield from _row([block.norm1, block.q], target)
    yield Use(block.norm_seen, num_seen, num_seen, width, is_beside=True)
    yield from _one(block.kv, seen)
    yield Use(block, num_seen, num_target, width)
    yield from _row([block.proj, block.norm2, block.mlp], target)


# -------------------------------------------------------------------------------------------------------- convolutions


def _image(model: MaskedAutoencoder) -> _At:
    (rows, columns), (height, width) = model.grid_HW, model.cell_HW
    return _At(rows * height, columns * width, model.channels)


def _coarse(model: ConvAutoencoder | SparseConvAutoencoder) -> _At:
    """The encoder's last map."""
    walk = _one(model.encoder, _image(model))
    while True:
        try:
            next(walk)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _sparse_decoder(model: SparseConvAutoencoder) -> Iterator[Use]:
    decoder, coarse = model.decoder, _coarse(model)
    if not isinstance(decoder, UNet):
        yield from _row([decoder.proj, decoder.blocks, decoder.pred], coarse)
        return
    x = coarse
    scales = [(coarse.height * 2**i, coarse.width * 2**i) for i in range(len(decoder.norms))]
    for (height, width), norm, proj in zip(scales, decoder.norms, decoder.projs, strict=True):
        yield from _row([norm, proj], _At(height, width, proj.in_channels))  # type: ignore[arg-type]
    for up in decoder.ups:
        x = yield from _one(up, x)
    yield from _one(decoder.pred, x)


# ---------------------------------------------------------------------------------------------------------- any layers


def _row(layers: Iterable[nn.Module], at: _At) -> _Uses:
    for layer in layers:
        at = yield from _one(layer, at)
    return at


def _one(layer: nn.Module, at: _At) -> _Uses:
    match layer:
        case nn.Linear() | nn.ConvTranspose2d() | nn.Conv2d() | nn.MaxPool2d() | nn.AvgPool2d():
            out = _written(layer, at)
            yield Use(layer, at.num, out.num, at.channels)
        case Attention():
            at = yield from _one(layer.qkv, at)
            at = at._replace(channels=at.channels // 3)
            yield Use(layer, at.num, at.num, at.channels)
            out = yield from _one(layer.proj, at)
        case BasicBlock() | Bottleneck():
            out = yield from _beside(layer, layer.downsample, at)
        case ConvNeXtBlock():
            out = yield from _beside(layer, layer.shortcut, at)
            yield Use(layer, out.num, out.num, out.channels)
        case _:
            if not list(layer.children()):
                yield Use(layer, at.num, at.num, at.channels)
            out = yield from _row(layer.children(), at)
    return out


def _written(layer: Any, at: _At) -> _At:
    if isinstance(layer, nn.Linear):
        return at._replace(channels=layer.out_features)
    stride, kernel, padding = _int(layer.stride), _int(layer.kernel_size), _int(layer.padding)
    if isinstance(layer, nn.ConvTranspose2d):
        return _At(at.height * stride, at.width * stride, layer.out_channels)
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (at.height, at.width))
    return _At(height, width, layer.out_channels if isinstance(layer, nn.Conv2d) else at.channels)


def _beside(block: nn.Module, shortcut: nn.Module | None, at: _At) -> _Uses:
    out = yield from _row([child for child in block.children() if child is not shortcut], at)
    if shortcut is not None:
        first, *others = _one(shortcut, at)
        yield first._replace(is_beside=True)
        yield from others
    return out


def _int(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)
