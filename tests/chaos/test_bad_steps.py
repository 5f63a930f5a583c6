"""Bad steps on Ray: the run goes back and on without them, though its driver is killed in between."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from outages import seconds_to_train, train_workers

from .conftest import LOG_STEPS, ending, note

pytestmark = pytest.mark.ray

STEPS = 40
BAD = {13: "nan", 26: "inf", 33: "8"}
"""What the loss is multiplied by, with its gradients, at steps of the plan: two are not finite, and one leaps."""
SPIKE = {"factor": 4.0, "window": 6}
# Run at the start of every process, of Ray's too.
PLANTER = """
import importlib.util, sys

class Planter:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "maskray.training.step":
            return None
        sys.meta_path.remove(Planter)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            from planting import plant
            plant(module, {{step: float(factor) for step, factor in {bad}.items()}})

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Planter)
"""


def plant(run):
    root = run.folder / "platform"
    shutil.copy(Path(__file__).parents[1] / "planting.py", root)
    with (root / "sitecustomize.py").open("a") as file:
        file.write(PLANTER.format(bad=BAD))


def with_training(run, **settings):
    config = yaml.safe_load(run.config.read_text())
    config["training"] |= settings
    run.config.write_text(yaml.safe_dump(config))


def record(run):
    path = next(run.folder.glob("runs/kills-*/rewinds.json"), None)
    return [] if path is None else json.loads(path.read_text())["rewinds"]


def without_the_bad(ledger):
    return {at: entry for at, entry in ledger.items() if at[0] not in BAD}


@pytest.mark.slow
def test_it_ends_as_one_that_was_told_of_them_though_the_driver_is_killed_in_between(launches):
    quiet = launches("quiet", 2)
    with_training(quiet, skip_steps=list(BAD))
    plant(quiet)  # and so is seen not to train on them
    assert quiet.finish(quiet.start()) == 0, quiet.output()
    assert {step for step, _ in quiet.ledger()} == set(range(STEPS)) - set(BAD)
    wanted = ending(quiet)

    run = launches("bad", 2)
    with_training(run, spike=SPIKE)
    plant(run)
    process = run.start()
    run.wait(process, lambda: record(run))
    run.kill(process)
    assert [each["step"] for each in record(run)] == [13]
    assert run.last_step() == 13, "it had gone on before it was killed"
    process = run.start()
    seconds = {}
    for num, step in enumerate(BAD, 1):
        if num > 1:
            known = train_workers()
            run.wait(process, lambda num=num: len(record(run)) == num)
            seconds[step] = seconds_to_train(run, known)
        else:
            run.wait_for_step(process, 18)
    assert run.finish(process) == 0, run.output()

    assert [(each["step"], each["reason"], each["seen_at"]) for each in record(run)] == [
        (13, "non_finite", 14),
        (26, "non_finite", 28),
        (33, "spike", 34),
    ]
    assert [each["back_to"] for each in record(run)] == [12, 24, 32]
    assert run.final_weights() == wanted.weights
    assert without_the_bad(run.ledger()) == wanted.ledger
    assert run.status() == quiet.status() == "FINISHED"
    for key in ("pretrain/loss", "pretrain/skipped_steps"):
        assert run.metric_steps(key) == list(range(LOG_STEPS, STEPS + 1, LOG_STEPS))
    note("a step that is not finite", "2", run, wanted, seconds[26], "quiet run with the same skip list")
    note("a loss that leaps", "2", run, wanted, seconds[33], "quiet run with the same skip list")


@pytest.mark.slow
def test_a_run_that_may_not_go_back_stops_as_it_did(launches):
    run = launches("stops", 2)
    plant(run)
    with_training(run, rewinds=0)
    assert run.finish(run.start()) == 1
    assert "The run failed: Loss or gradient norm was not finite at step 13 (seen at step 14;" in " ".join(
        run.output().split()
    )
    assert run.status() == "FAILED"
    assert record(run) == []
