"""What a shard's footer costs beside a row group of its images: python tests/benchmarks/footers.py.

The data path is to read, decode and crop to 224 pixels. Seconds are of one thread's CPU, which a busy machine changes
less than the clock; requests and bytes are counted by a proxy before an S3 API on this machine.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests")]

from maskray.config.schema import RandomResizedCrop  # noqa: E402
from maskray.data import crop, row_groups  # noqa: E402
from maskray.data.decode import decode  # noqa: E402
from maskray.data.row_groups import ParquetPlace, read_row_group  # noqa: E402
from maskray.data.shards import SHARD_SCHEMA, Row, write_shard  # noqa: E402
from maskray.data.storage import Storage  # noqa: E402
from object_store import FaultyProxy, moto_server, new_bucket  # noqa: E402

SAMPLE = ROOT.parent / "shared" / "data" / "imagenet-sample-500.tar"
COLUMNS = ("key", "image", "label")
SHARDS, SHORT_SIDE, QUALITY = 100_000, 256, 92


def main() -> None:
    """Print a table and, last, a line of JSON."""
    options = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="maskray-bench-") as folder:
        file = _shard(Storage(folder), options)
        numbers = _seconds_and_bytes(file, options) | _requests(file)
    group_bytes, per_group = numbers["group_bytes"], numbers["read_ms"] + numbers["decode_crop_ms"]
    numbers |= {
        "miss_time_share": (numbers["parse_ms"] + numbers["fetch_ms"]) / per_group,
        "parse_time_share": numbers["parse_ms"] / per_group,
        "miss_bytes_share": numbers["missed_bytes"] / numbers["known_bytes"] - 1,
        "all_footers_gb": SHARDS * numbers["footer_bytes"] / 1e9,
        "all_parsed_gb": SHARDS * numbers["parsed_bytes"] / 1e9,
    }
    for what, value in (
        (f"footer of {options.groups} row groups", f"{numbers['footer_bytes']:,} bytes"),
        ("   parsed, in memory", f"{numbers['parsed_bytes']:,} bytes"),
        ("   to read it here, then to parse it", f"{numbers['fetch_ms']:.2f} ms, {numbers['parse_ms']:.2f} ms"),
        (f"row group of {options.rows} images", f"{group_bytes:,} bytes"),
        ("   read here, the footer at hand", f"{numbers['read_ms']:.2f} ms"),
        ("   decode and crop", f"{numbers['decode_crop_ms']:.1f} ms"),
        ("requests for a row group on S3: footer kept", f"{numbers['known_requests']}"),
        ("   footer not kept, its shard read before", f"{numbers['missed_requests']}"),
        ("   the first of a shard", f"{numbers['first_requests']}"),
        ("   pyarrow by itself, each time", f"{numbers['pyarrow_requests']}"),
        ("where no footer is ever kept: of the data path's time", f"{numbers['miss_time_share']:.1%}"),
        ("   of the bytes that are read", f"{numbers['miss_bytes_share']:.1%}"),
        (f"footers of {SHARDS:,} shards, as bytes and parsed", f"{numbers['all_footers_gb']:.1f} GB, "
         f"{numbers['all_parsed_gb']:.0f} GB"),
    ):  # fmt: skip
        print(f"{what:<56}{value}")
    print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=SAMPLE, help="a tar of JPEG files")
    parser.add_argument("--groups", type=int, default=128, help="row groups in the shard [128]")
    parser.add_argument("--rows", type=int, default=64, help="images in a row group [64]")
    parser.add_argument("--repeats", type=int, default=21, help="of which the median is taken [21]")
    return parser.parse_args()


def _images(path: Path, number: int) -> Iterator[tuple[bytes, int, int]]:
    """JPEG files as `ingest --resize-short 256` would write them, with width and height."""
    with tarfile.open(path) as archive:
        for member in (m for m in archive if m.isfile()):
            if number == 0:
                return
            number -= 1
            content = archive.extractfile(member)
            assert content is not None
            image = Image.open(content).convert("RGB")
            scale = SHORT_SIDE / min(image.size)
            small = ImageOps.scale(image, scale, Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=QUALITY)
            yield buffer.getvalue(), small.width, small.height


def _shard(storage: Storage, options: argparse.Namespace) -> ParquetPlace:
    images = list(_images(options.images, options.rows))
    rows = (
        Row(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG", image, i % 1000, width, height, 3, bytes(32))
        for i in range(options.groups * options.rows)
        for image, width, height in [images[i % len(images)]]
    )
    shard = write_shard(storage, "train/00000.parquet", rows, options.rows)
    return ParquetPlace(storage, shard.name, shard.size, shard.sha256, options.groups * len(SHARD_SCHEMA))


def _seconds_and_bytes(file: ParquetPlace, options: argparse.Namespace) -> dict[str, float]:
    footer = row_groups._read_footer(file)
    images = read_row_group(file, 0, COLUMNS)["image"].to_pylist()
    numbers = iter(range(10**9))

    def median_ms(work: Callable[[], object]) -> float:
        times = []
        for _ in range(options.repeats):
            start = time.thread_time()
            work()
            times.append((time.thread_time() - start) * 1e3)
        return statistics.median(times)

    def parse() -> Any:
        return pq.read_metadata(pa.BufferReader(footer))

    return {
        "footer_bytes": len(footer),
        "parsed_bytes": _memory(parse),
        "parse_ms": median_ms(parse),
        "fetch_ms": median_ms(lambda: row_groups._read_footer(file)),
        "group_bytes": sum(map(len, images)),
        "read_ms": median_ms(lambda: read_row_group(file, next(numbers) % options.groups, COLUMNS)),
        "decode_crop_ms": median_ms(lambda: _decode_crop(images)),
    }


def _decode_crop(images: list[bytes]) -> None:
    """As the stream does it: one view an image, 224 pixels, the MAE paper's crop."""
    decoded = [decode(data, 3) for data in images]
    sizes = torch.tensor([image.shape[1:] for image in decoded]).numpy()
    rows = torch.arange(len(images)).numpy()
    boxes = crop.draw_boxes(RandomResizedCrop(), sizes, seed=0, pass_=0, rows=rows, views=0 * rows)
    for image, box in zip(decoded, boxes, strict=True):
        crop.crop_resize(image, box, (224, 224), flip=False)


