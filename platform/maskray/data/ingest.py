"""Pictures to shards, in two passes: look at every image, then write shards; the manifest last.

Both passes are lists of small jobs given to a `Mapper`: threads here, Ray tasks in `on_ray/ingest.py`. The result does
not depend on which, nor on how many: the order is a permutation of the sorted keys, and sums are integers.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from maskray.config.schema import IngestConfig
from maskray.data import decode
from maskray.data.plan import permute
from maskray.data.shards import (
    MANIFEST,
    QUARANTINE,
    SPLITS,
    Manifest,
    PixelSums,
    Row,
    Shard,
    Split,
    SplitName,
    sha256_of,
    write_shard,
)
from maskray.data.sources import Entry, Source, open_source
from maskray.data.storage import TEMPORARY, Storage
from maskray.draws import Stream
from maskray.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int, str], None]
"""Called with (done, total, phase), images or shards."""

_CHUNK_IMAGES = 256
_SHOWN = 3
# Of red, green and blue in what the statistics are of; gray as ITU-R 601 has it, in thousandths.
_CHANNEL_WEIGHTS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (299, 587, 114))


class Mapper(Protocol):
    """Calls a function on each item, somewhere, and gives the results in the order of the items."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T], /) -> Iterable[R]:
        """Function and items must be picklable."""
        ...


def thread_mapper(threads: int) -> Mapper:
    """Jobs in threads of this process, with a bounded look-ahead."""

    def run(function: Callable[[T], R], items: Sequence[T], /) -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="maskray-ingest") as pool:
            try:
                for item in items:
                    pending.append(pool.submit(function, item))
                    if len(pending) > 2 * threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    return run


def ingest(config: IngestConfig, mapper: Mapper, progress: Progress | None = None) -> Manifest:
    """Make the dataset that `config` asks for, or recognise it where it is already there and whole.

    Raises:
        DataError: no such source, no images in it, too many that cannot be decoded, or another dataset at the
            destination.
        StorageError: the destination cannot be written.
    """
    report = progress or _no_progress
    storage = Storage(config.destination)
    source = open_source(config.source)
    existing = _existing(storage)
    if existing is not None:
        if existing.layout != _layout(config) or existing.group_rows != config.group_rows:
            raise _occupied(storage, existing)
        if existing.stamp == source.stamp and _is_whole(storage, existing, mapper, report):
            return existing
    storage.check_writable()

    survey = _survey(source, config, mapper, report)
    if existing is not None:
        if existing.content != survey.content:
            raise _occupied(storage, existing)
        if existing.stamp != source.stamp and _is_whole(storage, existing, mapper, report):
            return existing  # the same images, only copied or touched since
    manifest = _write(storage, source, survey, config, mapper, report)
    logger.info(
        "%s: %d images to train on, %d held out, %d set aside",
        *(storage.uri, manifest.splits["train"].rows, manifest.splits["held_out"].rows, manifest.num_quarantined),
    )
    return manifest


def _no_progress(done: int, total: int, phase: str) -> None:
    del done, total, phase


def _layout(config: IngestConfig) -> dict[str, Any]:
    return {
        "groups_per_shard": config.groups_per_shard,
        "held_out_fraction": config.held_out_fraction,
        "seed": config.seed,
    }


# ------------------------------------------------------------------------------------------------ what is there already


def _existing(storage: Storage) -> Manifest | None:
    """The manifest of the destination; None where it is empty or holds a half-written dataset."""
    try:
        return Manifest.load(storage.read_bytes(MANIFEST), storage.uri, key="destination")
    except FileNotFoundError:
        ours = {*SPLITS, QUARANTINE}
        foreign = [name for name in storage.list_names() if name not in ours and not name.startswith(".")]
        if foreign:
            raise DataError(
                "the folder holds other things than a dataset",
                key="destination",
                found=f"{', '.join(foreign[:_SHOWN])} in {storage.uri}",
                fix="take an empty or new folder",
            ) from None
        return None


def _occupied(storage: Storage, existing: Manifest) -> DataError:
    return DataError(
        "another dataset is already there",
        key="destination",
        found=f"{storage.uri}, made from {existing.source} with group_rows {existing.group_rows} and {existing.layout}",
        fix="take another destination, or delete that one",
    )


