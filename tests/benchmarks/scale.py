"""What one billion images and 1,024 workers cost where nothing is trained: python tests/benchmarks/scale.py.

The plan, the shares that workers take of a step, a run's resume state, the manifest of 100,000 shards, and what the
stream on Ray Data is made of. Shards are made up: a manifest is names, numbers of rows, sizes and checksums, and no
file is read. What is read when is in `footers.py`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform")]

from maskray.config.load import parse  # noqa: E402
from maskray.config.resolve import resolve  # noqa: E402
from maskray.config.schema import RunConfig  # noqa: E402
from maskray.data.manifest import Manifest, Origin, PixelSums, Shard, Split  # noqa: E402
from maskray.data.plan import Plan, share, shared_rounds  # noqa: E402
from maskray.data.shards import Dataset  # noqa: E402
from maskray.data.spec import StreamSpec  # noqa: E402
from maskray.data.storage import Storage  # noqa: E402
from maskray.training.checkpoint import Facts  # noqa: E402

GROUP_ROWS, GROUPS_PER_SHARD = 64, 128
BATCH_OF_A_WORKER = 64
LATE_STEP = 10**7


def main() -> None:
    """Print a table and, last, a line of JSON."""
    options = _options()
    numbers: dict[str, float] = {}
    for images in (10**6, options.images):
        for workers in (8, options.workers):
            numbers |= _deal(images, workers)
    for shards in (1_000, options.shards):
        numbers |= _manifest(shards, options)
    for passes in options.passes:
        numbers |= _segments(passes, options)
    for name, value in numbers.items():
        print(f"{name:<90}{value:>14,.4g}")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in numbers.items()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10**9)
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--passes", type=int, nargs="*", default=[1, 8], help="over all images")
    return parser.parse_args()


def _timed(work: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """Least seconds, and what comes of it."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - start)
    return best, found


def _deal(images: int, workers: int) -> dict[str, float]:
    """What a worker does to know what it trains on in a step, and what it remembers."""
    groups, per_step = images // GROUP_ROWS, workers * BATCH_OF_A_WORKER // GROUP_ROWS
    where = f"{images:.0e} images, {workers} workers"
    found: dict[str, float] = {}
    for step in (0, LATE_STEP):

        def locate(step: int = step) -> Any:
            plan = Plan(seed=0, num_row_groups=groups)  # nothing is kept from the step before
            return plan.locate_many(np.array(share(step, per_step, workers - 1, workers)))

        found[f"{where}: a worker's row groups of step {step:.0e}, µs"] = 1e6 * _timed(locate, 50)[0]
        dealt = sorted(p for rank in range(workers) for p in share(step, per_step, rank, workers))
        assert dealt == list(range(step * per_step, (step + 1) * per_step)), "each position once"
    assert shared_rounds(per_step, workers) == 1
    state = Facts(LATE_STEP, "0" * 16, workers, 8, {"torch": "2"}, [])
    return found | {f"{where}: state of a resume, bytes": len(json.dumps(asdict(state)))}


def manifest_of(shards: int, rows: int = GROUP_ROWS * GROUPS_PER_SHARD) -> Manifest:
    """Of a dataset that is not there."""
    train = tuple(Shard(f"train/{i:05d}.parquet", rows, 300_000_000 + i, f"{i:064x}") for i in range(shards))
    held_out = (Shard("held_out/00000.parquet", rows, 300_000_000, "0" * 64),)
    return Manifest(
        group_rows=GROUP_ROWS,
        layout={"seed": 0},
        splits={"train": Split(train, rows * shards * 10**5), "held_out": Split(held_out, 10**5)},
        channels=3,
        sums=PixelSums(1, (1,) * 4, (1,) * 4),
        class_names=(),
        num_quarantined=0,
        num_duplicates=0,
        origins=(Origin("s3://bucket/photos", "0" * 16, rows * shards, 0, "0" * 64, {}),),
    )


def _manifest(shards: int, options: argparse.Namespace) -> dict[str, float]:
    made_s, made = _timed(lambda: manifest_of(shards), 1)
    dump_s, content = _timed(made.dump, 3)
    load_s, loaded = _timed(lambda: Manifest.load(content, "here"), 3)
    open_s, dataset = _timed(lambda: Dataset(Storage("."), loaded), 3)
    groups = dataset.num_row_groups()
    find_s, _ = _timed(lambda: dataset._locate(groups - 1, "train"), 50)
    pickled = len(pickle.dumps(dataset))
    return {
        f"{shards:,} shards: manifest, MB": len(content) / 1e6,
        f"{shards:,} shards: made, with its fingerprint, s": made_s,
        f"{shards:,} shards: written, s": dump_s,
        f"{shards:,} shards: read and checked, s": load_s,
        f"{shards:,} shards: memory to read it, MiB": _memory_to_read(content),
        f"{shards:,} shards: opened, once it is read, s": open_s,
        f"{shards:,} shards: a row group found, µs": find_s * 1e6,
        f"{shards:,} shards: as it is sent to another process, MB": pickled / 1e6,
    }


def _memory_to_read(content: bytes) -> float:
    """MiB at most, in a process of its own: this one has had as much before, and only the highest is counted."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        # Spawned: a fork would begin with this one's memory.
        with get_context("spawn").Pool(1) as pool:
            return pool.apply(_growth_to_read, (file.name,))


def _growth_to_read(path: str) -> float:
    before = _highest_mib()
    Manifest.load(Path(path).read_bytes(), "here")
    return _highest_mib() - before


def _highest_mib() -> float:
    """That this process has had so far. Not `ru_maxrss`, which a new process has from the one that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10


def _spec(passes: int, options: argparse.Namespace) -> tuple[StreamSpec, RunConfig]:
    shards = -(-options.images // (GROUP_ROWS * GROUPS_PER_SHARD))
    dataset = Dataset(Storage("."), manifest_of(shards))
    raw = {
        "name": "scale",
        "data": {"path": ".", "image_size": 224},
        "optim": {"epochs": passes, "global_batch": options.workers * BATCH_OF_A_WORKER},
        "cluster": {"workers": options.workers},
    }
    config = parse(RunConfig, raw)
    return StreamSpec.of(config, resolve(config, dataset.facts(), None), dataset), config


def _segments(passes: int, options: argparse.Namespace) -> dict[str, float]:
    """What Train is given of a run, and makes of it at each start of the workers, and of each execution."""
    import ray

    from maskray.on_ray import stream

    spec, config = _spec(passes, options)
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # A dataset is made in a cluster, and by none of its tasks.
        ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=folder, logging_level="ERROR")
        run, workers = Storage(f"{folder}/run"), options.workers
        given_s, given = _timed(lambda: stream.datasets(spec, run, workers, config.data), 3)
        start_s, started = _timed(lambda: {name: make() for name, make in given.items()}, 3)
        open_s, opened = _timed(next(iter(started.values())).open, 3)
        sizes = len(pickle.dumps(started)), len(pickle.dumps(opened))
        ray.shutdown()
    where = f"{options.images:.0e} images × {passes} passes, {workers} workers"
    return {
        f"{where}: executions of Ray Data": len(given),
        f"{where}: given to Train, ms": given_s * 1e3,
        f"{where}: made at each start of the workers, ms": start_s * 1e3,
        f"{where}: sent then, to one process, MB": sizes[0] / 1e6,
        f"{where}: one of them made, when it is near, s": open_s,
        f"{where}: and sent, to one process, MB": sizes[1] / 1e6,
    }


if __name__ == "__main__":
    main()
