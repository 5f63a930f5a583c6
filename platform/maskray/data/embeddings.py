"""Embeddings on disk: a Parquet table in parts, which any reader of Parquet opens by its folder.

    train-000000000-000008191.parquet   rows 0 to 8191 of a split: row, split, key, label, embedding
    _embeddings.json                    what is embedded, by which encoder; written first
    _undecodable.parquet                images that have no embedding, and why
    _manifest.json                      the parts with rows and bytes; written last

Names that begin with _ are left out by readers of Parquet folders. A folder without a manifest is not finished.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maskray.data.lease import LEASE
from maskray.data.manifest import Ints, SplitName
from maskray.data.storage import TEMPORARY, Storage
from maskray.errors import DataError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
ABOUT, MANIFEST, UNDECODABLE = "_embeddings.json", "_manifest.json", "_undecodable.parquet"
SUFFIX = ".parquet"
_NOTE = b"maskray.undecodable"
"""In the footer of a part: the images of its rows that have no embedding."""
_UNDECODABLE = pa.schema([("split", pa.string()), ("row", pa.int64()), ("key", pa.string()), ("reason", pa.string())])

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class About:
    """What is embedded, and how. Equal for embeddings that are of one kind."""

    encoder: str
    """Digest of its weights and sizes."""
    images: str
    """Fingerprint of the dataset, or stamp of the source."""
    options: dict[str, Any]
    """That decide on which rows lie in which part, and on their bits."""
    class_names: tuple[str, ...] = ()
    encoder_name: str = field(default="", compare=False)
    """As it was asked for, with the version that an alias led to."""
    images_place: str = field(default="", compare=False)
    made_with: dict[str, str] = field(default_factory=dict, compare=False)
    """What else can move a bit: parts made with another are not mixed."""

    def dump(self) -> dict[str, Any]:
        """As plain data."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @staticmethod
    def load(raw: dict[str, Any], place: str) -> About:
        """From plain data.

        Raises:
            DataError: of another schema version.
        """
        version = raw.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise DataError(
                f"embeddings in {place} have another schema version",
                key="destination",
                found=version,
                allowed=str(SCHEMA_VERSION),
                fix="take another destination, or delete that one",
            )
        return About(**(raw | {"class_names": tuple(raw["class_names"])}))


class Undecodable(NamedTuple):
    """An image without an embedding."""

    row: int
    key: str
    reason: str


class Part(NamedTuple):
    """A file of the table: what its rows are, whether or not it is there yet."""

    split: SplitName | None
    first: int
    rows: int
    """With those that have no embedding."""

    @property
    def name(self) -> str:
        """Says which rows it holds."""
        return f"{self.split or 'images'}-{self.first:09d}-{self.first + self.rows - 1:09d}{SUFFIX}"


class Rows(NamedTuple):
    """Rows of a part. N of them have an embedding."""

    rows: Ints
    """(N,)."""
    keys: list[str]
    labels: Ints | None
    """(N,); below 0 where there is none."""
    embeddings: Floats
    """(N, D)."""


def about(storage: Storage) -> About | None:
    """What the embeddings at a place are, finished or not; None where nothing is.

    Raises:
        DataError: it holds other things, or embeddings of another schema version.
    """
    raw = _read_json(storage, ABOUT)
    if raw is not None:
        return About.load(raw, storage.uri)
    foreign = [name for name in storage.list_names() if name != LEASE and not name.startswith(TEMPORARY)]
    if foreign:
        raise DataError(
            "the folder holds other things than embeddings",
            key="destination",
            found=f"{', '.join(foreign[:3])} in {storage.uri}",
            fix="take an empty or new folder",
        )
    return None


def begin(storage: Storage, what: About) -> None:
    """Say what the parts will be of."""
    storage.write_bytes(ABOUT, _as_json(what.dump()))


def is_finished(storage: Storage) -> bool:
    """Whether the embeddings at a place are all there, as their manifest says."""
    manifest = _read_json(storage, MANIFEST)
    return manifest is not None and not _wrong_sizes(storage, manifest)


def reopen(storage: Storage) -> None:
    """Make finished embeddings that have lost parts into unfinished ones, without what is damaged of them."""
    manifest = _read_json(storage, MANIFEST)
    wrong = _wrong_sizes(storage, manifest) if manifest is not None else []
    if wrong:
        log.warning("%s: missing or damaged, and computed anew: %s", storage.uri, ", ".join(wrong))
        storage.delete(MANIFEST)
        for name in wrong:
            storage.delete(name)


def _wrong_sizes(storage: Storage, manifest: dict[str, Any]) -> list[str]:
    sizes = storage.list_sizes()
    return [part["name"] for part in manifest["parts"] if sizes.get(part["name"]) != part["bytes"]]


