"""Ingest against the bare work of the cores, side by side.

    python tests/benchmarks/ingest.py --imagenet imagenet-sample-500.tar --cifar cifar10-train.tar.gz

ImageNet files, resized to a short side of 256 pixels: all of ingest (listing, reading, hashing, statistics, staging,
shards, manifest) as Ray tasks and in threads of one process, against decoding, resizing and encoding alone, of bytes in
memory, in one process a core. CIFAR-10: a folder of files to shards.

What must come out: 0.85 of the bare rate as Ray tasks, on a cluster that runs; 1,500 images/s of CIFAR-10. What costs:
of an image's CPU time on one core 85 % are decoding, resizing and encoding, 4 % hashing, 2 % statistics, the rest
reading and writing, each twice; and while the source is listed and the shards are planned, one core works.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import embedded
import torch
from measure import Report, alternate, arguments, ratios

from maskray.config.schema import IngestConfig
from maskray.data import decode
from maskray.data.ingest import ingest
from maskray.data.mapper import Mapper, thread_mapper
from maskray.data.survey import shortened
from maskray.on_ray.ingest import ray_mapper

CORES = len(os.sched_getaffinity(0))
SHORT, QUALITY = 256, 92


def main() -> None:
    """Print a table for each corpus."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--imagenet", type=Path, help="a tar of ImageNet files")
    parser.add_argument("--cifar", type=Path, help="a tar.gz of CIFAR-10 files in class folders")
    parser.add_argument("--copies", type=int, default=33, help="of each ImageNet file (default: %(default)s)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="maskray-bench-"))
    try:
        with embedded.cluster(cpus=CORES, object_store_bytes=2**30):
            if given.imagenet:
                imagenet(given.imagenet, folder, given.copies, given.repeats, Report("ingest, ImageNet", given.json))
            if given.cifar:
                cifar(given.cifar, folder, given.repeats, Report("ingest, CIFAR-10", given.json))
    finally:
        shutil.rmtree(folder)


def imagenet(archive: Path, folder: Path, copies: int, repeats: int, report: Report) -> None:
    """All sides, one after the other, again and again."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "files", filter="data")
    paths = sorted(path for path in (folder / "files").rglob("*") if path.is_file())
    for path in paths:
        target = folder / "images" / path.stem
        target.mkdir(parents=True)
        for copy in range(copies):
            (target / f"{copy}{path.suffix}").hardlink_to(path)
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        sides = {
            "decode, resize and encode alone": partial(bare_rate, pool, paths, max(1, copies // CORES)),
            "ingest, Ray tasks": partial(ingest_rate, folder / "images", ray_mapper(), resize_short=SHORT),
            "ingest, threads": partial(ingest_rate, folder / "images", thread_mapper(CORES), resize_short=SHORT),
        }
        bare_rate(pool, paths[:8], 1)  # imports
        ingest_rate(folder / "files", ray_mapper())
        rates = alternate(sides, repeats)
    for name, values in rates.items():
        report.add(name, values, "images/s")
    bare, on_ray, threads = rates.values()
    report.add("Ray tasks / alone", ratios(on_ray, bare), "×", at_least=0.85)
    report.add("threads / alone", ratios(threads, bare), "×")
    report.show()


def cifar(archive: Path, folder: Path, repeats: int, report: Report) -> None:
    """Files of 32 × 32 pixels to shards."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "cifar", filter="data")
    side = partial(ingest_rate, folder / "cifar", thread_mapper(CORES))
    report.add("files to shards, threads", alternate({"": side}, repeats)[""], "images/s", at_least=1500)
    report.show()


def bare_rate(pool: ProcessPoolExecutor, paths: list[Path], rounds: int) -> float:
    """Images a second of all cores; each does every file."""
    return sum(len(paths) * rounds / seconds for seconds in pool.map(bare_seconds, [paths * rounds] * CORES))


def bare_seconds(paths: list[Path]) -> float:
    """Of decoding, resizing and encoding, in a process of its own."""
    torch.set_num_threads(1)
    encoded = [path.read_bytes() for path in paths]
    start = time.perf_counter()
    for data in encoded:
        image_CHW = decode.decode(data, 3)
        if min(image_CHW.shape[1:]) > SHORT:
            decode.encode(shortened(image_CHW, SHORT), QUALITY)
    return time.perf_counter() - start


def ingest_rate(source: Path, mapper: Mapper, **options: object) -> float:
    """Images a second of a whole ingest."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        config = IngestConfig(source=str(source), destination=f"{folder}/shards", max_bad_fraction=1, **options)
        start = time.perf_counter()
        manifest = ingest(config, mapper)
        images = sum(s.rows for s in manifest.splits.values()) + manifest.num_quarantined
        return images / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
