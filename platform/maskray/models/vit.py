"""The vision transformer MAE (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022).

The blocks are timm's; parameter names, initialisation and positions are those of the authors' code (`models_mae.py` and
`util/pos_embed.py` of facebookresearch/mae), so that their checkpoints load and their numbers come out.

Shape letters: B images, C channels, H and W down and across (pixels of an image, cells of a visibility), L = cells of
an image in raster order, N visible cells, T tokens (class token and cells), D width of a token, P pixel values of a
cell.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from maskray.config.schema import TransformerSize, VitConfig

LAYER_NORM_EPS = 1e-6
TOKEN_STD = 0.02
_LayerNorm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)


class PatchEmbed(nn.Module):
    """Pixel values of a cell to a token.

    A convolution in name and shape, as in the authors' checkpoints, applied as the matrix product that it is: so it can
    be applied to the visible cells alone, and no hidden pixel enters the arithmetic at all.
    """

    def __init__(self, channels: int, patch_HW: tuple[int, int], width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_HW, stride=patch_HW)

    def forward(self, cells_BNP: Tensor) -> Tensor:
        """Tokens (B, N, D) of cells whose values stand in the (channel, row, column) order of the weight."""
        return F.linear(cells_BNP, self.proj.weight.flatten(1), self.proj.bias)


class MaskedAutoencoderViT(nn.Module):
    """Encoder over the visible cells, decoder over all of them.

    Args:
        config: sizes of encoder and decoder.
        image_size: height and width of the images in pixels; the patch divides them.
        channels: of the images.
    """

    def __init__(self, config: VitConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.patch_HW = config.patch
        self.grid_HW = (image_size[0] // config.patch[0], image_size[1] // config.patch[1])
        self.channels = channels
        self.cell_pixels = config.patch[0] * config.patch[1] * channels
        learnable = config.positions == "learnable"
        width, decoder = config.width, config.decoder

        self.patch_embed = PatchEmbed(channels, config.patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(position_table(width, self.grid_HW), requires_grad=learnable)
        self.blocks = _blocks(config)
        self.norm = _LayerNorm(width)

        self.decoder_embed = nn.Linear(width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.decoder_pos_embed = nn.Parameter(position_table(decoder.width, self.grid_HW), requires_grad=learnable)
        self.decoder_blocks = _blocks(decoder)
        self.decoder_norm = _LayerNorm(decoder.width)
        self.decoder_pred = nn.Linear(decoder.width, self.cell_pixels)

        self.apply(_init)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # a view: as if it were a Linear
        nn.init.normal_(self.cls_token, std=TOKEN_STD)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def forward(self, images_BCHW: Tensor, visible_BHW: Tensor, num_visible: int) -> Tensor:
        """Predicted values (B, L, P) of all cells, in the (row, column, channel) order of the objective's target.

        Args:
            images_BCHW: normalised pixels.
            visible_BHW: bool, in cells; True = the encoder sees it.
            num_visible: how many cells of each image are visible; given, since counting on the device is a sync.
        """
        index_BN = visible_indices(visible_BHW, num_visible)
        return self._decode(self._encode(images_BCHW, index_BN), index_BN)

    def encode_visible(self, images_BCHW: Tensor, visible_BHW: Tensor, num_visible: int) -> Tensor:
        """Latents (B, 1 + N, D) that the decoder gets: the class token, then the visible cells in raster order."""
        return self._encode(images_BCHW, visible_indices(visible_BHW, num_visible))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, L, D) of all cells in raster order. Nothing is ever masked here."""
        return self._encode(images_BCHW, None)[:, 1:]

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """One feature vector (B, D) an image: the mean over its cells."""
        return self.encode(images_BCHW).mean(dim=1)

    def _encode(self, images_BCHW: Tensor, index_BN: Tensor | None) -> Tensor:
        cells_BNP, positions = self._cells(images_BCHW), self.pos_embed[:, 1:]
        if index_BN is not None:
            cells_BNP = cells_BNP.gather(1, index_BN[:, :, None].expand(-1, -1, cells_BNP.shape[2]))
            positions = positions[0, index_BN]
        tokens_BND = self.patch_embed(cells_BNP) + positions
        class_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens_BND), -1, -1)
        x = torch.cat((class_B1D, tokens_BND), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def _decode(self, latents_BTD: Tensor, index_BN: Tensor) -> Tensor:
        # The mask token's type, not that of `decoder_embed` under autocast: the sum of the residuals stays fp32.
        x = self.decoder_embed(latents_BTD).to(self.mask_token.dtype)
        num_cells = self.grid_HW[0] * self.grid_HW[1]
        hidden_BLD = self.mask_token.expand(len(x), num_cells, -1)
        cells_BLD = hidden_BLD.scatter(1, index_BN[:, :, None].expand(-1, -1, x.shape[2]), x[:, 1:])
        x = torch.cat((x[:, :1], cells_BLD), dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x)[:, 1:])  # type: ignore[no-any-return]

    def _cells(self, images_BCHW: Tensor) -> Tensor:
        """(B, L, P) pixel values of each cell in the order of the convolution's weight."""
        (grid_h, grid_w), (patch_h, patch_w) = self.grid_HW, self.patch_HW
        shape = (self.channels, grid_h * patch_h, grid_w * patch_w)
        assert images_BCHW.shape[1:] == shape, f"images {tuple(images_BCHW.shape)}, the model is built for {shape}"
        cells = images_BCHW.reshape(-1, self.channels, grid_h, patch_h, grid_w, patch_w).permute(0, 2, 4, 1, 3, 5)
        return cells.reshape(-1, grid_h * grid_w, self.cell_pixels)


def visible_indices(visible_BHW: Tensor, num_visible: int) -> Tensor:
    """Numbers (B, N) of the visible cells, in raster order. The shape is known to the host: nothing waits."""
    hidden_BL = (~visible_BHW).flatten(1).to(torch.uint8)
    return hidden_BL.argsort(dim=1, stable=True)[:, :num_visible]


def position_table(width: int, grid_HW: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, 1 + L, D); zeros for the class token.

    The first half of the width encodes the column and the second half the row ("w goes first" in the authors' code,
    whose names say otherwise; mae#18, mae#67). Each half is the sines and then the cosines of falling frequencies.
    """
    rows_HW, columns_HW = torch.meshgrid(
        torch.arange(grid_HW[0], dtype=torch.float64), torch.arange(grid_HW[1], dtype=torch.float64), indexing="ij"
    )
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for place_HW in (columns_HW, rows_HW):
        angles = place_HW.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    cells_LD = torch.cat(halves, dim=1)
    return torch.cat((torch.zeros(1, width, dtype=torch.float64), cells_LD)).float()[None]


def _blocks(size: TransformerSize) -> nn.ModuleList:
    block = partial(Block, size.width, size.heads, mlp_ratio=size.mlp_ratio, qkv_bias=True, norm_layer=_LayerNorm)
    return nn.ModuleList(block() for _ in range(size.depth))


def _init(module: nn.Module) -> None:
    """As the authors: Xavier for every Linear, zero biases, norms at identity. The patch bias keeps torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
