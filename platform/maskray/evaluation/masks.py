"""Every mask there is, on one image: to see what a model of the config would be asked to paint.

Shape letters: C channels, H and W down and across (pixels of an image, cells of a visibility).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from maskray import masking
from maskray.config.models import AnyMask, CellMask, Mask, PixelMask
from maskray.config.schema import RunConfig
from maskray.data.crop import crop_resize
from maskray.data.decode import UndecodableError, decode
from maskray.data.manifest import SplitName
from maskray.data.shards import Dataset
from maskray.data.stream import walk
from maskray.errors import ConfigError, DataError
from maskray.figures import pictures

Image = np.ndarray[Any, np.dtype[np.uint8]]
Visible = np.ndarray[Any, np.dtype[np.bool_]]

UNITS = (1, 2, 4)
FEWEST = 4
"""Units down and across that a mask is shown in, at least: fewer are no pattern."""


def mask_figure(config: RunConfig, image_CHW: Image) -> tuple[bytes, dict[str, str]]:
    """A PNG of the config's mask and of each other kind at its ratio; and why others are left out, by their names.

    Raises:
        ConfigError: the config's own mask cannot be drawn.
    """
    own = config.mask.model_copy(update={"ratio": config.mask.ratio[:1]})
    seen, left_out = {f"this run: {_name(own)}": _drawn(own, config)}, {}
    for mask in (each for each in _all_masks(own.ratio[0], _grid(config, config.model.cell)) if each != own):
        try:
            seen[_name(mask)] = _drawn(mask, config)
        except ConfigError as error:
            left_out[_name(mask)] = str(error)
    return pictures.masks(image_CHW, seen, title=f"{config.name}: masks at ratio {config.mask.ratio[0]:g}"), left_out


def image_of(config: RunConfig, file: Path | None) -> Image:
    """(C, H, W) uint8 of the config's size: the middle of a picture in a file, or the dataset's first held-out image.

    Raises:
        DataError: there is no such dataset or file, or it is no picture.
    """
    if file is None:
        dataset = Dataset.open(config.data.path, config.data.version)
        split: SplitName = "held_out" if dataset.num_rows("held_out") else "train"
        return next(walk(dataset, split, config.data.image_size, config.data.channels, 1)).images_BCHW[0].numpy()
    try:
        image_CHW = decode(file.read_bytes(), config.data.channels)
    except (OSError, UndecodableError) as error:
        raise DataError("no picture can be read there", key="--image", found=f"{file} ({error})") from error
    return crop_resize(
        image_CHW, _middle(image_CHW, config.data.image_size), config.data.image_size, flip=False
    ).numpy()


def _middle(image_CHW: torch.Tensor, size_HW: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The largest box in the middle that has the aspect of a size."""
    height, width = image_CHW.shape[1:]
    scale = min(height / size_HW[0], width / size_HW[1])
    box_h, box_w = max(1, int(size_HW[0] * scale)), max(1, int(size_HW[1] * scale))
    return np.array([(height - box_h) // 2, (width - box_w) // 2, box_h, box_w])


def _all_masks(ratio: float, grid_HW: tuple[int, int]) -> list[AnyMask]:
    kinds = get_args(get_args(Mask)[0])
    units = [unit for unit in UNITS if not any(side % unit for side in grid_HW) and min(grid_HW) // unit >= FEWEST]
    whole = [kind(ratio=ratio, unit=unit) for unit in units for kind in kinds if issubclass(kind, CellMask)]
    return whole + [kind(ratio=ratio) for kind in kinds if not issubclass(kind, CellMask)]


def _drawn(mask: Any, config: RunConfig) -> Visible:
    """(H, W), True = seen; as the first image of a run's first pass would have it."""
    (height, width), (down, across) = (
        config.data.image_size,
        (1, 1) if isinstance(mask, PixelMask) else config.model.cell,
    )
    grid_HW = (height // down, width // across)
    num_visible = masking.visible_counts(mask, grid_HW)[0]
    drawn = masking.draw(mask, grid_HW, num_visible, seed=config.seed, pass_=0, rows=np.arange(1), view=0)
    return np.asarray(drawn[0])


def _grid(config: RunConfig, cell: tuple[int, int]) -> tuple[int, int]:
    """Cells down and across."""
    return config.data.image_size[0] // cell[0], config.data.image_size[1] // cell[1]


def _name(mask: Any) -> str:
    unit = "" if mask.unit == (1, 1) else f", {mask.unit[0]} × {mask.unit[1]}"
    return f"{mask.kind.replace('_', ' ')}{unit}"
