"""Images and objects into the square that a detector sees, and what it finds there back into the image.

The longer side becomes that of the square, bicubic and antialiased as in pretraining; the rest of the square is what
normalisation makes zero.

Shape letters: N objects or detections, C channels, H and W pixels of the image as it is stored, h and w of it inside
the square.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskray.evaluation.detection import outlines
from maskray.evaluation.detection.average_precision import Detections
from maskray.evaluation.detection.coco import Floats, Scene
from maskray.models.encoder import resize

ON_OBJECT = 0.5
"""A pixel is an object's from this share or probability on."""
_PASTED = 16
"""Masks at once: each is as large as the image."""


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
    """uint8, 1 on the object; None where masks are not asked for."""

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
        size_hw = fitted.bytes_Chw.shape[1:]
        taken = [each for each, learned in zip(scene.outlines, learned_N, strict=True) if learned]
        whole_NHW = np.stack([outlines.decode(each) for each in taken]) if taken else np.empty((0, *scene.size_HW))
        masks_Nhw = _shrunk(torch.from_numpy(whole_NHW), (size_hw[0], size_hw[1]))
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
    boxes_N4 = found["boxes"].double()
    boxes_N4 = boxes_N4 / boxes_N4.new_tensor([across, down, across, down])
    rles = list[outlines.Rle]()
    if "masks" in found:
        for some, where in zip(found["masks"].split(_PASTED), boxes_N4.float().split(_PASTED), strict=True):
            pasted_N1HW = paste_masks_in_image(some.float(), where, fitted.stored_HW)
            on_NHW = (pasted_N1HW[:, 0] >= ON_OBJECT).to("cpu", torch.uint8).numpy()
            rles += [outlines.encode(each) for each in on_NHW]
    return Detections(
        boxes_N4=boxes_N4.cpu().numpy(),
        scores_N=found["scores"].double().cpu().numpy(),
        classes_N=found["labels"].cpu().numpy() - 1,
        outlines=tuple(rles),
    )


def _scaled(boxes_N4: Floats, scales: tuple[float, float]) -> Floats:
    down, across = scales
    scaled_N4: Floats = boxes_N4 * np.array([across, down, across, down])
    return scaled_N4


def _shrunk(masks_NHW: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if not len(masks_NHW):
        return torch.zeros(0, *size_hw, dtype=torch.uint8)
    shares = F.interpolate(masks_NHW[:, None].float(), size=size_hw, mode="bilinear", antialias=True)
    return (shares[:, 0] >= ON_OBJECT).to(torch.uint8)
