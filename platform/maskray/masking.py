"""Masks: which cells of an image the encoder sees. Drawn outside the model, passed in, used by model and loss alike.

`visible` is bool, True = the encoder sees the cell, shape (B, H, W) in cells of the model. Every image of a batch hides
exactly the same number of cells.

A mask is drawn in units of one or more cells. Most are an order: each unit of an image gets a key, and the units of the
smallest keys are hidden, or shown. So the count is exact whatever the shape, and equal keys go by place: numpy and
torch draw the same bits.

Shape letters: B images, H and W cells down and across, L = H·W; h and w units down and across, l = h·w.
"""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from maskray import draws
from maskray.config.models import (
    BlockMask,
    GridMask,
    InverseBlockMask,
    Mask,
    ObjectiveConfig,
    PixelMask,
    RandomMask,
)
from maskray.errors import ConfigError

_SPARE_RECTANGLES = 8
_SHOWN = 8
_RATIO_DECIMALS = 9


class Drawing(NamedTuple):
    """Where draws come from."""

    seed: int
    pass_: Any
    """The pass over the data, a scalar or (B,) int64."""
    rows: Any
    """(B,) int64 row numbers in the dataset."""
    view: Any
    """Which view of the image, a scalar or (B,) int64."""
    xp: ModuleType = np
    """`numpy` or `torch`."""
    stream: draws.Stream = draws.Stream.MASK

    def words(self, num: int) -> Any:
        """(B, num) int64 below 2**32."""
        return draws.words(
            seed=self.seed,
            stream=self.stream,
            pass_=self.pass_,
            row=self.rows,
            view=self.view,
            num=num,
            xp=self.xp,
        )

    def arange(self, num: int) -> Any:
        """(num,) int64 where the rows are."""
        return np.arange(num) if self.xp is np else self.xp.arange(num, device=self.rows.device)


def visible_counts(mask: Mask, grid_HW: tuple[int, int]) -> tuple[int, ...]:
    """Cells that stay visible in each image, for each ratio of the mask.

    The whole part of l × (1 - ratio), as the MAE authors' code takes it, with the ratio taken as the decimal that was
    written, so no float error can hide or show a unit too many: 10 cells at ratio 0.9 keep 1.

    Raises:
        ConfigError: the unit does not divide the grid, a ratio would hide nothing or everything, or a regular grid
            cannot have it.
    """
    units_hw = unit_grid(mask, grid_HW)
    area = mask.unit[0] * mask.unit[1]
    return tuple(_visible_units(mask, ratio, units_hw) * area for ratio in mask.ratio)


def unit_grid(mask: Mask, grid_HW: tuple[int, int]) -> tuple[int, int]:
    """Units down and across.

    Raises:
        ConfigError: the unit does not divide the grid.
    """
    (H, W), (down, across) = grid_HW, mask.unit
    if H % down or W % across:
        raise ConfigError(
            f"a unit of {down} × {across} cells does not divide the grid of {H} × {W}",
            key="mask.unit",
            found=list(mask.unit),
            allowed=f"[one of {_divisors(H)}, one of {_divisors(W)}]",
        )
    return H // down, W // across


