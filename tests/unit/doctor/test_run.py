"""The config, its dataset and its run."""

import json
import time
from dataclasses import asdict, replace

from maskray.data import lease
from maskray.data.storage import Storage
from maskray.doctor import run
from maskray.doctor.examination import examine
from maskray.doctor.finding import Level, Subject
from maskray.errors import ConfigError


def test_without_a_config_there_is_nothing_to_say():
    assert {check.look(Subject()) for check in run.CHECKS} == {None}


def test_a_wrong_config(looked, tiny):
    error = ConfigError("unknown key", key="typo", fix="leave it out")
    found = looked(run.config, Subject(config_error=error))
    assert (found.level, found.found, found.fix) == (Level.FAIL, "typo: unknown key", "leave it out")
    secret = tiny(storage={"path": "s3://key:secret@bucket/runs"})
    found = looked(run.config, Subject(config=secret))
    assert found.level is Level.FAIL
    assert ":secret@" not in found.found


def test_a_dataset_that_is_not_there_or_does_not_fit(looked, tiny, tmp_path):
    assert looked(run.dataset, Subject(config=tiny(data={"path": str(tmp_path)}))).level is Level.FAIL
    found = looked(run.dataset, Subject(config=tiny(optim={"global_batch": 50})))
    assert found.level is Level.FAIL
    assert "optim.global_batch" in found.found


def test_weights_to_start_from_that_are_not_there(looked, tiny, tmp_path):
    found = looked(run.dataset, Subject(config=tiny(init_from=str(tmp_path / "nowhere.safetensors"))))
    assert found.level is Level.FAIL
    assert "init_from" in found.found


def test_a_shard_that_was_changed(looked, known, tmp_path, digits):
    copy = Storage(tmp_path / "copy")
    for path in (p for p in digits.rglob("*") if p.is_file()):
        copy.write_bytes(path.relative_to(digits).as_posix(), path.read_bytes())
    subject = known(data={"path": copy.uri})
    assert looked(run.checksums, subject).level is Level.OK
    name = subject.dataset.manifest.shards[0].name
    content = bytearray(copy.read_bytes(name))
    content[len(content) // 2] ^= 1
    copy.write_bytes(name, bytes(content))
    found = looked(run.checksums, subject)
    assert found.level is Level.FAIL
    assert "checksum" in found.found


def test_workers_that_do_not_divide_a_step(looked, known):
    assert looked(run.shares, known(cluster={"workers": 2})).level is Level.OK
    found = looked(run.shares, known(cluster={"workers": 3}))
    assert (found.level, found.fix) == (Level.WARNING, "--set cluster.workers=2")


def test_a_run_that_is_running_is_well(looked, known):
    subject = known()
    folder = Storage(subject.config.storage.path).child(subject.plan.run_name)
    holder = replace(lease.Holder.this_process(), host="elsewhere", heartbeat=time.time())
    folder.write_bytes(lease.LEASE, json.dumps(asdict(holder)).encode())
    found = looked(run.held, subject)
    assert found.level is Level.OK
    assert f"is running, process {holder.pid} on elsewhere, last heard of 0 s ago" in found.found
    dead = replace(holder, heartbeat=time.time() - 2 * lease.STALE_SECONDS)
    folder.write_bytes(lease.LEASE, json.dumps(asdict(dead)).encode())
    found = looked(run.held, subject)
    assert (found.level, "nobody has it" in found.found) == (Level.OK, True)


def test_an_object_store_that_is_away_is_said_once_and_not_waited_for(looked, tiny, bucket, monkeypatch):
    config = tiny(storage={"path": f"{bucket}/runs"}, data={"path": f"{bucket}/data"})
    assert looked(run.object_store, Subject(config=config)).level is Level.OK
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    subject = Subject(config=config)
    start = time.monotonic()
    found = dict(examine(subject, ["run", "machine", "cluster", "places"]))
    assert (found.pop("S3").level, found.pop("config").level) == (Level.FAIL, Level.OK)
    assert [found[name] for name in ("dataset", "run", "memory", "storage", "checkpoints", "clock")] == [None] * 6
    assert time.monotonic() - start < 10
