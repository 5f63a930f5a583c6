"""Bad steps for tests: at steps of the plan that are named, the loss of every image is multiplied."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def planted(call: Callable[..., None], factors: Mapping[int, float]) -> Callable[..., None]:
    """`TrainStep.__call__` with the bad steps in it: the gradients are multiplied too."""

    def step(self: Any, number: int, batches: Any, *rest: int) -> None:
        objective = self._objective
        if number in factors:
            self._objective = lambda *arguments: factors[number] * objective(*arguments)
        try:
            call(self, number, batches, *rest)
        finally:
            self._objective = objective

    return step


def plant(module: ModuleType, factors: Mapping[int, float]) -> None:
    """For a process of its own: into `maskray.training.step`, once it is imported."""
    module.TrainStep.__call__ = planted(module.TrainStep.__call__, factors)
