"""The first pass of ingest: read, hash, decode and measure every image once, and re-encode it where that is asked for.

The images are looked at in chunks, in the order in which they are best read; what comes of it does not depend on that
order. A row is kept of each image, and no more than a chunk of images is held at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from maskray.config.schema import IngestConfig
from maskray.data import decode
from maskray.data.crop import crop_resize
from maskray.data.manifest import SPLITS, Bytes, Ints, PixelSums, SplitName, grid_of
from maskray.data.mapper import Mapper, Progress, read_ahead
from maskray.data.parts import Parts
from maskray.data.sources import Entry, Place, Source
from maskray.errors import DataError

CHUNK_IMAGES = 256
_SHOWN = 3
_COLOR = 3
_ALIKE = {1: 1, 2: 1, 3: 3, 4: 3}  # with alpha, or CMYK
_REMOTE_THREADS = 16  # that wait for an object store while one computes


class Verdict(IntEnum):
    """What the look at an image said. The numbers are stored."""

    GOOD = 0
    BAD = 1
    KNOWN = 2
    """The dataset that images are added to has it already."""
    CHANGED = 3
    """It has other bytes under this key."""


_SEEN = pa.schema(
    [
        pa.field("verdict", pa.int8()),
        pa.field("reason", pa.string()),  # why it is bad
        pa.field("sha256", pa.binary(32)),  # of the bytes as they came
        pa.field("stored", pa.binary(32)),  # of the bytes that go into the shard
        pa.field("height", pa.int32()),  # of the image in the shard
        pa.field("width", pa.int32()),
        pa.field("channels", pa.int16()),  # of the picture as it came, alpha included
        pa.field("bands", pa.int16()),  # that it is decoded to
        pa.field("gray", pa.bool_()),
        pa.field("pixels", pa.int32()),
        pa.field("values", pa.list_(pa.int64())),
        pa.field("squares", pa.list_(pa.int64())),
        pa.field("at", pa.int64()),  # where in the chunk's staging file; -1: they are read from the source again
        pa.field("size", pa.int32()),
    ]
)


class SetAside(NamedTuple):
    """An image that does not go into the dataset."""

    key: str
    reason: str
    place: Place
    kind: Literal["bad", "duplicate"]


@dataclass(frozen=True)
class Survey:
    """What the first pass learned of a source. Rows are numbers of entries, in the order of reading."""

    entries: list[Entry]
    columns: dict[str, np.ndarray[Any, Any]]
    """Of `_SEEN`, a value a row."""
    good: dict[SplitName, Ints]
    """Rows that go into the dataset, in the order of keys."""
    set_aside: list[SetAside]
    """In the order of keys."""
    skipped: int
    """Images that the dataset has already."""
    channels: int
    sums: PixelSums
    """Of the training split."""
    content: str
    chunk_images: int
    """Row r was looked at in chunk r // chunk_images."""

    def pixels(self, split: SplitName) -> int:
        """Sum of width × height over a split."""
        rows = self.good[split]
        return int((self.columns["height"][rows].astype(np.int64) * self.columns["width"][rows]).sum())


@dataclass(frozen=True)
class Present:
    """What the dataset has already, when images are added to it."""

    sha256: dict[str, bytes]
    """Of each key's picture as it came."""
    channels: int


