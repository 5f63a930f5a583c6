"""Real encoded images, made here, and datasets of them."""

import contextlib
import faulthandler
import io

import numpy as np
import pytest
from PIL import Image

from maskray.config.schema import IngestConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper


def _picture(number, height=24, width=32):
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@contextlib.contextmanager
def _no_hang(seconds):
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def no_hang():
    """`with no_hang(seconds)`: the process ends with the stacks of all threads rather than hang.

    A decoder in C hears no other call.
    """
    return _no_hang


@pytest.fixture(scope="session")
def picture():
    """picture(number, height, width): a smooth colour image that no other number has."""
    return _picture


@pytest.fixture(scope="session")
def encoded():
    """encoded(image, kind, **options) -> bytes."""
    return _encoded


@pytest.fixture
def folder(tmp_path):
    """Fifty images of differing size and format in two class folders."""
    for i in range(50):
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"))[i % 2]
        path = tmp_path / "pictures" / ("cats", "dogs")[i % 3 == 0] / f"{i:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(_picture(i, 20 + i % 5, 24 + i % 7), kind))
    return tmp_path / "pictures"


@pytest.fixture
def ingest_here():
    """ingest_here(source, destination, **options) -> Manifest, in threads."""

    def run(source, destination, progress=None, **options):
        settings = {"group_rows": 8, "groups_per_shard": 2, "held_out_fraction": 0.2} | options
        config = IngestConfig(source=str(source), destination=str(destination), **settings)
        return ingest(config, thread_mapper(2), progress)

    return run
