"""A run's data from an object store that fails: exactly the plan's rows. And what a run keeps there."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskray.config.resolve import resolve
from maskray.config.schema import RunConfig
from maskray.data import lease, row_groups
from maskray.data import storage as storage_module
from maskray.data.local import LocalStream
from maskray.data.retry import RETRIES, Patience
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.data.stream import Unit
from maskray.errors import RunConflictError, StorageError, UnreachableError
from maskray.training import checkpoint, folders
from object_store import FaultyProxy

KINDS = ("throttle", "reset", "short")


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(tries=12, first_wait_seconds=0.01))
    monkeypatch.setattr(row_groups, "FOOTERS", row_groups.Footers(2**20))
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.1)


def spec_of(config: RunConfig) -> StreamSpec:
    dataset = Dataset.open(config.data.path)
    return StreamSpec.of(config, resolve(config, dataset.facts()), dataset)


def assert_same(got: list[Unit], wanted: list[Unit]) -> None:
    assert [(u.position, u.keys) for u in got] == [(u.position, u.keys) for u in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        for name in ("images_NCHW", "visible_NHW", "weights_N"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_stream_through_faults_is_the_plans_to_the_bit(
    tiny: Callable[..., RunConfig], digits_in_bucket: str, proxy: FaultyProxy, share: float
):
    sections = {"optim": {"steps": 60, "global_batch": 64}, "data": {"views_per_image": 2}}
    with LocalStream(spec_of(tiny(**sections))) as stream:
        wanted = list(stream)
    assert len(wanted) == 120, "more than a pass over all row groups"
    before = RETRIES.count
    proxy.shares = dict.fromkeys(KINDS, share / len(KINDS))
    config = tiny(**sections | {"data": {"views_per_image": 2, "path": digits_in_bucket}})
    with LocalStream(spec_of(config), threads=4) as stream:
        got = list(stream)
    proxy.shares = {}
    assert_same(got, wanted)
    assert set(proxy.faults) == set(KINDS), proxy.faults
    assert proxy.faults.total() > share / 2 * proxy.requests.total(), "else this test shows nothing"
    assert RETRIES.count > before


def test_a_store_that_is_away_for_seconds_costs_only_those(
    tiny: Callable[..., RunConfig],
    digits_in_bucket: str,
    bucket: str,
    proxy: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
):
    """For readers and writers, as patient as they are in earnest."""
    monkeypatch.setattr(storage_module, "PATIENCE", Patience())
    sections = {"optim": {"steps": 40, "global_batch": 64}}
    with LocalStream(spec_of(tiny(**sections))) as stream:
        wanted = list(stream)
    config = tiny(**sections | {"data": {"path": digits_in_bucket}})
    with LocalStream(spec_of(config), threads=2, prefetch_groups=2) as stream:
        got = [next(stream) for _ in range(8)]
        proxy.forget()
        proxy.shares = {"away": 1.0}
        back = threading.Timer(3.0, proxy.shares.clear)
        back.start()
        Storage(f"{bucket}/runs").write_bytes("x/state.json", b"{}")
        back.join()
        got += stream
    assert_same(got, wanted)
    assert proxy.requests["GET"] > 0
    assert proxy.faults["away"] > 2
    assert Storage(f"{bucket}/runs").read_bytes("x/state.json") == b"{}"


def test_a_store_that_is_gone_for_a_while_is_counted_out_if_told(
    tiny: Callable[..., RunConfig], digits_in_bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(tries=2, first_wait_seconds=0.01))
    spec = spec_of(tiny(optim={"steps": 3}, data={"path": digits_in_bucket, "unreadable": "skip"}))
    with LocalStream(spec, threads=1, prefetch_groups=1) as stream:
        sound = [next(stream)]
        proxy.shares = {"throttle": 1.0}
        lost = [next(stream) for _ in range(3)]
        proxy.shares = {}
        sound += stream
    assert [u.position for u in sound + lost] == [0, *range(4, 12), 1, 2, 3]
    assert all(u.weights_N.all() for u in sound)
    assert not any(u.weights_N.any() for u in lost)
    dataset = Dataset.open(digits_in_bucket)
    proxy.shares = {"throttle": 1.0}
    with pytest.raises(UnreachableError, match=r"cannot read s3://.*/train/\d+.parquet"):
        list(LocalStream(replace(spec, unreadable="stop"), dataset))
    proxy.shares = {"refuse": 1.0}
    with pytest.raises(StorageError, match="ACCESS_DENIED"):
        list(LocalStream(spec, dataset))


def test_a_checkpoint_in_a_bucket_is_read_as_a_folder(
    tiny: Callable[..., RunConfig], bucket: str, proxy: FaultyProxy, tmp_path: Path
):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    facts = checkpoint.Facts(3, "0" * 16, 1, 1, {}, [])
    checkpoint.HostCopy(model, optimizer, facts, "name: x\n").write(tmp_path)
    target = Storage(f"{bucket}/runs").child("x-0123", folders.folder_name(3, "abc"))
    proxy.shares = dict.fromkeys(KINDS, 0.1)
    for file in sorted(tmp_path.iterdir(), key=lambda f: f.name == checkpoint.STATE):
        with target.open_output(file.name) as out:
            out.write(file.read_bytes())
    with checkpoint.on_disk(target) as folder:
        assert folder != tmp_path
        assert checkpoint.is_whole(folder)
        assert checkpoint.read_facts(folder) == facts
        other = torch.nn.Linear(3, 3)
        checkpoint.restore(folder, other, torch.optim.AdamW(other.parameters()), fingerprint="0" * 16)
        assert torch.equal(other.weight, model.weight)
    assert not folder.exists()


def test_a_lease_in_a_bucket_refuses_a_second_launch(bucket: str):
    run = Storage(f"{bucket}/runs/x-0123")
    with lease.hold(run, "x"):
        with pytest.raises(RunConflictError, match="the run x is running already"), lease.hold(run, "x"):
            pass
        assert lease.holder_of(run) is not None
    assert run.list_names() == []
    old = replace(lease.Holder.this_process(), host="another-host", heartbeat=0.0)
    run.write_bytes(lease.LEASE, json.dumps(asdict(old)).encode())
    with lease.hold(run, "x"):
        holder = lease.holder_of(run)
        assert holder is not None
        assert holder.token != old.token
