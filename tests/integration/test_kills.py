"""kill -9: a run that is killed ends as one that was not, to the bit; MLflow holds one run, each step once."""

import itertools
import os
import random
import signal

import pytest

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
    for key in ("train/loss", "train/lr"):
        assert run.metric_steps(key) == list(range(LOG_STEPS, STEPS + 1, LOG_STEPS))


def kill_a_worker(run, process, moment: int | str) -> None:
    if moment == UPLOAD:
        run.wait_for_upload(process, 9)
    else:
        run.wait_for_step(process, int(moment))
    # Uploads are the first worker's.
    victim = run.workers(process)[0 if moment == UPLOAD else -1]
    os.kill(victim.pid, signal.SIGKILL)


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


MOMENTS = [*sorted(random.Random(20261123).sample(range(2, 36), 4)), UPLOAD]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "moment"), list(itertools.product((1, 2, 4), MOMENTS)))
def test_a_worker_killed(launches, quiet, workers: int, moment: int | str):
    wanted = uninterrupted(launches, quiet, workers)
    run = launches("worker", workers)
    process = run.start()
    kill_a_worker(run, process, moment)
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    trained = [line for line in run.lines() if line["rank"] == 0]
    assert len(trained) > STEPS, "the worker was killed so late that nothing was trained again"


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "step"), [(1, 6), (1, 27), (2, 13), (2, 31), (4, 9), (4, 22)])
def test_the_driver_killed(launches, quiet, workers: int, step: int):
    wanted = uninterrupted(launches, quiet, workers)
    run = launches("driver", workers)
    kill_the_driver(run, run.start(), step)
    assert run.finish(run.start()) == 0, run.output()
    check_against(run, wanted)
