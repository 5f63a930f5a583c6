"""Every setting there is, as frozen sections that refuse unknown keys.

A field is *identity* (it says what is learned) unless it is declared with `operational`, which marks where, how fast
and how watched the run is. The run's fingerprint, name, folder and MLflow run hang on the identity and the data alone,
so the same run on more workers or in another bucket is the same run.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maskray.config.models import (
    AnyVit,
    ConvConfig,
    Mask,
    Model,
    ObjectiveConfig,
    PixelMask,
    RandomMask,
    TimmVitConfig,
    VitConfig,
)
from maskray.config.section import Fraction, PositiveInt, Section, SizeHW, of_kind, operational
from maskray.config.training import OptimConfig, ProbeConfig, TrainingConfig
from maskray.errors import ConfigError

MAX_CHANNELS = 64
"""Bands of an image at most."""


# ---------------------------------------------------------------------------------------------------------------- data


class RandomResizedCrop(Section):
    """A box of random area and aspect, resized to `data.image_size` (bicubic, antialiased)."""

    kind: Literal["random_resized"] = "random_resized"
    scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Smallest and largest share of the image's area; the MAE paper's (0.2, 1)."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the box."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in (("scale", self.scale), ("aspect", self.aspect)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high (found {[low, high]})")
        return self


class WholeImage(Section):
    """No crop: the whole image, resized to `data.image_size` where it has another size."""

    kind: Literal["whole"] = "whole"


Crop = Annotated[RandomResizedCrop | WholeImage, Field(discriminator="kind"), of_kind("random_resized")]


class DataConfig(Section):
    """What is trained on, and how it reaches the workers."""

    path: str = operational()
    """Folder or URI of an ingested dataset (`maskray ingest`). Its fingerprint, not its place, is identity."""
    version: str | None = operational(None)
    """Fingerprint of the version to train on, where images were added to the dataset; None takes the newest."""
    image_size: SizeHW = (224, 224)
    """[height, width] in pixels that the model sees; one number for a square."""
    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] = 3
    """1 gray or 3 RGB: images are converted. Any other number: the bands that the dataset's images have."""
    crop: Crop = RandomResizedCrop()
    flip_probability: Fraction = 0.5
    """Chance of a horizontal flip, for each view."""
    normalize: Literal["dataset", "imagenet", "symmetric"] = "dataset"
    """Pixels minus mean by std of the dataset or of ImageNet; `symmetric` maps them to [-1, 1]."""
    views_per_image: Annotated[int, Field(ge=1, le=16)] = 1
    """Crops (each with its mask) made from one decoded image."""
    stream: Literal["auto", "ray", "local"] = operational("auto")
    """Who decodes: Ray Data over the cluster, or each worker in its own threads. `auto` takes local where the decoded
    images fit into `local_bytes`. The order, crops and masks are the same to the bit."""
    local_bytes: PositiveInt = operational(2 * 2**30)
    """Largest decoded dataset that `stream: auto` walks in the workers, and `cache: auto` keeps decoded."""
    cache: Literal["auto", "none", "host", "device"] = operational("auto")
    """Where the workers' own walk keeps decoded images: nowhere, in a file that all processes of a machine share, or on
    the accelerator, where they are then also cropped and masked. `auto` takes host where they fit into `local_bytes`.
    Order, crops and masks are the same to the bit, pixels too but for `device`: there to within 1/255."""
    cache_folder: str | None = operational(None)
    """Local folder for the files of `cache`; None: one below the system's temporary folder. Its content may be deleted
    at any time."""
    groups_per_task: PositiveInt = operational(16)
    """Row groups that one Ray Data task reads: a task should last about a second."""
    tasks_per_execution: PositiveInt = operational(8192)
    """Tasks in one execution of Ray Data, which keeps a record for each; the next is opened before one ends."""
    actors: PositiveInt | None = operational(None)
    """Actors that decode under `stream: ray`; None: tasks, on any free CPU, those of nodes without GPUs too."""
    object_store_bytes: PositiveInt | None = operational(None)
    """What the stream may hold in Ray's object store; None: Ray Data's own limit, half of the store."""
    prefetch_groups: PositiveInt = operational(8)
    """Row groups that a worker holds ready."""
    stall_seconds: PositiveInt = operational(600)
    """Ray Data's progress timeout: an error is raised where no row group moves for so long."""
    decode_threads: PositiveInt = operational(2)
    """Threads a worker decodes with under `stream: local`."""
    unreadable: Literal["stop", "skip"] = operational("stop")
    """A row group that stays missing, damaged or unreachable ends the run with its shard's name; `skip` trains on: its
    images keep their slots with weight 0, counted in `throughput/views_without_image`, and no host cache is made. What
    needs all images stops in either case: evaluation, and `cache: device`."""

    @model_validator(mode="after")
    def _ray_data_keeps_nothing(self) -> Self:
        if self.stream == "ray" and self.cache in ("host", "device"):
            raise ConfigError(
                "only a worker that decodes for itself can keep what it decoded",
                key="data.cache",
                found=f"{self.cache}, with data.stream ray",
                allowed="auto or none",
                fix="set data.stream: local, if the decoded images fit on each worker's machine",
            )
        return self

    @model_validator(mode="after")
    def _the_cache_is_mapped(self) -> Self:
        if self.cache_folder is not None and "://" in self.cache_folder.removeprefix("file://"):
            raise ConfigError(
                "files there cannot be mapped into memory",
                key="data.cache_folder",
                found=self.cache_folder,
                allowed="a folder on a disk of the workers' machines",
            )
        return self


