"""What Prometheus reads of a run, as it reads it: over HTTP, from a real cluster's metrics port."""

import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import ray
from mlflow.entities import Metric

from launches import is_worker
from maskray.config.schema import RunConfig
from maskray.credentials import Hidden
from maskray.data.storage import Storage
from maskray.evaluation.judgement import Verdict
from maskray.launch import card, launch
from maskray.on_ray import fit, gauges, probe, worker
from maskray.on_ray.probe import Told
from maskray.on_ray.train import RayLauncher
from maskray.preparing import Prepared, prepare
from maskray.pretrain import pretrain
from maskray.tracking.mlflow_runs import ensure_run
from maskray.training.context import LocalContext

pytestmark = pytest.mark.ray

STEPS, PATIENCE_SECONDS = 60, 240
INTERVAL_SECONDS = 2
Series = dict[tuple[str, str, str], float]
"""By name, run and, of the probe's, what it is."""


@pytest.fixture
def metrics_url() -> Iterator[str]:
    """Of a cluster that exports every other second, and drops what it has not heard of for four."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
            _system_config={"metrics_report_interval_ms": 1000 * INTERVAL_SECONDS},
            runtime_env={"env_vars": {"PYTHONPATH": f"{root / 'platform'}:{root / 'tests'}"}},
        )
        (node,) = ray.nodes()
        yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        ray.shutdown()


def scraped(url: str) -> Series:
    with urllib.request.urlopen(url, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    out = {}
    for line in lines:
        if found := re.fullmatch(r"ray_(maskray_\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
            key = found[1], labels["run"], labels.get("metric", "")
            assert key not in out, "two processes tell of one run"
            out[key] = float(found[3])
    return out


def settled(url: str) -> Series:
    """After the last step, when all has been exported that was set before, and nothing is logged any more."""
    found: Series = {}

    def is_all_there() -> bool:
        found.clear()
        found.update(scraped(url))
        return STEPS in found.values() and any(name == gauges.PROBE for name, _, _ in found)

    wait(is_all_there)
    time.sleep(3 * INTERVAL_SECONDS)  # what is not set again is gone
    wait(is_all_there)
    return found


def wait(ready: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


def curves(prepared: Prepared, run_id: str) -> Mapping[str, list[Metric]]:
    """As MLflow has them."""
    client = prepared.store.client()
    return {key: client.get_metric_history(run_id, key) for key in client.get_run(run_id).data.metrics}


def last_values(prepared: Prepared, run_id: str) -> Series:
    """Of what each gauge shows but the probe's."""
    name, known = prepared.plan.run_name, curves(prepared, run_id)
    assert sum(point.value for point in known["throughput/views_without_image"]) == 0
    shown = {(gauge, name, ""): known[key][-1].value for key, gauge in gauges.OF.items()}
    return shown | {(gauges.STEP, name, ""): STEPS, (gauges.VIEWS, name, ""): 0.0}


def test_prometheus_reads_what_mlflow_has(
    metrics_url: str, tiny: Callable[..., RunConfig], runs: Path, tmp_path: Path
) -> None:
    """What the first worker has, in this process."""
    prepared = prepare(tiny(optim={"steps": STEPS}))
    name, run_id = prepared.plan.run_name, ensure_run(prepared.store, card(prepared))
    board = fit.board(name)
    settings = {"tracking_uri": Hidden(prepared.store.uri), "run_id": run_id, "board": board}
    tracker = worker.tracker_of(settings, prepared.config, rank=0)
    pretrain(prepared.config, LocalContext(tmp_path / "run", prepared.config.data), tracker)
    assert tracker.close(PATIENCE_SECONDS)
    ray.get(board.probed.remote({"probe/knn": 0.75}))

    probed = {(gauges.PROBE, name, "knn"): 0.75, (gauges.RESTARTS, name, ""): 0.0}
    assert settled(metrics_url) == last_values(prepared, run_id) | probed
    ray.kill(board)
    wait(lambda: scraped(metrics_url) == {})  # an alarm about a run that has ended would wake somebody


class Judging(RayLauncher):
    """Waits, before it judges the run, until Prometheus is told of it no more.

    Args:
        url: of the metrics.
        way: judges checkpoints on the way.
    """

    def __init__(self, url: str, way: probe.Judge) -> None:
        super().__init__(way)
        self._url = url

    def judge(self, prepared: Prepared) -> Verdict | None:
        wait(lambda: scraped(self._url) == {})  # it may take long, and no step is made: an alarm would wake somebody
        return super().judge(prepared)


@pytest.mark.slow
def test_a_lost_worker_is_counted_and_what_a_probe_finds_is_seen(
    metrics_url: str, tiny: Callable[..., RunConfig], runs: Path, tmp_path: Path
) -> None:
    seen, ledger = tmp_path / "seen", tmp_path / "ledger"

    def held(config: RunConfig, weights: Storage, told: Told) -> float:
        score = probe.judge(config, weights, told)
        wait(seen.exists)  # the run goes on for as long
        return score

    prepared = prepare(
        tiny(
            optim={"steps": STEPS},
            training={"checkpoint_steps": 20, "probe_steps": 40, "ledger": str(ledger)},
            probe={"figure_images": 1, "draws": 2},
        )
    )
    found: Series = {}

    def watch() -> None:
        try:
            wait(lambda: ledger.exists() and sum(file.read_bytes().count(b"\n") for file in ledger.iterdir()) > 25)
            (first,) = [p for p in psutil.Process().children(recursive=True) if is_worker(p)]
            first.kill()
            found.update(settled(metrics_url))
        finally:
            seen.touch()

    watching = threading.Thread(target=watch)
    watching.start()
    summary = launch(prepared, Judging(metrics_url, held))
    watching.join()

    name, known = prepared.plan.run_name, curves(prepared, summary.run_id)
    expected = last_values(prepared, summary.run_id) | {(gauges.RESTARTS, name, ""): 1.0}
    for key in ("few_labels", "all_labels", "knn"):
        expected[gauges.PROBE, name, key] = next(m.value for m in known[f"probe/{key}"] if m.step == 40)
    assert found == expected
