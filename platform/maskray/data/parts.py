"""What a killed ingest leaves to the next one: finished parts of both passes, in `.ingest/` at the destination.

    .ingest/DIGEST/survey/00000.parquet     what the first pass learned of a chunk of images
    .ingest/DIGEST/staging/00000.bin        the chunk's images that are kept, one after the other
    .ingest/DIGEST/shards/train-00000.json  a shard that is whole

The digest is over all that the parts depend on, so those of another source or of other options are never taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maskray.data.manifest import Shard
from maskray.data.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = ".ingest"


@dataclass(frozen=True)
class Parts:
    """The parts of one ingest. Picklable: whoever does a job keeps its result. Each appears whole or not at all."""

    storage: Storage
    """The destination."""
    digest: str

    @staticmethod
    def of(storage: Storage, *facts: object) -> Parts:
        """Those that depend on `facts`; all others are deleted."""
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        for name in storage.list_names(FOLDER):
            if name != digest:
                storage.delete(f"{FOLDER}/{name}")
        return Parts(storage, digest)

    @property
    def place(self) -> str:
        """Where they are kept."""
        return self.storage.join(FOLDER, self.digest)

    def surveyed(self) -> set[int]:
        """Numbers of the chunks whose survey is there."""
        names = self.storage.list_sizes(self._name("survey"))
        return {int(name.removesuffix(".parquet")) for name in names if name.endswith(".parquet") and name[0].isdigit()}

    def load_survey(self, number: int) -> Any:
        """What was learned of a chunk, as a table; None, and a warning, where it cannot be read."""
        try:
            return pq.read_table(
                pa.BufferReader(self.storage.read_bytes(self._name("survey", f"{number:05d}.parquet")))
            )
        except (FileNotFoundError, pa.ArrowException) as error:
            logger.warning("part %d of the survey cannot be read (%s): it is made again", number, error)
            return None

    def save_survey(self, number: int, table: Any, staged: bytes) -> None:
        """Keep what was learned of a chunk, and its kept images; the survey last, since it speaks for both."""
        if staged:
            self.storage.write_bytes(self._name("staging", f"{number:05d}.bin"), staged)
        with self.storage.open_output(self._name("survey", f"{number:05d}.parquet")) as stream:
            pq.write_table(table, stream)

    def read_staged(self, number: int, at: int, size: int) -> bytes:
        """A kept image of a chunk."""
        return self.storage.read_range(self._name("staging", f"{number:05d}.bin"), at, size)

    def save_shard(self, shard: Shard, content: str) -> None:
        """Note a shard that is whole, and what is in it."""
        record = json.dumps({"shard": asdict(shard), "content": content}).encode()
        self.storage.write_bytes(self._name("shards", shard.name.replace("/", "-") + ".json"), record)

    def load_shard(self, name: str) -> tuple[Shard, str] | None:
        """A shard that is whole, and what is in it; None where there is no note of it."""
        try:
            raw = json.loads(self.storage.read_bytes(self._name("shards", name.replace("/", "-") + ".json")))
        except FileNotFoundError:
            return None
        return Shard(**raw["shard"]), raw["content"]

    def _name(self, *parts: str) -> str:
        return "/".join((FOLDER, self.digest, *parts))
