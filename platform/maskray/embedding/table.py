"""All images of a dataset or a source to a table of embeddings: prepared, computed part by part, counted.

What a part holds hangs on the images and the options alone, and it appears whole or not at all: an embedding that was
killed goes on with the parts that are missing, and ends with the bytes of one that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from maskray.config.embedding import EmbedConfig
from maskray.data import embeddings, lease, portions
from maskray.data.embeddings import About, Part, Rows, Undecodable
from maskray.data.ingest import refuse_overlap
from maskray.data.manifest import MANIFEST as DATASET_MANIFEST
from maskray.data.mapper import Progress, read_ahead
from maskray.data.portions import Images, Portion
from maskray.data.shards import Dataset
from maskray.data.sources import is_shipped, open_source
from maskray.data.storage import Storage
from maskray.data.survey import read_threads
from maskray.errors import DataError
from maskray.evaluation.blocks import FeatureBlock, blocks_here
from maskray.models.encoder import Encoder
from maskray.publish.named import open_encoder

log = logging.getLogger(__name__)

Blocks = Callable[[Images, Encoder], Generator[FeatureBlock]]
"""Who computes: a block for each portion, in order."""

HELD = lease.Kind("the embedding into", "destination", "wait for it, or stop it")
_LIBRARIES = ("torch", "torchcodec", "pillow", "pyarrow")  # whose versions decide on bits
_WRITERS = 2
_SHOWN = 3


class _Planned(NamedTuple):
    part: Part
    portions: list[Portion]


@dataclass(frozen=True)
class Prepared:
    """What is to be embedded, by what, and where to; everything that can be checked was checked."""

    config: EmbedConfig
    encoder: Encoder
    images: Images
    what: About
    storage: Storage
    """The destination."""

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to do."""
        return embeddings.is_finished(self.storage)


def prepare(config: EmbedConfig) -> Prepared:
    """Open encoder and images, and look at the destination; nothing is changed.

    Raises:
        TrackingError: MLflow is away, or has no such model, version or alias.
        CheckpointError: there is no encoder, or its files are gone or damaged.
        DataError: no such dataset or source, no images in it, or other things at the destination.
        StorageError: something cannot be read.
    """
    storage = Storage(config.destination)
    refuse_overlap(config.images, storage)
    there = embeddings.about(storage)
    named = open_encoder(config.encoder, config.tracking, config.storage.path)
    images, digest, class_names = _opened(config)
    what = About(
        encoder=named.digest,
        images=digest,
        options={name: getattr(config, name) for name in ("batch", "part_rows", "precision")}
        | {"splits": list(config.splits) if _is_dataset(config.images) else None},
        class_names=class_names,
        encoder_name=named.name,
        images_place=config.images if is_shipped(config.images) else Storage(config.images).uri,
        made_with={name: metadata.version(name) for name in _LIBRARIES}
        | {"device": "GPU" if config.cluster.gpus_per_worker else "CPU"},
    )
    if there is not None:
        _refuse_others(there, what, storage)
    return Prepared(config, named.encoder, images, what, storage)


def embed(prepared: Prepared, blocks: Blocks, report: Progress) -> dict[str, Any]:
    """Compute and write what is missing; the manifest.

    Raises:
        DataError: too many images cannot be decoded, a shard or part is damaged, or none is left.
        StorageError: the destination cannot be written.
        RunConflictError: another embedding into the same place is running.
    """
    storage = prepared.storage
    if prepared.is_finished:
        return embeddings.manifest_of(storage)
    storage.check_writable()
    with lease.hold(storage, storage.uri, HELD):
        what = embeddings.about(storage)
        if what is None:
            what = prepared.what
            embeddings.begin(storage, what)
        embeddings.reopen(storage)
        planned = list(_plan(prepared))
        _write_missing(prepared, planned, blocks, report)
        counted = embeddings.count(storage, [p.part for p in planned])
        _refuse_bad(counted.num_undecodable, prepared, [])
        return embeddings.finish(storage, what, counted)


def embed_here(prepared: Prepared, report: Progress) -> dict[str, Any]:
    """As `embed`, in threads of this process: as many as there are CPUs for all workers."""
    config = prepared.config
    threads = max(1, int(config.cluster.workers * config.cluster.cpus_per_worker))

    def blocks(images: Images, encoder: Encoder) -> Generator[FeatureBlock]:
        return blocks_here(images, encoder, threads, config.batch, config.precision)

    return embed(prepared, blocks, report)


def _opened(config: EmbedConfig) -> tuple[Images, str, tuple[str, ...]]:
    if _is_dataset(config.images):
        dataset = _dataset(config)
        images = portions.of_dataset(dataset, config.splits, config.batch)
        digest, class_names = dataset.manifest.fingerprint, dataset.manifest.class_names
    else:
        source = open_source(config.images)
        images = portions.of_source(source, config.batch, config.max_pixels, read_threads(config.images))
        digest, class_names = source.stamp[:16], source.class_names
    if not images.num_rows:
        raise DataError(
            "there are no images to embed", key="images", found=f"{config.images}, splits {', '.join(config.splits)}"
        )
    return images, digest, class_names


