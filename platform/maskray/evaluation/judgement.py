"""What a run's encoder is worth before training, on the way and at the end, and what the model paints.

Always on the same rows and pictures: labels come from the training split, the rows that are judged from the held-out
split, which pretraining never sees. A judgement reads a checkpoint, so it needs nothing of the training process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from maskray.config.schema import DataConfig, RunConfig
from maskray.data.manifest import SplitName
from maskray.data.shards import Dataset
from maskray.data.stream import walk
from maskray.errors import DataError
from maskray.evaluation.features import Features, Images, pixel_features, pooled_features
from maskray.evaluation.knn import knn_probabilities
from maskray.evaluation.logistic import Accuracy, Labels, few_label_correct, full_accuracy
from maskray.evaluation.reconstruction import Reconstruction, reconstruct
from maskray.models.base import MaskedAutoencoder
from maskray.models.build import build_normalize, initial_model
from maskray.models.foreign import load_weights
from maskray.models.normalize import Normalize
from maskray.objective import Objective
from maskray.tracking.base import Tracker
from maskray.training import checkpoint, folders

log = logging.getLogger(__name__)

MAX_PIXEL_VALUES = 4096
FIGURE = "pretrain/reconstruction"


@dataclass(frozen=True)
class Scores:
    """Accuracies on the held-out rows."""

    few_labels: Accuracy
    """Logistic regression with a few labels a class, over draws."""
    all_labels: float
    """Logistic regression with all."""
    knn: float
    """Weighted nearest neighbours with all."""

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """As the tracker is told them; `probe.best_by` names one."""
        values = {"few_labels": self.few_labels.mean, "all_labels": self.all_labels, "knn": self.knn}
        return {f"probe/{name}{suffix}": value for name, value in values.items()}


@dataclass(frozen=True)
class Judgement:
    """The encoder as it started, as it ended, and raw pixels beside it."""

    before: Scores
    after: Scores
    pixels: Scores | None
    """None for images of more than `MAX_PIXEL_VALUES` values: a regression on them would cost more than the run."""
    labels_per_class: int
    k: int
    num_train: int
    num_test: int


class Finding(NamedTuple):
    """Of the model after so many steps."""

    step: int
    scores: Scores | None
    """None where the dataset cannot be probed."""
    painted: Reconstruction
    """Fixed images under fixed masks, and what the model paints of them."""
    title: str
    """Of their figure."""

    def tell(self, tracker: Tracker) -> None:
        """Log them."""
        if self.scores is not None:
            tracker.log(self.scores.metrics(), self.step)
        tracker.figure(FIGURE, self.painted.figure(self.title), self.step)


class Verdict(NamedTuple):
    """At the end of a run."""

    judgement: Judgement | None
    """None where the dataset cannot be probed."""
    findings: tuple[Finding, Finding]
    """Before training, and after it."""


class Rows(NamedTuple):
    """Labelled images of both splits."""

    train: Images
    train_labels: Labels
    test: Images
    test_labels: Labels


ReadRows = Callable[[DataConfig, int], Rows]


def read_rows(data: DataConfig, most: int) -> Rows:
    """The first rows of both splits, so many at most of each."""
    dataset = Dataset.open(data.path, data.version, unreadable=data.unreadable)
    return Rows(*_labelled(dataset, "train", data, most), *_labelled(dataset, "held_out", data, most))


def _labelled(dataset: Dataset, split: SplitName, data: DataConfig, most: int) -> tuple[Images, Labels]:
    groups = list(walk(dataset, split, data.image_size, data.channels, most))
    images = torch.cat([g.images_BCHW for g in groups]).numpy()
    return images, np.concatenate([g.labels for g in groups if g.labels is not None])


class Bench:
    """What every model of a run is judged on.

    Args:
        config: of the run.
        device: where features are computed.
        read: as `read_rows`.
    """

    def __init__(self, config: RunConfig, device: torch.device, read: ReadRows = read_rows) -> None:
        self.config, self._device, self._read = config, device, read
        self.dataset = Dataset.open(config.data.path, config.data.version, unreadable=config.data.unreadable)

    @cached_property
    def rows(self) -> Rows | None:
        """None where there are no labels, or no held-out rows (the log says which)."""
        if not self.dataset.manifest.class_names or not self.dataset.num_rows("held_out"):
            missing = "held-out rows" if self.dataset.manifest.class_names else "labels"
            log.warning("No probe: the dataset has no %s", missing)
            return None
        return self._read(self.config.data, self.config.probe.max_rows)

    @property
    def k(self) -> int:
        """Neighbours: fewer than asked for where there are fewer rows."""
        return min(self.config.probe.k, 0 if self.rows is None else len(self.rows.train_labels))

    def find(self, step: int, weights: Path | None = None) -> Finding:
        """Judge the model of a checkpoint's folder; None: as it was before training."""
        config = self.config
        model = initial_model(config).to(self._device)
        if weights is not None:
            load_weights(model, weights)
        normalize = build_normalize(config, self.dataset.manifest).to(self._device)
        scores = self.scores(lambda images: pooled_features(model, normalize, images))
        return Finding(step, scores, self._painted(model, normalize), f"{config.name}, step {step}")

    def scores(self, features: Callable[[Images], Features]) -> Scores | None:
        """Accuracies that can be read from features of the rows. The log says why there are none."""
        if self.rows is None:
            return None
        rows, probe = self.rows, self.config.probe
        train, test = features(rows.train), features(rows.test)
        read = train, rows.train_labels, test, rows.test_labels
        try:
            few = few_label_correct(
                *read, labels_per_class=probe.labels_per_class, num_draws=probe.draws, seed=self.config.seed
            )
            votes = knn_probabilities(*read[:3], k=self.k, temperature=probe.temperature)
            named = np.unique(rows.train_labels)[votes.argmax(axis=1)]
            return Scores(Accuracy.of(few), full_accuracy(*read), float((named == rows.test_labels).mean()))
        except DataError as error:  # training must not end for want of labels
            log.warning("No probe: %s", error)
            return None

    def _painted(self, model: MaskedAutoencoder, normalize: Normalize) -> Reconstruction:
        config = self.config
        objective = Objective(config.objective, config.cell)
        return reconstruct(model, normalize, objective, first_images(self.dataset, config), config.mask, config.seed)


