"""A model as other people's programs open it, written whole or not at all.

onnx    a folder with a graph for onnxruntime; pt2: one for torch.export.load
mae     one .pth file, the parameters under `model`, as the MAE authors publish theirs
hf      a folder for transformers' `ViTMAEForPreTraining` (`ViTMAEModel` for an encoder alone) and its processor
timm    a folder for `timm.create_model`: the encoder, of any kind but `conv`, whose pooled feature is the mean over the
        cells (a ConvNeXt's without the norm of timm's head, which is fresh)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskray.config.models import AnyModel, SparseConvConfig, TimmVitConfig, TransformerSize, VitConfig
from maskray.config.schema import RunConfig
from maskray.data.storage import TEMPORARY
from maskray.errors import ConfigError, StorageError
from maskray.models.encoder import Encoder
from maskray.models.foreign import WEIGHTS_FILE, save_weights
from maskray.models.parameter_names import DECODER, FORMATS, Format
from maskray.models.vit import LAYER_NORM_EPS
from maskray.publish.graphs import GRAPH_FILES, INPUT, GraphFormat, check_installed, write_graph
from maskray.publish.proof import PROOF, Proof, prove
from maskray.publish.subject import Subject

ExportFormat = Format | GraphFormat
EXPORT_FORMATS: tuple[ExportFormat, ...] = (*FORMATS, *GRAPH_FILES)

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_BICUBIC = 3
"""Pillow's number for it, which transformers' processors are told."""
_CONVNEXT_MAP = "encoder.stages.3.blocks.0.conv_dw.weight"


@dataclass(frozen=True)
class Source:
    """What is exported."""

    encoder: Encoder
    model: AnyModel
    weights: Mapping[str, Tensor]
    """Under our names; with or without a decoder."""
    image_size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]
    run: RunConfig | None
    """None for an encoder alone."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    place: Path
    how_to_open: str
    """In Python."""
    takes: str
    """What it is given."""
    proof: Proof


def export(source: Subject, destination: str | Path, kind: ExportFormat) -> Export:
    """Write a model as others open it, and open it: what does not give our features is no export, and not left there.

    Args:
        source: what `subject.open_subject` found.
        destination: local path that does not exist: of a `.pth` file for `mae`, of a folder for the others.
        kind: of export.

    Raises:
        CheckpointError: what was written gives other features.
        ConfigError: others have no such model, the destination is no place for it, or an extra is not installed.
        StorageError: the destination cannot be written.
    """
    place = _checked(destination, kind)
    if kind in ("onnx", "pt2"):
        check_installed(kind)
    found = _source_of(source)
    _check_fits(found, kind)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=TEMPORARY) as temporary:
            written = Path(temporary) / place.name
            _write(found, written, kind)
            proof = prove(source.encoder, written, kind, source.blank())
            (written.with_name(f"{place.name}.{PROOF}") if kind == "mae" else written / PROOF).write_text(proof.dump())
            for each in sorted(Path(temporary).iterdir(), key=lambda path: path.name == place.name):
                each.rename(place.with_name(each.name))
    except OSError as error:
        raise StorageError(
            "the export cannot be written", found=f"{place} ({error.strerror or error})", fix="give another OUT"
        ) from error
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (found.mean, found.std))
    takes = f"images / 255, minus mean {mean}, by std {std}"
    if kind in ("onnx", "pt2"):
        takes = f"uint8 images (any number, {found.channels}, {found.image_size[0]}, {found.image_size[1]})"
    return Export(place, _how_to_open(found, place, kind), takes, proof)


def _checked(destination: str | Path, kind: ExportFormat) -> Path:
    allowed = "a new path of this machine, one that ends in .pth for mae and for no other"
    wrong: dict[str, Any] = {"found": destination, "allowed": allowed, "fix": "give another OUT"}
    if "://" in str(destination):
        raise ConfigError("exports are written on this machine", **wrong)
    place = Path(destination).expanduser().absolute()
    if (place.suffix == ".pth") != (kind == "mae"):
        what = "a file that torch.load reads" if kind == "mae" else "a folder"
        raise ConfigError(f"an export as {kind} is {what}", **wrong)
    if place.exists():
        raise ConfigError("an export replaces nothing", **wrong)
    return place


def _source_of(subject: Subject) -> Source:
    encoder = subject.encoder
    mean, std = (v.flatten().tolist() for v in (encoder.normalize.mean_C11, encoder.normalize.std_C11))
    run = None if subject.checkpoint is None else subject.checkpoint.run
    weights = encoder.model.state_dict()
    return Source(encoder, encoder.config, weights, encoder.image_size, encoder.channels, mean, std, run)


def _check_fits(source: Source, kind: ExportFormat) -> None:
    """Others have no model but the authors' own; timm has its encoders too, transformers with any tokens."""
    if kind in ("onnx", "pt2"):
        return
    model, (height, width) = source.model, source.image_size
    rules: list[tuple[str, Any, list[Any]]] = [
        ("model.kind", model.kind, ["vit", "timm_vit", "sparse_conv"] if kind == "timm" else ["vit"])
    ]
    if isinstance(model, VitConfig) and kind != "timm":
        rules += [("model.class_token", model.class_token, [True]), ("model.registers", model.registers, [0])]
        if source.run is not None:
            rules += [("model.decoder.attention", model.decoder.attention, ["self"])]
    if isinstance(model, VitConfig) and kind == "hf":
        rules += [("data.image_size", [height, width], [[height, height], [width, width]])]
        rules += [("model.patch", list(model.patch), [[side, side] for side in model.patch])]
    for key, value, allowed in rules:
        if value not in allowed:
            raise ConfigError(
                f"{kind} has no names for such a model",
                key=key,
                found=value,
                allowed=" or ".join(dict.fromkeys(map(str, allowed))),
                fix=("" if kind == "timm" else "export it as timm, which takes more, or ") + "use the folder as it is",
            )


