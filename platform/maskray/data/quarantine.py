"""What was set aside: a list for each version, and that of the newest in `quarantine.parquet`."""

from __future__ import annotations

import logging
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maskray.data.manifest import QUARANTINE, Manifest, newest, quarantine_of
from maskray.data.storage import Storage
from maskray.data.survey import Survey

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # the file in the source
        pa.field("at", pa.int64(), nullable=False),  # the place in that file, of a member of an archive or a row
        pa.field("kind", pa.string(), nullable=False),  # bad or duplicate
    ]
)


def list_set_aside(storage: Storage, seen: Survey, base: Manifest | None) -> Any:
    """A table of what was set aside now, and of what was in the version that images are added to.

    What was set aside then and is in the source again is listed as it is now.
    """
    rows = [(i.key, i.reason, i.place.file, i.place.at, i.kind) for i in seen.set_aside]
    table = pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), _SCHEMA, strict=True)]
        if rows
        else _SCHEMA.empty_table().columns,
        schema=_SCHEMA,
    )
    before = read_set_aside(storage, base) if base is not None else None
    if before is None:
        return table
    again = pa.array([entry.key for entry in seen.entries], pa.string())
    return pa.concat_tables([before.filter(pc.invert(pc.is_in(before["key"], again))), table]).sort_by("key")


def read_set_aside(storage: Storage, manifest: Manifest) -> Any:
    """The table of what a version set aside; None, and a warning, where there is no list of it.

    Versions that an older maskray wrote have one list, that of the newest.
    """
    places = [quarantine_of(manifest.fingerprint)]
    last = newest(storage)
    if last is not None and last.fingerprint == manifest.fingerprint:
        places.append(QUARANTINE)
    for place in places:
        try:
            return pq.read_table(pa.BufferReader(storage.read_bytes(place)))
        except FileNotFoundError:
            continue
    logger.warning(
        "what version %s of %s set aside is not known: its list is not there", manifest.fingerprint, storage.uri
    )
    return None


def write_set_aside(storage: Storage, manifest: Manifest, table: Any) -> None:
    """Write the list of a version, before its manifest: what a kill leaves in between belongs to no version."""
    with storage.open_output(quarantine_of(manifest.fingerprint)) as stream:
        pq.write_table(table, stream)
