"""Row groups of Parquet files, each by a read of its own range, and the footers that say where they lie.

A footer comes with the end of its file, in one request, and stays for the process. It is kept as it was written:
parsed, it takes fifteen times the memory, and parsing takes less than a hundredth of the time of decoding the images.
Where the footers of a dataset do not fit, each row group costs one small request more. See RESULTS.md of the benchmarks
for the figures, and for why there is no index of offsets instead.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maskray.data.retry import Patience, persistently
from maskray.data.storage import Storage
from maskray.errors import StorageError

_FOOTER_BYTES_KEPT = 64 * 2**20
_SECOND_LOOKS = Patience(tries=3)
_TRAILER_BYTES = 8  # the footer's length and the magic number, behind it
_MAGIC = b"PAR1"
# What pyarrow writes for one column of one row group, without statistics (58 bytes), and once for the schema.
_CHUNK_BYTES, _SCHEMA_BYTES = 64, 4096


@dataclass(frozen=True)
class ParquetPlace:
    """Where a Parquet file lies that does not change any more, and what its reader knows of it."""

    storage: Storage
    name: str
    size: int
    """Bytes."""
    digest: str
    """Of its content: another file may lie under the name later."""
    chunks: int
    """About how many there are, columns × row groups: so much of the file's end is asked for at first."""


class Footers:
    """Footers by file, the last used ones, up to a number of bytes. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[str, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: tuple[str, ...], load: Callable[[], bytes]) -> bytes:
        """The footer, from `load` where it is not here. Two threads may both load it; no thread waits for another."""
        with self._lock:
            footer = self._kept.get(key)
            if footer is not None:
                self._kept.move_to_end(key)
                return footer
        footer = load()
        with self._lock:
            self._drop(key)
            if len(footer) > self._max_bytes:
                return footer
            self._kept[key] = footer
            self.num_bytes += len(footer)
            while self.num_bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))
        return footer

    def drop(self, key: tuple[str, ...]) -> None:
        """Forget one: its file turned out to be damaged, and may be mended."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: tuple[str, ...]) -> None:
        self.num_bytes -= len(self._kept.pop(key, b""))


FOOTERS = Footers(_FOOTER_BYTES_KEPT)


def read_row_group(file: ParquetPlace, number: int, columns: Sequence[str]) -> Any:
    """Columns of one row group as a table, every page's checksum verified. They lie one after another in the file.

    Raises:
        OSError: there is no such file, or it is damaged.
        StorageError: it cannot be read.
    """
    # What came may be damaged, and not the file: pyarrow does not see that an object store sent less than was asked.
    patience = Patience(tries=1) if file.storage.is_local else _SECOND_LOOKS
    what = f"read row group {number} of {file.storage.join(file.name)}"
    return persistently(what, lambda: _read(file, number, columns), _is_damage, patience)


class _DamageError(OSError):
    """What came is not what was written."""


def _is_damage(error: OSError) -> bool:
    return isinstance(error, _DamageError)


def _read(file: ParquetPlace, number: int, columns: Sequence[str]) -> Any:
    key = (file.storage.uri, file.name, file.digest)
    footer = FOOTERS.get(key, lambda: _read_footer(file))
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer))
        start, end = _range(metadata, number, columns, file.size)
        source = _Window(file.storage.read_range(file.name, start, end - start), start, file.size)
        # Threads are the caller's: one for each row group in flight.
        with pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True) as parquet:
            return parquet.read_row_group(number, columns=list(columns), use_threads=False)
    except (FileNotFoundError, StorageError):
        raise
    except (OSError, pa.ArrowException) as error:
        FOOTERS.drop(key)
        raise _DamageError(str(error)) from error


def _read_footer(file: ParquetPlace) -> bytes:
    """The footer and the trailer, in one request unless it is larger than thought."""
    length = min(file.size, file.chunks * _CHUNK_BYTES + _SCHEMA_BYTES)
    end = file.storage.read_range(file.name, file.size - length, length)
    needed = int.from_bytes(end[-_TRAILER_BYTES : -len(_MAGIC)], "little") + _TRAILER_BYTES
    if not end.endswith(_MAGIC) or needed > file.size:
        raise _DamageError("it does not end as a Parquet file does")
    if needed > length:
        end = file.storage.read_range(file.name, file.size - needed, needed - length) + end
    return end[-needed:]


def _range(metadata: Any, number: int, columns: Sequence[str], size: int) -> tuple[int, int]:
    """First and one past the last byte of columns of a row group."""
    if number >= metadata.num_row_groups:
        raise OSError(f"it has {metadata.num_row_groups} row groups only")
    group = metadata.row_group(number)
    chunks = [c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema in columns]
    start = min(c.data_page_offset for c in chunks)
    end = max(c.data_page_offset + c.total_compressed_size for c in chunks)
    if not 0 <= start < end <= size:  # no checksum covers a footer
        raise OSError(f"its footer says that row group {number} lies at [{start}, {end}) of {size} bytes")
    return start, end


class _Window:
    """A file of which one range is here: all that pyarrow reads of it, given the footer."""

    closed = False

    def __init__(self, content: bytes, start: int, size: int) -> None:
        self._content, self._start, self._size, self._at = memoryview(content), start, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, length: int) -> memoryview:
        first = self._at - self._start
        if first < 0 or first + length > len(self._content):
            raise OSError(f"pyarrow reads {length} bytes at {self._at}, outside of the row group")
        self._at += length
        return self._content[first : first + length]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
