"""A run that goes back over bad steps ends as one that was told of them at its start, to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from maskray.data.storage import Storage
from maskray.errors import BadStepError
from maskray.pretrain import pretrain
from maskray.tracking.base import MemoryStore, MemoryTracker
from maskray.training import checkpoint, folders, rewinds, throughput
from maskray.training.checkpoint import OPTIMIZER, WEIGHTS
from maskray.training.context import LocalContext
from maskray.training.step import TrainStep
from planting import planted

STEPS, LOG_STEPS, CHECKPOINT_STEPS = 12, 2, 4  # of `tiny`
NAN, INF, LEAP = float("nan"), float("inf"), 100.0
SPIKE = {"spike": {"factor": 4.0, "window": 3}}


@pytest.fixture(autouse=True)
def quick_rate(monkeypatch):
    monkeypatch.setattr(throughput, "_MATMUL_SECONDS", 0.001)
    monkeypatch.setitem(throughput._MATMUL_SIZE, "cpu", 64)


@pytest.fixture
def plant(monkeypatch):
    call = TrainStep.__call__
    return lambda factors: monkeypatch.setattr(TrainStep, "__call__", planted(call, factors))


class Run:
    """A run's folder and MLflow."""

    def __init__(self, config, folder):
        self.config, self.folder, self.store = config, folder, MemoryStore()
        self.context = LocalContext(folder, config.data, keep_checkpoints=99)

    def train(self, config):
        assert pretrain(config, self.context, MemoryTracker(self.store)) == STEPS

    def go(self):
        run = Storage(self.folder)
        return rewinds.until_trained(self.config, run, self.train, self.newest_step, lambda known: None)

    def checkpoints(self):
        return {folders.step_of(f.name): f for f in self.folder.glob("step_*")}

    def newest_step(self):
        return max(self.checkpoints(), default=0)

    def state(self, step=STEPS):
        folder = self.checkpoints()[step]
        return load_file(folder / WEIGHTS), torch.load(folder / OPTIMIZER, weights_only=True)

    def curve(self, key):
        return [(p.step, p.value) for p in self.store.points if p.key == key]

    def ledger(self):
        path = self.folder.parent / "ledger" / "0.jsonl"
        return {entry["step"]: entry for entry in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def run(tiny, tmp_path):
    """run(name, **sections) -> Run."""

    def make(name, **sections):
        folder = tmp_path / name
        training = {"ledger": str(folder / "ledger"), **sections.pop("training", {})}
        return Run(tiny(training=training, **sections), folder / "run")

    return make


def same(one, other):
    (weights, optimizer), (weights_too, optimizer_too) = one, other
    assert weights.keys() == weights_too.keys()
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights)
    assert optimizer["param_groups"] == optimizer_too["param_groups"]
    for number, state in optimizer["state"].items():
        assert all(torch.equal(state[name], optimizer_too["state"][number][name]) for name in state)


@pytest.mark.parametrize(
    ("factors", "training"),
    [
        ({7: NAN}, {}),
        ({0: NAN}, {}),
        ({11: INF}, {}),
        ({5: NAN, 6: NAN, 10: NAN}, {}),
        ({7: LEAP}, SPIKE),
        ({4: LEAP, 6: NAN, 9: LEAP}, SPIKE),
        ({4: LEAP, 6: NAN, 9: LEAP}, {**SPIKE, "log_steps": 1, "checkpoint_steps": 1, "probe_at": [3]}),
        ({6: NAN}, {"micro_batch": 16}),
    ],
)
def test_it_ends_as_one_that_was_told_of_them(run, plant, factors, training):
    made, quiet = run("made", training=training), run("quiet", training={**training, "skip_steps": sorted(factors)})
    plant(factors)
    config = made.go()
    plant({})
    quiet.train(quiet.config)
    same(made.state(), quiet.state())
    assert config.training.skip_steps == tuple(sorted(factors))
    assert [each.step for each in rewinds.read(Storage(made.folder))] == sorted(factors)
    for run_ in (made, quiet):
        then = checkpoint.read_facts(run_.checkpoints()[STEPS])
        assert then.skipped == sorted(factors)
    # What was left out was never trained on by the quiet run; all other steps are the same.
    assert sorted(quiet.ledger()) == [step for step in range(STEPS) if step not in factors]
    assert {step: entry for step, entry in made.ledger().items() if step not in factors} == quiet.ledger()
    for key in (
        "pretrain/loss",
        "pretrain/grad_norm",
        "pretrain/lr",
        "pretrain/epoch",
        "throughput/views_without_image",
    ):
        assert made.curve(key) == quiet.curve(key)
    assert made.curve("pretrain/skipped_steps")[-1] == (STEPS, len(factors))
    assert len(made.store.events) == len(factors)