# ---------------------------------------------------------------------------------------------- where, and how watched


class ClusterConfig(Section):
    """Workers and what they take. Nothing here changes what is learned."""

    workers: PositiveInt = operational(1)
    cpus_per_worker: Annotated[float, Field(gt=0)] = operational(1)
    gpus_per_worker: Annotated[float, Field(ge=0)] = operational(0)
    data_cpus: PositiveInt = operational(1)
    """CPUs that must stay free for Ray Data beside the workers: a task of it takes a whole one, on one node."""
    address: str | None = operational(None)
    """`auto` or `host:port` joins a running cluster from one of its nodes (from elsewhere: `ray job submit`); None
    starts an embedded one on this machine."""
    embedded_cpus: PositiveInt | None = operational(None)
    """CPUs that an embedded cluster declares; None: those of the machine."""
    dashboard: bool = operational(default=False)
    """Ray's dashboard on an embedded cluster, on this machine alone; its address is said at the start."""
    wait_seconds: Annotated[float, Field(ge=0)] = operational(60.0)
    """How long to wait, visibly, for resources that the cluster can still get."""
    max_failures: Annotated[int, Field(ge=0)] = operational(3)
    """Times that the workers may be lost and started again; a run that has got further since has as many again."""


class PretrainClusterConfig(ClusterConfig):
    """As all that runs on workers, and what their number may become while nodes go and come."""

    min_workers: PositiveInt | None = operational(None)
    """Go on with so many at least where nodes are lost, up to `workers` again when there is room: always a number that
    divides the row groups of a step. None: with `workers` alone, waiting for nodes. Ray's launcher only."""
    grow_seconds: PositiveInt = operational(60)
    """Between two looks for room for more workers, up to `workers`. They start at the next checkpoint."""

    @model_validator(mode="after")
    def _least_is_not_more_than_most(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} must be at most workers (found {self.workers})")
        return self


class StorageConfig(Section):
    """Where runs are kept."""

    path: str = operational("runs")
    """Folder or `s3://bucket/prefix`: a folder for each run in it."""
    keep_checkpoints: PositiveInt = operational(2)
    """The best by `probe.best_by`, those that no probe has judged last, the newest of them first; the newest of all is
    kept in any case."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = operational(None)
    """MLflow's tracking URI; None keeps an SQLite store in `storage.path`."""
    experiment: str = operational("maskray")
    register_as: Annotated[str, Field(pattern=r"^[^/:]+$")] | None = operational(None)
    """Name in the model registry; None takes the run's `name`."""
    system_metrics_seconds: Annotated[float, Field(gt=0)] | None = operational(10.0)
    """Seconds between two readings of the first worker's CPU, memory and GPU; None: no readings."""


