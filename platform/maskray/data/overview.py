"""What is in a dataset, for people: counts, sizes, channels, what was set aside, and some of the pictures."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from maskray.data import decode
from maskray.data.crop import crop_resize
from maskray.data.manifest import SPLITS, Bytes, Manifest, SplitName, versions
from maskray.data.mapper import Mapper, Progress
from maskray.data.quarantine import read_set_aside
from maskray.data.shards import ColumnsJob, Dataset, read_columns

logger = logging.getLogger(__name__)

_COLUMNS = ("label", "width", "height", "channels")


@dataclass(frozen=True)
class Overview:
    """What is in a dataset."""

    manifest: Manifest
    classes: dict[str, dict[SplitName, int]]
    """Images of each class, by split; empty where there are none."""
    short_sides: dict[int, int]
    """Images whose short side has at least so many pixels, and less than twice as many: powers of two."""
    channels: dict[int, int]
    """Images by the channels of the picture as it came, alpha included."""
    reasons: dict[str, int]
    """Images that were set aside, by reason, the most first; empty where that is not known."""
    versions: list[Manifest]
    """Oldest first."""


def overview(dataset: Dataset, mapper: Mapper, report: Progress) -> Overview:
    """Look through all shards, but not at the images.

    Raises:
        DataError: a shard is damaged.
    """
    manifest, storage = dataset.manifest, dataset.storage
    splits: list[SplitName] = [split for split in SPLITS for _ in manifest.splits[split].shards]
    jobs = [ColumnsJob(storage, shard, _COLUMNS) for split in SPLITS for shard in manifest.splits[split].shards]
    labels: dict[SplitName, Counter[int]] = {split: Counter() for split in SPLITS}
    sides: Counter[int] = Counter()
    channels: Counter[int] = Counter()
    report(0, len(jobs), "verify")
    for done, (split, counts) in enumerate(zip(splits, mapper(_count, jobs), strict=True), 1):
        labels[split] += counts.labels
        sides += counts.short_sides
        channels += counts.channels
        report(done, len(jobs), "verify")
    return Overview(
        manifest=manifest,
        classes={
            name: {split: labels[split][number] for split in SPLITS} for number, name in enumerate(manifest.class_names)
        },
        short_sides=dict(sorted(sides.items())),
        channels=dict(sorted(channels.items())),
        reasons=dict(_reasons(dataset).most_common()),
        versions=list(versions(storage).values()),
    )


class Sample(NamedTuple):
    """A picture to look at."""

    image_HWC: np.ndarray[Any, np.dtype[np.uint8]]
    """RGB; of other numbers of channels the first three, or the first alone as gray."""
    key: str
    label: str
    """Name of its class; empty where there is none."""


def samples(dataset: Dataset, count: int, max_side: int) -> list[Sample]:
    """Pictures of the training split, spread over all of it, at most `max_side` pixels wide and high.

    Raises:
        DataError: a shard is damaged.
    """
    num_rows, group_rows = dataset.num_rows(), dataset.manifest.group_rows
    chosen = sorted({i * num_rows // count for i in range(count)})
    names, bands = dataset.manifest.class_names, 3 if dataset.manifest.channels == 1 else dataset.manifest.channels
    out = []
    for row in chosen:
        group, at = dataset.read_group(row // group_rows), row % group_rows
        try:
            image_HWC = thumbnail(group.images[at], bands, max_side)
        except decode.UndecodableError as error:
            logger.warning("image %s cannot be decoded any more (%s)", group.keys[at], error)
            continue
        label = names[group.labels[at]] if group.labels is not None else ""
        out.append(Sample(image_HWC, group.keys[at], label))
    return out


def thumbnail(data: bytes, bands: int, max_side: int) -> Bytes:
    """An image as uint8 RGB (H, W, 3), at most `max_side` pixels wide and high; of many bands the first three.

    Raises:
        UndecodableError: not an image, cut short, damaged, or of another number of bands.
    """
    image_CHW = decode.decode(data, bands)
    image_CHW = image_CHW[:3] if bands >= 3 else image_CHW[[0, 0, 0]]
    height, width = image_CHW.shape[1:]
    scale = min(1.0, max_side / max(height, width))
    size_HW = (max(1, round(height * scale)), max(1, round(width * scale)))
    image_CHW = crop_resize(image_CHW, np.array((0, 0, height, width)), size_HW, flip=False)
    return image_CHW.permute(1, 2, 0).numpy()


class _Counts(NamedTuple):
    labels: Counter[int]
    short_sides: Counter[int]
    channels: Counter[int]


def _count(job: ColumnsJob) -> _Counts:
    table = read_columns(job)
    sides = np.minimum(table["width"].to_numpy(), table["height"].to_numpy())
    powers = 2 ** np.floor(np.log2(sides)).astype(np.int64)
    labels = table["label"].drop_null().to_pylist()
    return _Counts(Counter(labels), Counter(powers.tolist()), Counter(table["channels"].to_pylist()))


def _reasons(dataset: Dataset) -> Counter[str]:
    table = read_set_aside(dataset.storage, dataset.manifest)
    if table is None:
        return Counter()
    pairs = zip(table["reason"].to_pylist(), table["kind"].to_pylist(), strict=True)
    return Counter("duplicate" if kind == "duplicate" else str(reason) for reason, kind in pairs)
