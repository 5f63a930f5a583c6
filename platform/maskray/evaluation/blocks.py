"""Features of many images by an exported encoder: a block for each portion of them, wherever it is computed.

A block is a pure function of encoder and portion: how many compute them, and in which order, does not move a bit.

Shape letters: N images of a block, C channels, H and W pixels down and across, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from maskray.data import decode
from maskray.data.embeddings import Undecodable
from maskray.data.manifest import Ints, SplitName
from maskray.data.mapper import thread_mapper
from maskray.data.portions import Encoded, Images, Portion
from maskray.evaluation.pictures import BATCH, Features, Precision, encode, picture_of
from maskray.models.encoder import Encoder


class FeatureBlock(NamedTuple):
    """Features of neighbouring rows. N of them could be decoded."""

    rows: Ints
    """(N,) int64 row numbers, ascending."""
    keys: list[str]
    labels: Ints | None
    """(N,) int64, or None where there are none."""
    features: Features
    """(N, D)."""
    split: SplitName | None = None
    """That the rows are of; None where there are none."""
    undecodable: tuple[Undecodable, ...] = ()
    """The other images of the portion."""


def blocks_here(
    images: Images, encoder: Encoder, threads: int, batch: int = BATCH, precision: Precision = "fp32"
) -> Generator[FeatureBlock]:
    """A block for each portion, in order, computed by threads of this process, one core each."""
    work = partial(compute, encoder, images.read, batch=batch, precision=precision)
    yield from thread_mapper(threads)(work, images.portions())


def compute(
    encoder: Encoder,
    read: Callable[[Portion], Encoded],
    portion: Portion,
    batch: int = BATCH,
    threads: int = 1,
    precision: Precision = "fp32",
) -> FeatureBlock:
    """The block of a portion.

    Args:
        encoder: on any device.
        read: of the images.
        portion: of them.
        batch: images that the encoder gets at once.
        threads: that decode.
        precision: bf16 is autocast.

    Raises:
        DataError: a shard is missing or damaged.
        StorageError: the storage refuses to be read.
    """
    found = read(portion)
    pictures = _decoded(found.images, encoder, threads)
    good = [i for i, picture in enumerate(pictures) if isinstance(picture, Tensor)]
    undecodable = [
        Undecodable(int(found.rows[i]), found.keys[i], str(picture))
        for i, picture in enumerate(pictures)
        if not isinstance(picture, Tensor)
    ]
    return FeatureBlock(
        rows=found.rows[good],
        keys=[found.keys[i] for i in good],
        labels=None if found.labels is None else found.labels[good],
        features=encode([p for p in pictures if isinstance(p, Tensor)], encoder, batch, precision),
        split=portion.split,
        undecodable=tuple(undecodable),
    )


def _decoded(images: list[bytes | Exception], encoder: Encoder, threads: int) -> list[Tensor | Exception]:
    def one(data: bytes | Exception) -> Tensor | Exception:
        if isinstance(data, Exception):
            return data
        try:
            return picture_of(data, encoder.channels, encoder.image_size)
        except decode.UndecodableError as error:
            return error

    if threads == 1:
        return [one(data) for data in images]
    # Torch has as many threads for the resize of one image, which would fight over the cores.
    with ThreadPoolExecutor(threads, "maskray-decode", torch.set_num_threads, (1,)) as pool:
        return list(pool.map(one, images))
