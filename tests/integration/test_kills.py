"""kill -9: a run that is killed ends as one that was not, to the bit; MLflow holds one run, each step once."""

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
    """SIGKILL of the last worker; or, in the middle of an upload, of all: which of them uploads cannot be seen."""
    run.wait_for_workers(process)
    if moment == UPLOAD:
        run.wait_for_step(process, 9)
        with run.hung_upload(process) as folder:
            kill(run, run.workers(process))
            assert not (folder / "state.json").exists(), "the upload had ended before the kill"
        return
    run.wait_for_step(process, int(moment))
    kill(run, run.workers(process)[-1:])


def kill(run, workers) -> None:
    for worker in workers:
        worker.kill()
        run.killed.add(worker.pid)


def kill_the_driver(run, process, step: int) -> None:
    run.wait_for_step(process, step)
    run.wait_for_workers(process)
    run.kill(process)


def starts_from_nothing(run) -> int:
    return sum(line["step"] == 0 and line["rank"] == 0 for line in run.lines())


def test_a_worker_killed_during_an_upload_and_then_the_driver_while_it_writes_its_record(launches, quiet):
    wanted = uninterrupted(launches, quiet, 2)
    run = launches("killed", 2)
    process = run.start()
    kill_a_worker(run, process, UPLOAD)
    kill_the_driver(run, process, 27)
    run.cut_the_record()
    starts = starts_from_nothing(run)
    assert run.finish(run.start()) == 0, run.output()
    check_against(run, wanted)
    assert starts_from_nothing(run) == starts, "it began anew"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_worker_killed_at_five_moments(launches, quiet, workers: int):
    """One during an upload, and four at random, in one run: each time the run goes on by itself."""
    wanted = uninterrupted(launches, quiet, workers)
    run = launches("workers", workers)
    process = run.start()
    for moment in (UPLOAD, *sorted(random.Random(workers).sample(range(2, 36), 4))):
        kill_a_worker(run, process, moment)
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    trained = [line for line in run.lines() if line["rank"] == 0]
    assert len(trained) > STEPS, "nothing was trained again: the kills came to nothing"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_driver_killed_at_five_moments(launches, quiet, workers: int):
    wanted = uninterrupted(launches, quiet, workers)
    run = launches("driver", workers)
    for moment in sorted(random.Random(10 + workers).sample(range(3, 36), 5)):
        kill_the_driver(run, run.start(), moment)
    assert run.finish(run.start()) == 0, run.output()
    check_against(run, wanted)


@pytest.mark.slow
def test_the_driver_terminated(launches, quiet):
    wanted = uninterrupted(launches, quiet, 2)
    run = launches("terminated", 2)
    process = run.start()
    run.wait_for_step(process, 14)
    process.send_signal(signal.SIGTERM)
    assert run.finish(process) == TERMINATED, run.output()
    assert run.status() == "KILLED"
    assert run.finish(run.start()) == 0, run.output()
    check_against(run, wanted)
