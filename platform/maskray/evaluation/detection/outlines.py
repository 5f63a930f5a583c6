"""Outlines of objects: COCO's polygons and run lengths to masks and back, by the evaluator's library.

Shape letters: H and W pixels of an image down and across.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as library

Rle = dict[str, Any]
"""Run lengths as COCO writes them compressed: `size` (H, W) and `counts`."""
Mask = np.ndarray[Any, np.dtype[np.uint8]]

LARGEST = 1e6
"""Pixels: no coordinate beyond that is one, and the library would draw all the way to it."""


def read(plain: Any, size_HW: tuple[int, int]) -> Rle:
    """Run lengths of what an annotation has as `segmentation`: polygons, or run lengths plain or compressed.

    Raises:
        ValueError: it is none of these, or that of an image of another size; the message is a reason to show.
    """
    if isinstance(plain, Mapping):
        return _from_counts(plain, size_HW)
    if not isinstance(plain, Sequence) or isinstance(plain, str) or not plain:
        raise ValueError("it has no outline")
    if not all(_is_polygon(each) for each in plain):
        raise ValueError("its outline is no list of polygons of three points or more")
    rle: Rle = library.merge(library.frPyObjects([list(map(float, each)) for each in plain], *size_HW))
    if not area(rle):
        raise ValueError("its outline covers no pixel")
    return rle


def encode(mask_HW: Mask) -> Rle:
    """Run lengths of a mask, 1 on the object."""
    rle: Rle = library.encode(np.asfortranarray(mask_HW))
    return rle


def decode(rle: Rle) -> Mask:
    """The mask (H, W), 1 on the object."""
    mask_HW: Mask = library.decode(rle)
    return mask_HW


def area(rle: Rle) -> int:
    """Pixels on the object."""
    return int(library.area(rle))


def box(rle: Rle) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is on the object, in whole pixels."""
    left, top, width, height = library.toBbox(rle)
    return int(left), int(top), int(width), int(height)


def _from_counts(plain: Mapping[str, Any], size_HW: tuple[int, int]) -> Rle:
    size, counts = plain.get("size"), plain.get("counts")
    if not isinstance(size, Sequence) or tuple(size) != tuple(size_HW):
        raise ValueError(f"its outline is that of an image of {size} pixels, the image has {list(size_HW)}")
    whole = {"size": list(size_HW), "counts": counts}
    try:
        mask_HW = decode(library.frPyObjects(whole, *size_HW) if isinstance(counts, list) else whole)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError("its outline's run lengths are damaged, or not those of its image") from error
    if not mask_HW.any():
        raise ValueError("its outline covers no pixel")
    return encode(mask_HW)


def _is_polygon(plain: Any) -> bool:
    is_list = isinstance(plain, Sequence) and not isinstance(plain, str)
    return is_list and len(plain) >= 6 and len(plain) % 2 == 0 and all(_is_coordinate(each) for each in plain)


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST  # so it is finite
