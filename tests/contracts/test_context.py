"""Train N = train k, stop, train the rest: the same weights to the bit, the same ledger, each metric once."""

import hashlib
import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from maskray import pretrain as pretraining
from maskray.config.resolve import resolve
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.errors import BadStepError, CheckpointError
from maskray.pretrain import pretrain
from maskray.tracking.base import MemoryStore, MemoryTracker
from maskray.training import throughput
from maskray.training.checkpoint import FILES, OPTIMIZER, STATE, WEIGHTS
from maskray.training.context import LocalContext

STEPS, LOG_STEPS, CHECKPOINT_STEPS = 12, 2, 4
REPEATABLE = ("pretrain/loss", "pretrain/grad_norm", "pretrain/lr", "pretrain/epoch", "throughput/views_without_image")


@pytest.fixture(autouse=True)
def torch_as_it_was(monkeypatch):
    monkeypatch.setattr(throughput, "_MATMUL_SECONDS", 0.001)
    monkeypatch.setitem(throughput._MATMUL_SIZE, "cpu", 64)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Fragile(MemoryTracker):
    """Dies at a word that it should pass on."""

    def __init__(self, store, log=None):
        super().__init__(store)
        self._log = log

    def log(self, metrics, step):
        super().log(metrics, step)
        if step == self._log:
            raise Killed


class FragileContext(LocalContext):
    """Dies while it writes a checkpoint, or when it has."""

    def __init__(self, *args, before=None, after=None, **options):
        super().__init__(*args, **options)
        self._before, self._after = before, after

    def report(self, step, snapshot, *, probed):
        if step == self._before:
            folder = self.run_folder / f"step_{step:09d}-local.partial"
            folder.mkdir(parents=True)
            snapshot(folder)
            raise Killed
        waited = super().report(step, snapshot, probed=probed)
        if step == self._after:
            raise Killed
        return waited


