"""A detector's training and its judgement, as a course: what Ray Train or this process trains, leaves and takes up.

Which images a step has, and which of them are flipped, follows from (seed, step) alone: the same on any number of
workers. Losses are means over a worker's images, weighted by how many these are, so another number of workers sees the
same images and does not reach the same bits. torchvision samples boxes from torch's generator: it is seeded for each
step and worker, and left as it was.

Shape letters: B images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from maskray import draws
from maskray.config.evaluation import DetectionEvaluation
from maskray.config.load import fingerprint, identity
from maskray.data.decode import UndecodableError
from maskray.data.plan import permute
from maskray.errors import DataError, NonFiniteError
from maskray.evaluation.detection import fitting
from maskray.evaluation.detection.average_precision import Detections, Of, average_precision
from maskray.evaluation.detection.coco import GIVE_THEIR_IMAGES, CocoSet, Ints
from maskray.evaluation.detection.detector import build_detector
from maskray.evaluation.detection.fitting import Fitted, Target
from maskray.models.encoder import Encoder, digest
from maskray.models.sparse_layers import group_norms, settle_statistics
from maskray.training.context import WorkerContext
from maskray.training.courses import State, summed_gradients
from maskray.training.optim import Schedule, build_layered_optimizer, named_layers
from maskray.training.randomness import drawn_by

MODEL = "model"
"""What is judged; others are trained from scratch."""
MOST_DRAWN = 12
"""Images of which it is kept what was found on them, however many are drawn: what is kept is not found again."""
SetAsideRows = dict[str, dict[int, str]]
"""By key of the data: rows of images that cannot be used, and why."""
_BETAS = (0.9, 0.999)
_SHOWN = 3


@dataclass(frozen=True)
class Detection:
    """What is trained: makes a course for each of its encoders, by name. Picklable."""

    config: DetectionEvaluation
    train: CocoSet
    val: CocoSet
    encoders: dict[str, Encoder]
    seed: int
    threads: int = 1
    """That decode, of each worker."""

    @property
    def channels(self) -> int:
        """Of the images."""
        return next(iter(self.encoders.values())).channels

    def fingerprint(self) -> str:
        """Of all that decides what comes out."""
        return fingerprint(
            {
                "evaluation": identity(self.config),
                "encoders": {name: digest(encoder) for name, encoder in self.encoders.items()},
                "data": [self.train.digest, self.val.digest],
                "seed": self.seed,
            }
        )

    def __call__(self, name: str, context: WorkerContext) -> DetectionCourse:
        """The course of an encoder."""
        return DetectionCourse(self, name, context)


class DetectionCourse:
    """Trains a detector, then judges it on the validation images, each once.

    Args:
        asked: data and recipe.
        name: of the encoder that it stands on; from scratch, all layers learn at one rate.
        context: of this worker.
    """

    def __init__(self, asked: Detection, name: str, context: WorkerContext) -> None:
        config, encoder = asked.config, asked.encoders[name]
        self.asked, self.name = asked, name
        self.rank, self.world_size, self.device = context.rank, context.world_size, context.device
        self.steps_per_pass = len(asked.train.scenes) / config.batch
        self.total_steps = max(1, round(config.epochs * self.steps_per_pass))
        self.detector = build_detector(encoder, len(asked.train.categories), config, asked.seed)
        self.detector.backbone.encoder.place(self.device)
        self.detector.to(self.device)
        detector, decay = self.detector, config.layer_decay if name == MODEL else 1.0
        rest = [detector.backbone.pyramid, detector.rpn, detector.roi_heads]
        layers = named_layers(detector, [*detector.backbone.encoder.layers(), rest])
        self.optimizer = build_layered_optimizer(layers, _BETAS, config.weight_decay, decay)
        self.schedule = Schedule(
            peak_lr=config.base_lr * config.batch / 256,
            min_lr=0.0,
            warmup_steps=round(config.warmup_fraction * self.total_steps),
            total_steps=self.total_steps,
            weight_decay=config.weight_decay,
            weight_decay_end=config.weight_decay,
        )
        self._norms = group_norms(self.detector)
        self._reader = _Reader(asked, asked.train, masks=config.masks)
        self._first_pass = min(self.total_steps, math.ceil(self.steps_per_pass))
        self._has_learned = False
        """From an object, on this worker or, before the latest checkpoint, on any."""
        self._set_aside: SetAsideRows = {asked.train.key: {}, asked.val.key: {}}

    # ------------------------------------------------------------------------------------------------------- training

    def step(self, number: int) -> None:
        """As `Course.step`.

        Raises:
            NonFiniteError: the gradients of this step are not finite; no update was applied.
            DataError: the first pass is over, and no image of it with an object could be used.
            StorageError: images cannot be read.
        """
        config, share = self.asked.config, self._share(number)
        images = self._reader.take(number, share)
        if number + 1 < self.total_steps:
            self._reader.ahead(number + 1, self._share(number + 1))
        taught = [learned for _, learned in self._usable(self.asked.train, share, images)]
        self._has_learned |= any(len(target.labels_N) for _, target in taught)
        if number + 1 == self._first_pass:
            self._check_learned()
        self.optimizer.zero_grad()
        if taught:
            with drawn_by(draws.word(self.asked.seed, draws.Stream.COURSE, number, 1 + self.rank), self.device):
                self._backward(taught)
        parameters = [p for p in self.detector.parameters() if p.requires_grad]
        for parameter in parameters:  # all workers add up the same ones
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        summed_gradients(self.detector)
        settle_statistics(self._norms)
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        if not bool(norm.isfinite()):
            raise NonFiniteError(
                f"detection, {self.name}: in step {number} the norm of the gradients was {float(norm)}, and no update "
                "was applied. What to do: lower base_lr of this evaluation, or use precision: fp32."
            )
        self.schedule.apply(self.optimizer, number)
        self.optimizer.step()

    def _backward(self, taught: Sequence[tuple[Fitted, Target]]) -> None:
        config = self.asked.config
        self.detector.train()
        for norm in self._norms:
            norm.group_images = len(taught)
        fitted = [each.bytes_Chw.to(self.device) for each, _ in taught]
        targets = [target.to(self.device) for _, target in taught]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = self.detector(fitted, targets)
        loss = torch.stack(list(losses.values())).sum()
        (loss * len(taught) / config.batch).backward()

    def _usable(
        self, data: CocoSet, asked: Sequence[_Asked], images: Sequence[tuple[Fitted, Target] | str]
    ) -> list[tuple[int, tuple[Fitted, Target]]]:
        """With their rows, of which a step may have one twice; why the others are not is kept."""
        found = list[tuple[int, tuple[Fitted, Target]]]()
        for each, image in zip(asked, images, strict=True):
            if isinstance(image, str):
                self._set_aside[data.key][each.row] = image
            else:
                found.append((each.row, image))
        return found

    def _check_learned(self) -> None:
        if any(_gathered(self._has_learned)):
            return
        data = self.asked.train
        raise DataError(
            "no training image with an object can be used",
            key=data.key,
            found=_told(data, self._all_set_aside()[data.key]),
            fix=GIVE_THEIR_IMAGES,
        )

    def _share(self, number: int) -> list[_Asked]:
        """This worker's images of a step."""
        rows, passes = step_rows(len(self.asked.train.scenes), self.asked.config.batch, number, self.asked.seed)
        uniform_B1 = draws.uniform(
            seed=self.asked.seed, stream=draws.Stream.FLIP, pass_=passes, row=rows, view=0, num=1
        )
        flips = uniform_B1[:, 0] < self.asked.config.flip_probability
        asked = [_Asked(int(row), bool(flip)) for row, flip in zip(rows, flips, strict=True)]
        return asked[self.rank :: self.world_size]

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def state(self) -> State:
        """As `Course.state`."""
        return {
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "set_aside": self._all_set_aside(),
            "has_learned": any(_gathered(self._has_learned)),
        }

    def load(self, state: State) -> None:
        """As `Course.load`."""
        self.detector.load_state_dict(state["detector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._set_aside = {key: dict(rows) for key, rows in state["set_aside"].items()}
        self._has_learned = state["has_learned"]

    def _all_set_aside(self) -> SetAsideRows:
        """By all workers."""
        found: SetAsideRows = {key: {} for key in self._set_aside}
        for of_worker in _gathered(self._set_aside):
            for key, reasons in of_worker.items():
                found[key] |= reasons
        return found

    # --------------------------------------------------------------------------------------------------------- result

    def result(self) -> State:
        """Average precision, what was found on the first images, and what was set aside, of all workers.

        Raises:
            DataError: no validation image with an object can be decoded.
        """
        self._reader.close()
        found = dict[int, Detections]()
        for of_worker in _gathered(self._found()):
            found |= of_worker
        set_aside, val = self._all_set_aside(), self.asked.val
        scenes, judged = val.scenes, sorted(found)
        if not any((~scenes[row].crowd_N).any() for row in judged):
            raise DataError(
                "no validation image with an object can be used",
                key=val.key,
                found=_told(val, set_aside[val.key]),
                fix=GIVE_THEIR_IMAGES,
            )
        names = [each.name for each in val.categories]
        kinds: list[Of] = ["box", "mask"] if self.asked.config.masks else ["box"]
        precisions = [
            average_precision([scenes[row] for row in judged], [found[row] for row in judged], names, of)
            for of in kinds
        ]
        return {
            "precisions": [asdict(each) for each in precisions],
            "num_steps": self.total_steps,
            "num_images": len(judged),
            "num_objects": sum(int((~scenes[row].crowd_N).sum()) for row in judged),
            "drawn": [_plain(row, found[row]) for row in judged[:MOST_DRAWN]],
            "set_aside": set_aside,
        }

    @torch.inference_mode()
    def _found(self) -> dict[int, Detections]:
        """By row: what this worker's images have on them, each image once."""
        config, found = self.asked.config, dict[int, Detections]()
        rows = [_Asked(row, flip=False) for row in range(len(self.asked.val.scenes))][self.rank :: self.world_size]
        size = max(1, config.batch // self.world_size)
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        self.detector.eval()
        reader = _Reader(self.asked, self.asked.val, masks=False)
        for number, batch in enumerate(batches):
            images = reader.take(number, batch)
            if number + 1 < len(batches):
                reader.ahead(number + 1, batches[number + 1])
            good = {row: fitted for row, (fitted, _) in self._usable(self.asked.val, batch, images)}
            if good:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    outputs = self.detector([each.bytes_Chw.to(self.device) for each in good.values()])
                restored = [fitting.restored(*each) for each in zip(outputs, good.values(), strict=True)]
                found |= dict(zip(good, restored, strict=True))
        reader.close()
        return found


def step_rows(num_images: int, batch: int, number: int, seed: int) -> tuple[Ints, Ints]:
    """Rows of a step, and the pass of each, (B,): passes follow on each other, each in an order of its own."""
    positions = np.arange(number * batch, (number + 1) * batch)
    passes = positions // num_images
    rows = np.concatenate(
        [
            permute(positions[passes == each] % num_images, num_images, seed, int(each), draws.Stream.PLAN)
            for each in np.unique(passes)
        ]
    )
    return rows, passes


# -------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class _Asked:
    row: int
    flip: bool


class _Reader:
    """Images and targets, or why there are none, by threads, those of the next step while this one is computed."""

    def __init__(self, asked: Detection, data: CocoSet, *, masks: bool) -> None:
        self._data, self._masks, self._side, self._channels = data, masks, asked.config.image_size, asked.channels
        # Torch has as many threads for the resize of one image, which would fight over the cores.
        self._pool = ThreadPoolExecutor(asked.threads, "maskray-detection", torch.set_num_threads, (1,))
        self._coming: dict[int, list[Future[tuple[Fitted, Target] | str]]] = {}

    def ahead(self, number: int, asked: Sequence[_Asked]) -> None:
        """Begin with a step's images."""
        self._coming = {number: [self._pool.submit(self._read, each) for each in asked]}

    def take(self, number: int, asked: Sequence[_Asked]) -> list[tuple[Fitted, Target] | str]:
        """A step's images, in order."""
        if number not in self._coming:
            self.ahead(number, asked)
        return [each.result() for each in self._coming.pop(number)]

    def close(self) -> None:
        """No more of them."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self, asked: _Asked) -> tuple[Fitted, Target] | str:
        try:
            bytes_CHW = self._data.image(asked.row, self._channels)
        except UndecodableError as error:
            return str(error)
        fitted = fitting.fit(bytes_CHW, self._side)
        target = fitting.target_of(self._data.scenes[asked.row], fitted, masks=self._masks)
        return fitting.flipped(fitted, target) if asked.flip else (fitted, target)


def _told(data: CocoSet, set_aside: Mapping[int, str]) -> str:
    """Some of it."""
    if not set_aside:
        return "images without objects alone"
    return "; ".join(f"{data.scenes[row].file_name}: {set_aside[row]}" for row in sorted(set_aside)[:_SHOWN])


def _gathered(value: Any) -> list[Any]:
    """Of all workers, on each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def _plain(row: int, found: Detections) -> dict[str, Any]:
    return {
        "row": row,
        "boxes": found.boxes_N4.tolist(),
        "scores": found.scores_N.tolist(),
        "classes": found.classes_N.tolist(),
    }
