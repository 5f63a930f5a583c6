"""A detection set made from real cut-outs: scikit-learn's handwritten digits, pasted on pieces of its photographs.

Boxes and outlines are known to the pixel. Drawn by a seed; the digits of two parts of a set are not the same.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from maskray.evaluation.detection import outlines
from maskray.evaluation.samples import pieces

DIGITS = (0, 1, 4)
"""Which digits there are; ids of categories are these + 10, with a hole."""
SIDES = (24, 56)
"""Pixels a side of a digit, tight or not."""
TRIES = 50


def write(folder: Path, num: int, *, seed: int, side: int = 128, part: int = 0, parts: int = 2) -> None:
    """`annotations.json` and `images/` of `num` canvases; `part` of `parts` says which digits are pasted."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng([seed, part])
    digits = load_digits()
    mine = [i for i in range(part, len(digits.target), parts) if digits.target[i] in DIGITS]
    images, annotations = [], []
    for number, photograph in enumerate(pieces(num, 3, (side, side), seed=1000 * seed + part), start=1):
        canvas, objects = _canvas(photograph.transpose(1, 2, 0), digits, mine, rng)
        name = f"{number:05}.png"
        Image.fromarray(canvas).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": side, "height": side})
        for digit, mask in objects:
            rle = outlines.encode(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 10 + int(digit),
                    "bbox": _box(mask),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [side, side], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": 10 + digit, "name": f"digit {digit}"} for digit in DIGITS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def _canvas(photograph, digits, mine, rng):
    canvas, taken, objects = photograph.astype(np.float32), np.zeros(photograph.shape[:2], bool), []
    for _ in range(rng.integers(1, 4)):
        which, size = rng.choice(mine), int(rng.integers(*SIDES))
        cut = Image.fromarray((digits.images[which] * 15.9).astype(np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        alpha = np.asarray(cut, np.float32) / 255
        for _ in range(TRIES):
            top, left = rng.integers(0, canvas.shape[0] - size, 2)
            where = (slice(top, top + size), slice(left, left + size))
            if not taken[where].any():
                break
        else:
            continue
        color = rng.permutation([255, rng.integers(0, 256), 0]).astype(np.float32)
        canvas[where] = canvas[where] * (1 - alpha[..., None]) + color * alpha[..., None]
        taken[where] = True
        mask = np.zeros(taken.shape, np.uint8)
        mask[where] = alpha > 0.5
        objects.append((digits.target[which], mask))
    return canvas.round().astype(np.uint8), objects


def _box(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
