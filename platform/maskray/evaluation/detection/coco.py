"""Data in COCO's format: images in a folder, and a JSON file of what is on them (cocodataset.org, "Data format").

    images        id, file_name, width, height
    annotations   id, image_id, category_id, bbox (x, y, width, height in pixels), area, iscrowd, segmentation
    categories    id (any integers), name

Nothing is lost in silence: what cannot be used is set aside one by one, with why. A file that is no such data, or an
image that is not there, is an error before anything starts.

Shape letters: N objects on an image, H and W its pixels down and across.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from torch import Tensor

from maskray.data import decode
from maskray.data.storage import Storage
from maskray.errors import DataError, StorageError
from maskray.evaluation.detection import outlines

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

GIVE_THEIR_IMAGES = "give the images that the annotations are for, with as many bands as the encoder takes"
"""What to do where none can be used."""
_SHOWN = 3
_LEAST_PIXELS = 0.01
"""Of a box's side inside the image: less would be none once it is scaled, in fp32."""


class Category(NamedTuple):
    """What an object may be. Its class is its place in the list of them, by id."""

    id: int
    name: str


class SetAside(NamedTuple):
    """An annotation or image that counts for nothing."""

    key: str
    """Of the config: of which data it is, such as `evaluations.train`."""
    what: str
    """Such as `annotation 17` or `image 000012.jpg`."""
    reason: str


@dataclass(frozen=True)
class Scene:
    """An image and the objects on it."""

    id: int
    file_name: str
    size_HW: tuple[int, int]
    boxes_N4: Floats
    """Left, top, right, bottom in pixels, as in the file: some reach out of the image by a little."""
    classes_N: Ints
    """Places in the list of categories."""
    crowd_N: Bools
    """True: a crowd, on which detections are neither right nor wrong; none is learned from."""
    areas_N: Floats
    """In pixels, as the file says; else the outline's, where outlines are read, or the box's. By these COCO tells small
    from large."""
    outlines: tuple[outlines.Rle, ...] = ()
    """Of each object; empty where they are not asked for."""

    @property
    def clipped_boxes(self) -> Floats:
        """(N, 4): the boxes, cut off at the image's border."""
        height, width = self.size_HW
        return np.clip(self.boxes_N4, 0, np.array([width, height, width, height], np.float64))


@dataclass(frozen=True)
class CocoSet:
    """Images with their objects."""

    key: str
    """Of the config."""
    name: str
    """Path or URI of the annotations."""
    images: Storage
    """Where they lie."""
    scenes: tuple[Scene, ...]
    """In the order of the ids."""
    categories: tuple[Category, ...]
    """In the order of the ids."""
    set_aside: tuple[SetAside, ...]
    digest: str
    """SHA-256 of the annotations, and of the names of the images and their sizes in bytes."""

    @property
    def num_objects(self) -> int:
        """Crowds left out."""
        return sum(int((~scene.crowd_N).sum()) for scene in self.scenes)

    def image(self, row: int, channels: int) -> Tensor:
        """(C, H, W), uint8: that of a scene, of so many channels.

        Raises:
            UndecodableError: it cannot be decoded, or has another size than its annotations are for.
            StorageError: it has gone, or cannot be read.
        """
        scene = self.scenes[row]
        try:
            bytes_CHW = decode.decode(self.images.read_bytes(scene.file_name), channels)
        except FileNotFoundError as error:
            raise StorageError("an image has gone", found=self.images.join(scene.file_name)) from error
        (height, width), told = bytes_CHW.shape[1:], scene.size_HW
        if (height, width) != told:
            raise decode.UndecodableError(
                f"it has {width} × {height} pixels, its annotations are for {told[1]} × {told[0]}"
            )
        return bytes_CHW


