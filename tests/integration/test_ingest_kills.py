"""kill -9 of an ingest, again and again: it ends with the bytes of one that was left alone."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.alone  # a kill must come in time

ROOT = Path(__file__).parents[2]
IMAGES, CHUNK = 400, 16
SCRIPT = """
import sys
sys.path.insert(0, {platform!r})
from maskray.config.schema import IngestConfig
from maskray.data import ingest, mapper, survey

survey.CHUNK_IMAGES = ingest.CHUNK_IMAGES = {chunk}
config = IngestConfig(
    source={source!r}, destination={destination!r}, group_rows=8, groups_per_shard=2, held_out_fraction=0.2,
    resize_short=48, deduplicate=True, max_bad_fraction=0.1,
)
ingest.ingest(config, mapper.thread_mapper(2), lambda *told: print(*told, flush=True))
"""


@pytest.fixture
def pictures(tmp_path):
    """Some smaller than the size that they are resized to, some twice there, some no images."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(IMAGES):
        size = (random.Random(i).randint(30, 200), random.Random(-i).randint(30, 200))
        coarse = np.random.default_rng(i // 2 if i % 40 == 1 else i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg")
    for i in range(0, IMAGES, 50):
        (folder / f"{i:03d}-again.jpg").write_bytes((folder / f"{i:03d}.jpg").read_bytes())
        (folder / f"{i:03d}-bad.jpg").write_bytes((folder / f"{i:03d}.jpg").read_bytes()[:300])
    return folder


def start(source, destination):
    script = SCRIPT.format(
        platform=str(ROOT / "platform"), chunk=CHUNK, source=str(source), destination=str(destination)
    )
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def finish(source, destination):
    """Every file that an ingest leaves."""
    process = start(source, destination)
    process.communicate(timeout=240)
    assert process.returncode == 0
    return {path.relative_to(destination): path.read_bytes() for path in destination.rglob("*") if path.is_file()}


def kill(source, destination, share, jitter_seconds):
    """SIGKILL a moment after a share of all the work is done; whether it was still at work, and what it began with."""
    process, began = start(source, destination), {}
    for line in process.stdout:
        done, total, phase = line.split()
        began.setdefault(phase, int(done))
        if (int(done) / int(total) + (phase == "write")) / 2 >= share:
            time.sleep(jitter_seconds)
            process.kill()
            break
    process.communicate(timeout=240)
    return process.returncode == -signal.SIGKILL, began


def killed_many_times(pictures, tmp_path, kills):
    expected = finish(pictures, tmp_path / "quiet")
    draws = random.Random(kills)
    shares = [(i + draws.random()) / kills * 0.95 for i in range(kills)]  # one in each part of its length
    hits, began = zip(*(kill(pictures, tmp_path / "killed", s, draws.uniform(0, 0.03)) for s in shares), strict=True)
    assert sum(hits) > kills / 2
    # A kill that came after the manifest leaves the next run nothing to check.
    assert max(b.get("check", 0) for b in began) > 0, "nothing was taken over"
    assert finish(pictures, tmp_path / "killed") == expected
    assert {path.parts[0] for path in expected} == {
        *("manifest.json", "versions", "train", "held_out", "quarantine.parquet")
    }


def test_three_kills_change_nothing(pictures, tmp_path):
    killed_many_times(pictures, tmp_path, 3)


@pytest.mark.slow
def test_ten_kills_change_nothing(pictures, tmp_path):
    killed_many_times(pictures, tmp_path, 10)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_source_that_changed_between_a_kill_and_the_next_run_is_read_anew(pictures, tmp_path, share):
    kill(pictures, tmp_path / "killed", share, 0)
    (pictures / "003.jpg").write_bytes((pictures / "005.jpg").read_bytes())
    (pictures / "007.jpg").unlink()
    assert finish(pictures, tmp_path / "killed") == finish(pictures, tmp_path / "elsewhere")
