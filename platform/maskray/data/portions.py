"""Images to be read once each, in order, a portion at a time: the rows of a dataset's split, or a source's entries.

Where a portion begins and ends hangs on the images alone, so what is computed of one does not depend on who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from maskray.data import decode
from maskray.data.manifest import Ints, SplitName
from maskray.data.mapper import read_ahead
from maskray.data.shards import Dataset
from maskray.data.sources import Entry, Source

NO_LABEL = -1


class Portion(NamedTuple):
    """Images that are read at once. Small: it travels to whoever reads them."""

    split: SplitName | None
    """None where there are no splits."""
    first: int
    """Row of the first image in the split."""
    rows: int
    where: Any
    """For `Images.read`."""

    @property
    def end(self) -> int:
        """Row behind the last image."""
        return self.first + self.rows


class Encoded(NamedTuple):
    """What was read of a portion. N images."""

    rows: Ints
    """(N,) row numbers."""
    keys: list[str]
    images: list[bytes | Exception]
    """Encoded; or why there is none."""
    labels: Ints | None
    """(N,), or None where there are none."""


@dataclass(frozen=True)
class Images:
    """Images in an order."""

    num_rows: int
    """In all splits."""
    portions: Callable[[], Iterator[Portion]]
    """All rows, each once, in the order of splits and of rows in them."""
    read: Callable[[Portion], Encoded]
    """Picklable and small. Raises as the dataset or the source does whose images they are, where all is lost."""
    around: Callable[[SplitName | None, int], Portion]
    """The least that can be read with the image at a row in it."""


def of_split(dataset: Dataset, split: SplitName, portion_rows: int, max_rows: int | None = None) -> Images:
    """The first `max_rows` rows of a split, or all, in portions of whole row groups of about `portion_rows`."""
    return of_dataset(dataset, (split,), portion_rows, max_rows)


def of_dataset(dataset: Dataset, splits: Sequence[SplitName], portion_rows: int, max_rows: int | None = None) -> Images:
    """As `of_split`, of several splits one after the other."""
    group_rows = dataset.manifest.group_rows
    step = max(1, portion_rows // group_rows) * group_rows
    num_rows = {s: min(dataset.num_rows(s), dataset.num_rows(s) if max_rows is None else max_rows) for s in splits}

    def portions() -> Iterator[Portion]:
        for split, rows in num_rows.items():
            for first in range(0, rows, step):
                yield Portion(split, first, min(step, rows - first), first // group_rows)

    def around(split: SplitName | None, row: int) -> Portion:
        assert split is not None
        first = row // group_rows * group_rows
        return Portion(split, first, min(group_rows, num_rows[split] - first), row // group_rows)

    return Images(sum(num_rows.values()), portions, _OfDataset(dataset), around)


@dataclass(frozen=True)
class _OfDataset:
    dataset: Dataset

    def __call__(self, portion: Portion) -> Encoded:
        keys: list[str] = []
        images: list[bytes | Exception] = []
        labels = []
        group_rows = self.dataset.manifest.group_rows
        assert portion.split is not None
        for number in range(portion.where, portion.where - (-portion.rows // group_rows)):
            group = self.dataset.read_group(number, portion.split)
            keys += group.keys
            images += group.images
            labels += [group.labels] if group.labels is not None else []
        rows = np.arange(portion.first, portion.end)
        of_all = np.concatenate(labels)[: portion.rows] if labels else None
        return Encoded(rows, keys[: portion.rows], images[: portion.rows], of_all)


def of_source(source: Source, portion_rows: int, max_pixels: int, threads: int) -> Images:
    """A source's images in the order in which they are best read; one of too many pixels is not decoded.

    Args:
        source: an open one.
        portion_rows: images in a portion.
        max_pixels: height × width at most that an image may say that it has.
        threads: that read a portion's images, where reading is waiting.
    """

    def portions() -> Iterator[Portion]:
        for first in range(0, len(source.entries), portion_rows):
            entries = source.entries[first : first + portion_rows]
            yield Portion(None, first, len(entries), entries)

    def around(_split: SplitName | None, row: int) -> Portion:
        return Portion(None, row, 1, source.entries[row : row + 1])

    read = _OfSource(source.read, bool(source.class_names), max_pixels, threads)
    return Images(len(source.entries), portions, read, around)


@dataclass(frozen=True)
class _OfSource:
    read: Callable[[Entry], bytes]
    has_labels: bool
    max_pixels: int
    threads: int

    def __call__(self, portion: Portion) -> Encoded:
        entries: list[Entry] = portion.where
        images = list(read_ahead(self._read, entries, self.threads))
        labels = [NO_LABEL if entry.label is None else entry.label for entry in entries]
        rows = np.arange(portion.first, portion.end)
        return Encoded(rows, [e.key for e in entries], images, np.array(labels) if self.has_labels else None)

    def _read(self, entry: Entry) -> bytes | Exception:
        try:
            data = self.read(entry)
            decode.measure(data, self.max_pixels)
        except (OSError, decode.UndecodableError) as error:
            return error
        return data
