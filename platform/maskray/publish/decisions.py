"""What was decided on an alias of a registered model, numbered 1, 2, 3 …: a file each, written once, never changed.

    <records>/<model>@<alias>/000001.json    the first decision: what, why, and all the numbers it rests on
    <records>/<model>@<alias>/identity       a name, noted in MLflow: of two folders one would not know the other

Two promotions at once both want to write the next number. The file is created exclusively, so one of them does, and
the other looks again at what there is to be better than. MLflow's alias, which anybody may overwrite, follows the
newest record, never the other way round.
"""

from __future__ import annotations

import base64
import getpass
import json
import re
import socket
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from maskray.data.storage import Storage
from maskray.errors import StorageError
from maskray.evaluation.logistic import Correct
from maskray.evaluation.paired import Gain

SCHEMA_VERSION = 1
_IDENTITY = "identity"
_NAME = re.compile(r"^(\d{6,})\.json$")

Kind = Literal["promoted", "refused", "rolled_back"]


@dataclass(frozen=True)
class EvaluationSet:
    """The frozen rows, and what is done with them: two scores are comparable where all of this is equal."""

    dataset: str
    """Fingerprint."""
    num_rows: int
    """Held-out rows, which are judged."""
    num_train: int
    """Training rows, whose labels are used."""
    measure: str

    def __str__(self) -> str:
        return f"{self.num_rows:,} held-out rows of the dataset {self.dataset} ({self.measure} of {self.num_train:,})"


@dataclass(frozen=True)
class Comparison:
    """What a decision between two versions rests on."""

    evaluation: EvaluationSet
    score: float
    """Accuracy of the challenger."""
    champion_score: float | None
    """None: there was no champion."""
    gain: Gain | None
    gate: Mapping[str, Any]
    """The config's section."""
    seed: int
    correct: Mapping[str, str]
    """Which rows each version named rightly, by its number: packed bits, base64."""

    def rows_of(self, version: str) -> Correct | None:
        """Which rows a version named rightly; None where it was not compared."""
        return unpacked(self.correct[version], self.evaluation.num_rows) if version in self.correct else None


@dataclass(frozen=True)
class Decision:
    """One decision."""

    number: int
    model: str
    alias: str
    kind: Kind
    version: str
    """That was decided on: the challenger, or the version that a rollback brought back."""
    champion_before: str | None
    champion: str | None
    """From here on."""
    reason: str
    """In words, with the numbers."""
    comparison: Comparison | None = None
    """None of a rollback."""
    decided_ms: int = field(default_factory=lambda: int(datetime.now(UTC).timestamp() * 1000))
    """Milliseconds since 1970."""
    decided_by: str = field(default_factory=lambda: f"{_user()} on {socket.gethostname()}")
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """No two writers write the same bytes: by that one whose answer was lost knows its own record."""

    def __str__(self) -> str:
        return f"decision {self.number}, {self.kind.replace('_', ' ')}: {self.reason}"

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def load(content: bytes) -> Decision:
        """From JSON.

        Raises:
            ValueError, LookupError, TypeError: it is no decision, or of another schema version.
        """
        raw = json.loads(content)
        if (version := raw.pop("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"schema version {version}, where this version of maskray reads {SCHEMA_VERSION}")
        compared = raw["comparison"]
        if compared is not None:
            compared["evaluation"] = EvaluationSet(**compared["evaluation"])
            compared["gain"] = None if compared["gain"] is None else Gain(*compared["gain"])
            raw["comparison"] = Comparison(**compared)
        return Decision(**raw)


class Records:
    """The decisions on one alias of a registered model.

    Args:
        place: that all who promote this model share.
        model: its name.
        alias: that is decided on.
    """

    def __init__(self, place: Storage, model: str, alias: str) -> None:
        self.place = place
        self._folder = f"{quote(model, safe=' ')}@{alias}"
        self._read: dict[int, Decision] = {}

    def identity(self) -> str | None:
        """A name of this very folder, wherever it lies; None where nothing was decided yet."""
        try:
            return self.place.read_bytes(f"{self._folder}/{_IDENTITY}").decode()
        except FileNotFoundError:
            return None

    def found(self) -> str:
        """The name of the folder, which is made where there is none."""
        self.place.create_exclusive(f"{self._folder}/{_IDENTITY}", uuid.uuid4().hex.encode())
        return self.identity() or ""

    def load(self) -> list[Decision]:
        """All decisions, in order.

        Raises:
            StorageError: one is missing or cannot be read: what it decided is not guessed.
        """
        names = [match for name in self.place.list_names(self._folder) if (match := _NAME.match(name))]
        last = max((int(match[1]) for match in names), default=0)
        return [self._decision(number) for number in range(1, last + 1)]

    def append(self, decision: Decision) -> bool:
        """Keep a decision under its number; False where that number is another's."""
        return self.place.create_exclusive(self._name(decision.number), decision.dump())

    def _decision(self, number: int) -> Decision:
        if number not in self._read:  # they never change
            name = self._name(number)
            try:
                self._read[number] = Decision.load(self.place.read_bytes(name))
            except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise StorageError(
                    "a record of the promotions is missing or cannot be read",
                    key="records",
                    found=f"{self.place.join(name)} ({error!r})",
                    fix="put the file back: who is champion follows from all of them",
                ) from error
        return self._read[number]

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:06d}.json"


def champions(history: Iterable[Decision]) -> list[str]:
    """The champion, last, and those before it to which a rollback goes back, one after the other."""
    stack: list[str] = []
    for decision in history:
        match decision.kind:
            case "promoted":
                if decision.champion_before is not None and stack[-1:] != [decision.champion_before]:
                    stack.append(decision.champion_before)  # put there by hand, before there were records
                stack.append(decision.version)
            case "rolled_back":
                stack.pop()
            case "refused":
                pass
    return stack


def yardstick(history: Sequence[Decision]) -> Comparison | None:
    """The newest comparison: what it was made on, the next one must be made on."""
    return next((d.comparison for d in reversed(history) if d.comparison is not None), None)


def packed(correct: Correct) -> str:
    """Row by row as base64 of packed bits: 50,000 rows are 8 kB."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpacked(text: str, num_rows: int) -> Correct:
    """The way back."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=num_rows)
    return bits.astype(np.bool_)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
