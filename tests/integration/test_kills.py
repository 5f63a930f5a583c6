"""kill -9: a run that is killed ends as one that was not, to the bit; MLflow holds one run, each step once."""

import os
import random
import signal

import pytest

from maskray.cli import TERMINATED

pytestmark = pytest.mark.ray

STEPS, LOG_STEPS = 40, 2
UPLOAD = "during an upload"


@pytest.fixture(scope="module")
def quiet() -> dict:
    """Weights and ledgers of uninterrupted runs, by number of workers."""
    return {}


def uninterrupted(launches, quiet: dict, workers: int) -> tuple:
    if workers not in quiet:
        run = launches(f"quiet-{workers}", workers)
        assert run.finish(run.start()) == 0, run.output()
        quiet[workers] = (run.final_weights(), run.ledger())
    return quiet[workers]


def check_against(run, wanted: tuple) -> None:
    assert run.final_weights() == wanted[0]
    assert run.ledger() == wanted[1]
    assert run.status() == "FINISHED"
    for key in ("pretrain/loss", "pretrain/lr"):
        assert run.metric_steps(key) == list(range(LOG_STEPS, STEPS + 1, LOG_STEPS))


def kill_a_worker(run, process, moment: int | str) -> None:
    """SIGKILL of the last worker, or, during an upload, of all: which of them uploads cannot be seen from outside."""
    if moment == UPLOAD:
        run.wait_for_workers(process)
        folder = run.wait_for_upload(process, 9)
    else:
        run.wait_for_step(process, int(moment))
        run.wait_for_workers(process)
    for victim in run.workers(process)[0 if moment == UPLOAD else -1 :]:
        os.kill(victim.pid, signal.SIGKILL)
        run.killed.add(victim.pid)
    assert moment != UPLOAD or not run.is_registered(folder), "the upload had ended before the kill"


def kill_the_driver(run, process, step: int) -> None:
    run.wait_for_step(process, step)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_worker_killed_during_an_upload_and_then_the_driver(launches, quiet):
    wanted = uninterrupted(launches, quiet, 2)
    run = launches("killed", 2)
    process = run.start()
    kill_a_worker(run, process, UPLOAD)
    kill_the_driver(run, process, 27)
    assert run.finish(run.start()) == 0, run.output()
    check_against(run, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_worker_killed_at_five_moments(launches, quiet, workers: int):
    """Four at random, and one during an upload, in one run: each time the run goes on by itself."""
    wanted = uninterrupted(launches, quiet, workers)
    run = launches("workers", workers)
    process = run.start()
    before, after = random.Random(workers).sample(range(2, 10), 2), random.Random(-workers).sample(range(20, 36), 2)
    moments = [*sorted(before), UPLOAD, *sorted(after)]
    for moment in moments:
        kill_a_worker(run, process, moment)
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    trained = [line for line in run.lines() if line["rank"] == 0]
    assert len(trained) > STEPS, "nothing was trained again: the kills came to nothing"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_driver_killed_and_then_terminated(launches, quiet, workers: int):
    wanted = uninterrupted(launches, quiet, workers)
    run = launches("driver", workers)
    first, second = sorted(random.Random(10 + workers).sample(range(3, 33), 2))
    kill_the_driver(run, run.start(), first)
    process = run.start()
    run.wait_for_step(process, second)
    process.send_signal(signal.SIGTERM)
    assert run.finish(process) == TERMINATED, run.output()
    assert run.status() == "KILLED"
    assert run.finish(run.start()) == 0, run.output()
    check_against(run, wanted)
