"""What `maskray embed` is asked for: which images, by which encoder, where to, and by whom."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from maskray.config.schema import ClusterConfig, StorageConfig, TrackingConfig
from maskray.config.section import Fraction, PositiveInt, Section


class EmbedConfig(Section):
    """A whole collection of images to a Parquet table of their embeddings."""

    encoder: str
    """`models:/name@alias` or `models:/name/version` of the registry; or a folder or URI with `encoder.json`, as the
    registry keeps it."""
    images: str
    """Folder or URI of an ingested dataset; or whatever `maskray ingest` takes: a folder, tars, zips or a table of
    images, local or at `s3://bucket/prefix`."""
    destination: str
    """Folder or URI that the table is written to."""
    version: str | None = None
    """Fingerprint of a dataset's version; None takes the newest."""
    splits: Annotated[tuple[Literal["train", "held_out"], ...], Field(min_length=1)] = ("train", "held_out")
    """Of a dataset."""
    batch: Annotated[int, Field(ge=1, le=65536)] = 256
    """Images that a worker reads, decodes and encodes at once."""
    part_rows: PositiveInt = 8192
    """About as many rows are in a file: what is there after a kill is kept by the file."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast; embeddings are written as float32 in both."""
    max_bad_fraction: Fraction = 0.01
    """Share of images that may be unreadable before it stops."""
    max_pixels: PositiveInt = 178_956_970
    """Height × width of a larger image are not believed, and it is not decoded. Ingest has looked at a dataset's."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers, and the CPUs and GPUs of each; an embedded cluster on this machine, or a running one."""
    storage: StorageConfig = StorageConfig()
    """Where the runs are, beside which MLflow's embedded store lies."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow, for `models:/…`."""