def split_of(key: str, held_out_fraction: float) -> SplitName:
    """The split of a key: by its hash alone, so an image stays where it is when others come, whatever the seed."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return "held_out" if number < held_out_fraction * 2**64 else "train"


def read_threads(*places: str) -> int:
    """Threads that read for one that computes: more than one where a place is not a disk."""
    return _REMOTE_THREADS if any("://" in place for place in places) else 1


def survey(
    source: Source, config: IngestConfig, parts: Parts, mapper: Mapper, report: Progress, present: Present | None
) -> Survey:
    """Look at every image of a source.

    Raises:
        DataError: too many that cannot be decoded, none left to train on, or other bytes under a key that is there.
    """
    total, bad = len(source.entries), 0
    kept = parts.surveyed()
    done = sum(len(chunk) for number, chunk in _chunks(source.entries) if number in kept)
    report(done, total, "check")
    tables = []
    for number, table in enumerate(mapper(_survey_chunk, _jobs(source, config, parts, kept, present))):
        tables.append(table)
        done += 0 if number in kept else len(table)
        report(done, total, "check")
        bad += int((table["verdict"].to_numpy() == Verdict.BAD).sum())
        if bad > config.max_bad_fraction * total:
            break  # and so let go of the mapper, which drops what is waiting
    seen = pa.concat_tables(tables)
    if bad > config.max_bad_fraction * total:
        raise _too_many_bad(_bad(source.entries, seen), len(seen), total, config.max_bad_fraction)
    return _judged(source, config, seen, present)


# -------------------------------------------------------------------------------------------------------------- chunks


class _SurveyJob(NamedTuple):
    number: int
    is_kept: bool
    parts: Parts
    read: Callable[[Entry], bytes]
    entries: list[Entry]
    known: list[bytes | None]
    """SHA-256 of the picture that the dataset has under the key."""
    resize_short: int | None
    quality: int
    max_pixels: int
    keeps_bytes: bool
    """In the staging file, too, where they are those of the source: it would be slow to give them again."""
    threads: int


class _Seen(NamedTuple):
    """One image: a row of `_SEEN`."""

    verdict: Verdict
    reason: str | None = None
    sha256: bytes = bytes(32)
    stored: bytes = bytes(32)
    height: int = 0
    width: int = 0
    channels: int = 0
    bands: int = 0
    gray: bool = False
    pixels: int = 0
    values: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    at: int = -1
    size: int = 0


def _chunks(entries: list[Entry]) -> Iterator[tuple[int, list[Entry]]]:
    for number, at in enumerate(range(0, len(entries), CHUNK_IMAGES)):
        yield number, entries[at : at + CHUNK_IMAGES]


def _jobs(
    source: Source, config: IngestConfig, parts: Parts, kept: set[int], present: Present | None
) -> Iterator[_SurveyJob]:
    threads = read_threads(config.source)
    sha256 = present.sha256 if present is not None else {}
    for number, entries in _chunks(source.entries):
        known = [sha256.get(entry.key) for entry in entries]
        options = (config.resize_short, config.quality, config.max_pixels, not source.reads_at_random, threads)
        yield _SurveyJob(number, number in kept, parts, source.read, entries, known, *options)


def _survey_chunk(job: _SurveyJob) -> Any:
    """Look at each image of a chunk; what was learned is kept before it is returned."""
    table = job.parts.load_survey(job.number) if job.is_kept else None
    if table is not None:
        return table
    seen, staged, end = [], list[bytes](), 0
    for known, data in zip(job.known, read_ahead(partial(_fetch, job.read), job.entries, job.threads), strict=True):
        row, encoded = _look(data, known, job)
        if encoded is not None:
            row = row._replace(at=end, size=len(encoded))
            staged.append(encoded)
            end += len(encoded)
        seen.append(row)
    columns = [pa.array(c, f.type) for c, f in zip(zip(*seen, strict=True), _SEEN, strict=True)]
    table = pa.Table.from_arrays(columns, schema=_SEEN)
    job.parts.save_survey(job.number, table, b"".join(staged))
    return table


def _fetch(read: Callable[[Entry], bytes], entry: Entry) -> bytes | OSError:
    try:
        return read(entry)
    except OSError as error:
        return error


def _look(data: bytes | OSError, known: bytes | None, job: _SurveyJob) -> tuple[_Seen, bytes | None]:
    """What there is to know of an image, and its bytes where they are kept."""
    if isinstance(data, OSError):
        return _Seen(Verdict.BAD, data.strerror or str(data)), None
    sha256 = hashlib.sha256(data).digest()
    if known is not None:
        return _Seen(Verdict.KNOWN if sha256 == known else Verdict.CHANGED), None
    try:
        return _looked_into(data, sha256, job)
    except Exception as error:  # noqa: BLE001 - whatever is odd about one image, the others must not suffer for it
        return _Seen(Verdict.BAD, decode.reason_of(error)), None


def _looked_into(data: bytes, sha256: bytes, job: _SurveyJob) -> tuple[_Seen, bytes | None]:
    channels = decode.measure(data, job.max_pixels)[2]
    image_CHW = _decoded(data, channels)
    encoded = data if job.keeps_bytes else None
    if job.resize_short is not None and min(image_CHW.shape[1:]) > job.resize_short:
        image_CHW = shortened(image_CHW, job.resize_short)
        encoded = decode.encode(image_CHW, job.quality)
    grid_CP = grid_of(image_CHW.numpy())
    sums = PixelSums.of(grid_CP)
    seen = _Seen(
        verdict=Verdict.GOOD,
        sha256=sha256,
        stored=sha256 if encoded is None else hashlib.sha256(encoded).digest(),
        height=image_CHW.shape[1],
        width=image_CHW.shape[2],
        channels=channels,
        bands=len(image_CHW),
        gray=_is_gray(grid_CP) and _is_gray(image_CHW.numpy()),  # most show their colour on the grid
        pixels=sums.pixels,
        values=sums.values,
        squares=sums.squares,
    )
    return seen, encoded


def _decoded(data: bytes, channels: int) -> torch.Tensor:
    """Gray or colour without alpha where an image can be that, else all of its bands."""
    if channels in _ALIKE:
        try:
            return decode.decode(data, _ALIKE[channels])
        except decode.UndecodableError:
            if channels in (1, 3):
                raise
    return decode.decode(data, channels)


def shortened(image_CHW: torch.Tensor, short: int) -> torch.Tensor:
    """An image whose short side is larger, resized to `short` pixels there."""
    height, width = image_CHW.shape[1:]
    size_HW = (short, round(width * short / height)) if height <= width else (round(height * short / width), short)
    return crop_resize(image_CHW, np.array((0, 0, height, width)), size_HW, flip=False)


def _is_gray(pixels: Bytes) -> bool:
    """Whether all channels, along the first axis, are one."""
    return len(pixels) == 1 or (
        len(pixels) == 3 and np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[1], pixels[2])
    )


# ------------------------------------------------------------------------------------------------------------- verdict


def _judged(source: Source, config: IngestConfig, seen: Any, present: Present | None) -> Survey:
    """Which images go where. All that is decided here hangs on keys and contents, not on the order of reading."""
    entries = source.entries
    columns = {f.name: seen[f.name].to_numpy() for f in _SEEN if not pa.types.is_list(f.type)}
    order = sorted(range(len(entries)), key=lambda row: entries[row].key)
    _refuse_changed([entries[row].key for row in order if columns["verdict"][row] == Verdict.CHANGED])
    channels = _usual_channels(columns) if present is None else present.channels
    bad = _bad(entries, seen) | _of_other_channels(entries, columns, channels)
    if len(bad) > config.max_bad_fraction * len(entries):
        raise _too_many_bad(bad, len(entries), len(entries), config.max_bad_fraction)
    left = [row for row in order if columns["verdict"][row] == Verdict.GOOD and row not in bad]
    copies = _duplicates(entries, columns["sha256"], left, present) if config.deduplicate else {}
    good: dict[SplitName, list[int]] = {name: [] for name in SPLITS}
    content = hashlib.sha256()
    for row in (row for row in left if row not in copies):
        good[split_of(entries[row].key, config.held_out_fraction)].append(row)
        content.update(repr((entries[row].key, entries[row].label, columns["stored"][row].hex())).encode())
    rows = {name: np.array(good[name], dtype=np.int64) for name in SPLITS}
    return Survey(
        entries=entries,
        columns=columns,
        good=rows,
        set_aside=sorted((bad | copies).values()),
        skipped=int((columns["verdict"] == Verdict.KNOWN).sum()),
        channels=1 if channels == _COLOR and columns["gray"][rows["train"]].all() else channels,
        sums=_sums(seen, rows["train"], channels),
        content=content.hexdigest(),
        chunk_images=CHUNK_IMAGES,
    )


def _kind_of_channels(columns: dict[str, Any]) -> Ints:
    """What images are alike in: gray and colour ones are converted to each other, others to nothing."""
    return np.where(columns["bands"] == 1, _COLOR, columns["bands"])


def _usual_channels(columns: dict[str, Any]) -> int:
    kinds = _kind_of_channels(columns)[columns["verdict"] == Verdict.GOOD]
    return int(np.bincount(kinds).argmax()) if len(kinds) else _COLOR


def _bad(entries: list[Entry], seen: Any) -> dict[int, SetAside]:
    rows = np.flatnonzero(seen["verdict"].to_numpy() == Verdict.BAD)
    reasons = seen["reason"].take(rows).to_pylist()
    return {
        int(row): SetAside(entries[row].key, reason, entries[row].place, "bad")
        for row, reason in zip(rows, reasons, strict=True)
    }


def _of_other_channels(entries: list[Entry], columns: dict[str, Any], channels: int) -> dict[int, SetAside]:
    rows = np.flatnonzero((columns["verdict"] == Verdict.GOOD) & (_kind_of_channels(columns) != channels))
    out = {}
    for row in rows.tolist():
        reason = f"{columns['bands'][row]} channels, where the dataset's images have {channels}"
        out[row] = SetAside(entries[row].key, reason, entries[row].place, "bad")
    return out


def _duplicates(entries: list[Entry], sha256: Any, rows: list[int], present: Present | None) -> dict[int, SetAside]:
    """Rows whose bytes another key has: one of the dataset's, or an earlier one."""
    there = present.sha256 if present is not None else {}
    first = {there[key]: key for key in sorted(there, reverse=True)}
    out = {}
    for row in rows:
        entry = entries[row]
        key = first.setdefault(sha256[row], entry.key)
        if key != entry.key:
            out[row] = SetAside(entry.key, f"duplicate of {key}", entry.place, "duplicate")
    return out


