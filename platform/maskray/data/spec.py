"""All that a stream is a function of. No torch here: Ray's processes that only pass it on start a second earlier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

from maskray import masking
from maskray.config.models import Mask, ObjectiveConfig
from maskray.config.resolve import RunPlan
from maskray.config.schema import Crop, RunConfig
from maskray.data.plan import Plan, share
from maskray.data.shards import Dataset
from maskray.errors import DataError


@dataclass(frozen=True)
class StreamSpec:
    """All that a stream is a function of. Picklable."""

    path: str
    version: str
    """The dataset's fingerprint: images may be added to it while a run goes on."""
    seed: int
    image_size: tuple[int, int]
    channels: int
    crop: Crop
    flip_probability: float
    views_per_image: int
    mask: Mask
    objective: ObjectiveConfig
    grid_HW: tuple[int, int]
    num_row_groups: int
    group_rows: int
    groups_per_step: int
    total_steps: int
    unreadable: Literal["stop", "skip"] = "stop"

    @classmethod
    def of(cls, config: RunConfig, plan: RunPlan, dataset: Dataset) -> Self:
        """The stream of a run."""
        return cls(
            path=dataset.storage.uri,
            version=dataset.manifest.fingerprint,
            seed=config.seed,
            image_size=config.data.image_size,
            channels=config.data.channels,
            crop=config.data.crop,
            flip_probability=config.data.flip_probability,
            views_per_image=config.data.views_per_image,
            mask=config.mask,
            objective=config.objective,
            grid_HW=config.grid,
            num_row_groups=plan.num_row_groups,
            group_rows=plan.group_rows,
            groups_per_step=plan.groups_per_step,
            total_steps=plan.total_steps,
            unreadable=config.data.unreadable,
        )

    @cached_property
    def plan(self) -> Plan:
        """The order of row groups."""
        return Plan(self.seed, self.num_row_groups)

    @cached_property
    def visible_counts(self) -> tuple[int, ...]:
        """Visible cells in each image, for each ratio of the mask."""
        return masking.visible_counts(self.mask, self.grid_HW)

    def num_visible(self, step: int) -> int:
        """Visible cells in each image of a step."""
        return self.visible_counts[masking.choice_at(self.mask, self.seed, step)]

    def num_target(self, step: int) -> int:
        """Cells in each image of a step that the loss counts."""
        return masking.num_target(self.objective, self.grid_HW, self.num_visible(step))

    def step_of(self, position: int) -> int:
        """The step that a position of the plan is trained in."""
        return position // self.groups_per_step

    @property
    def views_per_group(self) -> int:
        """N of a unit."""
        return self.group_rows * self.views_per_image

    def positions(self, rank: int, world_size: int, start_step: int) -> Iterator[int]:
        """A worker's share of the plan from a step on."""
        for step in range(start_step, self.total_steps):
            yield from share(step, self.groups_per_step, rank, world_size)

    def open_dataset(self) -> Dataset:
        """The dataset at `path`.

        Raises:
            DataError: it is missing or damaged, or another one than the spec was made for.
        """
        dataset = Dataset.open(self.path, self.version, unreadable=self.unreadable)
        found = (dataset.num_row_groups(), dataset.manifest.group_rows)
        if found != (self.num_row_groups, self.group_rows):
            raise DataError(
                f"{self.path} is not the dataset that this run was planned on",
                found=f"{found[0]} row groups of {found[1]} rows",
                allowed=f"{self.num_row_groups} row groups of {self.group_rows} rows",
            )
        return dataset
