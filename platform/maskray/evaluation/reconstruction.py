"""What a model paints: fixed images under fixed masks, so that two pictures of a run differ by the model alone.

Neither loss nor likeness says what a representation is worth, and the loss of one ratio compares with that of no other.

Shape letters: N images, C channels, H and W down and across (pixels of an image, cells of a visibility).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from maskray import draws, masking
from maskray.config.models import Mask
from maskray.evaluation.features import Images, evaluating
from maskray.figures import pictures
from maskray.models.base import MaskedAutoencoder
from maskray.models.normalize import Normalize
from maskray.objective import Objective


@dataclass(frozen=True)
class Reconstruction:
    """Arrays for a figure, and the losses that belong to them."""

    images_NCHW: Images
    visible_NHW: np.ndarray[Any, np.dtype[np.bool_]]
    painted_NCHW: Images
    """The prediction for every cell, those the model saw included."""
    loss_N: np.ndarray[Any, np.dtype[np.float32]]
    """Over the hidden cells. Comparable only at one mask ratio, patch and objective."""
    uses_target_statistics: bool
    """True: each painted cell's mean and std were taken from the original."""

    def first(self, num: int) -> Reconstruction:
        """Of the first images alone."""
        return Reconstruction(
            self.images_NCHW[:num],
            self.visible_NHW[:num],
            self.painted_NCHW[:num],
            self.loss_N[:num],
            self.uses_target_statistics,
        )

    def figure(self, title: str) -> bytes:
        """A PNG of it."""
        return pictures.reconstructions(
            self.images_NCHW,
            self.visible_NHW,
            self.painted_NCHW,
            title=title,
            losses=[float(loss) for loss in self.loss_N],
            uses_target_statistics=self.uses_target_statistics,
        )


def reconstruct(
    model: MaskedAutoencoder,
    normalize: Normalize,
    objective: Objective,
    images_NCHW: Images,
    mask: Mask,
    seed: int,
) -> Reconstruction:
    """Paint the hidden cells of a few images, in fp32.

    Image n gets the mask that (seed, n) draws: the same at every step of a run, and no mask of training's.
    """
    counts = masking.visible_counts(mask, model.grid_HW)
    num_visible = sorted(counts)[len(counts) // 2]  # of several ratios, the one in the middle
    probe_seed = draws.word(seed, draws.Stream.PROBE)
    rows = np.arange(len(images_NCHW))
    visible_NHW = masking.draw(mask, model.grid_HW, num_visible, seed=probe_seed, pass_=0, rows=rows, view=0)
    device = next(model.parameters()).device
    visible = torch.from_numpy(visible_NHW).to(device)
    with evaluating(model), torch.no_grad():
        images = normalize(torch.from_numpy(np.ascontiguousarray(images_NCHW)).to(device))
        everything = torch.ones_like(visible)
        pred = model(images, visible, num_visible, everything, everything[0].numel())
        loss_N = objective(images, pred, ~visible)
        painted = objective.paint(images, pred)
    return Reconstruction(
        images_NCHW=images_NCHW,
        visible_NHW=visible_NHW,
        painted_NCHW=normalize.to_bytes(painted.images_BCHW).cpu().numpy(),
        loss_N=loss_N.float().cpu().numpy(),
        uses_target_statistics=painted.uses_target_statistics,
    )