def _is_whole(storage: Storage, manifest: Manifest, mapper: Mapper, report: Progress) -> bool:
    shards = [shard for name in SPLITS for shard in manifest.splits[name].shards]
    jobs = [_VerifyJob(storage, shard) for shard in shards]
    whole = True
    for done, is_whole in enumerate(mapper(_verify, jobs), 1):
        report(done, len(jobs), "verify")
        if not is_whole:
            logger.warning("%s is damaged: it is written anew", storage.join(shards[done - 1].name))
            whole = False
    if whole:
        logger.info("%s is already there and whole: nothing to do", storage.uri)
    return whole


class _VerifyJob(NamedTuple):
    storage: Storage
    shard: Shard


def _verify(job: _VerifyJob) -> bool:
    try:
        return sha256_of(job.storage, job.shard.name) == job.shard.sha256
    except (FileNotFoundError, ValueError):
        return False


# ----------------------------------------------------------------------------------------------- first pass: the survey


class Seen(NamedTuple):
    """What the first pass learned of an image."""

    entry: Entry
    sha256: bytes
    width: int
    height: int
    bad: str | None
    """Why it is set aside."""


@dataclass(frozen=True)
class Survey:
    """What the first pass learned of a source."""

    good: dict[SplitName, list[Seen]]
    """In the order of keys."""
    bad: list[Seen]
    sums: PixelSums
    """Of the training split."""
    content: str


class _SurveyJob(NamedTuple):
    read: Callable[[Entry], bytes]
    entries: list[Entry]
    held_out_fraction: float
    max_pixels: int


class _SurveyPart(NamedTuple):
    seen: list[Seen]
    sums: PixelSums


def split_of(key: str, held_out_fraction: float) -> SplitName:
    """The split of a key: by its hash alone, so an image stays where it is when others come, whatever the seed."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return "held_out" if number < held_out_fraction * 2**64 else "train"


def _survey(source: Source, config: IngestConfig, mapper: Mapper, report: Progress) -> Survey:
    entries = sorted(source.entries)  # by key
    jobs = [
        _SurveyJob(source.read, entries[at : at + _CHUNK_IMAGES], config.held_out_fraction, config.max_pixels)
        for at in range(0, len(entries), _CHUNK_IMAGES)
    ]
    good: dict[SplitName, list[Seen]] = {name: [] for name in SPLITS}
    bad: list[Seen] = []
    sums, done = PixelSums(), 0
    content = hashlib.sha256()
    for part in mapper(_survey_part, jobs):
        sums, done = sums + part.sums, done + len(part.seen)
        for seen in part.seen:
            if seen.bad is not None:
                bad.append(seen)
                continue
            good[split_of(seen.entry.key, config.held_out_fraction)].append(seen)
            content.update(repr((seen.entry.key, seen.entry.label, seen.sha256.hex())).encode())
        report(done, len(entries), "check")
        if len(bad) > config.max_bad_fraction * len(entries):
            break  # and so let go of the mapper, which drops what is waiting
    if len(bad) > config.max_bad_fraction * len(entries):
        raise _too_many_bad(bad, done, len(entries), config.max_bad_fraction)
    if not good["train"]:
        raise DataError(
            "no image is left for the training split",
            key="source",
            found=f"{len(entries)} images, {len(bad)} set aside, {len(good['held_out'])} held out",
            fix="add images, or lower held_out_fraction",
        )
    return Survey(good, bad, sums, content.hexdigest())


def _too_many_bad(bad: list[Seen], done: int, total: int, max_bad_fraction: float) -> DataError:
    first = "; ".join(f"{seen.entry.key} ({seen.bad})" for seen in bad[:_SHOWN])
    return DataError(
        f"too many images cannot be decoded: {len(bad)} of the first {done} (there are {total})",
        key="max_bad_fraction",
        found=first,
        allowed=f"at most {max_bad_fraction:g} of all",
        fix="mend or remove them, or raise max_bad_fraction",
    )


def _survey_part(job: _SurveyJob) -> _SurveyPart:
    """Read, hash and fully decode each image of a chunk."""
    out, sums = [], PixelSums()
    for entry in job.entries:
        try:
            data = job.read(entry)
            decode.measure(data, job.max_pixels)
            image_CHW = decode.decode(data, 3)
        except (OSError, decode.UndecodableError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            out.append(Seen(entry, b"", 0, 0, reason))
            continue
        out.append(Seen(entry, hashlib.sha256(data).digest(), image_CHW.shape[2], image_CHW.shape[1], None))
        if split_of(entry.key, job.held_out_fraction) == "train":
            sums += _pixel_sums(image_CHW)
    return _SurveyPart(out, sums)


def _pixel_sums(image_CHW: torch.Tensor) -> PixelSums:
    """Exact sums of one image: whole numbers below 2**53 add without error in float64, in any order.

    By numpy and without a matrix product: those of torch and BLAS start threads of their own in every job.
    """
    pixels_CP = image_CHW.numpy().reshape(3, -1).astype(np.float64)
    values = tuple(int(x) for x in pixels_CP.sum(axis=1))
    rr, rg, rb, gg, gb, bb = (int((pixels_CP[i] * pixels_CP[j]).sum()) for i in range(3) for j in range(i, 3))
    return PixelSums(pixels_CP.shape[1], values, (rr, rg, rb, rg, gg, gb, rb, gb, bb))


# -------------------------------------------------------------------------------------------- second pass: the shards


class _ShardJob(NamedTuple):
    storage: Storage
    name: str
    read: Callable[[Entry], bytes]
    rows: list[Seen]
    group_rows: int


def _write(
    storage: Storage, source: Source, survey: Survey, config: IngestConfig, mapper: Mapper, report: Progress
) -> Manifest:
    jobs = [
        job for number, name in enumerate(SPLITS) for job in _shard_jobs(storage, source, survey, config, number, name)
    ]
    shards: dict[SplitName, list[Shard]] = {name: [] for name in SPLITS}
    for done, (job, shard) in enumerate(zip(jobs, mapper(_write_rows, jobs), strict=True), 1):
        shards["train" if job.name.startswith("train/") else "held_out"].append(shard)
        report(done, len(jobs), "write")
    _write_quarantine(storage, survey.bad)
    _remove_leftovers(storage, {job.name for job in jobs})
    statistics = [survey.sums.mean_std(weights) for weights in _CHANNEL_WEIGHTS]
    manifest = Manifest(
        group_rows=config.group_rows,
        layout=_layout(config),
        splits={
            name: Split(tuple(shards[name]), sum(s.width * s.height for s in survey.good[name])) for name in SPLITS
        },
        channels=1 if survey.sums.is_gray else 3,
        mean_rgb=tuple(mean for mean, _ in statistics[:3]),
        std_rgb=tuple(std for _, std in statistics[:3]),
        mean_gray=statistics[3][0],
        std_gray=statistics[3][1],
        class_names=source.class_names,
        num_quarantined=len(survey.bad),
        content=survey.content,
        source=config.source,
        stamp=source.stamp,
    )
    storage.write_bytes(MANIFEST, manifest.dump())
    return manifest


def _shard_jobs(
    storage: Storage, source: Source, survey: Survey, config: IngestConfig, number: int, split: SplitName
) -> Iterator[_ShardJob]:
    """Shard s takes rows [s·S, (s+1)·S) of a permutation of the split's images sorted by key."""
    good, length = survey.good[split], config.group_rows * config.groups_per_shard
    if not good:
        return
    order = permute(np.arange(len(good)), len(good), config.seed, number, Stream.INGEST)
    for index, at in enumerate(range(0, len(good), length)):
        rows = [good[i] for i in order[at : at + length]]
        yield _ShardJob(storage, f"{split}/{index:05d}.parquet", source.read, rows, config.group_rows)


