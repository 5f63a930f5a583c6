"""An export is one once it has been opened, and has given our features of real pictures.

By whoever it is for, where that is installed; the MAE authors' file by ourselves, under their names. What is proved is
the encoder, on pictures that have its size and were normalised by us (by the graph itself, in ONNX and torch's export):
resizing and decoders are not.

Shape letters: B images, C channels, H and W pixels down and across, D width of a feature.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, assert_never

import timm
import torch
from torch import Tensor

from maskray.errors import CheckpointError
from maskray.evaluation.samples import pieces
from maskray.models.base import MaskedAutoencoder
from maskray.models.encoder import Encoder
from maskray.models.foreign import load_weights
from maskray.models.parameter_names import Format
from maskray.publish.graphs import GRAPH_FILES, INPUT, GraphFormat

PROOF = "proof.json"
BATCHES = (1, 3, 64)
LIMIT = 1e-4
"""Largest difference of a feature's value that is still called the same."""
Features = Callable[[Tensor], Tensor]
"""Of uint8 images (B, C, H, W): (B, D)."""


@dataclass(frozen=True)
class Proof:
    """What was compared."""

    opened_by: str
    largest_difference: float
    """Of any value of any feature."""
    batches: tuple[int, ...] = BATCHES
    limit: float = LIMIT

    def dump(self) -> str:
        """As JSON."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1) + "\n"

    def __str__(self) -> str:
        many = ", ".join(map(str, self.batches))
        return f"opened by {self.opened_by}: features differ by {self.largest_difference:.1e} at most ({many} images)"


def prove(encoder: Encoder, place: Path, kind: Format | GraphFormat, blank: MaskedAutoencoder) -> Proof:
    """Open an export and compare features.

    Args:
        encoder: what was exported, on the CPU.
        place: the file or folder that was written.
        kind: of export.
        blank: a model of the same config with other weights, to read them into where nobody else is there to.

    Raises:
        CheckpointError: what was opened gives other features.
    """
    opened_by, features = _opened(encoder, place, kind, blank)
    differences = []
    with torch.no_grad():
        for number in BATCHES:
            images = torch.from_numpy(pieces(number, encoder.channels, encoder.image_size, seed=number))
            differences.append((features(images) - encoder(images)).abs().flatten())
    largest = float(torch.cat(differences).amax())  # NaN where any is, which no comparison holds for
    if not largest <= LIMIT:
        raise CheckpointError(
            f"what {opened_by} reads of the export gives other features",
            found=f"a difference of {largest:.3g}",
            allowed=f"at most {LIMIT:g}",
            fix="this is an error of maskray's, or of the versions that are installed: please report it",
        )
    return Proof(opened_by, largest)


def _opened(
    encoder: Encoder, place: Path, kind: Format | GraphFormat, blank: MaskedAutoencoder
) -> tuple[str, Features]:
    """Who opens it, and the features that come out."""
    match kind:
        case "onnx":
            return _of_onnx(place)
        case "pt2":
            graph: Any = torch.export.load(place / GRAPH_FILES[kind]).module()
            return f"torch {torch.__version__}", graph
        case "timm":
            return f"timm {timm.__version__}", _of_timm(encoder, place)
        case "hf" if find_spec("transformers") is not None:
            return f"transformers {version('transformers')}", _of_transformers(encoder, place)
        case "hf" | "mae":  # who it is for is not installed here
            load_weights(blank, place)
            own = Encoder(blank, encoder.normalize, encoder.image_size, encoder.config).eval()
            return "maskray itself, by their names", own
    assert_never(kind)


def _of_onnx(place: Path) -> tuple[str, Features]:
    import onnxruntime

    session = onnxruntime.InferenceSession(place / GRAPH_FILES["onnx"], providers=["CPUExecutionProvider"])

    def features(images_BCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: images_BCHW.numpy()})[0])

    return f"onnxruntime {onnxruntime.__version__}", features


def _of_timm(encoder: Encoder, place: Path) -> Features:
    theirs = timm.create_model(f"local-dir:{place}", pretrained=True, num_classes=0).eval()
    is_map = encoder.config.kind == "sparse_conv"  # whose head has a norm of its own behind the mean

    def features(images_BCHW: Tensor) -> Tensor:
        normalized = encoder.normalize(images_BCHW)
        found: Tensor = theirs.forward_features(normalized).mean((2, 3)) if is_map else theirs(normalized)
        return found

    return features


def _of_transformers(encoder: Encoder, place: Path) -> Features:
    from transformers import ViTMAEModel

    theirs = ViTMAEModel.from_pretrained(place).eval()
    theirs.config.mask_ratio = 0.0  # of a checkpoint with a decoder; the order of its cells is drawn all the same

    def features(images_BCHW: Tensor) -> Tensor:
        found: Tensor = theirs(encoder.normalize(images_BCHW)).last_hidden_state[:, 1:].mean(dim=1)
        return found

    return features
