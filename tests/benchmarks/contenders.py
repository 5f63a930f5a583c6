"""The loaders that a user would pick otherwise, each as its documentation tunes it, with two processes that decode.

All give batches of 64 crops as RandomResizedCrop(224, 0.2 to 1, bicubic) and a flip make them, in an order that is
shuffled as the library does it. ImageFolder gives float32, as the MAE authors' code does; the others stop at uint8,
which is faster.

Each library decodes as its documentation says. `same decode` puts maskray's decoder into it: that is not what a user
gets, but shows what is left of the difference once the decoder is the same.
"""

from __future__ import annotations

import multiprocessing
import os
import tarfile
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from decode import authors_transform
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets as torchvision_datasets
from torchvision.transforms import v2

from maskray.data import decode

BATCH, WORKERS, SHARDS = 64, 2, 16
Loader = Callable[[], Generator[int]]
"""Starts a pass; the number of images in each batch as it arrives."""

# Forked from a process that runs Ray's threads, workers could hang. They end with their pass: those of all sides at
# once would take gigabytes. What they import is loaded in the server that they are forked from.
PROCESSES: dict[str, Any] = {"num_workers": WORKERS, "multiprocessing_context": "forkserver"}
multiprocessing.set_forkserver_preload(["torch", "torchvision.transforms.v2", "torchcodec.decoders", "ray.train"])


def contenders(files: Path) -> dict[str, Loader]:
    """All of them, on the files of a folder; what they read is made beside it once."""
    tensors = v2.Compose(
        [v2.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=3, antialias=True), v2.RandomHorizontalFlip()]
    )
    pillow = authors_transform(normalized=False)
    return {
        "DataLoader + ImageFolder": image_folder(files),
        "WebDataset": web_dataset(files, "pilrgb", pillow),
        "WebDataset, same decode": web_dataset(files, ours, tensors),
        "LitData": lit_data(files, tensors),
        "Hugging Face, image feature": hugging_face(files, partial(from_feature, pillow), decoded=True),
        "Hugging Face, same decode": hugging_face(files, partial(from_bytes, tensors), decoded=False),
        "Ray Data read_images": read_images(files, tensors),
    }


def counted(loader: Any) -> Loader:
    """A DataLoader's passes."""

    def batches() -> Generator[int]:
        for batch in loader:
            yield len(batch[0] if isinstance(batch, list | tuple) else batch["image"])

    return batches


def made_once(files: Path, kind: str, make: Callable[[Path], None]) -> Path:
    """A folder beside `files` that `make` fills."""
    folder = files.with_name(files.name.replace("files-", f"{kind}-"))
    if not folder.exists():
        partial_folder = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        partial_folder.mkdir()
        make(partial_folder)
        partial_folder.rename(folder)
    return folder


def shuffled(files: Path) -> list[Path]:
    """All files in an order without classes in it."""
    paths = sorted(files.rglob("*.jpg"))
    return [paths[i] for i in torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()]


# --------------------------------------------------------------------------------------------------------- torchvision


def image_folder(files: Path) -> Loader:
    """The MAE authors' code."""
    images = torchvision_datasets.ImageFolder(str(files), authors_transform())
    return counted(DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True, **PROCESSES))


# ---------------------------------------------------------------------------------------------------------- WebDataset


def web_dataset(files: Path, decoder: Any, transform: Any) -> Loader:
    """Tars, shuffled by shard and in a buffer; batches made in the workers, as the documentation advises."""
    import webdataset as wds

    def make(folder: Path) -> None:
        for shard, paths in enumerate(np.array_split(np.array(shuffled(files)), SHARDS)):
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
                for path in paths:
                    tar.add(path, path.name)

    urls = sorted(str(p) for p in made_once(files, "tars", make).glob("*.tar"))
    images = (
        wds.WebDataset(urls, shardshuffle=SHARDS)
        .shuffle(1000)
        .decode(decoder)
        .to_tuple("jpg")
        .map_tuple(transform)
        .batched(BATCH)
    )
    return counted(wds.WebLoader(images, batch_size=None, **PROCESSES))


def ours(key: str, data: bytes) -> torch.Tensor | None:
    """maskray's decoder as WebDataset wants one."""
    return decode.decode(data, 3) if key.endswith("jpg") else None


# ------------------------------------------------------------------------------------------------------------- LitData


def lit_data(files: Path, transform: Any) -> Loader:
    """Its own chunks of 64 MB; it decodes by torchvision, to tensors."""
    import litdata

    def make(folder: Path) -> None:
        litdata.optimize(
            fn=jpeg,
            inputs=[str(path) for path in shuffled(files)],
            output_dir=str(folder),
            chunk_bytes="64MB",
            num_workers=WORKERS,
            verbose=False,
        )

    images = litdata.StreamingDataset(
        str(made_once(files, "litdata", make)), shuffle=True, drop_last=True, transform=partial(from_jpeg, transform)
    )
    return counted(litdata.StreamingDataLoader(images, batch_size=BATCH, **PROCESSES))


def jpeg(path: str) -> dict[str, Any]:
    """A sample whose bytes LitData takes as they are."""
    return {"image": Image.open(path)}


def from_jpeg(transform: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Crop what LitData decoded."""
    return {"image": transform(sample["image"])}


# -------------------------------------------------------------------------------------------------------- Hugging Face


def hugging_face(files: Path, transform: Any, *, decoded: bool) -> Loader:
    """Parquet in the Hub's layout, streamed, with its shuffle buffer."""
    import datasets

    def make(folder: Path) -> None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for shard, paths in enumerate(np.array_split(np.array(shuffled(files)), SHARDS)):
            images = pa.array([{"bytes": path.read_bytes(), "path": path.name} for path in paths], kind)
            pq.write_table(pa.table({"image": images}), folder / f"{shard:05d}.parquet", row_group_size=100)

    folder = made_once(files, "parquet", make)
    images = datasets.load_dataset(
        "parquet", data_files=sorted(str(p) for p in folder.glob("*.parquet")), split="train", streaming=True
    )
    images = images.cast_column("image", datasets.Image(mode="RGB", decode=decoded))
    images = images.shuffle(seed=0, buffer_size=1000).map(transform, remove_columns=["image"])
    return counted(DataLoader(images, batch_size=BATCH, collate_fn=stacked, **PROCESSES))


def from_feature(transform: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Crop what its image feature decoded."""
    return {"crop": transform(sample["image"]).numpy()}


def from_bytes(transform: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Decode its bytes and crop."""
    return {"crop": transform(decode.decode(sample["image"]["bytes"], 3)).numpy()}


def stacked(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of crops."""
    return {"image": torch.from_numpy(np.stack([sample["crop"] for sample in samples]))}


# ------------------------------------------------------------------------------------------------------------ Ray Data


def read_images(files: Path, transform: Any) -> Loader:
    """Files to images to crops in one fused task, files in random order."""

    def batches() -> Generator[int]:
        images = ray.data.read_images(str(files), mode="RGB", shuffle="files")
        crops = images.map_batches(partial(cropped, transform), batch_size=BATCH)
        for batch in crops.iter_batches(batch_size=BATCH, prefetch_batches=8):
            yield len(batch["image"])

    return batches


def cropped(transform: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Crop images of any sizes."""
    images = (torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in batch["image"])
    return {"image": np.stack([transform(image).numpy() for image in images])}
