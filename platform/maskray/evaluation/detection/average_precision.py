"""COCO's average precision (Lin et al. 2014; cocodataset.org, "Detection evaluation"), by faster-coco-eval.

A detection is right where its class is, and where it overlaps an object that no surer one has taken by at least the
threshold (intersection over union). Precision is read at 101 recalls, at most 100 detections an image count, and AP is
the mean over the thresholds .50, .55, … .95 and over the classes that have an object.

Shape letters: N detections or objects of an image, H and W its pixels down and across, T thresholds, R recalls, K
classes, A ranges of areas, M limits of detections an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from maskray.evaluation.detection.coco import Floats, Ints, Scene
from maskray.evaluation.detection.outlines import Rle

Of = Literal["box", "mask"]
_IOU_OF: dict[Of, str] = {"box": "bbox", "mask": "segm"}


class Detections(NamedTuple):
    """What was found on an image."""

    boxes_N4: Floats
    """Left, top, right, bottom in pixels of the image as it is stored."""
    scores_N: Floats
    classes_N: Ints
    outlines: tuple[Rle, ...] = ()
    """Of each; empty where masks are not asked for."""


@dataclass(frozen=True)
class AveragePrecision:
    """Of boxes or of masks, 0 to 1."""

    of: Of
    ap: float
    """Mean over the thresholds .50 to .95."""
    ap50: float
    ap75: float
    ap_small: float | None
    """Of objects of less than 32 × 32 pixels; None: there are none."""
    ap_medium: float | None
    ap_large: float | None
    """Of more than 96 × 96."""
    by_class: dict[str, float | None]
    """`ap` of each; None: it has no object, and no part in the mean."""

    @property
    def main(self) -> tuple[float, float, float]:
        """AP, AP50 and AP75."""
        return self.ap, self.ap50, self.ap75


def average_precision(
    scenes: Sequence[Scene], found: Sequence[Detections], class_names: Sequence[str], of: Of
) -> AveragePrecision:
    """Average precision of what was found on scenes.

    Args:
        scenes: with one object at least that is no crowd.
        found: of each scene.
        class_names: in the order of their numbers.
        of: what is compared.
    """
    images = [{"id": i, "height": each.size_HW[0], "width": each.size_HW[1]} for i, each in enumerate(scenes, start=1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names)]
    objects = [each for i, scene in enumerate(scenes, start=1) for each in _objects(i, scene, of)]
    for number, each in enumerate(objects, start=1):  # the library takes number 0 for no object
        each["id"] = number
    truth = COCO({"images": images, "annotations": objects, "categories": categories})
    detections = [each for i, some in enumerate(found, start=1) for each in _detections(i, some, of)]
    judge = COCOeval_faster(truth, truth.loadRes(detections), _IOU_OF[of])
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    stats = judge.stats_as_dict
    precision_TRKAM = np.asarray(judge.eval["precision"])
    return AveragePrecision(
        of=of,
        ap=stats["AP_all"],
        ap50=stats["AP_50"],
        ap75=stats["AP_75"],
        ap_small=_or_none(stats["AP_small"]),
        ap_medium=_or_none(stats["AP_medium"]),
        ap_large=_or_none(stats["AP_large"]),
        by_class={
            name: _or_none(float(precision_TRKAM[:, :, place, 0, -1].mean())) for place, name in enumerate(class_names)
        },
    )


def _objects(image: int, scene: Scene, of: Of) -> list[dict[str, Any]]:
    out = [
        {"image_id": image, "category_id": int(class_), "bbox": _xywh(box), "area": float(area), "iscrowd": int(crowd)}
        for box, class_, area, crowd in zip(scene.boxes_N4, scene.classes_N, scene.areas_N, scene.crowd_N, strict=True)
    ]
    if of == "mask":
        for each, outline in zip(out, scene.outlines, strict=True):
            each["segmentation"] = outline
    return out


def _detections(image: int, found: Detections, of: Of) -> list[dict[str, Any]]:
    out = []
    for place, (class_, score) in enumerate(zip(found.classes_N, found.scores_N, strict=True)):
        # One or the other: with a box the library would take the box's area for a mask's.
        what = {"bbox": _xywh(found.boxes_N4[place])} if of == "box" else {"segmentation": found.outlines[place]}
        out.append({"image_id": image, "category_id": int(class_), "score": float(score)} | what)
    return out


def _xywh(box_4: Floats) -> list[float]:
    left, top, right, bottom = (float(each) for each in box_4)
    return [left, top, right - left, bottom - top]


def _or_none(value: float) -> float | None:
    """The library says -1 where there is nothing to take a mean of."""
    return None if value < 0 else float(value)
