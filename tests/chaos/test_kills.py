"""kill -9: a run that is killed ends as one that was not, to the bit; MLflow holds one run, each step once."""

import random
import signal

import psutil
import pytest

from maskray.cli import TERMINATED
from outages import kill_at_work, longest_pause, processes, seconds_to_train, train_workers, wait_for

from .conftest import check_against, note

pytestmark = pytest.mark.ray

STEPS = 40
UPLOAD = "during an upload"
DATA_TASK, SPLITTER, CONTROLLER = "MapBatches", "SplitCoordinator", "TrainController"


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


def kill_the_last(title: str, run) -> None:
    """The newest process of a name: of splitters there is one for each execution."""
    wait_for(lambda: processes(title), run)
    max(processes(title), key=lambda p: p.create_time()).kill()


def starts_from_nothing(run) -> int:
    return sum(line["step"] == 0 and line["rank"] == 0 for line in run.lines())


def test_a_worker_killed_during_an_upload_and_then_the_driver_while_it_writes_its_record(launches, quiet):
    wanted = quiet(2)
    run = launches("killed", 2)
    process = run.start()
    kill_a_worker(run, process, UPLOAD)
    kill_the_driver(run, process, 27)
    run.cut_the_record()
    starts = starts_from_nothing(run)
    assert run.finish(run.start()) == 0, run.output()
    check_against(run, wanted)
    assert starts_from_nothing(run) == starts, "it began anew"


def test_a_data_task_the_splitter_and_the_controller_killed_in_one_run(launches, quiet):
    wanted = quiet(2)
    run = launches("inside", 2)
    process = run.start()
    run.wait_for_step(process, 5)
    assert not processes("PreemptionWatcher"), "nobody announces that an embedded cluster's node will go"
    tasks: list[psutil.Process] = []
    wait_for(lambda: tasks.extend(processes(DATA_TASK)) or tasks, run)
    older = min(p.create_time() for p in tasks) < min(p.create_time() for p in train_workers())
    assert older, "tasks run in other processes than those that were prepared"
    kill_at_work(DATA_TASK, run)
    for title, step in ((SPLITTER, 13), (CONTROLLER, 25)):
        run.wait_for_step(process, step)
        known = train_workers()
        kill_the_last(title, run)
        seconds_to_train(run, known)
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("lost", ["a worker", "a data task", "the splitter", "the controller", "the driver"])
def test_what_each_loss_costs(launches, quiet, lost: str, workers: int):
    wanted = quiet(workers)
    run = launches("lost", workers)
    process = run.start()
    run.wait_for_step(process, 18)
    known = train_workers()
    if lost == "a worker":
        known[-1].kill()
    elif lost == "a data task":
        kill_at_work(DATA_TASK, run)
    elif lost == "the driver":
        run.kill(process)
        process = run.start()
    else:
        kill_the_last({"the splitter": SPLITTER, "the controller": CONTROLLER}[lost], run)
    # The workers live on without a data task, and with what was prefetched: what it held up is the longest pause.
    seconds = longest_pause(run, STEPS) if lost == "a data task" else seconds_to_train(run, known)
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    outage = note(f"SIGKILL of {lost}", str(workers), run, wanted, seconds)
    if lost == "a data task":
        assert outage.steps_again == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_worker_killed_at_five_moments(launches, quiet, workers: int):
    """One during an upload, and four at random, in one run: each time the run goes on by itself."""
    wanted = quiet(workers)
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
    wanted = quiet(workers)
    run = launches("driver", workers)
    for moment in sorted(random.Random(10 + workers).sample(range(3, 36), 5)):
        kill_the_driver(run, run.start(), moment)
    assert run.finish(run.start()) == 0, run.output()
    check_against(run, wanted)


@pytest.mark.slow
def test_the_driver_terminated(launches, quiet):
    wanted = quiet(2)
    run = launches("terminated", 2)
    process = run.start()
    run.wait_for_step(process, 14)
    process.send_signal(signal.SIGTERM)
    assert run.finish(process) == TERMINATED, run.output()
    assert run.status() == "KILLED"
    process = run.start()
    seconds = seconds_to_train(run, [])
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    note("SIGTERM of the driver", "2", run, wanted, seconds)
