"""A training step with all that it is made of, on made-up images."""

from dataclasses import dataclass

import pytest
import torch

from maskray import masking
from maskray.config.resolve import DatasetFacts, resolve
from maskray.data.stream import Batch
from maskray.models.build import initial_model
from maskray.models.normalize import Normalize
from maskray.objective import Objective
from maskray.training.optim import Schedule, build_optimizer
from maskray.training.step import TrainStep

CPU = torch.device("cpu")


@dataclass
class Rig:
    config: object
    model: torch.nn.Module
    optimizer: torch.optim.AdamW
    schedule: Schedule
    step: TrainStep

    def batch(self, number: int = 0, size: int = 64) -> Batch:
        grid = self.model.grid_HW
        images = torch.randint(
            0, 256, (size, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
        )
        (num,) = masking.visible_counts(self.config.mask, grid)
        rows = torch.arange(size)
        visible = masking.draw(self.config.mask, grid, num, seed=number, pass_=0, rows=rows, view=0, xp=torch)
        return Batch(images, visible, num, ~visible, visible[0].numel() - num, torch.ones(size), ["key"] * size)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def moments(self) -> list[torch.Tensor]:
        return [v.clone() for state in self.optimizer.state_dict()["state"].values() for v in state.values()]


@pytest.fixture
def rig(tiny):
    """rig(**sections) -> Rig, from the seed of the config: two of them are equal."""

    def build(**sections) -> Rig:
        config = tiny(**sections)
        plan = resolve(config, DatasetFacts("0" * 16, 16, 80, 1280))
        model, normalize = initial_model(config), Normalize.from_kind("symmetric", 1)
        optimizer, schedule = build_optimizer(model, config.optim), Schedule.of(config.optim, plan)
        objective = Objective(config.objective, config.cell)
        return Rig(
            config, model, optimizer, schedule, TrainStep(model, normalize, objective, optimizer, schedule, config, CPU)
        )

    return build


def assert_equal(one, other) -> None:
    pairs = zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else zip(one, other, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def same():
    """Asserts that tables or lists of tensors are equal to the bit."""
    return assert_equal
