"""Images a second and core from encoded bytes to a crop of 224 px: python tests/benchmarks/decode.py

All with one thread, timed by the CPU time of the whole process:

* the MAE authors' path, image by image: ImageFolder's loader (Pillow, converted to RGB), torchvision's
  RandomResizedCrop(224, 0.2 to 1, bicubic), flip, ToTensor, Normalize; from files;
* the same, stacked to batches of 64 as DataLoader does;
* the same, image by image, up to the flip, as uint8: what the decoder and the resize alone gain, without the arithmetic
  that maskray leaves to the device;
* maskray's `load_unit`, all of it: row groups of 64 read from shards, decoded, boxes, flips and masks drawn, cropped
  and written into one array.

Once on the files as they came, once on files encoded anew at short side 256 and quality 92, as ingest can do.

What must come out: maskray at least 1.85 times the authors' path image by image on original files, and on small files
4.4 times the authors' path on original ones, which is what a user gains who takes up both. On original files three
quarters of maskray's time are the JPEG decoder's, so only a faster decoder moves the first; on small ones a third is
the resize.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count, islice

import torch
from corpus import GROUP_ROWS, make_dataset, make_spec
from measure import Report, alternate, arguments, ratios
from photographs import WORK, make_files
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from maskray.data.shards import Dataset
from maskray.data.stream import load_unit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def authors_transform(*, normalized: bool = True) -> transforms.Compose:
    """That of the MAE authors' main_pretrain.py, or the same without the last two steps, as uint8."""
    crop = transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)] if normalized else [transforms.PILToTensor()]
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--images", type=int, default=512, help="in a repeat of a side (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups = max(1, options.images // GROUP_ROWS)

    sides: dict[str, Callable[[], float]] = {}
    for setting, short_side in (("original", None), ("small", 256)):
        files = make_files(WORK, 8192, short_side=short_side)
        sides[f"{setting}: authors"] = authors(str(files), groups, authors_transform(), stack=False)
        sides[f"{setting}: authors, stacked"] = authors(str(files), groups, authors_transform(), stack=True)
        uint8 = authors_transform(normalized=False)
        sides[f"{setting}: authors, to uint8 only"] = authors(str(files), groups, uint8, stack=False)
        sides[f"{setting}: maskray"] = ours(make_dataset(files), groups)
    alternate(sides, 1)  # caches, imports, lazy parts of libraries
    values = alternate(sides, options.repeats)

    report = Report("decode and crop, one core", options.json)
    for name, rates in values.items():
        report.add(name, rates, "images/s")
    base, original, small = values["original: authors"], values["original: maskray"], values["small: maskray"]
    to_uint8 = values["original: authors, to uint8 only"]
    report.add("maskray / authors, original files", ratios(original, base), "×", at_least=1.85)
    report.add("maskray on small files / authors on original files", ratios(small, base), "×", at_least=4.4)
    report.add("maskray / authors, small files", ratios(small, values["small: authors"]), "×")
    report.add("maskray / authors to uint8, original files", ratios(original, to_uint8), "×")
    report.show()


def authors(folder: str, groups: int, transform: transforms.Compose, *, stack: bool) -> Callable[[], float]:
    """Images a CPU-second of ImageFolder with a transform."""
    images = datasets.ImageFolder(folder, transform)
    order = iter(torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).repeat(100).tolist())

    def rate() -> float:
        start = time.process_time()
        for _ in range(groups):
            batch = [images[i][0] for i in islice(order, GROUP_ROWS)]
            if stack:
                torch.stack(batch)
        return groups * GROUP_ROWS / (time.process_time() - start)

    return rate


def ours(dataset: Dataset, groups: int) -> Callable[[], float]:
    """Images a CPU-second of the stream's function."""
    _, spec = make_spec(dataset, global_batch=GROUP_ROWS, steps=1)
    positions = count()

    def rate() -> float:
        start = time.process_time()
        for position in islice(positions, groups):
            load_unit(spec, dataset, position)
        return groups * GROUP_ROWS / (time.process_time() - start)

    return rate


if __name__ == "__main__":
    main()
