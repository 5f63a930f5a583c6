"""Images that are added to a dataset: under the options that it was made with, beside the images that it has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from maskray.config.schema import IngestConfig
from maskray.data.manifest import Manifest
from maskray.data.mapper import Mapper
from maskray.data.shards import ColumnsJob, read_columns
from maskray.data.sources import Source
from maskray.data.storage import Storage
from maskray.data.survey import Present
from maskray.errors import DataError


def layout_of(config: IngestConfig) -> dict[str, Any]:
    """The options, besides `group_rows`, that decide on which row lies where and what is in it."""
    names = ["groups_per_shard", "held_out_fraction", "seed"]
    names += ["resize_short", "quality"] if config.resize_short is not None else []
    return {name: getattr(config, name) for name in names}


def choice_of(config: IngestConfig) -> dict[str, Any]:
    """The options, besides `max_bad_fraction`, that decide on which images are taken: each ingest has its own."""
    return {name: getattr(config, name) for name in ("deduplicate", "max_pixels")}


def adopted(config: IngestConfig, base: Manifest) -> IngestConfig:
    """The options of the dataset, for those that were not given; of its last ingest, where each has its own.

    Raises:
        DataError: one was given, and is another.
    """
    options = {"resize_short": None, **base.layout, "group_rows": base.group_rows}
    for name in sorted(options.keys() & config.model_fields_set):
        if getattr(config, name) != options[name]:
            raise DataError(
                "the dataset was made with another value, and images are added under the same options",
                key=name,
                found=getattr(config, name),
                allowed=str(options[name]),
                fix="leave it out, or ingest all into a new destination",
            )
    last = base.origins[-1].options
    chosen = {name: last[name] for name in last.keys() - config.model_fields_set}
    return config.model_copy(update=options | chosen)


def relabelled(source: Source, base: Manifest) -> Source:
    """The source under the dataset's labels; classes that it has not got yet come after its own.

    Raises:
        DataError: one of the two has classes, the other none.
    """
    if bool(source.class_names) != bool(base.class_names):
        having, lacking = ("the source", "the dataset") if source.class_names else ("the dataset", "the source")
        raise DataError(
            f"{having} has classes, and {lacking} has none",
            key="source",
            found=", ".join((source.class_names or base.class_names)[:3]),
            fix="lay the images out alike: in class folders, or in none",
        )
    names = base.class_names + tuple(name for name in source.class_names if name not in base.class_names)
    label_of = {old: names.index(name) for old, name in enumerate(source.class_names)}
    entries = [e if e.label is None else e._replace(label=label_of[e.label]) for e in source.entries]
    return replace(source, entries=entries, class_names=names)


def read_present(storage: Storage, base: Manifest, mapper: Mapper) -> Present:
    """Keys of a dataset, and the digests of the pictures as they came."""
    sha256: dict[str, bytes] = {}
    jobs = (ColumnsJob(storage, shard, ("key", "sha256")) for shard in base.shards)
    for table in mapper(read_columns, jobs):
        sha256.update(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    return Present(sha256, 3 if base.channels == 1 else base.channels)
