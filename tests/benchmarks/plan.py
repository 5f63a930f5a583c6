"""How long the first position of one billion images takes, and how much memory: python tests/benchmarks/plan.py."""

from __future__ import annotations

import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "platform"))

from maskray.data.plan import Plan

GROUPS = 15_625_000  # of 64 images


def main() -> None:
    """Print milliseconds and megabytes."""
    start = time.perf_counter()
    Plan(seed=0, num_row_groups=GROUPS).locate(0)
    first_ms = (time.perf_counter() - start) * 1e3

    tracemalloc.start()
    Plan(seed=1, num_row_groups=GROUPS).locate(GROUPS * 3 + 1)
    peak_mb = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()

    plan, positions = Plan(seed=0, num_row_groups=GROUPS), np.arange(1_000_000)
    start = time.perf_counter()
    plan.locate_many(positions)
    rate = len(positions) / (time.perf_counter() - start)
    print(
        f"first position of {GROUPS * 64:,} images: {first_ms:.2f} ms, {peak_mb:.3f} MB; then {rate:,.0f} positions/s"
    )


if __name__ == "__main__":
    main()
