"""Images a second that reach the training process, two cores, steady state: python tests/benchmarks/delivery.py

The clock starts after 2048 images and stops with the last of `--images`. All sides in one process and one order, again
and again; a Ray cluster of two CPUs stays up meanwhile, and its workers are as nice as the others.

The bare torch DataLoader with `load_unit` is the yardstick: the same function, two processes, nothing else. Then the
ways maskray brings it to the trainer, and what a user would take otherwise (contenders.py).

What must come out: maskray through Ray Data at least 0.9 of the bare DataLoader, and more than each contender as its
documentation has it. `same decode` sides are shown for what they tell. On two cores Ray's own processes take about a
tenth of the time that could decode; with more cores that share falls.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import embedded
import ray.data
import torch
from contenders import PROCESSES, Loader, contenders
from corpus import GROUP_ROWS, make_dataset, make_spec
from measure import Report, alternate, arguments, ratios
from on_train import arrivals
from photographs import WORK, make_files
from torch.utils.data import DataLoader, Dataset

from maskray.config.schema import DataConfig
from maskray.data.local import LocalStream
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.data.stream import load_unit
from maskray.on_ray import stream

BARE, DIRECT = "bare DataLoader", "maskray, Ray Data"
NOT_NEEDED = "same decode"
ROWS = 8192
START = 32
"""Batches before the clock starts."""
SETTINGS = {"small": 256, "original": None}


def main() -> None:
    """Print a table for each setting."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--images", type=int, default=ROWS, help="in a repeat of a side (default: %(default)s)")
    parser.add_argument("--setting", choices=[*SETTINGS, "both"], default="both", help="files (default: %(default)s)")
    parser.add_argument("--sides", default="", help="only those whose name this regular expression finds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not 2 * START * GROUP_ROWS <= options.images <= ROWS:
        parser.error(f"--images must be {2 * START * GROUP_ROWS} to {ROWS}")
    images = options.images // GROUP_ROWS * GROUP_ROWS
    with embedded.cluster(cpus=2, object_store_bytes=2 * 2**30) as folder:
        for setting in SETTINGS if options.setting == "both" else [options.setting]:
            files = make_files(WORK, ROWS, short_side=SETTINGS[setting])
            sides = {n: side for n, side in all_sides(files, images, folder).items() if re.search(options.sides, n)}
            alternate(sides, 1)  # workers start, files come into the page cache
            report(setting, alternate(sides, options.repeats), options.json)


def report(setting: str, rates: dict[str, list[float]], path: Path | None) -> None:
    """The table of a setting."""
    out = Report(f"delivered, 2 cores, {setting} files", path)
    for name, values in rates.items():
        out.add(name, values, "images/s")
    for name, values in rates.items():
        if BARE in rates and name != BARE:
            at_least = 0.9 if name == DIRECT else None
            out.add(f"{name} / {BARE}", ratios(values, rates[BARE]), "×", at_least=at_least)
    for name, values in rates.items():
        if DIRECT in rates and name != BARE and not name.startswith("maskray"):
            at_least = None if NOT_NEEDED in name else 1.0
            out.add(f"{DIRECT} / {name}", ratios(rates[DIRECT], values), "×", at_least=at_least)
    out.show()


def all_sides(files: Path, images: int, folder: Path) -> dict[str, Callable[[], float]]:
    """Name and measurement of each side."""
    config, spec = make_spec(make_dataset(files), global_batch=GROUP_ROWS, steps=images // GROUP_ROWS)
    loaders = {
        BARE: bare(spec),
        "maskray, LocalStream": local(spec),
        DIRECT: direct(spec, config.data, folder),
        **contenders(files),
    }
    sides: dict[str, Callable[[], float]] = {name: Steady(loader, images) for name, loader in loaders.items()}
    sides["maskray, Ray Train"] = lambda: trained(spec, config.data, folder)
    return sides


@dataclass(frozen=True)
class Steady:
    """Images a second from a loader once it runs."""

    loader: Loader
    images: int

    def __call__(self) -> float:
        times: list[float] = []
        with closing(self.loader()) as batches:
            for size in islice(batches, self.images // GROUP_ROWS):
                assert size == GROUP_ROWS
                times.append(time.perf_counter())
        return rate_of(times)


def rate_of(times: Sequence[float]) -> float:
    """Images a second of batches that came at these seconds, from the last of the first two tasks of Ray Data on.

    The second runs beside the first, and what it made meanwhile arrives all at once: a clock that started earlier would
    count batches whose work it did not see.
    """
    return (len(times) - START) * GROUP_ROWS / (times[-1] - times[START - 1])


class Positions(Dataset[torch.Tensor]):
    """The stream as a map-style dataset: an item is a whole row group."""

    def __init__(self, spec: StreamSpec) -> None:
        self._spec, self._dataset = spec, spec.open_dataset()

    def __len__(self) -> int:
        return self._spec.total_steps * self._spec.groups_per_step

    def __getitem__(self, position: int) -> torch.Tensor:
        return torch.from_numpy(load_unit(self._spec, self._dataset, position).images_NCHW)


def bare(spec: StreamSpec) -> Loader:
    """The yardstick."""
    loader = DataLoader(Positions(spec), batch_size=None, **PROCESSES)
    return lambda: (len(images) for images in loader)


def local(spec: StreamSpec) -> Loader:
    """Threads of this process."""

    def batches() -> Generator[int]:
        with LocalStream(spec, threads=2) as units:
            for unit in units:
                yield len(unit.images_NCHW)

    return batches


def direct(spec: StreamSpec, data: DataConfig, folder: Path) -> Loader:
    """Ray Data's own iterator, without Train's splitter."""

    def batches() -> Generator[int]:
        # What maskray sets for its execution must not reach those of others.
        with ray.data.DataContext.current(ray.data.DataContext.get_current().copy()):
            (segment,) = stream.datasets(spec, Storage(folder / "none"), 1, data).values()
            units = segment().open()
        units.context.execution_options = stream.execution_options(data)
        rows = units.iter_batches(batch_size=None, prefetch_batches=data.prefetch_groups)
        for row in rows:
            yield row["images"].shape[1]

    return batches


def trained(spec: StreamSpec, data: DataConfig, folder: Path) -> float:
    """Through Ray Train's splitter, measured by the worker."""
    return rate_of(arrivals(spec, data, folder))


if __name__ == "__main__":
    main()
