"""The vision transformer MAE (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022).

The blocks are timm's; parameter names, initialisation and positions are those of the authors' code (`models_mae.py` and
`util/pos_embed.py` of facebookresearch/mae), so that their checkpoints load and their numbers come out. A transformer
that timm knows by name brings its own blocks and tokens; the rest is the same.

Shape letters: B images, C channels, H and W down and across (pixels of an image, cells of a visibility), L = cells of
an image in raster order, N visible cells, Q cells to be painted, T tokens (those that belong to no cell, then cells), D
width of a token, P pixel values of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import timm
import torch
from timm.layers import Mlp, resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maskray.config.models import TimmVitConfig, TransformerSize, VitConfig, VitDecoder
from maskray.errors import ConfigError
from maskray.models.base import MaskedAutoencoder, Part, indices, put, taken

LAYER_NORM_EPS = 1e-6
TOKEN_STD = 0.02
_LayerNorm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)


class PatchEmbed(nn.Module):
    """Pixel values of a cell to a token.

    A convolution in name and shape, as in the authors' checkpoints, applied as the matrix product that it is: so it can
    be applied to the visible cells alone, and no hidden pixel enters the arithmetic at all.
    """

    def __init__(self, channels: int, patch_HW: tuple[int, int], width: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_HW, stride=patch_HW, bias=bias)

    def forward(self, cells_BNP: Tensor) -> Tensor:
        """Tokens (B, N, D) of cells whose values stand in the (channel, row, column) order of the weight."""
        return F.linear(cells_BNP, self.proj.weight.flatten(1), self.proj.bias)


class MaskedAutoencoderViT(MaskedAutoencoder):
    """Encoder over the visible cells; decoder over all of them, or over those to be painted alone.

    Args:
        config: sizes of encoder and decoder.
        image_size: height and width of the images in pixels; the patch divides them.
        channels: of the images.

    Raises:
        ConfigError: timm has no plain vision transformer of that name.
    """

    def __init__(self, config: VitConfig | TimmVitConfig, image_size: tuple[int, int], channels: int) -> None:
        parts = _from_timm(config, image_size, channels) if isinstance(config, TimmVitConfig) else _own(config)
        width, decoder = parts.width, config.decoder
        super().__init__(image_size, channels, config.patch, width)
        learnable = config.positions == "learnable"

        self.patch_embed = PatchEmbed(channels, config.patch, width, parts.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if parts.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, parts.registers, width)) if parts.registers else None
        self.num_prefix = int(parts.class_token) + parts.registers
        """Tokens that belong to no cell."""
        self.placed_prefix = self.num_prefix if parts.prefix_has_positions else 0
        """Those of them that have positions."""
        table = position_table(width, self.grid_HW, self.placed_prefix)
        self.pos_embed = nn.Parameter(table, requires_grad=learnable)
        self.norm_pre = parts.norm_pre
        self.blocks = nn.ModuleList(parts.blocks)
        self.norm = parts.norm

        self.decoder_embed = nn.Linear(width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        table = position_table(decoder.width, self.grid_HW, 0 if decoder.attention == "cross" else self.num_prefix)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=learnable)
        self._crosses = decoder.attention == "cross"
        self.decoder_blocks = _decoder_blocks(decoder)
        self.decoder_norm = _LayerNorm(decoder.width)
        self.decoder_pred = nn.Linear(decoder.width, self.cell_pixels)

        self.apply(_init)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # a view: as if it were a Linear
        for token in (self.cls_token, self.reg_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=TOKEN_STD)

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
        del weights_B  # no statistics are kept
        index_BN = indices(visible_BHW, num_visible)
        latents_BTD = self._encode(images_BCHW, index_BN)
        if self._crosses:
            if target_BHW is None:
                target_BHW, num_target = ~visible_BHW, visible_BHW[0].numel() - num_visible
            return self._decode_across(latents_BTD, indices(target_BHW, num_target))
        if target_BHW is None or num_target == visible_BHW[0].numel():
            return self._decode(latents_BTD, index_BN, None)
        return self._decode(latents_BTD, index_BN, indices(target_BHW, num_target))

    def encode_visible(self, images_BCHW: Tensor, visible_BHW: Tensor, num_visible: int) -> Tensor:
        """Latents (B, T, D) that the decoder gets: tokens of no cell, then the visible cells in raster order."""
        return self._encode(images_BCHW, indices(visible_BHW, num_visible))

    def place(self, device: torch.device) -> Self:
        """As `MaskedAutoencoder.place`."""
        modules: Iterable[Any] = self.modules()
        for module in modules:
            if hasattr(module, "fused_attn"):
                # On a CPU the backward pass of fused attention takes longer than those of the products it is made of.
                module.fused_attn = device.type != "cpu"
        return super().place(device)

    def encode(self, images_BCHW: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """As `MaskedAutoencoder.encode`."""
        del weights_B  # no statistics are kept
        return self._encode(images_BCHW, None)[:, self.num_prefix :]

    def layers(self) -> list[list[Part]]:
        """What makes tokens, each block, and the norm behind the last."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        first: list[Part] = [self.patch_embed, *tokens, self.pos_embed, self.norm_pre]
        blocks: list[list[Part]] = [[block] for block in self.blocks]
        return [first, *blocks, [self.norm]]

    def feature_maps(self, images_BCHW: Tensor, weights_B: Tensor | None = None) -> list[Tensor]:
        """One scale alone, that of the patches."""
        del weights_B
        return [self.encode(images_BCHW).transpose(1, 2).unflatten(2, self.grid_HW)]

    def _encode(self, images_BCHW: Tensor, index_BN: Tensor | None) -> Tensor:
        cells_BNP, positions = self._cells(images_BCHW), self.pos_embed[:, self.placed_prefix :]
        if index_BN is not None:
            cells_BNP, positions = taken(cells_BNP, index_BN), positions[0, index_BN]
        x = torch.cat([*self._prefix(cells_BNP.shape[0]), self.patch_embed(cells_BNP) + positions], dim=1)
        x = self._through(self.blocks, self.norm_pre(x))
        return self.norm(x)  # type: ignore[no-any-return]

    def _prefix(self, num: int) -> list[Tensor]:
        tokens: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return []
        prefix_1TD = torch.cat(tokens, dim=1)
        if self.placed_prefix:
            prefix_1TD = prefix_1TD + self.pos_embed[:, : self.placed_prefix]
        return [prefix_1TD.expand(num, -1, -1)]

    def _decode(self, latents_BTD: Tensor, index_BN: Tensor, index_BQ: Tensor | None) -> Tensor:
        # The mask token's type, not that of `decoder_embed` under autocast: the sum of the residuals stays fp32.
        x = self.decoder_embed(latents_BTD).to(self.mask_token.dtype)
        hidden_BLD = self.mask_token.expand(len(x), self.grid_HW[0] * self.grid_HW[1], -1)
        cells_BLD = put(x[:, self.num_prefix :], index_BN, hidden_BLD)
        x = torch.cat((x[:, : self.num_prefix], cells_BLD), dim=1) + self.decoder_pos_embed
        *blocks, last = self.decoder_blocks
        x = self._through(blocks, x)
        if index_BQ is None:
            x = self._through([last], x)
            return self.decoder_pred(self.decoder_norm(x)[:, self.num_prefix :])  # type: ignore[no-any-return]
        return self._painted(self._through([last], x, index_BQ + self.num_prefix), index_BQ)

    def _decode_across(self, latents_BTD: Tensor, index_BQ: Tensor) -> Tensor:
        x = self.mask_token + self.decoder_pos_embed[0, index_BQ]
        return self._painted(self._through(self.decoder_blocks, x, self.decoder_embed(latents_BTD)), index_BQ)

    def _painted(self, tokens_BQD: Tensor, index_BQ: Tensor) -> Tensor:
        pred_BQP = self.decoder_pred(self.decoder_norm(tokens_BQD))
        nothing_BLP = pred_BQP.new_zeros(len(pred_BQP), self.grid_HW[0] * self.grid_HW[1], self.cell_pixels)
        return put(pred_BQP, index_BQ, nothing_BLP)

    def _through(self, blocks: Iterable[nn.Module], x: Tensor, *others: Tensor) -> Tensor:
        for block in blocks:
            x = block(x, *others) if self.remembers_activations else checkpoint(block, x, *others, use_reentrant=False)
        return x

    def _cells(self, images_BCHW: Tensor) -> Tensor:
        """(B, L, P) pixel values of each cell in the order of the convolution's weight."""
        (grid_h, grid_w), (patch_h, patch_w) = self.grid_HW, self.cell_HW
        shape = (self.channels, grid_h * patch_h, grid_w * patch_w)
        assert images_BCHW.shape[1:] == shape, f"images {tuple(images_BCHW.shape)}, the model is built for {shape}"
        cells = images_BCHW.reshape(-1, self.channels, grid_h, patch_h, grid_w, patch_w).permute(0, 2, 4, 1, 3, 5)
        return cells.reshape(-1, grid_h * grid_w, self.cell_pixels)


