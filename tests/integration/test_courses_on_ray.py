"""Courses on Ray Train: a worker killed in the middle of one changes nothing, and what is done is not done again."""

import os
import signal
import threading
import time

import pytest
import torch

from maskray.config.schema import ClusterConfig
from maskray.data.storage import Storage
from maskray.errors import NonFiniteError, TrainingError
from maskray.on_ray import courses
from maskray.training.context import LocalWorkerContext
from maskray.training.courses import run_all, summed, summed_gradients

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STEPS = 8
TWO = ClusterConfig(workers=2, max_failures=3)


class Line:
    """A course on two workers: each has the gradient of its own points."""

    total_steps = STEPS

    def __init__(self, asked, context):
        self.name, self.folder, self.rank = *asked, context.rank
        self.x = torch.randn(STEPS, 2, 4, generator=torch.Generator().manual_seed(ord(self.name)))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = torch.nn.Linear(4, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self, number):
        if self.name == "x":
            raise NonFiniteError("course x is not finite")
        self.gradients(number)
        summed_gradients(self.model)
        self.optimizer.step()
        with (self.folder / f"{self.name}-{self.rank}").open("a") as file:
            file.write(f"{number} {os.getpid()}\n")
        time.sleep(0.3)

    def gradients(self, number):
        self.optimizer.zero_grad()
        x = self.x[number, self.rank]
        (self.model(x) - x.sum()).square().sum().backward()
        return [parameter.grad.clone() for parameter in self.model.parameters()]

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def result(self):
        return {"weight": self.model.weight.detach().clone(), "ranks": summed(torch.tensor(self.rank))}


def trained(folder, name):
    path = folder / name
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def go(folder, storage, names):
    asked = [(name, folder) for name in names]
    place = {"root": Storage(storage), "name": "courses-f"}
    return courses.run_all(Line, asked, TWO, **place, fingerprint="f", checkpoint_steps=2)


class Alone(Line):
    """Both workers' part, by one: of two gradients there is but one sum."""

    def step(self, number):
        parts = []
        for rank in range(2):
            self.rank = rank
            parts.append(self.gradients(number))
        for parameter, *both in zip(self.model.parameters(), *parts, strict=True):
            parameter.grad = sum(both)
        self.optimizer.step()


def kill_when(folder, name, number):
    """SIGKILL of the second worker at a step of a course."""

    def kill():
        while not any(done == number for done, _ in trained(folder, f"{name}-1")):
            time.sleep(0.01)
        os.kill(trained(folder, f"{name}-1")[-1][1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_worker_killed_in_the_middle_of_a_course_changes_nothing_and_what_is_done_is_kept(tmp_path):
    context = LocalWorkerContext(tmp_path / "alone")
    quiet = run_all(Alone, [(name, tmp_path) for name in "ab"], context, fingerprint="f", checkpoint_steps=2)
    folder = tmp_path / "killed"
    folder.mkdir()
    killer = kill_when(folder, "b", 5)
    with pytest.raises(TrainingError, match="course x is not finite"):  # and is not tried again
        go(folder, tmp_path / "runs", "abx")
    killer.join()
    steps = {name: [number for number, _ in trained(folder, f"{name}-0")] for name in "ab"}
    assert len(steps["a"] + steps["b"]) > 2 * STEPS, "the kill came to nothing"
    assert len({pid for _, pid in trained(folder, "b-1")}) == 2
    assert steps["a"].count(0) == 1, "it began anew"

    # The same without the course that goes wrong: what is on record needs no workers.
    start = time.monotonic()
    found = go(folder, tmp_path / "runs", "ab")
    assert time.monotonic() - start < 2
    assert all(torch.equal(each["weight"], other["weight"]) for each, other in zip(found, quiet, strict=True))
    assert [int(each["ranks"]) for each in found] == [1, 1]
