"""Fine-tunings on Ray Train: a killed worker changes nothing, what is done is not done again, what is wrong stops."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from maskray.config.evaluation import FinetuneEvaluation
from maskray.config.load import parse
from maskray.config.schema import ClusterConfig
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import NonFiniteError, TrainingError
from maskray.evaluation.finetune import Asked, Finetuning
from maskray.models.encoder import load_encoder
from maskray.on_ray import courses

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PACKAGE = str(Path(__file__).parents[2] / "platform")
STEPS, CHECKPOINT_STEPS = 8, 2
TWO = ClusterConfig(workers=2, max_failures=3)
ONE, OTHER, DIVERGED, WRONG = (Asked("model", 5, 1.0, draw) for draw in range(4))
# The same on bare torch: two processes of torchrun's.
QUIET = """
import pickle, sys
from pathlib import Path

import torch
import torch.distributed as dist

from maskray.training.context import LocalWorkerContext
from maskray.training.courses import run_all

torch.set_num_threads(1)
dist.init_process_group("gloo")
build, asked = pickle.loads(Path(sys.argv[1]).read_bytes())
context = LocalWorkerContext(Path(sys.argv[2]), rank=dist.get_rank(), world_size=2)
results = run_all(build, asked, context, fingerprint="f", checkpoint_steps=2)
if dist.get_rank() == 0:
    torch.save(results, sys.argv[3])
dist.destroy_process_group()
"""


@pytest.fixture
def what(digits, digits_encoder):
    recipe = {"kind": "finetune", "epochs": 1, "least_steps": STEPS, "unit_rows": 8, "base_lr": 0.05}
    encoders = {"model": load_encoder(digits_encoder)}
    return Finetuning(parse(FinetuneEvaluation, recipe), encoders, Dataset.open(str(digits)), None, 0, threads=1)


@dataclass
class Watched:
    """Fine-tunings that take their time, and say which process has done which step."""

    what: Finetuning
    folder: Path

    def __call__(self, asked, context):
        if asked == WRONG:
            raise NonFiniteError("a loss was not finite")
        course = self.what(asked, context)
        if asked == DIVERGED and context.rank == 1:  # both must see it
            course._network.head.weight.register_hook(lambda grad: grad * float("nan"))
        step, path = course.step, self.folder / f"{asked.draw}-{context.rank}"

        def slow(number):
            step(number)
            with path.open("a") as file:
                file.write(f"{number} {os.getpid()}\n")
            time.sleep(0.3)

        course.step = slow
        return course

    def done(self, asked, rank):
        """(step, process) in the order in which they were done."""
        path = self.folder / f"{asked.draw}-{rank}"
        return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []

    def kill_a_worker(self, asked, moment):
        """SIGKILL of the second one, once it has done a step."""

        def kill():
            while not any(number == moment for number, _ in self.done(asked, 1)):
                time.sleep(0.01)
            os.kill(self.done(asked, 1)[-1][1], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        return killer


def uninterrupted(what, folder):
    """Results of two processes that nobody disturbed."""
    folder.mkdir()
    (folder / "build").write_bytes(pickle.dumps((what, [ONE, OTHER])))
    (folder / "quiet.py").write_text(QUIET)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    places = [folder / name for name in ("quiet.py", "build", "run", "results.pt")]
    environment = {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, places)], env=environment, check=True, timeout=120, capture_output=True)
    return torch.load(folder / "results.pt", weights_only=True)


def test_a_worker_killed_in_the_middle_changes_nothing_and_what_is_done_is_not_done_again(what, tmp_path):
    quiet = uninterrupted(what, tmp_path / "quiet")
    watched = Watched(what, tmp_path / "ledger")
    watched.folder.mkdir()

    def train(asked):
        place = {"cluster": TWO, "root": Storage(tmp_path / "runs"), "prefix": "digits"}
        return courses.run_all(watched, asked, "f", CHECKPOINT_STEPS, **place)

    killer = watched.kill_a_worker(OTHER, 5)
    with pytest.raises(TrainingError, match="a loss was not finite"):  # and it is not tried again
        train([ONE, OTHER, DIVERGED, WRONG])
    killer.join()
    one, other = ([number for number, _ in watched.done(asked, 0)] for asked in (ONE, OTHER))
    assert len(one + other) > 2 * STEPS, "the kill came to nothing"
    assert len({pid for _, pid in watched.done(OTHER, 1)}) == 2
    assert one.count(0) == 1, "it began anew"

    # Without the one that goes wrong: what is on record needs no workers.
    start = time.monotonic()
    *found, diverged = train([ONE, OTHER, DIVERGED])
    assert time.monotonic() - start < 3
    assert list(diverged) == ["failed"]
    assert [each["steps"] for each in found] == [STEPS, STEPS]
    assert [each["weights"] for each in found] == [each["weights"] for each in quiet]
    assert all(torch.equal(a["named_M"], b["named_M"]) for a, b in zip(found, quiet, strict=True))
