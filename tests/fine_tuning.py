"""A short fine-tuning of the digits, and a worker of it."""

from contextlib import closing
from types import SimpleNamespace

import torch

from maskray.evaluation.finetune import Asked

RECIPE = {
    "labels_per_class": [5],
    "label_shares": [],
    "draws": 2,
    "epochs": 4,
    "least_steps": 4,
    "batch": 26,
    "unit_rows": 8,
    "base_lr": 0.02,
    "crop": {"kind": "random_resized", "scale": [0.6, 1.0]},
    "checkpoint_steps": 3,
}
FIVE = Asked("model", 5, 1.0, 0)


def worker(rank=0, world_size=1):
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))


def units_of(course, step):
    """A worker's units of a step."""
    with closing(course.units.steps(step, step + 1, threads=1)) as steps:
        return next(steps)
