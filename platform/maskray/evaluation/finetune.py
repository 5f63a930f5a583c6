"""Fine-tuning: encoder and linear head trained together on labels (He et al. 2022, Table 9; the authors' FINETUNE.md).

A step is `batch` rows, in units of equal size. A unit goes to one worker; its images are mixed among each other, and
batch normalisation takes its statistics over them. Which rows a unit has, their crops and flips, and how they are mixed
follow from (seed, pass, row) and (seed, step, unit) alone: not from the number of workers. Only which residual blocks
are left out is each worker's own draw.

Shape letters: B images of a batch, C channels, H and W pixels down and across, D width of a feature, K classes, N rows
of a unit, T rows of the training split, M test rows.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn
from torch.nn import functional as F

from maskray import draws
from maskray.config.evaluation import FinetuneEvaluation
from maskray.config.load import fingerprint, identity
from maskray.data import portions
from maskray.data.decode import UndecodableError, decode
from maskray.data.embeddings import Undecodable
from maskray.data.manifest import Ints, SplitName
from maskray.data.mapper import Progress, silent, thread_mapper
from maskray.data.passes import Pictures
from maskray.data.portions import Portion
from maskray.data.shards import Dataset
from maskray.evaluation.classifier import Classifier
from maskray.evaluation.logistic import Labels, drawn_rows
from maskray.evaluation.pictures import BATCH, picture_of
from maskray.evaluation.scores import Score, score
from maskray.evaluation.units import Unit, Units
from maskray.models.encoder import Encoder, digest
from maskray.models.sparse_layers import group_norms, settle_statistics
from maskray.training import checkpoint
from maskray.training.context import WorkerContext
from maskray.training.courses import Build, State, Tell, summed, summed_gradients
from maskray.training.optim import Schedule, build_layered_optimizer
from maskray.training.randomness import drawn_by

log = logging.getLogger(__name__)

TRAIN: SplitName = "train"
TEST: SplitName = "held_out"
FAILED = "failed"
"""Of a result: why there is none."""
_NOT_FINITE = -2  # beside -1, no image, and the numbers of classes
_PACKAGES = ("maskray", "torch", "timm")

Train = Callable[[Build[Any], Sequence[Any], str, int, Tell], list[State]]
"""Trains courses to their end: how one is made, descriptions, fingerprint of all that is trained, checkpoint steps,
and who is told."""


class Asked(NamedTuple):
    """One fine-tuning of a list."""

    features: str
    """Of which encoder: `model`, `untrained`."""
    labels_per_class: int | None
    share: float
    """Of each class; 1 where `labels_per_class` says how many."""
    draw: int

    @property
    def name(self) -> str:
        """As scores are called."""
        if self.labels_per_class is not None:
            return f"fine-tuned, {self.labels_per_class} labels a class"
        return f"fine-tuned, {100 * self.share:g} % of the labels"

    def rows(self, labels_T: Labels, seed: int) -> Ints:
        """Ascending numbers of the rows that are trained with."""
        if self.labels_per_class is None and self.share == 1:
            return np.arange(len(labels_T))
        wanted, share = self.labels_per_class, self.share
        return np.sort(drawn_rows(labels_T, lambda size: wanted or max(1, round(share * size)), seed, self.draw))


def asked_of(evaluation: FinetuneEvaluation, features: list[str]) -> list[Asked]:
    """All fine-tunings of an evaluation; the draws of one follow each other."""
    amounts: list[tuple[int | None, float, int]]
    amounts = [(each, 1.0, evaluation.draws) for each in evaluation.labels_per_class]
    amounts += [(None, share, evaluation.draws if share < 1 else 1) for share in evaluation.label_shares]
    return [Asked(name, few, share, draw) for few, share, num in amounts for name in features for draw in range(num)]


class Finetuned(NamedTuple):
    """What came out."""

    scores: list[Score]
    undecodable: list[Undecodable]
    """Test rows that count for nothing."""
    num_train: int
    """Rows of which labels were drawn."""
    num_test: int


def finetuned(what: Finetuning, train: Train, progress: Progress = silent) -> Finetuned:
    """The scores of an evaluation; a draw that failed is left out of them, and said.

    Args:
        what: is trained.
        train: to its end, here or by the workers of a cluster.
        progress: is told of steps.

    Raises:
        MaskrayError, TrainingError: as the training does.
    """
    asked = asked_of(what.evaluation, list(what.encoders))

    def tell(index: int, step: int, total: int) -> None:
        each = asked[index]
        num = sum(other[:3] == each[:3] for other in asked)
        progress(each.draw * total + step, num * total, f"{each.name}, {each.features}")

    results = train(what, asked, what.fingerprint(), what.evaluation.checkpoint_steps, tell)
    labels_M, num_train = what.dataset.labels(TEST, what.max_rows), len(what.dataset.labels(TRAIN, what.max_rows))
    alike = dict[tuple[str, str], list[State]]()
    for each, result in zip(asked, results, strict=True):
        alike.setdefault((each.name, each.features), []).append(result)
    seen_M, scores = np.ones(len(labels_M), bool), list[Score]()
    for (name, features), found in alike.items():
        good = _without_failures(found)
        if not good:
            log.warning("%s, %s: no draw is left, and so there is no score", name, features)
            continue
        named = [result["named_M"].numpy() for result in good]
        seen_M = named[0] >= 0
        note = f"{good[0]['rows']:,} labels, {good[0]['steps']:,} steps"
        note += "; untrained: from scratch" * ("untrained" in what.encoders)
        if len(good) < len(found):
            note += f"; {len(found) - len(good)} of {len(found)} draws failed and are left out"
        scores.append(score(name, features, [(each == labels_M)[seen_M] for each in named], note))
    undecodable = [_why(what, int(row)) for row in np.flatnonzero(~seen_M)]
    return Finetuned(scores, undecodable, num_train, int(seen_M.sum()))


def _without_failures(results: list[State]) -> list[State]:
    for result in results:
        if FAILED in result:
            log.warning("Left out of the scores: %s", result[FAILED])
    return [result for result in results if FAILED not in result]


def _why(what: Finetuning, row: int) -> Undecodable:
    """What is the matter with a test row's image."""
    images = portions.of_split(what.dataset, TEST, 1)
    portion = images.around(TEST, row)
    found = images.read(portion)
    try:
        decode(found.images[row - portion.first], next(iter(what.encoders.values())).channels)  # type: ignore[arg-type]
    except UndecodableError as error:
        return Undecodable(row, found.keys[row - portion.first], str(error))
    raise AssertionError("decoding is a function of the bytes")


