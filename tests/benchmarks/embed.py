"""Embedding 50,000 images against the bare encoder, side by side, and killed twice on the way.

    python tests/benchmarks/embed.py --cifar cifar10-train.tar.gz

CIFAR-10's training images, by an untrained encoder of the size of `configs/pretrain/cifar10_vit_tiny.yaml`. First
`maskray embed` as its user starts it, on an embedded cluster, killed with SIGKILL at a third and at two thirds of the
parts: the table must have each image once. Then, on a cluster that runs: all of an embedding (actors started, shards
read, images decoded, the table written and counted), and of it from the first block on, against the same encoder on
decoded batches of the same size in memory, in one process a core with one thread. Last, why the actors are our own: the
same blocks of some of the images by Ray Data's actors.

What must come out: 50,000 rows of unique keys, and 0.85 of the bare encoder's rate. What costs: the start of actors,
which import torch (8 s of an embedding), so `--rows` far below 50,000 measure that; an image is decoded in 60 µs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import embedded
import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch
import yaml
from measure import Report, alternate, arguments, ratios

from maskray.config.embedding import EmbedConfig
from maskray.config.load import load, parse
from maskray.config.schema import ClusterConfig, IngestConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.data.portions import Images, of_split
from maskray.data.shards import Dataset
from maskray.data.stream import walk
from maskray.embedding.table import prepare
from maskray.evaluation.blocks import compute
from maskray.evaluation.pictures import BATCH, encode
from maskray.models.build import build_model, build_normalize
from maskray.models.encoder import Encoder, load_encoder, save_encoder
from maskray.on_ray.embed import embed
from maskray.on_ray.features import blocks_on_ray

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))
ROWS, PART_ROWS, NEEDED = 50_000, 2048, 0.85


def main() -> None:
    """Print a table, or say what is missing."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--cifar", type=Path, help="a tar.gz of CIFAR-10's training images in class folders")
    parser.add_argument("--rows", type=int, default=ROWS, help="about so many in a turn of ours (default: %(default)s)")
    parser.add_argument("--bare-rows", type=int, default=10_000, help="of a turn of the encoder (default: %(default)s)")
    parser.add_argument("--only", choices=("kills", "race", "engines"), help="one of the parts")
    given = parser.parse_args()
    if given.cifar is None or not given.cifar.exists():
        parser.error(f"there is no data: --cifar must name a tar.gz of CIFAR-10 files (given: {given.cifar})")
    report = Report("embed, CIFAR-10", given.json)
    folder = Path(tempfile.mkdtemp(prefix="maskray-bench-"))
    try:
        asked = made(given.cifar, folder, given.rows / ROWS)
        if given.only in (None, "kills"):
            killed_twice(asked, folder, report)
        with embedded.cluster(cpus=CORES, object_store_bytes=2**29):
            if given.only in (None, "race"):
                race(asked, folder, given.bare_rows, given.repeats, report)
            if given.only in (None, "engines"):
                engines(asked, given.bare_rows, given.repeats, report)
    finally:
        shutil.rmtree(folder)
    report.show()


