"""What somebody deletes or cuts short in a run's folder: `maskray repair` says what, and mends it."""

import shutil
import subprocess
import sys

import pytest

from maskray.training.folders import step_of
from outages import seconds_to_train

from .conftest import check_against, note

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def steps_of_the_first(run) -> list[int]:
    """In the order in which the first worker trained them."""
    return [line["step"] for line in run.lines() if line["rank"] == 0]


def test_a_record_cut_short_and_a_checkpoint_deleted(launches, quiet):
    wanted = quiet(2)
    run = launches("damaged", 2)
    process = run.start()
    run.wait_for_step(process, 22)
    run.kill(process)
    older, newest = sorted(folder for folder in run.run.glob("step_*") if (folder / "state.json").exists())[-2:]
    shutil.rmtree(newest)
    run.cut_the_record()

    repair = [sys.executable, "-m", "maskray.cli", "repair", str(run.run)]
    done = subprocess.run(repair, env=run.environment, capture_output=True, text=True, check=False)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint_manager_snapshot.json" in said
    assert f"the next launch goes on from {older.name}" in said

    trained = len(steps_of_the_first(run))
    process = run.start()
    seconds = seconds_to_train(run, [])
    assert run.finish(process) == 0, run.output()
    assert steps_of_the_first(run)[trained] == step_of(older.name)
    check_against(run, wanted)
    note("a record cut short, a checkpoint deleted, maskray repair", "2", run, wanted, seconds)
