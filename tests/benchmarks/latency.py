"""How long the stream makes the trainer wait, at a start and at borders: python tests/benchmarks/latency.py

* First batch: from asking for an execution of Ray Data to its first row group, on a cluster that has run one before;
  read directly, and by a worker of Ray Train, through whose splitter it costs a process more.
* Borders: a worker of Ray Train takes steps of 32 row groups (2048 images), four a pass, and notes how long each took:
  once as fast as they come, once as a trainer that is busy a quarter longer than the data takes. A step at a border,
  and the one before it, are set against the median step; the worst of the other steps shows what noise there is.

What must come out: the first batch within 1.5 s directly and 4 s through Train; no step at a border of a pass or of an
execution above twice the median.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import embedded
import numpy as np
import torch
from corpus import GROUP_ROWS, make_dataset, make_spec
from measure import Report, arguments
from on_train import arrivals
from photographs import WORK, make_files

from maskray.config.schema import DataConfig
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.on_ray import stream

ROWS, GROUPS_PER_STEP = 8192, 32
PASS = ROWS // GROUP_ROWS // GROUPS_PER_STEP
EXECUTION = 3 * PASS
"""Steps in a pass and in an execution."""
BUSY = 1.25


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--executions", type=int, default=3, help="in the run that crosses borders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = make_dataset(make_files(WORK, ROWS, short_side=256))
    report = Report("latency of the stream", options.json)
    with embedded.cluster(cpus=2, object_store_bytes=2 * 2**30) as folder:
        config, short = make_spec(dataset, global_batch=ROWS, steps=1)
        first_batch(short, config.data, folder)
        firsts = [first_batch(short, config.data, folder) for _ in range(options.repeats)]
        report.add("first batch, directly", firsts, "s", at_most=1.5)
        firsts = [arrivals(short, config.data, folder)[0] for _ in range(options.repeats)]
        report.add("first batch, through Ray Train", firsts, "s", at_most=4.0)

        config, spec = make_spec(
            dataset,
            global_batch=GROUPS_PER_STEP * GROUP_ROWS,
            steps=options.executions * EXECUTION,
            tasks_per_execution=EXECUTION * GROUPS_PER_STEP // config.data.groups_per_task,
        )
        free = [Waits.of(arrivals(spec, config.data, folder)) for _ in range(options.repeats)]
        pause = BUSY * statistics.median(w.median for w in free)
        busy = [Waits.of(arrivals(spec, config.data, folder, pause)) for _ in free]
    for name, waits in (("as fast as they come", free), ("busy trainer", busy)):
        report.add(f"{name}: median step", [w.median for w in waits], "s")
        report.add(f"{name}: worst at a pass's border", [w.at_passes for w in waits], "× median", at_most=2.0)
        at_executions = [w.at_executions for w in waits]
        report.add(f"{name}: worst at an execution's border", at_executions, "× median", at_most=2.0)
        report.add(f"{name}: worst of the other steps", [w.elsewhere for w in waits], "× median")
    report.show()


def first_batch(spec: StreamSpec, data: DataConfig, folder: Path) -> float:
    """Seconds to the first of a whole execution, which is then read to its end."""
    start = time.perf_counter()
    (segment,) = stream.datasets(spec, Storage(folder / "none"), 1, data).values()
    units = segment().open()
    units.context.execution_options = stream.execution_options(data)
    first = 0.0
    for _ in units.iter_batches(batch_size=None, prefetch_batches=data.prefetch_groups):
        first = first or time.perf_counter() - start
    return first


class Waits(NamedTuple):
    """Of one run: the median step in seconds, and the worst steps of each kind as its multiples."""

    median: float
    at_passes: float
    at_executions: float
    elsewhere: float

    @classmethod
    def of(cls, times: list[float]) -> Waits:
        """From the seconds at which units arrived."""
        ends = np.array(times[GROUPS_PER_STEP - 1 :: GROUPS_PER_STEP])
        steps = np.diff(ends)  # the first step is the start of it all
        median = float(np.median(steps))
        number = np.arange(1, len(ends))

        def near(every: int) -> np.ndarray:
            return (number % every == 0) | (number % every == every - 1)

        at_executions = near(EXECUTION)
        at_passes = near(PASS) & ~at_executions
        worst = [float(steps[at].max(initial=0.0)) / median for at in (at_passes, at_executions)]
        elsewhere = float(steps[~at_passes & ~at_executions].max()) / median
        return cls(median, *worst, elsewhere)


if __name__ == "__main__":
    main()
