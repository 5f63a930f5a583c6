"""Chosen rows of a split, to be trained on pass after pass: in which order, and where their images come from.

The pretraining stream is made for millions of rows, a row group at a time. Here the rows may be fifty: then they are
read once and kept, and drawn one by one. Where they would not fit, they are read again in each pass, a row group at a
time, and those of a group stay together; shards are a seeded permutation, so a group is a random handful all the same.

Shape letters: R chosen rows, N rows of a step.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from maskray import draws
from maskray.data import decode
from maskray.data.manifest import Ints, SplitName
from maskray.data.mapper import read_ahead
from maskray.data.shards import Dataset

_GROUPS_KEPT = 16
_PASSES_KEPT = 2
_READERS = 4


class Drawn(NamedTuple):
    """N rows of the endless sequence."""

    passes_N: Ints
    """In which pass over the rows each one comes."""
    rows_N: Ints
    """Row numbers in the split."""


class Passes:
    """An endless sequence of rows: in each pass every one once, in an order that follows from (seed, pass) alone.

    Args:
        rows_R: row numbers.
        blocks_R: of each row, the number of what it stays together with.
        seed: of the order.
    """

    def __init__(self, rows_R: Ints, blocks_R: Ints, seed: int) -> None:
        self._rows_R, self._seed = rows_R, seed
        _, self._block_R = np.unique(blocks_R, return_inverse=True)
        self._order = lru_cache(_PASSES_KEPT)(self._order_of)

    def take(self, first: int, num: int) -> Drawn:
        """Rows `first` to `first + num` of the sequence; the borders of passes lie where they lie."""
        positions_N = np.arange(first, first + num)
        passes_N = positions_N // len(self._rows_R)
        rows_N = np.empty(num, np.int64)
        for pass_ in np.unique(passes_N).tolist():
            of_pass = passes_N == pass_
            rows_N[of_pass] = self._order(pass_)[positions_N[of_pass] - pass_ * len(self._rows_R)]
        return Drawn(passes_N, rows_N)

    def _order_of(self, pass_: int) -> Ints:
        rng = np.random.default_rng(draws.word(self._seed, draws.Stream.COURSE, pass_))
        place_of_block = rng.permutation(int(self._block_R.max()) + 1)
        order: Ints = np.lexsort((rng.random(len(self._rows_R)), place_of_block[self._block_R]))
        return self._rows_R[order]


class Pictures:
    """Images of chosen rows, decoded; thread-safe. What fits is read once.

    Args:
        dataset: open.
        split: of it.
        rows_R: ascending row numbers.
        channels: of the images.
        keep_bytes: rows are kept decoded where they fit into so many, or else encoded, or else not at all.
    """

    def __init__(self, dataset: Dataset, split: SplitName, rows_R: Ints, channels: int, keep_bytes: int) -> None:
        self._dataset, self._split, self._channels = dataset, split, channels
        self.rows_R, self.groups_R = rows_R, dataset.groups_of(rows_R, split)
        of_split = dataset.manifest.splits[split]
        share = len(rows_R) / of_split.rows
        self.is_kept = sum(shard.size for shard in of_split.shards) * share <= keep_bytes
        self._keeps_decoded = self.is_kept and of_split.pixels * channels * share <= keep_bytes
        self._kept: dict[int, Any] | None = None
        self._read = lru_cache(_GROUPS_KEPT)(self._read_group)

    def passes(self, seed: int) -> Passes:
        """An order to train on them in: one by one where they are kept, else by row groups."""
        return Passes(self.rows_R, self.rows_R if self.is_kept else self.groups_R, seed)

    def load(self) -> None:
        """Read what is kept. Raises as `Dataset.read_group` does."""
        if not self.is_kept or self._kept is not None:
            return
        kept: dict[int, Any] = {}
        wanted = set(self.rows_R.tolist())
        for group in read_ahead(self._read_group, np.unique(self.groups_R).tolist(), _READERS):
            kept |= {row: self._held(data) for row, data in group.items() if row in wanted}
        self._kept = kept

    def get(self, row: int) -> torch.Tensor | decode.UndecodableError:
        """A whole image (C, H, W) uint8, or why there is none. Not to be written to.

        Raises as `Dataset.read_group` does.
        """
        if self._kept is not None:
            held = self._kept[row]
            return held if self._keeps_decoded else self._decoded(held)
        group = int(self.groups_R[np.searchsorted(self.rows_R, row)])
        return self._decoded(self._read(group)[row])

    def _held(self, data: bytes) -> Any:
        return self._decoded(data) if self._keeps_decoded else data

    def _decoded(self, data: bytes) -> torch.Tensor | decode.UndecodableError:
        try:
            return decode.decode(data, self._channels)
        except decode.UndecodableError as error:
            return error

    def _read_group(self, number: int) -> dict[int, bytes]:
        group = self._dataset.read_group(number, self._split)
        return dict(zip(group.rows.tolist(), group.images, strict=True))