def read(annotations: str, images: str, *, key: str, masks: bool, max_images: int | None = None) -> CocoSet:
    """Read annotations, and see whether the images are there.

    Args:
        annotations: path or URI of the JSON file.
        images: folder or URI that file names are relative to.
        key: of the config, for errors.
        masks: read outlines too; objects without one are set aside.
        max_images: the first by id; None takes all.

    Raises:
        DataError: no such file, not COCO's format, an image that is not there, or no object at all.
        StorageError: the storage cannot be read.
    """
    data = _bytes(annotations, key)
    content = _parsed(data, annotations, key)
    categories = _categories(content["categories"], annotations, key)
    listed = sorted(_images(content["images"], annotations, key), key=lambda each: each.id)[:max_images]
    folder = Storage(images)
    sizes_bytes = _sizes_bytes(folder, [each.file_name for each in listed], key)
    set_aside = list[SetAside]()
    objects: dict[int, list[_Object]] = {each.id: [] for each in listed}
    beyond = {each["id"] for each in content["images"]} - objects.keys()
    sizes = {each.id: each.size_HW for each in listed}
    classes = {each.id: place for place, each in enumerate(categories)}
    for number, plain in enumerate(content["annotations"]):
        if isinstance(plain, Mapping) and _id_in(plain, "image_id", beyond):
            continue
        try:
            found = _object(plain, sizes, classes, masks)
        except _UnusableError as error:
            told = plain.get("id", f"number {number + 1}") if isinstance(plain, Mapping) else f"number {number + 1}"
            set_aside.append(SetAside(key, f"annotation {told}", str(error)))
        else:
            objects[plain["image_id"]].append(found)
    scenes = tuple(_scene(each, objects[each.id], masks) for each in listed)
    digest = hashlib.sha256(data + json.dumps(sizes_bytes).encode()).hexdigest()
    result = CocoSet(key, annotations, folder, scenes, categories, tuple(set_aside), digest)
    if not result.num_objects:
        reasons = Counter(each.reason for each in set_aside).most_common(_SHOWN)
        why = "".join(f"; {count} set aside: {reason}" for reason, count in reasons)
        raise DataError(
            "there is no object to detect on these images",
            key=key,
            found=f"{annotations}: {len(scenes)} images, {len(content['annotations'])} annotations{why}",
            fix="give annotations of boxes that are not crowds",
        )
    return result


def check_alike(train: CocoSet, val: CocoSet, *, key: str) -> None:
    """Whether what is learned is what is judged.

    Raises:
        DataError: the categories differ, by id or by name.
    """
    if train.categories == val.categories:
        return
    only = [sorted(set(a.categories) - set(b.categories)) for a, b in ((train, val), (val, train))]
    told = " and ".join(
        f"{_shown([f'{each.id} {each.name}' for each in some])} in {whole.name} alone"
        for some, whole in zip(only, (train, val), strict=True)
        if some
    )
    raise DataError(
        "the categories of training and validation differ",
        key=key,
        found=told,
        allowed="the same ids and names in both files",
        fix="give two files of one set",
    )


def check_apart(train: CocoSet, val: CocoSet) -> None:
    """Whether none of the images that judge was learned from.

    Raises:
        DataError: some were.
    """
    shared = sorted(_addresses(train) & _addresses(val))
    if shared:
        raise DataError(
            f"{len(shared)} images are for training and for validation",
            key=val.key,
            found=_shown(shared),
            fix="give annotations of other images: on those learned from, average precision says nothing",
        )


class _UnusableError(ValueError):
    """An annotation cannot be used; the message is the reason."""


class _Listed(NamedTuple):
    id: int
    file_name: str
    size_HW: tuple[int, int]


class _Object(NamedTuple):
    box: tuple[float, float, float, float]
    class_: int
    is_crowd: bool
    area: float
    outline: outlines.Rle | None


def _addresses(data: CocoSet) -> set[str]:
    """Of the images, however the folder is written."""
    folder = data.images.uri
    base = os.path.realpath(folder) if data.images.is_local else folder
    return {posixpath.normpath(f"{base}/{each.file_name}") for each in data.scenes}


def _bytes(annotations: str, key: str) -> bytes:
    base, options = Storage(annotations).address
    folder, _, name = base.rpartition("/")
    try:
        return Storage(folder + options).read_bytes(name)
    except FileNotFoundError as error:
        raise DataError(
            "there is no such file of annotations", key=key, found=annotations, fix="check the path"
        ) from error


