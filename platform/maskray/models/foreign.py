"""Weights that somebody else made or is to read, under their names: what `init_from` starts a run with, and exports."""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskray.config.load import load
from maskray.data.shards import sha256_of
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, ConfigError, StorageError
from maskray.models import parameter_names as names
from maskray.models.base import MaskedAutoencoder
from maskray.models.vit import position_table, resampled_positions

KEY = "init_from"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.yaml"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
ALLOWED = f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or a folder with {WEIGHTS_FILE}, as a checkpoint's"
_TABLES = ("model", "state_dict")
"""Under which the authors' and timm's training scripts save the weights, beside other things."""
_POSITIONS = ("pos_embed", "decoder_pos_embed")
_SAME_POSITIONS = 1e-4
_SHOWN = 6
# What torch's restricted unpickler and safetensors raise for bytes that are not theirs.
_NOT_WEIGHTS = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

log = logging.getLogger(__name__)


def load_weights(model: MaskedAutoencoder, path: str | Path) -> tuple[str, ...]:
    """Load a file's weights into `model`, in place, whoever's names they have; the log says whose.

    Args:
        model: built for the images of this run; positions of another grid are resampled in 2-D to its own.
        path: path or URI of a `.safetensors` file, of a `.pth`, `.pt` or `.bin` file (weights alone, or under `model`
            or `state_dict`, as training scripts save them), or of a folder with `model.safetensors`.

    Returns:
        Names of the parameters that keep their fresh values: the decoder's, where the file holds an encoder alone.

    Raises:
        CheckpointError: the file cannot be read, or its names or shapes are not the model's.
    """
    with _on_disk(path) as file:
        return _load(model, file)


def save_weights(weights: Mapping[str, Tensor], path: Path, kind: names.Format) -> None:
    """Write weights as others read them: `.pth` under `model`, as the authors publish theirs, or `.safetensors`.

    Args:
        weights: under our names.
        path: its suffix says which.
        kind: whose names to give them. The model must be one that they have.
    """
    theirs = {
        part: piece.detach().to("cpu", copy=True).contiguous()
        for name, tensor in weights.items()
        for part, piece in _apart(tensor, names.theirs(kind, name)).items()
    }
    if path.suffix == ".pth":
        torch.save({"model": theirs}, path)
    else:
        save_file(theirs, path, metadata={"format": "pt"})  # transformers asks for it


def _apart(tensor: Tensor, parts: tuple[str, ...]) -> dict[str, Tensor]:
    pieces = tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,)
    return dict(zip(parts, pieces, strict=True))


def _load(model: MaskedAutoencoder, path: Path) -> tuple[str, ...]:
    found, wanted = _read(path), model.state_dict()
    kind = names.recognised(found)
    log.info("%s has %s", path, names.WHOSE[kind])
    found = {name: found[spelled] for spelled, name in names.as_published(kind, found).items()}
    theirs = {name: names.theirs(kind, name) for name in wanted}
    decoder = tuple(name for name in wanted if name.startswith(names.DECODER))
    fresh = () if any(part in found for name in decoder for part in theirs[name]) else decoder
    used = {name: parts for name, parts in theirs.items() if name not in fresh}
    _check_names(path, kind, [part for parts in used.values() for part in parts], found)
    expected = {part: piece for name, parts in used.items() for part, piece in _apart(wanted[name], parts).items()}
    for name in _POSITIONS:
        for part in used.get(name, ()):
            found[part] = _fit(part, found[part], expected[part], model.grid_HW, _grid_in_config(path))
    _check_shapes(path, found, expected)
    _check_finite(path, {name: found[name] for name in expected})
    weights = {
        name: torch.cat([found[part] for part in parts]) if len(parts) > 1 else found[parts[0]]
        for name, parts in used.items()
    }
    model.load_state_dict(weights, strict=not fresh)
    if fresh:
        log.info("%s holds an encoder alone: the decoder (%d tensors) starts fresh", path, len(fresh))
    if heads := sorted(found.keys() & names.HEADS[kind]):
        log.info("%s: left out, being a classifier's: %s", path, ", ".join(heads))
    return fresh


def weights_digest(path: str | Path | None) -> str | None:
    """SHA-256 of a file of weights: what says, in a run's identity, where it started. None for None.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if path is None:
        return None
    storage, name = _file_at(path)
    try:
        return sha256_of(storage, name)
    except (FileNotFoundError, StorageError) as error:
        raise _unreadable(storage.join(name), error) from error


def _file_at(path: str | Path) -> tuple[Storage, str]:
    """The folder and name of the file of weights that a path or URI of a file, or of a checkpoint's folder, means."""
    place = Storage(path)
    base, options = place.address
    folder, _, name = base.rpartition("/")
    is_file = not Path(base).is_dir() if place.is_local else name.endswith(SUFFIXES)
    return (Storage(folder + options), name) if is_file else (place, WEIGHTS_FILE)


