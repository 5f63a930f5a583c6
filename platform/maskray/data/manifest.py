"""What a dataset is: the manifest, written last, and one for each version that images were added in.

A version names the shards it is made of. Images that are added later come in shards of their own, so versions share
what they have in common and an old one stays readable as it was.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from itertools import product
from math import sqrt
from typing import Any, Literal

import numpy as np

from maskray.config.load import fingerprint
from maskray.data.storage import TEMPORARY, Storage, leads_out
from maskray.errors import DataError

SCHEMA_VERSION = 3
KEY = "data.path"
"""The key that errors name: who reads a dataset trains on it."""
MANIFEST = "manifest.json"
VERSIONS = "versions"
"""Folder of the manifests of all versions, each under its fingerprint, and of what each set aside."""
QUARANTINE = "quarantine.parquet"
"""What the newest version set aside."""
SplitName = Literal["train", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "held_out")
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Where images came from and when they were touched says nothing about what they are; nor do the sizes and checksums of
# shards, in whose footers pyarrow writes its version: `content` is over the images themselves.
_NOT_IDENTITY = ("fingerprint",)
_NOT_IDENTITY_OF_A_SHARD = ("size", "sha256")
_NOT_IDENTITY_OF_AN_ORIGIN = ("source", "stamp", "skipped", "options")
_SCHEMA_VERSION_OF_FINGERPRINTS = 2  # what was noted since is no identity: the same images keep their fingerprint
_SHARD_FILE = re.compile(r"\d{5,}\.parquet")
_VERSION_FILE = re.compile(r"[0-9a-f]{16}\.(json|quarantine)")
_LUMA = (299, 587, 114)  # of red, green and blue in gray, in thousandths: ITU-R 601
_LUMA_C = np.array(_LUMA, dtype=np.float64)
_SAFE_ROWS = 256  # sums of one image are below 2**50, so those of so many fit into 64 bits


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    name: str
    """Relative to the dataset."""
    rows: int
    """That belong to this version. The file may hold more: a short row group at its end that a later one completes."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    shards: tuple[Shard, ...]
    pixels: int
    """Sum of width × height over its images."""

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(s.rows for s in self.shards)


@dataclass(frozen=True)
class Origin:
    """What one ingest brought: the first made the dataset, each later one added to it."""

    source: str
    stamp: str
    """The source's stamp when it was read."""
    rows: int
    """Images that it brought."""
    skipped: int
    """Images that were there already."""
    content: str
    """SHA-256 over keys, labels and the stored images' own SHA-256, in the order of keys."""
    options: dict[str, Any]
    """Ingest's options that decided on which images were taken; empty where an older maskray did not note them."""


