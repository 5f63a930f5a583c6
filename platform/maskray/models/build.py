"""Configs to models. What is drawn here follows from the config's seed alone."""

from __future__ import annotations

import torch

from maskray.config.models import ConvConfig, Model, SparseConvConfig, TimmVitConfig, VitConfig
from maskray.config.schema import RunConfig
from maskray.data.manifest import Manifest
from maskray.models.base import MaskedAutoencoder
from maskray.models.conv import ConvAutoencoder
from maskray.models.foreign import load_weights
from maskray.models.normalize import Normalize
from maskray.models.sparse_conv import SparseConvAutoencoder
from maskray.models.vit import MaskedAutoencoderViT


def build_model(
    config: Model,
    image_size: tuple[int, int],
    channels: int,
    cell_HW: tuple[int, int] | None = None,
    group_images: int = 1,
) -> MaskedAutoencoder:
    """The model of a config, freshly initialised from torch's generator.

    Args:
        config: sizes of encoder and decoder.
        image_size: height and width of the images in pixels.
        channels: of the images.
        cell_HW: pixels down and across of what is hidden or shown as one; None: the model's own.
        group_images: of a row group, over which batch normalisation takes its statistics in training.

    Raises:
        ConfigError: timm has no such encoder, or it is of a kind that is not known to keep hidden cells out.
    """
    match config:
        case VitConfig() | TimmVitConfig():
            return MaskedAutoencoderViT(config, image_size, channels)
        case ConvConfig():
            return ConvAutoencoder(config, image_size, channels, cell_HW or config.cell)
        case SparseConvConfig():
            return SparseConvAutoencoder(config, image_size, channels, group_images)


def weightless_model(config: RunConfig) -> MaskedAutoencoder:
    """The model of a run on the `meta` device: no memory, no values; to count with, or to see that there is one.

    Raises:
        ConfigError: there is no such encoder.
    """
    with torch.device("meta"):
        return build_model(config.model, config.data.image_size, config.data.channels, config.cell)


def initial_model(config: RunConfig, group_images: int = 1) -> MaskedAutoencoder:
    """The model that a run starts from: drawn by its seed, or read from `init_from`. Torch's generator is left alone.

    Raises:
        CheckpointError: `init_from` cannot be read or does not fit.
        ConfigError: there is no such encoder.
    """
    with torch.random.fork_rng(devices=[]):  # parameters are drawn on the CPU
        torch.manual_seed(config.seed)
        model = build_model(config.model, config.data.image_size, config.data.channels, config.cell, group_images)
    if config.init_from is not None:
        load_weights(model, config.init_from)
    return model


def build_normalize(config: RunConfig, manifest: Manifest) -> Normalize:
    """The normalisation of a run on a dataset."""
    mean, std = manifest.statistics(config.data.channels)
    return Normalize.from_kind(config.data.normalize, config.data.channels, mean, std)