def _parsed(data: bytes, annotations: str, key: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # of JSON, or of its letters
        raise _not_coco(annotations, key, f"no JSON: {error}") from error
    if not isinstance(content, dict):
        raise _not_coco(annotations, key, f"a {type(content).__name__}")
    for part in ("images", "annotations", "categories"):
        if not isinstance(content.get(part), list):
            raise _not_coco(annotations, key, f"no list of {part}")
    return content


def _not_coco(annotations: str, key: str, found: str) -> DataError:
    return DataError(
        "the file is not in COCO's format",
        key=key,
        found=f"{annotations} ({found})",
        allowed="JSON with images, annotations (with bbox) and categories",
        fix="give such a file, e.g. instances_train2017.json",
    )


def _categories(plain: list[Any], annotations: str, key: str) -> tuple[Category, ...]:
    try:
        found = sorted(Category(_whole(each["id"]), _text(each["name"])) for each in plain)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _not_coco(annotations, key, f"a category without id and name: {error}") from error
    if len({each.id for each in found}) < len(found):
        raise _not_coco(annotations, key, "two categories of one id")
    if twice := [name for name, times in Counter(each.name for each in found).items() if times > 1]:
        raise _not_coco(annotations, key, f"two categories of one name: {_shown(twice)}")
    if not found:
        raise _not_coco(annotations, key, "no category")
    return tuple(found)


def _images(plain: list[Any], annotations: str, key: str) -> list[_Listed]:
    try:
        found = [
            _Listed(_whole(each["id"]), _text(each["file_name"]), (_whole(each["height"]), _whole(each["width"])))
            for each in plain
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _not_coco(annotations, key, f"an image without id, file_name, width and height: {error}") from error
    if len({each.id for each in found}) < len(found):
        raise _not_coco(annotations, key, "two images of one id")
    if empty := [each.file_name for each in found if min(each.size_HW) < 1]:
        raise _not_coco(annotations, key, f"images without pixels: {_shown(empty)}")
    if endless := [each.file_name for each in found if max(each.size_HW) >= outlines.LARGEST]:
        raise _not_coco(annotations, key, f"images of a million pixels a side or more: {_shown(endless)}")
    return found


def _sizes_bytes(folder: Storage, names: Iterable[str], key: str) -> list[tuple[str, int]]:
    """By a listing of each folder: a request for each of 100,000 images would take an hour on an object store."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    missing, sizes = list[str](), list[tuple[str, int]]()
    for below, there in by_folder.items():
        found = folder.list_sizes(below)
        missing += [name for name in there if name.rpartition("/")[2] not in found]
        sizes += [(name, found.get(name.rpartition("/")[2], 0)) for name in there]
    if missing:
        raise DataError(
            f"{len(missing)} images are not there",
            key=key,
            found=f"{folder.uri} without {_shown(missing)}",
            fix="check the folder of the images, or take them out of the annotations",
        )
    return sizes


def _object(plain: Any, sizes: Mapping[int, tuple[int, int]], classes: Mapping[int, int], masks: bool) -> _Object:
    if not isinstance(plain, Mapping):
        raise _UnusableError("it is no mapping")
    if not _id_in(plain, "image_id", sizes):
        raise _UnusableError("there is no such image")
    if not _id_in(plain, "category_id", classes):
        raise _UnusableError("there is no such category")
    size_HW, class_ = sizes[plain["image_id"]], classes[plain["category_id"]]
    box = _box(plain.get("bbox"), size_HW)
    outline = None
    if masks:
        try:
            outline = outlines.read(plain.get("segmentation"), size_HW)
        except ValueError as error:
            raise _UnusableError(str(error)) from error
    crowd, area = plain.get("iscrowd", 0), plain.get("area")
    if crowd not in (0, 1):
        raise _UnusableError("its iscrowd is neither 0 nor 1")
    if not (_is_number(area, outlines.LARGEST**2) and area > 0):
        area = (box[2] - box[0]) * (box[3] - box[1]) if outline is None else outlines.area(outline)
    return _Object(box, class_, bool(crowd), float(area), outline)


def _box(plain: Any, size_HW: tuple[int, int]) -> tuple[float, float, float, float]:
    if not (isinstance(plain, Sequence) and len(plain) == 4 and all(_is_number(each) for each in plain)):
        raise _UnusableError("its bbox is not four finite numbers")
    left, top, width, height = (float(each) for each in plain)
    right, bottom = left + width, top + height
    if width <= 0 or height <= 0 or right <= left or bottom <= top:
        raise _UnusableError("its box has no size")
    inside = min(right, size_HW[1]) - max(left, 0), min(bottom, size_HW[0]) - max(top, 0)
    if min(inside) < _LEAST_PIXELS:
        raise _UnusableError("its box is outside the image")
    return left, top, right, bottom


def _scene(image: _Listed, found: list[_Object], masks: bool) -> Scene:
    return Scene(
        id=image.id,
        file_name=image.file_name,
        size_HW=image.size_HW,
        boxes_N4=np.array([each.box for each in found], np.float64).reshape(-1, 4),
        classes_N=np.array([each.class_ for each in found], np.int64),
        crowd_N=np.array([each.is_crowd for each in found], np.bool_),
        areas_N=np.array([each.area for each in found], np.float64),
        outlines=tuple(each.outline for each in found if each.outline is not None) if masks else (),
    )


def _id_in(plain: Mapping[str, Any], name: str, known: Container[int]) -> bool:
    value = plain.get(name)
    return isinstance(value, int | float) and value in known  # a list, say, could not be looked up


def _is_number(value: Any, limit: float = outlines.LARGEST) -> TypeGuard[float]:
    """Whether it is one, and below the limit: then it is finite too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < limit


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
