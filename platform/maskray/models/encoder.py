"""A pretrained encoder as a folder that anybody can read: weights, and what must be known to use them.

    model.safetensors    the encoder's parameters, under our names; the decoder is thrown away
    encoder.json         schema version, sizes of the model, image size, channels, mean and std; written last

Nothing is pickled. The registry keeps this folder, and `load_encoder` makes a module of it.

Shape letters: B images, C channels, H and W pixels down and across, D width of a feature.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from maskray.config.load import parse
from maskray.config.models import AnyModel, AnyVit, EncoderCard, VitDecoder
from maskray.config.schema import RunConfig
from maskray.errors import CheckpointError, ConfigError, DataError
from maskray.models.base import MaskedAutoencoder
from maskray.models.build import build_model
from maskray.models.normalize import Normalize
from maskray.models.parameter_names import DECODER
from maskray.models.vit import MaskedAutoencoderViT, resampled_positions

SCHEMA_VERSION = 1
WEIGHTS, CARD = "model.safetensors", "encoder.json"
_NAMES = {
    "vit": "facebookresearch/mae",
    "timm_vit": "facebookresearch/mae",
    "sparse_conv": "timm, below `encoder.`",
    "conv": "maskray",
}
_SMALLEST_DECODER = VitDecoder(width=4, depth=1, heads=1)


class Encoder(nn.Module):
    """Images as bytes, of any size, to one feature vector each.

    Args:
        model: only its encoder is used.
        normalize: what the model was trained behind.
        image_size: height and width in pixels that the model takes; other images are resized to it.
        config: of the model.
    """

    def __init__(
        self, model: MaskedAutoencoder, normalize: Normalize, image_size: tuple[int, int], config: AnyModel
    ) -> None:
        super().__init__()
        self.model, self.normalize, self.image_size, self.config = model, normalize, image_size, config

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.model.channels

    @property
    def width(self) -> int:
        """Of a feature."""
        return self.model.width

    def forward(self, bytes_BCHW: Tensor) -> Tensor:
        """Features (B, D) in fp32, the mean over the image's cells, of uint8 (B, C, H, W).

        Raises:
            DataError: the images are not bytes, or have another number of channels.
        """
        if bytes_BCHW.dtype != torch.uint8 or bytes_BCHW.dim() != 4 or bytes_BCHW.shape[1] != self.channels:
            raise DataError(
                "the encoder takes images as bytes",
                found=f"{bytes_BCHW.dtype} of shape {tuple(bytes_BCHW.shape)}",
                allowed=f"uint8 of shape (images, {self.channels}, height, width)",
            )
        return self.model.pooled(self.normalize(resize(bytes_BCHW, self.image_size))).float()


def resize(bytes_BCHW: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """uint8 images at a size, as training saw them: bicubic, antialiased; no copy if they have it already."""
    if tuple(bytes_BCHW.shape[2:]) == tuple(size_HW):
        return bytes_BCHW
    # Torch resizes bytes on the CPU only.
    at_size = F.interpolate(bytes_BCHW.cpu(), size=size_HW, mode="bicubic", antialias=True, align_corners=False)
    return at_size.to(bytes_BCHW.device)


def save_encoder(
    folder: Path,
    model: MaskedAutoencoder,
    normalize: Normalize,
    config: RunConfig,
) -> None:
    """Write the encoder of a model into a folder.

    Args:
        folder: made where it is missing.
        model: trained, on any device.
        normalize: what it was trained behind.
        config: of its run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)  # while the weights are half-written there is no encoder here
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(DECODER)
    }
    save_file(weights, folder / WEIGHTS)
    card = {
        "schema_version": SCHEMA_VERSION,
        "model": config.model.model_dump(mode="json"),
        "image_size": list(config.data.image_size),
        "channels": config.data.channels,
        "mean": normalize.mean_C11.flatten().tolist(),
        "std": normalize.std_C11.flatten().tolist(),
        "parameter_names": _NAMES[config.model.kind],
        "feature": "mean over the cells of the encoder's last layer, tokens of no cell left out",
    }
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")


def load_encoder(folder: str | Path) -> Encoder:
    """The encoder of a folder that `save_encoder` wrote, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: no such folder, another schema version, or weights that are damaged or of another model.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text())
        if not isinstance(card, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"a folder without a readable {CARD} is no encoder", found=folder) from error
    if card.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            "the encoder has another schema version",
            key="schema_version",
            found=f"{card.get('schema_version')} in {folder}",
            allowed=str(SCHEMA_VERSION),
            fix="use the maskray that wrote it, or export it again",
        )
    try:
        told = parse(EncoderCard, {name: card[name] for name in EncoderCard.model_fields}, origin=str(folder / CARD))
        with torch.random.fork_rng(devices=[]):  # the initialisation is thrown away, and must not be noticed
            model = encoder_only(told.model, told.image_size, told.channels)
        weights = load_file(folder / WEIGHTS)
        model.load_state_dict(weights)
        if not all(bool(each.isfinite().all()) for each in weights.values() if each.is_floating_point()):
            raise ValueError("its weights are no finite numbers")
        encoder = Encoder(model, Normalize(told.mean, told.std), told.image_size, told.model)
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError("the encoder is damaged", found=f"{folder} ({error})", fix="export it again") from error
    return encoder.eval().requires_grad_(requires_grad=False)


def at_size(encoder: Encoder, image_size: tuple[int, int]) -> Encoder:
    """A copy of an encoder for images of another size, to be trained on: positions are resampled in 2-D.

    Args:
        encoder: stays as it is.
        image_size: height and width in pixels; the model's cell divides them.
    """
    old = encoder.model
    with torch.random.fork_rng(devices=[]):  # the initialisation is thrown away, and must not be noticed
        model = encoder_only(encoder.config, image_size, encoder.channels)
    weights = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith(DECODER)}
    if isinstance(old, MaskedAutoencoderViT) and model.grid_HW != old.grid_HW:
        weights["pos_embed"] = resampled_positions(old.pos_embed, old.grid_HW, model.grid_HW, old.placed_prefix)
    model.load_state_dict(weights)
    return Encoder(model, copy.deepcopy(encoder.normalize), image_size, encoder.config)


def encoder_only(config: AnyModel, image_size: tuple[int, int], channels: int) -> MaskedAutoencoder:
    """A model as it begins, without its decoder."""
    if isinstance(config, AnyVit):
        config = config.model_copy(update={"decoder": _SMALLEST_DECODER})
    return without_decoder(build_model(config, image_size, channels))


def without_decoder(model: MaskedAutoencoder) -> MaskedAutoencoder:
    """The model, from which the decoder is taken."""
    for name in {name.split(".")[0] for name in model.state_dict() if name.startswith(DECODER)}:
        delattr(model, name)
    return model


def digest(encoder: Encoder) -> str:
    """SHA-256 of what its features hang on: parameters but those of a decoder, normalisation and image size."""
    found = hashlib.sha256(repr(encoder.image_size).encode())
    parts = encoder.model.state_dict() | {"mean": encoder.normalize.mean_C11, "std": encoder.normalize.std_C11}
    for name in sorted(name for name in parts if not name.startswith(DECODER)):
        found.update(name.encode())
        found.update(parts[name].detach().cpu().numpy().tobytes())
    return found.hexdigest()
