"""What training a model takes of a worker's memory, by arithmetic.

Conventions: weights, gradients and the optimiser's two moments are fp32. An activation counts if the backward pass
needs it: each layer keeps what it reads, attention keeps queries, keys and values (it is fused: no matrix of all
pairs), the loss keeps its error. Under bf16 layers read bf16 copies, of the weights too, while norms, the sums of the
residuals and the loss stay fp32. Not counted: what a kernel needs while it runs, the gradients of activations on
their way, batches that wait, a block that a sharded model has gathered, and what the allocator leaves unused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from timm.layers import GELU, GELUTanh, LayerScale, QuickGELU
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Attention
from torch import nn

from maskray.models.base import MaskedAutoencoder
from maskray.models.sparse_layers import GroupBatchNorm2d
from maskray.models.uses import Use, decoder_uses, encoder_uses
from maskray.models.vit import CrossBlock, MaskedAutoencoderViT, PatchEmbed

_FP32, _BF16 = 4, 2
_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: int
    """Buffers and fixed positions included."""
    gradients: int
    """Twice as much where several workers exchange whole ones: DDP has buckets of its own."""
    optimizer: int
    activations: int
    """Of one micro-batch, with the bf16 copies of the weights."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(
    model: MaskedAutoencoder,
    num_visible: int,
    num_target: int,
    micro_batch: int,
    precision: Literal["fp32", "bf16"],
    workers: int = 1,
    *,
    sharded: bool = False,
    recomputed: bool = False,
) -> Memory:
    """What a worker needs; a model on the `meta` device will do.

    Args:
        model: of a config.
        num_visible: cells of an image that the encoder sees.
        num_target: cells of an image that are painted.
        micro_batch: images in one forward and backward pass.
        precision: of the layers.
        workers: how many train together.
        sharded: the model is divided among them.
        recomputed: a transformer's blocks keep their inputs alone.
    """
    parts = workers if sharded else 1
    learned = _FP32 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = (*model.parameters(), *model.buffers())
    return Memory(
        weights=sum(each.numel() * each.element_size() for each in kept) // parts,
        gradients=learned * (2 if workers > parts else 1) // parts,
        optimizer=_MOMENTS * learned // parts,
        activations=activations(model, num_visible, num_target, micro_batch, precision, recomputed=recomputed),
    )


def activations(
    model: MaskedAutoencoder,
    num_visible: int,
    num_target: int,
    micro_batch: int,
    precision: Literal["fp32", "bf16"],
    *,
    recomputed: bool = False,
) -> int:
    """Bytes that are kept from the forward to the backward pass. Arguments as those of `memory`.

    Recomputed ones are the inputs of all blocks, and what one block keeps while its backward pass runs.
    """
    narrow = _BF16 if precision == "bf16" else _FP32
    uses = [*encoder_uses(model, num_visible), *decoder_uses(model, num_visible, num_target)]
    error = model.grid_HW[0] * model.grid_HW[1] * model.cell_pixels * _FP32
    inputs, blocks = 0, list[list[Use]]()
    if recomputed and isinstance(model, MaskedAutoencoderViT):
        uses, blocks = _by_block(model, uses)
        inputs = sum(block[0].num_in * block[0].channels * _FP32 for block in blocks)  # sums of residuals stay fp32

    def kept(some: Iterable[Use]) -> int:
        copies = sum(_weight(layer) for layer in {use.layer for use in some}) * (_BF16 if precision == "bf16" else 0)
        return micro_batch * sum(_kept(use, narrow) for use in some) + copies

    return micro_batch * (error + inputs) + kept(uses) + max(map(kept, blocks), default=0)


def _by_block(model: MaskedAutoencoderViT, uses: list[Use]) -> tuple[list[Use], list[list[Use]]]:
    """Uses outside all blocks, and those of each block."""
    block_of = {part: block for block in (*model.blocks, *model.decoder_blocks) for part in block.modules()}
    outside, inside = list[Use](), dict[nn.Module, list[Use]]()
    for use in uses:
        block = block_of.get(use.layer)
        (outside if block is None else inside.setdefault(block, [])).append(use)
    return outside, list(inside.values())


def _kept(use: Use, narrow: int) -> int:
    """Bytes of one image. A ReLU keeps what the next layer reads, and so nothing of its own."""
    values, wide_values = 0, 0
    read = 0 if use.is_beside else use.num_in * use.channels
    match use.layer:
        case nn.Linear() | nn.Conv2d() | nn.ConvTranspose2d() | PatchEmbed():
            values = read
        case nn.GELU() | GELU() | GELUTanh() | QuickGELU() | nn.SiLU() | nn.ReLU6() | LayerScale():
            values = read
        case ConvNeXtBlock():
            values = 0 if use.layer.gamma is None else read
        case GlobalResponseNorm():
            values = 2 * read
        case Attention() | CrossBlock():
            values = 2 * read + use.num_out * use.channels
            wide_values = use.num_out * (use.layer.num_heads if isinstance(use.layer, Attention) else use.layer.heads)
        case nn.MaxPool2d():
            values, wide_values = read, 2 * use.num_out * use.channels  # where each maximum stood, in int64
        case nn.LayerNorm():
            wide_values = read + 2 * use.num_in
        case GroupBatchNorm2d():
            wide_values = read + use.num_in
    return values * narrow + wide_values * _FP32


def _weight(layer: nn.Module) -> int:
    return layer.weight.numel() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) else 0
