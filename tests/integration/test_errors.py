"""A user's mistakes on the command line: exit code 2 and one readable paragraph, before anything is started."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml

from maskray import cli, preparing
from maskray.config.schema import RunConfig
from maskray.data import lease
from maskray.on_ray import worker
from maskray.preparing import Prepared, prepare
from maskray.pretrain import pretrain
from maskray.tracking.base import MemoryTracker
from maskray.training.context import LocalContext

Say = Callable[..., str]


@pytest.fixture
def refuse(tiny: Callable[..., RunConfig], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs the command with overrides; the paragraph that it says."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny().model_dump(mode="json")))

    def run(*overrides: str, key: str, found: str, launcher: str = "torch") -> str:
        sets = [part for item in overrides for part in ("--set", item)]
        assert cli.main(["pretrain", "--config", str(path), "--launcher", launcher, *sets]) == cli.USER_MISTAKE
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "\n\n" not in said.strip(), "one paragraph"
        words = " ".join(said.split())
        assert f" {key}: " in words, "the key"
        assert found in words, "the value found"
        assert re.search("Allowed: |What to do: |Did you mean ", words), "a way out"
        return words

    return run


@pytest.fixture
def copied(digits: Path, tmp_path: Path) -> Path:
    """The digits, to be damaged."""
    return Path(shutil.copytree(digits, tmp_path / "copied"))


def test_unknown_key(refuse: Say):
    refuse("optim.bass_lr=1", key="optim.bass_lr", found="Did you mean optim.base_lr?")
    refuse("mask_ratio=0.5", key="mask_ratio", found="Did you mean mask.ratio?")


def test_wrong_type(refuse: Say):
    assert "Allowed: an integer" in refuse("optim.global_batch=many", key="optim.global_batch", found="'many'")


def test_image_that_the_patch_does_not_divide(refuse: Say):
    assert "Allowed: 8 or 10" in refuse("data.image_size=9", key="data.image_size", found="image height 9")


def test_more_workers_than_row_groups_in_a_step(refuse: Say):
    assert "Allowed: 1 to 4" in refuse("cluster.workers=5", key="cluster.workers", found="Found: 5")


def test_missing_dataset(refuse: Say, tmp_path: Path):
    said = refuse(f"data.path={tmp_path}/nothing", key="data.path", found=f"{tmp_path}/nothing")
    assert "maskray ingest" in said


def test_half_written_dataset(refuse: Say, copied: Path):
    (copied / "manifest.json").unlink()
    said = refuse(f"data.path={copied}", key="data.path", found=str(copied))
    assert "did not finish" in said
    assert "ingest again" in said


def test_a_flipped_byte_in_a_shard(refuse: Say, copied: Path):
    shard = next((copied / "train").glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    said = refuse(f"data.path={copied}", key="data.path", found=shard.name)
    assert "checksum" in said


@pytest.mark.ray
def test_a_shard_that_only_a_task_of_ray_data_finds_damaged(refuse: Say, copied: Path):
    shard = copied / "train" / "00000.parquet"
    content, footer = bytearray(shard.read_bytes()), pq.read_metadata(shard)
    for number in range(footer.num_row_groups):
        chunk = footer.row_group(number).column(1)
        content[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 1
    shard.write_bytes(content)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (copied / "manifest.json").write_text(json.dumps(manifest))
    settings = (f"data.path={copied}", "data.stream=ray", "cluster.embedded_cpus=4")
    said = refuse(*settings, launcher="ray", key="data.path", found="CRC")
    assert re.search(r"row group \d+ of train/00000.parquet cannot be read", said)
    assert "data.unreadable: skip" in said


def test_mlflow_that_does_not_answer(refuse: Say):
    start = time.monotonic()
    refuse("tracking.uri=http://127.0.0.1:9", key="tracking.uri", found="127.0.0.1:9")
    assert time.monotonic() - start < 60


def test_a_folder_that_cannot_be_written(refuse: Say, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    said = refuse(f"storage.path={tmp_path}/file/runs", key="storage.path", found=f"{tmp_path}/file/runs (Not a dir")
    assert ".tmp-" not in said


def test_weights_that_are_not_there(refuse: Say, tmp_path: Path):
    refuse(f"init_from={tmp_path}/gone.pth", key="init_from", found=f"{tmp_path}/gone.pth (there is no such file)")


@pytest.fixture
def changed_state(tiny: Callable[..., RunConfig]) -> Callable[..., None]:
    """Trains a little, for a real checkpoint, and changes what its state says."""

    def change(**changes: object) -> None:
        prepared = prepare(tiny())
        run = Path(prepared.run.uri)
        pretrain(prepared.config, LocalContext(run, prepared.config.data), MemoryTracker())
        for state in run.glob("step_*/state.json"):
            state.write_text(json.dumps(json.loads(state.read_text()) | changes))

    return change


def test_a_checkpoint_of_another_run(refuse: Say, changed_state: Callable[..., None]):
    changed_state(fingerprint="of another run")
    said = refuse(key="fingerprint", found="of another run")
    assert "another identity" in said
    assert "init_from" in said


def test_a_checkpoint_of_another_schema_version(refuse: Say, changed_state: Callable[..., None]):
    changed_state(schema_version=99)
    refuse(key="schema_version", found="Found: 99 in ")


@pytest.mark.parametrize("launcher", ["torch", "ray"])
def test_the_same_run_launched_twice(
    refuse: Say, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, launcher: str
):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("a cluster is started for nothing"))
    prepared = prepare(tiny())
    held = "import sys, time; from maskray.data.storage import Storage; from maskray.data import lease\n"
    held += "with lease.hold(Storage(sys.argv[1]), 'x'):\n    print('held', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", held, prepared.run.uri]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root / "platform") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        said = refuse(key="name", found=f"process {other.pid}", launcher=launcher)
        other.kill()
    assert "running already" in said
    holder = lease.holder_of(prepared.run)
    assert holder is not None
    assert not holder.is_alive()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["cluster.cpus_per_worker=64", "cluster.embedded_cpus=2", "data.stream=ray"], "63 CPUs short"),
        (["cluster.gpus_per_worker=8", "cluster.embedded_cpus=4"], "8 GPUs"),
    ],
)
def test_more_than_the_cluster_has(refuse: Say, overrides: list[str], found: str):
    refuse(*overrides, key="cluster.workers", found=found, launcher="ray")


@pytest.mark.ray
def test_a_shard_that_is_damaged_while_the_run_starts(
    refuse: Say, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A task of Ray Data meets it: the same paragraph, and the workers are not started again for it."""
    starts = tmp_path / "starts"

    def prepare_and_damage(config: RunConfig, commit: str | None) -> Prepared:
        prepared = prepare(config, commit)
        for shard in (copied / "train").glob("*.parquet"):
            shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
        return prepared

    def counted(settings: dict) -> dict:
        with starts.open("a") as file:
            file.write("started\n")
        from maskray.on_ray.worker import run

        return run(settings)

    monkeypatch.setattr(preparing, "prepare", prepare_and_damage)
    monkeypatch.setattr(worker, "run", counted)
    cluster = ("cluster.embedded_cpus=2", "cluster.max_failures=2")
    shard = f"{copied}/train/00000.parquet"
    said = refuse(f"data.path={copied}", "data.stream=ray", *cluster, key="data.path", found=shard, launcher="ray")
    assert "ingest again" in said
    assert starts.read_text() == "started\n"
