"""What the benchmarks read: a few hundred photographs, repeated, as files in class folders and as a dataset.

The repeats of a picture differ by a comment in the JPEG, so that no side can keep or drop them as equal.
"""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT.parent / "shared" / "data" / "imagenet-sample-500.tar"
WORK = ROOT / "runs" / "bench"

sys.path.insert(0, str(ROOT / "platform"))

from maskray.config.load import merge, parse  # noqa: E402
from maskray.config.resolve import resolve  # noqa: E402
from maskray.config.schema import IngestConfig, RunConfig  # noqa: E402
from maskray.data.ingest import ingest, thread_mapper  # noqa: E402
from maskray.data.shards import Dataset  # noqa: E402
from maskray.data.stream import StreamSpec  # noqa: E402

GROUP_ROWS = 64
_START_OF_IMAGE, _COMMENT = b"\xff\xd8", b"\xff\xfe"


def make_files(work: Path, rows: int, *, short_side: int | None = None, square: int | None = None) -> Path:
    """A folder with a folder of JPEG files for each class, as ImageFolder wants it; made once.

    Args:
        work: where it goes.
        rows: number of files.
        short_side: to encode anew at this many pixels, as `maskray ingest` with `resize_short` does; None keeps the
            files as they came.
        square: to encode anew as squares of this many pixels.
    """
    kind = f"short-{short_side}" if short_side else f"square-{square}" if square else "original"
    folder = work / f"files-{kind}-{rows}"
    if folder.exists():
        return folder
    if not ARCHIVE.exists():
        raise SystemExit(f"There are no photographs to measure with: {ARCHIVE} is missing.")
    partial = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    pictures = [(name, _encode_anew(data, short_side, square)) for name, data in _pictures()]
    for number, (name, data) in enumerate(islice(cycle(pictures), rows)):
        target = partial / name.partition("_")[0] / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_with_comment(data, str(number).encode()))
    partial.rename(folder)
    return folder


def make_dataset(files: Path) -> Dataset:
    """The same images as shards of row groups of 64; made once, and recognised afterwards."""
    destination = files.with_name(files.name.replace("files-", "shards-"))
    if not (destination / "manifest.json").exists():
        config = IngestConfig(
            source=str(files), destination=str(destination), group_rows=GROUP_ROWS, held_out_fraction=0.0
        )
        ingest(config, thread_mapper(2))
    return Dataset.open(str(destination))


def make_spec(dataset: Dataset, *, global_batch: int, steps: int, **data: Any) -> tuple[RunConfig, StreamSpec]:
    """The stream of a run on the dataset with the paper's crops and masks (RandomResizedCrop(224, 0.2 to 1), flip)."""
    sections = {
        "name": "bench",
        "data": {"path": dataset.storage.uri, "stream": "ray"},
        "optim": {"global_batch": global_batch, "steps": steps, "warmup_steps": 0},
    }
    config = parse(RunConfig, merge(sections, {"data": data}))
    return config, StreamSpec.of(config, resolve(config, dataset.facts()), dataset)


def _pictures() -> Iterator[tuple[str, bytes]]:
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            if member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                yield Path(member.name).name, file.read()


def _encode_anew(data: bytes, short_side: int | None, square: int | None) -> bytes:
    if short_side is None and square is None:
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if square:
        size = (square, square)
    else:
        scale = min(1.0, short_side / min(image.size))
        size = (round(image.width * scale), round(image.height * scale))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
    return out.getvalue()


def _with_comment(data: bytes, text: bytes) -> bytes:
    assert data.startswith(_START_OF_IMAGE)
    return _START_OF_IMAGE + _COMMENT + (len(text) + 2).to_bytes(2, "big") + text + data[2:]