def _memory(make: Callable[[], object], number: int = 400) -> float:
    """Bytes that one takes in this process."""

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    kept = [make() for _ in range(20)]
    before = resident()
    kept += [make() for _ in range(number)]
    return (resident() - before) // number


def _requests(local: ParquetPlace) -> dict[str, float]:
    """Requests and bytes for one row group, by what is known of its shard."""
    with moto_server() as url, FaultyProxy(url, {}) as proxy:
        storage = Storage(new_bucket(url, os.environ.__setitem__))
        with storage.open_output(local.name) as stream:
            stream.write(Path(local.storage.join(local.name)).read_bytes())
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        storage = Storage(storage.uri)
        file = ParquetPlace(storage, local.name, local.size, local.digest, local.chunks)
        row_groups.FOOTERS = row_groups.Footers(2**20)

        def counted(work: Callable[[], object]) -> tuple[int, int]:
            proxy.forget()
            work()
            return proxy.requests.total(), proxy.sent_bytes

        def missed() -> None:
            row_groups.FOOTERS.drop((storage.uri, file.name, file.digest))
            read_row_group(file, 1, COLUMNS)

        def alone() -> None:
            with storage.open_input_file(file.name) as source:
                pq.ParquetFile(source).read_row_group(1, columns=list(COLUMNS), use_threads=False)

        first, _ = counted(lambda: read_row_group(file, 0, COLUMNS))
        known, known_bytes = counted(lambda: read_row_group(file, 1, COLUMNS))
        again, missed_bytes = counted(missed)
        return {
            "first_requests": first,
            "known_requests": known,
            "known_bytes": known_bytes,
            "missed_requests": again,
            "missed_bytes": missed_bytes,
            "pyarrow_requests": counted(alone)[0],
        }


if __name__ == "__main__":
    main()
