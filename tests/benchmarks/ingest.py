"""Ingest against the bare work of the cores, side by side.

    python tests/benchmarks/ingest.py --imagenet imagenet-sample-500.tar --cifar cifar10-train.tar.gz

ImageNet files, resized to a short side of 256 pixels: all of ingest (listing, reading, hashing, statistics, staging,
shards, manifest) in threads, against decoding, resizing and encoding alone, of bytes in memory, in one process a core.
CIFAR-10: a folder of files to shards. Alternating repeats, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "platform"))

import torch

from maskray.config.schema import IngestConfig
from maskray.data import decode
from maskray.data.ingest import ingest, thread_mapper
from maskray.data.survey import shortened

CORES = len(os.sched_getaffinity(0))
SHORT, QUALITY = 256, 92


def bare(paths: list[Path]) -> float:
    """Seconds of decoding, resizing and encoding, in a process of its own."""
    torch.set_num_threads(1)
    encoded = [path.read_bytes() for path in paths]
    start = time.perf_counter()
    for data in encoded:
        image_CHW = decode.decode(data, 3)
        if min(image_CHW.shape[1:]) > SHORT:
            decode.encode(shortened(image_CHW, SHORT), QUALITY)
    return time.perf_counter() - start


def bare_rate(pool: ProcessPoolExecutor, paths: list[Path], rounds: int) -> float:
    """Images a second of all cores: each does every file."""
    seconds = pool.map(bare, [paths * rounds] * CORES)
    return sum(len(paths) * rounds / each for each in seconds)


def ingest_rate(source: Path, **options: object) -> float:
    """Images a second of a whole ingest."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        config = IngestConfig(source=str(source), destination=f"{folder}/shards", max_bad_fraction=1, **options)
        start = time.perf_counter()
        manifest = ingest(config, thread_mapper(CORES))
        return (sum(s.rows for s in manifest.splits.values()) + manifest.num_quarantined) / (
            time.perf_counter() - start
        )


def imagenet(archive: Path, folder: Path, copies: int, repeats: int) -> dict[str, float]:
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "files", filter="data")
    paths = sorted(path for path in (folder / "files").rglob("*") if path.is_file())
    for path in paths:
        target = folder / "images" / path.stem
        target.mkdir(parents=True)
        for copy in range(copies):
            (target / f"{copy}{path.suffix}").hardlink_to(path)
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        bare_rate(pool, paths[:8], 1)  # imports
        both = [
            (bare_rate(pool, paths, max(1, copies // CORES)), ingest_rate(folder / "images", resize_short=SHORT))
            for _ in range(repeats)
        ]
    rates = [statistics.median(side) for side in zip(*both, strict=True)]
    return {"bare": rates[0], "ingest": rates[1], "ratio": rates[1] / rates[0]}


def cifar(archive: Path, folder: Path, repeats: int) -> dict[str, float]:
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "cifar", filter="data")
    return {"ingest": statistics.median(ingest_rate(folder / "cifar") for _ in range(repeats))}


def main() -> None:
    """Print a line of JSON a measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--imagenet", type=Path, help="a tar of ImageNet files")
    parser.add_argument("--cifar", type=Path, help="a tar.gz of CIFAR-10 files in class folders")
    parser.add_argument("--copies", type=int, default=8, help="of each ImageNet file")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="maskray-bench-"))
    try:
        if given.imagenet:
            found = imagenet(given.imagenet, folder, given.copies, given.repeats)
            print("ImageNet, images/s:", json.dumps({name: round(value, 3) for name, value in found.items()}))
        if given.cifar:
            found = cifar(given.cifar, folder, given.repeats)
            print("CIFAR-10, images/s:", json.dumps({name: round(value) for name, value in found.items()}))
        print(f"{CORES} cores, load {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