def write_part(storage: Storage, part: Part, rows: Rows, undecodable: list[Undecodable]) -> None:
    """Write a part; it appears whole or not at all. The same rows make the same bytes."""
    columns: dict[str, Any] = {"row": pa.array(rows.rows, pa.int64())}
    if part.split is not None:
        columns["split"] = pa.array([part.split] * len(rows.rows), pa.string())
    columns["key"] = pa.array(rows.keys, pa.string())
    if rows.labels is not None:
        columns["label"] = pa.array(rows.labels, pa.int32(), mask=rows.labels < 0)
    values = pa.array(np.ascontiguousarray(rows.embeddings).reshape(-1), pa.float32())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, rows.embeddings.shape[1])
    note = json.dumps([list(one) for one in undecodable]).encode()
    table = pa.table(columns).replace_schema_metadata({_NOTE: note})
    with storage.open_output(part.name) as stream:
        # Numbers of 32 bits that are nearly all different: compression and dictionaries would only cost.
        pq.write_table(table, stream, compression="none", use_dictionary=["split"], write_page_checksum=True)


class Counted(NamedTuple):
    """What is there of all parts."""

    entries: list[dict[str, Any]]
    """Name, rows that have an embedding, and bytes of each part."""
    num_undecodable: int


def count(storage: Storage, parts: list[Part]) -> Counted:
    """Count what is there, part by part of what must be, and list the images that have no embedding.

    Raises:
        DataError: a part is damaged, or has other rows than it must have.
    """
    sizes = storage.list_sizes()
    entries, bad = [], []
    for part in parts:
        rows, undecodable = _facts(storage, part)
        entries.append({"name": part.name, "rows": rows, "bytes": sizes[part.name]})
        bad += [(part.split, *one) for one in undecodable]
    columns = [list(column) for column in zip(*bad, strict=True)] or [[], [], [], []]
    with storage.open_output(UNDECODABLE) as stream:
        pq.write_table(pa.table(columns, schema=_UNDECODABLE), stream)
    return Counted(entries, len(bad))


def finish(storage: Storage, what: About, counted: Counted) -> dict[str, Any]:
    """Write the manifest, and remove what killed writers left."""
    for name in storage.list_names():
        if name.startswith(TEMPORARY):
            storage.delete(name)
    rows = sum(entry["rows"] for entry in counted.entries)
    manifest = what.dump() | {"rows": rows, "undecodable": counted.num_undecodable, "parts": counted.entries}
    storage.write_bytes(MANIFEST, _as_json(manifest))
    return manifest


def manifest_of(storage: Storage) -> dict[str, Any]:
    """The manifest of finished embeddings.

    Raises:
        DataError: there are none, or they are not finished.
    """
    manifest = _read_json(storage, MANIFEST)
    if manifest is None:
        raise DataError(
            f"there is no {MANIFEST}: these are no embeddings, or they are not finished",
            key="destination",
            found=storage.uri,
            fix="run maskray embed (again): it goes on where it stopped",
        )
    return manifest


def read_parts(storage: Storage) -> Iterator[tuple[SplitName | None, Rows]]:
    """Split and rows of each part of finished embeddings, in order. Raises as `manifest_of` does."""
    for entry in manifest_of(storage)["parts"]:
        with _opened(storage, entry["name"]) as file:
            table = file.read(use_threads=False)
        embedding = table["embedding"].combine_chunks()
        values = embedding.values.to_numpy() if len(embedding) else np.empty(0, np.float32)
        split = table["split"][0].as_py() if "split" in table.column_names and len(table) else None
        labels = table["label"].fill_null(-1).to_numpy().astype(np.int64) if "label" in table.column_names else None
        yield (
            split,
            Rows(
                table["row"].to_numpy(),
                table["key"].to_pylist(),
                labels,
                values.reshape(-1, embedding.type.list_size),
            ),
        )


def _facts(storage: Storage, part: Part) -> tuple[int, list[Undecodable]]:
    """Rows with and without an embedding, as the footer of a part says."""
    with _opened(storage, part.name) as file:
        rows, note = file.metadata.num_rows, (file.metadata.metadata or {}).get(_NOTE, b"[]")
    undecodable = [Undecodable(*one) for one in json.loads(note)]
    if rows + len(undecodable) != part.rows:
        raise DataError(
            f"{storage.join(part.name)} has other rows than it must have",
            found=f"{rows} embeddings and {len(undecodable)} images that cannot be decoded",
            allowed=f"{part.rows} in all",
            fix="delete it and start again: the others are kept",
        )
    return rows, undecodable


def _opened(storage: Storage, name: str) -> Any:
    try:
        return pq.ParquetFile(storage.open_input_file(name), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{storage.join(name)} cannot be read", found=str(error), fix="delete it and start again"
        ) from error


def _read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.read_bytes(name)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{storage.join(name)} is damaged", key="destination", found=str(error), fix="delete the embeddings"
        ) from error


def _as_json(plain: dict[str, Any]) -> bytes:
    return json.dumps(plain, indent=1).encode() + b"\n"