def draw(
    mask: Mask,
    grid_HW: tuple[int, int],
    num_visible: int,
    *,
    seed: int,
    pass_: Any,
    rows: Any,
    view: Any,
    xp: ModuleType = np,
) -> Any:
    """Visibility of each row's cells, (B, H, W) bool, in numpy or torch (`xp`): equal bits in both.

    Args:
        mask: what to draw.
        grid_HW: cells down and across.
        num_visible: in each image, one of `visible_counts`.
        seed: the run's seed.
        pass_: the pass over the data, a scalar or (B,) int64.
        rows: (B,) int64 row numbers in the dataset.
        view: which view of the image, a scalar or (B,) int64.
        xp: `numpy` or `torch`.
    """
    drawing, units_hw = Drawing(seed, pass_, rows, view, xp), unit_grid(mask, grid_HW)
    visible_Bl = _draw_units(mask, units_hw, num_visible // (mask.unit[0] * mask.unit[1]), drawing)
    visible_Bhw = visible_Bl.reshape(-1, *units_hw)
    if mask.unit == (1, 1):
        return visible_Bhw
    repeat = np.repeat if xp is np else xp.repeat_interleave
    return repeat(repeat(visible_Bhw, mask.unit[0], 1), mask.unit[1], 2)


def choice_at(mask: Mask, seed: int, step: int) -> int:
    """Which of the mask's ratios a step has: drawn by step, since a batch has but one."""
    return draws.word(seed, draws.Stream.RATIO, step) % len(mask.ratio) if len(mask.ratio) > 1 else 0


def num_target(objective: ObjectiveConfig, grid_HW: tuple[int, int], num_visible: int) -> int:
    """Cells of each image that the loss counts: at least one."""
    num_cells = grid_HW[0] * grid_HW[1]
    if objective.cells == "all":
        return num_cells
    return max(1, int((num_cells - num_visible) * _as_written(objective.predict_fraction)))


def draw_target(visible_BHW: Any, num: int, *, seed: int, pass_: Any, rows: Any, view: Any, xp: ModuleType = np) -> Any:
    """(B, H, W) bool: `num` hidden cells of each image, at random. Arguments as those of `draw`."""
    drawing = Drawing(seed, pass_, rows, view, xp, draws.Stream.TARGET)
    visible_BL = visible_BHW.reshape(len(visible_BHW), -1)
    keys_BL = drawing.words(visible_BL.shape[1]) + visible_BL * 2**32  # visible ones last
    return _smallest(keys_BL, num, xp).reshape(visible_BHW.shape)


# --------------------------------------------------------------------------------------------------------------- kinds


def _draw_units(mask: Mask, units_hw: tuple[int, int], num_visible: int, drawing: Drawing) -> Any:
    """(B, l) bool, exactly `num_visible` of each image."""
    match mask:
        case RandomMask() | PixelMask():
            return _smallest(drawing.words(units_hw[0] * units_hw[1]), num_visible, drawing.xp)
        case BlockMask():
            return ~_smallest(_block_keys(mask, units_hw, drawing), units_hw[0] * units_hw[1] - num_visible, drawing.xp)
        case InverseBlockMask():
            return _smallest(_inverse_block_keys(mask, units_hw, num_visible, drawing), num_visible, drawing.xp)
        case GridMask():
            return _grid_units(units_hw, num_visible, drawing)


def _block_keys(mask: BlockMask, units_hw: tuple[int, int], drawing: Drawing) -> Any:
    """(B, l): units of the first rectangle first, line by line, and those of none last, at random."""
    low, high = ([min(side, limit) for limit in units_hw] for side in mask.sides)
    num_units, area = units_hw[0] * units_hw[1], (low[0] + high[0]) * (low[1] + high[1]) / 4
    num = _SPARE_RECTANGLES + int(4 * num_units / area)  # hides 98 of 100 units on average
    words = drawing.words(4 * num + num_units)
    sides = [low[i] + words[:, i * num : (i + 1) * num] % (high[i] - low[i] + 1) for i in (0, 1)]
    starts = [words[:, i * num : (i + 1) * num] for i in (2, 3)]
    keys_Bl = num * num_units + words[:, 4 * num :]
    for k in reversed(range(num)):  # an earlier rectangle lies on top of a later one
        of_k_Bl = _rectangle_keys(
            [s[:, k] for s in sides], [s[:, k] for s in starts], units_hw, drawing, roll=mask.roll
        )
        keys_Bl = drawing.xp.where(of_k_Bl < num_units, of_k_Bl + k * num_units, keys_Bl)
    return keys_Bl


def _inverse_block_keys(mask: InverseBlockMask, units_hw: tuple[int, int], num_visible: int, drawing: Drawing) -> Any:
    """(B, l): units of the rectangle first, line by line."""
    shapes = _rectangles_of(num_visible, units_hw, mask.aspect)
    words = drawing.words(3)
    table = drawing.xp.asarray(shapes) if drawing.xp is np else drawing.xp.tensor(shapes, device=words.device)
    sides_B2 = table[words[:, 0] % len(shapes)]
    sides, starts = [sides_B2[:, 0], sides_B2[:, 1]], [words[:, 1], words[:, 2]]
    return _rectangle_keys(sides, starts, units_hw, drawing, roll=mask.roll)


def _rectangle_keys(
    sides: list[Any], starts: list[Any], units_hw: tuple[int, int], drawing: Drawing, *, roll: bool
) -> Any:
    """(B, l): place of a unit in an image's rectangle, line by line, below l; l for a unit outside it.

    Args:
        sides: (B,) each, units down and across.
        starts: (B,) each, words that say where the rectangle begins.
        units_hw: of the image.
        drawing: where draws come from.
        roll: whether the rectangle goes on at the other side of the image.
    """
    places, inside = [], []
    for side_B, start_B, length in zip(sides, starts, units_hw, strict=True):
        first_B = start_B % length if roll else start_B % (length - side_B + 1)
        at_Bx = drawing.arange(length) - first_B[:, None]
        at_Bx = at_Bx % length if roll else at_Bx
        places.append(at_Bx)
        inside.append((at_Bx >= 0) & (at_Bx < side_B[:, None]))
    keys_Bhw = places[0][:, :, None] * units_hw[1] + places[1][:, None, :]
    is_in_Bhw = inside[0][:, :, None] & inside[1][:, None, :]
    num_units = units_hw[0] * units_hw[1]
    return drawing.xp.where(is_in_Bhw, keys_Bhw, num_units).reshape(-1, num_units)


def _grid_units(units_hw: tuple[int, int], num_visible: int, drawing: Drawing) -> Any:
    periods, shown = _periods(units_hw)[num_visible]
    words = drawing.words(2)
    down_Bh = (drawing.arange(units_hw[0]) + words[:, :1]) % periods[0] == 0
    across_Bw = (drawing.arange(units_hw[1]) + words[:, 1:]) % periods[1] == 0
    on_Bl = (down_Bh[:, :, None] & across_Bw[:, None, :]).reshape(len(words), -1)
    return on_Bl if shown else ~on_Bl


# -------------------------------------------------------------------------------------------------------------- counts


def _visible_units(mask: Mask, ratio: float, units_hw: tuple[int, int]) -> int:
    num_units = units_hw[0] * units_hw[1]
    if num_units == 1:
        raise ConfigError(
            "an image of one cell has nothing left once it is hidden",
            key="mask.ratio",
            found=f"{ratio}, on a grid of 1 × 1" + ("" if mask.unit == (1, 1) else " units"),
            allowed="grids of two cells and more",
            fix="take larger images (data.image_size), or smaller cells (model.patch, mask.unit)",
        )
    exact = num_units * (1 - _as_written(ratio))
    if isinstance(mask, GridMask):
        return _visible_units_of_a_grid(ratio, exact, units_hw)
    if exact < 1:
        raise ConfigError(
            f"hides all of {num_units} cells" + ("" if mask.unit == (1, 1) else " (in units)"),
            key="mask.ratio",
            found=ratio,
            allowed=f"above 0, and at most {_rounded_down(1 - Fraction(1, num_units))} on a grid of "
            f"{units_hw[0]} × {units_hw[1]} cells",
        )
    return int(exact)


def _visible_units_of_a_grid(ratio: float, exact: Fraction, units_hw: tuple[int, int]) -> int:
    num_units, counts = units_hw[0] * units_hw[1], _periods(units_hw)
    nearest = min(counts, key=lambda count: abs(count - exact), default=None)
    if nearest is None or abs(nearest - exact) >= 1:
        ratios = sorted((1 - count / num_units for count in counts), key=lambda r: abs(r - ratio))[:_SHOWN]
        raise ConfigError(
            f"no regular grid hides this share of {units_hw[0]} × {units_hw[1]} units",
            key="mask.ratio",
            found=ratio,
            allowed=", ".join(f"{r:.4g}" for r in sorted(ratios)) or "none on this grid",
        )
    return nearest


def _as_written(ratio: float) -> Fraction:
    """The decimal that was meant: 0.1 × 3 is 0.3, though not to the last bit."""
    return Fraction(repr(round(ratio, _RATIO_DECIMALS)))


def _rounded_down(ratio: Fraction) -> float:
    return math.floor(ratio * 10**4) / 10**4


def _periods(units_hw: tuple[int, int]) -> dict[int, tuple[tuple[int, int], bool]]:
    """By the number of visible units: the pattern's periods down and across, and whether a unit a period is shown."""
    num_units, out = units_hw[0] * units_hw[1], dict[int, tuple[tuple[int, int], bool]]()
    pairs = [(down, across) for down in _divisors(units_hw[0]) for across in _divisors(units_hw[1])]
    for down, across in sorted(pairs, key=lambda pair: abs(pair[0] - pair[1])):  # the most even one of a count
        count = num_units // (down * across)
        if count < num_units:
            out.setdefault(count, ((down, across), True))
            out.setdefault(num_units - count, ((down, across), False))
    return out


def _rectangles_of(num_units: int, units_hw: tuple[int, int], aspect: tuple[float, float]) -> list[tuple[int, int]]:
    """Sides of the rectangles that hold so many units with less than a line to spare, by their width."""
    fitting = [
        (height, width) for width in range(1, units_hw[1] + 1) if (height := -(-num_units // width)) <= units_hw[0]
    ]
    inside = [(height, width) for height, width in fitting if aspect[0] <= width / height <= aspect[1]]
    return inside or [min(fitting, key=lambda sides: abs(sides[0] - sides[1]))]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _smallest(keys_Bl: Any, count: int, xp: ModuleType) -> Any:
    """(B, l) bool: the `count` smallest keys of each row, equal ones by their place."""
    if xp is np:
        last_B1 = np.partition(keys_Bl, count - 1, axis=1)[:, count - 1 : count]
    else:
        last_B1 = keys_Bl.sort(dim=1).values[:, count - 1 : count]
    below_Bl, same_Bl = keys_Bl < last_B1, keys_Bl == last_B1
    wanted_B1 = count - below_Bl.sum(axis=1, keepdims=True)
    return below_Bl | (same_Bl & (same_Bl.cumsum(axis=1) <= wanted_B1))
