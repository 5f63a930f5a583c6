"""What a model costs, by arithmetic: the floating-point operations and parameters of a config.

Conventions: a multiply-add is two operations; matrix products, convolutions and attention are counted, norms,
activations, softmax and sums are not (under 1 % at any width worth training); a training step costs three times its
forward pass, the backward pass being two products for each of the forward's, the first layer's input gradient included
(it is not computed: under 1 % again). Recomputation, where it is on, is not counted: the numbers are those of the
model, which is what MFU divides by. Convolutions are dense: hidden places are computed and set to zero.

Layer sizes are read from the model itself; where each is applied, and to how much, is said here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from maskray.models.base import MaskedAutoencoder
from maskray.models.conv import ConvAutoencoder
from maskray.models.sparse_conv import SparseConvAutoencoder, UNet
from maskray.models.vit import CrossBlock, MaskedAutoencoderViT

DECODER_NAMES = ("decoder", "mask_token")


@dataclass(frozen=True)
class Cost:
    """Operations are those of one image."""

    encoder_flops: int
    """Forward pass over the class token and the visible cells."""
    decoder_flops: int
    """Forward pass of the decoder, with the projections into it and onto pixels."""
    encode_flops: int
    """Forward pass of the encoder over all cells: what a feature costs once the model is in use."""
    encoder_parameters: int
    """Learned numbers; fixed positions are none."""
    decoder_parameters: int

    @property
    def forward_flops(self) -> int:
        """Encoder and decoder."""
        return self.encoder_flops + self.decoder_flops

    @property
    def training_flops(self) -> int:
        """Forward and backward pass."""
        return 3 * self.forward_flops

    @property
    def decoder_share(self) -> float:
        """The part of the bill that is thrown away after pretraining."""
        return self.decoder_flops / self.forward_flops


def cost(model: MaskedAutoencoder, num_visible: int, num_target: int | None = None) -> Cost:
    """The cost of a model; one on the `meta` device will do.

    Args:
        model: of a config.
        num_visible: cells of an image that the encoder sees.
        num_target: cells of an image that are painted; None: all hidden ones.
    """
    num_cells = model.grid_HW[0] * model.grid_HW[1]
    size_HW = (model.grid_HW[0] * model.cell_HW[0], model.grid_HW[1] * model.cell_HW[1])
    match model:
        case MaskedAutoencoderViT():
            encoder, encode = _vit_encoder(model, num_visible), _vit_encoder(model, num_cells)
            decoder = _vit_decoder(model, num_visible, num_cells - num_visible if num_target is None else num_target)
        case ConvAutoencoder():
            encoder, coarse_hw = _row(model.encoder, size_HW)
            middle, _ = _row(model.decoder_blocks, coarse_hw)
            up, _ = _row(model.decoder, coarse_hw)
            encode, decoder = encoder, middle + up
        case SparseConvAutoencoder():
            encoder, coarse_hw = _one(model.encoder, size_HW)
            encode, decoder = encoder, _sparse_decoder(model, coarse_hw)
        case _:
            raise AssertionError(type(model))
    return Cost(2 * encoder, 2 * decoder, 2 * encode, *_parameters(model))


def _parameters(model: MaskedAutoencoder) -> tuple[int, int]:
    """Of encoder and decoder."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        counts[name.startswith(DECODER_NAMES)] += parameter.numel() if parameter.requires_grad else 0
    return counts[0], counts[1]


# -------------------------------------------------------------------------------------------------------- transformers


def _vit_encoder(model: MaskedAutoencoderViT, num_cells: int) -> int:
    """Multiply-adds over so many cells."""
    return num_cells * model.cell_pixels * model.width + _stack(model.blocks, num_cells + model.num_prefix, model.width)


def _vit_decoder(model: MaskedAutoencoderViT, num_visible: int, num_target: int) -> int:
    num_cells, seen = model.grid_HW[0] * model.grid_HW[1], num_visible + model.num_prefix
    width = model.decoder_pred.in_features
    into = seen * model.width * width
    crossing = [block for block in model.decoder_blocks if isinstance(block, CrossBlock)]
    if not crossing:
        stack = _stack(model.decoder_blocks, num_cells + model.num_prefix, width)
        return into + stack + num_cells * width * model.cell_pixels
    across = sum(
        seen * _weights([block.kv]) + num_target * (_weights([block]) - _weights([block.kv]) + 2 * seen * width)
        for block in crossing
    )
    return into + across + num_target * width * model.cell_pixels


def _stack(blocks: Iterable[nn.Module], tokens: int, width: int) -> int:
    """Blocks in which all tokens attend to all."""
    return sum(tokens * (_weights([block]) + 2 * tokens * width) for block in blocks)


def _weights(modules: Iterable[nn.Module]) -> int:
    """Multiply-adds of all linear layers for one token."""
    return sum(m.in_features * m.out_features for each in modules for m in each.modules() if isinstance(m, nn.Linear))


# -------------------------------------------------------------------------------------------------------- convolutions


def _row(layers: Iterable[nn.Module], size_hw: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Multiply-adds of layers one behind another, and the size of the last map."""
    total = 0
    for layer in layers:
        macs, size_hw = _one(layer, size_hw)
        total += macs
    return total, size_hw


def _one(layer: nn.Module, size_hw: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    if isinstance(layer, nn.Linear):
        return size_hw[0] * size_hw[1] * layer.in_features * layer.out_features, size_hw
    if isinstance(layer, nn.ConvTranspose2d):
        macs = size_hw[0] * size_hw[1] * layer.weight.numel()
        return macs, (size_hw[0] * _int(layer.stride), size_hw[1] * _int(layer.stride))
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        stride, kernel, padding = _int(layer.stride), _int(layer.kernel_size), _int(layer.padding)
        out_hw = ((size_hw[0] + 2 * padding - kernel) // stride + 1, (size_hw[1] + 2 * padding - kernel) // stride + 1)
        return (out_hw[0] * out_hw[1] * layer.weight.numel() if isinstance(layer, nn.Conv2d) else 0), out_hw
    shortcut = _shortcut(layer)
    inside, out_hw = _row([child for child in layer.children() if child is not shortcut], size_hw)
    beside = 0 if shortcut is None else _one(shortcut, size_hw)[0]
    return inside + beside, out_hw


def _shortcut(layer: nn.Module) -> nn.Module | None:
    """The layers beside a block, which read what it reads."""
    name = {BasicBlock: "downsample", Bottleneck: "downsample", ConvNeXtBlock: "shortcut"}.get(type(layer))
    return None if name is None else getattr(layer, name)


def _sparse_decoder(model: SparseConvAutoencoder, coarse_hw: tuple[int, int]) -> int:
    if not isinstance(model.decoder, UNet):
        return _row([model.decoder.proj, model.decoder.blocks, model.decoder.pred], coarse_hw)[0]
    scales = [(coarse_hw[0] * 2**i, coarse_hw[1] * 2**i) for i in range(6)]
    joined = sum(_one(proj, scale)[0] for proj, scale in zip(model.decoder.projs, scales, strict=False))
    ups = sum(_one(up, scale)[0] for up, scale in zip(model.decoder.ups, scales, strict=False))
    return joined + ups + _one(model.decoder.pred, scales[-1])[0]


def _int(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)
