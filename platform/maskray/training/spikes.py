"""Losses that leap above those before them, seen on the device: the host does not wait."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from maskray.config.training import SpikeConfig


class SpikeWatch:
    """The last losses of a run, on the device.

    Args:
        config: what counts as a leap.
        device: that the losses are on.
    """

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self._factor = config.factor
        # NaN where there is none yet: so is then their median, and nothing is greater than that.
        self._losses = torch.full((config.window,), math.nan, device=device)
        self._num_seen = 0

    def leaps(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the loss of the next step leaps, and the median that it is compared with: scalars on the device."""
        median = self._losses.median()
        leapt = loss > self._factor * median
        self._losses[self._num_seen % len(self._losses)] = loss
        self._num_seen += 1
        return leapt, median

    def losses(self) -> list[float]:
        """The last ones, the oldest first. This waits for the device."""
        values, newest = self._losses.tolist(), self._num_seen % len(self._losses)
        return (values[newest:] + values[:newest])[max(0, len(values) - self._num_seen) :]

    def recall(self, losses: Sequence[float]) -> None:
        """Go on from what `losses` gave, be it of another window."""
        last = losses[-len(self._losses) :]
        self._losses.fill_(math.nan)
        self._losses[: len(last)] = torch.tensor(last, device=self._losses.device)
        self._num_seen = len(last)
