"""A model as other people's programs open it, written whole or not at all.

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
from maskray.data.storage import TEMPORARY, Storage
from maskray.errors import CheckpointError, ConfigError, StorageError
from maskray.models.foreign import WEIGHTS_FILE, save_weights
from maskray.models.parameter_names import DECODER, Format
from maskray.models.vit import LAYER_NORM_EPS
from maskray.publish.export import CARD, load_encoder
from maskray.publish.subject import read_checkpoint
from maskray.training import checkpoint

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_BICUBIC = 3
"""Pillow's number for it, which transformers' processors are told."""
_CONVNEXT_MAP = "encoder.stages.3.blocks.0.conv_dw.weight"


@dataclass(frozen=True)
class Source:
    """What is exported."""

    model: AnyModel
    weights: Mapping[str, Tensor]
    """Under our names; with or without a decoder."""
    image_size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]
    run: RunConfig | None
    """None for an encoder alone."""


def export(source: str | Path, destination: str | Path, kind: Format) -> str:
    """Write a model under others' names.

    Args:
        source: path or URI of the folder of a checkpoint, or of an encoder that `save_encoder` wrote.
        destination: local path that does not exist: of a `.pth` file for `mae`, of a folder for the others.
        kind: whose names.

    Returns:
        How to open it, and what it takes.

    Raises:
        CheckpointError: the source is neither, or damaged.
        ConfigError: others have no such model, or the destination is no place for it.
        DataError: the run was normalised by the statistics of a dataset that is not there.
        StorageError: the source cannot be read, or the destination cannot be written.
    """
    place = _checked(destination, kind)
    with checkpoint.on_disk(Storage(source)) as folder:
        found = _read(folder, shown=source)
    _check_fits(found, kind)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=TEMPORARY) as temporary:
            _write(found, Path(temporary) / place.name, kind)
            (Path(temporary) / place.name).rename(place)
    except OSError as error:
        raise StorageError(
            "the export cannot be written", found=f"{place} ({error.strerror or error})", fix="give another OUT"
        ) from error
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (found.mean, found.std))
    return f"{_how_to_open(found, place, kind)}\nIt takes images / 255, minus mean {mean}, by std {std}."


def _checked(destination: str | Path, kind: Format) -> Path:
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


def _read(folder: Path, shown: str | Path) -> Source:
    if (folder / CARD).exists():
        encoder = load_encoder(folder)
        model, normalize, run, config = encoder.model, encoder.normalize, None, encoder.config
        image_size = encoder.image_size
    elif (folder / checkpoint.STATE).exists():
        run, model, normalize, _ = read_checkpoint(folder)
        config, image_size = run.model, run.data.image_size
    else:
        raise CheckpointError(
            "there is neither a checkpoint nor an encoder",
            found=shown,
            allowed=f"a folder with {checkpoint.STATE}, as runs keep them, or with {CARD}, as the registry does",
            fix="check the path",
        )
    mean, std = (values.flatten().tolist() for values in (normalize.mean_C11, normalize.std_C11))
    return Source(config, model.state_dict(), image_size, model.channels, mean, std, run)


def _check_fits(source: Source, kind: Format) -> None:
    """Others have no model but the authors' own; timm has its encoders too, transformers with any tokens."""
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


def _write(source: Source, place: Path, kind: Format) -> None:
    if kind == "mae":
        save_weights(source.weights, place, kind)
        return
    place.mkdir()
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


def _how_to_open(source: Source, place: Path, kind: Format) -> str:
    match kind:
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
