"""Masks, models and objectives: the sections that say what is learned."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, FiniteFloat, PlainSerializer, PositiveFloat, model_validator

from maskray.config.section import PositiveInt, Section, SizeHW, of_kind

# --------------------------------------------------------------------------------------------------------------- masks

_MOST_RATIOS = 8
Ratio = Annotated[float, Field(gt=0, lt=1)]
_Several = Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=_MOST_RATIOS)]


def _ratios(value: object) -> object:
    """`0.75` means `[0.75]`."""
    if isinstance(value, list | tuple):
        if not 0 < len(value) <= _MOST_RATIOS:
            raise ValueError(f"ratio takes one number or a list of up to {_MOST_RATIOS} (found {len(value)})")
        return value
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError("ratio is a share above 0 and below 1, or a list of such")
    return (value,)


Ratios = Annotated[
    tuple[Ratio, ...],
    BeforeValidator(_ratios, json_schema_input_type=Ratio | _Several),
    PlainSerializer(lambda ratios: ratios[0] if len(ratios) == 1 else list(ratios)),
]


class AnyMask(Section):
    """What all masks have."""

    ratio: Ratios = (0.75,)
    """Share of the cells that the encoder does not see. A list of at most 8: one is drawn for each step, the same for
    the whole batch, so that shapes stay few."""


class CellMask(AnyMask):
    """A mask of the model's cells."""

    unit: SizeHW = (1, 1)
    """[height, width] in cells of what is hidden or shown as one; it divides the grid. Pixio's masks have 4."""


class RandomMask(CellMask):
    """Units hidden uniformly at random (He et al. 2022, §3)."""

    kind: Literal["random"] = "random"


class BlockMask(CellMask):
    """Rectangles hidden one after another until there are enough; the last only in part (BEiT, Bao et al. 2022)."""

    kind: Literal["block"] = "block"
    sides: tuple[PositiveInt, PositiveInt] = (3, 7)
    """Shortest and longest side of a rectangle in units, each drawn by itself; the grid's own side is the limit."""
    roll: bool = False
    """Rectangles that leave the image on one side come in on the other: all cells are then hidden equally often."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sides[0] > self.sides[1]:
            raise ValueError(f"sides must be [shortest, longest] (found {list(self.sides)})")
        return self


class InverseBlockMask(CellMask):
    """All is hidden but one rectangle (CAPI, Darcet et al. 2025)."""

    kind: Literal["inverse_block"] = "inverse_block"
    aspect: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """Smallest and largest width / height of the rectangle, in units."""
    roll: bool = False
    """It may leave the image on one side and come in on the other: all cells are then seen equally often."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.aspect[0] > self.aspect[1]:
            raise ValueError(f"aspect must be [smallest, largest] (found {list(self.aspect)})")
        return self


class GridMask(CellMask):
    """One unit of every few shown at equal distances, or hidden where the ratio is small (He et al. 2022, Table 1f).

    Where the pattern begins is drawn for each image.
    """

    kind: Literal["grid"] = "grid"


class PixelMask(AnyMask):
    """Single pixels hidden at random: a baseline, for models that take whole images.

    Nine of ten hidden pixels then have a visible neighbour, so the task is close to interpolation; random patches are
    what masked autoencoders learn from.
    """

    kind: Literal["pixels"] = "pixels"
    unit: ClassVar[tuple[int, int]] = (1, 1)


Mask = Annotated[
    RandomMask | BlockMask | InverseBlockMask | GridMask | PixelMask, Field(discriminator="kind"), of_kind("random")
]


# -------------------------------------------------------------------------------------------------------------- models


