"""A dataset on disk: Parquet shards and the manifest that is written last.

    manifest.json          what there is: shards with sizes and checksums, statistics, class names, fingerprint
    train/00000.parquet    rows in row groups of exactly G (the split's last may be short); the images as they came
    held_out/00000.parquet rows that pretraining never sees
    quarantine.parquet     key and reason of each image that was set aside

A folder without a manifest does not exist: a killed writer leaves nothing that could be read by mistake.
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from math import sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskray.config.load import fingerprint
from maskray.config.resolve import DatasetFacts
from maskray.data.row_groups import ParquetPlace, read_row_group
from maskray.data.storage import Storage
from maskray.errors import DataError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
KEY = "data.path"
"""The key that errors name: who reads a dataset trains on it."""
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
SplitName = Literal["train", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "held_out")
SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
Ints = np.ndarray[Any, np.dtype[np.int64]]

_CHUNK_BYTES = 8 * 2**20
# Where a dataset lies and when its files were touched says nothing about what is in it; nor do the sizes and checksums
# of shards, in whose footers pyarrow writes its version: `content` is over the images themselves.
_NOT_IDENTITY = ("fingerprint", "source", "stamp")
_NOT_IDENTITY_OF_A_SHARD = ("size", "sha256")


# ------------------------------------------------------------------------------------------------------------ manifest


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    name: str
    """Relative to the dataset."""
    rows: int
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    shards: tuple[Shard, ...]
    pixels: int
    """Sum of width × height over its images."""

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(s.rows for s in self.shards)


@dataclass(frozen=True)
class PixelSums:
    """Exact sums over pixels: what mean, std and grayness follow from, whatever the order of adding."""

    pixels: int = 0
    values: tuple[int, ...] = (0,) * 3
    """Σ x over the pixels, for each of red, green and blue."""
    products: tuple[int, ...] = (0,) * 9
    """Σ x·y for each pair of channels, row by row."""

    def __add__(self, other: PixelSums) -> PixelSums:
        return PixelSums(
            self.pixels + other.pixels,
            tuple(a + b for a, b in zip(self.values, other.values, strict=True)),
            tuple(a + b for a, b in zip(self.products, other.products, strict=True)),
        )

    @property
    def is_gray(self) -> bool:
        """Whether red, green and blue are equal in every pixel: Σ (x - y)² = 0."""
        p = self.products
        return p[0] - 2 * p[1] + p[4] == 0 and p[4] - 2 * p[5] + p[8] == 0

    def mean_std(self, weights: tuple[int, int, int]) -> tuple[float, float]:
        """Mean and std in 0..1 units of the weighted mean of the channels. All exact up to the last division."""
        n, unit = self.pixels, 255 * sum(weights)
        total = sum(w * v for w, v in zip(weights, self.values, strict=True))
        squares = sum(weights[i] * weights[j] * self.products[3 * i + j] for i in range(3) for j in range(3))
        return total / (n * unit), sqrt((n * squares - total * total) / (n * n)) / unit


@dataclass(frozen=True)
class Manifest:
    """What a dataset is."""

    group_rows: int
    layout: dict[str, Any]
    """What else decided on which row lies where: shard length, seed, held-out fraction."""
    splits: dict[str, Split]
    channels: int
    """1 if all images of the training split are gray, else 3."""
    mean_rgb: tuple[float, ...]
    """Of the training split, in 0..1 units."""
    std_rgb: tuple[float, ...]
    mean_gray: float
    std_gray: float
    class_names: tuple[str, ...]
    num_quarantined: int
    content: str
    """SHA-256 over keys, labels and the images' own SHA-256, in the order of keys."""
    source: str
    stamp: str
    """The source's stamp when it was read."""
    schema_version: int = SCHEMA_VERSION
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self.expected_fingerprint())

    def expected_fingerprint(self) -> str:
        """Digest over all but where and when."""
        plain = json.loads(json.dumps(asdict(self)))
        for split in plain["splits"].values():
            for shard, key in product(split["shards"], _NOT_IDENTITY_OF_A_SHARD):
                del shard[key]
        return fingerprint({k: v for k, v in plain.items() if k not in _NOT_IDENTITY})

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of each channel in 0..1 units, for images converted to `channels`. No std is below 1/255.

        Raises:
            DataError: the images cannot be converted to so many.
        """
        if channels not in (1, 3):
            raise DataError(
                "gray and colour images are not converted to so many channels",
                key="data.channels",
                found=channels,
                allowed="1 or 3",
            )
        mean, std = (self.mean_rgb, self.std_rgb) if channels == 3 else ((self.mean_gray,), (self.std_gray,))
        return mean, tuple(max(s, 1 / 255) for s in std)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each of the dataset's own channels."""
        return self.statistics(self.channels)[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Std of each of the dataset's own channels."""
        return self.statistics(self.channels)[1]

    def dump(self) -> bytes:
        """As JSON."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @staticmethod
    def load(content: bytes, place: str, key: str = KEY) -> Manifest:
        """From JSON.

        Args:
            content: of the file.
            place: of the dataset.
            key: that names the place.

        Raises:
            DataError: of another schema version, or not as it was written.
        """
        again = f"delete {place} and ingest again"
        try:
            raw = json.loads(content)
            version = raw["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"the manifest of {place} cannot be read", key=key, found=str(error), fix=again) from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{place} was written with another schema version",
                key=key,
                found=version,
                allowed=f"{SCHEMA_VERSION} (this version of maskray)",
                fix="ingest again, or use the version of maskray that wrote it",
            )
        try:
            manifest = _manifest_from(raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the manifest of {place} is incomplete", key=key, found=repr(error), fix=again) from error
        expected = manifest.expected_fingerprint()
        if manifest.fingerprint != expected:
            raise DataError(
                f"the manifest of {place} was changed after it was written",
                key=key,
                found=f"fingerprint {manifest.fingerprint}, content {expected}",
                fix=again,
            )
        return manifest


def _manifest_from(raw: dict[str, Any]) -> Manifest:
    splits = {
        name: Split(tuple(Shard(**s) for s in split["shards"]), split["pixels"])
        for name, split in raw["splits"].items()
    }
    lists = {k: tuple(raw[k]) for k in ("mean_rgb", "std_rgb", "class_names")}
    return Manifest(**(raw | lists | {"splits": splits}))


# ------------------------------------------------------------------------------------------------------------- writing


class Row(NamedTuple):
    """One image of a shard."""

    key: str
    image: bytes
    label: int | None
    width: int
    height: int


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
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with storage.open_input_file(name) as file:
        while piece := file.read(_CHUNK_BYTES):
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
    def open(path: str, *, unreadable: Literal["stop", "skip"] = "stop") -> Dataset:
        """The dataset at a folder or URI, after a look at each shard's size.

        Args:
            path: where it lies.
            unreadable: "skip" only warns of a shard that is missing or of another size.

        Raises:
            DataError: no such folder; no manifest; another schema version; a manifest that was changed; a shard that is
                missing or of another size.
            StorageError: it cannot be read.
        """
        storage = Storage(path)
        try:
            content = storage.read_bytes(MANIFEST)
        except FileNotFoundError:
            raise _no_manifest(storage) from None
        dataset = Dataset(storage, Manifest.load(content, storage.uri))
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
        """
        done = 0
        for shard in self._shards():
            if max_bytes is not None and done and done + shard.size > max_bytes:
                break
            found = sha256_of(self.storage, shard.name)
            if found != shard.sha256:
                raise self._damaged(shard, f"the checksum of {shard.name} is wrong", found)
            done += shard.size
        return done

    def _read(self, shard: Shard, group: int) -> Any:
        chunks = len(SHARD_SCHEMA) * -(-shard.rows // self.manifest.group_rows)
        file = ParquetPlace(self.storage, shard.name, shard.size, shard.sha256, chunks)
        return read_row_group(file, group, ("key", "image", "label"))

    def _shards(self) -> Iterator[Shard]:
        for split in self.manifest.splits.values():
            yield from split.shards

    def _wrong_sizes(self) -> Iterator[DataError]:
        sizes = {f"{split}/{n}": s for split in SPLITS for n, s in self.storage.list_sizes(split).items()}
        for shard in self._shards():
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


def _no_manifest(storage: Storage) -> DataError:
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