def first_images(dataset: Dataset, config: RunConfig) -> Images:
    """The first held-out images (of training, where none were held out), (N, C, H, W) uint8: always the same."""
    split: SplitName = "held_out" if dataset.num_rows("held_out") else "train"
    walked = walk(dataset, split, config.data.image_size, config.data.channels, config.probe.figure_images)
    return torch.cat([group.images_BCHW for group in walked]).numpy()


def probe(config: RunConfig, weights: Path, device: torch.device, *, first: bool) -> list[Finding]:
    """Judge a checkpoint on the way.

    Args:
        config: of the run.
        weights: folder of the checkpoint.
        device: where features are computed.
        first: whether curves begin with it: then the model before training is judged too.
    """
    bench, step = Bench(config, device), checkpoint.read_facts(weights).step
    # Without labels no curve ever begins.
    before = [bench.find(0)] if first and (bench.rows is not None or step == config.training.first_probe) else []
    return [*before, bench.find(step, weights)]


def judge(config: RunConfig, weights: Path, device: torch.device) -> Verdict:
    """Judge the last checkpoint: beside it the model before training, and the pixels themselves.

    Args:
        config: of the run.
        weights: folder of the checkpoint.
        device: where features are computed.
    """
    bench = Bench(config, device)
    before, after = bench.find(0), bench.find(checkpoint.read_facts(weights).step, weights)
    rows = bench.rows
    if rows is None or before.scores is None or after.scores is None:
        return Verdict(None, (before, after))
    small = rows.train[0].size <= MAX_PIXEL_VALUES
    judgement = Judgement(
        before=before.scores,
        after=after.scores,
        pixels=bench.scores(pixel_features) if small else None,
        labels_per_class=config.probe.labels_per_class,
        k=bench.k,
        num_train=len(rows.train_labels),
        num_test=len(rows.test_labels),
    )
    return Verdict(judgement, (before, after))


def note(config: RunConfig, finding: Finding) -> bytes:
    """What is kept beside a checkpoint that was judged: its scores, and the one that decides which are kept."""
    metrics = {} if finding.scores is None else finding.scores.metrics()
    score = metrics.get(f"probe/{config.probe.best_by}", folders.NO_SCORE)
    return json.dumps({"step": finding.step, "score": score, "metrics": metrics}, indent=1).encode()
