"""The training stream: the plan's row groups, decoded, cropped and masked. Walked in `local`, and on Ray in `on_ray`.

Both walks call `load_unit`, a pure function of (spec, position), so they give the same bits in the same order, whatever
the number of workers, threads or restarts.

Shape letters: N views of a row group (row r, view v at r·V + v), B images of a batch, C, H, W channels and pixels; in
`visible`, H and W are cells of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from maskray import masking
from maskray.data import crop, decode
from maskray.data.manifest import SplitName
from maskray.data.plan import share, shared_rounds
from maskray.data.shards import Dataset, Group
from maskray.data.spec import StreamSpec
from maskray.errors import DataError, StreamError, UnreachableError

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Images = list[torch.Tensor | None]
"""Decoded whole images of a row group, (C, H, W) uint8; None where one cannot be decoded."""


class Unit(NamedTuple):
    """One row group, ready for the model."""

    position: int
    images_NCHW: Array | torch.Tensor
    """uint8. A tensor where it lies on the device already, as visible_NHW then does."""
    visible_NHW: Array | torch.Tensor
    """bool, True = the encoder sees the cell."""
    weights_N: Array
    """float32: 1, or 0 for an image that could not be read or decoded and is black."""
    keys: list[str]
    warnings: tuple[str, ...] = ()
    """What could not be read or decoded, and why. To be said where it is trained on: nobody sees the logs of tasks."""
    target_NHW: Array | torch.Tensor | None = None
    """bool, True = the loss counts the cell; None: all hidden ones, or all, as the objective says."""


def load_unit(spec: StreamSpec, dataset: Dataset, position: int) -> Unit:
    """Read, decode, crop, flip and mask the row group at a position of the plan: a pure function.

    Raises:
        DataError: the shard is missing or damaged, and `spec.unreadable` is "stop".
        UnreachableError: the object store did not answer, and `spec.unreadable` is "stop".
        StorageError: the storage refuses to be read.
    """
    pass_, number = spec.plan.locate(position)
    found = read_images(spec, dataset, number)
    unit = augment(spec, position, pass_, found.rows, found.keys, found.images)
    return unit._replace(warnings=tuple(found.warnings))


class Decoded(NamedTuple):
    """One row group, decoded. R rows."""

    rows: Array
    """(R,) row numbers in the split."""
    keys: list[str]
    images: Images
    warnings: list[str]
    """What could not be read or decoded, and why."""


def read_images(spec: StreamSpec, dataset: Dataset, number: int) -> Decoded:
    """The decoded images of a row group. One that cannot be read has none, if the spec lets it pass.

    Raises as `load_unit` does.
    """
    warnings: list[str] = []
    try:
        group = dataset.read_group(number)
    except (DataError, UnreachableError) as error:
        if spec.unreadable == "stop":
            raise
        rows, stand_ins = dataset.slots(number)
        return Decoded(rows, stand_ins, [None] * len(rows), [f"{error} It counts for nothing"])
    return Decoded(group.rows, group.keys, decode_group(group, spec.channels, warnings.append), warnings)


def decode_group(group: Group, channels: int, warn: Callable[[str], object] = logger.warning) -> Images:
    """Each image of a row group; one that cannot be decoded is None, and a warning names it."""
    images: Images = []
    for key, data in zip(group.keys, group.images, strict=True):
        try:
            images.append(decode.decode(data, channels))
        except decode.UndecodableError as error:
            # Ingest decoded it once, with another version or into other channels: it keeps its slot, without weight.
            warn(f"image {key} cannot be decoded any more ({error}): it counts for nothing")
            images.append(None)
    return images


def augment(spec: StreamSpec, position: int, pass_: int, rows: Array, keys: list[str], images: Images) -> Unit:
    """Crop, flip and mask a row group's decoded images: all views of each."""
    num_views = spec.views_per_image
    sizes = np.array([(1, 1) if image is None else image.shape[1:] for image in images], dtype=np.int64)
    boxes_N4, flips_N = draw_crops(spec, pass_, rows, sizes)
    rows_N, views_N = _by_view(spec, rows)
    visible_NHW, target_NHW = draw_masks(spec, position, pass_, rows_N, views_N)

    out_NCHW = np.zeros((len(boxes_N4), spec.channels, *spec.image_size), dtype=np.uint8)
    weights_N = np.zeros(len(boxes_N4), dtype=np.float32)
    for n in range(len(boxes_N4)):
        image = images[n // num_views]
        if image is not None:
            out_NCHW[n] = crop.crop_resize(image, boxes_N4[n], spec.image_size, flip=bool(flips_N[n])).numpy()
            weights_N[n] = 1
    return Unit(
        position, out_NCHW, visible_NHW, weights_N, [k for k in keys for _ in range(num_views)], target_NHW=target_NHW
    )


def draw_masks(
    spec: StreamSpec, position: int, pass_: int, rows_N: Any, views_N: Any, xp: ModuleType = np
) -> tuple[Any, Any]:
    """Visibility and, where it is a part of the hidden cells, target (N, H, W) bool of the views of a row group."""
    step = spec.step_of(position)
    by_key: dict[str, Any] = {"seed": spec.seed, "pass_": pass_, "rows": rows_N, "view": views_N, "xp": xp}
    visible_NHW = masking.draw(spec.mask, spec.grid_HW, spec.num_visible(step), **by_key)
    if spec.objective.predict_fraction == 1:
        return visible_NHW, None
    return visible_NHW, masking.draw_target(visible_NHW, spec.num_target(step), **by_key)


def draw_crops(spec: StreamSpec, pass_: int, rows: Array, sizes: Array) -> tuple[Array, Array]:
    """Boxes (N, 4) int64 and flips (N,) bool of all views of R rows, whose images have `sizes` (R, 2)."""
    rows_N, views_N = _by_view(spec, rows)
    by_key: dict[str, Any] = {"seed": spec.seed, "pass_": pass_, "rows": rows_N, "views": views_N}
    boxes_N4 = crop.draw_boxes(spec.crop, np.repeat(sizes, spec.views_per_image, axis=0), **by_key)
    return boxes_N4, crop.draw_flips(spec.flip_probability, **by_key)


def _by_view(spec: StreamSpec, rows: Array) -> tuple[Array, Array]:
    return np.repeat(rows, spec.views_per_image), np.tile(np.arange(spec.views_per_image), len(rows))


# --------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Batch:
    """What one forward and backward pass takes."""

    images_BCHW: torch.Tensor
    """uint8."""
    visible_BHW: torch.Tensor
    """bool, True = the encoder sees the cell."""
    num_visible: int
    """Visible cells in each image."""
    target_BHW: torch.Tensor
    """bool, True = the loss counts the cell."""
    num_target: int
    """Such cells in each image."""
    weights_B: torch.Tensor
    """float32: 0 for what does not count."""
    keys: list[str]


@dataclass(frozen=True)
class Step:
    """A worker's share of one optimiser step."""

    number: int
    batches: list[Batch]
    """As many on every worker."""
    positions: list[int]
    """Of the plan, without repeats."""


def steps(
    units: Iterator[Unit],
    spec: StreamSpec,
    rank: int,
    world_size: int,
    start_step: int,
    micro_batch: int | None = None,
) -> Iterator[Step]:
    """Group a worker's units into steps, each unit checked against the plan, its warnings logged.

    A worker that lacks its last row group, because the workers do not divide the groups of a step, repeats its first
    with weight 0: so all workers do the same number of passes.

    Args:
        units: from `start_step` on.
        spec: the stream.
        rank: of this worker.
        world_size: number of workers, at most `spec.groups_per_step`.
        start_step: number of the first step.
        micro_batch: views in a batch: whole row groups or a divisor of one; None is the whole share.

    Raises:
        StreamError: the units are not the plan's.
    """
    rounds = shared_rounds(spec.groups_per_step, world_size)
    for number in range(start_step, spec.total_steps):
        positions = share(number, spec.groups_per_step, rank, world_size)
        assert positions, "resolve() refuses more workers than a step has row groups"
        taken = [_next_unit(units, wanted, number, rank) for wanted in positions]
        if len(taken) < rounds:
            taken.append(taken[0]._replace(weights_N=np.zeros_like(taken[0].weights_N)))
        yield Step(number, _batches(taken, spec, number, micro_batch), positions)


def _next_unit(units: Iterator[Unit], wanted: int, step: int, rank: int) -> Unit:
    unit = next(units, None)
    if unit is None or unit.position != wanted:
        got = "the end of the stream" if unit is None else f"position {unit.position}"
        raise StreamError(f"step {step}, rank {rank}: the plan asks for position {wanted}, the stream gave {got}")
    for warning in unit.warnings:
        logger.warning("%s", warning)
    return unit


def _batches(units: list[Unit], spec: StreamSpec, step: int, micro_batch: int | None) -> list[Batch]:
    counts = {"num_visible": spec.num_visible(step), "num_target": spec.num_target(step)}
    size = micro_batch or len(units) * spec.views_per_group
    groups = max(1, size // spec.views_per_group)
    out: list[Batch] = []
    for first in range(0, len(units), groups):
        some = units[first : first + groups]
        images_NCHW = _tensor([u.images_NCHW for u in some])
        visible_NHW = _tensor([u.visible_NHW for u in some])
        target_NHW = _target(some, visible_NHW, spec)
        weights_N = _tensor([u.weights_N for u in some])
        keys = [key for u in some for key in u.keys]
        for at in range(0, len(keys), size):
            rows = slice(at, at + size)
            out.append(
                Batch(
                    images_BCHW=images_NCHW[rows],
                    visible_BHW=visible_NHW[rows],
                    target_BHW=target_NHW[rows],
                    weights_B=weights_N[rows],
                    keys=keys[rows],
                    **counts,
                )
            )
    return out


def _target(units: list[Unit], visible_NHW: torch.Tensor, spec: StreamSpec) -> torch.Tensor:
    if spec.objective.cells == "all":
        return torch.ones_like(visible_NHW)
    given = [unit.target_NHW for unit in units if unit.target_NHW is not None]
    return _tensor(given) if given else ~visible_NHW


def _tensor(parts: list[Array | torch.Tensor]) -> torch.Tensor:
    first, *others = parts
    if isinstance(first, torch.Tensor):
        return torch.cat([torch.as_tensor(part) for part in parts]) if others else first
    # Units from Ray's object store are read-only views; torch wants memory of its own.
    whole = np.concatenate([np.asarray(part) for part in parts]) if others or not first.flags.writeable else first
    return torch.from_numpy(whole)


# ---------------------------------------------------------------------------------------------------------- evaluation


class WalkGroup(NamedTuple):
    """Whole images of one row group, for evaluation."""

    rows: Array
    """(B,) int64 row numbers in the split."""
    keys: list[str]
    images_BCHW: torch.Tensor
    """uint8."""
    labels: Array | None
    """(B,) int64, or None where the dataset has none."""


def walk(
    dataset: Dataset,
    split: SplitName,
    image_size: tuple[int, int],
    channels: int,
    max_rows: int | None = None,
) -> Iterator[WalkGroup]:
    """Each of a split's first `max_rows` rows once, in order, whole and resized; undecodable images are left out."""
    left = dataset.num_rows(split) if max_rows is None else min(max_rows, dataset.num_rows(split))
    groups = dataset.iter_groups(split)
    while left > 0:
        group = next(groups)
        images = decode_group(group, channels)[:left]
        left -= len(images)
        good = [i for i, image in enumerate(images) if image is not None]
        if not good:
            continue
        whole = torch.stack([_resize(images[i], image_size) for i in good])
        labels = None if group.labels is None else group.labels[good]
        yield WalkGroup(group.rows[good], [group.keys[i] for i in good], whole, labels)


def _resize(image_CHW: torch.Tensor | None, image_size: tuple[int, int]) -> torch.Tensor:
    assert image_CHW is not None
    box = np.array([0, 0, *image_CHW.shape[1:]])
    return crop.crop_resize(image_CHW, box, image_size, flip=False).contiguous()