def grid_of(image_CHW: Bytes) -> Bytes:
    """The pixels that statistics are of, (C, P): all up to about 64 × 64, else every (side // 64)-th row and column."""
    step_h, step_w = (max(1, side // 64) for side in image_CHW.shape[1:])
    return image_CHW[:, ::step_h, ::step_w].reshape(len(image_CHW), -1)


@dataclass(frozen=True)
class PixelSums:
    """Exact sums over pixels, whatever the order of adding: what mean and std follow from.

    Of large images a grid of pixels is taken. Colour and gray images have four channels here: red, green, blue, and
    gray in thousandths. Images of any other number of channels have just those.
    """

    pixels: int
    values: tuple[int, ...]
    """Σ x over the pixels, for each channel."""
    squares: tuple[int, ...]
    """Σ x² over the pixels, for each channel."""

    @staticmethod
    def of(grid_CP: Bytes) -> PixelSums:
        """Of one image, from its pixels on a grid."""
        # Whole numbers below 2**53 are exact in float64. Not by a matrix product: BLAS starts threads in every job.
        has_gray = len(grid_CP) in (1, 3)
        values_CP = np.empty((4 if has_gray else len(grid_CP), grid_CP.shape[1]))
        values_CP[: 3 if has_gray else None] = grid_CP
        if has_gray:
            np.einsum("c,cp->p", _LUMA_C, values_CP[:3], out=values_CP[3])
        sums_C, squares_C = values_CP.sum(axis=1), np.einsum("cp,cp->c", values_CP, values_CP)
        return PixelSums(grid_CP.shape[1], tuple(map(int, sums_C.tolist())), tuple(map(int, squares_C.tolist())))

    @staticmethod
    def total(pixels_N: Ints, values_NC: Ints, squares_NC: Ints) -> PixelSums:
        """Of many images, from the sums of each."""

        def add(sums_NC: Ints) -> tuple[int, ...]:
            starts = range(0, len(sums_NC), _SAFE_ROWS)
            parts_PC = np.array([sums_NC[at : at + _SAFE_ROWS].sum(axis=0) for at in starts], dtype=object)
            return tuple(int(total) for total in parts_PC.reshape(-1, sums_NC.shape[1]).sum(axis=0))

        return PixelSums(int(pixels_N.sum()), add(values_NC), add(squares_NC))

    def __add__(self, other: PixelSums) -> PixelSums:
        return PixelSums(
            self.pixels + other.pixels,
            tuple(a + b for a, b in zip(self.values, other.values, strict=True)),
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )

    def mean_std(self, channel: int, unit: int) -> tuple[float, float]:
        """Mean and std of a channel in units of `unit`. All exact up to the last division."""
        n, total, squares = self.pixels, self.values[channel], self.squares[channel]
        return total / (n * unit), sqrt((n * squares - total * total) / (n * n)) / unit


@dataclass(frozen=True)
class Manifest:
    """What a version of a dataset is."""

    group_rows: int
    layout: dict[str, Any]
    """What else decided on which row lies where and what is in it, as ingest's options."""
    splits: dict[str, Split]
    channels: int
    """1 if all images of the training split are gray, 3 if they are gray or colour, else how many they have."""
    sums: PixelSums
    """Of the training split."""
    class_names: tuple[str, ...]
    num_quarantined: int
    num_duplicates: int
    origins: tuple[Origin, ...]
    """Oldest first."""
    schema_version: int = SCHEMA_VERSION
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self.expected_fingerprint())

    def expected_fingerprint(self) -> str:
        """Digest over all but where and when."""
        plain = json.loads(json.dumps(asdict(self))) | {"schema_version": _SCHEMA_VERSION_OF_FINGERPRINTS}
        for split in plain["splits"].values():
            for shard, key in product(split["shards"], _NOT_IDENTITY_OF_A_SHARD):
                del shard[key]
        for origin, key in product(plain["origins"], _NOT_IDENTITY_OF_AN_ORIGIN):
            del origin[key]
        return fingerprint({k: v for k, v in plain.items() if k not in _NOT_IDENTITY})

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Of all splits."""
        return tuple(shard for split in self.splits.values() for shard in split.shards)

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of each channel in 0..1 units, for images converted to `channels`. No std is below 1/255.

        Raises:
            DataError: the images cannot be converted to so many.
        """
        converted = (1, 3) if self.channels in (1, 3) else (self.channels,)
        if channels not in converted:
            raise DataError(
                "the dataset's images are not converted to so many channels",
                key="data.channels",
                found=channels,
                allowed=" or ".join(map(str, converted)),
            )
        chosen = {1: [(3, 255 * sum(_LUMA))], 3: [(c, 255) for c in range(3)]} if self.channels in (1, 3) else {}
        each = [self.sums.mean_std(*c) for c in chosen.get(channels, [(c, 255) for c in range(channels)])]
        return tuple(mean for mean, _ in each), tuple(max(std, 1 / 255) for _, std in each)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each of the dataset's own channels."""
        return self.statistics(self.channels)[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Std of each of the dataset's own channels."""
        return self.statistics(self.channels)[1]

    def dump(self) -> bytes:
        """As JSON."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @staticmethod
    def load(content: bytes, place: str, key: str = KEY) -> Manifest:
        """From JSON.

        Args:
            content: of the file.
            place: of the dataset.
            key: that names the place.

        Raises:
            DataError: of another schema version, or not as it was written.
        """
        again = f"delete {place} and ingest again"
        try:
            raw = json.loads(content)
            version = raw["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"the manifest of {place} cannot be read", key=key, found=str(error), fix=again) from error
        if version not in (2, SCHEMA_VERSION):
            raise DataError(
                f"{place} was written with another schema version",
                key=key,
                found=version,
                allowed=f"2 or {SCHEMA_VERSION} (this version of maskray)",
                fix="ingest again, or use the version of maskray that wrote it",
            )
        try:
            manifest = _manifest_from(_upgraded_from_2(raw) if version == 2 else raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the manifest of {place} is incomplete", key=key, found=repr(error), fix=again) from error
        if outside := [shard.name for shard in manifest.shards if leads_out(shard.name)]:
            raise DataError(
                f"the manifest of {place} names a shard that is not in it",
                key=key,
                found=outside[0],
                allowed="relative names without `..`",
                fix=f"take the dataset from where it came; who wrote this may mean harm. Or {again}",
            )
        expected = manifest.expected_fingerprint()
        if manifest.fingerprint != expected:
            raise DataError(
                f"the manifest of {place} was changed after it was written",
                key=key,
                found=f"fingerprint {manifest.fingerprint}, content {expected}",
                fix=again,
            )
        return manifest


def _upgraded_from_2(raw: dict[str, Any]) -> dict[str, Any]:
    """Since 3 it is noted of each origin under which options its images were taken."""
    origins = [origin | {"options": {}} for origin in raw["origins"]]
    return raw | {"schema_version": SCHEMA_VERSION, "origins": origins}


def _manifest_from(raw: dict[str, Any]) -> Manifest:
    splits = {
        name: Split(tuple(Shard(**s) for s in split["shards"]), split["pixels"])
        for name, split in raw["splits"].items()
    }
    sums = PixelSums(raw["sums"]["pixels"], tuple(raw["sums"]["values"]), tuple(raw["sums"]["squares"]))
    origins = tuple(Origin(**origin) for origin in raw["origins"])
    changed = {"splits": splits, "sums": sums, "origins": origins, "class_names": tuple(raw["class_names"])}
    return Manifest(**(raw | changed))


# ------------------------------------------------------------------------------------------------------------ versions


def newest(storage: Storage, key: str = KEY) -> Manifest | None:
    """The newest version of the dataset at a place, which `key` names; None where there is none."""
    try:
        return Manifest.load(storage.read_bytes(MANIFEST), storage.uri, key)
    except FileNotFoundError:
        return None


def kept_versions(storage: Storage) -> list[str]:
    """Fingerprints of the versions that are kept, without a look at them."""
    names = [name for name in storage.list_names(VERSIONS) if not name.startswith(TEMPORARY)]
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def versions(storage: Storage) -> dict[str, Manifest]:
    """All versions by their fingerprints, oldest first."""
    places = [f"{VERSIONS}/{kept}.json" for kept in kept_versions(storage)]
    found = [Manifest.load(storage.read_bytes(place), storage.join(place)) for place in places]
    last = newest(storage)
    every = {manifest.fingerprint: manifest for manifest in [*found, *([last] if last else [])]}
    return dict(sorted(every.items(), key=lambda item: len(item[1].origins)))


def is_ours(folder: str, name: str) -> bool:
    """Whether a file in a folder of a dataset is one that ingest writes: no other is ever deleted."""
    ours = _VERSION_FILE if folder == VERSIONS else _SHARD_FILE
    return name.startswith(TEMPORARY) or ours.fullmatch(name) is not None


def quarantine_of(fingerprint: str) -> str:
    """Name of the list of what a version set aside: Parquet, and no shard of anything."""
    return f"{VERSIONS}/{fingerprint}.quarantine"


def keep(storage: Storage, manifest: Manifest) -> None:
    """Keep the newest version and its list under its fingerprint, so that both can be read once another is the newest.

    The other way round, its list is laid out as that of the newest: the kill of an ingest comes between the two.
    """
    name, listed = f"{VERSIONS}/{manifest.fingerprint}.json", quarantine_of(manifest.fingerprint)
    if not storage.exists(name):
        storage.write_bytes(name, manifest.dump())
    own, shown = _read(storage, listed), _read(storage, QUARANTINE)
    if own is None and shown is not None:
        storage.write_bytes(listed, shown)  # an older maskray wrote no other
    elif own is not None and own != shown:
        storage.write_bytes(QUARANTINE, own)


def is_kept(storage: Storage, manifest: Manifest) -> bool:
    """Whether the newest version is kept, with its list, and nothing is left to be done."""
    own = _read(storage, quarantine_of(manifest.fingerprint))
    is_there = storage.exists(f"{VERSIONS}/{manifest.fingerprint}.json")
    return is_there and own is not None and own == _read(storage, QUARANTINE)


def _read(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read_bytes(name)
    except FileNotFoundError:
        return None