def _write_rows(job: _ShardJob) -> Shard:
    return write_shard(job.storage, job.name, _rows(job), job.group_rows)


def _rows(job: _ShardJob) -> Iterator[Row]:
    for seen in job.rows:
        try:
            data = job.read(seen.entry)
        except OSError as error:
            raise _changed(seen, str(error)) from error
        if hashlib.sha256(data).digest() != seen.sha256:
            raise _changed(seen, "other bytes than a moment ago")
        yield Row(seen.entry.key, data, seen.entry.label, seen.width, seen.height)


def _changed(seen: Seen, found: str) -> DataError:
    return DataError(
        f"the source changed while it was read: {seen.entry.key}",
        found=found,
        fix="ingest again once it stays as it is",
    )


def _write_quarantine(storage: Storage, bad: list[Seen]) -> None:
    table = pa.table(
        {
            "key": pa.array([s.entry.key for s in bad], pa.string()),
            "reason": pa.array([s.bad for s in bad], pa.string()),
        }
    )
    with storage.open_output(QUARANTINE) as stream:
        pq.write_table(table, stream)


def _remove_leftovers(storage: Storage, wanted: set[str]) -> None:
    """Shards and partial files of an ingest that was killed here."""
    for split in SPLITS:
        for name in storage.list_names(split):
            if f"{split}/{name}" not in wanted and name.endswith(".parquet"):
                storage.delete(f"{split}/{name}")
    for name in storage.list_names():
        if name.startswith(TEMPORARY):
            storage.delete(name)
