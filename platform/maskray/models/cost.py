"""What a model costs, by arithmetic: the floating-point operations and parameters of a config.

Conventions: a multiply-add is two operations; matrix products, convolutions and the two products of attention are
counted, norms, activations, softmax and sums are not (under 1 % at any width worth training). A backward pass has two
products for each of the forward's, one for the input's gradient and one for the weight's; the first layer has but one,
since no gradient of the images is wanted. Recomputation, where it is on or a fused attention does it, is not counted:
the numbers are those of the model, which is what MFU divides by. Convolutions are dense: hidden places are computed and
set to zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from timm.models.vision_transformer import Attention
from torch import nn

from maskray.models.base import MaskedAutoencoder
from maskray.models.parameter_names import DECODER
from maskray.models.uses import Use, decoder_uses, encoder_uses
from maskray.models.vit import CrossBlock, PatchEmbed


@dataclass(frozen=True)
class Cost:
    """Operations are those of one image."""

    encoder_flops: int
    """Forward pass over the tokens of no cell and the visible cells."""
    decoder_flops: int
    """Forward pass of the decoder, with the projections into it and onto pixels."""
    first_flops: int
    """The part of the encoder's that is its first layer's, which reads the images."""
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
        return 3 * self.forward_flops - self.first_flops

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
    num_target = num_cells - num_visible if num_target is None else num_target
    encoder = [2 * _multiply_adds(use) for use in encoder_uses(model, num_visible)]
    encoder_parameters, decoder_parameters = _parameters(model)
    return Cost(
        encoder_flops=sum(encoder),
        decoder_flops=2 * _total(decoder_uses(model, num_visible, num_target)),
        first_flops=next(flops for flops in encoder if flops),
        encode_flops=2 * _total(encoder_uses(model, num_cells)),
        encoder_parameters=encoder_parameters,
        decoder_parameters=decoder_parameters,
    )


def _total(uses: Iterable[Use]) -> int:
    return sum(map(_multiply_adds, uses))


def _multiply_adds(use: Use) -> int:
    match use.layer:
        case nn.Linear() | nn.ConvTranspose2d():
            return use.num_in * use.layer.weight.numel()
        case nn.Conv2d():
            return use.num_out * use.layer.weight.numel()
        case PatchEmbed():
            return use.num_in * use.layer.proj.weight.numel()
        case Attention() | CrossBlock():
            return 2 * use.num_in * use.num_out * use.channels
    return 0


def _parameters(model: MaskedAutoencoder) -> tuple[int, int]:
    """Of encoder and decoder."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        counts[name.startswith(DECODER)] += parameter.numel() if parameter.requires_grad else 0
    return counts[0], counts[1]