@contextmanager
def _on_disk(path: str | Path) -> Iterator[Path]:
    """The file as a local one: itself, or a copy that is deleted afterwards."""
    storage, name = _file_at(path)
    if storage.is_local:
        yield Path(storage.join(name))
        return
    with tempfile.TemporaryDirectory(prefix="maskray-") as folder:
        copy = Path(folder) / name
        try:
            with storage.open_input_file(name) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (FileNotFoundError, StorageError) as error:
            raise _unreadable(storage.join(name), error) from error
        if storage.exists(CONFIG_FILE):
            copy.with_name(CONFIG_FILE).write_bytes(storage.read_bytes(CONFIG_FILE))
        yield copy


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            "no file of weights",
            key=KEY,
            found=path,
            allowed=ALLOWED,
            fix="give a file or folder of one of these kinds",
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The authors' training script saves its arguments beside the weights: plain data in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except _NOT_WEIGHTS as error:
        raise CheckpointError(
            "the file is damaged, or holds more than weights (which is never loaded: it could run code)",
            key=KEY,
            found=f"{path} ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            fix="save its weights alone, e.g. as .safetensors",
        ) from error
    tables = [loaded[key] for key in _TABLES if key in loaded] if isinstance(loaded, Mapping) else []
    weights = tables[0] if tables else loaded
    tensors_by_name = isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    )
    if not tensors_by_name:
        raise CheckpointError(
            "the file holds no table of weights",
            key=KEY,
            found=path,
            allowed=f"tensors by name, or those under {' or '.join(map(repr, _TABLES))}",
        )
    return dict(weights)


def _unreadable(path: str | Path, error: OSError | StorageError) -> CheckpointError:
    reason = "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    return CheckpointError(
        "the weights cannot be read",
        key=KEY,
        found=f"{path} ({reason})",
        allowed=ALLOWED,
        fix="check the path, and that this user may read it",
    )


def _fit(
    name: str, tensor: Tensor, expected: Tensor, grid_HW: tuple[int, int], grid_of_file: tuple[int, int] | None
) -> Tensor:
    """The positions, resampled where they are those of another grid."""
    num_prefix = expected.shape[1] - grid_HW[0] * grid_HW[1]
    if tensor.ndim != 3 or tensor.shape[1] <= num_prefix or tensor.shape[2] != expected.shape[2]:
        return tensor  # the check of shapes reports it
    source_HW = _grid_of(tensor[:, num_prefix:], grid_HW, grid_of_file)
    if source_HW is None or source_HW == grid_HW:
        return tensor
    log.info("%s resampled from %d × %d to %d × %d cells", name, *source_HW, *grid_HW)
    return resampled_positions(tensor, source_HW, grid_HW, num_prefix)


def _grid_of(
    cells_1LD: Tensor, grid_HW: tuple[int, int], grid_of_file: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Cells down and across of positions: as the file's config says, or as fixed ones show, else a square."""
    num_cells, width = cells_1LD.shape[1:]
    if grid_of_file is not None and grid_of_file[0] * grid_of_file[1] == num_cells:
        return grid_of_file
    for rows in (rows for rows in range(1, num_cells + 1) if num_cells % rows == 0):
        grid = (rows, num_cells // rows)
        if torch.allclose(cells_1LD.float(), position_table(width, grid, 0), atol=_SAME_POSITIONS):
            return grid
    side = math.isqrt(num_cells)
    if side * side == num_cells:
        return side, side
    if num_cells == grid_HW[0] * grid_HW[1]:
        log.warning("the file does not say which grid its positions are of: taken to be %d × %d cells", *grid_HW)
        return grid_HW
    return None


def _grid_in_config(weights: Path) -> tuple[int, int] | None:
    """The grid of the run whose checkpoint the weights are in."""
    try:
        return load(weights.with_name(CONFIG_FILE)).grid
    except ConfigError:  # there is none, or it is of another version of maskray
        return None


def _check_names(path: Path, kind: names.Kind, expected: list[str], found: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = sorted(found.keys() - set(expected) - names.HEADS[kind])
    if not missing and not unexpected:
        return
    parts = [
        f"{title} {', '.join(some[:_SHOWN])}{f' and {len(some) - _SHOWN} more' if len(some) > _SHOWN else ''}"
        for title, some in (("missing", missing), ("unexpected", unexpected))
        if some
    ]
    raise CheckpointError(
        "the names of the weights are not the model's",
        key=KEY,
        found=f"{path}: {'; '.join(parts)}",
        allowed=f"{names.WHOSE[kind]} for this model's depth, with the whole decoder or with none of it",
        fix="set model.* to the sizes of the weights, or remove what is not a part of the model",
    )


def _check_shapes(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} {tuple(found[name].shape)} where the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            "the weights are those of a model of another size",
            key=KEY,
            found=f"{path}: {'; '.join(wrong[:_SHOWN])}{more}",
            fix="set model.*, data.channels and model.patch to those of the weights",
        )


def _check_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    wrong = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        raise CheckpointError(
            "the weights hold values that are no finite numbers",
            key=KEY,
            found=f"{path}: {', '.join(wrong[:_SHOWN])}{f' and {len(wrong) - _SHOWN} more' if wrong[_SHOWN:] else ''}",
            fix="use an earlier checkpoint of the run that wrote them",
        )
