"""What one looks at of embeddings: rows of images that are alike, and a map of all. The table may be of any length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from maskray.data import decode, embeddings
from maskray.data.embeddings import Floats
from maskray.data.manifest import SplitName
from maskray.data.overview import thumbnail
from maskray.data.storage import Storage
from maskray.embedding.table import Prepared
from maskray.errors import DataError
from maskray.evaluation import similarity
from maskray.figures import charts, pictures
from maskray.figures.pictures import Neighbour

NEIGHBOURS, MAP = "_neighbours.png", "_map.png"
"""Beside the embeddings."""
NUM_NEIGHBOURS = 7
MAX_POINTS = 10_000
_FEWEST = 3  # a plane takes them
_MOST_CLASSES = 60  # a legend has room for them
_CONVERTED = (1, 3)


class _Row(NamedTuple):
    """A row of the table. They are numbered through all parts."""

    split: SplitName | None
    row: int
    key: str
    label: str
    """Name of its class; empty where there is none."""
    embedding_D: Floats


def draw(prepared: Prepared, num_queries: int) -> list[str]:
    """Make both pictures of finished embeddings, beside them; their places.

    Args:
        prepared: what was embedded.
        num_queries: rows of images that are alike; the queries lie evenly in the order of rows.

    Raises:
        DataError: the embeddings are not finished, or too few; the images cannot be read any more.
        StorageError: the destination cannot be written.
    """
    storage = prepared.storage
    total = int(embeddings.manifest_of(storage)["rows"])
    if total < _FEWEST:
        raise DataError("too few embeddings for a picture", key="--figures", found=total, allowed=f"{_FEWEST} or more")
    storage.write_bytes(NEIGHBOURS, _neighbours(prepared, total, min(num_queries, total)))
    storage.write_bytes(MAP, _map(prepared, total))
    return [storage.join(name) for name in (NEIGHBOURS, MAP)]


def _neighbours(prepared: Prepared, total: int, num_queries: int) -> bytes:
    storage = prepared.storage
    asked = _spread(total, num_queries)
    queries = _rows(storage, asked)
    found = similarity.nearest(
        np.stack([queries[number].embedding_D for number in asked]),
        np.array(asked),
        (rows.embeddings for _, rows in embeddings.read_parts(storage)),
        NUM_NEIGHBOURS,
    )
    alike = _rows(storage, found.numbers_QK.flatten().tolist())
    rows = []
    for query, numbers, cosines in zip(asked, found.numbers_QK, found.similarities_QK, strict=True):
        first = _shown(prepared, queries[query], 1.0)
        rows.append([first, *(_shown(prepared, alike[n], float(c)) for n, c in zip(numbers, cosines, strict=True))])
    title = f"Images like the first of each row, among {total:,}, by cosine of their embeddings"
    title += "; red: another class" if any(row.label for row in queries.values()) else ""
    return pictures.neighbours(rows, title=title)


def _map(prepared: Prepared, total: int) -> bytes:
    rows = list(_rows(prepared.storage, _spread(total, MAX_POINTS)).values())
    plane = similarity.plane(np.stack([row.embedding_D for row in rows]))
    labels = np.array([row.label for row in rows])
    names = [name for name in embeddings.manifest_of(prepared.storage)["class_names"] if (labels == name).any()]
    fits = 0 < len(names) <= _MOST_CLASSES
    how_many = f"{len(rows):,} of {total:,} images" if len(rows) < total else f"{total:,} images"
    colours = "colour is the class" if fits else f"{len(names)} classes are too many to be told apart" * bool(names)
    first, second = plane.shares
    return charts.scatter(
        plane.points_N2,
        [(name, labels == name) for name in names] if fits else [],
        title=f"{how_many} by {prepared.what.encoder_name}",
        axis_names=(f"1st principal component, {first:.0%} of the variance", f"2nd, {second:.0%} of the variance"),
        note=f"Each point is an image{'; ' + colours if colours else ''}. {1 - first - second:.0%} of the variance "
        "lies outside of this plane.",
    )


def _spread(total: int, count: int) -> list[int]:
    return sorted({i * total // count for i in range(count)})


def _rows(storage: Storage, numbers: Iterable[int]) -> dict[int, _Row]:
    """Rows of the table by number, in the order of numbers."""
    names = embeddings.manifest_of(storage)["class_names"]
    wanted, first = np.unique(np.fromiter(numbers, np.int64)), 0
    out: dict[int, _Row] = {}
    for split, part in embeddings.read_parts(storage):
        for number in wanted[(wanted >= first) & (wanted < first + len(part.rows))].tolist():
            at = number - first
            label = -1 if part.labels is None else int(part.labels[at])
            name = names[label] if label >= 0 else ""
            out[number] = _Row(split, int(part.rows[at]), part.keys[at], name, part.embeddings[at])
        first += len(part.rows)
    return out


def _shown(prepared: Prepared, row: _Row, cosine: float) -> Neighbour:
    return Neighbour(_picture(prepared, row), row.key, row.label, cosine)


def _picture(prepared: Prepared, row: _Row) -> Any:
    portion = prepared.images.around(row.split, row.row)
    data = prepared.images.read(portion).images[row.row - portion.first]
    channels = prepared.encoder.channels
    try:
        if isinstance(data, Exception):
            raise data
        return thumbnail(data, 3 if channels in _CONVERTED else channels, pictures.NEIGHBOUR_TILE)
    except (OSError, decode.UndecodableError) as error:
        raise DataError(f"the image {row.key} cannot be read any more", key="images", found=str(error)) from error
