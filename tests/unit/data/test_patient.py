"""The file system that Ray Train is given, by Train's own hands: its record, its checkpoints, its clean-up."""

import pickle
import threading

import pytest
from pyarrow import fs
from ray.train.v2._internal.execution.context import StorageContext
from ray.train.v2._internal.execution.storage import delete_fs_path

from maskray.data import patient
from maskray.data import storage as storage_module
from maskray.data.retry import Patience
from maskray.data.storage import Storage
from object_store import FaultyProxy

KINDS = {"throttle": 0.2, "reset": 0.1, "away": 0.1}


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(tries=20, first_wait_seconds=0.01))


def test_a_local_folder_is_left_to_train(tmp_path):
    assert patient.for_train(Storage(tmp_path)) == {"storage_path": str(tmp_path)}


def test_what_train_does_comes_through_faults(bucket: str, proxy: FaultyProxy, in_a_hurry):
    root = Storage(f"{bucket}/runs")
    given = patient.for_train(root)
    proxy.shares = KINDS
    context = pickle.loads(pickle.dumps(StorageContext(given["storage_path"], "x", given["storage_filesystem"])))
    assert context.storage_filesystem == given["storage_filesystem"]
    for n in range(5):
        with context.storage_filesystem.open_output_stream(context.checkpoint_manager_snapshot_path) as stream:
            stream.write(b'{"n": ')
            stream.write(b"%d}" % n)
        for name in ("a", "b"):
            root.write_bytes(f"x/step_{n}/{name}", b"content")
        checkpoint = context.build_checkpoint_path_from_name(f"step_{n}")
        if n:
            delete_fs_path(context.storage_filesystem, checkpoint)
    with context.storage_filesystem.open_input_stream(context.checkpoint_manager_snapshot_path) as stream:
        assert stream.read() == b'{"n": 4}'
    selector = fs.FileSelector(context.experiment_fs_path, recursive=False)
    found = [i.base_name for i in context.storage_filesystem.get_file_info(selector) if i.base_name.startswith("step")]
    assert found == ["step_0"]
    proxy.shares = {}
    assert set(proxy.faults) == set(KINDS)
    assert Storage(f"{bucket}/runs/x").read_bytes("checkpoint_manager_snapshot.json") == b'{"n": 4}'


def test_an_outage_that_is_longer_than_pyarrows_patience(bucket: str, proxy: FaultyProxy):
    given = patient.for_train(Storage(f"{bucket}/runs"))
    filesystem, path = given["storage_filesystem"], f"{given['storage_path']}/record"
    proxy.shares = {"away": 1.0}
    back = threading.Timer(8.0, proxy.shares.clear)
    back.start()
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"{}")
    back.join()
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"{}"


def test_what_will_not_pass_is_raised_at_once(bucket: str, proxy: FaultyProxy):
    given = patient.for_train(Storage(f"{bucket}/runs"))
    proxy.shares = {"refuse": 1.0}
    with (
        pytest.raises(OSError, match="ACCESS_DENIED"),
        given["storage_filesystem"].open_output_stream(f"{given['storage_path']}/record") as stream,
    ):
        stream.write(b"{}")
    assert proxy.faults["refuse"] == 1