def _dataset(config: EmbedConfig) -> Dataset:
    """Open. Its errors are for who trains on it: here the keys are others."""
    try:
        return Dataset.open(config.images, config.version)
    except DataError as error:
        key = {"data.path": "images", "data.version": "version"}.get(str(error.key), error.key)
        raise DataError(error.problem, key=key, found=error.found, allowed=error.allowed, fix=error.fix) from error


def _is_dataset(place: str) -> bool:
    return not is_shipped(place) and Storage(place).exists(DATASET_MANIFEST)


def _refuse_others(there: About, what: About, storage: Storage) -> None:
    """What is there must be of the same kind; parts that are still to come, of the same make too."""
    differ = [name for name in ("encoder", "images", "options") if getattr(there, name) != getattr(what, name)]
    if not differ and there.made_with != what.made_with and not embeddings.is_finished(storage):
        differ = ["made_with"]
    if not differ:
        return
    one, other = (_in_words(about, differ) for about in (there, what))
    raise DataError(
        "the destination holds other embeddings",
        key="destination",
        found=f"{storage.uri}, of {one}; asked for is {other}",
        fix="take another destination, or delete that one",
    )


def _in_words(about: About, names: list[str]) -> str:
    words = {
        "encoder": f"the encoder {about.encoder_name} ({about.encoder})",
        "images": f"the images {about.images_place} ({about.images})",
        "options": ", ".join(f"{name} {value}" for name, value in about.options.items()),
        "made_with": ", ".join(f"{name} {value}" for name, value in about.made_with.items()),
    }
    return " with ".join(words[name] for name in names)


def _plan(prepared: Prepared) -> Iterator[_Planned]:
    """Parts of whole portions, in order."""
    current: list[Portion] = []
    for portion in prepared.images.portions():
        rows = sum(p.rows for p in current)
        if current and (portion.split != current[0].split or rows + portion.rows > prepared.config.part_rows):
            yield _part_of(current)
            current = []
        current.append(portion)
    if current:
        yield _part_of(current)


def _part_of(some: list[Portion]) -> _Planned:
    return _Planned(Part(some[0].split, some[0].first, sum(p.rows for p in some)), some)


def _write_missing(prepared: Prepared, planned: list[_Planned], blocks: Blocks, report: Progress) -> None:
    sizes = prepared.storage.list_sizes()
    missing = [p for p in planned if not sizes.get(p.part.name)]
    total = prepared.images.num_rows
    done = total - sum(p.part.rows for p in missing)
    report(done, total, "embed")
    if not missing:
        return
    images = replace(prepared.images, portions=lambda: (portion for p in missing for portion in p.portions))
    bad: list[Undecodable] = []

    def ready(computed: Iterator[FeatureBlock]) -> Iterator[tuple[Part, list[FeatureBlock]]]:
        nonlocal done
        for p in missing:
            some = []
            for block in islice(computed, len(p.portions)):
                some.append(block)
                done += len(block.rows) + len(block.undecodable)
                bad.extend(block.undecodable)
                report(done, total, "embed")
                _refuse_bad(len(bad), prepared, bad)
            yield p.part, some

    def write(item: tuple[Part, list[FeatureBlock]]) -> None:
        _write(prepared.storage, *item)

    with closing(blocks(images, prepared.encoder)) as computed:
        # Written behind the workers' backs: an upload takes as long as many images.
        for _ in read_ahead(write, ready(computed), _WRITERS):
            pass


def _write(storage: Storage, part: Part, blocks: list[FeatureBlock]) -> None:
    labels = [block.labels for block in blocks if block.labels is not None]
    rows = Rows(
        rows=np.concatenate([block.rows for block in blocks]),
        keys=[key for block in blocks for key in block.keys],
        labels=np.concatenate(labels) if labels else None,
        embeddings=np.concatenate([block.features for block in blocks]),
    )
    embeddings.write_part(storage, part, rows, [bad for block in blocks for bad in block.undecodable])


def _refuse_bad(number: int, prepared: Prepared, known: list[Undecodable]) -> None:
    total, allowed = prepared.images.num_rows, prepared.config.max_bad_fraction
    if number <= allowed * total:
        return
    first = "; ".join(f"{bad.key} ({bad.reason})" for bad in known[:_SHOWN])
    raise DataError(
        f"too many images cannot be decoded: {number} of {total}",
        key="max_bad_fraction",
        found=first or f"listed in {prepared.storage.join(embeddings.UNDECODABLE)}",
        allowed=f"at most {allowed:g} of all",
        fix="mend or remove them, or raise max_bad_fraction: what was computed is kept",
    )
