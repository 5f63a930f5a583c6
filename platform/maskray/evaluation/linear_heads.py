"""Linear heads on frozen features, trained by SGD: a grid of learning rates in one pass (He et al. 2022, Appendix A).

The features are standardised first (`logistic.standardised`): what a batch normalisation without scale and shift
before the head comes to, once its running statistics are those of all training features, those without a label
included. The heads of a grid read the same batches, and none knows of the others.

Which rate is best is settled by the loss on a fifth of the training rows; the test rows have no say in it. Where no
class has two rows there is nothing to settle it on: the one in the middle is taken.

Shape letters: N training rows, M test rows, D width of a feature, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskray import draws
from maskray.evaluation.features import Features
from maskray.evaluation.logistic import Labels, check_labels

HELD_BACK = 0.2
"""Share of the training rows on which the learning rate is chosen."""
INIT_STD = 0.01


@dataclass(frozen=True)
class HeadsRecipe:
    """How heads are trained: momentum 0.9, half a cosine, no weight decay (the paper's, without LARS and warm-up)."""

    learning_rates: tuple[float, ...]
    """For a batch of 256 rows; scaled linearly with the batch."""
    epochs: int
    batch: int


@dataclass(frozen=True)
class HeadsResult:
    """What came out for the test rows."""

    predicted_M: Labels
    learning_rate: float
    """The one that was chosen."""
    held_back_losses: dict[float, float]
    """By learning rate: what it was chosen by; empty where no rows could be held back."""


def train_heads(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    recipe: HeadsRecipe,
    *,
    seed: int,
    device: torch.device | None = None,
) -> HeadsResult:
    """Choose a learning rate on rows that are held back, train with it on all, and name the test rows.

    Args:
        train_features: (N, D), standardised.
        train_labels: (N,) integers.
        test_features: (M, D), by the same scale.
        recipe: how heads are trained.
        seed: of the heads' beginnings, of batches, and of which rows are held back.
        device: None: the CPU.

    Raises:
        DataError: no rows, or one class only.
    """
    check_labels(train_labels, train_labels)
    names, class_N = np.unique(train_labels, return_inverse=True)
    device = device or torch.device("cpu")
    train_ND, test_MD = (torch.from_numpy(each).to(device) for each in (train_features, test_features))
    classes_N = torch.from_numpy(class_N).to(device)

    kept, held = (torch.from_numpy(rows).to(device) for rows in _split(class_N, seed))
    best, losses = sorted(recipe.learning_rates)[len(recipe.learning_rates) // 2], dict[float, float]()
    if len(held):
        candidates = _trained(train_ND[kept], classes_N[kept], len(names), recipe.learning_rates, recipe, seed)
        with torch.no_grad():
            found = [float(F.cross_entropy(head(train_ND[held]), classes_N[held])) for head in candidates]
        losses = dict(zip(recipe.learning_rates, found, strict=True))
        best = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
    (head,) = _trained(train_ND, classes_N, len(names), [best], recipe, seed)
    with torch.no_grad():
        named_M = head(test_MD).argmax(dim=1)
    return HeadsResult(names[named_M.cpu().numpy()], best, losses)


def _trained(
    features_ND: Tensor, classes_N: Tensor, num_classes: int, rates: Sequence[float], recipe: HeadsRecipe, seed: int
) -> list[nn.Linear]:
    """A head for each rate; all begin alike, and see the same batches."""
    num_rows, width = features_ND.shape
    batch = min(recipe.batch, num_rows)
    generator = torch.Generator().manual_seed(draws.word(seed, draws.Stream.PROBE) >> 1)
    start_KD = INIT_STD * torch.randn(num_classes, width, generator=generator)
    heads = [nn.utils.skip_init(nn.Linear, width, num_classes, device=features_ND.device) for _ in rates]
    for head in heads:
        head.load_state_dict({"weight": start_KD, "bias": torch.zeros(num_classes)})
    groups = [{"params": head.parameters(), "lr": rate * batch / 256} for head, rate in zip(heads, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * -(-num_rows // batch))
    for epoch in range(recipe.epochs):
        order_N = np.random.default_rng(draws.word(seed, draws.Stream.PROBE, 1 + epoch)).permutation(num_rows)
        for rows in torch.from_numpy(order_N).to(features_ND.device).split(batch):
            # A sum: each head gets the gradient of its own loss.
            loss = sum(F.cross_entropy(head(features_ND[rows]), classes_N[rows]) for head in heads)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            schedule.step()
    return heads


def _split(class_N: Labels, seed: int) -> tuple[Labels, Labels]:
    """Rows to train on and rows to choose by, a fifth of each class (one at least, where it has two)."""
    rng = np.random.default_rng(draws.word(seed, draws.Stream.PROBE, 0, 1))
    held = []
    for each in np.unique(class_N):
        rows = rng.permutation(np.flatnonzero(class_N == each))
        held.append(rows[: max(round(HELD_BACK * len(rows)), min(1, len(rows) - 1))])
    held_rows = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(class_N)), held_rows), held_rows
