"""Decoded whole images on a local disk, made once for a machine: each worker and each later launch maps the same file.

    <dataset>-<digest>/         named by all that the pixels depend on
        pixels.bin              one image after the other, (C, H, W) uint8; a black pixel for one that cannot be decoded
        index.parquet           of each row: key, height, width, whether it could be decoded, CRC-32 of its pixels
    <dataset>-<digest>.lock     held by who builds; the system opens it when that process dies

It is built whole before the first step, not filled during the first pass. So it has one writer, an order of its own
(that of rows) and one rename, and workers share nothing but the finished file. What that costs is that decoding does
not overlap with the first pass of training.

Anything in the folder may be deleted at any time: a process that has mapped a file keeps it, the next builds it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from maskray.config.load import fingerprint
from maskray.data.mapper import thread_mapper
from maskray.data.shards import Dataset, decoded_bytes
from maskray.data.storage import TEMPORARY, Storage
from maskray.data.stream import Images, decode_group
from maskray.errors import StorageError

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

FORMAT_VERSION = 1
PIXELS, INDEX = "pixels.bin", "index.parquet"
_INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("decoded", pa.bool_(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
    ]
)
_MOST_THREADS = 16
_VERIFIED_BYTES = 2**28
_POLL_SECONDS, _SAY_SECONDS = 0.1, 60.0
_GIB = 2**30


@dataclass(frozen=True)
class WholeImages:
    """The decoded images of all full row groups of the training split, in the order of rows. M rows."""

    pixels: torch.Tensor
    """uint8, one after the other: row m is (C, heights[m], widths[m]) from offsets[m] on. On the host or a device."""
    heights: Array
    """(M,) int64."""
    widths: Array
    """(M,) int64."""
    is_decoded: Array
    """(M,) bool; an image that could not be decoded is one black pixel."""
    keys: pa.ChunkedArray
    channels: int
    group_rows: int

    @cached_property
    def offsets(self) -> Array:
        """(M,) int64, in bytes."""
        sizes = self.heights * self.widths * self.channels
        return np.asarray(np.cumsum(sizes) - sizes)

    @property
    def num_bytes(self) -> int:
        """Of the pixels."""
        return int((self.heights * self.widths).sum()) * self.channels

    def to(self, device: torch.device) -> Self:
        """The same with the pixels on a device."""
        return replace(self, pixels=self.pixels.to(device))

    def rows(self, group: int) -> Array:
        """(R,) int64 row numbers of a row group."""
        return np.arange(group * self.group_rows, (group + 1) * self.group_rows)

    def keys_of(self, group: int) -> list[str]:
        """Of a row group's images."""
        return list(self.keys.slice(group * self.group_rows, self.group_rows).to_pylist())

    def images_of(self, group: int) -> Images:
        """A row group's images, views of the pixels: not to be written to."""
        return [self._image(row) if self.is_decoded[row] else None for row in self.rows(group)]

    def _image(self, row: int) -> torch.Tensor:
        first, shape = int(self.offsets[row]), (self.channels, int(self.heights[row]), int(self.widths[row]))
        return self.pixels[first : first + shape[0] * shape[1] * shape[2]].view(shape)


def cache_folder(configured: str | None) -> Path:
    """Where caches lie: `data.cache_folder`, or a folder of this user's below the system's temporary one."""
    if configured is None:
        return Path(tempfile.gettempdir()) / f"maskray-cache-{os.getuid()}"
    return Path(Storage(configured).uri)


def unheard() -> None:
    """Nobody listens for signs of life."""


def open_cache(dataset: Dataset, channels: int, folder: Path, beat: Callable[[], None] = unheard) -> WholeImages:
    """The dataset's training split, decoded; built first where that is missing or damaged.

    One process of a machine builds, the others wait and say so.

    Args:
        dataset: whose images.
        channels: that they have in the end.
        folder: where caches lie.
        beat: is called often while it is built, here or by another process: that may take many minutes, and is no
            hang. A builder that hangs is silent. It may raise.

    Raises:
        StorageError: the folder cannot be written, or the disk has no room.
        DataError: a shard is missing or damaged.
    """
    entry = folder / _name(dataset, channels)
    kept = _read(entry, dataset, channels)
    if kept is not None:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(entry.with_name(f"{entry.name}.lock"), beat):
            kept = _read(entry, dataset, channels)  # another process may have built it while this one waited
            if kept is None:
                _build(entry, dataset, channels, beat)
                kept = _read(entry, dataset, channels)
    except OSError as error:
        raise StorageError(
            f"cannot keep decoded images in {folder}", key="data.cache_folder", found=str(error), fix=_FIX
        ) from error
    if kept is None:
        raise StorageError("what was just written is damaged", key="data.cache_folder", found=str(entry), fix=_FIX)
    return kept


_FIX = "name a folder on a local disk with room for it, or set data.cache: none"


def _name(dataset: Dataset, channels: int) -> str:
    """Of the dataset and of whatever else its pixels depend on."""
    manifest = dataset.manifest
    pixels = {
        "format": FORMAT_VERSION,
        "dataset": manifest.fingerprint,
        # The fingerprint is of the images that were ingested; these are of the files that are there now.
        "shards": [asdict(shard) for shard in manifest.splits["train"].shards],
        "channels": channels,
        "decoders": {name: version(name) for name in ("torchcodec", "pillow")},
    }
    return f"{manifest.fingerprint}-{fingerprint(pixels)}"


@contextlib.contextmanager
def _alone(path: Path, beat: Callable[[], None]) -> Iterator[None]:
    """While the block runs, no other process of this machine is in one with the same path."""
    with path.open("ab") as file:
        start = said = time.monotonic()
        while not _locked(file):
            if said <= time.monotonic():
                logger.warning(
                    "Another process decodes the images into %s; waiting (%.0f s so far)",
                    path.with_suffix(""),
                    time.monotonic() - start,
                )
                said += _SAY_SECONDS
            beat()
            time.sleep(_POLL_SECONDS)
        yield


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- reading