class DecoderBlock(Block):
    """timm's block that can go on with some of its tokens alone: the last one is needed for cells to be painted."""

    def forward(self, x_BTD: Tensor, index_BQ: Tensor | None = None) -> Tensor:
        """(B, T, D), or (B, Q, D) of the tokens of those numbers."""
        x = x_BTD + self.attn(self.norm1(x_BTD))
        if index_BQ is not None:
            x = taken(x, index_BQ)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class CrossBlock(nn.Module):
    """A block whose tokens attend to others and not to each other (CrossMAE, Fu et al. 2024)."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.heads, self.fused_attn = size.heads, True
        self.norm1, self.norm_seen, self.norm2 = (_LayerNorm(size.width) for _ in range(3))
        self.q, self.kv = nn.Linear(size.width, size.width), nn.Linear(size.width, 2 * size.width)
        self.proj = nn.Linear(size.width, size.width)
        self.mlp = Mlp(size.width, int(size.width * size.mlp_ratio))

    def forward(self, x_BQD: Tensor, seen_BTD: Tensor) -> Tensor:
        """(B, Q, D), each token from itself and from what was seen."""
        q = self.q(self.norm1(x_BQD)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_seen(seen_BTD)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            attended = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        x = x_BQD + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def position_table(width: int, grid_HW: tuple[int, int], num_prefix: int = 1) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, prefix + L, D); zeros for tokens of no cell, which come first.

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
    return torch.cat((torch.zeros(num_prefix, width, dtype=torch.float64), cells_LD)).float()[None]


def resampled_positions(table_1TD: Tensor, old_HW: tuple[int, int], new_HW: tuple[int, int], num_prefix: int) -> Tensor:
    """Positions of a grid for another one, in 2-D: bicubic. Those of tokens of no cell, which come first, stay."""
    resampled: Tensor = resample_abs_pos_embed(
        table_1TD.float(), list(new_HW), list(old_HW), num_prefix_tokens=num_prefix
    )
    return resampled


# ------------------------------------------------------------------------------------------------------------- encoder


@dataclass(frozen=True)
class _Encoder:
    width: int
    blocks: Iterable[nn.Module]
    norm_pre: nn.Module
    norm: nn.Module
    class_token: bool
    registers: int
    prefix_has_positions: bool
    patch_bias: bool


def _own(config: VitConfig) -> _Encoder:
    return _Encoder(
        width=config.width,
        blocks=_blocks(config),
        norm_pre=nn.Identity(),
        norm=_LayerNorm(config.width),
        class_token=config.class_token,
        registers=config.registers,
        prefix_has_positions=True,
        patch_bias=True,
    )


def _from_timm(config: TimmVitConfig, image_size: tuple[int, int], channels: int) -> _Encoder:
    wrong = {
        "key": "model.name",
        "found": config.name,
        "allowed": "plain vision transformers of timm, such as vit_small_patch16_224 or vit_base_patch14_reg4_dinov2",
        "fix": "timm.list_models('vit_*') and timm.list_models('deit*') list names",
    }
    if not timm.is_model(config.name):
        raise ConfigError("timm knows no such model", **wrong)
    plain = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    options = {"img_size": image_size, "patch_size": config.patch, "in_chans": channels}
    try:
        if timm.models.get_arch_name(config.name) not in plain:
            raise TypeError("it is of another module")
        vit = timm.create_model(config.name, pretrained=False, num_classes=0, global_pool="", **options)
        if type(vit) is not VisionTransformer or vit.pos_embed is None or vit.embed_dim % 4:
            raise TypeError("it has other tokens or positions")
        if not isinstance(vit.patch_embed.norm, nn.Identity):
            raise TypeError("it normalises patches")
        if not all(any(type(part) is Attention for part in block.modules()) for block in vit.blocks):
            raise TypeError("its blocks attend in another way, whose cost is not known")
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # timm's own refusals, too
        raise ConfigError(f"the model is no plain vision transformer ({error})", **wrong) from error
    return _Encoder(
        width=vit.embed_dim,
        blocks=vit.blocks,
        norm_pre=vit.norm_pre,
        norm=vit.norm,
        class_token=vit.cls_token is not None,
        registers=vit.num_reg_tokens,
        prefix_has_positions=not vit.no_embed_class,
        patch_bias=vit.patch_embed.proj.bias is not None,
    )


def _blocks(size: TransformerSize, kind: Callable[..., nn.Module] = Block) -> nn.ModuleList:
    block = partial(kind, size.width, size.heads, mlp_ratio=size.mlp_ratio, qkv_bias=True, norm_layer=_LayerNorm)
    return nn.ModuleList(block() for _ in range(size.depth))


def _decoder_blocks(size: VitDecoder) -> nn.ModuleList:
    if size.attention == "cross":
        return nn.ModuleList(CrossBlock(size) for _ in range(size.depth))
    return _blocks(size, DecoderBlock)


def _init(module: nn.Module) -> None:
    """As the authors: Xavier for every Linear, zero biases, norms at identity. The patch bias keeps torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
