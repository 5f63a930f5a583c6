"""Memory of all processes and of the object store, 20,000 rows against 200,000: python tests/benchmarks/memory.py

A process starts a Ray cluster and reads a dataset of so many rows through Ray Data in one execution; another one looks
four times a second at the proportional set size (PSS) of all its processes: what they hold alone, and their shares of
what they hold together. Pages of Ray's object store are shared memory, so they are in it, once; a page counts from when
it was first touched, so the store never shrinks.

The images are JPEGs of 64 × 64 pixels, or it would last half an hour. That makes the test harder: what is in flight is
bounded by row groups, which are small then, so what grows with the rows (records of tasks, footers, the manifest,
leaks) would be a larger share of the whole.

What must come out: the peak with ten times the rows is at most 1.15 times as high.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from corpus import GROUP_ROWS, make_dataset, make_spec
from measure import Report, alternate, arguments, ratios
from photographs import WORK, make_files

FEW, MANY = 20_000, 200_000
SIDE_PIXELS = 64
PERIOD_SECONDS = 0.25
OBJECT_STORE_BYTES = 512 * 2**20


class Memory(NamedTuple):
    """In MiB."""

    processes: float
    shared: float
    """Shared memory: the object store."""

    @property
    def total(self) -> float:
        """Both."""
        return self.processes + self.shared


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, repeats=2)
    parser.add_argument("--many", type=int, default=MANY, help="rows of the larger dataset (default: %(default)s)")
    parser.add_argument("--stream", type=int, metavar="ROWS", help="only read a dataset of so many rows")
    options = parser.parse_args()
    if options.stream:
        read(options.stream)
        return
    peaks: dict[str, list[Memory]] = {}

    def peak(rows: int) -> float:
        make_dataset(make_files(WORK, rows, square=SIDE_PIXELS))
        peaks.setdefault(f"{rows:,} rows", []).append(found := peak_of(rows))
        return found.total

    few, many = f"{FEW:,} rows", f"{options.many:,} rows"
    totals = alternate({few: lambda: peak(FEW), many: lambda: peak(options.many)}, options.repeats)
    report = Report("peak memory", options.json)
    for name, found in peaks.items():
        report.add(f"{name}: processes and object store", totals[name], "MiB")
        report.add(f"{name}: of it processes", [memory.processes for memory in found], "MiB")
        report.add(f"{name}: of it object store", [memory.shared for memory in found], "MiB")
    report.add(f"{many} / {few}", ratios(totals[many], totals[few]), "×", at_most=1.15)
    report.show()


def read(rows: int) -> None:
    """The stream of one pass over a dataset, as a trainer would take it."""
    import embedded

    from maskray.data.storage import Storage
    from maskray.on_ray import stream

    dataset = make_dataset(make_files(WORK, rows, square=SIDE_PIXELS))
    num_groups = rows // GROUP_ROWS
    config, spec = make_spec(dataset, global_batch=GROUP_ROWS, steps=num_groups, image_size=SIDE_PIXELS)
    with embedded.cluster(cpus=2, object_store_bytes=OBJECT_STORE_BYTES) as folder:
        (segment,) = stream.datasets(spec, Storage(folder / "none"), 1, config.data).values()
        units = segment().open()
        units.context.execution_options = stream.execution_options(config.data)
        prefetch = config.data.prefetch_groups
        number = sum(1 for _ in units.iter_batches(batch_size=None, prefetch_batches=prefetch))
    assert number >= num_groups


def peak_of(rows: int) -> Memory:
    """Highest total while another process reads."""
    command = [sys.executable, __file__, "--stream", str(rows)]
    peak = Memory(0.0, 0.0)
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid), key=lambda memory: memory.total)
            time.sleep(PERIOD_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    return peak


def memory_of(pid: int) -> Memory:
    """Of a process and all below it, now."""
    processes = shared = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return Memory(0.0, 0.0)
    for member in family:
        try:
            text = Path(f"/proc/{member.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):  # gone in the meantime
            continue
        kib = {name: int(value) for name, value in re.findall(r"^(Pss\w*):\s+(\d+) kB", text, re.MULTILINE)}
        processes += kib.get("Pss", 0) - kib.get("Pss_Shmem", 0)
        shared += kib.get("Pss_Shmem", 0)
    return Memory(processes / 1024, shared / 1024)


if __name__ == "__main__":
    main()
