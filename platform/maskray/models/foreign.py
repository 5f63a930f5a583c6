"""Weights that somebody else made, under the MAE authors' parameter names: what `init_from` starts a run with."""

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
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from maskray.data.shards import sha256_of
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, StorageError
from maskray.models.base import MaskedAutoencoder

KEY = "init_from"
WEIGHTS_FILE = "model.safetensors"
SUFFIXES = (".safetensors", ".pth", ".pt")
ALLOWED = "a .safetensors, .pth or .pt file, or the folder of a checkpoint"
_DECODER = ("decoder", "mask_token")
_POSITIONS = ("pos_embed", "decoder_pos_embed")
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
    """Load a file's weights into `model`, in place.

    Args:
        model: built for the images of this run; positions of another grid are resampled in 2-D to its own.
        path: path or URI of a `.safetensors` file, of a `.pth` or `.pt` file (weights alone or under `model`, as the
            authors publish them), or of the folder of a checkpoint.

    Returns:
        Names of the parameters that keep their fresh values: the decoder's, where the file holds an encoder alone.

    Raises:
        CheckpointError: the file cannot be read, or its names or shapes are not the model's.
    """
    with _on_disk(path) as file:
        return _load(model, file)


def _load(model: MaskedAutoencoder, path: Path) -> tuple[str, ...]:
    found, wanted = _read(path), model.state_dict()
    missing = tuple(name for name in wanted if name not in found)
    decoder = tuple(name for name in wanted if name.startswith(_DECODER))
    fresh = missing if missing == decoder else ()
    _check_names(path, missing if not fresh else (), [name for name in found if name not in wanted])
    weights = {name: _fit(name, found[name], model) for name in wanted if name not in fresh}
    _check_shapes(path, weights, wanted)
    model.load_state_dict(weights, strict=not fresh)
    if fresh:
        log.info("%s holds an encoder alone: the decoder (%d tensors) starts fresh", path, len(fresh))
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
    weights = loaded.get("model", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(weights, Mapping) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError(
            "the file holds no table of weights", key=KEY, found=path, allowed="tensors by name, or those under 'model'"
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


def _fit(name: str, tensor: Tensor, model: MaskedAutoencoder) -> Tensor:
    """The tensor, positions resampled where their grid has another number of cells."""
    num_cells = model.grid_HW[0] * model.grid_HW[1]
    if name not in _POSITIONS or tensor.ndim != 3 or tensor.shape[1] == 1 + num_cells:
        return tensor
    side = math.isqrt(tensor.shape[1] - 1)
    if side * side != tensor.shape[1] - 1:  # which grid it was cannot be told: the check of shapes reports it
        return tensor
    log.info("%s resampled from %d × %d to %d × %d cells", name, side, side, *model.grid_HW)
    resampled: Tensor = resample_abs_pos_embed(tensor.float(), list(model.grid_HW), [side, side], num_prefix_tokens=1)
    return resampled


def _check_names(path: Path, missing: tuple[str, ...], unexpected: list[str]) -> None:
    if not missing and not unexpected:
        return
    parts = [
        f"{title} {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    raise CheckpointError(
        "the names of the weights are not the model's",
        key=KEY,
        found=f"{path}: {'; '.join(parts)}",
        allowed="the MAE authors' names for this model's depth, with the whole decoder or with none of it",
        fix="set model.* to the sizes of the weights, or remove what is not a part of the model",
    )


def _check_shapes(path: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} {tuple(tensor.shape)} where the model has {tuple(wanted[name].shape)}"
        for name, tensor in weights.items()
        if tensor.shape != wanted[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            "the weights are those of a model of another size",
            key=KEY,
            found=f"{path}: {'; '.join(wrong[:_SHOWN])}{more}",
            fix="set model.*, data.channels and model.patch to those of the weights",
        )