class RunConfig(Section):
    """One pretraining run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """First part of the run's name; the second is the fingerprint of its identity."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init_from: str | None = operational(None)
    """Weights to start from, at a path or URI that all workers see: a checkpoint's folder, or a `.safetensors`, `.pth`
    or `.bin` file with the names of the MAE authors, of Hugging Face's ViTMAE or of timm's vision transformers. The
    digest of the weights, not their place, is identity."""
    data: DataConfig
    mask: Mask = RandomMask()
    model: Model = VitConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig
    training: TrainingConfig = TrainingConfig()
    probe: ProbeConfig = ProbeConfig()
    cluster: PretrainClusterConfig = PretrainClusterConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def cell(self) -> tuple[int, int]:
        """Pixels down and across of what is hidden or shown as one."""
        return (1, 1) if isinstance(self.mask, PixelMask) else self.model.cell

    @property
    def grid(self) -> tuple[int, int]:
        """Cells down and across."""
        (height, width), (down, across) = self.data.image_size, self.cell
        return height // down, width // across

    @model_validator(mode="after")
    def _cells_divide_the_image(self) -> Self:
        for side, size, cell in zip(("height", "width"), self.data.image_size, self.model.cell, strict=True):
            if size % cell:
                below = size // cell * cell
                near = [n for n in (below, below + cell) if n]
                has_patch = isinstance(self.model, AnyVit)
                raise ConfigError(
                    f"the {'patch' if has_patch else 'stride'}'s {side} must divide the image's {side}",
                    key="data.image_size",
                    found=f"image {side} {size}, {f'model.patch {side}' if has_patch else 'a stride of'} {cell}",
                    allowed=" or ".join(map(str, near)),
                    fix=f"change data.image_size{' or model.patch' if has_patch else ''}",
                )
        return self

    @model_validator(mode="after")
    def _pixels_are_hidden_of_whole_images(self) -> Self:
        if isinstance(self.mask, PixelMask) and not isinstance(self.model, ConvConfig):
            raise ConfigError(
                f"scattered pixels leave no cell of a {self.model.kind} hidden or seen as a whole",
                key="mask.kind",
                found="pixels",
                allowed="random, block, inverse_block or grid; pixels with model.kind: conv",
                fix="take mask.kind: random for scattered patches",
            )
        return self

    @model_validator(mode="after")
    def _transformers_alone_compute_again(self) -> Self:
        if self.training.recompute_activations and not isinstance(self.model, VitConfig | TimmVitConfig):
            raise ConfigError(
                f"a model of kind {self.model.kind} remembers its activations",
                key="training.recompute_activations",
                found=True,
                allowed="false; true with model.kind vit or timm_vit",
                fix="set training.recompute_activations: false, and a smaller training.micro_batch to save memory",
            )
        return self

    @model_validator(mode="after")
    def _only_what_was_seen_to_work_is_sharded(self) -> Self:
        others = {
            "model.kind": None if isinstance(self.model, AnyVit) else self.model.kind,
            "optim.name": None if self.optim.name == "adamw" else self.optim.name,
            "training.compile": self.training.compile or None,
        }
        found = [f"{key} {value}" for key, value in others.items() if value is not None]
        if self.training.shard and found:
            raise ConfigError(
                "not known to work with a sharded model",
                key="training.shard",
                found=f"true, with {', '.join(found)}",
                allowed="false; true with model.kind vit or timm_vit, optim.name adamw and training.compile false",
                fix="set training.shard: false",
            )
        return self

    @model_validator(mode="after")
    def _norm_pix_has_something_to_normalise(self) -> Self:
        if self.objective.norm_pix and self.cell == (1, 1):
            raise ConfigError(
                "a cell of one pixel has no mean and std of its own",
                key="objective.norm_pix",
                found=f"true, with cells of 1 × 1 pixels and data.channels {self.data.channels}",
                fix="set objective.norm_pix: false, or a larger patch",
            )
        return self


# -------------------------------------------------------------------------------------------------------------- ingest


class IngestConfig(Section):
    """How pictures become a dataset of shards."""

    source: str
    """A folder of images (class subfolders give labels); a `.tar` or `.zip`, or a folder of those; a `.csv`, `.tsv` or
    `.parquet` of paths; a `.parquet` with images, or a folder of those; local or `s3://bucket/prefix`; or `digits`."""
    destination: str
    """Folder or URI that the dataset is written to."""
    group_rows: Annotated[int, Field(ge=1, le=4096)] = 64
    """Images in a row group: the unit that is shuffled and read."""
    groups_per_shard: PositiveInt = 128
    """Row groups in a shard file."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the images, by a hash of their keys, that pretraining never sees."""
    max_bad_fraction: Fraction = 0.01
    """Share of images that may be unreadable before ingest stops."""
    max_pixels: PositiveInt = 178_956_970
    """Height × width of a larger image are not believed, and it is set aside before it is decoded. Pillow's own limit:
    a quarter of a gigabyte as RGB."""
    resize_short: PositiveInt | None = None
    """Pixels of the short side that larger pictures are resized to and re-encoded with, once; smaller ones keep their
    bytes. None: all do."""
    quality: Annotated[int, Field(ge=1, le=100)] = 92
    """Of the JPEGs that `resize_short` makes."""
    deduplicate: bool = False
    """Set aside pictures whose bytes are those of another one, all but the first by key."""
    add: bool = False
    """Add the images to the dataset that is there, as a new version of it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the order in which images are laid into shards."""
