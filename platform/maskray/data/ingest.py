"""Pictures to shards, in two passes: look at every image (`survey`), then write shards (`layout`); the manifest last.

Both passes are small jobs given to a `Mapper`: threads, or Ray tasks (`on_ray/ingest.py`). The result does not depend
on which, nor on how many, nor on how often it was killed: the order is a permutation of the sorted keys, sums are
integers, and what a killed ingest had finished (`parts`) is taken as it is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from maskray.config.schema import IngestConfig
from maskray.data import lease
from maskray.data.additions import adopted, choice_of, layout_of, read_present, relabelled
from maskray.data.check import find_damaged
from maskray.data.garbage import unneeded
from maskray.data.layout import Work, kept_shards, plan_shards, write_shards
from maskray.data.manifest import (
    MANIFEST,
    QUARANTINE,
    SCHEMA_VERSION,
    SPLITS,
    VERSIONS,
    Manifest,
    Origin,
    Shard,
    Split,
    is_kept,
    keep,
    newest,
    versions,
)
from maskray.data.mapper import Mapper as Mapper
from maskray.data.mapper import Progress as Progress
from maskray.data.parts import FOLDER, Parts
from maskray.data.quarantine import list_set_aside, read_set_aside, write_set_aside
from maskray.data.sources import Source, is_shipped, open_source
from maskray.data.storage import TEMPORARY, Storage
from maskray.data.survey import CHUNK_IMAGES, Present, Survey, read_threads, survey
from maskray.errors import DataError

logger = logging.getLogger(__name__)

_SHOWN = 3
_NOT_OF_PARTS = {"source", "destination", "max_bad_fraction"}
# Their versions decide on pixels and bytes: parts made with others are not mixed with those of today.
_LIBRARIES = ("torch", "torchcodec", "pillow", "pyarrow")


def ingest(config: IngestConfig, mapper: Mapper, progress: Progress | None = None) -> Manifest:
    """Make the dataset that `config` asks for, or add to it; go on where a killed ingest stopped; recognise it if done.

    Raises:
        DataError: no such source, no images in it, too many that cannot be decoded, a source and a destination that lie
            inside each other, another dataset or other things at the destination, or images to add that do not go with
            those that are there.
        RunConflictError: another ingest into the same place is running.
        StorageError: the destination cannot be written.
    """
    storage = Storage(config.destination)
    refuse_overlap(config.source, storage)
    source = open_source(config.source)
    run = _begun(config, source, storage, mapper, progress or _no_progress)
    manifest = run.recognised()
    if manifest is not None and is_kept(storage, manifest) and not storage.exists(FOLDER):
        return manifest  # by any number at once, and where nobody may write
    with lease.hold(storage, storage.uri, lease.INGEST):
        again = _begun(config, source, storage, mapper, run.report)
        if again.base != run.base:  # another ingest has ended meanwhile
            run, manifest = again, again.recognised()
        manifest = manifest or run.made()
        keep(storage, manifest)
        storage.delete(FOLDER)
    return manifest


def _begun(config: IngestConfig, source: Source, storage: Storage, mapper: Mapper, report: Progress) -> _Ingest:
    """After a look, which changes nothing, at what is there."""
    base = newest(storage, "destination")
    if base is None:
        _refuse_other_things(storage)
        if config.add:
            raise DataError(
                "there is no dataset to add to", key="destination", found=storage.uri, fix="leave --add out"
            )
    elif config.add:
        config, source = adopted(config, base), relabelled(source, base)
    elif _differs(base, config):
        raise _occupied(storage, base)
    return _Ingest(config, source, storage, base, mapper, report)


def _no_progress(done: int, total: int, phase: str) -> None:
    del done, total, phase


@dataclass(frozen=True)
class _Ingest:
    config: IngestConfig
    source: Source
    storage: Storage
    """The destination."""
    base: Manifest | None
    """The dataset that is there."""
    mapper: Mapper
    report: Progress

    def recognised(self) -> Manifest | None:
        """What is there, if it was made from this very source under these options and is whole."""
        made = (self.source.stamp, choice_of(self.config))
        if self.base is None or all((origin.stamp, origin.options) != made for origin in self.base.origins):
            return None
        return self._base_if_whole(self.base)

    def made(self) -> Manifest:
        """Do what there is to do."""
        base = self.base
        if base is not None and not self.config.add:
            return self._mended(base)
        seen, parts = self._surveyed(read_present(self.storage, base, self.mapper) if base is not None else None)
        num_good = sum(len(rows) for rows in seen.good.values())
        if base is None:
            _refuse_nothing_to_train_on(seen, num_good)
        elif not num_good:
            _say_nothing_to_add(self.storage, seen)
            return base
        return self._write(seen, parts)

    def _mended(self, base: Manifest) -> Manifest:
        """What is there, of the same images that were only copied or touched since; damaged shards are written anew."""
        self._refuse_other_keys(base)
        seen, parts = self._surveyed(None)
        try:
            if seen.content not in {origin.content for origin in base.origins}:
                raise _occupied(self.storage, base)
            whole = self._base_if_whole(base)
        except DataError:
            self.storage.delete(FOLDER)  # no ingest can go on with these parts
            raise
        return whole or self._write(seen, parts)

    def _refuse_other_keys(self, base: Manifest) -> None:
        """Before a look at all of its images: a source that has grown, or is another."""
        try:
            there = read_present(self.storage, base, self.mapper).sha256.keys()
        except DataError as error:
            logger.info("the keys of %s are not known (%s): the images must tell", self.storage.uri, error)
            return
        set_aside = read_set_aside(self.storage, base)
        if set_aside is None:
            return
        keys = {entry.key for entry in self.source.entries}
        new, num_known = sorted(keys - there - set(set_aside["key"].to_pylist())), len(keys & there)
        if new or num_known not in {origin.rows for origin in base.origins}:
            more = f"{len(new)} images more ({_some(new)})" if new else f"{num_known} images of that"
            raise _occupied(self.storage, base, f"; the source has {more}")

    def _surveyed(self, present: Present | None) -> tuple[Survey, Parts]:
        self.storage.check_writable()
        parts = self._parts()
        return survey(self.source, self.config, parts, self.mapper, self.report, present), parts

    def _parts(self) -> Parts:
        libraries = [(name, metadata.version(name)) for name in _LIBRARIES]
        base = self.base.fingerprint if self.base is not None and self.config.add else None
        facts = (SCHEMA_VERSION, CHUNK_IMAGES, self.source.stamp, self.source.class_names, base, libraries)
        return Parts.of(self.storage, *facts, sorted(self.config.model_dump(exclude=_NOT_OF_PARTS).items()))

    @cached_property
    def _damaged(self) -> list[Shard]:
        shards = self.base.shards if self.base is not None else ()
        return find_damaged(self.storage, shards, self.mapper, self.report)

    def _base_if_whole(self, base: Manifest) -> Manifest | None:
        if not self._damaged:
            logger.info("%s is already there and whole: nothing to do", self.storage.uri)
            return base
        names = ", ".join(shard.name for shard in self._damaged)
        if len(base.origins) > 1:
            raise DataError(
                f"shards of {self.storage.uri} are damaged, and its images came from {len(base.origins)} sources",
                found=names,
                fix="restore them from a copy, or ingest all sources into a new destination",
            )
        logger.warning("%s: damaged, and written anew: %s", self.storage.uri, names)
        return None

    def _write(self, seen: Survey, parts: Parts) -> Manifest:
        storage, config = self.storage, self.config
        old = versions(storage) if self.base is not None else {}
        base = self.base if config.add else None
        planned = plan_shards(seen, config, base, list(old.values()) if base is not None else [])
        whole = {s.name: s for s in self.base.shards if s not in self._damaged} if self.base and not base else {}
        threads = read_threads(config.source, storage.uri)
        work = Work(seen, self.source.read, parts, config.group_rows, threads)
        written = write_shards(planned, whole, work, self.mapper, self.report)
        splits: dict[str, Split] = {}
        for name in SPLITS:
            new = tuple(written[shard.name] for shard in planned if shard.split == name)
            before = base.splits[name].pixels if base is not None else 0
            splits[name] = Split(kept_shards(base, name, is_added_to=bool(new)) + new, before + seen.pixels(name))
        if base is not None:
            keep(storage, base)
        listed = list_set_aside(storage, seen, base)
        kinds = listed["kind"].to_pylist()
        origin = Origin(
            source=config.source,
            stamp=self.source.stamp,
            rows=sum(len(rows) for rows in seen.good.values()),
            skipped=seen.skipped,
            content=seen.content,
            options=choice_of(config),
        )
        manifest = Manifest(
            group_rows=config.group_rows,
            layout=layout_of(config),
            splits=splits,
            channels=seen.channels if base is None else max(base.channels, seen.channels),  # gray only if all are
            sums=seen.sums if base is None else base.sums + seen.sums,
            class_names=self.source.class_names,
            num_quarantined=kinds.count("bad"),
            num_duplicates=kinds.count("duplicate"),
            origins=(*(base.origins if base is not None else ()), origin),
        )
        write_set_aside(storage, manifest, listed)
        _remove_leftovers(storage, [*old.values(), manifest])
        storage.write_bytes(MANIFEST, manifest.dump())
        return manifest


def _refuse_nothing_to_train_on(seen: Survey, num_good: int) -> None:
    if not len(seen.good["train"]):
        raise DataError(
            "no image is left for the training split",
            key="source",
            found=f"{len(seen.entries)} images, {len(seen.set_aside)} set aside, {num_good} held out",
            fix="add images, or lower held_out_fraction",
        )


def _say_nothing_to_add(storage: Storage, seen: Survey) -> None:
    if not seen.set_aside:
        logger.warning("%s: nothing to add, all %d images are there already", storage.uri, seen.skipped)
        return
    logger.warning(  # by name, all of them: there is no new version whose list would have them
        "%s: nothing to add: %d images are there already, and %d were set aside: %s",
        storage.uri,
        seen.skipped,
        len(seen.set_aside),
        "; ".join(f"{image.key} ({image.reason})" for image in seen.set_aside),
    )


def refuse_overlap(source: str, storage: Storage) -> None:
    """Each would be taken for the other: shards for pictures, and pictures for shards that nothing needs.

    Raises:
        DataError: one lies inside the other.
    """
    if is_shipped(source):
        return
    one, other = _way_to(source), _way_to(storage.uri)
    if one[: len(other)] == other[: len(one)]:
        raise DataError(
            "the source and the destination lie inside each other",
            key="destination",
            found=f"{storage.uri}, and the source {source}",
            fix="take a folder beside the source",
        )


def _way_to(place: str) -> tuple[str, ...]:
    """The folders down to a place, its own name last; of a bucket the options first, which say whose it is."""
    if "://" in place and not place.startswith("file://"):
        path, _, options = place.partition("?")
        return (options, *(part for part in path.split("/") if part))
    return Path(place.removeprefix("file://")).expanduser().resolve().parts


def _refuse_other_things(storage: Storage) -> None:
    # What a half-done ingest left is told by its notes. Without them the same names are somebody's own.
    ours = {lease.LEASE, *((*SPLITS, QUARANTINE, VERSIONS) if storage.exists(FOLDER) else ())}
    foreign = [name for name in storage.list_names() if name not in ours and not name.startswith(".")]
    if foreign:
        raise DataError(
            "the folder holds other things than a dataset",
            key="destination",
            found=f"{_some(foreign)} in {storage.uri}",
            fix="take an empty or new folder, or delete them if they are left of an ingest that was stopped",
        )


def _differs(base: Manifest, config: IngestConfig) -> bool:
    """Whether a dataset was made under other options: of what was not noted, the images must tell."""
    is_laid_out_alike = (base.group_rows, base.layout) == (config.group_rows, layout_of(config))
    return not is_laid_out_alike or all(origin.options not in ({}, choice_of(config)) for origin in base.origins)


def _occupied(storage: Storage, base: Manifest, more: str = "") -> DataError:
    sources = ", ".join(f"{origin.source} ({_in_words(origin.options)})" for origin in base.origins)
    layout = _in_words({"group_rows": base.group_rows} | base.layout)
    return DataError(
        "another dataset is already there",
        key="destination",
        found=f"{storage.uri}, made from {sources} with {layout}{more}",
        fix="take another destination, delete that one, or add the images to it (--add)",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _in_words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "under options that were not noted"


def _remove_leftovers(storage: Storage, needed: list[Manifest]) -> None:
    """Shards, versions and partial files of an ingest that was killed here."""
    partial = [name for name in storage.list_names() if name.startswith(TEMPORARY)]
    for name in (*unneeded(storage, needed), *partial):
        storage.delete(name)
