"""Courses: left at any step and taken up again they end as if they had not been, and what is done is not done again."""

import weakref

import pytest
import torch

from maskray.errors import CheckpointError
from maskray.training import checkpoint, courses
from maskray.training.checkpoint import STATE
from maskray.training.context import LocalWorkerContext
from maskray.training.courses import COURSE, run_all

STEPS, CHECKPOINT_STEPS = 7, 2
ASKED = ["a", "b", "c"]


class KilledError(Exception):
    """Stands for SIGKILL."""


class Line:
    """A course: a line fitted to points of its own, by an optimiser with moments."""

    total_steps = STEPS

    def __init__(self, name, trained):
        self.name, self.trained = name, trained
        generator = torch.Generator().manual_seed(ord(name))
        self.x = torch.randn(STEPS, 4, generator=generator)
        self.model = torch.nn.Linear(4, 1)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self, number):
        self.optimizer.zero_grad()
        (self.model(self.x[number]) - self.x[number].sum()).square().sum().backward()
        self.optimizer.step()
        self.trained.append((self.name, number))

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def result(self):
        return {"weight": self.model.weight.detach(), "name": self.name, "rows": [1, 2]}


@pytest.fixture
def go(tmp_path):
    """go(kill_at=None) -> (results, steps that were trained); dies after so many steps of this launch."""

    def run(folder="run", kill_at=None, asked=ASKED, fingerprint="f", context=LocalWorkerContext):
        trained = []

        def tell(index, step, total):
            assert total == STEPS
            if len(trained) == kill_at:
                raise KilledError

        found = None
        try:
            found = run_all(
                lambda name, _: Line(name, trained),
                asked,
                context(tmp_path / folder, keep_checkpoints=1),
                fingerprint=fingerprint,
                checkpoint_steps=CHECKPOINT_STEPS,
                tell=tell,
            )
        except KilledError:
            assert kill_at is not None
        return found, trained

    return run


def equal(one, other):
    return [r["name"] for r in one] == [r["name"] for r in other] and all(
        torch.equal(a["weight"], b["weight"]) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("moment", range(1, 3 * STEPS + 1))
def test_a_list_that_was_left_ends_as_one_that_was_not(go, moment):
    quiet, trained = go("quiet")
    assert trained == [(name, step) for name in ASKED for step in range(STEPS)]
    left, first = go(kill_at=moment)
    assert left is None
    found, then = go()
    assert equal(found, quiet)
    # From the latest checkpoint: at most its steps are trained again, and no course whose result there was.
    course, step = divmod(moment - 1, STEPS)
    assert then[0] == (ASKED[course], step - step % CHECKPOINT_STEPS)
    assert first == trained[:moment]
    assert then == trained[-len(then) :]


def test_a_course_is_gone_before_the_next_is_built(tmp_path):
    alive = weakref.WeakSet()

    def build(name, _):
        assert not alive
        course = Line(name, [])
        alive.add(course)
        return course

    run_all(build, ASKED, LocalWorkerContext(tmp_path), fingerprint="f", checkpoint_steps=2)


def test_it_may_be_left_again_and_again(go):
    quiet, _ = go("quiet")
    for moment in (3, 3, 6, 2, 3):
        go(kill_at=moment)
    assert equal(go()[0], quiet)


def test_what_is_finished_trains_nothing(go):
    first, _ = go()
    again, trained = go()
    assert trained == []
    assert equal(again, first)


def test_a_checkpoint_is_whole_or_does_not_count(go, tmp_path):
    go(kill_at=5)
    (folder,) = (tmp_path / "run").iterdir()
    assert checkpoint.is_whole(folder)
    assert torch.load(folder / COURSE, weights_only=True)["course"]["model"]
    (folder / COURSE).write_bytes((folder / COURSE).read_bytes()[:-1])
    assert not checkpoint.is_whole(folder)
    assert go()[1][0] == ("a", 0)


def test_the_last_checkpoint_is_small(go, tmp_path):
    go()
    (folder,) = (tmp_path / "run").iterdir()
    held = torch.load(folder / COURSE, weights_only=True)
    assert held["course"] is None
    assert len(held["results"]) == len(ASKED)


def test_another_list_of_trainings_is_refused(go):
    go(kill_at=5)
    with pytest.raises(CheckpointError, match=r"belongs to another list of trainings\. Found: f in .*Allowed: g"):
        go(fingerprint="g")


def test_a_run_of_pretraining_is_no_list_of_trainings(go, tmp_path, rig):
    r = rig()
    folder = tmp_path / "run/step_000000001-local"
    folder.mkdir(parents=True)
    facts = checkpoint.Facts(1, "f", 1, 1, {}, [])
    checkpoint.HostCopy(r.model, r.optimizer, facts, "").write(folder)
    with pytest.raises(CheckpointError, match=r"missing or damaged|another list"):
        go()
    assert (folder / STATE).exists()


def test_gradients_of_one_worker_are_left_alone():
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.grad.clone()
    courses.summed_gradients(model)
    assert torch.equal(before, model.weight.grad)
