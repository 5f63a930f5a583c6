"""Frozen features of images, one vector an image. Nothing here draws a random number.

Shape letters: N images, C channels, H and W pixels down and across, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from maskray.models.base import MaskedAutoencoder
from maskray.models.normalize import Normalize

Images = np.ndarray[Any, np.dtype[np.uint8]]
Features = np.ndarray[Any, np.dtype[np.float32]]

BATCH = 256


def pooled_features(
    model: MaskedAutoencoder, normalize: Normalize, images: Images | Iterable[Images], batch: int = BATCH
) -> Features:
    """Mean-pooled features (N, D) of the encoder, unmasked, in fp32, in the order of the images.

    Args:
        model: left in the mode it was in.
        normalize: what the model was trained behind.
        images: uint8 (N, C, H, W), or batches of them where all at once would not fit.
        batch: images at once, where `images` is one array.
    """
    batches = _batches(images, batch) if isinstance(images, np.ndarray) else images
    device = next(model.parameters()).device
    parts = []
    with evaluating(model), torch.no_grad():
        for images_NCHW in batches:
            bytes_NCHW = torch.from_numpy(np.ascontiguousarray(images_NCHW)).to(device)
            parts.append(model.pooled(normalize(bytes_NCHW)).float().cpu().numpy())
    return np.concatenate(parts)


def pixel_features(images_NCHW: Images) -> Features:
    """The pixels themselves as features (N, C·H·W): what any encoder must be compared with on small images."""
    return images_NCHW.reshape(len(images_NCHW), -1).astype(np.float32) / np.float32(255)


def _batches(images_NCHW: Images, batch: int) -> Iterator[Images]:
    for at in range(0, len(images_NCHW), batch):
        yield images_NCHW[at : at + batch]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode again outside.

    A compiled model runs as it was written: its graphs are for the shapes of training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training
