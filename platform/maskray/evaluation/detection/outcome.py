"""Detection from end to end: data that are looked at before anything starts, trainings, scores and figures."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from maskray.config.evaluation import DetectionEvaluation
from maskray.data.decode import UndecodableError
from maskray.data.mapper import Progress, silent
from maskray.errors import DataError
from maskray.evaluation.detection import fitting
from maskray.evaluation.detection.average_precision import AveragePrecision
from maskray.evaluation.detection.coco import GIVE_THEIR_IMAGES, CocoSet, SetAside, check_alike, check_apart, read
from maskray.evaluation.detection.course import Detection, SetAsideRows
from maskray.evaluation.finetune import Train
from maskray.figures import pictures

SURE = 0.5
"""Figures show what was found from this score on."""

_LOOKED_AT = 8
"""Images of a set at most, before anything starts."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionScore:
    """Average precision of one detector, of its boxes or of its masks."""

    features: str
    """On whose encoder it stands: `model`, `untrained`."""
    precision: AveragePrecision
    num_images: int
    """It was judged on."""
    num_objects: int
    """On them."""
    num_steps: int
    """It was trained."""

    def metrics(self) -> dict[str, float]:
        """By names below `evaluation/NAME/`."""
        ends = "" if self.features == "model" else f"/{self.features}"
        each = self.precision
        values = {
            "ap": each.ap,
            "ap50": each.ap50,
            "ap75": each.ap75,
            "ap_small": each.ap_small,
            "ap_medium": each.ap_medium,
            "ap_large": each.ap_large,
        }
        return {f"detection/{each.of}/{name}{ends}": value for name, value in values.items() if value is not None}


class Detected(NamedTuple):
    """What came out."""

    scores: list[DetectionScore]
    figures: dict[str, bytes]
    """PNG by the name of what it shows."""
    set_aside: list[SetAside]
    """Annotations and images that count for nothing."""


def open_sets(config: DetectionEvaluation) -> tuple[CocoSet, CocoSet]:
    """Training and validation images with their objects.

    Raises:
        DataError: no data in COCO's format, images that are not there or in both sets, no objects, or categories
            that differ.
        StorageError: the storage cannot be read.
    """
    sets = [
        read(
            part.annotations,
            part.images,
            key=f"evaluations.{name}",
            masks=config.masks,
            max_images=part.max_images,
        )
        for name, part in (("train", config.train), ("val", config.val))
    ]
    check_alike(*sets, key="evaluations.val")
    check_apart(*sets)
    learned = {int(each) for scene in sets[0].scenes for each in scene.classes_N[~scene.crowd_N]}
    judged = {int(each) for scene in sets[1].scenes for each in scene.classes_N[~scene.crowd_N]}
    if unknown := sorted(judged - learned):
        names = ", ".join(sets[0].categories[each].name for each in unknown[:6])
        log.warning("detection: %d classes have objects to find and none to learn from: %s", len(unknown), names)
    return sets[0], sets[1]


def check_images(data: CocoSet, channels: int) -> None:
    """Whether one of a few images, spread over the set, is of the size and bands that are expected.

    Raises:
        DataError: none is.
        StorageError: one has gone, or cannot be read.
    """
    wrong = []
    for row in np.unique(np.linspace(0, len(data.scenes) - 1, _LOOKED_AT).round().astype(int)):
        try:
            data.image(int(row), channels)
        except UndecodableError as error:
            wrong.append(f"{data.scenes[row].file_name}: {error}")
        else:
            return
    raise DataError(
        f"none of {len(wrong)} images, spread over the set, can be used",
        key=data.key,
        found="; ".join(wrong[:3]),
        fix=GIVE_THEIR_IMAGES,
    )


def detected(what: Detection, train: Train, progress: Progress = silent) -> Detected:
    """Scores and figures of the detectors.

    Args:
        what: is trained.
        train: to its end, here or by the workers of a cluster.
        progress: is told of steps.

    Raises:
        MaskrayError, TrainingError: as the training does.
    """
    names = list(what.encoders)

    def tell(number: int, step: int, total: int) -> None:
        progress(step, total, f"detection, {names[number]}")

    results = train(what, names, what.fingerprint(), what.config.checkpoint_steps, tell)
    scores, pictures = list[DetectionScore](), dict[str, bytes]()
    unusable: SetAsideRows = {what.train.key: {}, what.val.key: {}}
    for name, result in zip(names, results, strict=True):
        precisions = [AveragePrecision(**each) for each in result["precisions"]]
        counts = result["num_images"], result["num_objects"], result["num_steps"]
        scores += [DetectionScore(name, each, *counts) for each in precisions]
        for key, reasons in result["set_aside"].items():  # the detectors see the same images: each counts once
            unusable[key] |= reasons
        title = f"detection, {name}: AP {precisions[0].ap:.3f} of boxes; dashed: what is there"
        drawn = result["drawn"][: what.config.figure_images]
        pictures[f"detection_{name}"] = _figure(what, drawn, title)
    return Detected(scores, pictures, [*_set_aside(what.train, unusable), *_set_aside(what.val, unusable)])


def _set_aside(data: CocoSet, unusable: SetAsideRows) -> list[SetAside]:
    rows = sorted(unusable[data.key].items())
    return [*data.set_aside, *(SetAside(data.key, f"image {data.scenes[row].file_name}", why) for row, why in rows)]


def _figure(what: Detection, drawn: list[dict[str, Any]], title: str) -> bytes:
    boxed = [_boxed(what.val, what.channels, each) for each in drawn]
    return pictures.detections(boxed, [each.name for each in what.val.categories], title=title)


def _boxed(val: CocoSet, channels: int, drawn: dict[str, Any]) -> pictures.Boxed:
    scene = val.scenes[drawn["row"]]
    fitted = fitting.fit(val.image(drawn["row"], channels), pictures.DETECTION_TILE)
    down, across = fitted.scales
    sides = np.array([across, down, across, down])
    image_HWC = fitted.bytes_Chw.numpy().transpose(1, 2, 0)
    there = ~scene.crowd_N
    found = zip(drawn["boxes"], drawn["classes"], drawn["scores"], strict=True)
    return pictures.Boxed(
        image_HWC=image_HWC[..., :3] if channels >= 3 else image_HWC[..., :1].repeat(3, axis=2),
        caption=scene.file_name,
        true=list(zip((scene.boxes_N4[there] * sides).tolist(), scene.classes_N[there].tolist(), strict=True)),
        found=[((np.array(box) * sides).tolist(), class_, score) for box, class_, score in found if score >= SURE],
    )
