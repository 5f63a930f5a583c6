"""The second pass of ingest: which image lies in which row, and the shards written.

Shard s of a split takes rows [s·S, (s+1)·S) of a permutation of its images sorted by key. Images that are added later
come in shards of their own, before which the rows of a short last row group are written again: so every row group but
the split's last is full, and the shards that were there stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from maskray.config.schema import IngestConfig
from maskray.data.manifest import SPLITS, Ints, Manifest, Shard, SplitName
from maskray.data.mapper import Mapper, Progress, read_ahead
from maskray.data.parts import Parts
from maskray.data.plan import permute
from maskray.data.shards import Row, write_shard
from maskray.data.sources import Entry
from maskray.data.survey import Survey
from maskray.draws import Stream
from maskray.errors import DataError


class Carried(NamedTuple):
    """The rows of a short last row group, which are written again."""

    shard: Shard
    first: int
    """Row of the shard that it begins with."""

    @property
    def rows(self) -> int:
        """How many."""
        return self.shard.rows - self.first


class Planned(NamedTuple):
    """A shard to be written."""

    name: str
    split: SplitName
    carried: Carried | None
    rows: Ints
    """Of the survey."""

    @property
    def num_rows(self) -> int:
        """Of the shard."""
        return len(self.rows) + (self.carried.rows if self.carried is not None else 0)


class Work(NamedTuple):
    """What shards are made of."""

    survey: Survey
    read: Callable[[Entry], bytes]
    parts: Parts
    group_rows: int
    threads: int
    """That read for one shard."""


def plan_shards(
    survey: Survey, config: IngestConfig, base: Manifest | None, kept: Collection[Manifest]
) -> list[Planned]:
    """The shards to write.

    Args:
        survey: of the images.
        config: says how long a shard is.
        base: what the images are added to.
        kept: the versions that there are still, whose shards keep their names.
    """
    planned = []
    # Each version has permutations of its own; a dataset's first are those of pass 0 and 1.
    first_pass = len(SPLITS) * (len(base.origins) if base is not None else 0)
    for index, split in enumerate(SPLITS):
        images = survey.good[split]
        if not len(images):
            continue
        order = permute(np.arange(len(images)), len(images), config.seed, first_pass + index, Stream.INGEST)
        number = 1 + max((_number(s) for m in kept for s in m.splits[split].shards), default=-1)
        carried = _short_group(base, split)
        length, at = config.group_rows * config.groups_per_shard, 0
        while at < len(images):
            end = at + length - (carried.rows if carried is not None else 0)
            planned.append(Planned(f"{split}/{number:05d}.parquet", split, carried, images[order[at:end]]))
            number, at, carried = number + 1, end, None
    return planned


def kept_shards(base: Manifest | None, split: SplitName, *, is_added_to: bool) -> tuple[Shard, ...]:
    """The shards of a split that a new version has in common with the last: without rows that are written again."""
    if base is None:
        return ()
    shards = base.splits[split].shards
    short = _short_group(base, split) if is_added_to else None
    if short is None:
        return shards
    return (*shards[:-1], *([replace(short.shard, rows=short.first)] if short.first else []))


def write_shards(
    planned: list[Planned], whole: dict[str, Shard], work: Work, mapper: Mapper, report: Progress
) -> dict[str, Shard]:
    """Write what is planned; all of it by name.

    Args:
        planned: the shards.
        whole: those that are there already. Others may be, by the notes of an ingest that was killed.
        work: what they are made of.
        mapper: does it.
        report: is told of rows.

    Raises:
        DataError: the source changed since it was looked at.
        StorageError: a shard cannot be written.
    """
    contents = {shard.name: _content(shard, work.survey) for shard in planned if shard.name not in whole}
    whole = whole | _noted(work.parts, contents)
    total, done = sum(shard.num_rows for shard in planned), sum(shard.rows for shard in whole.values())
    report(done, total, "write")
    missing = [shard for shard in planned if shard.name not in whole]
    jobs = (_job(shard, contents[shard.name], work) for shard in missing)
    for shard in mapper(_write_rows, jobs):
        whole[shard.name] = shard
        done += shard.rows
        report(done, total, "write")
    return whole


def _number(shard: Shard) -> int:
    return int(shard.name.rpartition("/")[2].removesuffix(".parquet"))


def _short_group(base: Manifest | None, split: SplitName) -> Carried | None:
    if base is None or not base.splits[split].rows % base.group_rows:
        return None
    last = base.splits[split].shards[-1]
    return Carried(last, last.rows // base.group_rows * base.group_rows)


def _content(shard: Planned, survey: Survey) -> str:
    """Digest of what goes into a shard: a note of it holds only as long as that is the same."""
    digest = hashlib.sha256(repr(shard.carried).encode())
    for row in shard.rows.tolist():
        digest.update(survey.entries[row].key.encode() + survey.columns["stored"][row])
    return digest.hexdigest()


def _noted(parts: Parts, contents: dict[str, str]) -> dict[str, Shard]:
    """The shards that an ingest which was killed had written whole, with what is to go into them."""
    sizes = {f"{split}/{n}": size for split in SPLITS for n, size in parts.storage.list_sizes(split).items()}
    out = {}
    for name, content in contents.items():
        note = parts.load_shard(name) if name in sizes else None
        if note is not None and note[1] == content and note[0].size == sizes[name]:
            out[name] = note[0]
    return out


# ---------------------------------------------------------------------------------------------------------- one shard


class _Image(NamedTuple):
    """An image on its way into a shard."""

    entry: Entry
    sha256: bytes
    stored: bytes
    height: int
    width: int
    channels: int
    chunk: int
    at: int
    size: int


class _ShardJob(NamedTuple):
    name: str
    content: str
    parts: Parts
    read: Callable[[Entry], bytes]
    carried: Carried | None
    images: list[_Image]
    group_rows: int
    threads: int


def _job(shard: Planned, content: str, work: Work) -> _ShardJob:
    entries, rows = work.survey.entries, shard.rows
    names = ("sha256", "stored", "height", "width", "channels", "at", "size")
    columns = {name: work.survey.columns[name][rows].tolist() for name in names}
    places = (columns.pop("at"), columns.pop("size"))
    chunks = (rows // work.survey.chunk_images).tolist()
    images = [
        _Image(entries[row], *rest)
        for row, *rest in zip(rows.tolist(), *columns.values(), chunks, *places, strict=True)
    ]
    return _ShardJob(shard.name, content, work.parts, work.read, shard.carried, images, work.group_rows, work.threads)


def _write_rows(job: _ShardJob) -> Shard:
    new = read_ahead(partial(_row, job.parts, job.read), job.images, job.threads)
    shard = write_shard(job.parts.storage, job.name, chain(_carried_rows(job), new), job.group_rows)
    job.parts.save_shard(shard, job.content)
    return shard


def _row(parts: Parts, read: Callable[[Entry], bytes], image: _Image) -> Row:
    data = _read_staged(parts, image) if image.at >= 0 else _read_again(read, image)
    entry = image.entry
    return Row(entry.key, data, entry.label, image.width, image.height, image.channels, image.sha256)


def _read_staged(parts: Parts, image: _Image) -> bytes:
    try:
        data = parts.read_staged(image.chunk, image.at, image.size)
    except OSError as error:
        raise _damaged(parts, str(error)) from error
    if hashlib.sha256(data).digest() != image.stored:
        raise _damaged(parts, f"other bytes than were staged of {image.entry.key}")
    return data


def _read_again(read: Callable[[Entry], bytes], image: _Image) -> bytes:
    try:
        data = read(image.entry)
    except OSError as error:
        raise _changed(image, str(error)) from error
    if hashlib.sha256(data).digest() != image.stored:
        raise _changed(image, "other bytes than a moment ago")
    return data


def _damaged(parts: Parts, found: str) -> DataError:
    return DataError(
        f"a part of this ingest in {parts.place} is damaged", found=found, fix="delete that folder, and ingest again"
    )


def _carried_rows(job: _ShardJob) -> Iterator[Row]:
    if job.carried is None:
        return
    with (
        job.parts.storage.open_input_file(job.carried.shard.name) as source,
        pq.ParquetFile(source, page_checksum_verification=True) as file,
    ):
        for row in file.read_row_group(job.carried.first // job.group_rows, use_threads=False).to_pylist():
            yield Row(**row)


def _changed(image: _Image, found: str) -> DataError:
    return DataError(
        f"the source changed while it was read: {image.entry.key}",
        found=found,
        fix="ingest again once it stays as it is",
    )
