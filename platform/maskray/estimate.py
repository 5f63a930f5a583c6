"""What a run will take, before anything is started: by arithmetic, on any machine, with or without the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from statistics import fmean

from maskray import masking
from maskray.config.resolve import check_shares, padding_waste, resolve
from maskray.config.schema import IngestConfig, RunConfig
from maskray.data.local import chosen_cache, is_walked_locally
from maskray.data.manifest import MANIFEST
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.models.build import weightless_model
from maskray.models.cost import Cost, cost
from maskray.models.memory import Memory, memory

DECODED_PER_CORE = 1_000
"""Images a second that a core brings to a worker by Ray Data and Train's splitter, of JPEGs of short side 256 cropped
to `DECODED_PIXELS`: half of what two cores did (tests/benchmarks/RESULTS.md, "Delivered to the training process")."""
DECODED_PIXELS = 224 * 224


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
    decoded_per_core: float | None
    """Images a second that a core decodes, about; None: they are decoded once, and kept."""

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

    def images_per_second(self, rate: float) -> float:
        """Of all workers, where each does `rate` operations a second and waits for none."""
        return self.workers * rate * (1 - self.waste) / self.training_flops

    def decoding_cores(self, rate: float) -> int | None:
        """That decode as many images, about; None: images are decoded once, and kept."""
        return None if self.decoded_per_core is None else ceil(self.images_per_second(rate) / self.decoded_per_core)

    def hours(self, views: float, rate: float) -> float:
        """For so many views, where each worker does `rate` operations a second."""
        return views / self.images_per_second(rate) / 3600


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
        decoded_per_core=None if _keeps_decoded(config) else DECODED_PER_CORE / max(1.0, _area(config)),
    )


def _keeps_decoded(config: RunConfig) -> bool:
    """Whether images are decoded once; of a dataset that is not there, as the config says, and else they are not."""
    data = config.data
    if data.cache == "auto" and Storage(data.path).exists(MANIFEST):
        dataset = Dataset.open(data.path, data.version)
        return is_walked_locally(data, dataset) and chosen_cache(data, dataset) != "none"
    return data.cache in ("host", "device")


def _area(config: RunConfig) -> float:
    """Of an image, against those that were measured: shards of larger ones have been resized to as much more."""
    height, width = config.data.image_size
    return height * width / DECODED_PIXELS


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
