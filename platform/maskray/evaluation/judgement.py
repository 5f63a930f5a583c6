"""The first judgement of a run: what a logistic regression reads from the encoder before and after pretraining.

The labels come from the training split, the test rows from the held-out split, which pretraining never sees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskray.config.schema import RunConfig
from maskray.data.manifest import SplitName
from maskray.data.shards import Dataset
from maskray.data.stream import walk
from maskray.errors import DataError
from maskray.evaluation.features import Features, Images, pixel_features, pooled_features
from maskray.evaluation.logistic import Accuracy, few_label_correct, full_accuracy
from maskray.models.build import build_normalize, initial_model
from maskray.models.foreign import load_weights

log = logging.getLogger(__name__)

MAX_PIXEL_VALUES = 4096


@dataclass(frozen=True)
class Scores:
    """Accuracy on the held-out rows with a few labels a class (mean over draws), and with all."""

    few_labels: Accuracy
    all_labels: float


@dataclass(frozen=True)
class Judgement:
    """The encoder as it started, as it ended, and raw pixels beside it."""

    before: Scores
    after: Scores
    pixels: Scores | None
    """None for images of more than `MAX_PIXEL_VALUES` values: a regression on them would cost more than the run."""
    labels_per_class: int
    num_train: int
    num_test: int


def judge(config: RunConfig, weights: Path, device: torch.device) -> Judgement | None:
    """Judge a checkpoint's encoder; None where the probe is off, or the dataset cannot be probed (the log says why).

    Args:
        config: of the run.
        weights: folder of the checkpoint.
        device: where features are computed.
    """
    dataset = Dataset.open(config.data.path, config.data.version, unreadable=config.data.unreadable)
    if not config.probe.enabled:
        return None
    if not dataset.manifest.class_names or not dataset.num_rows("held_out"):
        log.warning("No probe: the dataset has no %s", "held-out rows" if dataset.manifest.class_names else "labels")
        return None
    train, test = (_rows(dataset, split, config) for split in ("train", "held_out"))

    def scores(features: Callable[[Images], Features]) -> Scores:
        inputs: tuple[Any, ...] = (features(train[0]), train[1], features(test[0]), test[1])
        few = few_label_correct(
            *inputs, labels_per_class=config.probe.labels_per_class, num_draws=config.probe.draws, seed=config.seed
        )
        return Scores(Accuracy.of(few), full_accuracy(*inputs))

    model = initial_model(config).to(device)
    normalize = build_normalize(config, dataset.manifest).to(device)
    try:
        before = scores(lambda images: pooled_features(model, normalize, images))
        load_weights(model, weights)
        after = scores(lambda images: pooled_features(model, normalize, images))
        pixels = scores(pixel_features) if train[0][0].size <= MAX_PIXEL_VALUES else None
    except DataError as error:  # the run is done: it must not fail for want of labels
        log.warning("No probe: %s", error)
        return None
    return Judgement(before, after, pixels, config.probe.labels_per_class, len(train[1]), len(test[1]))


def _rows(dataset: Dataset, split: SplitName, config: RunConfig) -> tuple[Images, Any]:
    groups = list(walk(dataset, split, config.data.image_size, config.data.channels, config.probe.max_rows))
    images = torch.cat([g.images_BCHW for g in groups]).numpy()
    return images, np.concatenate([g.labels for g in groups if g.labels is not None])
