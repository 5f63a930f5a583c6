"""What Prometheus reads of a run, as it reads it: over HTTP, from a real cluster's metrics port."""

import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from mlflow import MlflowClient

from launches import is_worker
from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from maskray.launch import launch, prepare
from maskray.on_ray import gauges, probe
from maskray.on_ray.probe import Told
from maskray.on_ray.train import RayLauncher

pytestmark = [pytest.mark.ray]

STEPS = 60
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
            _system_config={"metrics_report_interval_ms": 2000},
            runtime_env={"env_vars": {"PYTHONPATH": f"{root / 'platform'}:{root / 'tests'}"}},
        )
        (node,) = ray.nodes()
        yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        ray.shutdown()


def scraped(url: str) -> Series:
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    out = {}
    for line in lines:
        if found := re.fullmatch(r"ray_(maskray_\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
            key = found[1], labels["run"], labels.get("metric", "")
            assert key not in out, "two processes tell of one run"
            out[key] = float(found[3])
    return out


def wait(ready: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_prometheus_reads_what_mlflow_has(
    metrics_url: str, tiny: Callable[..., RunConfig], runs: Path, tmp_path: Path
) -> None:
    seen, ledger = tmp_path / "seen", tmp_path / "ledger"

    def held(config: RunConfig, weights: Storage, told: Told) -> float:
        score = probe.judge(config, weights, told)
        wait(seen.exists)  # the run goes on for as long
        return score

    config = tiny(
        optim={"steps": STEPS},
        training={"checkpoint_steps": 20, "probe_steps": 40, "ledger": str(ledger)},
        probe={"figure_images": 1, "draws": 2},
    )
    found: Series = {}

    def watch() -> None:
        try:
            wait(lambda: ledger.exists() and sum(file.read_bytes().count(b"\n") for file in ledger.iterdir()) > 25)
            (worker,) = [p for p in psutil.Process().children(recursive=True) if is_worker(p)]
            worker.kill()

            def complete() -> bool:
                now = scraped(metrics_url)
                names = {name for name, _, _ in now}
                found.clear()
                found.update(now if STEPS in now.values() and {gauges.PROBE, gauges.RESTARTS} <= names else {})
                return bool(found)

            wait(complete)
            time.sleep(6)
            wait(complete)  # nothing was logged in the meantime: they would be gone for good
        finally:
            seen.touch()

    watching = threading.Thread(target=watch)
    watching.start()
    launch(prepare(config), RayLauncher(probe=held))
    watching.join()

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
    curves = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    name = run.info.run_name
    expected = {(gauge, name, ""): curves[key][-1].value for key, gauge in gauges.OF.items()}
    for key in ("few_labels", "all_labels", "knn"):
        expected[gauges.PROBE, name, key] = next(m.value for m in curves[f"probe/{key}"] if m.step == 40)
    expected |= {(gauges.STEP, name, ""): STEPS, (gauges.RESTARTS, name, ""): 1, (gauges.VIEWS, name, ""): 0}
    assert found == expected

    wait(lambda: scraped(metrics_url) == {})  # an alert on a run that has ended would wake somebody
