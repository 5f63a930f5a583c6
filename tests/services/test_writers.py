"""Eight processes that write to the team's MLflow at once: all is there, none twice, whoever goes away meanwhile."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from team import Team

pytestmark = [pytest.mark.services, pytest.mark.alone]

WRITERS, STEPS, KEYS, PAUSE_SECONDS = 8, 100, 10, 0.1
"""Writing goes on for ten seconds: what goes away does so in the middle."""
PATIENCE_SECONDS = 300


@pytest.mark.parametrize(
    ("gone", "seconds"),
    [
        ("nobody", 0),
        ("server", 15),
        ("database", 15),
        pytest.param("server", 60, marks=pytest.mark.slow),
        pytest.param("database", 60, marks=pytest.mark.slow),
    ],
)
def test_all_is_there_and_none_twice(team: Team, tmp_path: Path, gone: str, seconds: float) -> None:
    client = MlflowClient(team.server.uri)
    experiment = client.create_experiment(tmp_path.name)
    runs = [client.create_run(experiment).info.run_id for _ in range(WRITERS)]
    where = f"run_uuid IN ({', '.join(repr(run) for run in runs)})"

    def count() -> int:
        return int(team.database.rows(f"SELECT count(*) FROM metrics WHERE {where}")[0][0])

    script, go = Path(__file__).with_name("writer.py"), tmp_path / "go"
    arguments = [str(value) for value in (STEPS, KEYS, PAUSE_SECONDS, go)]
    writers = [
        subprocess.Popen(
            [sys.executable, str(script), team.server.uri, run, *arguments], stdout=subprocess.PIPE, text=True
        )
        for run in runs
    ]
    try:
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == WRITERS)
        go.touch()
        wait_for(lambda: count() > WRITERS * STEPS * KEYS / 8)
        if gone == "server":
            team.server.kill()
            time.sleep(seconds)
            assert count() < WRITERS * STEPS * KEYS, "it went too late"
            team.server.start()
        elif gone == "database":
            before = count()
            team.database.kill()
            time.sleep(seconds)
            team.database.start()
            assert before <= count() < WRITERS * STEPS * KEYS, "it lost what it had, or went too late"
        back = time.monotonic()
        told = [json.loads(writer.communicate(timeout=PATIENCE_SECONDS)[0]) for writer in writers]
        waited = time.monotonic() - back
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()

    assert [each["stored"] for each in told] == [True] * WRITERS
    slowest = max(each["slowest_call_seconds"] for each in told)
    print(f"{gone} for {seconds} s: all stored {waited:.1f} s later, slowest call {slowest * 1000:.1f} ms")
    assert slowest < 1, "training waited"
    if gone == "server":
        assert any(each["spooled"] > 0 for each in told), "it came back before anybody missed it"
    rows = team.database.rows(f"SELECT run_uuid, key, step, value FROM metrics WHERE {where}")
    assert len(rows) == WRITERS * STEPS * KEYS
    expected = {(run, f"metric/{k}", s, s + k / KEYS) for run in runs for k in range(KEYS) for s in range(1, STEPS + 1)}
    assert set(rows) == expected
    assert all(
        [m.step for m in client.get_metric_history(run, "metric/3")] == list(range(1, STEPS + 1)) for run in runs
    )


def wait_for(ready: Callable[[], Any]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.05)
