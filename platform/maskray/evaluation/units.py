"""What fine-tuning learns from: rows of a step in units of equal size, decoded, cropped, flipped, ready to be mixed.

Shape letters: C channels, H and W pixels down and across, N rows of a unit, T rows of the training split.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskray.config.evaluation import FinetuneEvaluation
from maskray.data import crop
from maskray.data.decode import UndecodableError
from maskray.data.manifest import Ints
from maskray.data.mapper import thread_mapper
from maskray.data.passes import Pictures
from maskray.evaluation.logistic import Labels
from maskray.models.encoder import Encoder
from maskray.training.context import WorkerContext

_FIRST_VIEW = 0


class Unit(NamedTuple):
    """Rows that are computed together, ready for the network."""

    number: int
    """In its step."""
    rows_N: Ints
    images_NCHW: Tensor
    """uint8."""
    labels_N: Tensor
    weights_N: Tensor
    """0 for what fills the unit, for images that cannot be decoded, and for those that are mixed with such a one."""


class Units:
    """A worker's units of each step: which rows, their crops and flips follow from keys, not from the worker.

    Args:
        recipe: how many rows a unit has, how they are cropped and flipped.
        pictures: of the rows that are trained with.
        labels_T: of all rows of the split.
        encoder: for images of its size and channels.
        batch: rows of a step.
        seed: of order, crops and flips.
        context: of this worker.
    """

    def __init__(
        self,
        recipe: FinetuneEvaluation,
        pictures: Pictures,
        labels_T: Labels,
        encoder: Encoder,
        *,
        batch: int,
        seed: int,
        context: WorkerContext,
    ) -> None:
        self._recipe, self._labels_T, self._seed, self._batch = recipe, labels_T, seed, batch
        self.pictures, self.passes = pictures, pictures.passes(seed)
        self._channels, self._image_size = encoder.channels, encoder.image_size
        self.num = -(-batch // recipe.unit_rows)
        """Of a step, of all workers."""
        in_a_unit = -(-batch // self.num)
        self.rows = in_a_unit + in_a_unit % 2  # even: they are mixed in pairs
        """N."""
        self._own = range(context.rank, self.num, context.world_size)
        self._share = -(-self.num // context.world_size)

    def steps(self, first: int, end: int, threads: int) -> Generator[list[Unit]]:
        """Units of the steps from `first` to before `end`; a worker that has fewer than others repeats one, weight 0.

        They are made one by one, ahead of need: threads share a step, and need not hold many. Closed, the threads end.
        """
        self.pictures.load()
        wanted = ((number, each) for number in range(first, end) for each in self._own or [0])
        made = iter(thread_mapper(threads)(self._made, wanted))
        for _ in range(first, end):
            units = list(islice(made, len(self._own) or 1))
            spare = units[0]._replace(weights_N=torch.zeros_like(units[0].weights_N))
            yield units[: len(self._own)] + [spare] * (self._share - len(self._own))

    def _made(self, place: tuple[int, int]) -> Unit:
        """The unit of a step and a number in it."""
        number, each = place
        whole, longer = divmod(self._batch, self.num)
        first, num = each * whole + min(each, longer), whole + (each < longer)
        return self.unit(each, *self.passes.take(number * self._batch + first, num))

    def unit(self, number: int, passes_N: Ints, rows_N: Ints) -> Unit:
        """Rows, each in its pass, as a unit."""
        # Each image is mixed with the one as far from the other end. What is added to fill the unit stands in the
        # middle and is the middle one: if that has no partner, it is mixed with itself.
        num, half = len(rows_N), (len(rows_N) + 1) // 2
        index = np.concatenate([np.arange(half), np.full(self.rows - num, half - 1), np.arange(half, num)])
        weights_N = torch.ones(self.rows)
        weights_N[half : half + self.rows - num] = 0
        pictures = list[Tensor | None]()
        for pass_ in np.unique(passes_N).tolist():  # they come in ascending order
            pictures += self._pictures_of(pass_, rows_N[passes_N == pass_])
        blank = torch.zeros(self._channels, *self._image_size, dtype=torch.uint8)
        images = torch.stack([blank if each is None else each for each in pictures])
        good_N = torch.tensor([each is not None for each in pictures])[index]
        if self._recipe.mixup > 0 or self._recipe.cutmix > 0:
            good_N = good_N & good_N.flip(0)
        weights_N *= good_N
        return Unit(number, rows_N[index], images[index], torch.from_numpy(self._labels_T[rows_N[index]]), weights_N)

    def _pictures_of(self, pass_: int, rows_N: Ints) -> list[Tensor | None]:
        """Cropped and flipped by key, all at once; None where an image cannot be decoded."""
        wholes = [self.pictures.get(row) for row in rows_N.tolist()]
        sizes_N2 = np.array([(1, 1) if isinstance(each, UndecodableError) else each.shape[1:] for each in wholes])
        views_N = np.full(len(rows_N), _FIRST_VIEW)
        key: dict[str, Any] = {"seed": self._seed, "pass_": pass_, "rows": rows_N, "views": views_N}
        boxes_N4 = crop.draw_boxes(self._recipe.crop, sizes_N2, **key)
        flips_N = crop.draw_flips(self._recipe.flip_probability, **key)
        return [
            None if isinstance(whole, UndecodableError) else crop.crop_resize(whole, box, self._image_size, flip=flip)
            for whole, box, flip in zip(wholes, boxes_N4, flips_N.tolist(), strict=True)
        ]
