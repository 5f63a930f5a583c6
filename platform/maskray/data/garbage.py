"""What no version of a dataset that is in use needs any more."""

from __future__ import annotations

from collections.abc import Collection, Set
from dataclasses import dataclass

from maskray.data.lease import INGEST, refuse_if_held
from maskray.data.manifest import SPLITS, VERSIONS, Manifest, is_ours, newest, quarantine_of, versions
from maskray.data.parts import FOLDER
from maskray.data.shards import no_manifest
from maskray.data.storage import Storage
from maskray.errors import DataError


@dataclass(frozen=True)
class Garbage:
    """Files of a dataset that can go."""

    versions: list[str]
    """Fingerprints of those that nothing uses."""
    kept: list[str]
    """Fingerprints of the others."""
    files: dict[str, int]
    """Bytes by name; manifests come first, since they name the others."""


def find_garbage(storage: Storage, in_use: Set[str]) -> Garbage:
    """The versions that are neither the newest nor in use, the shards that only they need, and what a kill left.

    Args:
        storage: of the dataset.
        in_use: fingerprints of the datasets that somebody needs.

    Raises:
        DataError: there is no dataset, or an ingest was killed.
        RunConflictError: an ingest is running.
    """
    refuse_if_held(storage, storage.uri, INGEST)
    last = newest(storage)
    if last is None:
        raise no_manifest(storage)
    if storage.exists(FOLDER):
        raise DataError(
            f"an ingest into {storage.uri} is under way, or was killed",
            found=storage.join(FOLDER),
            fix="let it end (the same command goes on), or delete that folder",
        )
    every = versions(storage)
    kept = {name: manifest for name, manifest in every.items() if name in in_use or name == last.fingerprint}
    return Garbage([name for name in every if name not in kept], list(kept), unneeded(storage, kept.values()))


def unneeded(storage: Storage, kept: Collection[Manifest]) -> dict[str, int]:
    """Bytes by name of the files that ingest wrote and none of these versions needs; manifests come first."""
    needed = {shard.name for manifest in kept for shard in manifest.shards}
    for manifest in kept:
        needed |= {f"{VERSIONS}/{manifest.fingerprint}.json", quarantine_of(manifest.fingerprint)}
    return {
        f"{folder}/{name}": size
        for folder in (VERSIONS, *SPLITS)
        for name, size in sorted(storage.list_sizes(folder).items())
        if is_ours(folder, name) and f"{folder}/{name}" not in needed
    }


def delete_garbage(storage: Storage, garbage: Garbage) -> None:
    """Delete it.

    Raises:
        DataError: an ingest was started meanwhile.
        StorageError: a file cannot be deleted.
    """
    if find_garbage(storage, set(garbage.kept)) != garbage:
        raise DataError(f"{storage.uri} has changed since it was looked through", fix="run the same command again")
    for name in garbage.files:
        storage.delete(name)