def _read(entry: Path, dataset: Dataset, channels: int) -> WholeImages | None:
    """What is there; None where nothing is, or where it is damaged, which is said."""
    if not entry.exists():
        return None
    try:
        table = pq.read_table(entry / INDEX, page_checksum_verification=True)
        heights, widths, decoded = (table[name].to_numpy() for name in ("height", "width", "decoded"))
        num_bytes = (entry / PIXELS).stat().st_size
        images = WholeImages(
            # A private mapping: nothing that a process does reaches the file.
            pixels=torch.from_file(str(entry / PIXELS), shared=False, size=num_bytes, dtype=torch.uint8),
            heights=heights.astype(np.int64),
            widths=widths.astype(np.int64),
            is_decoded=decoded,
            keys=table["key"],
            channels=channels,
            group_rows=dataset.manifest.group_rows,
        )
        problem = _problem(images, table["crc32"].to_numpy(), dataset)
    except (OSError, RuntimeError, pa.ArrowException, KeyError) as error:
        problem = str(error)
    if problem is not None:
        logger.warning("The decoded images in %s are damaged (%s): they are built anew", entry, problem)
        return None
    if not images.is_decoded.all():
        logger.warning("%d images cannot be decoded: they count for nothing", (~images.is_decoded).sum())
    return images


def _problem(images: WholeImages, crc32: Array, dataset: Dataset) -> str | None:
    """The sizes are looked at, and the checksums of as many images, spread over the file, as are read in a moment."""
    num_rows = dataset.num_row_groups() * images.group_rows
    if len(images.heights) != num_rows:
        return f"{len(images.heights)} images, {num_rows} expected"
    if len(images.pixels) != images.num_bytes:
        return f"{len(images.pixels)} bytes, {images.num_bytes} expected"
    stride = -(-images.num_bytes // _VERIFIED_BYTES)
    for row in {*range(0, num_rows, stride), num_rows - 1}:
        if zlib.crc32(images._image(row).numpy().data) != crc32[row]:
            return f"the checksum of image {row} is wrong"
    return None


# ------------------------------------------------------------------------------------------------------------ building


class _Decoded(NamedTuple):
    keys: list[str]
    images: Images


def _build(entry: Path, dataset: Dataset, channels: int, beat: Callable[[], None]) -> None:
    """Decode and write; the folder appears whole or not at all. The caller holds the lock."""
    unfinished = entry.with_name(f"{TEMPORARY}{entry.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a builder that was killed
    _check_room(entry.parent, decoded_bytes(dataset, channels))
    logger.info("Decoding the %d images of %s into %s", dataset.num_rows(), dataset.storage.uri, entry)
    start = time.monotonic()
    unfinished.mkdir()
    try:
        with _synced(unfinished / PIXELS) as file:
            index = _write_pixels(file, dataset, channels, _Progress(dataset, entry, beat))
            num_bytes = file.tell()
        with _synced(unfinished / INDEX) as file:
            pq.write_table(index, file, write_page_checksum=True)
        shutil.rmtree(entry, ignore_errors=True)
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("Decoded %d images into %d bytes in %.1f s", len(index), num_bytes, time.monotonic() - start)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            "the disk has no room for the decoded images",
            key="data.cache_folder",
            found=f"{free / _GIB:.2f} GiB free in {folder}",
            allowed=f"at least {needed / _GIB:.2f} GiB",
            fix=f"delete what is not needed (older caches there may go at any time), or {_FIX}",
        )


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[Any]:
    """A new file, on the disk when the block ends: a rename may outlive a loss of power that its content does not."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


class _Progress:
    """Says how far it is: less and less often, the longer it takes."""

    def __init__(self, dataset: Dataset, entry: Path, beat: Callable[[], None]) -> None:
        self._num_rows, self._entry, self._beat = dataset.num_row_groups() * dataset.manifest.group_rows, entry, beat
        self._start, self._due_seconds = time.monotonic(), _SAY_SECONDS

    def __call__(self, num_rows: int) -> None:
        """So many are written."""
        self._beat()
        if (seconds := time.monotonic() - self._start) >= self._due_seconds:
            self._due_seconds = 2 * seconds
            share = num_rows / self._num_rows
            logger.warning(
                "%.0f %% of the %d images are decoded into %s (%.0f s so far, about %.0f s to go)",
                100 * share,
                self._num_rows,
                self._entry,
                seconds,
                seconds * (1 - share) / share,
            )


def _write_pixels(file: Any, dataset: Dataset, channels: int, progress: _Progress) -> pa.Table:
    """Write all images; their index."""
    # Every other process of this machine that wants the images waits, so this one takes all cores.
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    black = torch.zeros(channels, 1, 1, dtype=torch.uint8)
    rows = []
    for group in thread_mapper(threads)(partial(_decode, dataset, channels), range(dataset.num_row_groups())):
        for key, image in zip(group.keys, group.images, strict=True):
            pixels_CHW = (black if image is None else image).contiguous().numpy()
            file.write(pixels_CHW)
            rows.append((key, *pixels_CHW.shape[1:], image is not None, zlib.crc32(pixels_CHW.data)))
        progress(len(rows))
    columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), _INDEX_SCHEMA, strict=True)]
    return pa.Table.from_arrays(columns, schema=_INDEX_SCHEMA)


def _decode(dataset: Dataset, channels: int, number: int) -> _Decoded:
    group = dataset.read_group(number)
    return _Decoded(group.keys, decode_group(group, channels))
