"""What a probe beside it costs a training loop: runs with probes all the time, without any, and beside a busy core.

    python tests/benchmarks/probe.py --repeats 4

One worker of one core trains; one core is set aside for probes, of which a next one begins when the last has ended. The
same run on the same images each time; images/s are those of the loop itself, as every run tells MLflow. The third kind
has no probes, but a process that does nothing but multiply matrices: what any work on the other core costs, through the
memory, caches and clocks that both share.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

from measure import Report, alternate, arguments, ratios

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # an embedded cluster of this process alone

import numpy as np
from mlflow import MlflowClient

from maskray.config.load import parse
from maskray.config.schema import ClusterConfig, IngestConfig, RunConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.launch import launch
from maskray.on_ray.cluster import connected
from maskray.on_ray.train import RayLauncher
from maskray.preparing import prepare

EVERY = 20
RESAMPLES = 10_000


BUSY = "import torch; torch.set_num_threads(1); a = torch.rand(512, 512)\nwhile True: a @ a"
KINDS = ("without", "with probes", "beside a busy core")


def main() -> None:
    parser = arguments(__doc__, repeats=4)
    parser.add_argument("--steps", type=int, default=160, help="of a run (default: %(default)s)")
    given = parser.parse_args()
    if given.repeats < 2:
        parser.error("one run of each kind says nothing of the noise")
    report = Report("probe, beside a training loop", given.json)
    with tempfile.TemporaryDirectory(prefix="maskray-") as text:
        folder, probes = Path(text), list[float]()
        ingest(
            IngestConfig(source="digits", destination=str(folder / "digits"), group_rows=16, held_out_fraction=0.2),
            thread_mapper(1),
        )
        turns = {kind: count() for kind in KINDS}

        def side(kind: str) -> float:
            rate, judged = trained(folder, f"{kind.replace(' ', '-')}-{next(turns[kind])}", given.steps, kind)
            if judged:
                probes.append(judged)
            return rate

        with connected(ClusterConfig(embedded_cpus=2)):
            trained(folder, "warm-up", 2 * EVERY, KINDS[1])
            rates = alternate({kind: partial(side, kind) for kind in KINDS}, given.repeats)
    without = rates[KINDS[0]]
    for kind, values in rates.items():
        report.add(kind, values, "images/s")
    for kind in KINDS[1:]:
        beside = ratios(rates[kind], of=without)
        report.add(f"{kind} : without", beside, "")
        report.add("  95 % bootstrap interval of its median", interval(beside), "")
    report.add("noise: a run without : the one before", ratios(without[1:], of=without[:-1]), "")
    report.add("probes in a run", probes, "")
    report.show()


def trained(folder: Path, name: str, steps: int, kind: str) -> tuple[float, int]:
    """Images/s of a run's loop: the median over its log steps but the first two; and how many probes it had."""
    probed = kind == KINDS[1]
    size = {"width": 192, "depth": 4, "heads": 3}
    config = parse(
        RunConfig,
        {
            "name": name,
            "data": {
                "path": str(folder / "digits"),
                "image_size": 32,
                "channels": 1,
                "stream": "local",
                "cache_folder": str(folder / "cache"),
            },
            "model": {"patch": 4, "decoder": {"width": 96, "depth": 1, "heads": 3}, **size},
            "objective": {"norm_pix": False},
            "optim": {"global_batch": 64, "steps": steps, "warmup_steps": 10},
            "training": {"log_steps": 10, "checkpoint_steps": EVERY, "probe_steps": EVERY},
            "probe": {"enabled": probed, "cpus": 1, "figure_images": 2},
            "storage": {"path": str(folder / name)},
            "tracking": {"system_metrics_seconds": None},
        },
    )
    prepared = prepare(config)
    busy = subprocess.Popen([sys.executable, "-c", BUSY]) if kind == KINDS[2] else None
    try:
        summary = launch(prepared, RayLauncher())
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    client = MlflowClient(prepared.store.uri)
    history = client.get_metric_history(summary.run_id, "throughput/images_per_second")
    judged = client.get_metric_history(summary.run_id, "probe/knn") if probed else []
    return statistics.median(point.value for point in history[2:]), len(judged)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
