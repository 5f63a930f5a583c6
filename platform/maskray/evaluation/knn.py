"""Weighted k nearest neighbours on frozen features (Wu et al. 2018, §3.4; as DINO and others report it).

Shape letters: N training rows, M test rows, D width of a feature, K classes, k neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from maskray.errors import ConfigError
from maskray.evaluation.features import Features
from maskray.evaluation.logistic import Labels

_CHUNK_VALUES = 2**25
"""Similarities that are held at once."""


def knn_probabilities(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    *,
    k: int,
    temperature: float,
    device: torch.device | None = None,
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(M, K) votes of each test row's `k` nearest training rows, as shares; classes in the order of their labels.

    Neighbours are nearest by cosine, and vote with exp(cosine / temperature).

    Args:
        train_features: (N, D).
        train_labels: (N,) integers.
        test_features: (M, D).
        k: neighbours.
        temperature: 0.07 in the papers.
        device: where similarities are computed; None: the CPU.

    Raises:
        ConfigError: fewer training rows than neighbours.
    """
    if k > len(train_features):
        raise ConfigError(
            "there are fewer training rows than neighbours",
            key="k",
            found=k,
            allowed=f"1 to {len(train_features)}",
            fix="lower it, or take more rows",
        )
    _, class_N = np.unique(train_labels, return_inverse=True)
    num_classes = int(class_N.max()) + 1
    # In float64: in fp32 two neighbours that are nearly alike change places, and votes of a small temperature double.
    train_ND = _unit(train_features, device)
    classes_N = torch.from_numpy(class_N).to(train_ND.device)
    votes = []
    for test_mD in _unit(test_features, device).split(max(1, _CHUNK_VALUES // len(train_ND))):
        cosine_mk, index_mk = (test_mD @ train_ND.T).topk(k, dim=1)
        # The nearest votes with 1: exp of large numbers would not be finite.
        weight_mk = ((cosine_mk - cosine_mk[:, :1]) / temperature).exp()
        vote_mK = weight_mk.new_zeros(len(test_mD), num_classes).scatter_add_(1, classes_N[index_mk], weight_mk)
        votes.append(vote_mK / vote_mK.sum(dim=1, keepdim=True))
    probabilities: np.ndarray[tuple[int, int], np.dtype[np.float64]] = torch.cat(votes).cpu().numpy()
    return probabilities


def _unit(features: Features, device: torch.device | None) -> torch.Tensor:
    return F.normalize(torch.from_numpy(features).to(device or "cpu", torch.float64), dim=1)
