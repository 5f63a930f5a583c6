"""Whether what lies there is what was written."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

from maskray.data.manifest import Shard, versions
from maskray.data.mapper import Mapper, Progress
from maskray.data.shards import no_manifest, sha256_of
from maskray.data.storage import Storage
from maskray.errors import DataError, StorageError, UnreachableError

logger = logging.getLogger(__name__)


def check(path: str, mapper: Mapper, report: Progress) -> list[Shard]:
    """Compare the checksum of every shard of every version of a dataset; all of them, if they are right.

    Raises:
        DataError: there is no dataset, or shards are not as they were written; names them.
        UnreachableError: the object store did not answer, however often it was asked.
    """
    storage = Storage(path)
    every = versions(storage)
    if not every:
        raise no_manifest(storage)
    shards = {shard.name: shard for manifest in every.values() for shard in manifest.shards}
    damaged = find_damaged(storage, shards.values(), mapper, report)
    if damaged:
        raise DataError(
            f"{len(damaged)} of the {len(shards)} shards of {storage.uri} are not as they were written",
            found=", ".join(shard.name for shard in damaged),
            fix="ingest again from the same source (it writes damaged shards anew), or restore them from a copy",
        )
    return list(shards.values())


def find_damaged(storage: Storage, shards: Iterable[Shard], mapper: Mapper, report: Progress) -> list[Shard]:
    """The shards that are missing, not as they were written, or cannot be read; a warning says of each what it is.

    Raises:
        UnreachableError: the object store did not answer, however often it was asked: that says nothing of a shard.
    """
    jobs = [_VerifyJob(storage, shard) for shard in shards]
    damaged = []
    report(0, len(jobs), "verify")
    for done, problem in enumerate(mapper(_problem_of, jobs), 1):
        report(done, len(jobs), "verify")
        if problem is not None:
            damaged.append(jobs[done - 1].shard)
            logger.warning("%s: %s", damaged[-1].name, problem)
    return damaged


class _VerifyJob(NamedTuple):
    storage: Storage
    shard: Shard


def _problem_of(job: _VerifyJob) -> str | None:
    try:
        found = sha256_of(job.storage, job.shard.name)
    except UnreachableError:
        raise
    except (OSError, StorageError) as error:
        return str(error)
    return None if found == job.shard.sha256 else "its checksum is wrong"