# --------------------------------------------------------------------------------------------------------------- course


@dataclass(frozen=True)
class Finetuning:
    """What all fine-tunings of a list share, and how one is made of its description: a `courses.Build`."""

    evaluation: FinetuneEvaluation
    encoders: dict[str, Encoder]
    """By what they are called."""
    dataset: Dataset
    max_rows: int | None
    """Of each split."""
    seed: int
    threads: int
    """A worker decodes with."""

    def fingerprint(self) -> str:
        """Of all that decides what comes out: what another version found is not taken for this one's."""
        return fingerprint(
            {
                "evaluation": identity(self.evaluation),
                "encoders": {name: digest(encoder) for name, encoder in self.encoders.items()},
                "dataset": self.dataset.manifest.fingerprint,
                "max_rows": self.max_rows,
                "seed": self.seed,
                "packages": checkpoint.versions(_PACKAGES),
            }
        )

    def __call__(self, asked: Asked, context: WorkerContext) -> FinetuneCourse:
        """The course of a worker."""
        return FinetuneCourse(self, asked, context)


class FinetuneCourse:
    """One fine-tuning, as a `courses.Course`."""

    def __init__(self, what: Finetuning, asked: Asked, context: WorkerContext) -> None:
        self._what, self._asked, self._context = what, asked, context
        recipe, encoder = what.evaluation, what.encoders[asked.features]
        self._seed = draws.word(what.seed, draws.Stream.COURSE, 1 + asked.draw)
        labels_T = what.dataset.labels(TRAIN, what.max_rows)
        rows = asked.rows(labels_T, what.seed)
        self._image_size, self._num_classes = encoder.image_size, len(what.dataset.manifest.class_names)
        self.batch, self._num_rows = min(recipe.batch, len(rows)), len(rows)
        pictures = Pictures(what.dataset, TRAIN, rows, encoder.channels, recipe.keep_bytes)
        place: dict[str, Any] = {"batch": self.batch, "seed": self._seed, "context": context}
        self.units = Units(recipe, pictures, labels_T, encoder, **place)
        self.total_steps = max(recipe.least_steps, round(recipe.epochs * len(rows) / self.batch))
        with drawn_by(draws.word(self._seed, draws.Stream.COURSE, 0, 1)):
            network = Classifier(encoder, self._num_classes, recipe.drop_path, self.units.rows)
        self._network = network.to(context.device)
        network.model.place(context.device)
        decay = recipe.layer_decay if asked.features == "model" else 1.0
        self.optimizer = build_layered_optimizer(network.layers(), recipe.betas, recipe.weight_decay, decay)
        assert decay == 1 or len({group["lr_scale"] for group in self.optimizer.param_groups}) == len(network.layers())
        self._bad = torch.zeros((), device=context.device)
        self.optimizer.found_inf = self._bad
        self._schedule = Schedule(
            peak_lr=recipe.base_lr * self.batch / 256,
            min_lr=min(recipe.min_lr, recipe.base_lr * self.batch / 256),
            warmup_steps=round(recipe.warmup_fraction * self.total_steps),
            total_steps=self.total_steps,
            weight_decay=recipe.weight_decay,
            weight_decay_end=recipe.weight_decay,
        )
        self._batches: Generator[list[Unit]] | None = None
        self._failed: str | None = None
        """What happened, and what to do."""

    # ------------------------------------------------------------------------------------------------------------ train

    def step(self, number: int) -> None:
        """As `Course.step`; nothing more once it is known to have failed, which `state` finds out."""
        if self._failed is not None:
            return
        if self._batches is None:
            self._batches = self.units.steps(number, self.total_steps, self._what.threads)
            # Left midway, its threads end with the course, or with the process while there still is an interpreter.
            weakref.finalize(self, self._batches.close)
        units = next(self._batches)
        self._network.train()
        self.optimizer.zero_grad()
        device, at_once = self._context.device, self._what.evaluation.pass_units
        bad = torch.zeros((), device=device)
        with drawn_by(draws.word(self._seed, draws.Stream.COURSE, 1 + number, 1 + self._context.rank), device):
            for first in range(0, len(units), at_once):
                loss = self._loss(number, units[first : first + at_once])
                loss.backward()
                bad += ~torch.isfinite(loss.detach())
        summed_gradients(self._network)
        settle_statistics(group_norms(self._network))
        norm = nn.utils.get_total_norm([p.grad for p in self._network.parameters() if p.grad is not None])
        self._bad.add_(summed(bad)).add_(~norm.isfinite()).clamp_(max=1)
        self._schedule.apply(self.optimizer, number)
        self.optimizer.step()

    def _loss(self, step: int, units: list[Unit]) -> Tensor:
        """Σ weight · loss / batch over the rows of some units."""
        mixed = [self._mixed(step, unit) for unit in units]
        images_BCHW, targets_BK = (torch.cat(each) for each in zip(*mixed, strict=True))
        weights_B = torch.cat([unit.weights_N for unit in units]).to(self._context.device)
        with self._autocast():
            logits_BK = self._network(images_BCHW, weights_B)
        losses_B = F.cross_entropy(logits_BK.float(), targets_BK, reduction="none")
        return (weights_B * losses_B).sum() / self.batch

    def _mixed(self, step: int, unit: Unit) -> tuple[Tensor, Tensor]:
        """Normalised images (N, C, H, W) and targets (N, K) of a unit, mixed by key."""
        recipe, device = self._what.evaluation, self._context.device
        images_NCHW = self._network.normalize(unit.images_NCHW.to(device))
        labels_N = unit.labels_N.to(device)
        if recipe.mixup == 0 and recipe.cutmix == 0:
            return images_NCHW, mixup_target(labels_N, self._num_classes, smoothing=recipe.label_smoothing)
        mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=self._num_classes)
        with drawn_by(draws.word(self._seed, draws.Stream.COURSE, 1 + step, -1 - unit.number)):
            return mix(images_NCHW, labels_N)  # type: ignore[no-any-return]

    def _autocast(self) -> torch.autocast:
        on = self._what.evaluation.precision == "bf16"
        return torch.autocast(self._context.device.type, torch.bfloat16, enabled=on)

    # ------------------------------------------------------------------------------------------------------------ state

    def state(self) -> State:
        """As `Course.state`."""
        self._notice_failure()
        return {
            "network": self._network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            FAILED: self._failed,
        }

    def load(self, state: State) -> None:
        """As `Course.load`."""
        self._network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._failed = state[FAILED]

    def _notice_failure(self) -> None:
        """Look at the flag, which is the same on all workers; this waits for the device."""
        if self._failed is None and self._bad:
            self._fail("a loss or a gradient was not finite, and no update was applied from that step on")

    def _fail(self, what: str) -> None:
        asked = self._asked
        self._failed = (
            f"{asked.name}, {asked.features}, draw {1 + asked.draw}: {what}. What to do: lower base_lr of this "
            "evaluation, or use precision: fp32."
        )

    # ----------------------------------------------------------------------------------------------------------- result

    def result(self) -> State:
        """What the test rows were taken for (`named_M`, -1 where an image cannot be decoded), and what it took.

        Or, where a loss, gradient or logit was not finite, `failed` alone: what happened, and what to do.
        """
        if self._batches is not None:
            self._batches.close()
        self._notice_failure()
        named_M = self.named_test_rows() if self._failed is None else torch.empty(0)
        if (named_M == _NOT_FINITE).any():  # the last update was too much for the weights
            self._fail("what it makes of test images is not finite")
        if self._failed is not None:
            return {FAILED: self._failed}
        weights = hashlib.sha256()
        for value in self._network.state_dict().values():
            weights.update(value.cpu().numpy().tobytes())
        return {"named_M": named_M, "rows": self._num_rows, "steps": self.total_steps, "weights": weights.hexdigest()}

    def named_test_rows(self) -> Tensor:
        """(M,) int64, -1 for no image, -2 for logits that are not finite: one worker looks at each row, once."""
        what, context = self._what, self._context
        images = portions.of_split(what.dataset, TEST, BATCH, what.max_rows)
        own = (p for i, p in enumerate(images.portions()) if i % context.world_size == context.rank)
        read = partial(_test_pictures, images, self._network.model.channels, self._image_size)
        named_M = torch.zeros(images.num_rows, dtype=torch.int64)
        self._network.eval()
        with torch.inference_mode():
            for portion, found in thread_mapper(what.threads)(read, own):
                for row, bytes_BCHW in _batches(portion, found):
                    named_M[row] += 1 + self._named(bytes_BCHW)
        return summed(named_M.to(context.device)).cpu() - 1

    def _named(self, bytes_BCHW: Tensor) -> Tensor:
        with self._autocast():
            logits_BK = self._network(self._network.normalize(bytes_BCHW.to(self._context.device)))
        finite_B = logits_BK.isfinite().all(dim=1)
        return torch.where(finite_B, logits_BK.argmax(dim=1), _NOT_FINITE).cpu()


def _test_pictures(
    images: portions.Images, channels: int, size_HW: tuple[int, int], portion: Portion
) -> tuple[Portion, list[Tensor | None]]:
    def one(data: bytes | Exception) -> Tensor | None:
        try:
            return None if isinstance(data, Exception) else picture_of(data, channels, size_HW)
        except UndecodableError:
            return None

    return portion, [one(data) for data in images.read(portion).images]


def _batches(portion: Portion, found: list[Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
    good = [(portion.first + i, picture) for i, picture in enumerate(found) if picture is not None]
    if good:
        rows, pictures = zip(*good, strict=True)
        yield torch.tensor(rows), torch.stack(pictures)
