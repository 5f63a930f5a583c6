"""A detector's training and its judgement, as a course: what Ray Train or this process trains, leaves and takes up.

Which images a step has, and which of them are flipped, follows from (seed, step) alone: the same on any number of
workers. Losses are means over a worker's images, weighted by how many these are, so another number of workers sees the
same images and does not reach the same bits. torchvision samples boxes from torch's generator: it is seeded for each
step and worker, and left as it was.

Shape letters: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from maskray import draws
from maskray.config.evaluation import DetectionEvaluation
from maskray.config.load import fingerprint, identity
from maskray.data import decode
from maskray.data.plan import permute
from maskray.errors import DataError, NonFiniteError, StorageError
from maskray.evaluation.detection import fitting
from maskray.evaluation.detection.average_precision import Detections, Of, average_precision
from maskray.evaluation.detection.coco import CocoSet, Ints, Scene, SetAside
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
_BETAS = (0.9, 0.999)


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
                "annotations": [self.train.digest, self.val.digest],
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
        self.asked = asked
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
        self._reader = _Reader(asked.train, config, asked.channels, asked.threads)
        self._set_aside: dict[str, str] = {}

    # ------------------------------------------------------------------------------------------------------- training

    def step(self, number: int) -> None:
        """As `Course.step`.

        Raises:
            NonFiniteError: the gradients of this step are not finite; no update was applied.
            StorageError: images cannot be read.
        """
        config = self.asked.config
        images = self._reader.take(number, self._share(number))
        if number + 1 < self.total_steps:
            self._reader.ahead(number + 1, self._share(number + 1))
        taught = [each for each in images if not isinstance(each, SetAside)]
        self._set_aside |= {each.what: each.reason for each in images if isinstance(each, SetAside)}
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
            raise NonFiniteError(f"detection, step {number}: the norm of the gradients is {float(norm)}")
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
            "set_aside": dict(self._set_aside),
        }

    def load(self, state: State) -> None:
        """As `Course.load`."""
        self.detector.load_state_dict(state["detector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._set_aside = dict(state["set_aside"])

    # --------------------------------------------------------------------------------------------------------- result

    def result(self) -> State:
        """Average precision, what was found on the first images, and what was set aside, of all workers.

        Raises:
            DataError: no validation image with an object can be decoded.
        """
        self._reader.close()
        found, set_aside = dict[int, Detections](), dict(self._set_aside)
        for of_worker in _gathered((self._found(), self._set_aside)):
            found |= of_worker[0]
            set_aside |= of_worker[1]
        scenes = self.asked.val.scenes
        judged = sorted(found)
        if not any((~scenes[row].crowd_N).any() for row in judged):
            raise DataError(
                "no validation image with an object can be decoded",
                key="evaluations.val",
                found="; ".join(f"{what}: {why}" for what, why in list(set_aside.items())[:3]),
                fix="check the images",
            )
        names = [each.name for each in self.asked.val.categories]
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
            "drawn": [_plain(row, found[row]) for row in judged[: self.asked.config.figure_images]],
            "set_aside": [list(each) for each in sorted(set_aside.items())],
        }

    @torch.inference_mode()
    def _found(self) -> dict[int, Detections]:
        """By row: what this worker's images have on them, each image once."""
        config, found = self.asked.config, dict[int, Detections]()
        rows = [_Asked(row, flip=False) for row in range(len(self.asked.val.scenes))][self.rank :: self.world_size]
        size = max(1, config.batch // self.world_size)
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        self.detector.eval()
        reader = _Reader(self.asked.val, config, self.asked.channels, self.asked.threads)
        for number, batch in enumerate(batches):
            images = reader.take(number, batch)
            if number + 1 < len(batches):
                reader.ahead(number + 1, batches[number + 1])
            self._set_aside |= {each.what: each.reason for each in images if isinstance(each, SetAside)}
            good = {
                asked.row: each[0] for asked, each in zip(batch, images, strict=True) if not isinstance(each, SetAside)
            }
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
    """Images and targets by threads, those of the next step while this one is computed."""

    def __init__(self, data: CocoSet, config: DetectionEvaluation, channels: int, threads: int) -> None:
        self._data, self._config, self._channels = data, config, channels
        # Torch has as many threads for the resize of one image, which would fight over the cores.
        self._pool = ThreadPoolExecutor(threads, "maskray-detection", torch.set_num_threads, (1,))
        self._coming: dict[int, list[Future[tuple[Fitted, Target] | SetAside]]] = {}

    def ahead(self, number: int, asked: Sequence[_Asked]) -> None:
        """Begin with a step's images."""
        self._coming = {number: [self._pool.submit(self._read, each) for each in asked]}

    def take(self, number: int, asked: Sequence[_Asked]) -> list[tuple[Fitted, Target] | SetAside]:
        """A step's images, in order."""
        if number not in self._coming:
            self.ahead(number, asked)
        return [each.result() for each in self._coming.pop(number)]

    def close(self) -> None:
        """No more of them."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self, asked: _Asked) -> tuple[Fitted, Target] | SetAside:
        scene = self._data.scenes[asked.row]
        try:
            bytes_CHW = decode.decode(self._data.images.read_bytes(scene.file_name), self._channels)
        except decode.UndecodableError as error:
            return SetAside(f"image {scene.file_name}", str(error))
        except FileNotFoundError as error:
            raise StorageError("an image has gone", found=self._data.images.join(scene.file_name)) from error
        if tuple(bytes_CHW.shape[1:]) != scene.size_HW:
            return SetAside(f"image {scene.file_name}", _other_size(bytes_CHW, scene))
        fitted = fitting.fit(bytes_CHW, self._config.image_size)
        target = fitting.target_of(scene, fitted, masks=self._config.masks)
        return fitting.flipped(fitted, target) if asked.flip else (fitted, target)


def _other_size(bytes_CHW: Tensor, scene: Scene) -> str:
    height, width = bytes_CHW.shape[1:]
    told = f"{scene.size_HW[1]} × {scene.size_HW[0]}"
    return f"it has {width} × {height} pixels, its annotations are for {told}"


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
