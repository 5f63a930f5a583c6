"""A checkpoint is a folder: whole, or not there.

    config.yaml          the resolved config, as text
    model.safetensors    weights, under the model's parameter names
    optimizer.pt         the optimiser's state, loaded with `weights_only=True`
    state.json           schema version, step, fingerprints, versions, size and digest of the files above; written last

Nothing pickled that a stranger could have written is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from maskray.data.storage import Storage, nearest_folder, room_for_temporary
from maskray.data.temporary import temporary_folder
from maskray.errors import CheckpointError, StorageError, UnreachableError
from maskray.training.sharding import load_model, load_optimizer, whole

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
STATE = "state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
CONFIG = "config.yaml"
KIND = "kind"
FILES = (CONFIG, WEIGHTS, OPTIMIZER)
_READ_VERSIONS = (1, SCHEMA_VERSION)
"""Those of 1 know of no skipped steps: none was. What else there is in 2 is in them."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself, beside tensors."""

    step: int
    fingerprint: str
    """Of the run's identity: a checkpoint of another run is refused."""
    world_size: int
    threads: int
    packages: Mapping[str, str]
    pending_metrics: list[Any]
    """Metric points that the tracker had not stored when the checkpoint was taken."""
    matmul_rates: Mapping[str, float] = field(default_factory=dict)
    """FLOP/s of matrix products that were measured, by hardware: MFU is a share of the same all through a run."""
    skipped: list[int] = field(default_factory=list)
    """Steps of the plan, before `step`, that were left out."""
    recent_losses: list[float] = field(default_factory=list)
    """That a later loss is compared with, where leaps are looked for, the oldest first."""


