"""Detectors on Ray Train: a killed worker changes nothing.

The long form: that a list of courses goes on after a kill is what `test_courses_on_ray.py` is for, and that a detector
goes on with the same bits `unit/evaluation/detection/test_course.py`.
"""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from maskray.config.evaluation import CocoData, DetectionEvaluation
from maskray.config.models import VitConfig
from maskray.config.schema import ClusterConfig
from maskray.data.storage import Storage
from maskray.evaluation.detection.course import Detection
from maskray.evaluation.detection.outcome import detected, open_sets
from maskray.models.encoder import Encoder, encoder_only
from maskray.models.normalize import Normalize
from maskray.on_ray import courses
from maskray.on_ray.stream import SNAPSHOT
from maskray.training.folders import folder_name

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SIDE, STEPS = 64, 6
AGAIN = "again"
AT_4 = folder_name(STEPS + 1 + 4, "")
"""Name of a checkpoint of the second training, after all steps and the result of the first."""
TWO = ClusterConfig(workers=2, max_failures=3)


@pytest.fixture
def what(tmp_path):
    import cutouts  # not above: workers import this file, and have no folder of tests

    for part, (name, num) in enumerate({"train": 9, "val": 5}.items()):
        cutouts.write(tmp_path / name, num, seed=0, side=SIDE, part=part)
    data = {
        name: CocoData(annotations=str(tmp_path / name / "annotations.json"), images=str(tmp_path / name / "images"))
        for name in ("train", "val")
    }
    sizes = {"image_size": SIDE, "pyramid_width": 16, "head_width": 32, "proposals": 32, "sampled_boxes": 16}
    recipe = {"batch": 3, "epochs": STEPS * 3 / 9, "base_lr": 3e-2, "layer_decay": 1}
    config = DetectionEvaluation(**data, **sizes, **recipe, checkpoint_steps=2)
    vit = VitConfig(patch=(8, 8), width=32, depth=1, heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(encoder_only(vit, (SIDE, SIDE), 3), Normalize([0.4] * 3, [0.25] * 3), (SIDE, SIDE), vit)
    # The second is trained as the first is.
    return Detection(config, *open_sets(config), {"model": encoder, AGAIN: encoder}, seed=0)


@dataclass
class Killed:
    """A detection whose second worker is killed, once, in the middle of its second training."""

    what: Detection
    ledger: Path

    def __call__(self, name, context):
        course = self.what(name, context)
        step = course.step

        def watched(number):
            step(number)
            with (self.ledger / f"{name}-{context.rank}").open("a") as file:
                file.write(f"{number} {os.getpid()}\n")
            if (name, context.rank, number) == (AGAIN, 1, 4) and not (self.ledger / "killed").exists():
                # The checkpoint before has come on record.
                while not any(AT_4 in each.read_text() for each in self.ledger.parent.rglob(SNAPSHOT)):
                    time.sleep(0.1)
                (self.ledger / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        course.step = watched
        return course

    def done(self, name, rank):
        """(step, process) in the order in which they were done."""
        return [tuple(map(int, line.split())) for line in (self.ledger / f"{name}-{rank}").read_text().splitlines()]


def test_a_worker_killed_in_the_middle_changes_nothing(what, tmp_path):
    killed = Killed(what, tmp_path / "ledger")
    killed.ledger.mkdir()

    def train(build, asked, fingerprint, checkpoint_steps, tell):
        place = {"cluster": TWO, "root": Storage(tmp_path / "runs"), "prefix": "found"}
        return courses.run_all(killed, asked, fingerprint, checkpoint_steps, **place)

    found = detected(what, train)
    quiet, again = found.scores
    assert replace(again, features="model") == quiet
    assert quiet.precision.ap50 > 0
    assert (quiet.num_images, quiet.num_steps) == (5, STEPS)
    assert [number for number, _ in killed.done("model", 0)] == list(range(STEPS))
    assert [number for number, _ in killed.done(AGAIN, 1)] == [0, 1, 2, 3, 4, 4, 5]
    assert len({process for _, process in killed.done(AGAIN, 1)}) == 2
