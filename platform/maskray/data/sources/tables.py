"""Tables: CSV or Parquet that name images by path, and Parquet that holds their bytes (as Hugging Face writes it)."""

from __future__ import annotations

import errno
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from maskray.data.sources.base import Entry, Found, Label, Place, Source, make_source, read_label, stamp_of
from maskray.data.sources.files import S3, Files, Listed, place_of
from maskray.errors import DataError

_PATH_COLUMNS = ("path", "file_name", "filename", "file", "image_path", "image_file", "image", "uri", "url")
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "bytes", "image_bytes", "picture")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
_MAX_GROUP_BYTES = 2**31  # one is held whole
_KEPT_BYTES = 2**28  # of row groups in a process
_FOOTERS_KEPT = 256


def _choose(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    """The column that is meant, whatever the case of its name."""
    by_name = {name.lower(): name for name in reversed(names)}
    return next((by_name[c] for c in candidates if c in by_name), None)


def _no_column(what: str, place: str, names: Sequence[str], candidates: Sequence[str]) -> DataError:
    return DataError(
        f"{place} has no column of {what}",
        key="source",
        found=f"the columns {', '.join(names) or '(none)'}",
        allowed=f"a column named one of {', '.join(candidates)}",
        fix="rename the column (a CSV needs a first line of names)",
    )


# ------------------------------------------------------------------------------------------------------ tables of paths


def open_csv(files: Files, listed: Listed) -> Source:
    """A CSV or TSV of paths and, if there is such a column, labels."""
    place = f"{files}/{listed.name}"
    try:
        with files.open(listed.name) as file:
            names = pa.csv.open_csv(file, parse_options=_dialect(listed.name)).schema.names
        # All as text: a path of digits is no number.
        as_text = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        with files.open(listed.name) as file:
            table = pa.csv.read_csv(file, parse_options=_dialect(listed.name), convert_options=as_text)
    except pa.ArrowException as error:
        raise _unreadable(place, error) from error
    return _of_paths(files, listed, table, ())


def _dialect(name: str) -> Any:
    return pa.csv.ParseOptions(delimiter="\t" if name.lower().endswith(".tsv") else ",")


def _of_paths(files: Files, listed: Listed, table: Any, class_names: Sequence[str]) -> Source:
    place = f"{files}/{listed.name}"
    path_column = _choose(table.column_names, _PATH_COLUMNS)
    if path_column is None:
        raise _no_column("paths", place, table.column_names, _PATH_COLUMNS)
    paths = [str(path or "") for path in table[path_column].to_pylist()]
    label_column = _choose([n for n in table.column_names if n != path_column], _LABEL_COLUMNS)
    labels = _labels(table[label_column]) if label_column else [None] * len(paths)
    if not all(paths):
        raise DataError(f"a row of {place} has no path", key="source", found=f"row {paths.index('') + 1} of the data")
    reader = _PathReader(files)
    # Images of a bucket are not asked for one by one: there the table alone tells whether something was touched.
    sizes = [reader.look_at(path) for path in paths]
    found = [
        Found(path, label, Place(path, 0, size.size if size else 0))
        for path, label, size in zip(paths, labels, sizes, strict=True)
    ]
    return make_source(found, reader, stamp_of([listed, *sizes]), class_names)


@dataclass(frozen=True)
class _PathReader:
    """Reads paths: addresses, absolute ones, and those relative to the table."""

    files: Files

    def __call__(self, entry: Entry) -> bytes:
        files, name = self._locate(entry.place.file)
        return files.read(name)

    def look_at(self, path: str) -> Listed | None:
        """A local file, if it is there."""
        files, name = self._locate(path)
        return None if str(files).startswith(S3) else files.look_at(name)

    def _locate(self, path: str) -> tuple[Files, str]:
        scheme, mark, _ = path.partition("://")
        if mark and scheme not in ("s3", "file"):
            raise DataError(
                "images at this kind of address cannot be read",
                key="source",
                found=path,
                allowed="paths relative to the table, absolute paths, s3://bucket/key",
                fix="download them first",
            )
        if not mark and not path.startswith("/"):
            return self.files, path
        if scheme != "s3" and str(self.files).startswith(S3):
            raise DataError(
                "a table in a bucket names a file of this machine",
                key="source",
                found=path,
                allowed="paths relative to the table, s3://bucket/key",
                fix="copy the table here, if it is yours: who wrote it may mean harm",
            )
        options = getattr(self.files, "options", "") if scheme == "s3" else ""
        return place_of(f"{path}?{options}" if options else path)


def _labels(column: Any) -> list[Label]:
    """Whole numbers stay numbers, also as text or with a fraction of 0; anything else is a name."""
    return [None if value is None else read_label(_text(value)) for value in column.to_pylist()]


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:g}"  # not a number: nothing
    return str(int(value)) if isinstance(value, bool) else str(value)


# ----------------------------------------------------------------------------------------------------- Parquet of bytes


class _Columns(NamedTuple):
    image: str | None
    """Of bytes, or of {bytes, path}."""
    label: str | None
    key: str | None
    class_names: tuple[str, ...]