@dataclass
class Run:
    """A run's folder, ledger and MLflow, through as many launches as it takes."""

    config: object
    folder: object
    store: MemoryStore

    def launch(self, tracker=None, context=LocalContext, data=None, **options):
        data = self.config.data.model_copy(update=data or {})
        return pretrain(self.config, context(self.folder, data, **options), tracker or MemoryTracker(self.store))

    def killed(self, tracker=None, context=LocalContext, **options):
        with pytest.raises(Killed):
            self.launch(tracker, context, **options)

    def newest(self):
        return max(f for f in self.folder.iterdir() if f.suffix != ".partial")

    def state(self):
        folder = self.newest()
        return load_file(folder / WEIGHTS), torch.load(folder / OPTIMIZER, weights_only=True)

    def ledger(self):
        """step → (positions, keys); a step that was trained twice must have been the same."""
        out = {}
        for line in (self.folder.parent / "ledger" / "0.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert out.setdefault(entry["step"], entry) == entry
        return out

    def curve(self, key):
        return [(p.step, p.value) for p in self.store.points if p.key == key]


@pytest.fixture
def run(tiny, tmp_path):
    """run(name, **sections) -> Run."""

    def make(name, **sections):
        folder = tmp_path / name
        training = {"ledger": str(folder / "ledger"), **sections.pop("training", {})}
        return Run(tiny(training=training, **sections), folder / "run", MemoryStore())

    return make


@pytest.fixture(scope="module")
def quiet():
    """Uninterrupted runs, by what was asked for."""
    return {}


def uninterrupted(run, quiet, **sections):
    key = json.dumps(sections, sort_keys=True)
    if key not in quiet:
        made = run("quiet", **sections)
        assert made.launch(data={"cache": "host"}) == STEPS
        quiet[key] = (made.state(), made.ledger(), {k: made.curve(k) for k in REPEATABLE})
    return quiet[key]


def check_against(made, wanted):
    (weights, optimizer), ledger, curves = wanted
    mine, other = made.state()
    assert mine.keys() == weights.keys()
    assert all(torch.equal(mine[name], weights[name]) for name in weights)
    assert other["param_groups"] == optimizer["param_groups"]
    for number, state in optimizer["state"].items():
        assert all(torch.equal(other["state"][number][name], state[name]) for name in state)
    assert made.ledger() == ledger
    for key in REPEATABLE:
        assert [step for step, _ in made.curve(key)] == list(range(LOG_STEPS, STEPS + 1, LOG_STEPS))
        assert made.curve(key) == curves[key]


def test_two_uninterrupted_runs_are_equal(run, quiet):
    wanted = uninterrupted(run, quiet)
    again = run("again")
    again.launch(data={"cache": "none", "decode_threads": 4, "prefetch_groups": 1})
    check_against(again, wanted)
    assert sorted(again.ledger()) == list(range(STEPS))


MOMENTS = {
    "before the first checkpoint": ({"log": 2}, {}),
    "between two checkpoints": ({"log": 10}, {}),
    "after a metric, before its checkpoint": ({"log": 8}, {}),
    "while a checkpoint is written": ({}, {"before": 8}),
    "right after a checkpoint": ({}, {"after": 8}),
    "after the last metric": ({"log": 12}, {}),
}


@pytest.mark.parametrize("cache", ["none", "host", "device"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(run, quiet, moment, cache):
    tracker, context = MOMENTS[moment]
    stopped = run("stopped")
    stopped.killed(Fragile(stopped.store, **tracker), FragileContext, data={"cache": cache}, **context)
    assert stopped.launch(data={"cache": cache}) == STEPS
    check_against(stopped, uninterrupted(run, quiet))


def test_a_run_may_be_stopped_again_and_again(run, quiet):
    stopped = run("stopped")
    for step in (2, 4, 6, 6, 10, 12):
        stopped.killed(Fragile(stopped.store, log=step))
    assert stopped.launch() == STEPS
    check_against(stopped, uninterrupted(run, quiet))


def test_micro_batches_resume_to_the_bit_too(run, quiet):
    sections = {"training": {"micro_batch": 8}, "optim": {"clip_norm": 0.1, "weight_decay_end": 0.2}}
    stopped = run("stopped", **sections)
    stopped.killed(Fragile(stopped.store, log=6))
    stopped.launch()
    check_against(stopped, uninterrupted(run, quiet, **sections))


def test_metrics_that_were_not_stored_travel_in_the_checkpoint(run, quiet):
    stopped = run("stopped")
    stopped.store.away = True
    stopped.killed(Fragile(stopped.store, log=10))
    assert stopped.store.points == []
    stopped.store.away = False
    stopped.launch()
    check_against(stopped, uninterrupted(run, quiet))


def test_mfu_is_a_share_of_the_same_rate_after_a_restart(run, monkeypatch):
    """Measured again on a busier machine it would be another, and the curve would jump."""
    rates = iter([1e9, 2e9])
    monkeypatch.setattr(pretraining, "rate_of_process", lambda *_: next(rates))
    stopped = run("stopped")
    stopped.killed(Fragile(stopped.store, log=10))
    first = dict(stopped.store.tags)
    stopped.launch()
    assert stopped.store.tags == first
    assert first["maskray.mfu_of"].startswith("1e+09 FLOP/s")
    stopped.config = stopped.config.model_copy(
        update={"training": stopped.config.training.model_copy(update={"threads": 2})}
    )
    stopped.launch()  # on other hardware it is measured
    assert stopped.store.tags["maskray.mfu_of"].startswith("2e+09 FLOP/s")


def test_a_finished_run_trains_no_more(run, quiet):
    made = run("made")
    made.launch()
    before = hashlib.sha256(b"".join((made.newest() / name).read_bytes() for name in (*FILES, STATE))).digest()
    assert made.launch() == STEPS
    assert hashlib.sha256(b"".join((made.newest() / name).read_bytes() for name in (*FILES, STATE))).digest() == before
    check_against(made, uninterrupted(run, quiet))


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(run, quiet):
    stopped = run("stopped")
    stopped.killed(Fragile(stopped.store, log=10))
    assert stopped.newest().name.startswith("step_000000008")
    (stopped.newest() / OPTIMIZER).write_bytes(b"")
    stopped.launch()
    check_against(stopped, uninterrupted(run, quiet))


def test_the_checkpoint_of_another_run_is_refused(run, tiny):
    made = run("made", optim={"steps": 4})
    made.launch()
    other = Run(tiny(optim={"steps": 4}, seed=1), made.folder, MemoryStore())
    with pytest.raises(CheckpointError, match=r"^fingerprint: the checkpoint belongs to a run with another identity"):
        other.launch()


# ---------------------------------------------------------------------------------------------------------- not finite


def test_a_run_that_is_not_finite_stops_and_says_where(run):
    made = run("made", optim={"steps": 12, "warmup_steps": 0, "base_lr": 1e30})
    with pytest.raises(BadStepError) as caught:
        made.launch()
    message = str(caught.value)
    # Step 0 is finite and throws the weights away; step 1 is the first that is not.
    assert message.startswith(
        "Loss or gradient norm was not finite at step 1 (seen at step 2; no update was applied from that step on). "
        "The step trained on positions 4 to 7 of the plan: "
    )
    assert "lower optim.base_lr, set optim.clip_norm, or use training.precision: fp32." in message
    keys = trained_on(made, range(4, 8))
    assert f"{', '.join(keys[:4])} … {keys[-1]} (64 images)" in message
    assert made.ledger()[1]["keys"] == keys
    assert made.store.events == [("non_finite", message)]
    assert made.store.points == []  # not even the last log step: its means hold the bad step
    assert not made.folder.exists()


def trained_on(made, positions):
    dataset = Dataset.open(made.config.data.path)
    spec = StreamSpec.of(made.config, resolve(made.config, dataset.facts()), dataset)
    return [key for p in positions for key in dataset.read_group(spec.plan.locate(p)[1]).keys]
