"""A dataset on disk: Parquet shards and the manifest that is written last.

    manifest.json          what there is: shards with sizes and checksums, statistics, class names, fingerprint
    versions/              the manifest of each version under its fingerprint, so that an older one can be opened,
                           and what it set aside
    train/00000.parquet    rows in row groups of exactly G (the split's last may be short)
    held_out/00000.parquet rows that pretraining never sees
    quarantine.parquet     each image that the newest set aside: key, reason, where it lies, if it is bad or a duplicate

A folder without a manifest does not exist: a killed writer leaves nothing that could be read by mistake.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskray.config.resolve import DatasetFacts
from maskray.data.manifest import (
    KEY,
    MANIFEST,
    SPLITS,
    VERSIONS,
    Ints,
    Manifest,
    Shard,
    SplitName,
    kept_versions,
    newest,
)
from maskray.data.row_groups import ParquetPlace, read_row_group
from maskray.data.storage import Storage
from maskray.errors import DataError

logger = logging.getLogger(__name__)

SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("channels", pa.int16(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
    ]
)


# ------------------------------------------------------------------------------------------------------------- writing


class Row(NamedTuple):
    """One image of a shard."""

    key: str
    image: bytes
    label: int | None
    width: int
    height: int
    channels: int
    """Of the picture as it came."""
    sha256: bytes
    """Of the picture as it came: its bytes may have been re-encoded since."""


def write_shard(storage: Storage, name: str, rows: Iterable[Row], group_rows: int) -> Shard:
    """Write rows as one Parquet file of row groups of exactly `group_rows`; it appears whole or not at all."""
    num_rows = 0
    with storage.open_output(name) as stream:
        sink = _HashingSink(stream)
        # The images are compressed already; dictionaries and statistics over them would only cost.
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(sink, SHARD_SCHEMA, write_page_checksum=True, **options) as writer:
            for group in _groups(rows, group_rows):
                columns = [pa.array(c, f.type) for c, f in zip(zip(*group, strict=True), SHARD_SCHEMA, strict=True)]
                writer.write_table(pa.Table.from_arrays(columns, schema=SHARD_SCHEMA), row_group_size=group_rows)
                num_rows += len(group)
    return Shard(name, num_rows, sink.size, sink.digest.hexdigest())


def _groups(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class _HashingSink:
    """The file that pyarrow writes a shard to: counts and hashes what passes, so nothing is read back."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.size, self.digest, self.closed = stream, 0, hashlib.sha256(), False

    def write(self, data: Any) -> int:
        self._stream.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Left to the stream below."""

    def close(self) -> None:
        self.closed = True

    def writable(self) -> bool:
        return True


def sha256_of(storage: Storage, name: str) -> str:
    """SHA-256 of a file. Raises as `Storage.read_range` does."""
    digest = hashlib.sha256()
    for piece in storage.read_pieces(name):
        digest.update(piece)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


class Group(NamedTuple):
    """One row group. N rows."""

    rows: Ints
    """(N,) row numbers in the split."""
    keys: list[str]
    images: list[bytes]
    """Encoded."""
    labels: Ints | None
    """(N,), or None where the dataset has none."""


class Dataset:
    """A finished dataset, open for reading. Picklable; reads from any number of threads."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage, self.manifest = storage, manifest
        self._first_group: dict[str, list[int]] = {}
        self._first_row: dict[str, list[int]] = {}
        for name, split in manifest.splits.items():
            groups, rows = [0], [0]
            for shard in split.shards:
                groups.append(groups[-1] - (-shard.rows // manifest.group_rows))
                rows.append(rows[-1] + shard.rows)
            self._first_group[name], self._first_row[name] = groups, rows

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.storage, self.manifest)

    @staticmethod
    def open(path: str, version: str | None = None, *, unreadable: Literal["stop", "skip"] = "stop") -> Dataset:
        """The dataset at a folder or URI, after a look at each shard's size.

        Args:
            path: where it lies.
            version: its fingerprint; None takes the newest.
            unreadable: "skip" only warns of a shard that is missing or of another size.

        Raises:
            DataError: no such folder; no manifest; no such version; another schema version; a manifest that was
                changed; a shard that is missing or of another size.
            StorageError: it cannot be read.
        """
        storage = Storage(path)
        manifest = newest(storage)
        if manifest is None:
            raise no_manifest(storage)
        if version is not None and version != manifest.fingerprint:
            manifest = _older(storage, version, manifest)
        dataset = Dataset(storage, manifest)
        for problem in dataset._wrong_sizes():
            if unreadable == "stop":
                raise problem
            logger.warning("%s", problem)
        return dataset

    def facts(self) -> DatasetFacts:
        """What the config must know."""
        return DatasetFacts(
            fingerprint=self.manifest.fingerprint,
            group_rows=self.manifest.group_rows,
            num_row_groups=self.num_row_groups(),
            num_rows=self.num_rows(),
        )

    def num_rows(self, split: SplitName = "train") -> int:
        """Rows of a split, left-over ones included."""
        return self._first_row[split][-1]

    def num_row_groups(self, split: SplitName = "train") -> int:
        """Full row groups of a split: what a pass is made of."""
        return self.num_rows(split) // self.manifest.group_rows

    def groups_of(self, rows: Ints, split: SplitName = "train") -> Ints:
        """(N,) numbers of the row groups that hold rows of a split."""
        shards = np.searchsorted(self._first_row[split], rows, side="right") - 1
        within = (rows - np.array(self._first_row[split])[shards]) // self.manifest.group_rows
        return np.array(self._first_group[split])[shards] + within  # type: ignore[no-any-return]

    def labels(self, split: SplitName, max_rows: int | None = None) -> Ints:
        """(N,) labels of a split's first `max_rows` rows, or of all. Raises as `read_columns` does."""
        tables = [read_columns(ColumnsJob(self.storage, s, ("label",))) for s in self.manifest.splits[split].shards]
        found = [table["label"].to_numpy() for table in tables]
        return np.concatenate([*found, np.empty(0, np.int64)])[:max_rows].astype(np.int64)

    def read_group(self, group: int, split: SplitName = "train") -> Group:
        """One row group, by a read of its range alone; every page's checksum is verified.

        Raises:
            DataError: the shard is missing or damaged.
            UnreachableError: the object store did not answer, however often it was asked.
            StorageError: the storage refuses to be read.
        """
        shard, within, first_row = self._locate(group, split)
        try:
            table = self._read(shard, within)
        except OSError as error:
            raise self._damaged(shard, f"row group {within} of {shard.name} cannot be read", str(error)) from error
        labels = table["label"].to_numpy() if self.manifest.class_names else None
        return Group(
            rows=np.arange(first_row, first_row + table.num_rows),
            keys=table["key"].to_pylist(),
            images=table["image"].to_pylist(),
            labels=None if labels is None else labels.astype(np.int64),
        )

    def slots(self, group: int, split: SplitName = "train") -> tuple[Ints, list[str]]:
        """Row numbers of a row group that cannot be read, and stand-ins for its keys, `shard#row`: always the same."""
        shard, within, first_row = self._locate(group, split)
        first = within * self.manifest.group_rows
        num_rows = min(self.manifest.group_rows, shard.rows - first)
        return np.arange(first_row, first_row + num_rows), [f"{shard.name}#{first + i}" for i in range(num_rows)]

    def _locate(self, group: int, split: SplitName) -> tuple[Shard, int, int]:
        """The shard that holds a row group, its number there, and the number of its first row in the split."""
        index = bisect_right(self._first_group[split], group) - 1
        within = group - self._first_group[split][index]
        first_row = self._first_row[split][index] + within * self.manifest.group_rows
        return self.manifest.splits[split].shards[index], within, first_row

    def iter_groups(self, split: SplitName = "train") -> Iterator[Group]:
        """All row groups in the order of rows, the short last one included."""
        for group in range(self._first_group[split][-1]):
            yield self.read_group(group, split)

    def check(self, max_bytes: int | None = None) -> int:
        """Compare checksums of the first shard, and of others up to `max_bytes` in all; the number of bytes compared.

        Raises:
            DataError: a shard is not as it was written.
            UnreachableError: the object store did not answer, however often it was asked.
            StorageError: the storage refuses to be read.
        """
        done = 0
        for shard in self.manifest.shards:
            if max_bytes is not None and done and done + shard.size > max_bytes:
                break
            try:
                found = sha256_of(self.storage, shard.name)
            except OSError as error:
                raise self._damaged(shard, f"{shard.name} cannot be read", str(error)) from error
            if found != shard.sha256:
                raise self._damaged(shard, f"the checksum of {shard.name} is wrong", found)
            done += shard.size
        return done

    def _read(self, shard: Shard, group: int) -> Any:
        chunks = len(SHARD_SCHEMA) * -(-shard.rows // self.manifest.group_rows)
        file = ParquetPlace(self.storage, shard.name, shard.size, shard.sha256, chunks)
        return read_row_group(file, group, ("key", "image", "label"))

    def _wrong_sizes(self) -> Iterator[DataError]:
        sizes = {f"{split}/{n}": s for split in SPLITS for n, s in self.storage.list_sizes(split).items()}
        for shard in self.manifest.shards:
            size = sizes.get(shard.name)
            if size is None:
                yield self._damaged(shard, f"{shard.name} is missing")
            elif size != shard.size:
                yield self._damaged(shard, f"{shard.name} has another size", f"{size} bytes, {shard.size} expected")

    def _damaged(self, shard: Shard, problem: str, found: str | None = None) -> DataError:
        place = self.storage.join(shard.name)
        fix = (
            f"ingest again into {self.storage.uri} (it writes damaged shards anew), restore {place} from a copy, "
            "or train without its images (data.unreadable: skip)"
        )
        return DataError(f"{self.storage.uri}: {problem}", key=KEY, found=found or place, fix=fix)


def _older(storage: Storage, version: str, last: Manifest) -> Manifest:
    try:
        return Manifest.load(storage.read_bytes(f"{VERSIONS}/{version}.json"), storage.join(VERSIONS, version))
    except FileNotFoundError:
        others = [kept for kept in kept_versions(storage) if kept != last.fingerprint]
        raise DataError(
            f"{storage.uri} has no such version",
            key="data.version",
            found=version,
            allowed=", ".join([last.fingerprint, *others]),
            fix="take one of these, or null for the newest",
        ) from None


def no_manifest(storage: Storage) -> DataError:
    """What is wrong with a place that holds no dataset."""
    if not storage.exists():
        return DataError(
            "there is no such dataset",
            key=KEY,
            found=storage.uri,
            fix=f"check the path, or make it: maskray ingest SOURCE {storage.uri}",
        )
    return DataError(
        f"there is no {MANIFEST}: this is no dataset, or its ingest did not finish",
        key=KEY,
        found=storage.uri,
        fix=f"ingest again: maskray ingest SOURCE {storage.uri}",
    )


def decoded_bytes(dataset: Dataset, channels: int, split: SplitName = "train") -> int:
    """Bytes that a split takes in memory as decoded whole images: for `stream: auto`."""
    return dataset.manifest.splits[split].pixels * channels


class ColumnsJob(NamedTuple):
    """Some columns of a shard."""

    storage: Storage
    shard: Shard
    names: tuple[str, ...]


def read_columns(job: ColumnsJob) -> Any:
    """Columns of a shard's rows as a table, without a look at the images.

    Raises:
        DataError: the shard is missing or damaged.
    """
    try:
        source = job.storage.open_input_file(job.shard.name)
        with source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            return file.read(columns=list(job.names), use_threads=False).slice(0, job.shard.rows)
    except (OSError, pa.ArrowException) as error:
        place = job.storage.join(job.shard.name)
        raise DataError(f"{place} cannot be read", found=str(error), fix="restore it from a copy") from error