class TransformerSize(Section):
    """Width, depth and heads of a stack of transformer blocks."""

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            near = [h for h in range(1, self.width + 1) if self.width % h == 0]
            near = sorted(sorted(near, key=lambda h: abs(h - self.heads))[:3])
            raise ValueError(f"heads {self.heads} must divide width {self.width}; the nearest that do are {near}")
        if self.width * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP no width: at least {1 / self.width:.2g}")
        if self.width % 4:
            near = [n for n in (self.width // 4 * 4, self.width // 4 * 4 + 4) if n]
            raise ValueError(
                f"width {self.width} must be a multiple of 4 (2-D sine-cosine positions); the nearest are {near}"
            )
        return self


class VitDecoder(TransformerSize):
    """The decoder: thrown away after pretraining."""

    width: PositiveInt = 512
    depth: Annotated[int, Field(ge=1, le=32)] = 8
    heads: PositiveInt = 16
    attention: Literal["self", "cross"] = "self"
    """`self`: all cells attend to each other (He et al. 2022). `cross`: the cells that are painted attend to what the
    encoder saw, and not to each other (CrossMAE, Fu et al. 2024): less work, and less again with
    `objective.predict_fraction`."""


class AnyVit(Section):
    """What vision transformers have in common."""

    patch: SizeHW = (16, 16)
    """[height, width] of a patch in pixels."""
    positions: Literal["fixed", "learnable"] = "fixed"
    """2-D sine-cosine positions, or learned ones that start from them."""
    decoder: VitDecoder = VitDecoder()

    @property
    def cell(self) -> tuple[int, int]:
        """Pixels down and across of what is hidden or shown as one."""
        return self.patch


class VitConfig(TransformerSize, AnyVit):
    """Vision transformer MAE (He et al. 2022): the encoder sees the visible patches only."""

    kind: Literal["vit"] = "vit"
    width: PositiveInt = 768
    depth: PositiveInt = 12
    heads: PositiveInt = 12
    class_token: bool = True
    registers: Annotated[int, Field(ge=0)] = 0
    """Further tokens that belong to no cell (Darcet et al. 2024)."""


class TimmVitConfig(AnyVit):
    """A plain vision transformer of timm's as encoder, with the sizes and all else that its name stands for."""

    kind: Literal["timm_vit"] = "timm_vit"
    name: str
    """As timm knows it, such as `vit_small_patch16_224` or `vit_base_patch14_reg4_dinov2`; without weights."""
    # Without a default of its own it would not be that of the name.
    patch: SizeHW
    """[height, width] of a patch in pixels; if it is not given, the one in the name."""

    @model_validator(mode="before")
    @classmethod
    def _patch_of_the_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("patch") is not None or not isinstance(given.get("name"), str):
            return given
        named = re.search(r"patch(\d+)", given["name"])
        if named is None:
            raise ValueError(f"patch must be given: the name {given['name']!r} does not say it")
        return given | {"patch": int(named[1])}


class ConvDecoder(Section):
    """Transposed convolutions, as many as the encoder has convolutions, with blocks before them."""

    depth: Annotated[int, Field(ge=0, le=32)] = 4
    """Blocks of 7 × 7 convolutions, by which the sight of visible cells reaches hidden ones that have no visible
    neighbour; 0 leaves those with one gray guess."""


class ConvConfig(Section):
    """Convolutions down, transposed convolutions up; see the README for where it comes from."""

    kind: Literal["conv"] = "conv"
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=6)] = (64, 128, 256)
    """Channels after each convolution. Each halves the image, so a cell has 2 ** len(widths) pixels a side."""
    decoder: ConvDecoder = ConvDecoder()

    @property
    def cell(self) -> tuple[int, int]:
        """Pixels down and across of what is hidden or shown as one."""
        return (2 ** len(self.widths), 2 ** len(self.widths))


class UNetDecoder(Section):
    """Transposed convolutions up, with the encoder's maps of each scale added (SparK, Tian et al. 2023)."""

    kind: Literal["unet"] = "unet"
    width: Annotated[int, Field(ge=32)] = 768
    """Channels at the coarsest scale, halved at each of the five finer ones."""


class BlockDecoder(Section):
    """ConvNeXt blocks at the coarsest scale and a linear layer to pixels (FCMAE, Woo et al. 2023)."""

    kind: Literal["block"] = "block"
    width: PositiveInt = 512
    depth: Annotated[int, Field(ge=1, le=32)] = 1
    """Each block looks 3 cells around: hidden cells that are further than all blocks together look from any visible one
    are painted alike."""


class SparseConvConfig(Section):
    """A ResNet or ConvNeXt of timm's whose layers never see a hidden cell (SparK; FCMAE)."""

    kind: Literal["sparse_conv"] = "sparse_conv"
    name: str = "convnextv2_tiny"
    """As timm knows it, such as `resnet50`, `convnext_small`, `convnextv2_tiny`; without weights."""
    decoder: Annotated[UNetDecoder | BlockDecoder, Field(discriminator="kind"), of_kind("block")] = BlockDecoder()

    @property
    def cell(self) -> tuple[int, int]:
        """Pixels down and across of what is hidden or shown as one: the stride of these networks."""
        return (32, 32)


AnyModel = VitConfig | TimmVitConfig | ConvConfig | SparseConvConfig
Model = Annotated[AnyModel, Field(discriminator="kind"), of_kind("vit")]


# ----------------------------------------------------------------------------------------------------------- objective


class ObjectiveConfig(Section):
    """What the decoder must paint, and how a miss is counted, in fp32."""

    loss: Literal["l2", "l1"] = "l2"
    norm_pix: bool = True
    """Each cell's pixels minus their own mean by their own std (He et al. 2022, §3)."""
    cells: Literal["hidden", "all"] = "hidden"
    """Those that count."""
    predict_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the hidden cells that count, drawn for each image (CrossMAE): fewer cost less with a `cross` decoder."""

    @model_validator(mode="after")
    def _a_fraction_is_of_hidden_cells(self) -> Self:
        if self.cells == "all" and self.predict_fraction < 1:
            raise ValueError("predict_fraction is a share of the hidden cells: with cells: all it must be 1")
        return self


# ------------------------------------------------------------------------------------------------------------- encoder


class EncoderCard(Section):
    """What must be known of an exported encoder to use it, beside its weights."""

    model: Model
    image_size: SizeHW
    channels: PositiveInt
    mean: tuple[FiniteFloat, ...]
    """One for each channel, as `std`."""
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std take one number for each of {self.channels} channels")
        return self
