"""Runs that were begun under another Ray: what is on record of it is altered, as that Ray would have left it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import StorageContext

from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.on_ray import record, upgrade
from maskray.on_ray.stream import SNAPSHOT
from maskray.training.checkpoint import Facts, HostCopy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint on record."""
    import torch

    run = tmp_path / "digits-0123"
    (run / "step_000000004-a").mkdir(parents=True)
    model = torch.nn.Linear(2, 2)
    facts = Facts(4, "0123", 1, 1, {}, [])
    HostCopy(model, torch.optim.AdamW(model.parameters()), facts, "name: digits").write(run / "step_000000004-a")
    record.settle(Storage(run))  # there was none: it is made of what is whole
    return run


def altered(run: Path, **changes: object) -> dict[str, Any]:
    """The record, with what another Ray would have written; None takes a key out."""
    found = json.loads((run / SNAPSHOT).read_text()) | changes
    (run / SNAPSHOT).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return found


def newest(run: Path) -> str:
    train = CheckpointManager(CheckpointConfig(), StorageContext(str(run.parent), run.name))
    assert train.latest_checkpoint_result is not None
    return Path(train.latest_checkpoint_result.checkpoint.path).name


def test_under_the_same_ray_there_is_nothing_to_say(run: Path, caplog: pytest.LogCaptureFixture):
    upgrade.look_at_record(Storage(run))
    assert caplog.text == ""


@pytest.mark.parametrize("then", ["2.59.1", "2.60.1", "3.0.0"])
def test_under_another_ray_it_is_named_and_the_run_goes_on(run: Path, caplog: pytest.LogCaptureFixture, then: str):
    altered(run, ray_version=then)
    with caplog.at_level(logging.WARNING):
        upgrade.look_at_record(Storage(run))
    assert f"begun under Ray {then}, and goes on under {ray.__version__}" in caplog.text
    record.settle(Storage(run))
    assert newest(run) == "step_000000004-a"


def test_a_ray_that_did_not_say_its_version(run: Path, caplog: pytest.LogCaptureFixture):
    altered(run, ray_version=None)
    with caplog.at_level(logging.WARNING):
        upgrade.look_at_record(Storage(run))
    assert "begun under Ray an unknown version" in caplog.text


def test_a_record_of_another_kind_is_refused_with_what_to_do(run: Path):
    (result,) = altered(run)["checkpoint_results"]
    altered(run, checkpoint_results=[result | {"version": 1}], ray_version="2.70.0")
    before = (run / SNAPSHOT).read_bytes()
    with pytest.raises(CheckpointError, match=r"go on under Ray 2\.70\.0; or move that file away") as refused:
        upgrade.look_at_record(Storage(run))
    assert (refused.value.key, refused.value.allowed) == ("version", f"0, by Ray {ray.__version__}")
    assert (run / SNAPSHOT).read_bytes() == before
    (run / SNAPSHOT).unlink()
    upgrade.look_at_record(Storage(run))
    record.settle(Storage(run))
    assert newest(run) == "step_000000004-a"


def test_a_record_that_another_ray_laid_out_otherwise_is_made_again(run: Path, caplog: pytest.LogCaptureFixture):
    altered(run, ray_version="2.52.0", checkpoint_results=None, checkpoints=[])
    with caplog.at_level(logging.WARNING):
        upgrade.look_at_record(Storage(run))
        record.settle(Storage(run))
    assert "begun under Ray 2.52.0" in caplog.text
    assert "goes on from its newest whole checkpoint, step_000000004-a" in caplog.text
    assert newest(run) == "step_000000004-a"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3"])
def test_a_torn_record_is_not_its_matter(run: Path, content: bytes, caplog: pytest.LogCaptureFixture):
    (run / SNAPSHOT).write_bytes(content)
    upgrade.look_at_record(Storage(run))
    (run / SNAPSHOT).unlink()
    upgrade.look_at_record(Storage(run))
    assert caplog.text == ""