@pytest.fixture(scope="module")
def quiet_states():
    """States of a run that met nothing, by step: its checkpoints are those of all that is tried here."""
    return {}


@pytest.mark.parametrize("probe_at", [(), (3, 7, 9)])
@pytest.mark.parametrize("step", [0, 3, 4, 6, 7, 8, 11])
def test_the_newest_checkpoint_lies_before_the_bad_step_and_holds_nothing_of_it(
    run, plant, quiet_states, step, probe_at
):
    made = run("made", training={"probe_at": probe_at, "rewinds": 0})
    plant({step: NAN})
    with pytest.raises(BadStepError) as caught:
        made.go()
    assert (caught.value.step, caught.value.reason) == (step, "non_finite")
    logged = sorted({*range(LOG_STEPS, STEPS + 1, LOG_STEPS), *probe_at})
    kept = sorted({*range(CHECKPOINT_STEPS, STEPS + 1, CHECKPOINT_STEPS), *probe_at})
    assert caught.value.seen_at == min(done for done in logged if done > step)
    assert sorted(made.checkpoints()) == [done for done in kept if done <= step]
    assert [done for done, _ in made.curve("pretrain/loss")] == [done for done in logged if done <= step]
    if not quiet_states:
        plant({})
        quiet = run("quiet", training={"probe_at": (3, 7, 9)})
        quiet.train(quiet.config)
        quiet_states.update({step: quiet.state(step) for step in quiet.checkpoints()})
    for done in made.checkpoints():
        same(made.state(done), quiet_states[done])


def test_a_run_that_was_stopped_looks_for_leaps_as_one_that_was_not(run, plant):
    """The median is over steps on both sides of the stop."""
    factors = {9: LEAP}
    stopped, quiet = (run(name, training={"spike": {"factor": 4.0, "window": 7}}) for name in ("stopped", "quiet"))

    class Killed(BaseException):
        pass

    class Fragile(MemoryTracker):
        def log(self, metrics, step):
            super().log(metrics, step)
            if step == 6:
                raise Killed

    plant(factors)
    with pytest.raises(Killed):
        pretrain(stopped.config, stopped.context, Fragile(stopped.store))
    assert sorted(stopped.checkpoints()) == [4]
    stopped.go()
    quiet.go()
    assert stopped.store.events == quiet.store.events
    assert "The loss leapt to " in stopped.store.events[0][1]
    same(stopped.state(), quiet.state())
    losses = [checkpoint.read_facts(each.checkpoints()[STEPS]).recent_losses for each in (stopped, quiet)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7


def test_what_was_left_out_has_no_part_in_the_means_and_rates(run, plant):
    """Steps 4 and 5 are a whole interval, of which nothing is said but where it is."""
    made = run("made", training={"skip_steps": [4, 5, 6]})
    plant({4: NAN, 5: NAN, 6: NAN})
    made.train(made.config)
    assert [step for step, _ in made.curve("pretrain/loss")] == [2, 4, 8, 10, 12]
    assert [step for step, _ in made.curve("throughput/images_per_second")] == [2, 4, 8, 10, 12]
    assert [step for step, _ in made.curve("pretrain/lr")] == [2, 4, 6, 8, 10, 12]
    assert made.curve("pretrain/skipped_steps") == [(2, 0), (4, 0), (6, 2), (8, 3), (10, 3), (12, 3)]
    assert made.curve("throughput/views_without_image") == [(step, 0) for step in (2, 4, 6, 8, 10, 12)]
    assert made.store.events == []


def test_a_leap_says_what_it_is_and_where(run, plant):
    made = run("made", training={**SPIKE, "rewinds": 0})
    plant({5: LEAP})
    with pytest.raises(BadStepError) as caught:
        made.go()
    message = str(caught.value)
    assert message.startswith("The loss leapt to ")
    assert " over the 3 steps before, at step 5 (seen at step 6; no update was applied from that step on). " in message
    assert "The step trained on positions 20 to 23 of the plan: " in message
    assert message.endswith("set optim.clip_norm, or set training.spike.factor higher.")
    assert made.store.events == [("spike", message)]
