"""What a sweep costs beside the training of its trials, and what stopping rules save of it.

    maskray ingest digits runs/data/digits --held-out-fraction 0.2
    python tests/benchmarks/sweep.py

The shipped sweeps of the digits, in full and under ASHA, on a cluster of this machine's cores and a store of their own.

Overhead of a trial is all but training: in the process that it shares with others, from the end of the one before to
its own, less the seconds that MLflow has of its training. So judging, checkpoints, MLflow, Tune and the wait for a
place are in it. The first trial of each process is left out: it pays for imports.

What must come out: 36 trials in 15 minutes on two cores, 1.5 s of overhead each. Under ASHA a third of the trials or
more are stopped; the point that it takes for the best is the full sweep's, or behind it by noise; and nothing is left.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import embedded
from measure import Report, arguments
from ray._private.state import actors
from ray.util.placement_group import placement_group_table

from maskray.config.sweep import load_sweep
from maskray.on_ray.sweep import trial
from maskray.on_ray.sweep import tune as on_ray
from maskray.on_ray.sweep.trial import ASKED, Asked, Sweep
from maskray.sweeping import life, preparing
from maskray.sweeping.preparing import Prepared
from maskray.sweeps import record
from maskray.sweeps.ranking import judged, ranked
from maskray.sweeps.record import Result

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))
FULL, ASHA = "configs/sweep/mask_ratio_x_depth.yaml", "configs/sweep/mask_ratio_x_depth_asha.yaml"
TIMES, SWEEP_TAG, GONE_SECONDS = "times", "maskray.storage", 10.0


def main() -> None:
    """Print a table."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of both sweeps")
    parser.add_argument("--full", default=FULL, help="(default: %(default)s)")
    parser.add_argument("--stopped", default=ASHA, help="(default: %(default)s)")
    given = parser.parse_args()
    report = Report("sweep, digits", given.json)
    with tempfile.TemporaryDirectory(prefix="maskray-bench-") as folder:
        place = [f"overrides.storage.path={folder}", *given.set]
        swept: dict[str, Mapping[str, Result]] = {}
        for name in (given.full, given.stopped):
            # Each begins on a cluster of its own, as a user's does.
            with embedded.cluster(cpus=CORES, object_store_bytes=2**28):
                prepared = preparing.prepare(load_sweep(ROOT / name, place))
                swept[name] = timed(prepared, report)
                left(prepared, report)
        compare(prepared, *swept.values(), report)
    report.show()


def timed(prepared: Prepared, report: Report) -> Mapping[str, Result]:
    """Run it; how long it took, and its trials beside their training."""
    begun = time.perf_counter()
    with life.begun(prepared) as run_id:
        on_ray.run(prepared, run_id, lambda result, ended: print(dict(ended), result.trial.name, result.value), noted)
        results = life.finish(prepared, run_id)
    minutes = (time.perf_counter() - begun) / 60
    name = prepared.config.name
    report.add(f"{name}: {len(results)} trials", [minutes], "min", at_most=15)
    report.add(f"{name}: training of a trial", [each.seconds for each in results.values()], "s")
    report.add(f"{name}: overhead of a trial", overheads(prepared, results), "s", at_most=1.5)
    return results


def noted(parameters: Mapping[str, Any], sweep: Sweep) -> None:
    """As `trial.run`, with a note of when it was, and in which process."""
    begun = time.time()
    try:
        trial.run(parameters, sweep)
    finally:  # it may be stopped
        note = json.dumps({"process": os.getpid(), "begun": begun, "ended": time.time()})
        sweep.folder.write_bytes(f"{TIMES}/{Asked.load(parameters[ASKED]).trial.key}", note.encode())


def overheads(prepared: Prepared, results: Mapping[str, Result]) -> list[float]:
    """Seconds of each trial but the first of its process, all but training."""
    by_process = defaultdict[int, list[tuple[float, float]]](list)
    for key, result in results.items():
        note = json.loads(prepared.folder.read_bytes(f"{TIMES}/{key}"))
        by_process[note["process"]].append((note["ended"], result.seconds))
    found = []
    for ends in map(sorted, by_process.values()):
        found += [ended - before - seconds for (before, _), (ended, seconds) in pairwise(ends)]
    return found


def left(prepared: Prepared, report: Report) -> None:
    """What is still there of it a few seconds after its end."""
    deadline = time.monotonic() + GONE_SECONDS
    while (there := groups_and_actors()) and time.monotonic() < deadline:
        time.sleep(0.2)
    store = prepared.store
    runs = store.client().search_runs([store.experiment_id], f"tags.`{SWEEP_TAG}` = '{prepared.folder.uri}'")
    running = sum(run.info.status == "RUNNING" for run in runs)
    report.add(
        f"{prepared.config.name}: placement groups, actors and running runs left", [there + running], "", at_most=0
    )
    report.add(f"{prepared.config.name}: runs in MLflow, the parent among them", [len(runs)], "")


def groups_and_actors() -> int:
    """How many there are."""
    groups = sum(each["state"] != "REMOVED" for each in placement_group_table().values())
    return groups + sum(each["State"] != "DEAD" for each in actors().values())


def compare(prepared: Prepared, full: Mapping[str, Result], stopped: Mapping[str, Result], report: Report) -> None:
    """What stopping saves, and whether its best is the full sweep's or as good."""
    pruned = [each for each in stopped.values() if each.status == "pruned"]
    report.add("trials that ASHA stops", [len(pruned) / len(stopped)], "", at_least=1 / 3)
    spent = [sum(each.flops for each in results.values()) for results in (stopped, full)]
    report.add("FLOP that it spends", [spent[0] / spent[1]], "of the full sweep's")
    points = ranked(prepared.config, full)
    verdict = judged(prepared.config, points)
    assert verdict is not None
    chosen = ranked(prepared.config, stopped)[0]
    report.note(f"best of the full sweep: {shown(verdict.best)}; of ASHA: {shown(chosen)}")
    behind = next((other for other in verdict.others if other.summary.point == chosen.point), None)
    report.add(
        "its best, behind that of the full sweep", [100 * (behind.behind or 0) if behind else 0.0], "points of %"
    )
    report.add("noise of the full sweep", [100 * (verdict.margin or 0)], "points of %")


def shown(one: Any) -> str:
    """A point, for people."""
    return f"{' '.join(f'{key}={record.shown(value)}' for key, value in one.point.items())}: {100 * one.reached:.1f} %"


if __name__ == "__main__":
    main()
