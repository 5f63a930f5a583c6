"""What is judged: an encoder, with its decoder where it is a checkpoint's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch

from maskray.config.load import load
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.models.base import MaskedAutoencoder
from maskray.models.build import build_normalize, initial_model
from maskray.models.encoder import CARD, Encoder, encoder_only
from maskray.models.foreign import load_weights
from maskray.models.normalize import Normalize
from maskray.publish.named import NoEncoderError, open_encoder
from maskray.training import checkpoint


class WithDecoder(NamedTuple):
    """A checkpoint's whole model."""

    run: RunConfig
    model: MaskedAutoencoder
    normalize: Normalize
    facts: checkpoint.Facts


class Subject(NamedTuple):
    """What is judged."""

    name: str
    """A place, or `models:/name/version`: never an alias, which may move."""
    encoder: Encoder
    checkpoint: WithDecoder | None
    """None for an encoder alone."""
    run_id: str | None
    """MLflow's, of the run that a registered encoder comes from; a checkpoint's run is known by its fingerprint."""
    step: int
    """Of its run."""

    def blank(self) -> MaskedAutoencoder:
        """A model of the same parameters, with the decoder where this one has it, before any training."""
        with torch.random.fork_rng(devices=[]):
            if self.checkpoint is not None:
                return initial_model(self.checkpoint.run.model_copy(update={"init_from": None}))
            return encoder_only(self.encoder.config, self.encoder.image_size, self.encoder.channels)

    def untrained(self, seed: int) -> Encoder:
        """The same encoder as it begins."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = encoder_only(self.encoder.config, self.encoder.image_size, self.encoder.channels)
        fresh = Encoder(model, copy.deepcopy(self.encoder.normalize), self.encoder.image_size, self.encoder.config)
        return fresh.eval().requires_grad_(requires_grad=False)


def open_subject(text: str, tracking: TrackingConfig, runs: str, key: str) -> Subject:
    """What `text` names, on the CPU.

    Args:
        text: folder or URI of a checkpoint, or what `named.open_encoder` takes.
        tracking: MLflow, for a registered model.
        runs: beside which MLflow's store lies, where `tracking` does not say.
        key: that asks for it, in the words of errors.

    Raises:
        CheckpointError: there is neither checkpoint nor encoder, or its files are gone or damaged.
        DataError: the run was normalised by the statistics of a dataset that is not there.
        TrackingError: MLflow is away, or has no such model, version or alias.
        StorageError: the files cannot be read.
    """
    if "models:/" not in text and Storage(text).exists(checkpoint.STATE):
        with checkpoint.on_disk(Storage(text)) as folder:
            found = read_checkpoint(folder)
        encoder = Encoder(found.model, found.normalize, found.run.data.image_size, found.run.model).eval()
        return Subject(Storage(text).uri, encoder, found, None, found.facts.step)
    try:
        named = open_encoder(text, tracking, runs, key)
    except NoEncoderError as error:
        raise CheckpointError(
            "there is neither a checkpoint nor an encoder",
            key=key,
            found=text,
            allowed=f"a folder with {checkpoint.STATE}, as runs keep them, or with {CARD}; or models:/name@alias",
            fix="check the path",
        ) from error
    return Subject(named.name, named.encoder, None, named.run_id, named.step)


def read_checkpoint(folder: Path) -> WithDecoder:
    """The model of a checkpoint's folder on this machine. Raises as `open_subject` does."""
    facts = checkpoint.read_facts(folder)
    run = load(folder / checkpoint.CONFIG)
    model = initial_model(run.model_copy(update={"init_from": None}))
    load_weights(model, folder)
    return WithDecoder(run, model, _normalize(run), facts)


def _normalize(run: RunConfig) -> Normalize:
    if run.data.normalize != "dataset":
        return Normalize.from_kind(run.data.normalize, run.data.channels)
    return build_normalize(run, Dataset.open(run.data.path, run.data.version).manifest)
