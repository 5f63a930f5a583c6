"""Configs to models. What is drawn here follows from the config's seed alone."""

from __future__ import annotations

import torch

from maskray.config.schema import Model, RunConfig
from maskray.data.manifest import Manifest
from maskray.models.foreign import load_weights
from maskray.models.normalize import Normalize
from maskray.models.vit import MaskedAutoencoderViT


def build_model(config: Model, image_size: tuple[int, int], channels: int) -> MaskedAutoencoderViT:
    """The model of a config, freshly initialised from torch's generator.

    Args:
        config: sizes of encoder and decoder.
        image_size: height and width of the images in pixels.
        channels: of the images.
    """
    return MaskedAutoencoderViT(config, image_size, channels)


def initial_model(config: RunConfig) -> MaskedAutoencoderViT:
    """The model that a run starts from: drawn by its seed, or read from `init_from`. Torch's generator is left alone.

    Raises:
        CheckpointError: `init_from` cannot be read or does not fit.
    """
    with torch.random.fork_rng(devices=[]):  # parameters are drawn on the CPU
        torch.manual_seed(config.seed)
        model = build_model(config.model, config.data.image_size, config.data.channels)
    if config.init_from is not None:
        load_weights(model, config.init_from)
    return model


def build_normalize(config: RunConfig, manifest: Manifest) -> Normalize:
    """The normalisation of a run on a dataset."""
    mean, std = manifest.statistics(config.data.channels)
    return Normalize.from_kind(config.data.normalize, config.data.channels, mean, std)