def made(archive: Path, folder: Path, share: float) -> dict[str, Any]:
    """The shards, a share of them held out, and the encoder; what an embedding of them is asked for."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "files", filter="data")
    shards = str(folder / "shards")
    options = {"held_out_fraction": share % 1}
    ingest(IngestConfig(source=str(folder / "files"), destination=shards, **options), thread_mapper(CORES))
    config = load(ROOT / "configs/pretrain/cifar10_vit_tiny.yaml", [f"data.path={shards}"])
    manifest = Dataset.open(shards).manifest
    model = build_model(config.model, config.data.image_size, config.data.channels)
    save_encoder(folder / "encoder", model, build_normalize(config, manifest), config)
    cluster = {"workers": CORES, "embedded_cpus": CORES}
    return {
        "encoder": str(folder / "encoder"),
        "images": shards,
        "batch": BATCH,
        "part_rows": PART_ROWS,
        "cluster": cluster,
    }


def killed_twice(asked: dict[str, Any], folder: Path, report: Report) -> None:
    """The command, again and again, until it ends by itself."""
    table = folder / "killed"
    (folder / "embed.yaml").write_text(yaml.safe_dump(asked | {"destination": str(table)}))
    num_parts = ROWS // PART_ROWS
    seconds = 0.0
    for parts in (num_parts // 3, 2 * num_parts // 3, None):
        start = time.perf_counter()
        command = [sys.executable, "-m", "maskray.cli", "embed", "--config", str(folder / "embed.yaml")]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT / "platform")})
        if parts is None:
            assert process.wait() == 0
        else:
            wait_for(parts, process, table)
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            for child in psutil.wait_procs(children, timeout=1)[1]:
                child.kill()
        seconds += time.perf_counter() - start
    keys = pq.read_table(table, columns=["key"])["key"].to_pylist()
    report.add("rows after two kills", [len(keys)], "rows", at_least=ROWS, at_most=ROWS)
    report.add("keys among them", [len(set(keys))], "keys", at_least=ROWS, at_most=ROWS)
    report.add("all three launches", [seconds], "s")


def wait_for(parts: int, process: subprocess.Popen[bytes], table: Path) -> None:
    """Until there are so many parts."""
    while len(list(table.glob("[th]*.parquet"))) < parts:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)


def race(asked: dict[str, Any], folder: Path, bare_rows: int, repeats: int, report: Report) -> None:
    """Both sides, one after the other, again and again, on a cluster that runs."""
    steady: list[float] = []
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        sides = {
            "the encoder alone": partial(bare_rate, pool, asked, bare_rows // CORES),
            "maskray embed, all of it": partial(embed_rate, asked, folder, steady),
        }
        bare_rate(pool, asked, BATCH)  # imports
        rates = alternate(sides, repeats)
    rates["maskray embed, from its first block on"] = steady
    for name, values in rates.items():
        report.add(name, values, "images/s")
    bare, ours, _ = rates.values()
    report.add("all of it / the encoder alone", ratios(ours, bare), "×", at_least=NEEDED)
    report.add("from the first block on / the encoder alone", ratios(steady, bare), "×", at_least=NEEDED)


def engines(asked: dict[str, Any], rows: int, repeats: int, report: Report) -> None:
    """Our actors against Ray Data's, without writing."""
    images = of_split(Dataset.open(asked["images"]), "train", BATCH, rows)
    encoder = load_encoder(asked["encoder"])

    def rate(blocks: Callable[[], Iterable[Any]]) -> float:
        start = time.perf_counter()
        assert sum(len(block) for block in blocks()) == rows
        return rows / (time.perf_counter() - start)

    def ours() -> Iterator[Any]:
        for block in blocks_on_ray(images, encoder, ClusterConfig(workers=CORES)):
            yield block.features

    rates = alternate(
        {"ours": partial(rate, ours), "theirs": partial(rate, partial(ray_data, images, encoder))}, repeats
    )
    report.add("blocks by our actors", rates["ours"], "images/s")
    report.add("blocks by Ray Data's actors", rates["theirs"], "images/s")
    report.add("ours / Ray Data's", ratios(rates["ours"], rates["theirs"]), "×")


class RayDataWorker:
    """What Ray Data's actors run."""

    def __init__(self, held: Any) -> None:
        self.encoder, self.read, self.portions = ray.get(held[0])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        blocks = [compute(self.encoder, self.read, self.portions[number]) for number in batch["id"].tolist()]
        return {"features": np.concatenate([block.features for block in blocks])}


def ray_data(images: Images, encoder: Encoder) -> Iterator[Any]:
    """The blocks in order, a portion a row."""
    portions = list(images.portions())
    held = ray.put((encoder, images.read, portions))
    dataset = ray.data.range(len(portions), override_num_blocks=len(portions)).map_batches(
        RayDataWorker,
        batch_size=None,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=CORES),
        fn_constructor_args=([held],),
    )
    dataset.context.execution_options.preserve_order = True
    for batch in dataset.iter_batches(batch_size=None):
        yield batch["features"]


def embed_rate(asked: dict[str, Any], folder: Path, steady: list[float]) -> float:
    """Images a second of a whole embedding; that from its first block on is added to `steady`."""
    told: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        start = time.perf_counter()
        split = "held_out" if Dataset.open(asked["images"]).num_rows("held_out") else "train"
        config = parse(EmbedConfig, asked | {"destination": f"{place}/table", "splits": [split]})
        manifest = embed(prepare(config), lambda done, total, phase: told.append((time.perf_counter(), done)))
        end = time.perf_counter()
    (first, done), rows = told[CORES], manifest["rows"]  # told[0] is before the start; each worker has given a block
    steady.append((rows - done) / (end - first))
    return float(rows / (end - start))


def bare_rate(pool: ProcessPoolExecutor, asked: dict[str, Any], rows: int) -> float:
    """Images a second of all cores, each of which encodes as many."""
    return sum(rows / seconds for seconds in pool.map(bare_seconds, [asked] * CORES, [rows] * CORES))


def bare_seconds(asked: dict[str, Any], rows: int) -> float:
    """Of encoding so many images, in a process of its own, of which decoded batches lie in memory."""
    torch.set_num_threads(1)
    encoder = load_encoder(asked["encoder"])
    groups = walk(Dataset.open(asked["images"]), "train", encoder.image_size, encoder.channels, 4 * BATCH)
    images = list(torch.cat([group.images_BCHW for group in groups]))
    start = time.perf_counter()
    for first in range(0, rows, len(images)):
        encode(images[: rows - first], encoder, asked["batch"])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
