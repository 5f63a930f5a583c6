"""The photographs as a dataset, and the stream over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskray.config.load import merge, parse
from maskray.config.resolve import resolve
from maskray.config.schema import IngestConfig, RunConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec

GROUP_ROWS = 64


def make_dataset(files: Path) -> Dataset:
    """The same images as shards of row groups of 64; made once, and recognised afterwards."""
    destination = files.with_name(files.name.replace("files-", "shards-"))
    if not (destination / "manifest.json").exists():
        config = IngestConfig(
            source=str(files), destination=str(destination), group_rows=GROUP_ROWS, held_out_fraction=0.0
        )
        ingest(config, thread_mapper(2))
    return Dataset.open(str(destination))


def make_spec(dataset: Dataset, *, global_batch: int, steps: int, **data: Any) -> tuple[RunConfig, StreamSpec]:
    """The stream of a run on the dataset with the paper's crops and masks (RandomResizedCrop(224, 0.2 to 1), flip)."""
    sections = {
        "name": "bench",
        "data": {"path": dataset.storage.uri, "stream": "ray"},
        "optim": {"global_batch": global_batch, "steps": steps, "warmup_steps": 0},
    }
    config = parse(RunConfig, merge(sections, {"data": data}))
    return config, StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
