"""Weights that somebody else made, under the MAE authors' parameter names: what `init_from` starts a run with."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from maskray.errors import CheckpointError
from maskray.models.vit import MaskedAutoencoderViT

KEY = "init_from"
WEIGHTS_FILE = "model.safetensors"
ALLOWED = "a .safetensors, .pth or .pt file, or the folder of a checkpoint"
_DECODER = ("decoder_", "mask_token")
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


def load_weights(model: MaskedAutoencoderViT, path: str | Path) -> tuple[str, ...]:
    """Load a file's weights into `model`, in place.

    Args:
        model: built for the images of this run; positions of another grid are resampled in 2-D to its own.
        path: a `.safetensors` file, a `.pth` or `.pt` file (weights alone or under `model`, as the authors publish
            them), or the folder of a checkpoint.

    Returns:
        Names of the parameters that keep their fresh values: the decoder's, where the file holds an encoder alone.

    Raises:
        CheckpointError: the file cannot be read, or its names or shapes are not the model's.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
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
    path = Path(path) / WEIGHTS_FILE if Path(path).is_dir() else Path(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".pth", ".pt"):
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


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        "the weights cannot be read",
        key=KEY,
        found=f"{path} ({error.strerror or error})",
        allowed=ALLOWED,
        fix="check the path, and that this user may read it",
    )


def _fit(name: str, tensor: Tensor, model: MaskedAutoencoderViT) -> Tensor:
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
