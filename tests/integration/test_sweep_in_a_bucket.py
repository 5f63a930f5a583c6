"""A sweep that is kept in a bucket, its dataset too: killed, resumed, and nothing of Tune's is left anywhere."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from conftest import TINY
from maskray.config.load import merge
from maskray.config.sweep import load_sweep
from maskray.data import lease
from maskray.data.storage import Storage
from maskray.on_ray.sweep.context import newest_step
from maskray.sweeping import preparing
from maskray.sweeps import record
from maskray.tracking.mlflow_store import DATABASE
from trials import alone

pytestmark = pytest.mark.ray

STEPS, CHECKPOINT_STEPS = 160, 4
GONE_SECONDS = 60.0


@pytest.fixture
def sweep(launches: Callable, digits_in_bucket: str, bucket: str):
    """Launches of a sweep of two trials, one after the other."""
    run = launches("bucket", workers=1)
    run.command = "sweep"
    temporary = run.folder / "tmp"
    temporary.mkdir()
    run.environment["TMPDIR"] = str(temporary)
    base = merge(
        TINY,
        {
            "data": {"path": digits_in_bucket, "cache_folder": str(run.folder / "cache")},
            "optim": {"steps": STEPS},
            "training": {"checkpoint_steps": CHECKPOINT_STEPS, "ledger": str(run.folder / "ledger")},
            "probe": {"draws": 2, "figure_images": 1},
            "cluster": {"embedded_cpus": 1},
            "storage": {"path": f"{bucket}/runs"},
            "tracking": {"uri": f"sqlite:///{run.folder / DATABASE}"},
        },
    )
    config = {"name": "kept", "base": base, "space": {"mask.ratio": [0.5, 0.75]}, "seeds": [0]}
    run.config.write_text(yaml.safe_dump(config))
    return run


def steps_of(line: str) -> int:
    return int(json.loads(line)["step"])


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL of the driver, until its cluster and the trials are gone."""
    below = psutil.Process(process.pid).children(recursive=True)
    below = [each for each in below if not any("gent" in part for part in each.cmdline()[:3])]  # Ray's agents linger
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(below, timeout=GONE_SECONDS)
    assert not alive


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_a_sweep_in_a_bucket_that_is_killed_goes_on_where_it_was(sweep, bucket: str, tmp_path: Path):
    folder = Storage(f"{bucket}/runs").child(record.SWEEPS, "kept-1")

    def on_its_way() -> list[Storage]:
        trials = folder.child(record.TRIALS)
        return [trials.child(key) for key in trials.list_names() if newest_step(trials.child(key)) > CHECKPOINT_STEPS]

    process = sweep.start("--rate", "1e9")
    sweep.wait(process, lambda: len(record.results(folder)) == 1 and len(on_its_way()) == 2)
    kill(process)
    assert len(record.results(folder)) == 1
    for left in (sweep.folder / "tmp").glob("maskray-*"):  # of the driver that was killed
        left.rename(tmp_path / left.name)

    trained = len((sweep.folder / "ledger" / "0.jsonl").read_text().splitlines())
    assert sweep.finish(sweep.start("--rate", "1e9", "--resume")) == 0, sweep.output()
    then = [steps_of(line) for line in (sweep.folder / "ledger" / "0.jsonl").read_text().splitlines()[trained:]]
    assert then == list(range(then[0], STEPS))
    assert then[0] >= CHECKPOINT_STEPS
    assert then[0] % CHECKPOINT_STEPS == 0

    results = record.results(folder)
    assert [result.status for result in results.values()] == ["finished"] * 2
    space = preparing.prepare(load_sweep(sweep.config), resume=True).space
    for key, result in results.items():
        assert alone(space, result.trial, tmp_path / key) == result.metrics
        assert folder.child(record.TRIALS, key).exists(result.checkpoint)
        assert record.painted(folder.child(record.TRIALS, key)) is not None
    assert folder.exists(f"{record.REPORT}/report.html")
    assert not {"tune", lease.LEASE} & set(folder.list_names())
    assert list((sweep.folder / "tmp").glob("maskray-*")) == []

    client = MlflowClient(f"sqlite:///{sweep.folder / DATABASE}")
    runs = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
