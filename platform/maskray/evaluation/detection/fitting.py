"""Images and objects into the square that a detector sees, and what it finds there back into the image.

The longer side becomes that of the square, bicubic and antialiased as in pretraining; the rest of the square is what
normalisation makes zero.

Outlines are half a pixel off in torchvision: what is taught takes a pixel's centre to be where its left upper corner
is, and what is found is put on whole pixels. So masks are taught at the corners of pixels, and found ones are read
where the pixels are. Left as it is, an outline of 10 pixels that is found without any fault has an IoU of 0.8.

Shape letters: N objects or detections, C channels, H and W pixels of the image as it is stored, h and w of it inside
the square, M places of a mask head's box down and across.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskray.evaluation.detection import outlines
from maskray.evaluation.detection.average_precision import Detections
from maskray.evaluation.detection.coco import Floats, Scene
from maskray.models.encoder import resize

Halves = np.ndarray[Any, np.dtype[np.float16]]

ON_OBJECT = 0.5
"""A pixel is an object's from this probability on."""


class Fitted(NamedTuple):
    """An image at the size that it has inside the square."""

    bytes_Chw: Tensor
    """uint8."""
    stored_HW: tuple[int, int]
    """Its size as it is stored."""

    @property
    def scales(self) -> tuple[float, float]:
        """Pixels inside the square for each stored one, down and across."""
        (height, width), stored = self.bytes_Chw.shape[1:], self.stored_HW
        return height / stored[0], width / stored[1]


class Target(NamedTuple):
    """What is learned from an image: N objects, crowds left out, by torchvision's contract."""

    boxes_N4: Tensor
    """Left, top, right, bottom in pixels inside the square."""
    labels_N: Tensor
    """Class + 1: torchvision's 0 is nothing."""
    masks_Nhw: Tensor | None
    """(N, h + 1, w + 1), fp16: the share of the object in the pixel around each corner of the square's pixels; None
    where masks are not asked for."""

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """As torchvision takes it."""
        plain = {"boxes": self.boxes_N4, "labels": self.labels_N, "masks": self.masks_Nhw}
        return {name: each.to(device) for name, each in plain.items() if each is not None}


def fit(bytes_CHW: Tensor, side: int) -> Fitted:
    """The image as large as it can be inside a square of `side` pixels, its proportions kept."""
    height, width = bytes_CHW.shape[1:]
    scale = side / max(height, width)
    size_hw = max(1, round(height * scale)), max(1, round(width * scale))
    return Fitted(resize(bytes_CHW[None], size_hw)[0], (height, width))


def target_of(scene: Scene, fitted: Fitted, *, masks: bool) -> Target:
    """The scene's objects where they are inside the square."""
    learned_N = ~scene.crowd_N
    boxes_N4 = _scaled(scene.clipped_boxes[learned_N], fitted.scales)
    masks_Nhw = None
    if masks:
        height, width = fitted.bytes_Chw.shape[1:]
        taken = [each for each, learned in zip(scene.outlines, learned_N, strict=True) if learned]
        masks_Nhw = torch.zeros(len(taken), height + 1, width + 1, dtype=torch.float16)
        for mask_hw, outline in zip(masks_Nhw, taken, strict=True):  # one by one: each is as large as the image
            _draw(outline, mask_hw.numpy())
    return Target(torch.from_numpy(boxes_N4).float(), torch.from_numpy(scene.classes_N[learned_N] + 1), masks_Nhw)


def flipped(fitted: Fitted, target: Target) -> tuple[Fitted, Target]:
    """Both, left and right exchanged."""
    width = fitted.bytes_Chw.shape[2]
    left, top, right, bottom = target.boxes_N4.unbind(1)
    boxes_N4 = torch.stack([width - right, top, width - left, bottom], dim=1)
    masks = None if target.masks_Nhw is None else target.masks_Nhw.flip(2)
    return fitted._replace(bytes_Chw=fitted.bytes_Chw.flip(2)), Target(boxes_N4, target.labels_N, masks)