def _write(source: Source, place: Path, kind: ExportFormat) -> None:
    if kind == "mae":
        save_weights(source.weights, place, kind)
        return
    place.mkdir()
    if kind == "onnx" or kind == "pt2":
        write_graph(source.encoder, place / GRAPH_FILES[kind], kind)
        return
    encoder = {name: tensor for name, tensor in source.weights.items() if not name.startswith(DECODER)}
    if kind == "timm":
        encoder |= _head_norm(source)
    save_weights(encoder if kind == "timm" else source.weights, place / WEIGHTS_FILE, kind)
    if kind == "timm":
        files = {CONFIG: _timm_config(source)}
    else:
        files = {CONFIG: _hf_config(source), PROCESSOR: _hf_processor(source)}
    for name, content in files.items():
        (place / name).write_text(json.dumps(content, indent=1) + "\n")


def _how_to_open(source: Source, place: Path, kind: ExportFormat) -> str:
    match kind:
        case "onnx":
            return f'onnxruntime.InferenceSession("{place / GRAPH_FILES[kind]}").run(None, {{"{INPUT}": images}})'
        case "pt2":
            return f'torch.export.load("{place / GRAPH_FILES[kind]}").module()(images)'
        case "mae":
            return f'torch.load("{place}", weights_only=True)["model"]'
        case "hf":
            return f'transformers.{_hf_class(source)}.from_pretrained("{place}")'
        case "timm":
            return f'timm.create_model("local-dir:{place}", pretrained=True)'


# ---------------------------------------------------------------------------------------------------------------- timm


def _timm_config(source: Source) -> dict[str, Any]:
    model = source.model
    if isinstance(model, SparseConvConfig):
        return _timm_conv_config(source, model)
    assert isinstance(model, VitConfig | TimmVitConfig)
    arguments = {
        "img_size": source.image_size,
        "patch_size": model.patch,
        "in_chans": source.channels,
        "global_pool": "avg",
        "fc_norm": False,  # the norm stands before the mean, as in pretraining
        "pool_include_prefix": False,
    }
    if isinstance(model, VitConfig):
        arguments |= {
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
            "class_token": model.class_token,
            "reg_tokens": model.registers,
        }
    return {
        # Any of its vision transformers' names does, where all sizes are given.
        "architecture": "vit_base_patch16_224" if isinstance(model, VitConfig) else model.name,
        "model_args": arguments,
        "pretrained_cfg": {
            **_timm_preprocessing(source),
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _timm_preprocessing(source: Source) -> dict[str, Any]:
    return {
        "input_size": [source.channels, *source.image_size],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": source.mean,
        "std": source.std,
        "num_classes": 0,
    }


def _timm_conv_config(source: Source, model: SparseConvConfig) -> dict[str, Any]:
    layers = {"first_conv": "stem.0", "classifier": "head.fc"} if _is_convnext(source) else {"classifier": "fc"}
    return {
        "architecture": model.name.partition(".")[0],  # a tag would ask for its weights
        "model_args": {"in_chans": source.channels},
        "pretrained_cfg": _timm_preprocessing(source) | layers,
    }


def _is_convnext(source: Source) -> bool:
    return _CONVNEXT_MAP in source.weights


def _head_norm(source: Source) -> dict[str, Tensor]:
    """What timm's ConvNeXt has behind the mean over places: as fresh as the classifier that it belongs to."""
    if not _is_convnext(source):
        return {}
    width = source.weights[_CONVNEXT_MAP].shape[0]
    return {"encoder.head.norm.weight": torch.ones(width), "encoder.head.norm.bias": torch.zeros(width)}


# -------------------------------------------------------------------------------------------------------- Hugging Face


def _hf_class(source: Source) -> str:
    return "ViTMAEModel" if source.run is None else "ViTMAEForPreTraining"


def _hf_config(source: Source) -> dict[str, Any]:
    model = source.model
    assert isinstance(model, VitConfig)
    config = {
        "architectures": [_hf_class(source)],
        "model_type": "vit_mae",
        "dtype": "float32",
        **_hf_sizes(model),
        **{f"decoder_{key}": value for key, value in _hf_sizes(model.decoder).items()},
        "image_size": source.image_size[0],
        "patch_size": model.patch[0],
        "num_channels": source.channels,
        "layer_norm_eps": LAYER_NORM_EPS,
        "hidden_act": "gelu",
        "qkv_bias": True,
        # Its encoder hides cells whenever it is called: where no decoder follows, it should not.
        "mask_ratio": 0.0 if source.run is None else source.run.mask.ratio[0],
    }
    return config if source.run is None else config | {"norm_pix_loss": source.run.objective.norm_pix}


def _hf_sizes(size: TransformerSize) -> dict[str, int]:
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": int(size.width * size.mlp_ratio),
    }


def _hf_processor(source: Source) -> dict[str, Any]:
    height, width = source.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": source.mean,
        "image_std": source.std,
    }
