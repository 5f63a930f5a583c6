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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2] / "platform"))

import torch

from maskray.config.schema import IngestConfig
from maskray.data import decode
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.data.survey import shortened

CORES = len(os.sched_getaffinity(0))
SHORT, QUALITY = 256, 92


class Rate(NamedTuple):
    """Images a second of all cores."""

    by_clock: float
    by_cpu: float
    """If every core had been there for it all the time: what a busy machine does not change much."""


def bare(paths: list[Path]) -> tuple[float, float]:
    """Seconds by the clock and of CPU of decoding, resizing and encoding, in a process of its own."""
    torch.set_num_threads(1)
    encoded = [path.read_bytes() for path in paths]
    start, cpu = time.perf_counter(), time.process_time()
    for data in encoded:
        image_CHW = decode.decode(data, 3)
        if min(image_CHW.shape[1:]) > SHORT:
            decode.encode(shortened(image_CHW, SHORT), QUALITY)
    return time.perf_counter() - start, time.process_time() - cpu


def bare_rate(pool: ProcessPoolExecutor, paths: list[Path], rounds: int) -> Rate:
    """Each core does every file."""
    seconds = list(pool.map(bare, [paths * rounds] * CORES))
    return Rate(*(sum(len(paths) * rounds / each for each in column) for column in zip(*seconds, strict=True)))


def ingest_rate(source: Path, **options: object) -> Rate:
    """Of a whole ingest."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        config = IngestConfig(source=str(source), destination=f"{folder}/shards", max_bad_fraction=1, **options)
        start, cpu = time.perf_counter(), time.process_time()
        manifest = ingest(config, thread_mapper(CORES))
        images = sum(s.rows for s in manifest.splits.values()) + manifest.num_quarantined
        return Rate(images / (time.perf_counter() - start), CORES * images / (time.process_time() - cpu))


def medians(rates: list[Rate]) -> Rate:
    """Column by column."""
    return Rate(*(statistics.median(column) for column in zip(*rates, strict=True)))


def imagenet(archive: Path, folder: Path, copies: int, repeats: int) -> dict[str, Rate]:
    """Both sides, one after the other, again and again."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "files", filter="data")
    paths = sorted(path for path in (folder / "files").rglob("*") if path.is_file())
    for path in paths:
        target = folder / "images" / path.stem
        target.mkdir(parents=True)
        for copy in range(copies):
            (target / f"{copy}{path.suffix}").hardlink_to(path)
    bares, ingests = [], []
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        bare_rate(pool, paths[:8], 1)  # imports
        for _ in range(repeats):
            bares.append(bare_rate(pool, paths, max(1, copies // CORES)))
            ingests.append(ingest_rate(folder / "images", resize_short=SHORT))
    one, two = medians(bares), medians(ingests)
    return {"bare": one, "ingest": two, "ratio": Rate(two.by_clock / one.by_clock, two.by_cpu / one.by_cpu)}


def cifar(archive: Path, folder: Path, repeats: int) -> dict[str, Rate]:
    """Files of 32 × 32 pixels to shards."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "cifar", filter="data")
    return {"ingest": medians([ingest_rate(folder / "cifar") for _ in range(repeats)])}


def show(what: str, found: dict[str, Rate]) -> None:
    """A line of JSON: images a second, and the ratio of ingest to the bare work."""
    rounded = {name: {k: round(v, 2) for k, v in rate._asdict().items()} for name, rate in found.items()}
    print(what, json.dumps(rounded))


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
            show("ImageNet", found)
        if given.cifar:
            found = cifar(given.cifar, folder, given.repeats)
            show("CIFAR-10", found)
        print(f"{CORES} cores, load {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
