"""Images a second that the workers' own walk delivers, without a cache and with each: python tests/benchmarks/cache.py.

Bare torch, no Ray. On a machine with a GPU: --device cuda (batches of all sides then end there). An ingested dataset of
your own: --dataset PATH --image-size 224.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "platform"))

from maskray.config.resolve import resolve  # noqa: E402
from maskray.config.schema import IngestConfig, RunConfig  # noqa: E402
from maskray.data.cache import cache_folder, open_cache  # noqa: E402
from maskray.data.device import moved  # noqa: E402
from maskray.data.ingest import ingest  # noqa: E402
from maskray.data.local import open_units  # noqa: E402
from maskray.data.mapper import thread_mapper  # noqa: E402
from maskray.data.shards import Dataset  # noqa: E402
from maskray.data.spec import StreamSpec  # noqa: E402
from maskray.data.stream import Unit, steps  # noqa: E402

CIFAR = ROOT.parent / "shared" / "data" / "cifar10-train.tar.gz"
CACHES = ("none", "host", "device")
BATCH_GROUPS, WARM_STEPS = 4, 2


class Rate(NamedTuple):
    """Images a second of the clock, and a second that this process computed, which a busy machine changes less."""

    wall: float
    cpu: float


def main() -> None:
    """Print a table, a row a dataset and cache."""
    options = _options()
    torch.set_num_threads(1)  # what training takes where the config does not say; the device side on a CPU has no other
    print(f"{options.threads} threads decode and crop, {options.device}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(prefix="maskray-bench-") as folder:
        for name, path, size, channels in _datasets(options, Path(folder)):
            config = _config(path, size, channels, options.threads, Path(folder) / "cache")
            dataset = Dataset.open(str(path))
            start = time.perf_counter()
            whole = open_cache(dataset, channels, cache_folder(config.data.cache_folder))
            seconds = time.perf_counter() - start
            num_images = len(whole.heights)
            print(f"{name}: {num_images:,} images decoded into {whole.num_bytes:,} bytes in {seconds:.2f} s")
            rates = _alternating(config, dataset, options)
            for cache, found in rates.items():
                wall, cpu = ([rate[i] for rate in found] for i in (0, 1))
                ratio = statistics.median(a / b[1] for a, b in zip(cpu, rates["none"], strict=True))
                print(
                    f"| {name} | {cache} | {statistics.median(wall):,.0f} images/s "
                    f"({min(wall):,.0f} to {max(wall):,.0f}) | "
                    f"{statistics.median(cpu):,.0f} images a CPU-second, {ratio:.2f} × none |"
                )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=2, help="that decode and crop without `device` (default: 2)")
    parser.add_argument("--images", type=int, default=16384, help="in one measurement (default: 16384)")
    parser.add_argument("--repeats", type=int, default=5, help="of each side, in turn (default: 5)")
    parser.add_argument("--cifar", type=Path, default=CIFAR, help="archive of CIFAR-10's images in class folders")
    parser.add_argument("--dataset", type=Path, help="an ingested dataset, in place of the digits and CIFAR-10")
    parser.add_argument("--image-size", type=int, default=224, help="with --dataset (default: 224)")
    return parser.parse_args()


def _datasets(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, int, int]]:
    """Name, path, image size and channels."""
    if options.dataset is not None:
        yield options.dataset.name, options.dataset, options.image_size, 3
        return
    yield "digits", _ingested("digits", folder / "digits", 16), 8, 1
    if options.cifar.exists():
        with tarfile.open(options.cifar) as archive:
            archive.extractall(folder / "files", filter="data")
        yield "CIFAR-10", _ingested(str(folder / "files"), folder / "cifar10", 64), 32, 3
    else:
        print(f"CIFAR-10 is left out: {options.cifar} is not here")


def _ingested(source: str, destination: Path, group_rows: int) -> Path:
    ingest(IngestConfig(source=source, destination=str(destination), group_rows=group_rows), thread_mapper(2))
    return destination


def _config(path: Path, size: int, channels: int, threads: int, cache: Path) -> RunConfig:
    batch = BATCH_GROUPS * Dataset.open(str(path)).manifest.group_rows
    return RunConfig.model_validate(
        {
            "name": "bench",
            "data": {
                "path": str(path),
                "image_size": size,
                "channels": channels,
                "stream": "local",
                "decode_threads": threads,
                "cache_folder": str(cache),
                "local_bytes": 2**40,
            },
            "model": {"patch": size // 4, "width": 64, "heads": 4},
            "optim": {"global_batch": batch, "steps": 1},
        }
    )


def _alternating(config: RunConfig, dataset: Dataset, options: argparse.Namespace) -> dict[str, list[Rate]]:
    """Rates of each cache, in turn: what slows the machine for a while then slows all of them."""
    rates: dict[str, list[Rate]] = {cache: [] for cache in CACHES}
    for _ in range(options.repeats):
        for cache in CACHES:
            rates[cache].append(_rate(config, dataset, cache, options))
    return rates


def _rate(config: RunConfig, dataset: Dataset, cache: str, options: argparse.Namespace) -> Rate:
    """Of whole batches on the device, after the first ones."""
    num_steps = -(-options.images // config.optim.global_batch)
    spec = StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
    spec = replace(spec, total_steps=WARM_STEPS + num_steps)
    data = config.data.model_copy(update={"cache": cache})
    with open_units(spec, data, options.device, rank=0, world_size=1, start_step=0) as units:
        batches = _delivered(units, spec, options.device)
        for _ in islice(batches, WARM_STEPS):
            pass
        _settle(options.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        num_images = sum(batches)
        _settle(options.device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return Rate(num_images / seconds, num_images / cpu_seconds)


def _delivered(units: Iterator[Unit], spec: StreamSpec, device: torch.device) -> Iterator[int]:
    for step in steps(units, spec, rank=0, world_size=1, start_step=0):
        for batch in step.batches:
            moved(batch.images_BCHW, device)
            moved(batch.visible_BHW, device)
            yield len(batch.keys)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
