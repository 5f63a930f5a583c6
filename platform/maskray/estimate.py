"""What a run will take, before anything is started: by arithmetic, on any machine, with or without the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from maskray import masking
from maskray.config.resolve import check_shares, padding_waste, resolve
from maskray.config.schema import IngestConfig, RunConfig
from maskray.data.manifest import MANIFEST
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.models.build import weightless_model
from maskray.models.cost import Cost, cost
from maskray.models.memory import Memory, memory


@dataclass(frozen=True)
class Length:
    """How much a run trains."""

    group_rows: int
    """Images in a row group; of a dataset that is not there, as ingest could be told to make them."""
    passes: float | None
    """Over the data; None: neither the config says it nor a dataset is there."""
    views: int | None
    """Crops trained on; None: a number of passes over a dataset that is not there."""


@dataclass(frozen=True)
class Estimate:
    """Where a mask has several ratios, operations are their mean, and memory is that of the costliest."""

    workers: int
    micro_batch: int
    costs: tuple[Cost, ...]
    """One for each ratio of the mask."""
    memory: Memory
    """Of a worker."""
    length: Length
    waste: float
    """Share of the workers' time that goes into repeats of weight 0."""

    @property
    def encoder_flops(self) -> float:
        """Forward pass of the encoder, an image."""
        return fmean(each.encoder_flops for each in self.costs)

    @property
    def decoder_flops(self) -> float:
        """Forward pass of the decoder, an image."""
        return fmean(each.decoder_flops for each in self.costs)

    @property
    def training_flops(self) -> float:
        """Forward and backward pass, an image."""
        return fmean(each.training_flops for each in self.costs)

    def hours(self, views: float, rate: float) -> float:
        """For so many views, where each worker does `rate` operations a second."""
        return views * self.training_flops / (self.workers * rate * (1 - self.waste)) / 3600


def estimate(config: RunConfig) -> Estimate:
    """The estimate of a config, by its dataset where there is one at `data.path`.

    Raises:
        MaskrayError: config and dataset do not fit together, or there is no such encoder or mask.
    """
    length = _length(config)
    workers, per_group = config.cluster.workers, length.group_rows * config.data.views_per_image
    groups = -(-config.optim.global_batch // per_group)  # without a dataset a batch need not be whole groups
    check_shares(config, per_group, groups)
    share = min(-(-groups // workers) * per_group, config.optim.global_batch)
    model, training = weightless_model(config), config.training
    micro_batch = min(training.micro_batch or share, share)
    counts = [
        (num, masking.num_target(config.objective, config.grid, num))
        for num in masking.visible_counts(config.mask, config.grid)
    ]
    needs = [
        memory(
            model,
            *count,
            micro_batch,
            training.precision,
            workers,
            sharded=training.shard,
            recomputed=training.recompute_activations,
        )
        for count in counts
    ]
    return Estimate(
        workers=workers,
        micro_batch=micro_batch,
        costs=tuple(cost(model, *count) for count in counts),
        memory=max(needs, key=lambda need: need.total),
        length=length,
        waste=padding_waste(workers, groups),
    )


def _length(config: RunConfig) -> Length:
    optim = config.optim
    if Storage(config.data.path).exists(MANIFEST):
        plan = resolve(config, Dataset.open(config.data.path, config.data.version).facts())
        passes = plan.total_steps / plan.steps_per_pass
        return Length(plan.group_rows, passes, plan.total_steps * plan.global_batch)
    # What ingest would take, or fewer, so that each worker has a row group.
    most = optim.global_batch // (config.cluster.workers * config.data.views_per_image)
    group_rows = max(1, min(IngestConfig.model_fields["group_rows"].default, most))
    return Length(group_rows, optim.epochs, None if optim.steps is None else optim.steps * optim.global_batch)
