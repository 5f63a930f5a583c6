"""Images a second from bytes to a crop of 224 px on a GPU: python tests/benchmarks/gpu_decode.py

torchcodec decodes a list of JPEGs in one nvJPEG call; each is then cropped and resized on the GPU (torchvision, uint8,
bicubic, antialiased). Beside it the same on one CPU core. Needs torch, torchvision, torchcodec, Pillow, psutil and
rich, an NVIDIA GPU with nvJPEG, and neither maskray's other dependencies nor Ray.

What should come out: several times a core. Where a chip has a hardware decoder for JPEG it does the baseline files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle, islice

import torch
from measure import Report, alternate, arguments, ratios
from photographs import encode_anew, photographs
from torchcodec.decoders import decode_jpeg
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--images", type=int, default=2048, help="in a repeat of a side (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images in a call (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_decode.py measures decoding on an NVIDIA GPU, and torch finds none on this machine.")
    torch.set_num_threads(1)
    sides: dict[str, Callable[[], float]] = {}
    for setting, short_side in (("original", None), ("small", 256)):
        files = [encode_anew(data, short_side) for _, data in photographs()]
        encoded = [torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in islice(cycle(files), options.images)]
        sides[f"{setting}: one core"] = rate(encoded, "cpu", options.batch, crop=True)
        sides[f"{setting}: GPU, decode only"] = rate(encoded, "cuda", options.batch, crop=False)
        sides[f"{setting}: GPU"] = rate(encoded, "cuda", options.batch, crop=True)
    alternate(sides, 1)  # the context of the GPU, nvJPEG's state, memory
    values = alternate(sides, options.repeats)

    report = Report("decode and crop on a GPU", options.json)
    for name, rates in values.items():
        report.add(name, rates, "images/s")
    for setting in ("original", "small"):
        core = values[f"{setting}: one core"]
        report.add(f"{setting}: GPU / one core", ratios(values[f"{setting}: GPU"], core), "×")
    report.show()


def rate(encoded: list[torch.Tensor], device: str, batch: int, *, crop: bool) -> Callable[[], float]:
    """Images a second of wall time, everything on the device finished."""

    def measure() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for at in range(0, len(encoded), batch):
            images = decode_jpeg(encoded[at : at + batch], device=device)
            if crop:
                torch.stack([cropped(image) for image in images])
        torch.cuda.synchronize()
        return len(encoded) / (time.perf_counter() - start)

    return measure


def cropped(image_CHW: torch.Tensor) -> torch.Tensor:
    """RandomResizedCrop(224, 0.2 to 1)."""
    box = RandomResizedCrop.get_params(image_CHW, scale=[0.2, 1.0], ratio=[3 / 4, 4 / 3])
    return functional.resized_crop(image_CHW, *box, size=[224, 224], interpolation=InterpolationMode.BICUBIC)


if __name__ == "__main__":
    main()