def _sums(seen: Any, rows: Ints, channels: int) -> PixelSums:
    num = _COLOR + 1 if channels == _COLOR else channels
    chosen = seen.select(["pixels", "values", "squares"]).take(rows).combine_chunks()
    lists = (
        pa.concat_arrays(chosen[name].chunks or [pa.array([], pa.list_(pa.int64()))]) for name in ("values", "squares")
    )
    return PixelSums.total(
        chosen["pixels"].to_numpy().astype(np.int64), *(each.flatten().to_numpy().reshape(-1, num) for each in lists)
    )


def _refuse_changed(keys: list[str]) -> None:
    if keys:
        raise DataError(
            f"{len(keys)} images have other bytes than those that the dataset has under the same keys",
            key="source",
            found=", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else ""),
            fix="give the changed images new names, or ingest all into a new destination",
        )


def _too_many_bad(bad: dict[int, SetAside], done: int, total: int, max_bad_fraction: float) -> DataError:
    first = "; ".join(f"{image.key} ({image.reason})" for image in sorted(bad.values())[:_SHOWN])
    return DataError(
        f"too many images cannot be used: {len(bad)} of the first {done} (there are {total})",
        key="max_bad_fraction",
        found=first,
        allowed=f"at most {max_bad_fraction:g} of all",
        fix="mend or remove them, or raise max_bad_fraction: what was looked at is kept",
    )
