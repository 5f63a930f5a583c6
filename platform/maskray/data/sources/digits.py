"""The digits that scikit-learn ships: real images with no download."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from maskray.data.sources.base import Entry, Place, Source


def open_digits() -> Source:
    """1,797 handwritten digits of 8 × 8 pixels (UCI)."""
    _, labels = _pixels()
    entries = [Entry(f"digits/{i:04d}", int(label), Place("", i)) for i, label in enumerate(labels)]
    return Source(entries, _read, tuple("0123456789"), "digits")


def _read(entry: Entry) -> bytes:
    pixels_NHW, _ = _pixels()
    buffer = io.BytesIO()
    Image.fromarray(pixels_NHW[entry.place.at]).save(buffer, "PNG")
    return buffer.getvalue()


@cache
def _pixels() -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]:
    from sklearn.datasets import load_digits  # slow to import, and no other source needs it

    data = load_digits()
    return (data.images.astype(np.int64) * 255 // 16).astype(np.uint8), data.target
