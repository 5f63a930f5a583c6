"""kill -9 of an embedding, on Ray and in threads: it ends with the bytes of one that was left alone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from maskray.config.embedding import EmbedConfig
from maskray.config.load import load_as
from maskray.embedding.table import embed_here, prepare

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120


@pytest.fixture
def asked(digits, digits_encoder, tmp_path) -> dict:
    """What is embedded: parts of one row group, so that there is always one to be killed in."""
    return {
        "encoder": str(digits_encoder),
        "images": str(digits),
        "destination": str(tmp_path / "killed"),
        "batch": 16,
        "part_rows": 16,
        "cluster": {"workers": 2, "embedded_cpus": 2},
    }


def start(asked, folder, launcher):
    (folder / "embed.yaml").write_text(yaml.safe_dump(asked))
    command = [sys.executable, "-m", "maskray.cli", "embed", "--config", str(folder / "embed.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    with (folder / "output.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--launcher", launcher], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def parts(folder) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("[th]*.parquet")}


def kill_after(number, process, folder):
    """SIGKILL once there are so many parts, until all that it has started is gone."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(parts(folder)) < number:
        assert process.poll() is None, (folder.parent / "output.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in psutil.wait_procs(children, timeout=1)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGKILL)


@pytest.mark.ray
def test_kills_change_nothing(asked, tmp_path):
    killed, left_alone = tmp_path / "killed", tmp_path / "left-alone"
    for launcher, number in (("ray", 20), ("torch", 60)):
        before = parts(killed)
        kill_after(number, start(asked, tmp_path, launcher), killed)
        there = parts(killed)
        assert number <= len(there) < 113, "the kill came too late"
        assert before.items() <= there.items(), "a part that was there was written again"
        assert not (killed / "_manifest.json").exists()
    process = start(asked, tmp_path, "torch")
    assert process.wait(PATIENCE_SECONDS) == 0, (tmp_path / "output.log").read_text()[-3000:]
    assert there.items() <= parts(killed).items()

    (tmp_path / "other.yaml").write_text(yaml.safe_dump(asked | {"destination": str(left_alone)}))
    embed_here(prepare(load_as(EmbedConfig, tmp_path / "other.yaml")), lambda done, total, phase: None)
    one, other = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (killed, left_alone))
    assert one == other
    keys = pq.read_table(killed)["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 1797