def restored(found: dict[str, Tensor], fitted: Fitted) -> Detections:
    """What torchvision's detector found inside the square, in the image as it is stored."""
    down, across = fitted.scales
    boxes_N4: Floats = found["boxes"].double().cpu().numpy() / np.array([across, down, across, down])
    rles = list[outlines.Rle]()
    if "masks" in found:
        masks_NMM = found["masks"][:, 0].float().cpu().numpy()
        rles = [_outline(*each, fitted.stored_HW) for each in zip(masks_NMM, boxes_N4, strict=True)]
    return Detections(
        boxes_N4=boxes_N4,
        scores_N=found["scores"].double().cpu().numpy(),
        classes_N=found["labels"].cpu().numpy() - 1,
        outlines=tuple(rles),
    )


def _scaled(boxes_N4: Floats, scales: tuple[float, float]) -> Floats:
    down, across = scales
    scaled_N4: Floats = boxes_N4 * np.array([across, down, across, down])
    return scaled_N4


def _draw(outline: outlines.Rle, shares_hw: Halves) -> None:
    """An object's shares of the pixels around corners; of its surroundings alone, the others are zero."""
    mask_HW = outlines.decode(outline)
    left, top, width, height = outlines.box(outline)
    rows = _edges(shares_hw.shape[0], mask_HW.shape[0])
    columns = _edges(shares_hw.shape[1], mask_HW.shape[1])
    down, across = _touched(rows, top, top + height), _touched(columns, left, left + width)
    inside_HW = mask_HW[top : top + height, left : left + width]
    of_rows_hW = _shares(inside_HW, rows[down.start : down.stop + 1] - top)
    of_both_wh = _shares(of_rows_hW.T, columns[across.start : across.stop + 1] - left)
    # At the image's border half of the pixel around a corner is outside, and does not count.
    sizes_hw = np.outer(np.diff(rows)[down], np.diff(columns)[across])
    shares_hw[down, across] = of_both_wh.T / sizes_hw


def _edges(corners: int, stored: int) -> Floats:
    """In stored pixels, where the pixels around so many corners begin and end."""
    edges: Floats = np.clip(np.arange(corners + 1) - 0.5, 0, corners - 1) * (stored / (corners - 1))
    return edges


def _touched(edges: Floats, begin: int, end: int) -> slice:
    """Which of the pixels between such edges have a part between two places."""
    first, last = np.searchsorted(edges, begin, "right") - 1, np.searchsorted(edges, end, "left")
    return slice(max(0, int(first)), int(last))


def _shares(values_HW: np.ndarray[Any, Any], edges: Floats) -> Floats:
    """(len(edges) - 1, W): sums down between edges, that may lie inside a value or outside of all."""
    sums_HW = np.zeros((len(values_HW) + 1, values_HW.shape[1]), np.float32)
    np.cumsum(values_HW, axis=0, dtype=np.float32, out=sums_HW[1:])
    edges = np.clip(edges, 0, len(values_HW))
    whole = np.minimum(edges.astype(np.int64), len(values_HW) - 1)
    part = (edges - whole)[:, None]
    sums_hW: Floats = np.diff(sums_HW[whole] * (1 - part) + sums_HW[whole + 1] * part, axis=0)
    return sums_hW


def _outline(mask_MM: np.ndarray[Any, np.dtype[np.float32]], box_4: Floats, size_HW: tuple[int, int]) -> outlines.Rle:
    """Of the stored pixels whose centres have a probability of `ON_OBJECT`, between places by their distance."""
    left, top, right, bottom = box_4
    rows, of_rows = _between(top, bottom, len(mask_MM), size_HW[0])
    columns, of_columns = _between(left, right, len(mask_MM), size_HW[1])
    on_HW = np.zeros(size_HW, np.uint8, order="F")
    on_HW[rows, columns] = of_rows @ mask_MM @ of_columns.T >= ON_OBJECT
    return outlines.encode(on_HW)


def _between(begin: float, end: float, places: int, pixels: int) -> tuple[slice, np.ndarray[Any, np.dtype[np.float32]]]:
    """Which pixels of an axis a box of so many places reaches, and the weight of each place for each of them."""
    reach = (end - begin) / places / 2  # so far out the outermost places fade
    first, last = max(0, math.floor(begin - reach)), min(pixels, math.ceil(end + reach))
    at = (np.arange(first, last) + 0.5 - begin) / (end - begin) * places - 0.5
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(places)))
    return slice(first, last), weights.astype(np.float32)
