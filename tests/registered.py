"""Versions of a registered model made in milliseconds: untrained encoders of the digits, the wider the better."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from maskray.config.load import parse
from maskray.config.promotion import PromotionConfig
from maskray.config.schema import RunConfig
from maskray.models.build import build_model
from maskray.models.encoder import save_encoder
from maskray.models.normalize import Normalize
from maskray.tracking.mlflow_store import Store

MODEL = "tiny"
WIDTHS = (4, 8, 12, 16, 32, 64, 96, 128)
"""A linear probe of 324 digits reads 28 % of the first and 84 % of the last."""


class Registered:
    """A registered model in a store, to which encoders of given widths are added.

    Args:
        store: MLflow.
        folder: for the versions' files.
        dataset: path of the digits.
    """

    def __init__(self, store: Store, folder: Path, dataset: Path) -> None:
        self.store, self.folder, self.dataset = store, folder, dataset
        self.client = store.client()
        self.client.create_registered_model(MODEL)

    def encoder(self, width: int, folder: Path | None = None) -> Path:
        """The folder of an encoder."""
        size = {"width": width, "depth": 1, "heads": 2}
        raw = {
            "name": MODEL,
            "data": {"path": "unused", "image_size": 8, "channels": 1},
            "model": {"patch": 2, "decoder": size, **size},
            "optim": {"steps": 10, "global_batch": 64},
        }
        config = parse(RunConfig, raw)
        torch.manual_seed(width)
        folder = folder or self.folder / f"encoder-{width}"
        save_encoder(folder, build_model(config.model, (8, 8), 1), Normalize([0.3], [0.37]), config)
        return folder

    def add(self, width: int) -> str:
        """The number of a new version, which has a run and files as `registry` lays them out."""
        place = self.folder / f"model-{len(list(self.folder.glob('model-*')))}"
        self.encoder(width, place / "artifacts" / "encoder")
        run = self.client.create_run(self.store.experiment_id, run_name=f"width-{width}")
        version = self.client.create_model_version(MODEL, place.as_uri(), run.info.run_id)
        return str(version.version)

    def lose(self, number: str) -> None:
        """Delete the files of a version."""
        source = self.client.get_model_version(MODEL, number).source
        shutil.rmtree(Path(source.removeprefix("file://")))

    def config(self, challenger: str | None = None, **sections: object) -> PromotionConfig:
        """Of a promotion of this model, with sections laid over it."""
        raw = {
            "model": MODEL,
            "challenger": challenger,
            "data": {"path": str(self.dataset), "max_rows": 400},
            "storage": {"path": str(self.folder)},
            "tracking": {"uri": self.store.uri},
        }
        return parse(PromotionConfig, raw | sections)

    @property
    def champion(self) -> str | None:
        """The version that the alias leads to."""
        found = self.client.get_registered_model(MODEL).aliases.get("champion")
        return None if found is None else str(found)
