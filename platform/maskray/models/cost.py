"""What a model costs, by arithmetic: the floating-point operations and parameters of a config.

Conventions: a multiply-add is two operations; matrix products and attention are counted, norms, activations, softmax
and sums are not (under 1 % at any width worth training); a training step costs three times its forward pass, the
backward pass being two products for each of the forward's. Recomputation, where it is on, is not counted: the numbers
are those of the model, which is what MFU divides by.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskray.config.schema import Model, TransformerSize


@dataclass(frozen=True)
class Cost:
    """Operations are those of one image."""

    encoder_flops: int
    """Forward pass over the class token and the visible cells."""
    decoder_flops: int
    """Forward pass over all cells, with the projections into it and onto pixels."""
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


def cost(config: Model, image_size: tuple[int, int], channels: int, num_visible: int) -> Cost:
    """The cost of a config on images of `image_size` of which the encoder sees `num_visible` cells."""
    num_cells = (image_size[0] // config.patch[0]) * (image_size[1] // config.patch[1])
    cell_pixels = config.patch[0] * config.patch[1] * channels
    width, decoder = config.width, config.decoder

    def encoder_macs(cells: int) -> int:
        return cells * cell_pixels * width + _stack_macs(config, cells + 1)

    decoder_macs = (
        (num_visible + 1) * width * decoder.width
        + _stack_macs(decoder, num_cells + 1)
        + num_cells * decoder.width * cell_pixels
    )
    positions = (1 + num_cells) if config.positions == "learnable" else 0
    return Cost(
        encoder_flops=2 * encoder_macs(num_visible),
        decoder_flops=2 * decoder_macs,
        encode_flops=2 * encoder_macs(num_cells),
        # patch projection and its bias, class token, last norm; then projection, mask token, last norm, head
        encoder_parameters=_stack_parameters(config) + (cell_pixels + 1 + 1 + 2 + positions) * width,
        decoder_parameters=_stack_parameters(decoder)
        + (width + 1 + 1 + 2 + positions) * decoder.width
        + (decoder.width + 1) * cell_pixels,
    )


def _hidden_width(size: TransformerSize) -> int:
    return int(size.width * size.mlp_ratio)


def _stack_macs(size: TransformerSize, tokens: int) -> int:
    projections = 4 * size.width**2 + 2 * size.width * _hidden_width(size)
    attention = 2 * tokens * size.width
    return size.depth * tokens * (projections + attention)


def _stack_parameters(size: TransformerSize) -> int:
    width, hidden = size.width, _hidden_width(size)
    norms, attention = 4 * width, 4 * width**2 + 4 * width
    return size.depth * (norms + attention + 2 * width * hidden + hidden + width)