def open_parquet(files: Files, listed: Sequence[Listed]) -> Source:
    """Parquet files that hold images; or, one alone, a table of their paths.

    The key of an image is what a column `key` says, or else its file and row.

    Raises:
        DataError: a file is damaged or without the columns of the others, or its row groups are too large.
    """
    found: list[Found] = []
    columns = _columns_of(files, listed[0])
    if columns.image is None:
        if len(listed) > 1:
            schema = _opened(files, listed[0], lambda file: file.schema_arrow)
            raise _no_column("image bytes", f"{files}/{listed[0].name}", schema.names, _IMAGE_COLUMNS)
        table = _opened(files, listed[0], lambda file: file.read())
        return _of_paths(files, listed[0], table, columns.class_names)
    for item in listed:
        found += _opened(files, item, partial(_rows, item, columns))
    reader = _RowReader(files, columns.image, stamp_of(listed))
    return replace(make_source(found, reader, reader.stamp, columns.class_names), reads_at_random=False)


def _opened(files: Files, listed: Listed, use: Callable[[Any], Any]) -> Any:
    place = f"{files}/{listed.name}"
    try:
        with files.open(listed.name) as raw, pq.ParquetFile(raw) as file:
            return use(file)
    except (pa.ArrowException, KeyError) as error:
        raise _unreadable(place, error) from error


def _unreadable(place: str, error: Exception) -> DataError:
    return DataError(
        f"the table {place} cannot be read", key="source", found=str(error).strip(), fix="mend or remove it"
    )


def _columns_of(files: Files, listed: Listed) -> _Columns:
    schema = _opened(files, listed, lambda file: file.schema_arrow)
    features = _hugging_face_features(schema)
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    pictures = [n for n in schema.names if _holds_bytes(schema.field(n).type)]
    declared = [n for n in pictures if kinds.get(n) == "Image"]
    structs = [n for n in pictures if pa.types.is_struct(schema.field(n).type)]
    candidates = declared or structs or pictures
    image = _choose(candidates, _IMAGE_COLUMNS) or (candidates[0] if len(candidates) == 1 else None)
    classes = [n for n in schema.names if kinds.get(n) == "ClassLabel"]
    label = _choose(schema.names, _LABEL_COLUMNS) or (classes[0] if classes else None)
    names = features[label].get("names", ()) if label is not None and label in classes else ()
    return _Columns(image, label, _choose(schema.names, ("key", "__key__")), tuple(map(str, names)))


def _hugging_face_features(schema: Any) -> dict[str, Any]:
    """What its `datasets` library writes of the columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _rows(listed: Listed, columns: _Columns, file: Any) -> list[Found]:
    for index in range(file.num_row_groups):
        size = file.metadata.row_group(index).total_byte_size
        if size > _MAX_GROUP_BYTES:
            raise DataError(
                f"a row group of {listed.name} is too large to be held in memory",
                key="source",
                found=f"{size} bytes",
                allowed=f"up to {_MAX_GROUP_BYTES}",
                fix="write the file again with smaller row groups (a hundred images each)",
            )
    if columns.image not in file.schema_arrow.names:
        raise _no_column("image bytes", listed.name, file.schema_arrow.names, (str(columns.image),))
    table = file.read(columns=[c for c in (columns.label, columns.key) if c])
    rows = range(file.metadata.num_rows)
    labels = _labels(table[columns.label]) if columns.label else [None for _ in rows]
    keys = map(str, table[columns.key].to_pylist()) if columns.key else (f"{listed.name}/{row:08d}" for row in rows)
    return [Found(key, label, Place(listed.name, row)) for key, label, row in zip(keys, labels, rows, strict=True)]


@dataclass(frozen=True)
class _RowReader:
    """Reads a row by way of its row group: so read rows in order."""

    files: Files
    column: str
    stamp: str
    """Of the files: what is kept is not taken for what was written since."""

    def __call__(self, entry: Entry) -> bytes:
        name, row = entry.place.file, entry.place.at
        firsts = _first_rows(self, name)
        group = bisect_right(firsts, row) - 1
        images = _GROUPS.get((self, name, group), lambda: self.read_group(name, group))
        value = images[row - firsts[group]].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            path = value.get("path") if isinstance(value, dict) else None
            raise OSError(
                errno.ENODATA, f"the row holds no bytes, only the path {path}" if path else "the row is empty"
            )
        return bytes(data)

    def first_rows(self, name: str) -> list[int]:
        """First row of each row group."""
        with self.files.open(name) as raw, pq.ParquetFile(raw) as file:
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return list(accumulate(lengths, initial=0))[:-1]

    def read_group(self, name: str, group: int) -> Any:
        """The column of images of a row group."""
        try:
            with self.files.open(name) as raw, pq.ParquetFile(raw) as file:
                # Threads are the caller's.
                return file.read_row_group(group, columns=[self.column], use_threads=False)[self.column]
        except pa.ArrowException as error:
            raise OSError(errno.EIO, f"its row group is damaged ({error})") from error


@lru_cache(maxsize=_FOOTERS_KEPT)
def _first_rows(reader: _RowReader, name: str) -> list[int]:
    return reader.first_rows(name)


class _Groups:
    """Row groups read last, for all threads of a process: those that read ahead want the same one at the same time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[object, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, load: Callable[[], Any]) -> Any:
        """What is kept under the key, or what `load` gives: called once, however many ask."""
        with self._lock:
            future = self._kept.get(key)
            is_new = future is None
            if future is None:
                future = self._kept[key] = Future()
            self._kept.move_to_end(key)
        if is_new:
            try:
                future.set_result(load())
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
                raise
            self._trim()
        return future.result()

    def _trim(self) -> None:
        with self._lock:
            while len(self._kept) > 1 and self._bytes() > self._max_bytes:
                self._kept.popitem(last=False)

    def _bytes(self) -> int:
        return sum(f.result().nbytes for f in self._kept.values() if f.done() and f.exception() is None)


_GROUPS = _Groups(_KEPT_BYTES)