class HostCopy:
    """Weights and optimiser state copied to the host between two steps."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, facts: Facts, config_yaml: str) -> None:
        self._weights = {k: on_host(v).contiguous() for k, v in model.state_dict().items()}
        self._optimizer = on_host(optimizer.state_dict())
        self._facts, self._config_yaml = facts, config_yaml

    def write(self, folder: Path) -> None:
        """Fill a folder; `state.json` comes last."""
        (folder / CONFIG).write_text(self._config_yaml)
        save_file(self._weights, folder / WEIGHTS)
        torch.save(self._optimizer, folder / OPTIMIZER)
        seal(folder, FILES, self._facts.__dict__)


def fill(folder: Path, write: Callable[[Path], None], key: str) -> None:
    """Let a checkpoint be written into a folder, which is not there if that fails.

    Args:
        folder: is made, or emptied: who may look into one that is there stays as it is.
        write: fills it.
        key: what names the place of it to a user.

    Raises:
        StorageError: the disk is full, or fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        write(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are what torch and safetensors make of it
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(nearest_folder(folder)).free
        raise StorageError(
            "a checkpoint could not be written",
            key=key,
            found=f"{folder} ({' '.join(str(error).split())[:160]}; {free:,} bytes are free there)",
            fix="free some space, or take a folder on another disk, and give the same command again: the run goes on "
            "from its last checkpoint",
        ) from error


def send(folder: Path, target: Storage, notes: Mapping[str, bytes] | None = None) -> None:
    """Copy a checkpoint to where it is kept; what there is of it is removed where there is no room for all.

    Args:
        folder: on this machine.
        target: of this checkpoint alone.
        notes: content of further files, by name.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        for name, content in (notes or {}).items():
            target.write_bytes(name, content)
        # The file that says that the others are whole goes last.
        for file in sorted(folder.iterdir(), key=lambda f: f.name == STATE):
            target.write_file(file.name, file)
    except StorageError as error:
        if not isinstance(error, UnreachableError):  # which would not hear of that either; a launch removes it
            _drop(target)  # or each try would leave less room than the one before
        raise type(error)(
            f"a checkpoint could not be kept: {error.problem}",
            key="storage.path",
            found=error.found,
            fix=f"{error.fix}; the same command goes on from the last checkpoint",
        ) from error


def _drop(target: Storage) -> None:
    try:
        target.delete("")
    except StorageError:  # a launch removes it
        log.warning("What there is of %s could not be removed", target.uri)


def taken(
    rank: int, model: nn.Module, optimizer: torch.optim.Optimizer, facts: Facts, config_yaml: str
) -> Callable[[Path], None] | None:
    """A checkpoint to be written by the first worker. The others give it their parts of a sharded model: None."""
    if rank == 0:
        return HostCopy(model, optimizer, facts, config_yaml).write

    def gather_and_drop(tensor: torch.Tensor) -> None:
        whole(tensor.detach())

    _each(model.state_dict(), gather_and_drop)
    _each(optimizer.state_dict(), gather_and_drop)
    return None


def seal(folder: Path, names: Iterable[str], content: Mapping[str, Any]) -> None:
    """Write `state.json`, by which a folder counts: what it says of itself, size and digest of each of its files."""
    files = {name: _digest(folder / name) for name in names}
    state = {"schema_version": SCHEMA_VERSION, **content, "files": files}
    (folder / STATE).write_text(json.dumps(state, indent=1))


def unsealed(folder: Path, names: Iterable[str] = ()) -> dict[str, Any]:
    """What a folder says of itself; its files, and those of `names`, are all there and undamaged.

    Raises:
        CheckpointError: no `state.json`, another schema version, or a file that is missing or damaged.
    """
    state = _state(folder)
    version = state.pop("schema_version", None)
    if version not in _READ_VERSIONS:
        raise CheckpointError(
            "the checkpoint has another schema version",
            key="schema_version",
            found=f"{version} in {folder}",
            allowed=" or ".join(map(str, _READ_VERSIONS)),
            fix="continue it with the maskray that wrote it, or start a new run with init_from",
        )
    try:
        expected = dict(state.pop("files"))
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder) from error
    for name in dict.fromkeys((*names, *expected)):
        if flaw := _flaw(folder / name, expected.get(name)):
            raise CheckpointError(
                "a file of the checkpoint is missing or damaged",
                found=f"{folder / name} ({flaw})",
                fix="use an earlier checkpoint; `maskray repair RUN_FOLDER` takes a run back to one",
            )
    return state


def read_facts(folder: Path) -> Facts:
    """The facts of a run's checkpoint whose files are all there and undamaged. Raises as `unsealed` does."""
    try:
        return Facts(**unsealed(folder, FILES))
    except TypeError as error:
        raise _unreadable(folder) from error


def _state(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / STATE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:  # not there, no JSON, no mapping
        raise _unreadable(folder) from error


def _unreadable(folder: Path) -> CheckpointError:
    return CheckpointError(
        "a folder without a readable state.json is no checkpoint", found=folder, fix="use an earlier checkpoint"
    )


def is_whole(folder: Path) -> bool:
    """Whether all files are there and undamaged. Another schema version is whole: refused later, by name.

    A checkpoint that is not of a run says so by a `kind`.
    """
    try:
        _ = unsealed(folder) if KIND in _state(folder) else read_facts(folder)
    except CheckpointError as error:
        return error.key == "schema_version"
    return True


def flaws(folder: Path) -> list[str]:
    """What keeps a folder from being whole, in words, a file each; nothing where it `is_whole`."""
    if is_whole(folder):
        return []
    try:
        state = _state(folder)
        expected, needed = state["files"], () if KIND in state else FILES
        found = [(name, _flaw(folder / name, expected.get(name))) for name in dict.fromkeys((*needed, *expected))]
    except (CheckpointError, KeyError, AttributeError):
        cut = (folder / STATE).exists()
        return [
            f"{STATE} cannot be read" if cut else f"there is no {STATE}, which is written last: it was not finished"
        ]
    return [f"{name} {flaw}" for name, flaw in found if flaw] or [f"{STATE} does not say what a checkpoint must"]


def _flaw(path: Path, expected: Any) -> str:
    """What is wrong with a file; nothing where it is as its folder's `state.json` says."""
    if not path.is_file():
        return "is missing"
    if not isinstance(expected, dict):
        return f"is not in {STATE}"
    found, size = _digest(path), expected.get("bytes")
    if found["bytes"] != size:
        return f"has {found['bytes']} bytes, {size} were written"
    return "" if found == expected else "has as many bytes as were written, and others"


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str, skip_steps: Sequence[int] = ()
) -> Facts:
    """Load weights and optimiser state in place.

    Raises:
        CheckpointError: damaged, of another schema version, of a run with another identity, or of one that has trained
            on other steps of its plan than all but `skip_steps`.
    """
    facts = read_facts(folder)
    if facts.fingerprint != fingerprint:
        raise CheckpointError(
            "the checkpoint belongs to a run with another identity",
            key="fingerprint",
            found=f"{facts.fingerprint} in {folder}",
            allowed=fingerprint,
            fix="start a new run from it with init_from, or undo the change of the config",
        )
    _refuse_other_steps(folder, facts, skip_steps)
    # By way of the host: a device may have no room for the whole of them.
    load_model(model, load_file(folder / WEIGHTS))
    load_optimizer(optimizer, torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu"))
    return facts


def _refuse_other_steps(folder: Path, facts: Facts, skip_steps: Sequence[int]) -> None:
    due, done = {step for step in skip_steps if step < facts.step}, set(facts.skipped)
    if left_out := sorted(done - due):
        raise CheckpointError(
            "the checkpoint was made without steps that are now to be trained on",
            key="training.skip_steps",
            found=f"{sorted(skip_steps)}, and {folder} was made without {left_out}",
            fix="add these steps to training.skip_steps, or give this run another name",
        )
    if trained := sorted(due - done):
        raise CheckpointError(
            "the checkpoint has been trained on steps that are now to be left out",
            key="training.skip_steps",
            found=f"{trained}, and {folder} is of step {facts.step}",
            allowed=f"further steps from {facts.step} on",
            fix="take these steps out of training.skip_steps, or give this run another name",
        )


def warn_of_differences(then: Facts, now: Facts) -> None:
    """Say what may keep a resumed run from being bit-equal. It stays exact in its data all the same."""
    changes = [
        f"{name} {old} → {new}"
        for name, old, new in (
            ("workers", then.world_size, now.world_size),
            ("threads", then.threads, now.threads),
            # What was not noted then may be the same.
            *((k, then.packages[k], v) for k, v in now.packages.items() if k in then.packages),
        )
        if old != new
    ]
    if changes:
        log.warning("Resumed under other conditions; same data, but not the same bits: %s", ", ".join(changes))


@contextmanager
def on_disk(storage: Storage) -> Iterator[Path]:
    """The checkpoint at a place as a local folder: itself, or a copy that is deleted afterwards.

    Raises:
        StorageError: it cannot be read, or there is no room for the copy.
    """
    if storage.is_local:
        yield Path(storage.uri)
        return
    with temporary_folder(storage.uri) as folder:
        copy(storage, folder)
        yield folder


def copy(storage: Storage, folder: Path) -> None:
    """The files of a place into a folder of this machine, that which says that the others are whole last.

    Raises:
        StorageError: they cannot be read, or there is no room for them, in the folder of temporary files.
    """
    with room_for_temporary(storage.uri):
        for name in sorted(storage.list_names(), key=lambda n: n == STATE):
            with (folder / name).open("wb") as file:
                file.writelines(storage.read_pieces(name))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of each package, as it is installed; `unknown` where it is run from a source tree."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def on_host(state: Any) -> Any:
    """A copy on the host of a state's tensors, in whatever dictionaries and lists they are."""
    return _each(state, lambda tensor: whole(tensor.detach()).to("cpu", copy=True))


def _each(state: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """The function of every tensor, in the order of the state."""
    if isinstance(state, torch.Tensor):
        return function(state)
    if isinstance(state, dict):
        return {k: _each(v, function) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_each(v, function) for v in state)
    return state


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
